"""Options that change a recipe for one run, without a file: they are read here and applied by `options.recipe_of`.

A command that takes them has no parameter for them: what was given is kept with click's context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .completing import TypeAfter, TypeName

if TYPE_CHECKING:
    from quantkit.model.catalogue import Catalogue
    from quantkit.planning.plan import Plan
    from quantkit.recipe.changes import Changes

F = TypeVar("F", bound=Callable[..., Any])
_KEY = "quantkit.changes"
#: before the names of click's parameters, of which a command has others
_PREFIX = "changed_"


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    ctx.meta.setdefault(_KEY, {})[str(param.name).removeprefix(_PREFIX)] = value


def _option(flag: str, name: str, **about: Any) -> Callable[[F], F]:
    return click.option(flag, _PREFIX + name, expose_value=False, callback=_keep, **about)


_OWN = (
    _option(
        "--type", "types", multiple=True, type=TypeAfter(), metavar="GLOB[@LAYERS]=TYPE",
        help="A type for the tensors that GLOB matches, before the recipe's rules; LAYERS such as 3-12 or moe[:6]. "
        "Repeatable: of several the first that matches decides.",
    ),
    _option(
        "--override-kv", "metadata", multiple=True, metavar="KEY=TYPE:VALUE",
        help="Set a metadata key: str, int, float or bool, as in llama-quantize.",
    ),
    _option("--name", "name", metavar="NAME", help="What the changed recipe is called.  [default: RECIPE-changed]"),
)  # fmt: skip
_TOOLS = (
    _option(
        "--tensor-type", "tensor_types", multiple=True, type=TypeAfter(), metavar="REGEX=TYPE",
        help="As in llama-quantize: a type for the tensors whose names have REGEX in them.",
    ),
    _option(
        "--output-tensor-type", "output_type", type=TypeName(), metavar="TYPE", help="As in llama-quantize: of output.",
    ),
    _option(
        "--token-embedding-type", "embedding_type", type=TypeName(), metavar="TYPE",
        help="As in llama-quantize: of token_embd.",
    ),
)  # fmt: skip


def _together(command: F, options: tuple[Callable[[Any], Any], ...]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def change_options(command: F) -> F:
    """--type, --override-kv, --name, and llama-quantize's options for types."""
    return _together(command, (*_OWN, *_TOOLS))


def own_change_options(command: F) -> F:
    """--type, --override-kv, --name: what a recipe's file can say."""
    return _together(command, _OWN)


def changes() -> Changes:
    """What was given to the command at work."""
    from quantkit.recipe.changes import Changes

    ctx = click.get_current_context(silent=True)
    given = {} if ctx is None else ctx.meta.get(_KEY, {})
    return Changes(**{key: value for key, value in given.items() if value not in (None, ())})


def say_partial(catalogue: Catalogue) -> None:
    """What is not here of a model, on standard error, where a command shows no notes that would say it."""
    if catalogue.partial:
        click.echo(f"note: {catalogue.model}: {catalogue.partial}", err=True)


def say_warnings(plan: Plan) -> None:
    """What is odd about changes, on standard error, where a command shows no plan that would say it."""
    if changes():
        for warning in plan.warnings:
            click.echo(f"warning: {warning}", err=True)

"""What the shell is offered when someone presses Tab: recipes, models, types, variables, and else files.

click asks a parameter's type. Nothing heavy is imported for it, and no file is read but the shipped recipes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    _StrParam = click.ParamType[str]
else:
    _StrParam = click.ParamType  # generic in newer releases only

Items = list["CompletionItem[str]"]


def starting(names: Iterable[str], incomplete: str, before: str = "") -> Items:
    """The names that begin so, in any case, each behind `before`."""
    return [CompletionItem(before + name) for name in names if name.lower().startswith(incomplete.lower())]


def or_files(names: Iterable[str], incomplete: str) -> Items:
    """The names that begin so, else files."""
    return starting(names, incomplete) or [CompletionItem(incomplete, type="file")]


def types() -> list[str]:
    from quantkit.gguf.types import INTEGER_TYPES, QTYPES

    return [name for name in QTYPES if name not in INTEGER_TYPES]


def recipes() -> list[str]:
    from importlib.resources import files

    from quantkit.gguf.types import FILE_TYPES

    there = (item.name for item in files("quantkit.recipes").iterdir())
    own = sorted(name.removesuffix(".yaml") for name in there if name.endswith(".yaml"))
    return [*own, *(name for name in FILE_TYPES if name not in own)]


def models() -> Iterable[str]:
    from quantkit.model.families.known import MODELS

    return MODELS


class TypeName(_StrParam):
    """A ggml type. It is checked where it is used, since what is wrong is said there."""

    name = "type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        return starting(types(), incomplete)


class TypeAfter(TypeName):
    """Something=TYPE."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        before, equals, begun = incomplete.rpartition("=")
        return starting(types(), begun, before + equals) if equals else []


class VariableAndType(TypeAfter):
    """A recipe's variable, then =, then a type."""

    name = "set"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        if "=" in incomplete:
            return super().shell_complete(ctx, param, incomplete)
        recipe = next((v for k in ("recipe", "name", "after") if isinstance(v := ctx.params.get(k), str)), None)
        return [] if recipe is None else starting((f"{name}=" for name in _variables(recipe)), incomplete)


def _variables(recipe: str) -> Iterable[str]:
    from quantkit.base.errors import QuantkitError
    from quantkit.recipe.load import load

    try:
        return load(recipe).variables
    except QuantkitError:
        return ()

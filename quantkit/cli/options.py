"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from .files import IMATRIX, MODEL, RECIPE

if TYPE_CHECKING:
    from quantkit.model.families.options import Options
    from quantkit.model.imatrix import Imatrix
    from quantkit.recipe.load import Recipe

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
else:
    _IntParam = click.ParamType  # generic in newer releases only

F = TypeVar("F", bound=Callable[..., Any])


class Size(_IntParam):
    """50G, 50GB, 1.5M, 40GiB, 4000K or plain bytes, with or without a space. K, M, G and T are decimal, as in
    llama-gguf-split, and so are KB to TB, of which decimals are taken exactly; KiB to TiB are powers of 1024."""

    name = "size"
    _units: ClassVar[dict[str, int]] = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    _pattern = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,12})?)\s*(?:([KMGT])(I?)B?|(B)?)", re.IGNORECASE)

    def __init__(self, bare: int = 1, least: int = 1) -> None:
        self.bare, self.least = bare, least
        """what a number without a unit counts, and the least size"""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        m = self._pattern.fullmatch(str(value).strip())
        nbytes = Fraction(-1)
        if m:
            base, power = (1024 if m[3] else 1000), self._units[(m[2] or "").upper()]
            unit = base**power if m[2] or m[4] else self.bare
            nbytes = Fraction(m[1]) * unit
            if m[3] or unit == self.bare > 1:  # 1.1 GiB is no whole number of bytes
                nbytes = Fraction(int(nbytes))
        if nbytes < self.least or nbytes.denominator != 1:
            wanted = "50G, 1.5GB, 40GiB or 4000000" if self.bare == 1 else "24, 1.5, 64GiB or 64GB"
            units = "G and GB are 10^9 bytes, GiB 2^30"
            self.fail(f"{value!r} is not a size such as {wanted} ({units})", param, ctx)
        return int(nbytes)


layout_option = click.option(
    "--layout",
    type=click.Choice(["k_b+v_b", "kv_b"]),
    default="k_b+v_b",
    show_default=True,
    help="MLA tensors of a checkpoint: attn_k_b and attn_v_b (now), or attn_kv_b (early 2025).",
)
set_option = click.option(
    "--set", "sets", multiple=True, metavar="NAME=TYPE", help="Set a variable of the recipe (its `vars`)."
)
mixture_version_option = click.option(
    "--mixture-version",
    type=click.Choice(["current", "2025"]),
    default="current",
    show_default=True,
    help="Whose choices llama.cpp's mixtures mean: today's, or those of files made until March 2026.",
)


threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all processors]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON on standard output.")


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator for several, which --help shows in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


#: SOURCE, --recipe, --set, --mixture-version, --layout, --imatrix, --pre, --pad-token, --split-max-size
source_options = together(
    click.argument("source", type=MODEL),
    click.option(
        "-r", "--recipe", required=True, type=RECIPE, help="Name of a shipped recipe, or path of a YAML file."
    ),
    set_option,
    mixture_version_option,
    layout_option,
    click.option("--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix of llama-imatrix (GGUF or .dat)."),
    click.option("--pre", metavar="NAME", help="tokenizer.ggml.pre, for a tokenizer that is not recognized."),
    click.option("--pad-token", metavar="TOKEN", help="Padding token (text or id) in place of the tokenizer's."),
    click.option(
        "--split-max-size",
        type=Size(),
        metavar="SIZE",
        help="Split the output into shards of at most so much tensor data: 50G or 50GB (10^9 bytes), 46GiB.",
    ),
)
#: --dry-run, --quiet of what prints a plan and then carries it out
plan_first_options = together(
    click.option("-n", "--dry-run", is_flag=True, help="Check everything and print the plan; write nothing."),
    click.option("-q", "--quiet", is_flag=True, help="Neither plan nor progress; errors only."),
)


def conversion(layout: str, pre: str | None, pad_token: str | None) -> Options:
    from quantkit.model.families.options import Options

    context = click.get_current_context(silent=True)
    given = context is not None and context.get_parameter_source("layout") is click.core.ParameterSource.COMMANDLINE
    return Options(layout, pre, pad_token=pad_token, layout_given=given)


def ready_kernels() -> None:
    """Tell the kernels of the toolchain, and raise KernelError when the environment asks for some that are not here."""
    from quantkit import kernels
    from quantkit.llama_cpp import toolchain

    kernels.use_pinned_library(toolchain.ggml_library())
    kernels.check_choice()


def recipe_of(name: str, sets: Sequence[str]) -> Recipe:
    """The recipe by name or path, with --set's."""
    from quantkit.recipe.load import load, parse_sets

    return load(name, parse_sets(sets))


def imatrix_of(path: str | None) -> Imatrix | None:
    from quantkit.model.imatrix import open_imatrix

    return None if path is None else open_imatrix(path)

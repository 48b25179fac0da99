"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

if TYPE_CHECKING:
    from quantkit.arch.options import Options
    from quantkit.imatrix import Imatrix
    from quantkit.recipe import Recipe

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
else:
    _IntParam = click.ParamType  # generic in newer releases only

F = TypeVar("F", bound=Callable[..., Any])


class Size(_IntParam):
    """50G, 1.5M, 4000K or plain bytes; decimal units, as in llama-gguf-split, and decimals taken exactly."""

    name = "size"
    _units: ClassVar[dict[str, int]] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        m = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,12})?)([KMGT]?)", str(value).upper())
        nbytes = Fraction(m[1]) * self._units[m[2]] if m else Fraction(0)
        if nbytes == 0 or nbytes.denominator != 1:
            self.fail(f"{value!r} is not a size such as 50G, 1.5G or 4000000 (G = 10^9 bytes)", param, ctx)
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
    click.argument("source"),
    click.option("-r", "--recipe", required=True, help="Name of a shipped recipe, or path of a YAML file."),
    set_option,
    mixture_version_option,
    layout_option,
    click.option("--imatrix", metavar="FILE", help="Importance matrix of llama-imatrix (GGUF or .dat)."),
    click.option("--pre", metavar="NAME", help="tokenizer.ggml.pre, for a tokenizer that is not recognized."),
    click.option("--pad-token", metavar="TOKEN", help="Padding token (text or id) in place of the tokenizer's."),
    click.option(
        "--split-max-size",
        type=Size(),
        metavar="N[K|M|G|T]",
        help="Split the output into shards of at most so much tensor data (G = 10^9 bytes).",
    ),
)
#: --dry-run, --quiet of what prints a plan and then carries it out
plan_first_options = together(
    click.option("-n", "--dry-run", is_flag=True, help="Check everything and print the plan; write nothing."),
    click.option("-q", "--quiet", is_flag=True, help="Neither plan nor progress; errors only."),
)


def conversion(layout: str, pre: str | None, pad_token: str | None) -> Options:
    from quantkit.arch.options import Options

    context = click.get_current_context(silent=True)
    given = context is not None and context.get_parameter_source("layout") is click.core.ParameterSource.COMMANDLINE
    return Options(layout, pre, pad_token=pad_token, layout_given=given)


def recipe_of(name: str, sets: Sequence[str]) -> Recipe:
    """The recipe by name or path, with --set's."""
    from quantkit.recipe import load, parse_sets

    return load(name, parse_sets(sets))


def imatrix_of(path: str | None) -> Imatrix | None:
    from quantkit.imatrix import open_imatrix

    return None if path is None else open_imatrix(path)


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from .changes import change_options, changes
from .completing import VariableAndType
from .files import COVARIANCE_IN, IMATRIX, MODEL, RECIPE, ROUNDING_POLICY

if TYPE_CHECKING:
    from quantkit.imatrix.matrix import Imatrix
    from quantkit.imatrix.policies import Policy
    from quantkit.model.families.options import Options
    from quantkit.planning.plan import Plan
    from quantkit.recipe.load import Recipe, Rounding
    from quantkit.rounding.covariance import Covariances

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
    _PolicyParam = click.ParamType[Any]
else:
    _IntParam = _PolicyParam = click.ParamType  # generic in newer releases only

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


class _PolicyChain(_PolicyParam):
    """sibling,prior and the like, read by quantkit.imatrix.policies; a value is a Policy."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Policy:
        from quantkit.imatrix.policies import Policy, parse_policy

        if isinstance(value, Policy):
            return value
        try:
            return parse_policy(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


imatrix_policy_option = click.option(
    "--imatrix-policy",
    "policy",
    type=_PolicyChain(),
    metavar="POLICY",
    help="What to use where the importance matrix has no data, such as for experts it never saw: fail, ones, "
    "sibling, prior, shrink:K, raise:TYPE, kv_b, or several in order: sibling,prior.  [default: the recipe's, "
    "else fail]",
)
layout_option = click.option(
    "--layout",
    type=click.Choice(["k_b+v_b", "kv_b"]),
    default="k_b+v_b",
    show_default=True,
    help="MLA tensors of a checkpoint: attn_k_b and attn_v_b (now), or attn_kv_b (early 2025).",
)
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    type=VariableAndType(),
    metavar="NAME=TYPE",
    help="Set a variable of the recipe (its `vars`).",
)
mixture_version_option = click.option(
    "--mixture-version",
    type=click.Choice(["current", "2025"]),
    default="current",
    show_default=True,
    help="Which choices llama.cpp's mixtures make: today's, or those of files made until March 2026.",
)


threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all processors]"
)
device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="Where the model is computed: cpu, cuda, cuda:1."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="Type of matrix products: bf16 is faster on a GPU, and less exact.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator for several, which --help shows in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


#: --device, --dtype, --memory, --threads of what computes a model
forward_options = together(
    device_option,
    dtype_option,
    click.option(
        "--memory",
        type=Size(),
        metavar="SIZE",
        help="Memory for hidden states; the rest is kept in mapped files.  [default: no limit]",
    ),
    threads_option,
)
#: --pre, --pad-token of what opens a source
#: as `memory`, of probes that advance together
probe_memory_option = click.option(
    "--memory",
    type=Size(),
    default="8GiB",
    show_default=True,
    help="Memory for hidden states, which limits the probes per pass.",
)
tokenizer_options = together(
    click.option("--pre", metavar="NAME", help="tokenizer.ggml.pre, for a tokenizer that is not recognized."),
    click.option("--pad-token", metavar="TOKEN", help="Padding token (text or id) in place of the tokenizer's."),
)
#: SOURCE, --recipe, --set, --mixture-version, --layout, --imatrix, --imatrix-policy, --pre, --pad-token,
#: --split-max-size
source_options = together(
    click.argument("source", type=MODEL),
    click.option(
        "-r", "--recipe", required=True, type=RECIPE, help="Name of a shipped recipe, or path of a YAML file."
    ),
    set_option,
    change_options,
    mixture_version_option,
    layout_option,
    click.option("--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix of llama-imatrix (GGUF or .dat)."),
    imatrix_policy_option,
    tokenizer_options,
    click.option(
        "--split-max-size",
        type=Size(),
        metavar="SIZE",
        help="Split the output into shards with at most this much tensor data each: 50G or 50GB (10^9 bytes), 46GiB.",
    ),
)
#: --rounding, --rounding-policy, --covariance
rounding_options = together(
    click.option(
        "--rounding",
        type=click.Choice(["ggml", "coarse", "feedback", "feedback+gain"]),
        help="How to round, instead of what the recipe says: as ggml does, or with each column's error corrected in "
        "later columns, for files closer to the model at the same size.  [default: the recipe's, else ggml]",
    ),
    click.option(
        "--rounding-policy",
        type=ROUNDING_POLICY,
        metavar="NAME|FILE",
        help="Round by a policy, which chooses a method for each tensor; made by `quantkit rounding tune`.",
    ),
    click.option(
        "--covariance",
        type=COVARIANCE_IN,
        metavar="DIR",
        help="Second moments of the inputs, made by `quantkit imatrix make --covariance`; needed by every rounding "
        "but ggml's.",
    ),
)
#: --dry-run, --quiet of what prints a plan and then carries it out
plan_first_options = together(
    click.option("-n", "--dry-run", is_flag=True, help="Check everything and print the plan; write nothing."),
    click.option("-q", "--quiet", is_flag=True, help="No plan and no progress, only warnings and errors."),
)


def conversion(layout: str, pre: str | None, pad_token: str | None) -> Options:
    from quantkit.model.families.options import Options

    context = click.get_current_context(silent=True)
    given = context is not None and context.get_parameter_source("layout") is click.core.ParameterSource.COMMANDLINE
    return Options(layout, pre, pad_token=pad_token, layout_given=given)


def only_types(layout: str, pre: str | None, pad_token: str | None) -> Options:
    """The same for a command that asks only for types and sizes: a tokenizer that nobody knows is no reason to stop."""
    options = conversion(layout, pre, pad_token)
    return options if pre is not None else options._replace(pre="(not recognized)", recognize=True)


def ready_kernels() -> None:
    """Raise KernelError when the environment asks for kernels that are not here."""
    from quantkit import kernels

    kernels.check_choice()


def recipe_of(name: str, sets: Sequence[str], changed: bool = True) -> Recipe:
    """The recipe by name or path, with --set's, and unless it is not `changed`, with --type's and the like."""
    from quantkit.recipe.load import load, parse_sets

    recipe = load(name, parse_sets(sets))
    return changes().apply(recipe) if changed else recipe


def wanted_rounding(method: str | None, policy: str | None) -> Rounding | None:
    """What --rounding or --rounding-policy say. Raises UsageError for both."""
    from quantkit.recipe.load import Rounding

    if method is not None and policy is not None:
        raise click.UsageError("--rounding and --rounding-policy both say how to round; give one")
    if method is not None:
        return Rounding(method, said_by="--rounding")
    return None if policy is None else Rounding("", policy, Path(), said_by="--rounding-policy")


def rounded(recipe: Recipe, method: str | None, policy: str | None) -> Recipe:
    """The recipe with --rounding's or --rounding-policy's say. Raises UsageError for both."""
    wanted = wanted_rounding(method, policy)
    return recipe if wanted is None else recipe.with_rounding(wanted)


def covariance_of(folder: Path | None) -> Covariances | None:
    """The covariance, if one is given. Raises SourceError."""
    from quantkit.rounding.covariance import Covariances

    return None if folder is None else Covariances(folder)


def with_covariance(plan: Plan, folder: Path | None) -> Plan:
    """The plan with what --covariance has for it. Raises UsageError where it has no use for one, SourceError."""
    from quantkit.planning.rounding import with_covariance as add

    if folder is not None and plan.rounding is None:
        raise click.UsageError(
            "--covariance needs a rounding to use it: give --rounding feedback, --rounding-policy, or a recipe that "
            "says how to round"
        )
    return add(plan, covariance_of(folder))


def imatrix_of(path: str | None, policy: Policy | None = None) -> Imatrix | None:
    """The importance matrix, if one is given. Raises UsageError for a policy without one, ImatrixError."""
    from quantkit.imatrix.matrix import open_imatrix

    if path is None and policy is not None:
        raise click.UsageError("--imatrix-policy needs --imatrix FILE: it says what stands in for what FILE lacks")
    return None if path is None else open_imatrix(path)

"""Options of what computes second moments while it builds, and the pass that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .files import TEXT
from .options import Size, device_option, dtype_option, together
from .text_options import chunk_options, read_chunks

if TYPE_CHECKING:
    from quantkit.planning.plan import Plan

_OPTIONS = {
    "chat": "--chat", "parse_special": "--parse-special", "n_ctx": "--ctx", "n_chunks": "--chunks",
    "device": "--device", "dtype": "--dtype", "memory": "--memory",
}  # fmt: skip

#: --text and how it is cut, --device, --dtype, --memory
pass_options = together(
    click.option(
        "--text",
        "texts",
        multiple=True,
        type=TEXT,
        help="In place of --covariance: compute the model over this text (a file, a folder, a .jsonl file) while it is "
        "built, layer by layer, for the second moments that the rounding needs, and without --imatrix for the "
        "importance that the recipe needs. One layer of them is on the disk at a time; the costs are those of "
        "`quantkit imatrix make`. Can be repeated.",
    ),
    click.option("--chat", is_flag=True, help="With --text: apply the model's chat template to .jsonl `messages`."),
    click.option("--parse-special", is_flag=True, help="With --text: control tokens (<|im_start|>) are tokens."),
    chunk_options,
    device_option,
    dtype_option,
    click.option(
        "--memory", type=Size(), metavar="SIZE", help="With --text: for hidden states; more of them are mapped files."
    ),
)


class PassAsked(NamedTuple):
    """These options, by name."""

    texts: tuple[str, ...]
    chat: bool
    parse_special: bool
    n_ctx: int
    n_chunks: int | None
    device: str
    dtype: str
    memory: int | None


def pass_asked(given: dict[str, Any], covariance: Path | None) -> PassAsked | None:
    """What was asked for; None without --text. Raises UsageError for options that have no use."""
    ctx = click.get_current_context()
    if not given["texts"]:
        for name, option in _OPTIONS.items():
            if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{option} needs --text")
        return None
    if covariance is not None:
        raise click.UsageError("--covariance and --text both give second moments; give one")
    return PassAsked(**{name: given[name] for name in PassAsked._fields})


def with_pass(plan: Plan, asked: PassAsked, n_threads: int | None) -> Plan:
    """The plan with second moments that a pass in the build computes. Raises UsageError where it has no use for them,
    SourceError, TextError."""
    if plan.rounding is None:
        raise click.UsageError(
            "--text needs a rounding to use it: give --rounding feedback, --rounding-policy, or a recipe that says how "
            "to round"
        )
    from quantkit.base.errors import SourceError
    from quantkit.lab import require_torch
    from quantkit.planning.plan import with_moments

    if plan.catalogue.source is None:
        raise SourceError(f"{plan.catalogue.model}: there are no weights to compute; give a checkpoint or a GGUF")
    require_torch()
    from quantkit.forward.stream import Options
    from quantkit.lab.calibration.streamed import Streamed

    chunks = read_chunks(plan.catalogue, asked.texts, asked.n_ctx, asked.n_chunks, asked.chat, asked.parse_special)
    forward = Options(asked.device, asked.dtype, n_threads or 0, asked.memory)
    files = [path for text in asked.texts if (path := Path(text)).is_file()]
    return with_moments(plan, Streamed(plan.catalogue, chunks.tokens, files, forward))

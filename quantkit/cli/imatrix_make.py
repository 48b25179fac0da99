"""quantkit imatrix make."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar
from .files import COVARIANCE, IMATRIX_MADE, MODEL, TOOL, Command
from .hub_options import fetched, fetching, hub_options
from .imatrix_estimate import DISK, Rate, check_estimate, estimate_options, print_estimate
from .options import (
    conversion,
    forward_options,
    json_option,
    ready_kernels,
    together,
    tokenizer_options,
)
from .text_options import check_countable, chunk_options, optional_text_options, print_notes

if TYPE_CHECKING:
    from quantkit.lab.calibration.make_imatrix import MakeOptions
    from quantkit.model.catalogue import Catalogue
    from quantkit.text.chunking import Chunks

    _CoverageType = click.ParamType[tuple[float, int]]
else:
    _CoverageType = click.ParamType  # generic in newer releases only

NATIVE, TOOL_ENGINE = "native", "llama-imatrix"


class Coverage(_CoverageType):
    """99%:100 or 0.99:100: that share of experts, with that many tokens."""

    name = "share:tokens"
    _pattern = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)(%?):([0-9]{1,9})")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, int]:
        m = self._pattern.fullmatch(str(value).strip())
        share = float(m[1]) / (100 if m[2] else 1) if m else 0.0
        if m is None or not 0 < share <= 1 or int(m[3]) < 1:
            self.fail(f"{value!r} is not a share of experts and a number of tokens such as 99%:100", param, ctx)
        return share, int(m[3])


#: --covariance, --pooled-experts, --fisher, --disk
_covariance_options = together(
    click.option(
        "--covariance",
        type=COVARIANCE,
        metavar="DIR",
        help="Also write the second moments X^T X of all inputs to a new folder, for `--rounding`. The size is "
        "printed first.",
    ),
    click.option(
        "--pooled-experts",
        is_flag=True,
        help="With --covariance: one matrix per layer for the experts' ffn_down, not one per expert.",
    ),
    click.option(
        "--fisher",
        is_flag=True,
        help="With --covariance: a token counts for a matrix as the squared gradient at its output, of the model's own "
        "predictions. Computed backwards, layer by layer; --estimate says what memory and disk it takes.",
    ),
    click.option(
        "--disk",
        "disks",
        type=DISK,
        multiple=True,
        metavar="SIZE|RATE",
        help="A size (200GB): the most a covariance may take; if a matrix per expert is more, experts share one. "
        "With --estimate a rate (5GB/s): reading speed of the disk.",
    ),
)
#: --engine and what only llama-imatrix has
_engine_options = together(
    click.option(
        "--engine",
        type=click.Choice([NATIVE, TOOL_ENGINE]),
        default=NATIVE,
        show_default=True,
        help="native: layer by layer; llama-imatrix: run the stock tool, which needs the whole model in memory.",
    ),
    click.option(
        "--llama-imatrix", "binary", type=TOOL, metavar="PATH", help="The tool (else PATH, else the toolchain's)."
    ),
    click.option(
        "--via",
        type=click.Choice(["BF16", "Q8_0"]),
        default="BF16",
        show_default=True,
        help="Type of the temporary GGUF that a checkpoint is converted to for the tool.",
    ),
    click.option(
        "--save-frequency",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        metavar="N",
        help="Save the tool's sums after every N chunks.",
    ),
)


@click.command(cls=Command)
@click.argument("source", type=MODEL)
@click.option(
    "-o", "--output", type=IMATRIX_MADE, help="The importance matrix to make, a GGUF as llama-imatrix writes it."
)
@optional_text_options
@chunk_options
@click.option("--process-output", is_flag=True, help="output.weight too.")
@click.option(
    "--target-coverage",
    "target",
    type=Coverage(),
    metavar="SHARE:TOKENS",
    help="Stop reading once this share of experts has seen this many tokens: 99%:100.",
)
@_covariance_options
@_engine_options
@forward_options
@hub_options("that of the output")
@estimate_options
@tokenizer_options
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="No notes, no progress; errors only.")
@json_option
def make(source: str, pre: str | None, pad_token: str | None, quiet: bool, **_: Any) -> None:
    """Make an importance matrix: the mean squared input of each column of each matrix, over a text.

    The model runs layer by layer and expert by expert, straight from the checkpoint or GGUF, so it need not fit in
    memory. After an interruption, run the same command again to continue.

    \b
    quantkit imatrix make DeepSeek-R1/ --text calibration.txt -o imatrix.gguf
    quantkit imatrix make R1-Q8_0-00001-of-00015.gguf --text books/ --text chats.jsonl --target-coverage 99%:100 \\
        -o imatrix.gguf
    quantkit imatrix make hf://deepseek-ai/DeepSeek-R1 --text calibration.txt -o imatrix.gguf --keep 4
    quantkit imatrix make SmolLM2-135M/ --text calibration.txt -o imatrix.gguf --covariance cov --fisher
    quantkit imatrix make deepseek-r1 --estimate --gpu-tflops 400 --disk 5GB/s --text-tokens 1M
    """
    from quantkit.model.open import open_model

    ctx = click.get_current_context()
    given = _Given(**{name: ctx.params[name] for name in _Given.__dataclass_fields__})
    _check_usage(ctx, given)
    if given.estimate:
        model = open_model(source, conversion("k_b+v_b", pre, pad_token))
        if given.text_tokens is None:
            check_countable(model)
        n_tokens = given.text_tokens or _chunks(model, given, quiet).tokens.size
        print_estimate(source, model, n_tokens, ctx.params)
        return
    ready_kernels()
    model = open_model(source, conversion("k_b+v_b", pre, pad_token))
    if given.engine == NATIVE:
        from quantkit.lab import require_torch
        from quantkit.model.hub import with_layers

        require_torch()
        model = with_layers(model)
    start = time.monotonic()
    facts = (_make if given.engine == NATIVE else _drive)(model, given, quiet or given.as_json)
    assert given.output is not None
    facts = {
        "file": str(given.output), "bytes": given.output.stat().st_size, **facts, "engine": given.engine,
        "seconds": round(time.monotonic() - start, 3),
    }  # fmt: skip
    if given.as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    elif not quiet:
        _tell(facts)


@dataclass(frozen=True)
class _Given:
    """The command's parameters, by name."""

    output: Path | None
    texts: tuple[str, ...]
    chat: bool
    parse_special: bool
    n_ctx: int
    n_chunks: int | None
    process_output: bool
    target: tuple[float, int] | None
    covariance: Path | None
    pooled_experts: bool
    fisher: bool
    disks: tuple[int | Rate, ...]
    engine: str
    binary: str | None
    via: str
    save_frequency: int
    device: str
    dtype: str
    memory: int | None
    threads: int | None
    estimate: bool
    text_tokens: int | None
    keep: tuple[int, int | None]
    shards: Path | None
    force: bool
    as_json: bool

    @property
    def room(self) -> int | None:
        """Bytes that a covariance may take."""
        return next((d for d in self.disks if isinstance(d, int)), None)


def _check_usage(ctx: click.Context, given: _Given) -> None:
    """Raise UsageError for options that do not go together."""

    def said(name: str) -> bool:
        return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    needs = [
        ("--pooled-experts", given.pooled_experts, "--covariance", given.covariance is not None),
        ("--fisher", given.fisher, "--covariance", given.covariance is not None),
        ("--fisher", given.fisher, "a matrix an expert: leave out --pooled-experts", not given.pooled_experts),
        ("--fisher", given.fisher, "--device cpu", given.device == "cpu"),
        ("--fisher", given.fisher, "--dtype f32", given.dtype == "f32"),
        ("--disk SIZE", given.room is not None, "--covariance", given.covariance is not None),
        *((f"--{option}", said(name), "--engine llama-imatrix", given.engine == TOOL_ENGINE)
          for option, name in (("llama-imatrix", "binary"), ("via", "via"), ("save-frequency", "save_frequency"))),
        *((f"--{option}", said(name), "--engine native", given.engine == NATIVE)
          for option, name in (("target-coverage", "target"), ("covariance", "covariance"), ("chat", "chat"),
                               ("parse-special", "parse_special"), ("device", "device"), ("dtype", "dtype"),
                               ("memory", "memory"), ("keep", "keep"), ("shards", "shards"))),
    ]  # fmt: skip
    for option, is_given, other, is_there in needs:
        if is_given and not is_there:
            raise click.UsageError(f"{option} needs {other}")
    check_estimate(ctx, given.estimate)
    if not given.estimate:
        for name, option in (("output", "-o"), ("texts", "--text")):
            if not getattr(given, name):
                raise click.UsageError(f"Missing option '{option}'.")
    elif not given.texts and given.text_tokens is None:
        raise click.UsageError("--estimate needs --text-tokens, or a --text to count")


def _chunks(model: Catalogue, given: _Given, quiet: bool) -> Chunks:
    from quantkit import text

    how = {"chat": given.chat, "parse_special": given.parse_special}
    made = text.chunks(model, given.texts, given.n_ctx, given.n_chunks, **how)
    if not quiet:
        print_notes(made.notes)
    return made


def _make(model: Catalogue, given: _Given, quiet: bool) -> dict[str, Any]:
    """By the forward pass. Returns what was made."""
    from quantkit.forward.stream import Options
    from quantkit.lab.calibration.make_imatrix import MakeOptions, Target, check_target, make_imatrix

    target = None if given.target is None else Target(*given.target)
    forward = Options(given.device, given.dtype, given.threads or 0, given.memory)
    options = MakeOptions(given.process_output, target, given.covariance, True, given.fisher, given.force, forward)
    check_target(model, options)
    covariance: dict[str, Any] = {}
    if given.covariance is not None:
        options, covariance = _with_covariance(model, given, options, quiet)
    chunks = _chunks(model, given, quiet)
    if not quiet:
        click.echo(
            f"{model.model}: {chunks.nbytes:,} bytes of text, {chunks.n_chunks:,} chunks of {chunks.n_ctx:,} tokens"
        )
    assert given.output is not None
    shards = fetched(model, fetching(given.keep, given.shards, given.output, quiet), quiet)
    with shards as brings, open_bar(chunks.tokens.size * model.n_layers, " token-layers", quiet) as bar:
        made = make_imatrix(model, chunks, given.output, options, _on(bar))
    facts: dict[str, Any] = {
        "entries": made.n_entries, "chunks": made.n_chunks, "chunk_size": chunks.n_ctx,
        "tokens": made.n_chunks * chunks.n_ctx, "bytes_read": made.bytes_read,
    }  # fmt: skip
    if brings is not None:
        facts |= {"shards_fetched": brings.n_fetched, "bytes_fetched": brings.bytes_fetched}
    if model.moe_layers:
        facts |= {"experts": made.n_experts, "never_seen": made.n_unseen}
    if given.fisher:
        facts["experts_share"] = made.experts_share
    if target is not None:
        facts |= {"coverage": made.coverage, "target": list(target)}
    return {**facts, **covariance}


def _with_covariance(
    model: Catalogue, given: _Given, options: MakeOptions, quiet: bool
) -> tuple[MakeOptions, dict[str, Any]]:
    """Options with the choice for experts, which is printed with the size."""
    from dataclasses import replace

    from quantkit.base.errors import OutputError
    from quantkit.lab.calibration.covariance_folder import choose_own, described
    from quantkit.lab.calibration.inputs import covariance_bytes
    from quantkit.rounding.covariance import FISHER

    assert given.covariance is not None
    own = not given.pooled_experts and choose_own(model, given.covariance, given.room)
    if given.fisher and not own:
        raise OutputError(
            f"{given.covariance}: --fisher needs a matrix for each expert's ffn_down, {covariance_bytes(model):,} "
            "bytes, and there is less room; allow more, or leave --fisher out"
        )
    if not quiet:
        click.echo(f"{given.covariance}: covariance of {described(model, own)}")
    nbytes = covariance_bytes(model, own)
    facts = {"covariance": str(given.covariance), "covariance_bytes": nbytes, "own_experts": own}
    if given.fisher:
        facts["weights"] = FISHER
    return replace(options, own_experts=own), facts


def _drive(model: Catalogue, given: _Given, quiet: bool) -> dict[str, Any]:
    """By llama-imatrix. Returns what was made."""
    from quantkit import text
    from quantkit.lab.calibration.llama_imatrix import ToolOptions, make_with_tool
    from quantkit.llama_cpp import toolchain
    from quantkit.text.chunking import cut
    from quantkit.text.sources import read_texts

    options = ToolOptions(
        toolchain.find("llama-imatrix", given.binary), "Q8_0" if given.via == "Q8_0" else "BF16",
        given.save_frequency, given.process_output, given.threads or 0, given.force,
    )  # fmt: skip
    texts, tokenizer = read_texts(given.texts), text.tokenizer(model)
    limit = None if given.n_chunks is None else (given.n_chunks + 3) * given.n_ctx
    ids = tokenizer.encode(texts.joined, limit=limit)
    chunks = cut(tokenizer, ids, texts, given.n_ctx, given.n_chunks)
    if not quiet:
        print_notes(chunks.notes)
    assert given.output is not None
    with open_bar(chunks.tokens.size, " tokens", quiet) as bar:
        n_entries = make_with_tool(model, chunks, texts.joined, given.output, options, _on(bar))
    return {
        "entries": n_entries, "chunks": chunks.n_chunks, "chunk_size": chunks.n_ctx, "tokens": int(chunks.tokens.size),
    }  # fmt: skip


def _on(bar: Any) -> Any:
    """Progress on a bar of what starts anew in each round, and perhaps not at nothing."""
    total: int | None = None

    def progress(what: str, n_done: int, n_total: int) -> None:
        nonlocal total
        bar.set_description_str(what, refresh=False)
        if n_total != total or n_done < bar.n:
            bar.reset(n_total)
            bar.initial = bar.n = n_done
            total = n_total
            bar.refresh()
        else:
            bar.update(n_done - bar.n)

    return progress


def _tell(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['file']}  {facts['bytes']:,} bytes, {facts['entries']:,} entries, {facts['chunks']:,} chunks")
    if "experts" in facts:
        seen = f"{facts['never_seen']:,} of {facts['experts']:,} experts were chosen by no token"
        if "coverage" in facts:
            share, n = facts["target"]
            reached = "" if facts["coverage"] >= share else f"; the text ended before {share:.4g}"
            seen += f"; {facts['coverage']:.4f} of them saw {n:,} tokens or more{reached}"
        click.echo(seen)
    if "covariance" in facts:
        fisher = ", weighted by gradients" if "weights" in facts else ""
        click.echo(f"{facts['covariance']}  {facts['covariance_bytes']:,} bytes of second moments{fisher}")
        if facts.get("experts_share"):
            click.echo("the experts of a layer share one for gate and one for up: one for each did not fit")
    read = f", {facts['bytes_read']:,} bytes of weights read" if "bytes_read" in facts else ""
    if "bytes_fetched" in facts:
        read += f", {facts['bytes_fetched']:,} bytes in {facts['shards_fetched']:,} shards fetched"
    click.echo(
        f"{facts['tokens']:,} tokens in {facts['seconds']:.1f} s, {facts['tokens'] / facts['seconds']:,.0f} tokens/s"
        f"{read}, engine {facts['engine']}"
    )

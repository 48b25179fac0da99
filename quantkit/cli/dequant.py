"""quantkit dequant."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .bars import by_name, open_bar
from .files import CHECKPOINT, MADE_FOLDER, Command
from .options import Size, plan_first_options, ready_kernels, threads_option

if TYPE_CHECKING:
    from quantkit.dequant import Job
    from quantkit.dequant.decode import Decoder

#: files that are not copied, which are named
_MOST_REFUSED = 10


@click.command(cls=Command)
@click.argument("source", metavar="SRC", type=CHECKPOINT)
@click.argument("output", metavar="DST", type=MADE_FOLDER)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    default="bf16",
    show_default=True,
    help="Type of the FP8 weights; other tensors keep theirs.",
)
@click.option(
    "--shard-size",
    type=Size(),
    default="5G",
    show_default=True,
    metavar="SIZE",
    help="The most tensor data per shard, such as 5G (10^9 bytes) or 4GiB; a larger tensor gets a shard of its own.",
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="The layers that predict further tokens (from num_hidden_layers on).",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: on the GPU, through torch. The same bytes.",
)
@threads_option
@click.option("--restart", is_flag=True, help="Start again where DST holds an unfinished run.")
@plan_first_options
def dequant(
    source: Path,
    output: Path,
    dtype: str,
    shard_size: int,
    mtp: str,
    device: str,
    threads: int | None,
    restart: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Write an FP8 checkpoint as one in BF16, with the bytes that torch's weight.float() * scale gives.

    SRC and DST are Hugging Face directories. DST gets the shards with an index, config.json without
    quantization_config, and the tokenizer and every other file of SRC that holds no weights, folders included; links
    that lead out of SRC are not copied, except those of a snapshot in Hugging Face's cache. After an interruption, run
    the same command again: it checks what is finished and continues.

    \b
    quantkit dequant DeepSeek-R1/ DeepSeek-R1-BF16/
    quantkit dequant DeepSeek-R1/ R1-F16/ --dtype f16 --mtp drop --shard-size 10G
    """
    from quantkit.base.workers import default_threads
    from quantkit.dequant import DequantOptions, prepare
    from quantkit.dequant.decode import Native, Torch
    from quantkit.model.sources.safetensors_dir import open_checkpoint

    ready_kernels()
    job = prepare(open_checkpoint(source), output, DequantOptions(dtype, shard_size, mtp == "keep"), restart)
    _check_names(job)
    decoder: Decoder = Native() if device == "cpu" else Torch(device)
    if not quiet:
        click.echo(_plan_text(job))
    for line in _refused(job):
        click.echo(f"warning: {line}", err=True)
    if dry_run:
        click.echo("dry run: everything was checked, nothing was written")
        return
    _run(job, decoder, threads or default_threads(), quiet)


def _check_names(job: Job) -> None:
    """Raises OutputError where a name is too long with what is added to it while the file is made."""
    from quantkit.base.outputs import check_length
    from quantkit.dequant.place import PART

    for name in [*(shard.name for shard in job.plan.shards), *(name for name, _ in job.plan.carried)]:
        check_length(job.dst / name, f".{PART}")


def _plan_text(job: Job) -> str:
    """What is to be made, in a few lines."""
    from quantkit.base.text import size

    plan = job.plan
    counts: dict[tuple[str, str], int] = {}
    for t in plan.tensors:
        counts[t.source.dtype, t.dtype] = counts.get((t.source.dtype, t.dtype), 0) + 1
    kinds = [f"{n:,} {a} to {b}" if a != b else f"{n:,} {a} as they are" for (a, b), n in sorted(counts.items())]
    n = len(plan.shards)
    lines = [
        f"{job.source.path} -> {job.dst}",
        f"  tensors      {sum(counts.values()):,}: {', '.join(kinds)}",
        f"  shards       {n:,}, {plan.tensor_bytes:,} bytes of tensors",
        f"  other files  {len(plan.carried):,} copied, {sum(n for _, n in plan.carried):,} bytes",
        f"  directory    {size(plan.nbytes)}",
    ]
    if plan.n_dropped:
        lines.insert(2, f"  dropped      {plan.n_dropped:,} weights of MTP layers")
    if plan.left_out:
        more = f" and {len(plan.left_out) - 1} more" if len(plan.left_out) > 1 else ""
        lines.append(f"  left out     {plan.left_out[0]}{more}: weights that are not of this checkpoint")
    if job.finished:
        lines.append(
            f"  finished     {len(job.finished):,} of the shards, which are read back; {job.need_bytes:,} bytes are to "
            "be written"
        )
    return "\n".join(lines)


def _refused(job: Job) -> list[str]:
    """What lies beside the weights and is not copied, in a few lines."""
    refused = job.plan.refused
    lines = [f"{job.source.path / name}: {why}; it is not copied" for name, why in refused[:_MOST_REFUSED]]
    if len(refused) > _MOST_REFUSED:
        lines.append(f"and {len(refused) - _MOST_REFUSED} more like these are not copied")
    return lines


def _run(job: Job, decoder: Decoder, n_threads: int, quiet: bool) -> None:
    from quantkit.dequant import run

    start = time.monotonic()
    total = sum(shard.tensor_bytes for shard in job.todo)
    kept_bytes = sum(shard.nbytes for shard in job.done)
    try:
        with open_bar(kept_bytes + total, "B", quiet) as bar:
            damaged = run(job, decoder, n_threads, by_name(bar))
            bar.set_description_str("done", refresh=True)
    except BaseException as e:
        kept = [s for s in job.plan.shards if (job.dst / s.name).exists()]
        if isinstance(e, Exception) or not kept:
            raise
        # not the usual words for an interrupt, that nothing was left behind
        click.echo(
            f"interrupted: {len(kept)} of {len(job.plan.shards)} shards are finished and kept; run the same "
            "command again to continue",
            err=True,
        )
        raise SystemExit(130 if isinstance(e, KeyboardInterrupt) else 143) from None
    from quantkit.base.text import short_size

    seconds = time.monotonic() - start
    for name in damaged:
        click.echo(f"warning: {job.dst / name}: was damaged after it was finished; it is written again", err=True)
    total += sum(shard.tensor_bytes for shard in job.plan.shards if shard.name in damaged)
    if not quiet:
        click.echo(
            f"{job.dst}  {len(job.plan.shards):,} shard{'s' * (len(job.plan.shards) != 1)}, {job.plan.nbytes:,} bytes; "
            f"{short_size(total)} written in {seconds:.1f} s, {total / seconds / 1e6:,.0f} MB/s, "
            f"{n_threads} thread{'s' * (n_threads != 1)}"
        )

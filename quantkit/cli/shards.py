"""quantkit split and merge: GGUF shards."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .bars import open_bar
from .files import GGUF, MERGED, PREFIX, Command
from .options import Size, together

if TYPE_CHECKING:
    from quantkit.gguf.split import OutputFile, ShardSet

#: --force, --dry-run, --quiet, --json
_common = together(
    click.option("--force", is_flag=True, help="Replace output files that exist."),
    click.option("-n", "--dry-run", is_flag=True, help="Check everything, print the files; write nothing."),
    click.option("-q", "--quiet", is_flag=True, help="No list of files, no progress; errors only."),
    click.option("--json", "as_json", is_flag=True, help="The files as JSON on standard output."),
)


@click.command(cls=Command)
@click.argument("source", metavar="IN", type=GGUF)
@click.argument("prefix", metavar="OUTPREFIX", type=PREFIX)
@click.option(
    "--max-size",
    type=Size(),
    metavar="SIZE",
    help="The most tensor data per shard, such as 50G (10^9 bytes) or 46GiB; a larger tensor gets a shard of its "
    "own. 1.5M is 1,500,000 bytes; llama-gguf-split reads it as 1M.",
)
@click.option("--max-tensors", type=click.IntRange(1), metavar="N", help="Tensors per shard.  [default: 128]")
@click.option("--no-tensor-first-split", is_flag=True, help="Put only the metadata into the first shard.")
@_common
def split(
    source: Path,
    prefix: Path,
    max_size: int | None,
    max_tensors: int | None,
    no_tensor_first_split: bool,
    force: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Split a GGUF into shards, as llama-gguf-split does to the byte.

    IN is a GGUF, or the first shard of a set, which is split again without merging. The shards are
    OUTPREFIX-00001-of-0000N.gguf and so on. IN is left as it is.

    \b
    quantkit split R1.gguf R1 --max-size 50G
    quantkit split R1-00001-of-00003.gguf small/R1 --max-size 10G --dry-run
    """
    from quantkit.gguf.shards import DEFAULT_MAX_TENSORS, Limits
    from quantkit.gguf.split import open_set, plan_split
    from quantkit.gguf.split_writer import check_output

    if max_size is not None and max_tensors is not None:
        raise click.UsageError("give --max-size or --max-tensors, not both")
    model = open_set(source)
    files = plan_split(model, prefix, Limits(max_tensors or DEFAULT_MAX_TENSORS, max_size, no_tensor_first_split))
    check_output(model, files, force)
    if model.notes and not quiet:
        click.echo(f"note: merging these shards will not give {source} back byte for byte:", err=True)
        for note in model.notes:
            click.echo(f"  {note}", err=True)
    _make(model, files, force, dry_run, quiet, as_json)


@click.command(cls=Command)
@click.argument("first", metavar="FIRST", type=GGUF)
@click.argument("output", metavar="OUT", type=MERGED)
@click.option(
    "--gguf-split-compat",
    is_flag=True,
    help="Leave the split keys in the file as llama-gguf-split --merge does; the default is the file as it was before.",
)
@_common
def merge(
    first: Path, output: Path, gguf_split_compat: bool, force: bool, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    """Merge the shards of a GGUF into the file that was split.

    FIRST is the first shard; the others are found beside it. A shard that is missing, truncated or of another
    set is refused. The shards are left as they are.

    \b
    quantkit merge R1-00001-of-00003.gguf R1.gguf
    quantkit merge R1-00001-of-00003.gguf R1.gguf --gguf-split-compat
    """
    from quantkit.gguf.split import open_set, plan_merge
    from quantkit.gguf.split_writer import check_output

    model = open_set(first)
    files = (plan_merge(model, output, gguf_split_compat),)
    check_output(model, files, force)
    _make(model, files, force, dry_run, quiet, as_json)


def _make(model: ShardSet, files: Sequence[OutputFile], force: bool, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Write the files, unless it is a dry run, and say what was made."""
    from quantkit.base.text import short_size

    total, start, how = sum(file.nbytes for file in files), time.monotonic(), {}
    if not dry_run:
        how = _write(model, files, force, quiet)
    seconds = time.monotonic() - start
    if as_json:
        found = {
            "files": [{"path": str(f.path), "bytes": f.nbytes, "tensors": f.n_tensors} for f in files],
            "bytes": total,
            "tensors": len(model.tensors),
            "notes": list(model.notes),
            "written": not dry_run,
            "copied": how,
        }
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    if quiet:
        return
    for f in files:
        click.echo(f"{f.path}  {f.nbytes:,} bytes, {f.n_tensors:,} tensor{'s' * (f.n_tensors != 1)}")
    if dry_run:
        click.echo("dry run: everything was checked, nothing was written")
    else:
        click.echo(f"{short_size(total)} in {seconds:.1f} s by {' and '.join(how) or 'header only'}")


def _write(model: ShardSet, files: Sequence[OutputFile], force: bool, quiet: bool) -> dict[str, int]:
    """Write the files with a progress bar, in bytes."""
    from quantkit.gguf.split_writer import write

    n = sum(piece.nbytes for file in files for piece in file.ranges)
    with open_bar(n, "B", quiet) as bar:

        def progress(nbytes: int) -> None:
            bar.update(nbytes)

        return write(model, files, progress, force)

"""quantkit imatrix info, merge and convert: what is done with importance matrices as files, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .bars import open_bar
from .files import FIGURE, IMATRIX, IMATRIX_OUT, Command
from .options import json_option, together

if TYPE_CHECKING:
    from quantkit.imatrix.matrix import Imatrix

#: -o, --output-format, --chunk-size, --force, --quiet, --json
_written = together(
    click.option("-o", "--output", type=IMATRIX_OUT, required=True, help="The file to make, .gguf or .dat."),
    click.option(
        "--output-format", type=click.Choice(["gguf", "dat"]), help="Its format.  [default: what its name ends in]"
    ),
    click.option(
        "--chunk-size",
        type=click.IntRange(1, 1 << 24),
        metavar="N",
        help="Tokens per chunk of a .dat, which does not record it.  [default: what the other files say, else 512]",
    ),
    click.option("--force", is_flag=True, help="Replace the output file if it exists."),
    click.option("-q", "--quiet", is_flag=True, help="No notes, no progress; errors only."),
    click.option("--json", "as_json", is_flag=True, help="What was made, and the notes, as JSON on standard output."),
)


@click.command(cls=Command)
@click.argument("file", metavar="FILE", type=IMATRIX)
@click.option(
    "--min-tokens",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    metavar="N",
    help="List the experts that saw fewer tokens.",
)
@click.option("--figure", type=FIGURE, metavar="FILE", help="Draw layers by experts to an .svg or a .png.")
@click.option("--all", "every_tensor", is_flag=True, help="A row for each tensor instead of each kind; all experts.")
@click.option("--force", is_flag=True, help="Replace the figure if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def info(
    file: str, min_tokens: int, figure: Path | None, every_tensor: bool, force: bool, quiet: bool, as_json: bool
) -> None:
    """Show how many tokens each tensor and expert of an importance matrix saw, and how its sums are spread.

    \b
    quantkit imatrix info imatrix.gguf
    quantkit imatrix info imatrix.gguf --min-tokens 500 --figure coverage.svg
    quantkit imatrix info imatrix.gguf --json | jq '.tensors[] | select(.never_seen != []) | .name'
    """
    from quantkit.imatrix import report
    from quantkit.imatrix.coverage import cover
    from quantkit.imatrix.matrix import open_imatrix

    matrix = open_imatrix(file)
    if figure is not None:
        report.check_drawable(matrix, figure)
    with open_bar(_nbytes([matrix]), "B", quiet) as bar:
        found = cover(matrix, min_tokens, bar.update)
    if figure is not None:
        report.draw_coverage(found, figure, force)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(report.info_text(found, every_tensor))


@click.command(cls=Command)
@click.argument("files", metavar="FILE...", type=IMATRIX, nargs=-1, required=True)
@_written
def merge(
    files: tuple[str, ...],
    output: Path,
    output_format: str | None,
    chunk_size: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge importance matrices of one model, as llama-imatrix does, but without the model.

    GGUFs and .dats can be mixed, with different chunk sizes and tensors. Each expert gets the tokens of all files. The
    command lists what cannot be added.

    \b
    quantkit imatrix merge english.gguf code.gguf -o both.gguf
    quantkit imatrix merge part*.gguf old.dat -o all.gguf --chunk-size 512
    """
    from quantkit.imatrix.converting import is_dat
    from quantkit.imatrix.matrix import open_imatrix
    from quantkit.imatrix.merging import merge as add

    as_dat = is_dat(output, output_format)
    matrices = [open_imatrix(file) for file in files]
    with open_bar(_nbytes(matrices), "B", quiet) as bar:
        notes = add(matrices, output, as_dat=as_dat, chunk_size=chunk_size, replace=force, progress=bar.update)
    _tell(output, notes, quiet, as_json)


@click.command(cls=Command)
@click.argument("file", metavar="FILE", type=IMATRIX)
@_written
def convert(
    file: str,
    output: Path,
    output_format: str | None,
    chunk_size: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write an importance matrix in the other format, GGUF or .dat.

    llama-quantize reads the same values from it, to the bit. The command lists what a .dat cannot hold.

    \b
    quantkit imatrix convert imatrix.dat -o imatrix.gguf
    quantkit imatrix convert imatrix.gguf -o imatrix.dat
    """
    from quantkit.imatrix.converting import convert as write
    from quantkit.imatrix.converting import is_dat
    from quantkit.imatrix.matrix import open_imatrix

    as_dat = is_dat(output, output_format)
    matrix = open_imatrix(file)
    with open_bar(_nbytes([matrix]), "B", quiet) as bar:
        notes = write(matrix, output, as_dat=as_dat, chunk_size=chunk_size, replace=force, progress=bar.update)
    _tell(output, notes, quiet, as_json)


def _nbytes(matrices: Sequence[Imatrix]) -> int:
    """Bytes of the sums of squares, those of an entry once."""
    return sum(4 * n for n in {name: e.n_values for m in matrices for name, e in m.entries.items()}.values())


def _tell(output: Path, notes: Sequence[str], quiet: bool, as_json: bool) -> None:
    from quantkit.imatrix.converting import chunks_text, entries_text
    from quantkit.imatrix.matrix import open_imatrix

    if not quiet:
        for note in notes:
            click.echo(f"note: {note}", err=True)
    made = open_imatrix(str(output))
    facts = {"file": str(output), "bytes": output.stat().st_size, "entries": len(made.entries), "chunks": made.n_chunks}
    if as_json:
        click.echo(json.dumps({**facts, "datasets": list(made.datasets), "notes": list(notes)}, ensure_ascii=False))
    elif not quiet:
        entries, chunks = entries_text(len(made.entries)), chunks_text(made.n_chunks)
        click.echo(f"{output}: {output.stat().st_size:,} bytes, {entries}, {chunks}")

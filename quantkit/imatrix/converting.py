"""Write an importance matrix in the other format, or again in the same one. What the quantizer gets stays the same to
the bit, and what a format cannot hold is reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..base.errors import ImatrixError, OutputError
from ..gguf.header import KV
from . import scaling
from .entries import Contents, Sums
from .matrix import Imatrix
from .write import Facts, Progress, Shape, write_dat, write_gguf

#: tokens in a chunk if no file records it: llama-imatrix's default without --ctx-size
DEFAULT_CHUNK_SIZE = 512
MAX_CHUNK_SIZE = 1 << 24
#: keys of a GGUF that `Facts` holds
_FACTS = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_SHOWN = 3


def is_dat(out: Path, output_format: str | None = None) -> bool:
    """Whether the output is a .dat and not a GGUF. Raises OutputError if neither its name nor the option tells."""
    said = output_format or out.suffix.lower().removeprefix(".")
    if said not in ("gguf", "dat"):
        raise OutputError(f"{out}: must end in .gguf or .dat; or give the format: --output-format gguf")
    return said == "dat"


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ImatrixError for a size that no chunk can have."""
    if chunk_size is not None and not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise ImatrixError(f"chunk_size {chunk_size:,}: is not a chunk size in tokens (1 to {MAX_CHUNK_SIZE:,})")


def convert(
    matrix: Imatrix, out: Path, *, as_dat: bool, chunk_size: int | None = None, replace: bool = False,
    progress: Progress = lambda _n: None,
) -> tuple[str, ...]:  # fmt: skip
    """Write the matrix to `out`, as a .dat or a GGUF. Returns what is lost or assumed, one sentence each.

    `chunk_size` is for a GGUF made from a .dat, which does not record the tokens in a chunk: 512 by default. It
    does not change what the quantizer gets. Raises ImatrixError, OutputError; `out` is then left as it was."""
    check_chunk_size(chunk_size)
    if chunk_size is not None and (as_dat or not matrix.is_dat):
        raise ImatrixError(
            f"{matrix.path}: --chunk-size {chunk_size} is for a GGUF made of a .dat, which does not say it; leave it "
            "out"
        )
    names, n_chunks = sorted(matrix.entries, key=str.encode), max(0, matrix.n_chunks)  # a .dat's count is signed
    size = matrix.chunk_size or chunk_size or DEFAULT_CHUNK_SIZE
    notes: list[str] = []
    if matrix.is_dat and as_dat:  # with a chunk size of 1 the calls stay the same
        facts = Facts(matrix.datasets, n_chunks, 1)
        write_dat(out, facts, map(matrix.sums, names), shapes(matrix), replace=replace, progress=progress)
    elif matrix.is_dat:
        notes.append(
            f"a .dat says neither how many tokens its chunks have nor how many each expert saw: {size:,} a chunk are "
            f"taken{'' if chunk_size else ' (--chunk-size)'}, and all experts of a tensor have one count"
        )
        facts = Facts(matrix.datasets, n_chunks, size)
        kept = _Kept(size)
        write_gguf(out, facts, kept.of(matrix, names), shapes(matrix), replace=replace, progress=progress)
        notes += kept.note()
    elif as_dat:
        facts = Facts(matrix.datasets, n_chunks, size)
        n = write_dat(out, facts, map(matrix.sums, names), shapes(matrix), replace=replace, progress=progress)
        notes += lost_in_dat(matrix.contents, n)
    else:
        facts = Facts(matrix.datasets, n_chunks, matrix.chunk_size, further_keys(matrix.contents.kvs))
        write_gguf(out, facts, map(matrix.sums, names), shapes(matrix), replace=replace, progress=progress)
        notes += left_out(matrix.contents)
    return tuple(notes)


def shapes(matrix: Imatrix) -> list[Shape]:
    """Return the shapes of all entries."""
    return [
        Shape(name, e.n_mats, e.n_cols, e.sum_offset is not None, 0 if e.stats is None else e.stats[1])
        for name, e in matrix.entries.items()
    ]


def further_keys(kvs: Sequence[KV]) -> tuple[KV, ...]:
    """Return a GGUF's keys except those that every importance matrix has."""
    return tuple(item for item in kvs if item.key not in _FACTS)


def lost_in_dat(contents: Contents, n_other_calls: int) -> list[str]:
    """Return what a .dat cannot hold of a GGUF, one sentence each. `n_other_calls` entries have other calls."""
    entries = contents.entries.values()
    notes = []
    if n := sum(len(set(e.counts)) > 1 for e in entries):
        notes.append(f"a .dat has no counts of experts: those of {entries_text(n)} are lost")
    if n := sum(e.sum_offset is not None or e.stats is not None for e in entries):
        notes.append(f"a .dat has neither in_sum nor statistics: those of {entries_text(n)} are lost")
    if len(contents.datasets) > 1:
        notes.append(
            f"a .dat names one dataset: {_listed(contents.datasets[:-1])} "
            f"{'is' if len(contents.datasets) == 2 else 'are'} lost, {contents.datasets[-1]} is kept"
        )
    if n_other_calls:
        notes.append(
            f"{entries_text(n_other_calls)} got other calls than llama-imatrix would write, a power of "
            "two, for whose division gives the quantizer the same values as before"
        )
    return notes + left_out(contents)


def left_out(contents: Contents) -> list[str]:
    """Return a sentence on tensors of the file that do not belong in an importance matrix, or []."""
    if not contents.others:
        return []
    return [f"left out, since no importance matrix has it: {_listed(contents.others)}"]


class _Kept:
    """Converts entries of a .dat to sums and counts, and counts those that get fewer tokens than their chunks have."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size, self.n_fewer = chunk_size, 0

    def of(self, matrix: Imatrix, names: Sequence[str]) -> Iterator[Sums]:
        for name in names:
            entry = matrix.sums(name)
            made = scaling.from_dat(entry, self.chunk_size)
            self.n_fewer += bool(made.counts[0] != entry.counts[0] * self.chunk_size)
            yield made

    def note(self) -> list[str]:
        if not self.n_fewer:
            return []
        return [
            f"{entries_text(self.n_fewer)} got fewer tokens than {self.chunk_size:,} a chunk, for whose "
            "division gives the quantizer the same values as before"
        ]


def entries_text(n: int) -> str:
    return f"{n:,} {'entry' if n == 1 else 'entries'}"


def chunks_text(n: int) -> str:
    return f"{n:,} chunk{'s' * (n != 1)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

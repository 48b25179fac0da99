"""Text for people: tables, and sizes. GiB is 2^30 bytes and GB 10^9, and every table says which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

GIB = 1 << 30


class TextEnum(str, Enum):
    """One of a few words. It is that word: in comparisons, in messages and in JSON."""

    def __str__(self) -> str:
        return str.__str__(self)

    def __format__(self, spec: str) -> str:
        return str.__format__(self, spec)


def table(rows: Iterable[Sequence[str]], head: Sequence[str], right: Iterable[int] = ()) -> str:
    """Columns aligned, those in `right` to the right."""
    all_rows = [list(head), *[list(r) for r in rows]]
    widths = [max(len(r[i]) for r in all_rows) for i in range(len(head))]
    ends = frozenset(right)
    lines = [
        "  ".join(
            c.rjust(w) if i in ends else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in all_rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def gib(nbytes: int) -> str:
    """Bytes in GiB, with three decimals."""
    return f"{nbytes / 2**30:,.3f}"


def size(nbytes: int) -> str:
    """Bytes exactly, with GiB (or MiB) and GB (or MB)."""
    if nbytes >= 2**30:
        return f"{nbytes:,} bytes = {nbytes / 2**30:,.2f} GiB = {nbytes / 1e9:,.2f} GB"
    return f"{nbytes:,} bytes = {nbytes / 2**20:,.2f} MiB = {nbytes / 1e6:,.2f} MB"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as 7168x2048x256."""
    return "x".join(str(n) for n in shape)

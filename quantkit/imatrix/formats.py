"""Reading the two file formats of importance matrices, without the values.

GGUF, written by llama-imatrix since July 2025: keys general.type = "imatrix", imatrix.datasets, imatrix.chunk_count and
imatrix.chunk_size; for each entry the F32 tensors NAME.in_sum2 [n_cols, n_mats], NAME.counts [1, n_mats] and optionally
NAME.in_sum [n_cols, n_mats] and NAME.stats. A file that lacks in_sum2, counts or one of the last three keys is refused.

.dat has no magic, and its numbers are int32: number of entries; for each entry the bytes of its name, the name, calls,
number of values, float32 values; then optionally the chunks, the bytes of the last dataset's name, and that name.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..base.errors import ImatrixError
from ..gguf.header import ARRAY, KV, U32, array_head, decode, read_header
from .entries import Contents, Entry

#: most counts (experts) of an entry; most bytes of an entry's name; most bytes read of a dataset's name
_MAX_COUNTS, _MAX_NAME, _MAX_DATASET = 1 << 16, 512, 4096


def read_gguf(path: Path) -> Contents:
    """Read the structure of llama-imatrix's GGUF. Raises ImatrixError, SourceError, OSError."""
    header = read_header(path)
    kvs = {item.key: item for item in header.kvs}
    for key, type_ in (("imatrix.datasets", ARRAY), ("imatrix.chunk_count", U32), ("imatrix.chunk_size", U32)):
        if key not in kvs or kvs[key].type != type_:
            kind = (
                f"general.type is {decode(kvs['general.type'])!r:.40}" if "general.type" in kvs else "no general.type"
            )
            raise ImatrixError(
                f"{path}: not an importance matrix: the key {key} is missing or mistyped ({kind}); give the file that "
                "llama-imatrix made"
            )
    sums = {t.name.removesuffix(".in_sum2"): t for t in header.tensors if t.name.endswith(".in_sum2")}
    counts = {t.name.removesuffix(".counts"): t for t in header.tensors if t.name.endswith(".counts")}
    if not sums:
        raise ImatrixError(f"{path}: the importance matrix has no entries; compute it again")
    entries: dict[str, Entry] = {}
    with path.open("rb") as f:
        for name in sorted(sums.keys() | counts.keys()):
            if name not in sums or name not in counts:
                lacks = "in_sum2" if name not in sums else "counts"
                raise ImatrixError(f"{path}: entry '{name}' has no {lacks}; compute the imatrix again")
            s, c = sums[name], counts[name]
            if s.type != "F32" or c.type != "F32":
                raise ImatrixError(
                    f"{path}: entry '{name}' is {s.type} with {c.type} counts, not F32; compute the imatrix again"
                )
            n_values, n_counts = math.prod(s.shape), math.prod(c.shape)
            if n_values % n_counts or n_counts > _MAX_COUNTS:
                raise ImatrixError(
                    f"{path}: entry '{name}' has {n_values:,} values for {n_counts:,} counts (as many for each, at "
                    f"most {_MAX_COUNTS:,} counts); compute the imatrix again"
                )
            f.seek(c.offset)
            raw = np.frombuffer(f.read(4 * n_counts), np.float32)
            if raw.size != n_counts or not np.isfinite(raw).all() or (raw < 0).any():
                raise ImatrixError(
                    f"{path}: entry '{name}' has counts that are negative, NaN or Inf; compute the imatrix again"
                )
            rounded = np.floor(raw.astype(np.float64) + 0.5)
            entries[name] = Entry(s.offset, n_values, tuple(float(n) for n in rounded))
    datasets = tuple(str(d) for d in decode(kvs["imatrix.datasets"])) if _is_strings(kvs["imatrix.datasets"]) else ()
    more = {t.name for t in header.tensors if not t.name.endswith((".in_sum2", ".counts"))}
    for t in header.tensors:
        name, _, kind = t.name.rpartition(".")
        if kind not in ("in_sum", "stats") or name not in entries or t.type != "F32":
            continue
        if kind == "in_sum" and math.prod(t.shape) != entries[name].n_values:
            raise ImatrixError(
                f"{path}: entry '{name}' has {math.prod(t.shape):,} values in in_sum for {entries[name].n_values:,} in "
                "in_sum2; compute the imatrix again"
            )
        is_sum = kind == "in_sum"
        found = {"sum_offset": t.offset} if is_sum else {"stats": (t.offset, math.prod(t.shape))}
        entries[name] = entries[name]._replace(**found)
        more.discard(t.name)
    n_chunks, chunk_size = (int(decode(kvs[f"imatrix.chunk_{what}"])) for what in ("count", "size"))
    return Contents(entries, datasets, n_chunks, chunk_size, header.kvs, tuple(sorted(more)))


def _is_strings(item: KV) -> bool:
    return array_head(item)[0] == "str"


def read_dat(path: Path, f: BinaryIO, size: int) -> Contents:
    """Read the structure of a .dat of `size` bytes, open as `f`. Raises ImatrixError, OSError."""

    def take(n: int, what: str) -> bytes:
        if n < 0 or n > size - f.tell():
            raise ImatrixError(
                f"{path}: neither a GGUF nor a whole legacy importance matrix: {what} needs {n:,} bytes at "
                f"{f.tell():,} of {size:,}; get it again"
            )
        return f.read(n)

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    n_entries = number("the entry count")
    if n_entries < 1 or n_entries > size // 13:
        raise ImatrixError(
            f"{path}: not an importance matrix: {n_entries:,} entries in {size:,} bytes; give the file that "
            "llama-imatrix made"
        )
    entries: dict[str, Entry] = {}
    for i in range(n_entries):
        n_name = number(f"the name length of entry {i}")
        raw = take(n_name, f"the name of entry {i}") if n_name <= _MAX_NAME else b""
        name = raw.split(b"\0")[0].decode("utf-8", "replace")
        if not name or not name.isprintable():
            raise ImatrixError(
                f"{path}: not an importance matrix: entry {i} has a name of {n_name:,} bytes, {name[:40]!r}; give the "
                "file that llama-imatrix made"
            )
        n_calls, n_values = number(f"the calls of '{name}'"), number(f"the size of '{name}'")
        if n_values < 1:
            raise ImatrixError(f"{path}: entry '{name}' has {n_values:,} values; compute the imatrix again")
        offset = f.tell()
        if 4 * n_values > size - offset:
            take(4 * n_values, f"the values of '{name}'")
        f.seek(4 * n_values, os.SEEK_CUR)
        # without calls, llama-quantize uses the values unchanged
        entries[name] = Entry(offset, n_values, (float(n_calls) if n_calls > 0 else 1.0,))
    n_chunks = 0
    datasets: tuple[str, ...] = ()
    if f.tell() < size:
        n_chunks = number("the chunk count")
        datasets = tuple(_legacy_dataset(f, size))
    return Contents(entries, datasets, n_chunks)


def _legacy_dataset(f: BinaryIO, size: int) -> Iterator[str]:
    head = f.read(4)
    if len(head) == 4:
        (n,) = struct.unpack("<i", head)
        if 0 < n <= size - f.tell():
            yield f.read(min(n, _MAX_DATASET)).split(b"\0")[0].decode("utf-8", "replace")

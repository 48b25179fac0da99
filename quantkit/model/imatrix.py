"""Importance matrices: llama-imatrix's GGUF files and the older .dat, read as llama-quantize reads them.

An entry is a tensor's mean squared activation for each column, and for each matrix of a stacked
tensor. GGUF: in_sum2 / count per expert, all ones for an expert whose count is 0; legacy: value /
ncall. Source: tools/quantize/quantize.cpp (load_imatrix), common/imatrix-loader.cpp. Values stay in
the file until they are asked for: the imatrix of R1 holds about a gigabyte.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import ImatrixError, SourceError
from ..base.first_bytes import ENOUGH, not_the_file
from ..gguf.header import ARRAY, KV, U32, Header, array_head, decode, is_gguf, is_utf8, read_header

_CHUNK = 1 << 20
#: above this a quotient is above 0 in float32
_TINY = 1.2e-38
#: zeros in a row that are looked at: the shortest block that a type gives a scale of its own, of those that lose it
_SHORTEST_RUN = 32
#: matrices of a tensor (experts) that an entry may count; bytes of an entry's name, and of a dataset's that is read
_MAX_COUNTS, _MAX_NAME, _MAX_DATASET = 1 << 16, 512, 4096


class Entry(NamedTuple):
    """Where the values of a tensor are: `n_values` float32 at `offset`; one divisor a matrix."""

    offset: int
    n_values: int
    counts: tuple[float, ...]


class Missing(NamedTuple):
    """What an importance matrix does not say of a tensor: numbers of its matrices (experts, of a stacked tensor)."""

    unseen: tuple[int, ...]
    """no input was ever counted: llama-quantize takes ones for all their columns"""
    zeros: tuple[int, ...]
    """inputs were counted, and every column's weight is 0"""
    n_zero_blocks: int
    """blocks of columns, in other matrices, whose weights are all 0"""


class Gaps(NamedTuple):
    """Counts that are 0, and long runs of zeros among the values, of an entry."""

    n_values: int
    counts: tuple[float, ...]
    zero_runs: npt.NDArray[np.int64]
    """[n, 2]: the first value of each run and the one after its last; counts of 0 are no part of them"""

    @property
    def n_unseen(self) -> int:
        return self.counts.count(0)

    def of(self, n_cols: int, n_mats: int, block: int) -> Missing:
        """For a tensor of `n_mats` matrices of `n_cols` columns, in blocks of `block`."""
        per_count = self.n_values // len(self.counts)
        seen = [i for i, count in enumerate(self.counts) if count != 0]
        met = {m for i in seen for m in range(i * per_count // n_cols, ((i + 1) * per_count - 1) // n_cols + 1)}
        zeros: list[int] = []
        n_blocks = 0
        for start, stop in self.zero_runs.tolist():
            for m in range(start // n_cols, (stop - 1) // n_cols + 1):
                first, last = max(start, m * n_cols) - m * n_cols, min(stop, (m + 1) * n_cols) - m * n_cols
                if last - first == n_cols:
                    zeros.append(m)
                else:
                    n_blocks += max(0, last // block - -(-first // block))
        return Missing(tuple(m for m in range(n_mats) if m not in met), tuple(zeros), n_blocks)


class Imatrix:
    """An importance matrix file. Raises ImatrixError for whatever is wrong with it."""

    def __init__(
        self, path_as_given: str, path: Path, entries: Mapping[str, Entry], datasets: tuple[str, ...], n_chunks: int
    ) -> None:
        self.path_as_given = path_as_given
        """the path as the user gave it, which goes into the metadata"""
        self.path = path
        self.entries = dict(entries)
        self.datasets = datasets
        self.n_chunks = n_chunks
        self._gaps: Mapping[str, Gaps] | None = None
        self._fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def fits(self, name: str, n_cols: int, n_mats: int) -> bool:
        """Whether the entry has a value for each column of each matrix."""
        return self.entries[name].n_values == n_cols * n_mats

    def weights(self, name: str, mat: int, n_cols: int) -> npt.NDArray[np.float32]:
        """The weights float32 [n_cols] of matrix number `mat` of a tensor."""
        return self._divide(self.entries[name], mat * n_cols, n_cols)

    def _read(self, offset: int, n: int) -> npt.NDArray[np.float32]:
        out = np.empty(n, np.float32)
        try:
            done = os.preadv(self._fd, [out.data.cast("B")], offset)
        except OSError as e:
            raise ImatrixError(
                f"{self.path}: reading {out.nbytes:,} bytes at {offset:,} failed: {e.strerror or e}"
            ) from None
        if done != out.nbytes:
            raise ImatrixError(
                f"{self.path}: should have {out.nbytes:,} bytes at {offset:,}, but now has {done:,}; it has changed "
                "since it was opened"
            )
        return out

    def _divide(self, entry: Entry, at: int, n: int) -> npt.NDArray[np.float32]:
        out = self._read(entry.offset + 4 * at, n)
        per_mat = entry.n_values // len(entry.counts)
        with np.errstate(all="ignore"):
            for mat in range(at // per_mat, (at + n - 1) // per_mat + 1):
                here = slice(max(0, mat * per_mat - at), min(n, (mat + 1) * per_mat - at))
                count = entry.counts[mat]
                if count > 0:
                    out[here] /= np.float32(count)
                elif count == 0:
                    out[here] = 1
        return out

    def check(self) -> Mapping[str, Gaps]:
        """Read every value once: all must be finite and not negative. Returns what is missing in which entries; a
        second call does not read again."""
        if self._gaps is None:
            found = {name: self._gaps_of(name, entry) for name, entry in self.entries.items()}
            self._gaps = {name: gaps for name, gaps in found.items() if gaps.n_unseen or len(gaps.zero_runs)}
        return self._gaps

    def _gaps_of(self, name: str, entry: Entry) -> Gaps:
        runs = []
        for at in range(0, entry.n_values, _CHUNK):
            n = min(_CHUNK, entry.n_values - at)
            got = self._read(entry.offset + 4 * at, n)
            per_count = entry.n_values // len(entry.counts)
            for i in range(at // per_count, (at + n - 1) // per_count + 1):
                if entry.counts[i] == 0:
                    got[max(0, i * per_count - at) : (i + 1) * per_count - at] = 1
            lowest, highest = got.min(), got.max()
            if lowest > _TINY * max(entry.counts) and highest < math.inf:
                continue
            got = self._divide(entry, at, n)
            bad = ~np.isfinite(got) | (got < 0)
            if bad.any():
                where = int(bad.argmax())
                raise ImatrixError(
                    f"{self.path}: entry '{name}' holds {got[where]} at {at + where} of {entry.n_values}; "
                    "all must be finite and not negative: compute the imatrix again"
                )
            edges = np.flatnonzero(np.diff(got == 0, prepend=False, append=False)) + at
            runs.append(edges.reshape(-1, 2))
        return Gaps(entry.n_values, entry.counts, _long_runs(runs))


def _long_runs(pieces: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Runs [first, after the last] of consecutive pieces, those that meet made one, without short ones."""
    if not pieces:
        return np.empty((0, 2), np.int64)
    edges = np.concatenate(pieces)
    apart = edges[1:, 0] != edges[:-1, 1]
    starts = edges[np.append(True, apart), 0] if len(edges) else edges[:, 0]
    stops = edges[np.append(apart, True), 1] if len(edges) else edges[:, 1]
    return np.stack([starts, stops], 1)[stops - starts >= _SHORTEST_RUN]


def open_imatrix(path_as_given: str) -> Imatrix:
    """Open an importance matrix in either format; only its structure is read."""
    path = Path(path_as_given)
    if not is_utf8(path_as_given):
        raise ImatrixError(f"{path_as_given!a}: the path goes into the metadata, but is not UTF-8; rename the file")
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ImatrixError(f"{path_as_given}: not a regular file; give the file that llama-imatrix made")
        if is_gguf(path):
            return _open_gguf(path_as_given, path)
        with path.open("rb") as f:
            if says := not_the_file(f.read(ENOUGH)):
                raise ImatrixError(f"{path_as_given}: {says}")
            f.seek(0)
            return _open_legacy(path_as_given, path, f, size)
    except OSError as e:
        raise ImatrixError(f"{path_as_given}: cannot be read: {e.strerror or e}") from None
    except SourceError as e:
        raise ImatrixError(f"importance matrix {e}") from None


def _open_gguf(path_as_given: str, path: Path) -> Imatrix:
    header: Header = read_header(path)
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
    return Imatrix(path_as_given, path, entries, datasets, int(decode(kvs["imatrix.chunk_count"])))


def _is_strings(item: KV) -> bool:
    return array_head(item)[0] == "str"


def _open_legacy(path_as_given: str, path: Path, f: BinaryIO, size: int) -> Imatrix:
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
        # without calls llama-quantize takes the values as they are
        entries[name] = Entry(offset, n_values, (float(n_calls) if n_calls > 0 else 1.0,))
    n_chunks = 0
    datasets: tuple[str, ...] = ()
    if f.tell() < size:
        n_chunks = number("the chunk count")
        datasets = tuple(_legacy_dataset(f, size))
    return Imatrix(path_as_given, path, entries, datasets, n_chunks)


def _legacy_dataset(f: BinaryIO, size: int) -> Iterator[str]:
    head = f.read(4)
    if len(head) == 4:
        (n,) = struct.unpack("<i", head)
        if 0 < n <= size - f.tell():
            yield f.read(min(n, _MAX_DATASET)).split(b"\0")[0].decode("utf-8", "replace")

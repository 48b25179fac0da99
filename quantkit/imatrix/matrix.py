"""Importance matrices: llama-imatrix's GGUF files and the older .dat, read as llama-quantize reads them.

An entry is a tensor's mean squared activation for each column, and for each matrix of a stacked
tensor. GGUF: in_sum2 / count per expert, all ones for an expert whose count is 0; .dat: value /
calls. Source: tools/quantize/quantize.cpp (load_imatrix), common/imatrix-loader.cpp. Values are
read only when asked for: the imatrix of R1 holds about a gigabyte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import ImatrixError, SourceError
from ..base.first_bytes import ENOUGH, not_the_file
from ..gguf.header import is_gguf, is_utf8
from .entries import Contents, Entry, Gaps, Sums, long_runs
from .formats import read_dat, read_gguf

_CHUNK = 1 << 20
#: a quotient above this does not underflow to 0 in float32
_TINY = 1.2e-38


class NoWeight(NamedTuple):
    """A value that is NaN, infinite or negative."""

    value: np.float32
    at: int
    """its index among the entry's values"""


class Imatrix:
    """An importance matrix file. Raises ImatrixError for anything wrong with it."""

    def __init__(self, path_as_given: str, path: Path, contents: Contents, is_dat: bool) -> None:
        self.path_as_given = path_as_given
        """the path as the user gave it, recorded in the metadata"""
        self.path = path
        self.contents, self.is_dat = contents, is_dat
        self.entries = dict(contents.entries)
        self.datasets = contents.datasets
        self.n_chunks = contents.n_chunks
        self.chunk_size = contents.chunk_size
        """tokens in a chunk; 0 if not known, as for every .dat"""
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
        """Return the weights float32 [n_cols] of matrix number `mat` of a tensor."""
        return self._divide(self.entries[name], mat * n_cols, n_cols)

    def sums(self, name: str, only_squares: bool = False) -> Sums:
        """Return the sums in the file for a tensor; with `only_squares`, only in_sum2 and counts. For a .dat these are
        means times calls, and the calls as the one count.

        Raises ImatrixError for a value that is not finite, and for a sum of squares below 0. The values of a matrix
        that was never seen are not used and are returned as 0."""
        entry = self.entries[name]
        shape, counts = (entry.n_mats, entry.n_cols), np.array(entry.counts, np.float64)
        in_sum2 = self._read(entry.offset, entry.n_values).reshape(shape)
        in_sum = stats = None
        if entry.sum_offset is not None and not only_squares:
            in_sum = self._read(entry.sum_offset, entry.n_values).reshape(shape)
        if entry.stats is not None and not only_squares:
            stats = self._read(*entry.stats)
        for what, values, lowest in (("in_sum2", in_sum2, 0.0), ("in_sum", in_sum, -math.inf)):
            if values is None:
                continue
            values[counts == 0] = 0
            if not (values.min() >= lowest and -math.inf < values.min() and values.max() < math.inf):
                flat = values.reshape(-1)
                where = int((~np.isfinite(flat) | (flat < lowest)).argmax())
                raise ImatrixError(
                    f"{self.path}: entry '{name}' holds {flat[where]} at {where} of {entry.n_values} in {what}; sums "
                    f"must be finite{' and not negative' * (what == 'in_sum2')}: compute the imatrix again"
                )
        return Sums(name, in_sum2, counts, in_sum, stats)

    def _read(self, offset: int, n: int) -> npt.NDArray[np.float32]:
        out = np.empty(n, np.float32)
        view, done = out.data.cast("B"), 0
        try:
            while done < out.nbytes and (got := os.preadv(self._fd, [view[done:]], offset + done)):
                done += got
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
        """Read every value once, and check that all are finite and not negative. Returns the gaps of the entries that
        have any; a second call does not read again. Raises ImatrixError."""
        if self._gaps is None:
            found = {}
            for name, entry in self.entries.items():
                gaps = self.look_at(name)
                if isinstance(gaps, NoWeight):
                    raise ImatrixError(
                        f"{self.path}: entry '{name}' holds {gaps.value} at {gaps.at} of {entry.n_values}; "
                        "all must be finite and not negative: compute the imatrix again"
                    )
                found[name] = gaps
            self._gaps = {name: gaps for name, gaps in found.items() if gaps.n_unseen or len(gaps.zero_runs)}
        return self._gaps

    def look_at(self, name: str) -> Gaps | NoWeight:
        """Read every value of an entry once, and return its gaps, or the first value that is not a weight. Raises
        ImatrixError if the file cannot be read."""
        entry = self.entries[name]
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
                return NoWeight(got[where], at + where)
            edges = np.flatnonzero(np.diff(got == 0, prepend=False, append=False)) + at
            runs.append(edges.reshape(-1, 2))
        return Gaps(entry.n_values, entry.counts, long_runs(runs))


def open_imatrix(path_as_given: str) -> Imatrix:
    """Open an importance matrix in either format, reading only its structure. Raises ImatrixError."""
    path = Path(path_as_given)
    if not is_utf8(path_as_given):
        raise ImatrixError(f"{path_as_given!a}: the path goes into the metadata, but is not UTF-8; rename the file")
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ImatrixError(f"{path_as_given}: not a regular file; give the file that llama-imatrix made")
        if is_gguf(path):
            return Imatrix(path_as_given, path, read_gguf(path), is_dat=False)
        with path.open("rb") as f:
            if says := not_the_file(f.read(ENOUGH)):
                raise ImatrixError(f"{path_as_given}: {says}")
            f.seek(0)
            return Imatrix(path_as_given, path, read_dat(path, f, size), is_dat=True)
    except OSError as e:
        raise ImatrixError(f"{path_as_given}: cannot be read: {e.strerror or e}") from None
    except SourceError as e:
        raise ImatrixError(f"importance matrix {e}") from None

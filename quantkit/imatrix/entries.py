"""What an importance matrix file holds apart from its values: its entries, where their values are, and their gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..gguf.header import KV

#: shortest run of zeros that is recorded: the shortest block with its own scale, among types that lose such blocks
_SHORTEST_RUN = 32


class Entry(NamedTuple):
    """Where the values of a tensor are: `n_values` float32 at `offset`; one divisor for each matrix."""

    offset: int
    n_values: int
    counts: tuple[float, ...]
    """inputs seen, rounded as llama-quantize does: one for each matrix (expert), or one for the whole tensor"""
    sum_offset: int | None = None
    """where the sums of the inputs themselves are (`n_values` too), in files that have them"""
    stats: tuple[int, int] | None = None
    """(offset, number) of llama-imatrix's statistics of the entry, in files that have them"""

    @property
    def n_mats(self) -> int:
        return len(self.counts)

    @property
    def n_cols(self) -> int:
        """Values for each count: columns, or columns times matrices for a stacked tensor with one count."""
        return self.n_values // len(self.counts)


class Sums(NamedTuple):
    """An entry with its values, as summed up in a file."""

    name: str
    in_sum2: npt.NDArray[np.floating[Any]]
    """[n_mats, n_cols]: sums of squared inputs; float32 when read from a file, possibly float64 when to be written"""
    counts: npt.NDArray[np.float64]
    """[n_mats]: inputs seen, whole numbers"""
    in_sum: npt.NDArray[np.floating[Any]] | None = None
    """[n_mats, n_cols]: sums of inputs"""
    stats: npt.NDArray[np.float32] | None = None
    """llama-imatrix's statistics; the file's key imatrix.stats_schema names them"""


class Contents(NamedTuple):
    """A file without its values."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0
    """tokens in a chunk; 0 if not known, as for every .dat"""
    kvs: tuple[KV, ...] = ()
    """all keys of a GGUF"""
    others: tuple[str, ...] = ()
    """tensors of a GGUF that do not belong to an entry"""


class Missing(NamedTuple):
    """Gaps in what an importance matrix has for a tensor; matrices (stacked experts) are given by number."""

    unseen: tuple[int, ...]
    """no input was counted: llama-quantize takes ones for all their columns"""
    zeros: tuple[int, ...]
    """inputs were counted, but every column's weight is 0"""
    n_zero_blocks: int
    """blocks of columns whose weights are all 0, in other matrices"""


class Gaps(NamedTuple):
    """Counts of 0 in an entry, and long runs of zeros among its values."""

    n_values: int
    counts: tuple[float, ...]
    zero_runs: npt.NDArray[np.int64]
    """[n, 2]: the first value of each run and the one after its last; values whose count is 0 are left out"""

    @property
    def n_unseen(self) -> int:
        return self.counts.count(0)

    def of(self, n_cols: int, n_mats: int, block: int) -> Missing:
        """Return the gaps of a tensor with `n_mats` matrices of `n_cols` columns, in blocks of `block` columns."""
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


def long_runs(pieces: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return the runs [first, after the last] of consecutive pieces: adjacent runs are joined, short ones left out."""
    if not pieces:
        return np.empty((0, 2), np.int64)
    edges = np.concatenate(pieces)
    apart = edges[1:, 0] != edges[:-1, 1]
    starts = edges[np.append(True, apart), 0] if len(edges) else edges[:, 0]
    stops = edges[np.append(apart, True), 1] if len(edges) else edges[:, 1]
    return np.stack([starts, stops], 1)[stops - starts >= _SHORTEST_RUN]

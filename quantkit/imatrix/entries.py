"""What an importance matrix file holds but for its values: entries, where those are, and what they leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..gguf.header import KV

#: zeros in a row that are looked at: the shortest block that a type gives a scale of its own, of those that lose it
_SHORTEST_RUN = 32


class Entry(NamedTuple):
    """Where the values of a tensor are: `n_values` float32 at `offset`; one divisor a matrix."""

    offset: int
    n_values: int
    counts: tuple[float, ...]
    """inputs that were seen, as llama-quantize rounds them: of each matrix (expert), or one for all of the tensor"""
    sum_offset: int | None = None
    """where the sums of the inputs themselves are, as many, in files that have them"""
    stats: tuple[int, int] | None = None
    """where llama-imatrix's statistics of the entry are, and how many, in files that have them"""

    @property
    def n_mats(self) -> int:
        return len(self.counts)

    @property
    def n_cols(self) -> int:
        """Values of a count: columns, or of a stacked tensor with one count its columns times its matrices."""
        return self.n_values // len(self.counts)


class Sums(NamedTuple):
    """An entry with its values, as they are added up in a file."""

    name: str
    in_sum2: npt.NDArray[np.floating[Any]]
    """[n_mats, n_cols]: sums of squared inputs; float32 of a file, perhaps float64 for one"""
    counts: npt.NDArray[np.float64]
    """[n_mats]: inputs that were seen, whole numbers"""
    in_sum: npt.NDArray[np.floating[Any]] | None = None
    """[n_mats, n_cols]: sums of inputs"""
    stats: npt.NDArray[np.float32] | None = None
    """llama-imatrix's statistics, whose names its key imatrix.stats_schema has"""


class Contents(NamedTuple):
    """A file but for its values."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0
    """tokens of a chunk; 0: not known, as of every .dat"""
    kvs: tuple[KV, ...] = ()
    """of a GGUF, all its keys"""
    others: tuple[str, ...] = ()
    """of a GGUF, tensors that are no part of an entry"""


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


def long_runs(pieces: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Runs [first, after the last] of consecutive pieces, those that meet made one, without short ones."""
    if not pieces:
        return np.empty((0, 2), np.int64)
    edges = np.concatenate(pieces)
    apart = edges[1:, 0] != edges[:-1, 1]
    starts = edges[np.append(True, apart), 0] if len(edges) else edges[:, 0]
    stops = edges[np.append(apart, True), 1] if len(edges) else edges[:, 1]
    return np.stack([starts, stops], 1)[stops - starts >= _SHORTEST_RUN]

"""How well an importance matrix covers a model: how many tokens each tensor and each expert saw, how evenly, and how
few columns make up the sums.

The concentration of a matrix is the share of its sum of squares in the largest 1 % of its columns (rounded up): 0.01 if
all columns are alike, 1 if one column is everything. A tensor's is the median over the matrices that were seen.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .matrix import Imatrix
from .write import Progress

#: this many tokens give a good enough diagonal
ENOUGH_TOKENS = 100
PERCENTILES = (10, 50, 90)
_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")


@dataclass(frozen=True)
class Covered:
    """Coverage of one entry. In a stacked tensor the matrices are experts."""

    name: str
    layer: int | None
    kind: str
    """the name without its layer"""
    n_cols: int
    """values for each count"""
    counts: tuple[int, ...]
    """what each matrix saw: tokens, or for a .dat chunks"""
    concentrations: tuple[float | None, ...]
    """of each matrix; None if it was not seen or has only zeros"""
    n_zero_columns: int
    """columns whose sum is 0, in matrices that were seen"""

    @property
    def n_mats(self) -> int:
        return len(self.counts)

    @property
    def concentration(self) -> float | None:
        known = [c for c in self.concentrations if c is not None]
        return float(np.median(known)) if known else None

    @property
    def spread(self) -> float | None:
        """The largest count divided by the smallest; None if the smallest is 0."""
        return max(self.counts) / min(self.counts) if min(self.counts) else None

    def percentiles(self) -> tuple[float, ...]:
        """Return the percentiles of the counts, at PERCENTILES."""
        return tuple(float(x) for x in np.percentile(self.counts, PERCENTILES))

    def never(self) -> tuple[int, ...]:
        """Return the numbers of matrices that were never seen."""
        return tuple(i for i, n in enumerate(self.counts) if n == 0)

    def rarely(self, fewest: int) -> tuple[int, ...]:
        """Return the numbers of matrices that were seen, but fewer than `fewest` times."""
        return tuple(i for i, n in enumerate(self.counts) if 0 < n < fewest)


@dataclass(frozen=True)
class Coverage:
    """What `quantkit imatrix info` reports about a file."""

    path: Path
    is_dat: bool
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int | None
    """tokens; None if not known, as for every .dat"""
    has_in_sum: bool
    """whether all entries have in_sum"""
    min_tokens: int
    tensors: tuple[Covered, ...]
    """sorted by layer, those outside layers first, then by name"""

    def to_json(self) -> dict[str, Any]:
        """Return all of it for scripts. A .dat has no counts of experts, so never_seen and rarely_seen are null."""
        return {
            "file": str(self.path),
            "format": "dat" if self.is_dat else "gguf",
            "datasets": list(self.datasets),
            "chunks": self.n_chunks,
            "chunk_size": self.chunk_size,
            "in_sum": self.has_in_sum,
            "entries": len(self.tensors),
            "min_tokens": self.min_tokens,
            "count_unit": "chunks" if self.is_dat else "tokens",
            "never_seen": None if self.is_dat else sum(len(t.never()) for t in self.tensors),
            "rarely_seen": None if self.is_dat else sum(len(t.rarely(self.min_tokens)) for t in self.tensors),
            "tensors": [self._tensor(t) for t in self.tensors],
        }

    def _tensor(self, t: Covered) -> dict[str, Any]:
        return {
            "name": t.name,
            "layer": t.layer,
            "kind": t.kind,
            "matrices": t.n_mats,
            "columns": t.n_cols,
            "counts": list(t.counts),
            "min": min(t.counts),
            "max": max(t.counts),
            "spread": t.spread,
            **{f"p{p}": value for p, value in zip(PERCENTILES, t.percentiles(), strict=True)},
            "concentration": t.concentration,
            "concentrations": list(t.concentrations),
            "zero_columns": t.n_zero_columns,
            "never_seen": None if self.is_dat else list(t.never()),
            "rarely_seen": None if self.is_dat else list(t.rarely(self.min_tokens)),
        }


def cover(matrix: Imatrix, min_tokens: int = ENOUGH_TOKENS, progress: Progress = lambda _n: None) -> Coverage:
    """Read the whole matrix, one entry at a time. Raises ImatrixError for a value that is not finite, or negative."""
    tensors = []
    for name, entry in matrix.entries.items():
        sums = matrix.sums(name, only_squares=True)
        seen = sums.counts > 0
        found = _LAYER.fullmatch(name)
        tensors.append(
            Covered(
                name,
                int(found[1]) if found else None,
                found[2] if found else name,
                entry.n_cols,
                tuple(int(n) for n in entry.counts),
                concentrations(sums.in_sum2),
                int((sums.in_sum2[seen] == 0).sum()),
            )
        )
        progress(sums.in_sum2.nbytes)
    tensors.sort(key=lambda t: (-1 if t.layer is None else t.layer, t.name))
    return Coverage(
        matrix.path,
        matrix.is_dat,
        matrix.datasets,
        matrix.n_chunks,
        matrix.chunk_size or None,
        all(e.sum_offset is not None for e in matrix.entries.values()),
        min_tokens,
        tuple(tensors),
    )


def concentrations(in_sum2: npt.NDArray[np.floating[Any]]) -> tuple[float | None, ...]:
    """Return the concentration of each matrix of sums of squares [n_mats, n_cols]; None if all its sums are 0."""
    n_cols = in_sum2.shape[1]
    n_top = math.ceil(n_cols / 100)
    top = np.partition(in_sum2, n_cols - n_top, axis=1)[:, n_cols - n_top :].sum(axis=1, dtype=np.float64)
    total = in_sum2.sum(axis=1, dtype=np.float64)
    return tuple(float(a / b) if b > 0 else None for a, b in zip(top, total, strict=True))

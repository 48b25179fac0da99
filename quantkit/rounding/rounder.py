"""Rows rounded by a plan's choice, beside ggml's: of each row, the blocks of lower output error stay.

The output error of a row is e H e^T, where e is what its blocks are off and H the second moment of its inputs: that of
the covariance's `held-out`, where there is one, else the one by which the row was rounded. A tie, as for a row of
zeros, is ggml's. Rows do not depend on each other, so neither do bytes on slabs and threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..base.errors import KernelError, SourceError, WeightError
from .covariance import CovarianceSource, Moments
from .factor import Factor, factor
from .options import Method, Options
from .policy import Choice
from .rows import quantize

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: bytes of factors that are kept for the next slab, beside those at work
KEPT_BYTES = 1 << 30


def options_of(choice: Choice) -> Options:
    """A choice in the kernels' words."""
    return Options(Method(choice.method), choice.search, choice.gain, choice.damp)


class Rounder:
    """Rounds rows of matrices. Safe for threads: factors are made once, and shared. `kernel`: force a set of kernels by
    name; all make the same bytes."""

    def __init__(self, source: CovarianceSource, kept_bytes: int = KEPT_BYTES, kernel: str | None = None) -> None:
        self._moments = Moments(source)
        self._held_out = None if source.held_out is None else Moments(source.held_out)
        self._kept = _Kept(kept_bytes)
        self._kernel = kernel

    def improve(self, rows: F32, blocks: U8, type_: str, matrix: tuple[str, int], choice: Choice) -> int:
        """Put better blocks in the place of ggml's where there are any; how many rows those are.

        rows: float32 [n_rows, n_cols] of a matrix (a tensor's name, and which of it); blocks: uint8 [n_rows,
        row_bytes], as ggml makes them. A row whose errors grow beyond what the type holds stays ggml's. Raises
        SourceError for a covariance that is none of that matrix, KernelError for a type that has no such rounding."""
        made, judge = self._made(matrix, rows.shape[1], choice.damp)
        try:
            return improved(rows, blocks, type_, made, judge, options_of(choice), self._kernel)
        except WeightError:
            if len(rows) == 1:
                return 0
            # which rows they are must not depend on those beside them
            return sum(
                self.improve(rows[i : i + 1], blocks[i : i + 1], type_, matrix, choice) for i in range(len(rows))
            )

    def _made(self, matrix: tuple[str, int], n_cols: int, damp: float) -> tuple[Factor, F32]:
        """A matrix's factor, and the second moment that judges."""
        key = (self._moments.key(*matrix), damp)
        return self._kept.get(key, lambda: self._make(matrix, n_cols, damp))

    def _make(self, matrix: tuple[str, int], n_cols: int, damp: float) -> tuple[Factor, F32]:
        h = self._moments.mean(*matrix, n_cols)
        try:
            made = factor(h, damp, self._kernel)
        except KernelError as e:
            raise SourceError(
                f"{self._moments.source.name}: '{matrix[0]}', matrix {matrix[1]}: {e}; or leave it to ggml by a "
                "rule with rounding: ggml"
            ) from None
        if self._held_out is None or matrix[0] not in self._held_out.source:
            return made, h
        return made, self._held_out.mean(*matrix, n_cols)


def improved(
    rows: F32, blocks: U8, type_: str, made: Factor, judge: F32, options: Options, kernel: str | None = None
) -> int:
    """Put better blocks, under `judge` [n_cols, n_cols], in the place of ggml's; how many rows those are. Raises as
    quantkit.rounding.quantize."""
    found = quantize(rows, type_, made, options, kernel)
    ours, theirs = (rows - kernels.dequantize(b, type_, rows.shape[1]) for b in (found, blocks))
    # (a - b) H (a + b)^T is a H a^T - b H b^T
    difference = kernels.feedback_products(ours - theirs, ours + theirs, judge, kernel)[:, 1]
    better = difference < 0
    blocks[better] = found[better]
    return int(better.sum())


class _Kept:
    """What was made last, as far as it fits."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._making: dict[object, threading.Lock] = {}
        self._made: OrderedDict[object, tuple[Factor, F32]] = OrderedDict()

    def get(self, key: object, make: Callable[[], tuple[Factor, F32]]) -> tuple[Factor, F32]:
        """What was made for that key; others that ask for it meanwhile wait. Raises what `make` raises."""
        with self._lock:
            own = self._making.setdefault(key, threading.Lock())
        with own:
            with self._lock:
                if key in self._made:
                    self._made.move_to_end(key)
                    return self._made[key]
            found = make()
            with self._lock:
                self._made[key] = found
                self._making.pop(key, None)
                while len(self._made) > 1 and sum(map(_nbytes, self._made.values())) > self._nbytes:
                    self._made.popitem(last=False)
            return found


def _nbytes(made: tuple[Factor, F32]) -> int:
    own = 0 if made[1] is made[0].h else made[1].nbytes
    return made[0].u.nbytes + made[0].h.nbytes + own

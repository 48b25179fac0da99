"""Rows rounded by a plan's choice, beside ggml's: of each row, the blocks of lower output error stay.

The output error of a row is e H e^T, where e is what its blocks are off and H the second moment of its inputs: that of
the covariance's `held-out`, where there is one, else the one by which the row was rounded. A tie, as for a row of
zeros, is ggml's. Rows do not depend on each other, so neither do bytes on slabs and threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..base.errors import KernelError, SourceError, WeightError
from .covariance import CovarianceSource, Moments
from .factor import Factor, factor
from .options import Device, Method, Options
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
        self._factors: Factors[Factor, F32] = Factors(
            source, kept_bytes, lambda h, damp: factor(h, damp, kernel), lambda made, other: (made, other)
        )
        self._kernel = kernel

    def improve(self, rows: F32, blocks: U8, type_: str, matrix: tuple[str, int], choice: Choice) -> int:
        """Put better blocks in the place of ggml's where there are any; how many rows those are.

        rows: float32 [n_rows, n_cols] of a matrix (a tensor's name, and which of it); blocks: uint8 [n_rows,
        row_bytes], as ggml makes them. A row whose errors grow beyond what the type holds stays ggml's. Raises
        SourceError for a covariance that is none of that matrix, KernelError for a type that has no such rounding."""
        made, judge = self._factors.of(matrix, rows.shape[1], choice.damp)
        try:
            return improved(rows, blocks, type_, made, judge, options_of(choice), self._kernel)
        except WeightError:
            if len(rows) == 1:
                return 0
            # which rows they are must not depend on those beside them
            return sum(
                self.improve(rows[i : i + 1], blocks[i : i + 1], type_, matrix, choice) for i in range(len(rows))
            )

    def output_errors(
        self, rows: F32, blocks: U8, type_: str, matrix: tuple[str, int], choice: Choice
    ) -> npt.NDArray[np.float64]:
        """e H e^T of each row [n_rows], of what the blocks are off, under the H that judges. Raises SourceError."""
        judge = self._factors.of(matrix, rows.shape[1], choice.damp)[1]
        e = rows - kernels.dequantize(blocks, type_, rows.shape[1])
        return kernels.feedback_products(e, e, judge, self._kernel)[:, 0]


def rounder_on(device: Device | None, source: CovarianceSource) -> Rounder:
    """A rounder on a device of torch, or on the CPU."""
    if device is None:
        return Rounder(source)
    import torch

    from .on_torch.rounder import DeviceRounder

    return DeviceRounder(source, torch.device(device.name))


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


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Made = TypeVar("Made", bound=_Sized)
Judge = TypeVar("Judge", bound=_Sized)


class Factors(Generic[Made, Judge]):
    """Factors of a source's matrices, each with the second moment that judges; what was made last is kept, as far as
    it fits. Safe for threads."""

    def __init__(
        self,
        source: CovarianceSource,
        nbytes: int,
        make: Callable[[F32, float], Made],
        with_judge: Callable[[Made, F32], tuple[Made, Judge]],
    ) -> None:
        """`make`: of a second moment and a damping; `with_judge`: a factor, and what it is judged by as it is to be
        kept."""
        self._moments = Moments(source)
        self._held_out = None if source.held_out is None else Moments(source.held_out)
        self._make, self._with_judge = make, with_judge
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._making: dict[object, threading.Lock] = {}
        self._made: OrderedDict[object, tuple[Made, Judge]] = OrderedDict()

    def of(self, matrix: tuple[str, int], n_cols: int, damp: float) -> tuple[Made, Judge]:
        """A matrix's (a tensor's name, and which of it); others that ask for it meanwhile wait. Raises SourceError."""
        key = (self._moments.key(*matrix), damp)
        with self._lock:
            own = self._making.setdefault(key, threading.Lock())
        with own:
            with self._lock:
                if key in self._made:
                    self._made.move_to_end(key)
                    return self._made[key]
            found = self._new(matrix, n_cols, damp)
            with self._lock:
                self._made[key] = found
                self._making.pop(key, None)
                while len(self._made) > 1 and sum(map(_nbytes, self._made.values())) > self._nbytes:
                    self._made.popitem(last=False)
            return found

    def _new(self, matrix: tuple[str, int], n_cols: int, damp: float) -> tuple[Made, Judge]:
        h = self._moments.mean(*matrix, n_cols)
        try:
            made = self._make(h, damp)
        except KernelError as e:
            raise SourceError(
                f"{self._moments.source.name}: '{matrix[0]}', matrix {matrix[1]}: {e}; or leave it to ggml by a "
                "rule with rounding: ggml"
            ) from None
        if self._held_out is None or matrix[0] not in self._held_out.source:
            return self._with_judge(made, h)
        return self._with_judge(made, self._held_out.mean(*matrix, n_cols))


def _nbytes(made: tuple[_Sized, _Sized]) -> int:
    return made[0].nbytes + made[1].nbytes

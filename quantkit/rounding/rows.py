"""Rows to blocks under a factored covariance."""

from __future__ import annotations

import numpy as np

from ..base.errors import KernelError, WeightError
from ..gguf.types import INTEGER_TYPES, QType, qtype
from ..kernels import (
    F32,
    FEEDBACK,
    U8,
    dequantize,
    feedback_pass_on,
    feedback_quantize,
    feedback_set,
    first_nonfinite,
    grown,
    is_valid,
    require_fit,
)
from ..kernels import quantize as stock
from .factor import Factor
from .gain import apply_gain
from .options import Method, Options

#: columns that `coarse` quantizes at a time
_SLAB = 256


def supported(qtype_name: str) -> Method | None:
    """The best method for the type: feedback where there is a kernel, coarse for other types of blocks; None for
    types of floats and integers, whose values round one by one. Raises KernelError for a type that is not known."""
    qt = qtype(qtype_name)
    if qt.name in FEEDBACK[feedback_set()]:
        return Method.FEEDBACK
    return None if qt.block == 1 or qt.row_extra or qt.name in INTEGER_TYPES else Method.COARSE


def quantize(rows: F32, qtype_name: str, factor: Factor, options: Options, kernel: str | None = None) -> U8:
    """Quantize rows to blocks of the type, uint8 [n_rows, row_bytes], so that x (w - q)^T is small for inputs x of the
    factored covariance.

    rows: float32 [n_rows, n_cols], C order, all finite; n_cols a multiple of the type's block, and the factor's.
    options: its damping must be the factor's. FEEDBACK for a type that has only COARSE is refused; see `supported`.
    kernel: force a set by name, as tests do; all give the same bytes.

    Takes up to 256 rows of memory beside what it returns, and is fastest with 256 rows or more at a time. Raises
    KernelError for wrong shapes and types, WeightError for weights that are NaN, Inf or out of the type's range.
    """
    qt = qtype(qtype_name)
    best = supported(qt.name)
    if best is None:
        raise KernelError(f"{qt.name} has no rounding but its own: its values are rounded one by one")
    if options.method is Method.FEEDBACK and best is Method.COARSE:
        raise KernelError(f"there is no error feedback for {qt.name}, only '{Method.COARSE.value}'")
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous or rows.shape[1] == 0:
        raise KernelError(f"rows must be C-ordered float32 [n_rows, n_cols], not {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] != factor.n_cols:
        raise KernelError(f"rows of {rows.shape[1]} columns do not go with a covariance of {factor.n_cols}")
    if options.damp != factor.damp:
        raise KernelError(f"the covariance was factored with a damping of {factor.damp:g}, not {options.damp:g}")
    qt.row_bytes(rows.shape[1])
    require_fit(rows, qt, factor.importance)
    if options.method is Method.FEEDBACK:
        made = feedback_quantize(rows, qt, factor.u, factor.importance, options.search, kernel)
    else:
        made = _coarse(rows, qt, factor, kernel)
    if options.gain:
        apply_gain(made, rows, qt, factor, kernel)
    if not is_valid(made, qt.name):
        raise WeightError(f"weights out of the range of {qt.name}: a block's scale is not valid")
    return made


def _coarse(rows: F32, qt: QType, factor: Factor, kernel: str | None) -> U8:
    """ggml's bytes of 256 columns at a time of what the errors of the columns before them have left."""
    n_rows, n_cols = rows.shape
    out = np.empty((n_rows, qt.row_bytes(n_cols)), np.uint8)
    for row in range(0, n_rows, 256):
        some = slice(row, min(row + 256, n_rows))
        current = rows[some].copy()
        for column in range(0, n_cols, _SLAB):
            end = min(column + _SLAB, n_cols)
            slab = np.ascontiguousarray(current[:, column:end])
            if first_nonfinite(slab) is not None:
                raise grown(qt)
            made = stock(slab, qt.name, factor.importance[column:end] if qt.uses_imatrix else None)
            feedback_pass_on(current, column, dequantize(made, qt.name, end - column), factor.u, kernel)
            out[some, qt.row_bytes(column) : qt.row_bytes(end)] = made
    return out

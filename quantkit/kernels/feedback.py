"""Rounding with error feedback as in native/feedback.h: checks arrays and passes them on. quantkit/rounding/ is the
interface for users."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .. import _native
from ..base.errors import KernelError, WeightError
from ..gguf.types import QType
from . import own
from .arrays import F32, U8, require

#: kernel sets that this processor can run, best first -> the types of each. All sets give the same bytes.
FEEDBACK: Mapping[str, frozenset[str]] = {name: frozenset(types) for name, types in _native.feedback_sets()}


def feedback_set(kernel: str | None = None) -> str:
    """Return the kernel set to use: the one asked for, else the one in QUANTKIT_KERNELS if it is available, else the
    best. Raises KernelError for a set that is not available."""
    if kernel is None:
        forced = os.environ.get("QUANTKIT_KERNELS", "")
        return forced if forced in FEEDBACK else next(iter(FEEDBACK))
    if kernel not in FEEDBACK:
        raise KernelError(f"there is no error feedback '{kernel:.40}'; there is {', '.join(FEEDBACK)}")
    return kernel


def feedback_quantize(rows: F32, qt: QType, u: F32, importance: F32, search: bool, kernel: str | None = None) -> U8:
    """Return blocks uint8 [n_rows, row_bytes] of float32 rows [n_rows, n_cols]. `u` [n_cols, n_cols] and `importance`
    [n_cols] come from the factor. Raises KernelError if there is no kernel for the type or a shape is wrong,
    WeightError if errors grow beyond float32."""
    name = feedback_set(kernel)
    if qt.name not in FEEDBACK[name]:
        raise KernelError(f"there is no error feedback for {qt.name}")
    n_rows, n_cols = rows.shape if rows.ndim == 2 else (-1, -1)
    require("rows", rows, np.float32, (n_rows, n_cols))
    require("u", u, np.float32, (n_cols, n_cols))
    require("the importance", importance, np.float32, (n_cols,))
    out = np.empty((n_rows, qt.row_bytes(n_cols)), np.uint8)
    own.prepare(qt)
    if not _native.feedback_quantize(name, qt.name, rows, u, importance, search, out):
        raise grown(qt)
    return out


def feedback_pass_on(rows: F32, column: int, values: F32, u: F32, kernel: str | None = None) -> None:
    """Pass errors on, in place: the columns of float32 rows [n_rows, n_cols] from `column` on are rounded to `values`
    [n_rows, width], and the columns after them take up the errors. `column` and width are multiples of 32."""
    _native.feedback_pass_on(feedback_set(kernel), rows, column, values, u)


def feedback_factor(h: F32, damp: float, exponent: int, kernel: str | None = None) -> F32 | int:
    """Return U, float32 [n, n], upper triangular with U^T U the inverse of 2^exponent * h + damp * I; or the column at
    which that matrix turns out not to be positive definite."""
    u = np.empty(h.shape, np.float32)
    at = _native.feedback_factor(feedback_set(kernel), h, damp, exponent, u)
    return u if at == len(h) else at


def feedback_products(w: F32, q: F32, h: F32, kernel: str | None = None) -> npt.NDArray[np.float64]:
    """Return float64 [n_rows, 2]: w h w^T and w h q^T for each row of float32 w and q [n_rows, n]."""
    out = np.empty((len(w), 2), np.float64)
    _native.feedback_products(feedback_set(kernel), w, q, h, out)
    return out


def grown(qt: QType) -> WeightError:
    """Return the error for weights whose errors became Inf or NaN as they were passed on."""
    return WeightError(f"the errors of {qt.name} grow beyond float32 as they are passed on; take a larger damping")

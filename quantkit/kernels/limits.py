"""Which weights and importances a type accepts: those on which ggml would abort, or store Inf, are refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..base.errors import KernelError, WeightError
from ..gguf.types import ABORT_WITHOUT_IMATRIX, QType
from .arrays import F32
from .floats import first_nonfinite

#: types whose search makes ggml abort() when its sums overflow
ABORT_ON_OVERFLOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
#: comfortably above what any of them can store with a float16 scale (65504 * 31 * 15)
LARGEST_WEIGHT = 3e8
#: importance x weight x weight squared: keeps the sums of a block far below 3.4e38
LARGEST_PRODUCT = 1e33
#: for float types, the smallest magnitude that becomes infinite: half a step above the largest finite value
OVERFLOW: Mapping[str, float] = {"F32": np.inf, "F16": 65520.0, "BF16": 2.0**128 - 2.0**119}


class UnfitWeightError(WeightError):
    """The first weight in its rows that is NaN or infinite, or becomes infinite in a float type."""

    def __init__(self, message: str, row: int, column: int, value: float) -> None:
        super().__init__(message)
        self.row, self.column = row, column
        """counted within the rows passed to the quantizer"""
        self.value = value
        """its value in float32"""


def limits_of(qt: QType) -> tuple[float, float]:
    """Return the largest weight that the type accepts, and the largest product importance x weight x weight squared."""
    if qt.name in ABORT_ON_OVERFLOW:
        return LARGEST_WEIGHT, LARGEST_PRODUCT
    # the largest float32 below OVERFLOW, which is above the largest finite value
    return float(np.nextafter(np.float32(OVERFLOW.get(qt.name, np.inf)), np.float32(0))), np.inf


def require_importance(imatrix: F32 | None, qt: QType) -> None:
    """Raise KernelError for invalid importances, and for missing ones if the type must have them."""
    if imatrix is not None:
        if not (np.isfinite(imatrix).all() and (imatrix >= 0).all()):
            raise KernelError("the imatrix holds values that are NaN, Inf or negative")
    elif qt.name in ABORT_WITHOUT_IMATRIX:
        raise KernelError(f"{qt.name} cannot be quantized without an importance matrix")


def require_fit(rows: F32, qt: QType, imatrix: F32 | None) -> None:
    """Raise WeightError if float32 [n_rows, n_cols] cannot be quantized to the type: UnfitWeightError for NaN and Inf,
    WeightError for values that would overflow the sums of ggml's grid searches, which abort on NaN."""
    if first_nonfinite(rows) is not None and (unfit := first_unfit(rows, qt)):
        raise unfit
    if rows.size == 0 or qt.name not in ABORT_ON_OVERFLOW:
        return
    largest = max(float(rows.max()), -float(rows.min()))
    if largest > LARGEST_WEIGHT:
        raise WeightError(f"weights out of the range of {qt.name}: up to {largest:.3g}")
    importance = float(imatrix.max()) if imatrix is not None else 0.0
    if importance * largest * max(1.0, largest**2) > LARGEST_PRODUCT:
        raise WeightError(
            f"weights of up to {largest:.3g} with an importance of up to {importance:.3g} overflow the search of "
            f"{qt.name}; is the importance matrix damaged?"
        )


def first_unfit(rows: F32, qt: QType) -> UnfitWeightError | None:
    """Return the first value of float32 [n_rows, n_cols] that is NaN or infinite, or would become so when stored as a
    float of this type; None if there is none."""
    unfit = ~(np.abs(rows) < OVERFLOW.get(qt.name, np.inf))
    if not unfit.any():
        return None
    row, column = divmod(int(unfit.argmax()), rows.shape[1])
    value = rows[row, column]
    what = f"row {row}, column {column} is {value}"
    if np.isfinite(value):
        what = f"weights out of the range of {qt.name}: one would be stored as Inf"
    return UnfitWeightError(what, row, column, float(value))


def invalid_blocks(qt: QType) -> WeightError:
    """Return the error for rows of finite weights whose blocks ggml does not accept."""
    return WeightError(f"weights out of the range of {qt.name}: a block's scale is not valid")

"""The covariance of a tensor's inputs, factored: what every row of the tensor is rounded under."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..base.errors import KernelError
from ..kernels import F32, feedback_factor, first_nonfinite
from .options import DAMP

#: |h[i, j] - h[j, i]| of symmetric matrices, of the geometric mean of h[i, i] and h[j, j]
_ASYMMETRY = 1e-3


@dataclass(frozen=True, eq=False)
class Factor:
    """Of the covariance H of n columns, times a power of two that makes its mean diagonal about 1."""

    u: F32
    """[n, n] upper triangular: U^T U is the inverse of the damped H"""
    importance: F32
    """[n]: the damped diagonal of H: what ggml's searches of scales take as the importance of the columns"""
    h: F32
    """[n, n]: H as it was given, not damped and not scaled"""
    damp: float
    """of the mean of H's diagonal, added to its diagonal"""

    @property
    def n_cols(self) -> int:
        return len(self.importance)

    @property
    def nbytes(self) -> int:
        """of U"""
        return self.u.nbytes


def factor(h: F32, damp: float = DAMP, kernel: str | None = None) -> Factor:
    """Factor a covariance.

    h: float32 [n, n], C order, symmetric: the mean of x x^T over the inputs x; kept, not copied.
    damp: of the mean of its diagonal, added to its diagonal. It makes any covariance positive definite.
    kernel: force a set by name, as tests do; all give the same.

    In float64 and one order of operations: the same on every machine. Takes n^2 * 12 bytes of memory while it runs,
    and n^3 * 2/3 multiplications and additions. Raises KernelError for what is no covariance: NaN, Inf, a negative
    diagonal, not symmetric, nothing but zeros, or not positive definite once it is damped.
    """
    scaling = checked(h, damp)
    u = feedback_factor(h, scaling.added, scaling.exponent, kernel)
    if isinstance(u, int):
        raise not_definite(len(h), damp, u)
    if first_nonfinite(u) is not None:
        raise no_inverse(len(h))
    return Factor(u, scaling.importance, h, damp)


class Scaling(NamedTuple):
    """How a covariance is scaled and damped before it is factored."""

    exponent: int
    """H is taken times 2 to this"""
    added: float
    """and this is added to its diagonal"""
    importance: F32
    """[n]: the diagonal that this makes"""


def checked(h: F32, damp: float) -> Scaling:
    """The scaling of what is a covariance. Raises KernelError for what is none, as `factor` says."""
    if h.ndim != 2 or h.shape[0] != h.shape[1] or h.dtype != np.float32 or not h.flags.c_contiguous or not h.size:
        raise KernelError(f"a covariance must be C-ordered float32 [n, n], not {h.dtype} {list(h.shape)}")
    if not (math.isfinite(damp) and damp >= 0):
        raise KernelError(f"the damping of a covariance must be 0 or more, not {damp}")
    n = len(h)
    if (at := first_nonfinite(h)) is not None:
        raise KernelError(f"the covariance is {h[at]} at row {at[0]}, column {at[1]}; collect it again")
    diagonal = h.diagonal().astype(np.float64)
    if diagonal.min() < 0:
        at_column = int(diagonal.argmin())
        raise KernelError(f"the covariance of column {at_column} with itself is {diagonal[at_column]:.3g}, below 0")
    _require_symmetric(h, diagonal)
    mean = float(diagonal.mean())
    if mean == 0:
        raise KernelError(f"the covariance of {n} columns is zero: no token has reached the tensor")
    exponent = -math.frexp(mean)[1]
    added = damp * math.ldexp(mean, exponent)
    return Scaling(exponent, added, (np.ldexp(diagonal, exponent) + added).astype(np.float32))


def not_definite(n: int, damp: float, column: int) -> KernelError:
    """What is wrong with a covariance of `n` columns that has no factor, as a column shows."""
    return KernelError(
        f"the covariance of {n} columns with a damping of {damp:g} is not positive definite, as column {column} shows; "
        "take a larger damping or more tokens"
    )


def no_inverse(n: int) -> KernelError:
    """What is wrong with a covariance whose factor is beyond float32."""
    return KernelError(f"the covariance of {n} columns has no inverse in float32; take a larger damping")


def _require_symmetric(h: F32, diagonal: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    root = np.sqrt(diagonal).astype(np.float32)
    for i in range(0, len(h), 256):
        rows = slice(i, i + 256)
        off = np.abs(h[rows] - h[:, rows].T) > np.float32(_ASYMMETRY) * root[rows, None] * root + np.float32(1e-37)
        if off.any():
            row, column = divmod(int(off.argmax()), len(h))
            row += i
            raise KernelError(
                f"the covariance is not symmetric: {h[row, column]:.6g} at row {row}, column {column}, and "
                f"{h[column, row]:.6g} the other way round"
            )

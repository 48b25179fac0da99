"""A covariance factored on a device, in float64 as on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...base.errors import KernelError
from ...kernels import F32
from ..factor import checked, no_inverse, not_definite
from ..options import DAMP


@dataclass(frozen=True, eq=False)
class DeviceFactor:
    """As quantkit.rounding.Factor has it, on a device."""

    u: Tensor
    """[n, n] upper triangular: U^T U is the inverse of the damped H"""
    importance: F32
    """[n]: the damped diagonal of H; for ggml's searches, which are on the CPU"""
    h: Tensor
    """[n, n]: H as it was given, not damped and not scaled"""
    given: F32
    """[n, n]: the same where it came from"""
    damp: float

    @property
    def n_cols(self) -> int:
        return len(self.importance)

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def nbytes(self) -> int:
        """of U"""
        return self.u.nbytes


def factor(h: F32, device: torch.device, damp: float = DAMP) -> DeviceFactor:
    """Factor a covariance float32 [n, n], as quantkit.rounding.factor does: refused is what that refuses. Takes
    n^2 * 32 bytes of the device while it runs."""
    scaling = checked(h, damp)
    on = torch.from_numpy(h).to(device)
    a = on.to(torch.float64) * math.ldexp(1.0, scaling.exponent)
    a.diagonal().add_(scaling.added)
    # with both axes flipped, H = V V^T with V upper triangular is an ordinary Cholesky
    lower, info = torch.linalg.cholesky_ex(a.flip(0, 1))
    bad = int(info)
    if bad > 0:
        raise not_definite(len(h), damp, len(h) - bad)
    identity = torch.eye(len(h), dtype=torch.float64, device=device)
    u = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).to(torch.float32)
    if not bool(u.isfinite().all()):
        raise no_inverse(len(h))
    return DeviceFactor(u.contiguous(), scaling.importance, on, h, damp)


def products(w: Tensor, q: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [n_rows] each: w h w^T and w h q^T of each column of w and q [n_cols, n_rows]."""
    wh = (h @ w).to(torch.float64)
    return (wh * w).sum(0), (wh * q).sum(0)


def as_columns(rows: F32, device: torch.device) -> Tensor:
    """[n_cols, n_rows] on a device, of rows float32 [n_rows, n_cols]."""
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device).T.contiguous()


def require_blocks(n_cols: int, device_factor: DeviceFactor) -> None:
    """Raise KernelError for rows of another length than the covariance's."""
    if n_cols != device_factor.n_cols:
        raise KernelError(f"rows of {n_cols} columns do not go with a covariance of {device_factor.n_cols}")

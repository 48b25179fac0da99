"""Columns rounded one after the other within a group, all rows at once; see native/feedback_lanes.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .halves import quotient


class Round(Protocol):
    """A way to round: values float32 [..., n] to (what they become, their levels)."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class Affine:
    """Levels 0..most of `scale` each, and `minimum` below; both [..., n]."""

    def __init__(self, scale: Tensor, minimum: Tensor, most: int) -> None:
        self.scale, self.minimum, self.most = scale, minimum, most
        self.inverse = quotient(1.0, scale)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = (self.inverse * (x + self.minimum)).clamp_(0, self.most).round_()
        return self.scale * level - self.minimum, level


class Symmetric:
    """Levels -n..n - 1 of `scale` each."""

    def __init__(self, scale: Tensor, _minimum: Tensor, n: int) -> None:
        self.scale, self.n = scale, n
        self.inverse = quotient(1.0, scale)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = (self.inverse * x).clamp_(-self.n, self.n - 1).round_()
        return self.scale * level, level


class Levelled:
    """The nearest of 16 levels, times `scale`; a level is its number."""

    def __init__(self, scale: Tensor, levels: Tensor, thresholds: Tensor) -> None:
        self.scale, self.levels, self.thresholds = scale, levels, thresholds
        self.inverse = quotient(1.0, scale)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.bucketize(self.inverse * x, self.thresholds, right=True)
        return self.scale * self.levels[index], index.to(torch.float32)


class Fed(NamedTuple):
    """What a group of columns became, for each way to round."""

    level: Tensor
    """[n_cols, n_ways, n_rows]"""
    e: Tensor
    """the same: errors to pass on"""
    loss: Tensor
    """[n_ways, n_rows]: sums of e^2"""

    def least(self) -> tuple[Tensor, Fed]:
        """The first way of the least loss of each row [n_rows]; and that alone, without the axis of ways."""
        way = torch.where(self.loss.isnan(), torch.inf, self.loss).argmin(0)
        at = way.expand(len(self.level), 1, -1)
        level, e = (v.gather(1, at)[:, 0] for v in (self.level, self.e))
        return way, Fed(level, e, self.loss.gather(0, way[None])[0])


def feed(x: Tensor, u: Tensor, reciprocal: Tensor, round_: Round, n_ways: int) -> Fed:
    """Columns x [n_cols, n_rows], left to right, each way of `round_` [n_ways, n_rows] on its own. u [n_cols, n_cols]
    is theirs of U, reciprocal [n_cols] 1 / its diagonal. x stays as it is."""
    n = len(x)
    now = x[:, None].expand(-1, n_ways, -1).clone()
    level, e = torch.empty_like(now), torch.empty_like(now)
    loss = torch.zeros_like(now[0])
    for j in range(n):
        value, level[j] = round_(now[j])
        torch.mul(now[j] - value, reciprocal[j], out=e[j])
        loss += e[j] * e[j]
        if j + 1 < n:  # two roundings, as on the CPU: no addcmul, which may have one
            now[j + 1 :] -= u[j, j + 1 :, None, None] * e[j]
    return Fed(level, e, loss)


#: of scales [n_ways, n_rows] and minima
MakeRound = Callable[[Tensor, Tensor], Round]

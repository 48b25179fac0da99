"""Codes of the types whose groups are sizes from a grid, times signs, of which some want an even number; see
native/feedback_grid.h.

There are too many codes for a metric that is not diagonal. So a few that are good under its diagonal, with x's signs,
are scored under it: of points with the same first half the best one, and of these the best few. Then the best of these
has the one or two signs turned that help most.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .beam import Coded, Groups

I64 = npt.NDArray[np.int64]

GROUP = 8
#: columns of scores at a time, each of all points
LANES = 1 << 14
#: what a group's code has above the number of its points
SIGNS_AT = 18


class SizesOf(Protocol):
    """Points of a grid."""

    def candidates(self, target: Tensor, odd: Tensor, diagonal: Tensor, scale: Tensor) -> Tensor:
        """Codes without signs int64 [k, n] that are good for sizes [8, n] under a diagonal [8]; odd [n]: where a sign
        must be turned."""

    def sizes(self, code: Tensor) -> Tensor:
        """[8, *] of codes [*]."""


class Coder:
    """`even`: whether the number of signs must be even."""

    def __init__(self, groups: Groups, grid: SizesOf, even: bool) -> None:
        self.groups, self.grid, self.even = groups, grid, even
        i, j = torch.triu_indices(GROUP, GROUP, 1, device=groups.metric.device)
        self.pairs = (i, j)

    def code(self, group: int, x: Tensor, scale: Tensor, _down: Tensor) -> Coded:
        m, inverse = self.groups.metric[group], self.groups.inverse[group]
        parts = [
            self._code(m, inverse, x[:, at : at + LANES], scale[at : at + LANES]) for at in range(0, x.shape[1], LANES)
        ]
        return Coded(*(torch.cat(v, -1) for v in zip(*parts, strict=True)))

    def _code(self, m: Tensor, inverse: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        negative, target = x < 0, x.abs()
        odd = (negative.sum(0) % 2 == 1) if self.even else torch.zeros_like(scale, dtype=torch.bool)
        diagonal = m.diagonal()
        found = self.grid.candidates(target, odd, diagonal, scale)
        sizes = scale * self.grid.sizes(found)  # [8, k, n]
        signs = negative[:, None].expand(-1, len(found), -1)
        if self.even:
            cheapest = (diagonal[:, None, None] * target[:, None] * sizes).argmin(0)
            turned = torch.zeros_like(signs).scatter(0, cheapest[None], odd.expand(1, len(found), -1))
            signs = signs ^ turned
        away = x[:, None] - torch.where(signs, -sizes, sizes)
        e = (inverse.T @ away.reshape(GROUP, -1)).view_as(away)
        best = torch.nan_to_num((e * e).sum(0), nan=torch.inf).argmin(0)[None]
        size, sign = (v.gather(1, best.expand(GROUP, 1, -1))[:, 0] for v in (sizes, signs))
        sign = sign ^ self._flips(m, x, torch.where(sign, -size, size))
        bits = (sign.to(torch.int64) << torch.arange(GROUP, device=x.device)[:, None]).sum(0)
        return found.gather(0, best)[0] | bits << SIGNS_AT, torch.where(sign, -size, size)

    def _flips(self, m: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """bool [8, n]: of one sign (unless their number must stay even) or of two, those that lower
        (x - v) M (x - v)^T most."""
        i, j = self.pairs
        diagonal = m.diagonal()[:, None]
        change = v * (m @ (x - v) + v * diagonal)
        both = change[i] + change[j] + v[i] * v[j] * (2.0 * m[i, j])[:, None]
        gain, which = both.min(0)
        out = torch.zeros_like(v, dtype=torch.bool)
        some = (gain < 0)[None]
        out = out.scatter(0, i[which][None], some).scatter(0, j[which][None], some)
        if self.even:
            return out
        alone, one = change.min(0)
        only = (alone < 0) & (alone <= gain)
        return torch.where(only, torch.zeros_like(out).scatter(0, one[None], only[None]), out)


def numbered(cost: Tensor, bits: int) -> Tensor:
    """Costs float32 [m, n], none negative, whose last `bits` bits are their number, as on the CPU, so that no two of a
    column are equal."""
    numbers = torch.arange(len(cost), dtype=torch.int32, device=cost.device)[:, None]
    return (cost.contiguous().view(torch.int32) & ~((1 << bits) - 1) | numbers).view(torch.float32)


def number_of(cost: Tensor, bits: int) -> Tensor:
    """The numbers, int64, that `numbered` put there."""
    return (cost.view(torch.int32) & ((1 << bits) - 1)).to(torch.int64)


def least(cost: Tensor, k: int, bits: int) -> Tensor:
    """Numbers int64 [k, n] of the `k` least of costs [m, n], none negative, the least first."""
    scores = numbered(cost, bits).view(torch.int32)
    out = [scores.amin(0)]
    for _ in range(k - 1):
        scores = torch.where(scores > out[-1], scores, torch.iinfo(torch.int32).max)
        out.append(scores.amin(0))
    return torch.stack(out).to(torch.int64) & ((1 << bits) - 1)


class Halves:
    """The points of a grid by the numbers of their two halves."""

    def __init__(self, low: I64, high: I64, bits: int, device: torch.device) -> None:
        """Numbers [n_points], below 2^bits."""
        self.bits, self.n = bits, int(low.max()) + 1
        place = np.zeros((1 << bits, 1 << bits), np.int64)
        place[high, low] = np.arange(len(low))
        self.low, self.high, self.place = (torch.from_numpy(v).to(device) for v in (low, high, place))

    def best(self, cost: Tensor) -> Tensor:
        """Costs [n_halves, n] of second halves, numbered: the least for each first half, [n_firsts, n]."""
        out = cost.new_full((self.n, cost.shape[1]), torch.inf)
        return out.scatter_reduce_(0, self.low[:, None].expand(-1, cost.shape[1]), cost[self.high], "amin")

    def points(self, first: Tensor, second: Tensor) -> Tensor:
        """Numbers of points, of numbers of halves."""
        return self.place[second, first]

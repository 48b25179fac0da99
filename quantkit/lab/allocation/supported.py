"""Minimizes A + F^γ over choices whose A and F add up, given a knapsack that minimizes w_A·A + w_F·F.

For γ ≤ 1 the function is concave, so its minimum over all points (A, F) is at a corner of their convex hull, and every
corner minimizes some weighted sum. New corners are searched between known ones, where the bound is lowest first: two
corners and the weights that found them leave a triangle, and no point in it is better than its tip. With γ > 1 the same
search is a heuristic.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import NamedTuple

_EQUAL = 1e-9
_MOST = 200


class Corner(NamedTuple):
    """A solution, and the weights of A and F whose weighted sum it minimizes."""

    chosen: tuple[int, ...]
    smooth: float
    """A"""
    flips: float
    """F"""
    weights: tuple[float, float]
    gap: float
    """of the knapsack"""

    def value(self, gamma: float) -> float:
        return float(self.smooth + self.flips**gamma)

    @property
    def least(self) -> float:
        """A lower bound on the weighted sum of any point."""
        return (self.weights[0] * self.smooth + self.weights[1] * self.flips) * (1 - self.gap)


class Best(NamedTuple):
    """The best solution found."""

    corner: Corner
    gap: float
    """largest possible distance above the minimum, as a share of its own value"""


def least(at: Callable[[float, float], Corner | None], gamma: float, time_limit: float) -> Best | None:
    """Find the corner of least A + F^γ; None if there is no solution at all. `at` solves for two weights."""
    start = time.monotonic()
    first = at(1.0, _EQUAL)
    last = at(_EQUAL, 1.0) if first is not None else None
    if first is None or last is None:
        return None
    best = min(first, last, key=lambda c: c.value(gamma))
    waiting: list[tuple[float, int, Corner, Corner]] = []
    n = 0

    def push(p: Corner, q: Corner) -> None:
        nonlocal n
        n += 1
        heapq.heappush(waiting, (_bound(p, q, gamma), n, p, q))

    push(first, last)
    while waiting and n < _MOST and time.monotonic() - start < time_limit:
        bound, _, p, q = waiting[0]
        if bound >= best.value(gamma) * (1 - _EQUAL):
            break
        heapq.heappop(waiting)
        weights = (p.flips - q.flips, q.smooth - p.smooth)  # the line through both
        if weights[0] <= 0 or weights[1] <= 0:
            continue
        total = weights[0] + weights[1]
        found = at(weights[0] / total, weights[1] / total)
        if found is None:
            continue
        line = (weights[0] * p.smooth + weights[1] * p.flips) / total
        if found.least < line * (1 - _EQUAL):
            best = min(best, found, key=lambda c: c.value(gamma))
            push(p, found)
            push(found, q)
    bound = min((b for b, *_ in waiting), default=best.value(gamma))
    value = best.value(gamma)
    open_ = max(0.0, (value - bound) / value) if value > 0 else 0.0
    return Best(best, max(open_, best.gap))


def _bound(p: Corner, q: Corner, gamma: float) -> float:
    """A lower bound for points between two corners: the value at the tip of the triangle that their weights leave."""
    (a, b), (c, d) = p.weights, q.weights
    det = a * d - b * c
    if abs(det) < 1e-15:
        return min(p.value(gamma), q.value(gamma))
    smooth, flips = (d * p.least - b * q.least) / det, (a * q.least - c * p.least) / det
    tip = max(smooth, 0.0) + max(flips, 0.0) ** gamma
    return float(min(tip, p.value(gamma), q.value(gamma)))

"""Q2_K to Q6_K and IQ4_XS: blocks of 256 columns whose groups have a scale (and a minimum) in steps of the block's.

The search is that of native/feedback_k.cpp; what it tries from the same start is done side by side, as more rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import U8
from . import packing, starts
from .block import Block, Made
from .feed import Affine, Levelled, Round, Symmetric, feed
from .halves import half, quotient, steps

COLUMNS = 256
_AROUND = (0, -1, 1, -2, 2)


class Scales(NamedTuple):
    """Of a block of each row; in float32 all of them."""

    d: Tensor
    """[n_rows]: the scale that a step of a group's scale is"""
    dm: Tensor
    """[n_rows]: and of a group's minimum"""
    s: Tensor
    """[n_groups, n_rows]: steps"""
    m: Tensor

    def times(self, factor: float, low: int, high: int) -> Scales:
        """Another scale of the block; steps that come nearest to the same scales of groups."""
        d = half(self.d * factor)
        return self._replace(d=d, s=_steps_of(self.d * self.s, d, low, high))

    def minimum_times(self, factor: float, most: int) -> Scales:
        dm = half(self.dm * factor)
        return self._replace(dm=dm, m=_steps_of(self.dm * self.m, dm, 0, most))


@dataclass(frozen=True)
class SuperBlock:
    """A type of the kind."""

    name: str
    n: int
    """columns of a group"""
    low: int
    high: int
    """of a group's scale"""
    most_minimum: int
    """0 where groups have no minimum"""
    round: Callable[[Tensor, Tensor], Round]
    start: Callable[[U8], tuple[object, ...]]
    pack: Callable[[Tensor, Scales], Tensor]
    columns: int = COLUMNS

    def quantize(self, x: Tensor, block: Block, search: bool) -> Made:
        """Blocks of columns x [256, n_rows]."""
        found = starts.stock(x, self.name, block.importance)
        start = Scales(*(torch.from_numpy(v).to(x.device) for v in self.start(found.blocks)))
        kept = self._search(x, block, start) if search else self._run(x, block, start, False)
        kept.e[0].masked_fill_(found.refused, torch.nan)
        return Made(self.pack(kept.level, kept.scales), kept.e)

    def _search(self, x: Tensor, block: Block, start: Scales) -> _Run:
        kept = self._best([start, *(start.times(f, self.low, self.high) for f in (0.93, 1.07))], x, block, None)
        if self.most_minimum:
            tried = [kept.scales.minimum_times(f, self.most_minimum) for f in (0.93, 1.07)]
            kept = self._best(tried, x, block, kept)
        return self._best([kept.scales.times(f, self.low, self.high) for f in (0.97, 1.03)], x, block, kept)

    def _best(self, tried: list[Scales], x: Tensor, block: Block, known: _Run | None) -> _Run:
        """The first of what is known and what is tried with the least sum of e^2, row by row."""
        n, n_rows = len(tried), x.shape[1]
        run = self._run(x.repeat(1, n), block, Scales(*(torch.cat(v, -1) for v in zip(*tried, strict=True))), True)
        runs = [
            _Run(
                run.level[:, i : i + n_rows], run.e[:, i : i + n_rows], run.loss[i : i + n_rows],
                Scales(*(v[..., i : i + n_rows] for v in run.scales)),
            )
            for i in range(0, n * n_rows, n_rows)
        ]  # fmt: skip
        best = runs.pop(0) if known is None else known
        for other in runs:
            better = other.loss < best.loss
            best = _Run(
                torch.where(better, other.level, best.level), torch.where(better, other.e, best.e),
                torch.where(better, other.loss, best.loss),
                Scales(*(torch.where(better, a, b) for a, b in zip(other.scales, best.scales, strict=True))),
            )  # fmt: skip
        return best

    def _run(self, x: Tensor, block: Block, scales: Scales, search: bool) -> _Run:
        """The groups one after the other."""
        x = x.clone()
        level, e = torch.empty_like(x), torch.empty_like(x)
        loss = torch.zeros_like(x[0])
        s, m = scales.s.clone(), scales.m.clone()
        around = torch.tensor(_AROUND if search else (0,), dtype=x.dtype, device=x.device)[:, None]
        still = torch.zeros_like(around)
        of_minima = [False]
        if search:
            of_minima = [False, True, False] if self.most_minimum else [False, False]
        for g in range(COLUMNS // self.n):
            here = slice(g * self.n, (g + 1) * self.n)
            later = slice((g + 1) * self.n, COLUMNS)
            start = s[g].clone()
            for turn, of_minimum in enumerate(of_minima):
                if turn and not self.most_minimum:  # the way that was better, on
                    away = torch.sign(s[g] - start)
                    on = (start + step * away for step in (3, 4))
                    ss = torch.stack([s[g], *(v.clamp(self.low, self.high) for v in on)])
                else:
                    ss = s[g] + still if of_minimum else (s[g] + around).clamp_(self.low, self.high)
                mm = (m[g] + around).clamp_(0, self.most_minimum) if of_minimum else m[g] + still[: len(ss)]
                way, made = feed(
                    x[here], block.u[here, here], block.reciprocal[here],
                    self.round(scales.d * ss, scales.dm * mm), len(ss),
                ).least()  # fmt: skip
                s[g], m[g] = ss.gather(0, way[None])[0], mm.gather(0, way[None])[0]
            level[here], e[here] = made.level, made.e
            loss += made.loss
            x[later].addmm_(block.u[here, later].T, made.e, alpha=-1)
        return _Run(level, e, loss, scales._replace(s=s, m=m))


class _Run(NamedTuple):
    level: Tensor
    """[256, n_rows]"""
    e: Tensor
    loss: Tensor
    """[n_rows]"""
    scales: Scales


def _steps_of(scale: Tensor, d: Tensor, low: int, high: int) -> Tensor:
    return steps(quotient(scale, d).clamp(low, high))


def _affine(most: int) -> Callable[[Tensor, Tensor], Round]:
    return lambda scale, minimum: Affine(scale, minimum, most)


def _symmetric(n: int) -> Callable[[Tensor, Tensor], Round]:
    return lambda scale, minimum: Symmetric(scale, minimum, n)


def _iq4(scale: Tensor, _minimum: Tensor) -> Round:
    return Levelled(scale, *starts.iq4_levels(scale.device))


TYPES = {
    kind.name: kind
    for kind in (
        SuperBlock("Q2_K", 16, 0, 15, 15, _affine(3), starts.q2_k, packing.q2_k),
        SuperBlock("Q3_K", 16, -32, 31, 0, _symmetric(4), starts.q3_k, packing.q3_k),
        SuperBlock("Q4_K", 32, 0, 63, 63, _affine(15), starts.q4_k, packing.q4_k),
        SuperBlock("Q5_K", 32, 0, 63, 63, _affine(31), starts.q5_k, packing.q5_k),
        SuperBlock("Q6_K", 16, -128, 127, 0, _symmetric(32), starts.q6_k, packing.q6_k),
        SuperBlock("IQ4_XS", 32, -32, 31, 0, _iq4, starts.iq4_xs, packing.iq4_xs),
    )
}

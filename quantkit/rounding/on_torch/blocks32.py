"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL: blocks of 32 columns with one scale, and some a minimum.

The search is that of native/feedback_32.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import packing, scales
from .block import Block, Made
from .feed import Affine, Fed, Levelled, Round, Symmetric, feed
from .halves import half
from .starts import iq4_levels

COLUMNS = 32
_FAR = (0.88, 0.92, 0.96, 1.04, 1.08)
_NEAR = (0.98, 0.99, 1.01, 1.02, 0.97)
_PARTS = (-0.5, -0.25, 0.25, 0.5, 0.125)


@dataclass(frozen=True)
class Block32:
    """A type of the kind."""

    name: str
    find: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """of columns and weights [32, n_rows]: scale and minimum [n_rows]"""
    round: Callable[[Tensor, Tensor], Round]
    pack: Callable[[Tensor, Tensor, Tensor], Tensor]
    has_minimum: bool = False
    own_mean: bool = False
    """whether ggml weighs by the mean square of the block, and not of the row"""
    columns: int = COLUMNS

    def quantize(self, x: Tensor, block: Block, search: bool) -> Made:
        """Blocks of columns x [32, n_rows]."""
        importance = torch.from_numpy(block.importance).to(x.device)[:, None]
        mean = (x * x).sum(0) * (2.0 / COLUMNS) if self.own_mean else block.mean_square
        scale, minimum = map(half, self.find(x, importance * torch.sqrt(mean + x * x)))
        made = self._feed(x, block, scale[None], minimum[None])[1]
        if search:
            for factors in (_FAR, _NEAR):
                ways = half(scale * _column(factors, x))
                scale, minimum, made = self._better(x, block, (ways, minimum.expand_as(ways)), (scale, minimum, made))
            if self.has_minimum:
                ways = half(minimum + scale * _column(_PARTS, x))
                scale, minimum, made = self._better(x, block, (scale.expand_as(ways), ways), (scale, minimum, made))
        return Made(self.pack(made.level, scale, minimum), made.e)

    def _feed(self, x: Tensor, block: Block, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Fed]:
        return feed(x, block.u, block.reciprocal, self.round(scale, minimum), len(scale)).least()

    def _better(
        self, x: Tensor, block: Block, ways: tuple[Tensor, Tensor], known: tuple[Tensor, Tensor, Fed]
    ) -> tuple[Tensor, Tensor, Fed]:
        """The best of `ways` [n_ways, n_rows] where it is better than what is known."""
        way, made = self._feed(x, block, *ways)
        scale, minimum, best = known
        better = made.loss < best.loss
        scale, minimum = (
            torch.where(better, a.gather(0, way[None])[0], b) for a, b in zip(ways, (scale, minimum), strict=True)
        )
        return scale, minimum, Fed(*(torch.where(better, a, b) for a, b in zip(made, best, strict=True)))


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _one(find: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def found(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        scale = find(x, w)
        return scale, torch.zeros_like(scale)

    return found


def _symmetric(name: str, n: int, pack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Block32:
    return Block32(name, _one(lambda x, w: scales.symmetric(x, w, n)), lambda s, m: Symmetric(s, m, n), pack)


def _affine(name: str, most: int, pack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Block32:
    return Block32(name, lambda x, w: scales.affine(x, w, most), lambda s, m: Affine(s, m, most), pack, True)


def _iq4(scale: Tensor, _minimum: Tensor) -> Round:
    return Levelled(scale, *iq4_levels(scale.device))


TYPES = {
    kind.name: kind
    for kind in (
        _symmetric("Q4_0", 8, packing.q4_0),
        _symmetric("Q5_0", 16, packing.q5_0),
        _affine("Q4_1", 15, packing.q4_1),
        _affine("Q5_1", 31, packing.q5_1),
        Block32("Q8_0", _one(lambda x, _: scales.eight(x)), lambda s, m: Symmetric(s, m, 128), packing.q8_0),
        Block32("IQ4_NL", _one(scales.iq4), _iq4, packing.iq4_nl, own_mean=True),
    )
}

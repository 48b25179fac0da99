"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S; see native/feedback_iq2.cpp and native/feedback_iq3.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels import F32, U8
from .beam import Beam, Groups, Paths
from .grids import Grid, iq2_s, iq2_xs, iq2_xxs, iq3_s, iq3_xxs
from .halves import half_bytes, halves_at, steps, word_bytes
from .signed import SIGNS_AT, Coder, Halves, least, number_of, numbered


def _bits(grid: Grid) -> int:
    return len(grid.number).bit_length() - 1


class Eights:
    """Points of eight of three sizes; four candidates."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.bits = _bits(grid)
        self.points = torch.from_numpy(grid.points).to(device)
        self.of_size = torch.from_numpy(grid.sizes).to(device)
        place = 3 ** np.arange(4)
        self.halves = Halves(grid.levels[:, :4] @ place, grid.levels[:, 4:] @ place, 7, device)

    def sizes(self, code: Tensor) -> Tensor:
        return self.points[code & (len(self.points) - 1)].movedim(-1, 0)

    def candidates(self, target: Tensor, odd: Tensor, diagonal: Tensor, scale: Tensor) -> Tensor:
        size = scale * self.of_size[:, None, None]  # [3, 1, n]
        away = target - size
        cost = diagonal[:, None] * away * away  # [3, 8, n]
        flip = torch.where(odd, (4.0 * diagonal[:, None]) * target * size, 0.0)
        halves, flips = [], []
        for first in (0, 4):
            c, f = cost[:, first], flip[:, first]
            for i in range(first + 1, first + 4):
                c = (c + cost[:, i, None]).flatten(0, 1)
                f = torch.minimum(f, flip[:, i, None]).flatten(0, 1)
            halves.append(c)
            flips.append(f)
        best = self.halves.best(numbered(halves[1], 7))
        flipped = self.halves.best(numbered(halves[1] + flips[1], 7))
        # one sign is flipped: in this half or in the other
        here = best + flips[0][: len(best)]
        second = number_of(torch.where(here < flipped, best, flipped), 7)
        found = least(halves[0][: len(best)] + torch.minimum(here, flipped), 4, 7)
        return self.halves.points(found, second.gather(0, found))


class Fours:
    """Two points of four of eight sizes; three candidates of each."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.bits = _bits(grid)
        self.points = torch.from_numpy(grid.points).to(device)
        self.of_size = torch.from_numpy(grid.sizes).to(device)
        self.halves = Halves(grid.levels[:, :2] @ (1, 8), grid.levels[:, 2:] @ (1, 8), 6, device)

    def sizes(self, code: Tensor) -> Tensor:
        last = len(self.points) - 1
        return torch.cat([self.points[c & last].movedim(-1, 0) for c in (code, code >> self.bits)])

    def candidates(self, target: Tensor, _odd: Tensor, diagonal: Tensor, scale: Tensor) -> Tensor:
        away = target - scale * self.of_size[:, None, None]
        cost = diagonal[:, None] * away * away  # [8 sizes, 8, n]
        found = []
        for first in (0, 4):
            pair = [(cost[:, at] + cost[:, at + 1, None]).flatten(0, 1) for at in (first, first + 2)]
            best = self.halves.best(numbered(pair[1], 6))
            low = least(pair[0][: len(best)] + best, 3, 6)
            found.append(self.halves.points(low, number_of(best, 6).gather(0, low)))
        return torch.stack(
            [found[0][i] | found[1][j] << self.bits for i in range(3) for j in range(3) if i * j <= 2]  # not both far
        )


@dataclass(frozen=True)
class Signed:
    """A type of the kind."""

    name: str
    sub: int
    grid: Callable[[], Grid]
    even: bool
    scale: Callable[[Tensor, Tensor], Tensor]
    level_at: Callable[[Tensor, Tensor], Tensor]
    levels_of: Callable[[U8], F32]
    """[n_subs, n_rows], of ggml's blocks"""
    pack_rest: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    """all bytes after the block's scale: of ggml's numbers of points [n_rows, n], signs [n_rows, 32], and levels
    [n_rows, n_subs], int64"""
    n_levels: int = 16
    window: int = 3
    n_shifts: int = 1

    def coder(self, groups: Groups) -> Coder:
        grid = self.grid()
        kind = Eights if grid.levels.shape[1] == 8 else Fours
        return Coder(groups, kind(grid, groups.metric.device), self.even)

    def read(self, blocks: U8) -> tuple[F32, F32, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        level = np.ascontiguousarray(self.levels_of(blocks), np.float32)
        return halves_at(blocks, 0), level, np.zeros(level.shape, np.bool_)

    def pack(self, found: Paths) -> Tensor:
        grid = self.grid()
        code = found.code[:, 0].T
        number = torch.from_numpy(grid.number).to(code.device)
        last, bits = len(number) - 1, _bits(grid)
        index = number[code & last]
        if grid.levels.shape[1] == 4:
            index = torch.stack([index, number[code >> bits & last]], -1).flatten(1)
        level = found.level[:, 0].T.to(torch.int64)
        parts = self.pack_rest(index, code >> SIGNS_AT, level)
        return torch.cat([half_bytes(found.d[0]), *(p.reshape(len(code), -1) for p in parts)], 1)


def _byte(x: Tensor) -> Tensor:
    return word_bytes(x, 1)[..., 0]


def _pairs(level: Tensor) -> Tensor:
    """Two levels a byte."""
    parts = level.view(len(level), -1, 2)
    return _byte(parts[:, :, 0] | parts[:, :, 1] << 4)


def _joined(x: Tensor, n: int, bits: int) -> Tensor:
    """`n` numbers of so many bits each, in one; [n_rows, *]."""
    parts = x.view(len(x), -1, n)
    out = parts[:, :, 0]
    for i in range(1, n):
        out = out | parts[:, :, i] << (bits * i)
    return out


def _signs_and_level(signs: Tensor, level: Tensor) -> Tensor:
    """Words of four groups' signs but for the eighth of each, and a level."""
    return word_bytes(_joined(signs & 127, 4, 7) | level << 28, 4)


def _iq2_xxs(index: Tensor, signs: Tensor, level: Tensor) -> list[Tensor]:
    return [torch.cat([_byte(index).view(-1, 8, 4), _signs_and_level(signs, level)], 2)]


def _iq2_xs(index: Tensor, signs: Tensor, level: Tensor) -> list[Tensor]:
    return [word_bytes(index | (signs & 127) << 9, 2), _pairs(level)]


def _iq2_s(index: Tensor, signs: Tensor, level: Tensor) -> list[Tensor]:
    return [_byte(index), _byte(signs), _byte(_joined(index >> 8, 4, 2)), _pairs(level)]


def _iq3_xxs(index: Tensor, signs: Tensor, level: Tensor) -> list[Tensor]:
    return [_byte(index), _signs_and_level(signs, level)]


def _iq3_s(index: Tensor, signs: Tensor, level: Tensor) -> list[Tensor]:
    return [_byte(index), _byte(_joined(index >> 8, 8, 1)), _byte(signs), _pairs(level)]


def _tops(at: int, apart: int) -> Callable[[U8], F32]:
    """Levels in the upper four bits of every so many bytes."""
    return lambda blocks: (blocks[:, at::apart] >> 4).T.astype(np.float32)


def _nibbles(at: int) -> Callable[[U8], F32]:
    """Levels of two a byte, to the block's end."""

    def read(blocks: U8) -> F32:
        both = blocks[:, at:]
        level: F32 = np.stack([both & 15, both >> 4], 2).reshape(len(blocks), -1).T.astype(np.float32)
        return level

    return read


def _halves(step: float) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Scales of (1/2 + level) steps, and the level nearest to one."""

    def scale(d: Tensor, level: Tensor) -> Tensor:
        return d * (0.5 + level) * step

    def level_at(s: Tensor, d: Tensor) -> Tensor:
        return steps((1 / step) * s / d - 0.5).clamp_(0, 15)

    return scale, level_at


def _odds() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Scales of 2 level + 1, and the level nearest to one."""

    def scale(d: Tensor, level: Tensor) -> Tensor:
        return d * (2 * level + 1)

    def level_at(s: Tensor, d: Tensor) -> Tensor:
        return steps(0.5 * (s / d - 1.0)).clamp_(0, 15)

    return scale, level_at


TYPES = {
    kind.name: Beam(kind)
    for kind in (
        Signed("IQ2_XXS", 32, iq2_xxs, True, *_halves(0.25), _tops(9, 8), _iq2_xxs),
        Signed("IQ2_XS", 16, iq2_xs, True, *_halves(0.25), _nibbles(66), _iq2_xs),
        Signed("IQ2_S", 16, iq2_s, False, *_halves(0.25), _nibbles(74), _iq2_s),
        Signed("IQ3_XXS", 32, iq3_xxs, True, *_halves(0.5), _tops(69, 4), _iq3_xxs),
        Signed("IQ3_S", 32, iq3_s, False, *_odds(), _nibbles(106), _iq3_s),
    )
}

"""IQ1_S and IQ1_M: a group takes the point of the grid, of all 2048, that is nearest under the metric; see
native/feedback_iq1.cpp."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...kernels import F32, U8
from . import grids
from .beam import Beam, Coded, Groups, Paths
from .halves import half_bytes, halves_at, quotient, steps, word_bytes

_DELTA = 0.125
_POINTS = 2048
#: columns of scores at a time, each of all points
_LANES = 1 << 14


class _Coder:
    """Scores of points: 2 (x M / s) (g + delta) - (g + delta) M (g + delta); the higher, the nearer. `own`: whether
    each group has its own shift, as part of its code."""

    def __init__(self, groups: Groups, own: bool) -> None:
        self.metric, self.own = groups.metric, own
        self.points = torch.from_numpy(grids.iq1().points).to(groups.metric.device)

    def code(self, group: int, x: Tensor, scale: Tensor, down: Tensor) -> Coded:
        m = self.metric[group]
        own = [(((self.points + d) @ m) * (self.points + d)).sum(1) for d in (_DELTA, -_DELTA)]
        b = (m @ x) * torch.where(scale > 0, quotient(2.0, scale), 0.0)
        # the quadratic part as two more columns, of which a lane takes its shift's
        table = torch.cat([self.points, -torch.stack(own, 1)], 1).T
        code = torch.empty(x.shape[1], dtype=torch.int64, device=x.device)
        for at in range(0, x.shape[1], _LANES):
            some = slice(at, at + _LANES)
            code[some] = self._nearest(b[:, some], table, down[some])
        shift = torch.where(code >= _POINTS if self.own else down, -_DELTA, _DELTA)
        return Coded(code, scale * (self.points[code % _POINTS].T + shift))

    def _nearest(self, b: Tensor, table: Tensor, down: Tensor) -> Tensor:
        if not self.own:
            return (torch.cat([b, (~down).to(b.dtype)[None], down.to(b.dtype)[None]]).T @ table).argmax(1)
        one, none = torch.ones_like(b[:1]), torch.zeros_like(b[:1])
        (up, at_up), (low, at_low) = ((torch.cat([b, *shift]).T @ table).max(1) for shift in ((one, none), (none, one)))
        of_shift = _DELTA * b.sum(0)
        return torch.where(low - of_shift > up + of_shift, at_low + _POINTS, at_up)


class _Iq1:
    n_levels, window = 8, 2

    def scale(self, d: Tensor, level: Tensor) -> Tensor:
        return d * (2 * level + 1)

    def level_at(self, scale: Tensor, d: Tensor) -> Tensor:
        return steps(0.5 * (scale / d - 1.0)).clamp_(0, self.n_levels - 1)


def _index(code: Tensor) -> Tensor:
    """ggml's numbers of points, [n_rows, 32], of codes [32, 1, n_rows]."""
    return torch.from_numpy(grids.iq1().number).to(code.device)[code[:, 0].T % _POINTS]


class Iq1S(_Iq1):
    name, sub, n_shifts = "IQ1_S", 32, 2

    def coder(self, groups: Groups) -> _Coder:
        return _Coder(groups, False)

    def read(self, blocks: U8) -> tuple[F32, F32, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        words = np.ascontiguousarray(blocks[:, 34:50]).view(np.uint16).T
        return halves_at(blocks, 0), (words >> 12 & 7).astype(np.float32), (words >> 15).astype(np.bool_)

    def pack(self, found: Paths) -> Tensor:
        index = _index(found.code)
        high = (index >> 8).view(-1, 8, 4)
        words = found.level[:, 0].T.to(torch.int64) << 12 | found.down[:, 0].T.to(torch.int64) << 15
        for i in range(4):
            words = words | high[:, :, i] << (3 * i)
        return torch.cat([half_bytes(found.d[0]), word_bytes(index, 1)[..., 0], word_bytes(words, 2).flatten(1)], 1)


class Iq1M(_Iq1):
    """Shifts are of groups: part of their codes."""

    name, sub, n_shifts = "IQ1_M", 16, 1

    def coder(self, groups: Groups) -> _Coder:
        return _Coder(groups, True)

    def read(self, blocks: U8) -> tuple[F32, F32, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        words = np.ascontiguousarray(blocks[:, 48:56]).view(np.uint16)
        nibbles = words >> 12
        bits = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
        level = np.stack([words[:, s // 4] >> (3 * (s % 4)) & 7 for s in range(16)])
        d = bits.astype(np.uint16).view(np.float16).astype(np.float32)
        return d, level.astype(np.float32), np.zeros(level.shape, np.bool_)

    def pack(self, found: Paths) -> Tensor:
        index = _index(found.code)
        high = (index >> 8 | (found.code[:, 0].T >= _POINTS).to(torch.int64) << 3).view(-1, 16, 2)
        level = found.level[:, 0].T.to(torch.int64).view(-1, 4, 4)
        bits = found.d[0].to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF
        words = torch.stack([(bits >> (4 * i) & 15) << 12 for i in range(4)], 1)
        for s in range(4):
            words = words | level[:, :, s] << (3 * s)
        highs = high[:, :, 0] | high[:, :, 1] << 4
        parts = [word_bytes(index, 1)[..., 0], word_bytes(highs, 1)[..., 0], word_bytes(words, 2).flatten(1)]
        return torch.cat(parts, 1)


TYPES = {kind.name: Beam(kind) for kind in (Iq1S(), Iq1M())}

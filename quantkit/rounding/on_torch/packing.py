"""Levels and scales as the bytes of blocks; layouts as in native/k_quants.cpp and native/iq4.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .halves import half_bytes

if TYPE_CHECKING:
    from .super_blocks import Scales


def _bytes(level: Tensor) -> Tensor:
    """uint8 [n_rows, n_cols] of whole numbers [n_cols, n_rows] within 0 and 255."""
    return level.T.to(torch.uint8)


def _signed_bytes(s: Tensor) -> Tensor:
    """uint8 [n_rows, n] of whole numbers [n, n_rows] within -128 and 127."""
    return s.T.to(torch.int8).contiguous().view(torch.uint8)


def _in_fours(q: Tensor) -> Tensor:
    """Two bits each of uint8 [n_rows, 256]: [n_rows, 64]; a byte has columns 32 apart."""
    parts = (q & 3).view(-1, 2, 4, 32)
    out = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    return out.reshape(-1, 64)


def _in_twos(q: Tensor, apart: int) -> Tensor:
    """Four bits each of uint8 [n_rows, n]: [n_rows, n / 2]; a byte has columns `apart` from each other."""
    parts = (q & 15).view(len(q), -1, 2, apart)
    return (parts[:, :, 0] | parts[:, :, 1] << 4).reshape(len(q), -1)


def _in_eights(bit: Tensor) -> Tensor:
    """A bit each of uint8 [n_rows, 256]: [n_rows, 32]; a byte has columns 32 apart."""
    parts = bit.view(-1, 8, 32)
    out = parts[:, 0]
    for i in range(1, 8):
        out = out | parts[:, i] << i
    return out


def q2_k(level: Tensor, a: Scales) -> Tensor:
    scales = _bytes(a.s) | _bytes(a.m) << 4
    return torch.cat([scales, _in_fours(_bytes(level)), half_bytes(a.d), half_bytes(a.dm)], 1)


def q3_k(level: Tensor, a: Scales) -> Tensor:
    q, s = _bytes(level + 4), _bytes(a.s + 32)
    low, high = s & 15, s >> 4
    top = high.view(-1, 4, 4)
    top = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    scales = [low[:, :8] | low[:, 8:] << 4, top]
    return torch.cat([_in_eights(q >> 2), _in_fours(q), *scales, half_bytes(a.d)], 1)


def _head(a: Scales) -> list[Tensor]:
    s, m = _bytes(a.s), _bytes(a.m)
    packed = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]
    return [half_bytes(a.d), half_bytes(a.dm), *packed]


def q4_k(level: Tensor, a: Scales) -> Tensor:
    return torch.cat([*_head(a), _in_twos(_bytes(level), 32)], 1)


def q5_k(level: Tensor, a: Scales) -> Tensor:
    q = _bytes(level)
    return torch.cat([*_head(a), _in_eights(q >> 4), _in_twos(q, 32)], 1)


def q6_k(level: Tensor, a: Scales) -> Tensor:
    q = _bytes(level + 32)
    low = _in_twos(q, 64)
    return torch.cat([low, _in_fours(q >> 4), _signed_bytes(a.s), half_bytes(a.d)], 1)


def iq4_xs(level: Tensor, a: Scales) -> Tensor:
    s = _bytes(a.s + 32)
    high, low = s >> 4, s & 15
    tops = high.view(-1, 2, 4)
    tops = tops[:, :, 0] | tops[:, :, 1] << 2 | tops[:, :, 2] << 4 | tops[:, :, 3] << 6
    pairs = low.view(-1, 4, 2)
    return torch.cat([half_bytes(a.d), tops, pairs[:, :, 0] | pairs[:, :, 1] << 4, _in_twos(_bytes(level), 16)], 1)


def _fifth_bits(q: Tensor) -> Tensor:
    """Bit 4 of uint8 [n_rows, 32]: [n_rows, 4], a bit a column."""
    bits = (q >> 4 & 1).view(-1, 4, 8)
    out = bits[:, :, 0]
    for i in range(1, 8):
        out = out | bits[:, :, i] << i
    return out


def q4_0(level: Tensor, scale: Tensor, _minimum: Tensor) -> Tensor:
    return torch.cat([half_bytes(scale), _in_twos(_bytes(level + 8), 16)], 1)


def q5_0(level: Tensor, scale: Tensor, _minimum: Tensor) -> Tensor:
    q = _bytes(level + 16)
    return torch.cat([half_bytes(scale), _fifth_bits(q), _in_twos(q, 16)], 1)


def q4_1(level: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The file has the lowest value, of which the minimum is the negative."""
    return torch.cat([half_bytes(scale), half_bytes(-minimum), _in_twos(_bytes(level), 16)], 1)


def q5_1(level: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    q = _bytes(level)
    return torch.cat([half_bytes(scale), half_bytes(-minimum), _fifth_bits(q), _in_twos(q, 16)], 1)


def q8_0(level: Tensor, scale: Tensor, _minimum: Tensor) -> Tensor:
    return torch.cat([half_bytes(scale), _signed_bytes(level)], 1)


def iq4_nl(level: Tensor, scale: Tensor, _minimum: Tensor) -> Tensor:
    return torch.cat([half_bytes(scale), _in_twos(_bytes(level), 16)], 1)

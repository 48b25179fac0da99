"""What ggml makes of a block's current weights, on the CPU: where the searches under U begin."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import kernels
from ...base.errors import WeightError
from ...base.workers import default_threads, share_out
from ...gguf.types import qtype
from ...kernels import F32, U8
from .halves import halves_at

#: rows of a block that a thread quantizes at a time
_ROWS = 512
I16 = npt.NDArray[np.int16]


class Stock(NamedTuple):
    """ggml's blocks of some columns."""

    blocks: U8
    """[n_rows, block_bytes]"""
    refused: Tensor
    """bool [n_rows], on the columns' device: rows that the type does not take, whose blocks are zeros"""


def stock(x: Tensor, type_: str, importance: F32) -> Stock:
    """ggml's blocks of columns x [n_cols, n_rows]."""
    rows = x.T.contiguous().cpu().numpy()
    out = np.zeros((len(rows), qtype(type_).row_bytes(rows.shape[1])), np.uint8)
    refused = np.zeros(len(rows), np.bool_)

    def make(at: int, n: int = _ROWS) -> None:
        some = slice(at, at + n)
        try:
            kernels.quantize(rows[some], type_, importance, out=out[some])
        except WeightError:
            if n == 1:
                out[some], refused[some] = 0, True
                return
            for i in range(at, min(at + n, len(rows))):
                make(i, 1)

    if len(rows) <= _ROWS:
        make(0)
    else:
        share_out(iter(range(0, len(rows), _ROWS)), default_threads(), lambda: make)
    return Stock(out, torch.from_numpy(refused).to(x.device))


def _floats(*values: npt.NDArray[np.generic]) -> tuple[F32, ...]:
    return tuple(np.ascontiguousarray(v, np.float32) for v in values)


def q2_k(blocks: U8) -> tuple[F32, ...]:
    """d, dm [n], s, m [16, n]."""
    both = blocks[:, :16].T
    return _floats(halves_at(blocks, 80), halves_at(blocks, 82), both & 15, both >> 4)


def q3_k(blocks: U8) -> tuple[F32, ...]:
    packed, high = blocks[:, 96:108], blocks[:, 104:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    top = np.concatenate([high >> (2 * i) & 3 for i in range(4)], 1)
    s = (low | top << 4).astype(np.int16).T - 32
    d = halves_at(blocks, 108)
    return _floats(d, 0 * d, s, 0 * s)


def _k45(blocks: U8) -> tuple[F32, ...]:
    packed = blocks[:, 4:16]
    s = np.concatenate([packed[:, :4] & 63, (packed[:, 8:] & 15) | packed[:, :4] >> 6 << 4], 1)
    m = np.concatenate([packed[:, 4:8] & 63, packed[:, 8:] >> 4 | packed[:, 4:8] >> 6 << 4], 1)
    return _floats(halves_at(blocks, 0), halves_at(blocks, 2), s.T, m.T)


q4_k = q5_k = _k45


def q6_k(blocks: U8) -> tuple[F32, ...]:
    d, s = halves_at(blocks, 208), blocks[:, 192:208].view(np.int8).T.astype(np.float32)
    return _floats(d, 0 * d, s, 0 * s)


def iq4_xs(blocks: U8) -> tuple[F32, ...]:
    d = halves_at(blocks, 0)
    high = blocks[:, 2].astype(np.int16) | blocks[:, 3].astype(np.int16) << 8
    low = blocks[:, 4:8]
    s = np.stack([(low[:, j // 2] >> (4 * (j % 2)) & 15) | (high >> (2 * j) & 3) << 4 for j in range(8)]) - 32
    return _floats(d, 0 * d, s, 0 * s)


@cache
def _iq4() -> tuple[F32, F32]:
    """The 16 levels, and from which value on the next is nearest."""
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([1.0], np.float16).view(np.uint8)
    block[0, 2:] = np.arange(16) * 17
    levels = kernels.dequantize(block, "IQ4_NL", 32)[0, :16].copy()
    return levels, (levels[1:] + levels[:-1]) / 2


def iq4_levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """[16] and [15], on a device."""
    levels, thresholds = _iq4()
    return torch.from_numpy(levels).to(device), torch.from_numpy(thresholds).to(device)

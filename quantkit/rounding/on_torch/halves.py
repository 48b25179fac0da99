"""Numbers of blocks as bytes, rows side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: the largest finite float16
MOST_HALF = 65504.0


def half(x: Tensor) -> Tensor:
    """float32 of the same shape, rounded to float16, to nearest even."""
    return x.to(torch.float16).to(torch.float32)


def half_bytes(x: Tensor) -> Tensor:
    """uint8 [n, 2] of float32 [n], as float16."""
    return x.to(torch.float16).view(torch.uint8).view(-1, 2)


def word_bytes(x: Tensor, n: int) -> Tensor:
    """The `n` low bytes of integers int64 [...], uint8 [..., n]."""
    return torch.stack([x >> (8 * i) & 255 for i in range(n)], -1).to(torch.uint8)


def halves_at(blocks: npt.NDArray[np.uint8], at: int) -> npt.NDArray[np.float32]:
    """float32 [n] of the float16 at byte `at` of blocks uint8 [n, block_bytes]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0].astype(np.float32)


def steps(x: Tensor) -> Tensor:
    """The nearest whole numbers, to even, of what ggml's nearest_int holds; what is beyond that is at its ends."""
    return torch.round(torch.nan_to_num(x, nan=0.0).clamp(-4194304.0, 4194303.0))


def quotient(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where b is."""
    return torch.where(b == 0, 0.0, a / b)

"""What a block of columns needs, and what it became."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ...kernels import F32


class Block(NamedTuple):
    """Some columns of a factor: the same for all rows."""

    u: Tensor
    """[n, n]: U of these columns; what is below the diagonal is 0"""
    reciprocal: Tensor
    """[n]: 1 / U_jj"""
    importance: F32
    """[n]: on the CPU"""
    mean_square: Tensor
    """[n_rows]: of the whole rows' weights as they were at first"""


class Made(NamedTuple):
    """What columns of some rows became."""

    blocks: Tensor
    """uint8 [n_rows, block_bytes]"""
    e: Tensor
    """[n, n_rows]: what is passed on to later columns"""


class Kind(Protocol):
    """A type of blocks, with how its blocks are made."""

    @property
    def columns(self) -> int:
        """of a block"""

    def quantize(self, x: Tensor, block: Block, search: bool) -> Made:
        """Blocks of columns x [columns, n_rows], which may be overwritten. A row that the type does not take
        has NaN among its errors."""

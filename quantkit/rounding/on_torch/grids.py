"""The points of the IQ types' grids, in the order in which native/ numbers them: by the levels of their first half,
then of the second. They are read from ggml, through blocks that hold each point once."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ... import kernels
from ...kernels import F32

I64 = npt.NDArray[np.int64]


class Grid(NamedTuple):
    """Points of a grid."""

    levels: I64
    """[n_points, n]: number of each coordinate's size"""
    sizes: F32
    """the sizes"""
    number: I64
    """[n_points]: ggml's of each"""

    @property
    def points(self) -> F32:
        """[n_points, n]"""
        return self.sizes[self.levels]


def _values(type_: str, blocks: npt.NDArray[np.uint8], n: int) -> F32:
    return kernels.dequantize(blocks, type_, 256).reshape(-1, n)


def _put(blocks: npt.NDArray[np.uint8], at: int, half: float) -> None:
    blocks[:, at : at + 2] = np.array([half], np.float16).view(np.uint8)


def _bits_of_index(index: I64, blocks: npt.NDArray[np.uint8], shape: tuple[int, int], low: int, high: int) -> None:
    """An index of each group of 8 columns: its low byte in blocks from `low` on, the bits above it four (or, for 4
    columns, eight) to a byte from `high` on. `shape`: indices and bits of a byte of these."""
    n, bits = shape
    index = index.reshape(len(blocks), -1)
    blocks[:, low : low + index.shape[1]] = index & 255
    top = (index >> 8).reshape(len(blocks), -1, n)
    blocks[:, high : high + top.shape[1]] = sum(top[:, :, i] << (bits * i) for i in range(n))


def _ordered(values: F32, base: int, split: int) -> Grid:
    """`base` sizes; halves of `split` coordinates."""
    sizes = np.unique(values)
    assert len(sizes) == base
    levels = np.searchsorted(sizes, values)
    place = base ** np.arange(split)
    order = np.lexsort((levels[:, split:] @ place, levels[:, :split] @ place))
    return Grid(levels[order], sizes.astype(np.float32), order)


@cache
def iq1() -> Grid:
    """2048 points of eight of -1, 0, 1."""
    index = np.arange(2048)
    blocks = np.zeros((64, 50), np.uint8)
    _put(blocks, 0, 1.0)
    blocks[:, 2:34] = (index & 255).reshape(64, 32)
    word = sum((index >> 8).reshape(64, 8, 4)[:, :, i] << (3 * i) for i in range(4))
    blocks[:, 34:] = np.asarray(word, np.uint16).view(np.uint8)
    return _ordered(_values("IQ1_S", blocks, 8) - np.float32(0.125), 3, 4)


@cache
def iq2_xxs() -> Grid:
    """256 points of eight of three sizes."""
    blocks = np.zeros((8, 66), np.uint8)
    _put(blocks, 0, 8.0)
    blocks[:, 2:].reshape(8, 8, 8)[:, :, :4] = np.arange(256).reshape(8, 8, 4)
    return _ordered(_values("IQ2_XXS", blocks, 8), 3, 4)


@cache
def iq2_xs() -> Grid:
    """512 points of eight of three sizes."""
    blocks = np.zeros((16, 74), np.uint8)
    _put(blocks, 0, 8.0)
    blocks[:, 2:66] = np.arange(512, dtype=np.uint16).reshape(16, 32).view(np.uint8)
    return _ordered(_values("IQ2_XS", blocks, 8), 3, 4)


@cache
def iq2_s() -> Grid:
    """1024 points of eight of three sizes."""
    blocks = np.zeros((32, 82), np.uint8)
    _put(blocks, 0, 8.0)
    _bits_of_index(np.arange(1024), blocks, (4, 2), 2, 66)
    return _ordered(_values("IQ2_S", blocks, 8), 3, 4)


@cache
def iq3_xxs() -> Grid:
    """256 points of four of eight sizes."""
    blocks = np.zeros((4, 98), np.uint8)
    _put(blocks, 0, 4.0)
    blocks[:, 2:66] = np.arange(256).reshape(4, 64)
    return _ordered(_values("IQ3_XXS", blocks, 4), 8, 2)


@cache
def iq3_s() -> Grid:
    """512 points of four of eight sizes."""
    blocks = np.zeros((8, 110), np.uint8)
    _put(blocks, 0, 1.0)
    _bits_of_index(np.arange(512), blocks, (8, 1), 2, 66)
    return _ordered(_values("IQ3_S", blocks, 4), 8, 2)

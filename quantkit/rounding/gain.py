"""The gain of each row, put into its blocks' scales: least-squares codes shrink the output, and this undoes that."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..base.errors import KernelError
from ..gguf.types import QType
from ..kernels import F32, U8, dequantize, feedback_products
from .factor import Factor

#: of a block, where its half-precision scales and minima are, to which its values are proportional
_HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
#: IQ1_M has the four nibbles of its scale on top of four words
_IQ1_M_WORDS = 48
_LEAST, _MOST = 0.7, 1.6


def row_gains(rows: F32, values: F32, factor: Factor, kernel: str | None = None) -> npt.NDArray[np.float64]:
    """[n_rows]: w H w^T / w H q^T, within 0.7 and 1.6, of the weights w and the values q [n_rows, n_cols]; 1 where
    they have none."""
    return gains_of(feedback_products(rows, values, factor.h, kernel))


def gains_of(products: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The same, of w H w^T and w H q^T [n_rows, 2]."""
    ok = np.isfinite(products).all(axis=1) & (products > 0).all(axis=1)
    gains = np.divide(products[:, 0], products[:, 1], out=np.ones(len(products)), where=ok)
    return np.clip(gains, _LEAST, _MOST)


def apply_gain(blocks: U8, rows: F32, qt: QType, factor: Factor, kernel: str | None = None) -> None:
    """Scale each row's blocks by its gain, in place. A scale that would become infinite stays as it is."""
    for row in range(0, len(blocks), 256):
        some = slice(row, row + 256)
        values = dequantize(blocks[some], qt.name, rows.shape[1])
        scale_rows(blocks[some], row_gains(rows[some], values, factor, kernel), qt)


def scale_rows(blocks: U8, gains: npt.NDArray[np.float64], qt: QType) -> None:
    """The same by gains [n_rows] that are known."""
    if qt.name not in _HALVES and qt.name != "IQ1_M":
        raise KernelError(f"{qt.name} has no scale that takes a gain")
    by = gains.astype(np.float32)[:, None]
    parts = blocks.reshape(len(blocks), -1, qt.block_bytes)
    for offset in _HALVES.get(qt.name, ()):
        half = parts[:, :, offset : offset + 2].copy().view(np.uint16)[..., 0]
        parts[:, :, offset : offset + 2] = _scaled(half, by)[..., None].view(np.uint8)
    if qt.name == "IQ1_M":
        words = parts[:, :, _IQ1_M_WORDS:].copy().view(np.uint16)
        nibbles = words >> 12
        half = nibbles[..., 0] | nibbles[..., 1] << 4 | nibbles[..., 2] << 8 | nibbles[..., 3] << 12
        made = _scaled(half, by)
        for i in range(4):
            words[..., i] = (words[..., i] & 0x0FFF) | (made >> (4 * i) & 15) << 12
        parts[:, :, _IQ1_M_WORDS:] = words.view(np.uint8)


def _scaled(half: npt.NDArray[np.uint16], gains: F32) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        made = (half.view(np.float16).astype(np.float32) * gains).astype(np.float16)
    return np.where(np.isfinite(made), made.view(np.uint16), half)

"""Stored floats, including FP8, to float32; and finding the first value that is not finite."""

from __future__ import annotations

import numpy as np

from .. import _native
from ..base.errors import KernelError
from .arrays import F32, U8, describe, require

_FLOATS = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


def first_nonfinite(rows: F32) -> tuple[int, int] | None:
    """Return (row, column) of the first NaN or Inf in float32 [n_rows, n_cols], or None."""
    at = _native.first_nonfinite(rows.reshape(-1))
    return None if at == rows.size else divmod(at, rows.shape[1])


def e4m3_to_f32(src: U8, scale: F32, row0: int, block: tuple[int, int], out: F32, round_bf16: bool) -> None:
    """Decode block-scaled FP8 (E4M3) to float32: out = float32(src) * scale of its block.

    src: uint8 [n_rows, n_cols], rows row0… of the matrix; scale: float32 [ceil(rows/block[0]),
    ceil(n_cols/block[1])] of the whole matrix; out: float32 [n_rows, n_cols]. With `round_bf16`
    each product is rounded to the nearest bfloat16, ties to even, as in a BF16 file.
    """
    if src.ndim != 2 or scale.ndim != 2 or min(row0, block[0] - 1, block[1] - 1) < 0:
        raise KernelError(
            f"src and scale must be matrices, row0 and block counts, not {describe(src)}, {describe(scale)}, {row0}, "
            f"{block}"
        )
    n_rows, n_cols = src.shape
    need = (-(-(row0 + n_rows) // block[0]), -(-n_cols // block[1]))
    if need[1] != scale.shape[1] or need[0] > scale.shape[0]:
        raise KernelError(f"rows up to {row0 + n_rows} of {n_cols} need {need} scales, there are {scale.shape}")
    require("src", src, np.uint8, src.shape)
    require("scale", scale, np.float32, scale.shape)
    require("out", out, np.float32, src.shape)
    _native.e4m3_to_f32(src, scale, row0, block[0], block[1], round_bf16, out)


def float_to_f32(src: U8, dtype: str, out: F32, round_bf16: bool) -> None:
    """Decode stored F32, F16 or BF16 values (bytes [n_rows, row_bytes]) to float32 `out` [n_rows, n_cols],
    rounded to bfloat16 if asked."""
    if dtype not in _FLOATS:
        raise KernelError(f"{dtype} is not a float type")
    if out.ndim != 2:
        raise KernelError(f"out must be a matrix, not {describe(out)}")
    require("out", out, np.float32, out.shape)
    require("src", src, np.uint8, (out.shape[0], out.shape[1] * np.dtype(_FLOATS[dtype]).itemsize))
    flat, stored = out.reshape(-1), src.reshape(-1).view(_FLOATS[dtype])
    if dtype == "BF16":
        _native.bf16_to_f32(stored, flat)
    elif dtype == "F16":
        _native.f16_to_f32(stored, round_bf16, flat)
    else:
        _native.f32_to_f32(stored, round_bf16, flat)

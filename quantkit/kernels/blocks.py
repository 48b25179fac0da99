"""float32 rows to ggml blocks and back, exactly as ggml does it."""

from __future__ import annotations

import numpy as np

from .. import _native
from ..base.errors import KernelError
from ..gguf.types import INTEGER_TYPES, qtype
from . import own
from .arrays import F32, U8, describe, require
from .choose import select
from .ggml import library
from .limits import first_unfit, invalid_blocks, require_fit, require_importance


def quantize(
    rows: F32, qtype_name: str, imatrix: F32 | None = None, kernel: str | None = None, out: U8 | None = None
) -> U8:
    """Quantize rows to ggml blocks, exactly as llama-quantize does.

    rows: float32 [n_rows, n_cols], C order, all finite; n_cols a multiple of the type's block.
    imatrix: float32 [n_cols], the mean squared activation of each column, finite and not negative.
    kernel: force one by name (see `select`).
    out: uint8 [n_rows, row_bytes] to write to; None for a new array. Returned.

    Raises KernelError for wrong shapes or an unknown type, UnfitWeightError (a WeightError) for NaN, Inf and values
    that become Inf in a float type, WeightError if ggml finds the resulting blocks invalid, or would abort the
    process (weights out of the type's range).
    """
    qt = qtype(qtype_name)
    if qt.name in INTEGER_TYPES:
        raise KernelError(f"{qt.name} is not a type to quantize to")
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous or rows.shape[1] == 0:
        raise KernelError(f"rows must be C-ordered float32 [n_rows, n_cols], not {describe(rows)}")
    n_rows, n_cols = rows.shape
    row_bytes = qt.row_bytes(n_cols)
    if imatrix is not None:
        require("the imatrix", imatrix, np.float32, (n_cols,))
    require_importance(imatrix, qt)
    if out is None:
        out = np.empty((n_rows, row_bytes), np.uint8)
    require("out", out, np.uint8, (n_rows, row_bytes))
    require_fit(rows, qt, imatrix)
    chosen = select(qt, kernel)
    ggml = library(chosen)
    if chosen in own.OWN:
        own.prepare(qt)
        _native.quantize(chosen, qt.name, rows, imatrix if qt.uses_imatrix else None, out)
    else:
        weights = imatrix.ctypes.data if imatrix is not None else None
        written = ggml.quantize_chunk(qt.id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, weights)
        if written != out.nbytes:
            raise KernelError(f"ggml wrote {written} bytes of {qt.name} where {out.nbytes} were due")
    if not ggml.validate(qt.id, out.ctypes.data, out.nbytes):
        raise first_unfit(rows, qt) or invalid_blocks(qt)
    return out


def dequantize(blocks: U8, qtype_name: str, n_cols: int, out: F32 | None = None) -> F32:
    """Decode ggml blocks uint8 [n_rows, row_bytes] to float32 [n_rows, n_cols], with ggml's own function."""
    qt = qtype(qtype_name)
    n_rows = blocks.shape[0] if blocks.ndim == 2 else -1
    require("blocks", blocks, np.uint8, (n_rows, qt.row_bytes(n_cols)))
    if out is None:
        out = np.empty((n_rows, n_cols), np.float32)
    require("out", out, np.float32, (n_rows, n_cols))
    to_float = library("ggml").traits(qt.id).contents.to_float
    if not to_float:
        raise KernelError(f"ggml cannot dequantize {qt.name}")
    to_float(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def is_valid(blocks: U8, qtype_name: str) -> bool:
    """Whether ggml accepts these blocks, uint8 [n_rows, row_bytes]: no scale is NaN or Inf."""
    return bool(library("ggml").validate(qtype(qtype_name).id, blocks.ctypes.data, blocks.nbytes))

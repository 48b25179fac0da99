"""Quantizing rows as a source stores them, in one pass: a few rows at a time become float32 in the nearest cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _native
from ..base.errors import InternalCheckError, KernelError
from ..gguf.types import qtype
from . import own
from .arrays import F32, U8
from .blocks import is_valid
from .choose import select
from .floats import e4m3_to_f32, float_to_f32
from .limits import OVERFLOW, first_unfit, invalid_blocks, limits_of, require_fit, require_importance

#: dtypes that quantize_stored can read
FUSED = frozenset({"F8_E4M3", "BF16", "F16", "F32"})


class StoredRows(NamedTuple):
    """Rows as a source stores them, uint8 [n_rows, row_bytes]. They may be interleaved from k runs
    of consecutive rows of the source's matrix (row i is number i // k of run i % k): `stored` then holds the
    runs one after the other, and `first_rows`, uint64 [k], the first row of each in the matrix."""

    stored: U8
    dtype: str
    """one of FUSED"""
    n_cols: int
    first_rows: npt.NDArray[np.uint64]
    scale: F32 | None
    """FP8 scales of the whole matrix, one for each `block`"""
    block: tuple[int, int]
    round_bf16: bool
    """round each value to bfloat16 first, as in a BF16 file"""

    def decode(self) -> F32:
        """Return the rows as float32 [n_rows, n_cols], interleaved."""
        n_runs = len(self.first_rows)
        out = np.empty((len(self.stored), self.n_cols), np.float32)
        at = 0
        for i, first in enumerate(self.first_rows):
            run = np.empty((len(out[i::n_runs]), self.n_cols), np.float32)
            stored = self.stored[at : at + len(run)]
            if self.scale is not None:
                e4m3_to_f32(stored, self.scale, int(first), self.block, run, self.round_bf16)
            else:
                float_to_f32(stored, self.dtype, run, self.round_bf16)
            out[i::n_runs] = run
            at += len(run)
        return out


def can_quantize_stored(dtype: str, qtype_name: str) -> bool:
    """Whether `quantize_stored` can quantize rows of this dtype to this type: quantkit has its own kernel for them,
    and that kernel is chosen."""
    try:
        return dtype in FUSED and select(qtype(qtype_name)) in own.OWN
    except KernelError:
        return False


def quantize_stored(rows: StoredRows, qtype_name: str, imatrix: F32 | None, out: U8) -> None:
    """Quantize stored rows in one pass, a few rows at a time: the result is that of decoding them to float32 and
    calling `quantize`, without holding the float32. `imatrix`, `out` and the errors for unfit weights are as for
    `quantize`; after an error `out` is incomplete. Raises KernelError if `can_quantize_stored` is False."""
    qt = qtype(qtype_name)
    if not can_quantize_stored(rows.dtype, qt.name):
        raise KernelError(f"no kernel takes stored {rows.dtype} to {qt.name} in one pass; decode the rows first")
    require_importance(imatrix, qt)
    own.prepare(qt)
    fit = _native.quantize_rows(
        select(qt), qt.name, rows.dtype, rows.stored, rows.n_cols, rows.round_bf16, rows.first_rows, rows.scale,
        *rows.block, imatrix if qt.uses_imatrix else None, *limits_of(qt), out,
    )  # fmt: skip
    if not fit:
        values = rows.decode()
        require_fit(values, qt, imatrix)
        raise first_unfit(values, qt) or InternalCheckError(f"rows refused as {qt.name}, but every weight is fit")
    if qt.name not in OVERFLOW and not is_valid(out, qt.name):
        raise invalid_blocks(qt)

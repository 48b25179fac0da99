"""Rows as a source stores them, to blocks in one pass: a few rows at a time become float32, in the nearest cache."""

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

#: what quantize_stored can start from
FUSED = frozenset({"F8_E4M3", "BF16", "F16", "F32"})


class StoredRows(NamedTuple):
    """Rows as a source stores them, uint8 [n_rows, row_bytes]. They may have been dealt in turn from k runs
    of consecutive rows of the source's matrix (row i is number i // k of run i % k): `stored` holds the
    runs one after the other, and `first_rows`, uint64 [k], their first rows in the matrix."""

    stored: U8
    dtype: str
    """one of FUSED"""
    n_cols: int
    first_rows: npt.NDArray[np.uint64]
    scale: F32 | None
    """FP8's, of the whole matrix, one for each `block`"""
    block: tuple[int, int]
    round_bf16: bool
    """round each value to bfloat16 first, as on the way through a BF16 file"""

    def decode(self) -> F32:
        """The rows as float32 [n_rows, n_cols], in the order in which they were dealt."""
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
    """Whether `quantize_stored` takes rows of that dtype to that type: whether quantkit has a kernel of its own for it,
    and that one is chosen."""
    try:
        return dtype in FUSED and select(qtype(qtype_name)) in own.OWN
    except KernelError:
        return False


def quantize_stored(rows: StoredRows, qtype_name: str, imatrix: F32 | None, out: U8) -> None:
    """Quantize stored rows in one pass, a few rows at a time: what decoding them to float32 and `quantize`
    give, without the float32 in between. `imatrix` and `out` are those of `quantize`, and so is what is raised for
    weights that are not fit; `out` is then unfinished. Raises KernelError where `can_quantize_stored` is False."""
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

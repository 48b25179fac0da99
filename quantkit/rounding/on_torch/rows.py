"""Rows to blocks under a factored covariance, on the factor's device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...base.errors import KernelError
from ...gguf.types import QType, qtype
from ...kernels import F32, U8, is_valid, require_fit
from ..options import Method, Options
from . import blocks32, iq1, iq23, super_blocks
from .block import Block, Kind
from .factor import DeviceFactor, as_columns, require_blocks

#: the types that have a way here
KINDS: Mapping[str, Kind] = {**super_blocks.TYPES, **blocks32.TYPES, **iq1.TYPES, **iq23.TYPES}
#: columns whose errors go on to all after them in one product
_SLAB = 256


def supported(qtype_name: str) -> bool:
    """Whether rows can be rounded to the type here; others are the CPU's."""
    return qtype_name in KINDS


class Blocks(NamedTuple):
    """What rows became."""

    blocks: U8
    """[n_rows, row_bytes]"""
    good: npt.NDArray[np.bool_]
    """[n_rows]: where errors stayed finite and the type takes the scales; other rows' bytes are of no use"""


def quantize(rows: F32, qtype_name: str, factor: DeviceFactor, options: Options) -> Blocks:
    """Quantize rows float32 [n_rows, n_cols], all finite, so that x (w - q)^T is small for inputs x of the covariance.

    Without the gain, which the caller puts in. Takes up to 400 bytes of the device for each weight of 256 columns of
    the rows, and four for each weight. Raises KernelError for wrong shapes and for a type or method that is not here,
    WeightError for weights out of the type's range.
    """
    qt = qtype(qtype_name)
    kind = KINDS.get(qt.name)
    if kind is None or options.method is not Method.FEEDBACK:
        raise KernelError(f"torch has no {options.method.value} for {qt.name}; the CPU's kernels have")
    require_blocks(rows.shape[1], factor)
    if options.damp != factor.damp:
        raise KernelError(f"the covariance was factored with a damping of {factor.damp:g}, not {options.damp:g}")
    require_fit(rows, qt, factor.importance)
    n_rows, n_cols = rows.shape
    out = torch.empty((n_rows, qt.row_bytes(n_cols)), dtype=torch.uint8, device=factor.device)
    if not n_rows:
        return Blocks(out.cpu().numpy(), np.empty(0, np.bool_))
    with torch.inference_mode(), exact_products():
        x = as_columns(rows, factor.device)
        bad = torch.zeros(n_rows, dtype=torch.bool, device=factor.device)
        mean_square = (x * x).mean(0)
        reciprocal = 1.0 / factor.u.diagonal()
        for slab in range(0, n_cols, _SLAB):
            end = min(slab + _SLAB, n_cols)
            errors = torch.empty((end - slab, n_rows), dtype=x.dtype, device=x.device)
            for at in range(slab, end, kind.columns):
                here, later = slice(at, at + kind.columns), slice(at + kind.columns, end)
                columns = x[here]
                bad |= ~(columns.abs() < 1e18).all(0)
                columns.masked_fill_(bad, 0.0)  # no other row is to suffer
                block = Block(factor.u[here, here], reciprocal[here], factor.importance[here], mean_square)
                made = kind.quantize(columns, block, options.search)
                out[:, _place(qt, at)] = made.blocks
                errors[at - slab : at - slab + kind.columns] = made.e
                bad |= ~made.e.isfinite().all(0)
                if later.start < end:
                    x[later].addmm_(factor.u[here, later].T, made.e, alpha=-1)
            errors.masked_fill_(bad, 0.0)
            if end < n_cols:
                x[end:].addmm_(factor.u[slab:end, end:].T, errors, alpha=-1)
        blocks, good = out.cpu().numpy(), ~bad.cpu().numpy()
    if not is_valid(blocks, qt.name):
        good &= np.array([is_valid(row[None], qt.name) for row in blocks])
    return Blocks(blocks, good)


def _place(qt: QType, column: int) -> slice:
    at = column // qt.block * qt.block_bytes
    return slice(at, at + qt.block_bytes)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 in float32, not in TF32, while it lasts."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)

"""Rows rounded by a plan's choice on a device, beside ggml's: what quantkit.rounding.rounder does."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import kernels
from ...base.errors import WeightError
from ...gguf.types import qtype
from ...kernels import F32, U8
from ..covariance import CovarianceSource
from ..gain import gains_of, scale_rows
from ..options import Method, Options
from ..policy import Choice
from ..rounder import KEPT_BYTES, Factors, Rounder, options_of
from . import rows as device_rows
from .factor import DeviceFactor, as_columns, factor, products


class DeviceRounder(Rounder):
    """Rounds rows of matrices on a device, one call at a time, so that the device's memory is known. What has no way
    there (`coarse`), and rows whose errors grow there beyond float32, are rounded on the CPU."""

    def __init__(self, source: CovarianceSource, device: torch.device, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(source, kept_bytes)

        def with_judge(made: DeviceFactor, judge: F32) -> tuple[DeviceFactor, Tensor]:
            # its own second moment is there already
            return made, made.h if judge is made.given else torch.from_numpy(judge).to(device)

        self._there: Factors[DeviceFactor, Tensor] = Factors(
            source, kept_bytes, lambda h, damp: factor(h, device, damp), with_judge
        )
        self._one_at_a_time = threading.Lock()

    def improve(self, rows: F32, blocks: U8, type_: str, matrix: tuple[str, int], choice: Choice) -> int:
        """See Rounder."""
        options = options_of(choice)
        if options.method is not Method.FEEDBACK or not device_rows.supported(type_):
            return super().improve(rows, blocks, type_, matrix, choice)
        with self._one_at_a_time:
            made, judge = self._there.of(matrix, rows.shape[1], choice.damp)
            try:
                n_better, bad = improved(rows, blocks, type_, made, judge, options)
            except WeightError:
                n_better, bad = 0, np.arange(len(rows))
        if not len(bad):
            return n_better
        some = blocks[bad]
        n_more = super().improve(np.ascontiguousarray(rows[bad]), some, type_, matrix, choice)
        blocks[bad] = some
        return n_better + n_more


def improved(
    rows: F32, blocks: U8, type_: str, made: DeviceFactor, judge: Tensor, options: Options
) -> tuple[int, npt.NDArray[np.intp]]:
    """Put better blocks, under `judge` [n_cols, n_cols], in the place of ggml's; how many rows those are, and the
    numbers of rows that could not be rounded. Raises WeightError for rows that the type does not take."""
    n_cols, device = rows.shape[1], made.device
    found = device_rows.quantize(rows, type_, made, options)
    new, good = found.blocks, found.good
    with torch.inference_mode(), device_rows.exact_products():
        w = as_columns(rows, device)

        def values_of(some: U8) -> Tensor:
            return as_columns(kernels.dequantize(some, type_, n_cols), device)

        if options.gain:
            both = torch.stack(products(w, values_of(new), made.h), 1).cpu().numpy()
            scale_rows(new, gains_of(both), qtype(type_))
        ours, theirs = w - values_of(new), w - values_of(blocks)
        # (a - b) H (a + b)^T is a H a^T - b H b^T
        difference = products(ours - theirs, ours + theirs, judge)[1].cpu().numpy()
    better = good & (difference < 0)
    blocks[better] = new[better]
    return int(better.sum()), np.flatnonzero(~good)

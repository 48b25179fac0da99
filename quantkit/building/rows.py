"""Rows of the output, as float32, from the bytes of a source. One reader a thread: it owns its buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..base.errors import UnsupportedError, WeightError
from ..gguf.types import INTEGER_TYPES, QTYPES
from ..model.catalogue import Part, Source, SourceTensor, Tensor

_T = TypeVar("_T", np.float32, np.uint8)
_SCALES_KEPT = 16


def stored_row_bytes(dtype: str, n_cols: int) -> int:
    """Bytes of a row of `n_cols` values as a source stores them (FP8 and ggml types alike)."""
    return n_cols if dtype == "F8_E4M3" else QTYPES[dtype].row_bytes(n_cols)


def _runs(part: Part, row: int, out: npt.NDArray[_T]) -> Iterator[tuple[int, npt.NDArray[_T]]]:
    """The runs of consecutive source rows that rows row… of a part are dealt from, as (first source row,
    the rows of `out` that it fills)."""
    for i in range(min(part.interleave, len(out))):
        yield part.source_row(row + i), out[i :: part.interleave]


class RowReader:
    """Fills float32 rows of output tensors from a source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._bytes = np.empty(0, np.uint8)
        self._values = np.empty(0, np.float32)
        self._scales: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def rows(self, tensor: Tensor, part: Part, row: int, out: npt.NDArray[np.float32]) -> None:
        """Fill float32 `out` [n_rows, n_cols] with rows row… of a part (counted from its first row).

        Values of a quantizable tensor pass through bfloat16, as on the way through a converter's
        BF16 file; a GGUF source's are taken as they are. Raises WeightError when one is NaN or Inf,
        naming the tensor, and its row and column in the source.
        """
        st = self.source.tensor(part.source)
        round_bf16 = tensor.source_type == "BF16" and st.dtype != "BF16"
        if part.transposed:
            rectangle = self._scratch(part.n_rows, part.shape[-1])
            self._decode(st, part.row, rectangle, round_bf16)
            np.copyto(out, rectangle[:, row : row + out.shape[0]].T)
        elif part.interleave > 1:
            for first, every in _runs(part, row, out):
                run = self._scratch(*every.shape)
                self._decode(st, first, run, round_bf16)
                np.copyto(every, run)
        else:
            self._decode(st, part.row + row, out, round_bf16)
        bad = kernels.first_nonfinite(out)
        if bad is not None:
            at = (part.row + bad[1], row + bad[0]) if part.transposed else (part.source_row(row + bad[0]), bad[1])
            raise WeightError(
                f"'{tensor.name}' (from {st.file.name}: '{st.name}'), row {at[0]}, column {at[1]} is {out[bad]}; "
                "llama-quantize refuses such weights too: the checkpoint is damaged, download that shard again"
            )

    def quantize(
        self, tensor: Tensor, part: Part, row: int, qtype: str, imatrix: npt.NDArray[np.float32] | None,
        out: npt.NDArray[np.uint8],
    ) -> bool:  # fmt: skip
        """Quantize rows row… of a part to blocks `out` [n_rows, row_bytes] without their float32 in memory.

        False where that cannot be done, or the rows are not fit to be quantized: `rows` and kernels.quantize
        do it then, or say what is wrong.
        """
        st = self.source.tensor(part.source)
        if part.transposed or st.dtype not in kernels.FUSED:
            return False
        n_rows, row_bytes = len(out), stored_row_bytes(st.dtype, tensor.n_cols)
        stored = self._stored(n_rows, row_bytes)
        first_rows, at = [], 0
        for first, every in _runs(part, row, out):
            self.source.read(st, first * row_bytes, stored[at : at + len(every)])
            first_rows.append(first)
            at += len(every)
        rows = kernels.StoredRows(
            stored, st.dtype, tensor.n_cols, np.array(first_rows, np.uint64),
            self._scale(st.name) if st.dtype == "F8_E4M3" else None, self.source.block,
            tensor.source_type == "BF16" and st.dtype != "BF16",
        )  # fmt: skip
        return kernels.quantize_stored(rows, qtype, imatrix, out)

    def will_need(self, tensor: Tensor, part: Part, row: int, n_rows: int) -> int:
        """Tell the system that rows row… of a part are read soon; how many stored bytes that is."""
        st = self.source.tensor(part.source)
        if part.transposed:  # every row of the output is a column: the rectangle is read as a whole
            row_bytes = stored_row_bytes(st.dtype, part.shape[-1])
            if row == 0:
                self.source.will_need(st, part.row * row_bytes, part.n_rows * row_bytes)
            return part.n_rows * row_bytes
        row_bytes = stored_row_bytes(st.dtype, tensor.n_cols)
        for i in range(min(part.interleave, n_rows)):
            n = len(range(i, n_rows, part.interleave))
            self.source.will_need(st, part.source_row(row + i) * row_bytes, n * row_bytes)
        return n_rows * row_bytes

    def raw(self, part: Part, row: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill uint8 `out` [n_rows, row_bytes] with the same rows as they are stored."""
        st = self.source.tensor(part.source)
        for first, every in _runs(part, row, out):
            run = every if part.interleave == 1 else np.empty(every.shape, np.uint8)
            self.source.read(st, first * out.shape[1], run)
            if run is not every:
                np.copyto(every, run)

    def _scratch(self, n_rows: int, n_cols: int) -> npt.NDArray[np.float32]:
        if self._values.size < n_rows * n_cols:
            self._values = np.empty(n_rows * n_cols, np.float32)
        return self._values[: n_rows * n_cols].reshape(n_rows, n_cols)

    def _stored(self, n_rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        if self._bytes.size < n_rows * row_bytes:
            self._bytes = np.empty(n_rows * row_bytes, np.uint8)
        return self._bytes[: n_rows * row_bytes].reshape(n_rows, row_bytes)

    def _decode(self, st: SourceTensor, row: int, out: npt.NDArray[np.float32], round_bf16: bool) -> None:
        n_rows, n_cols = out.shape
        row_bytes = stored_row_bytes(st.dtype, n_cols)
        stored = self._stored(n_rows, row_bytes)
        self.source.read(st, row * row_bytes, stored)
        if st.dtype == "F8_E4M3":
            kernels.e4m3_to_f32(stored, self._scale(st.name), row, self.source.block, out, round_bf16)
        elif QTYPES[st.dtype].is_float:
            kernels.float_to_f32(stored, st.dtype, out, round_bf16)
        elif st.dtype in INTEGER_TYPES:
            raise UnsupportedError(f"{st.file}: '{st.name}' is {st.dtype}; quantkit quantizes floats and ggml blocks")
        else:
            kernels.dequantize(stored, st.dtype, n_cols, out)

    def _scale(self, name: str) -> npt.NDArray[np.float32]:
        scale = self._scales.get(name)
        if scale is None:
            scale = np.ascontiguousarray(self.source.scale(name), np.float32)
            self._scales[name] = scale
            if len(self._scales) > _SCALES_KEPT:
                self._scales.popitem(last=False)
        return scale

"""Rows of the output as float32, from a source's bytes. Each thread needs its own reader, which owns its buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..base.errors import KernelError, UnsupportedError, WeightError
from ..gguf.types import INTEGER_TYPES, QTYPES
from ..model.catalogue import Part, Source, SourceTensor, Tensor

_SCALES_KEPT = 16


def stored_row_bytes(dtype: str, n_cols: int) -> int:
    """Return the bytes of a row of `n_cols` values as stored in a source (FP8 or a ggml type)."""
    return n_cols if dtype == "F8_E4M3" else QTYPES[dtype].row_bytes(n_cols)


def _rounds(tensor: Tensor, st: SourceTensor) -> bool:
    """Whether values are rounded to bfloat16, as in a converter's BF16 file."""
    return tensor.source_type == "BF16" and st.dtype != "BF16"


def _runs(part: Part, row: int, n_rows: int) -> Iterator[tuple[int, slice, int]]:
    """Yield the runs of consecutive source rows that make up rows row… of a part: (first source row, which of the
    n_rows it fills, number of rows)."""
    for i in range(min(part.interleave, n_rows)):
        every = slice(i, None, part.interleave)
        yield part.source_row(row + i), every, len(range(n_rows)[every])


class RowReader:
    """Fills float32 rows of output tensors from a source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._bytes = np.empty(0, np.uint8)
        self._values = np.empty(0, np.float32)
        self._floats = np.empty(0, np.float32)
        self._scales: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def rows(self, tensor: Tensor, part: Part, row: int, out: npt.NDArray[np.float32]) -> None:
        """Fill float32 `out` [n_rows, n_cols] with rows row… of a part (counted from its first row).

        Values of a quantizable tensor are rounded to bfloat16, as in a converter's BF16 file; a GGUF source's
        are taken unchanged. Raises WeightError if one is NaN or Inf, naming the tensor and the row and column
        in the source.
        """
        self._fill(tensor, part, row, out)
        at = kernels.first_nonfinite(out)
        if at is not None:
            raise self._damaged(tensor, part, row, at, float(out[at]))

    def _fill(self, tensor: Tensor, part: Part, row: int, out: npt.NDArray[np.float32]) -> None:
        """Do what `rows` does without checking the values."""
        st = self.source.tensor(part.source)
        round_bf16 = _rounds(tensor, st)
        if part.transposed:
            rectangle = self._scratch(part.n_rows, part.shape[-1])
            self._decode(st, part.row, rectangle, round_bf16)
            np.copyto(out, rectangle[:, row : row + out.shape[0]].T)
        elif part.interleave > 1:
            for first, every, n in _runs(part, row, len(out)):
                run = self._scratch(n, out.shape[1])
                self._decode(st, first, run, round_bf16)
                out[every] = run
        else:
            self._decode(st, part.row + row, out, round_bf16)

    def _damaged(self, tensor: Tensor, part: Part, row: int, at: tuple[int, int], value: float) -> WeightError:
        """Return the error for rows row… of a part whose value at (row, column) is NaN or Inf."""
        st = self.source.tensor(part.source)
        place = (part.row + at[1], row + at[0]) if part.transposed else (part.source_row(row + at[0]), at[1])
        return WeightError(
            f"'{tensor.name}' (from {st.file.name}: '{st.name}'), row {place[0]}, column {place[1]} is {value}; "
            "llama-quantize refuses such weights too: the checkpoint is damaged, download that shard again"
        )

    def quantize(
        self, tensor: Tensor, part: Part, row: int, out_row: int, qtype: str,
        imatrix: npt.NDArray[np.float32] | None, out: npt.NDArray[np.uint8],
    ) -> None:  # fmt: skip
        """Quantize rows row… of a part, which are rows out_row… of the tensor, to blocks `out` [n_rows, row_bytes].
        Where quantkit has its own kernel this is one pass, without the float32 rows in memory.

        Raises WeightError for NaN and Inf as `rows` does, and, naming the rows, for weights that the type cannot hold;
        KernelError if the type has no kernel or the importances are invalid.
        """
        in_one_pass = not part.transposed and kernels.can_quantize_stored(self.source.tensor(part.source).dtype, qtype)
        rows = (self._stored_rows if in_one_pass else self._float_rows)(tensor, part, row, len(out))
        try:
            if isinstance(rows, kernels.StoredRows):
                kernels.quantize_stored(rows, qtype, imatrix, out)
            else:
                kernels.quantize(rows, qtype, imatrix, out=out)
        except (WeightError, KernelError) as e:
            if isinstance(e, kernels.UnfitWeightError) and not np.isfinite(e.value):
                raise self._damaged(tensor, part, row, (e.row, e.column), e.value) from None
            wrong = KernelError if isinstance(e, KernelError) else WeightError
            raise wrong(f"'{tensor.name}', rows {out_row} to {out_row + len(out) - 1}: {e}") from None

    def will_need(self, tensor: Tensor, part: Part, row: int, n_rows: int) -> int:
        """Tell the system that rows row… of a part will be read soon; return their number of stored bytes."""
        st = self.source.tensor(part.source)
        if part.transposed:  # each output row is a source column, so the whole rectangle is read
            row_bytes = stored_row_bytes(st.dtype, part.shape[-1])
            if row == 0:
                self.source.will_need(st, part.row * row_bytes, part.n_rows * row_bytes)
            return part.n_rows * row_bytes
        row_bytes = stored_row_bytes(st.dtype, tensor.n_cols)
        for first, _every, n in _runs(part, row, n_rows):
            self.source.will_need(st, first * row_bytes, n * row_bytes)
        return n_rows * row_bytes

    def raw(self, part: Part, row: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill uint8 `out` [n_rows, row_bytes] with rows row… of a part as they are stored."""
        st = self.source.tensor(part.source)
        for first, every, n in _runs(part, row, len(out)):
            run = out if part.interleave == 1 else np.empty((n, out.shape[1]), np.uint8)
            self.source.read(st, first * out.shape[1], run)
            if run is not out:
                out[every] = run

    def _stored_rows(self, tensor: Tensor, part: Part, row: int, n_rows: int) -> kernels.StoredRows:
        """Return rows row… of a part as they are stored."""
        st = self.source.tensor(part.source)
        row_bytes = stored_row_bytes(st.dtype, tensor.n_cols)
        stored = self._stored(n_rows, row_bytes)
        first_rows, at = [], 0
        for first, _every, n in _runs(part, row, n_rows):
            self.source.read(st, first * row_bytes, stored[at : at + n])
            first_rows.append(first)
            at += n
        return kernels.StoredRows(
            stored, st.dtype, tensor.n_cols, np.array(first_rows, np.uint64),
            self._scale(st.name) if st.dtype == "F8_E4M3" else None, self.source.block, _rounds(tensor, st),
        )  # fmt: skip

    def _float_rows(self, tensor: Tensor, part: Part, row: int, n_rows: int) -> npt.NDArray[np.float32]:
        """Return rows row… of a part as float32, without checking the values."""
        n = n_rows * tensor.n_cols
        if self._floats.size < n:
            self._floats = np.empty(n, np.float32)
        rows = self._floats[:n].reshape(n_rows, tensor.n_cols)
        self._fill(tensor, part, row, rows)
        return rows

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

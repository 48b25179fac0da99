"""Rows of a source as float32, in plain numpy: the values a converter's BF16 file would hold.

FP8 E4M3 x the scale of its block -> float32 -> nearest-even bfloat16 -> float32. The catalogue (Part) maps rows of the
output to rows of the source. Source: conversion/base.py and gguf-py/gguf/quants.py of llama.cpp.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError, UnsupportedError
from ..gguf.types import INTEGER_TYPES, QTYPES
from ..model.catalogue import Part, Source, SourceTensor, Tensor
from .ggml import Ggml

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

_SCALES_KEPT = 8


def e4m3_values() -> F32:
    """The float32 value of each of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; no Inf,
    NaN is S.1111.111 (OCP 8-bit floating point, E4M3)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value[(code & 127) == 127] = np.nan
    return np.where(code & 128, -value, value).astype(np.float32)


_E4M3 = e4m3_values()


def to_bf16(values: F32) -> F32:
    """Round to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    out: F32 = np.where(np.isnan(values), values, rounded.view(np.float32))
    return out


def bf16_values(stored: U8) -> F32:
    """Stored bfloat16, uint8 [n_rows, 2 n_cols], as float32 [n_rows, n_cols]."""
    bits: npt.NDArray[np.uint32] = stored.view("<u2").astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)


def stored_row_bytes(dtype: str, n_cols: int) -> int:
    """Bytes of a row as the source stores it."""
    if dtype == "F8_E4M3":
        return n_cols
    if dtype not in QTYPES:
        raise UnsupportedError(f"rows stored as {dtype} cannot be derived")
    return QTYPES[dtype].row_bytes(n_cols)


class Deriver:
    """Derives rows of output tensors from a source. It caches scales: use one per thread."""

    def __init__(self, source: Source, ggml: Ggml) -> None:
        self.source, self.ggml = source, ggml
        self._scales: dict[str, F32] = {}

    def rows(self, tensor: Tensor, wanted: I64) -> F32:
        """float32 [len(wanted), n_cols]: the `wanted` rows (ascending) of an output tensor."""
        out = np.empty((len(wanted), tensor.n_cols), np.float32)
        for part, where, rows in _by_part(tensor, wanted):
            st = self.source.tensor(part.source)
            if part.transposed:
                rectangle = self._decoded(st, np.arange(part.row, part.row + part.n_rows), part.shape[-1])
                out[where] = rectangle[:, rows].T
            else:
                out[where] = self._decoded(st, _source_rows(part, rows), tensor.n_cols)
        return to_bf16(out) if tensor.source_type == "BF16" else out

    def stored(self, tensor: Tensor, wanted: I64, type_: str) -> U8 | None:
        """The same rows as the source stores them, uint8 [len(wanted), row_bytes], if it stores them as `type_`, so
        that an output of that type is a copy. Else None."""
        if tensor.source_type != type_:
            return None
        out = np.empty((len(wanted), QTYPES[type_].row_bytes(tensor.n_cols)), np.uint8)
        for part, where, rows in _by_part(tensor, wanted):
            st = self.source.tensor(part.source)
            if st.dtype != type_ or part.transposed:
                return None
            out[where] = self._raw(st, _source_rows(part, rows), tensor.n_cols)
        return out

    def _raw(self, st: SourceTensor, rows: I64, n_cols: int) -> U8:
        """Stored bytes of rows of a source tensor, in any order. Adjacent rows are read together."""
        size = stored_row_bytes(st.dtype, n_cols)
        out = np.empty((len(rows), size), np.uint8)
        order = np.argsort(rows, kind="stable")
        breaks = np.flatnonzero(np.diff(rows[order]) != 1) + 1
        for run in np.split(order, breaks):
            if len(run):
                first = int(rows[run[0]])
                out[run] = self._bytes(st, first * size, len(run) * size).reshape(len(run), size)
        return out

    def _decoded(self, st: SourceTensor, rows: I64, n_cols: int) -> F32:
        stored = self._raw(st, rows, n_cols)
        if st.dtype == "F8_E4M3":
            scale = self._scale(st.name)
            down, across = self.source.block
            with np.errstate(invalid="ignore", over="ignore"):
                return _E4M3[stored] * scale[rows // down][:, np.arange(n_cols) // across]
        if st.dtype == "BF16":
            return bf16_values(stored)
        if st.dtype in ("F16", "F32"):
            with np.errstate(invalid="ignore"):
                return stored.view("<f2" if st.dtype == "F16" else "<f4").astype(np.float32)
        if st.dtype in INTEGER_TYPES:
            raise UnsupportedError(f"{st.file}: '{st.name}' is {st.dtype}: rows of it cannot be derived")
        return self.ggml.dequantize(stored, st.dtype, n_cols)

    def _scale(self, name: str) -> F32:
        """The scales of an FP8 weight, float32 [ceil(rows / block), ceil(cols / block)]."""
        found = self._scales.pop(name, None)
        if found is None:
            st = getattr(self.source, "scales", {}).get(name)
            if st is None:
                raise SourceError(f"{self.source.path}: '{name}' has no scales")
            raw = self._bytes(st, 0, st.nbytes)
            if st.dtype == "F8_E8M0":
                found = np.where(raw == 255, np.nan, np.exp2(raw.astype(np.float64) - 127)).astype(np.float32)
            elif st.dtype == "BF16":
                found = bf16_values(raw)
            else:
                found = raw.view("<f2" if st.dtype == "F16" else "<f4").astype(np.float32)
            found = found.reshape(st.shape)
            while len(self._scales) >= _SCALES_KEPT:
                self._scales.pop(next(iter(self._scales)))
        self._scales[name] = found
        return found

    def _bytes(self, st: SourceTensor, start: int, n: int) -> U8:
        out = np.empty(n, np.uint8)
        self.source.read(st, start, out)
        return out


def _by_part(tensor: Tensor, wanted: I64) -> list[tuple[Part, I64, I64]]:
    """Split wanted rows by part: (part, indices into `wanted`, row numbers within the part)."""
    sizes = np.array([part.shape[-1] if part.transposed else part.n_rows for part in tensor.parts])
    ends = np.cumsum(sizes)
    of = np.searchsorted(ends, wanted, side="right")
    out = []
    for i in np.unique(of):
        where = np.flatnonzero(of == i)
        out.append((tensor.parts[i], where, wanted[where] - (ends[i] - sizes[i])))
    return out


def _source_rows(part: Part, rows: I64) -> I64:
    """Map rows of a part to rows of the source: in order, or taken in turn from `interleave` equal runs."""
    run_length = part.n_rows // part.interleave
    return part.row + rows % part.interleave * run_length + rows // part.interleave

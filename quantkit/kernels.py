"""Kernels by name: rows to blocks, and stored rows to float32. The only importer of _native and of ggml.

ggml defines the bytes; the contract is the ggml 0.25.3 of llama-cpp-python 0.3.36. quantkit's own
kernels (native/) give them many times sooner, for the types they have and on processors that have
the instructions; everything else goes to ggml's own functions (`ggml_quantize_chunk` of the
libggml-python wheel). The wheel's 0.20.2 gives the same bytes for every type but IQ1_M, whose search
was rewritten since: where quantkit has no kernel for it, the `ggml-base` library of the installed
toolchain is used, and without that quantizing to IQ1_M is refused rather than done differently.

Kernel names, best first: `avx512`, `avx2`, `neon` (quantkit's own), `ggml` (the wheel's),
`ggml-pinned` (the toolchain's). QUANTKIT_KERNELS forces one; types it has no kernel for go to ggml.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _native
from .base.errors import KernelError, WeightError, did_you_mean
from .base.version import __version__
from .gguf.types import ABORT_WITHOUT_IMATRIX, INTEGER_TYPES, QTYPES, QType, qtype

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: types whose bytes differ between the wheel's ggml and the contract's
DIFFERS_IN_WHEEL = frozenset({"IQ1_M"})

#: types whose search ggml ends with abort() when its sums overflow
ABORT_ON_OVERFLOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
#: above what any of them can store with a float16 scale (65504 * 31 * 15), with room
_LARGEST_WEIGHT = 3e8
#: of importance, weight, and weight squared: what still leaves the sums of a block far from 3.4e38
_LARGEST_PRODUCT = 1e33

_pinned_library: Path | None = None


@cache
def version() -> str:
    """quantkit's version with a digest of its compiled kernels: equal versions make equal bytes."""
    assert _native.__file__ is not None
    digest = hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:12]
    return f"quantkit {__version__}, kernels {digest}"


def use_pinned_library(path: Path | None) -> None:
    """Tell where the toolchain's libggml-base is (kernels sit below the toolchain and cannot ask)."""
    global _pinned_library  # noqa: PLW0603
    _pinned_library = path


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class _Ggml:
    """A libggml-base, by ctypes: every call releases the GIL."""

    def __init__(self, path: Path) -> None:
        try:
            lib = ctypes.CDLL(str(path))
            self.quantize_chunk = lib.ggml_quantize_chunk
            self.validate = lib.ggml_validate_row_data
            self.traits = lib.ggml_get_type_traits
            version = lib.ggml_version
        except (OSError, AttributeError) as e:
            raise KernelError(f"{path}: not a usable ggml library: {e}") from None
        self.quantize_chunk.restype = ctypes.c_size_t
        self.quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip
        self.validate.restype = ctypes.c_bool
        self.validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self.traits.restype = ctypes.POINTER(_TypeTraits)
        self.traits.argtypes = [ctypes.c_int]
        version.restype = ctypes.c_char_p
        self.version: str = version().decode()
        self.path = path


@lru_cache(maxsize=4)
def _load(path: Path) -> _Ggml:
    return _Ggml(path)


def wheel_library() -> Path:
    """The libggml-base of the libggml-python wheel."""
    spec = find_spec("libggml")
    if spec is None or spec.origin is None:
        raise KernelError("the package libggml-python is not installed; run: pip install libggml-python")
    base = Path(spec.origin).parent
    for folder in ("lib64", "lib", "."):
        for suffix in (".so", ".dylib"):
            if (base / folder / f"libggml-base{suffix}").exists():
                return base / folder / f"libggml-base{suffix}"
    raise KernelError(f"{base}: the package libggml-python holds no libggml-base; reinstall it")


#: quantkit's own sets that this processor can run, best first -> the types each has
OWN: dict[str, frozenset[str]] = {name: frozenset(types) for name, types in _native.kernel_sets()}
KERNELS = ("avx512", "avx2", "neon", "ggml", "ggml-pinned")
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
_ARCHITECTURES = {"avx512": _X86, "avx2": _X86, "neon": _ARM}

#: types whose levels come from a table -> the class of gguf.quants that has it
CODEBOOKS = {
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_S", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_S": "IQ3_S", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip


@cache
def set_codebook(name: str) -> None:
    """Hand quantkit's own kernels a table of levels: int8 [entries, values an entry], in ggml's order."""
    table = getattr(import_module("gguf.quants"), name)
    if hasattr(table, "kvalues"):
        values = np.array([table.kvalues], np.int8)
    else:
        table.init_grid()
        values = table.grid.reshape(-1, table.grid.shape[-1]).astype(np.int8)
    _native.set_codebook(name, values)


def select(qt: QType, kernel: str | None = None) -> str:
    """The name of the kernel that quantizes to this type: the one asked for, else the best that keeps
    the byte contract; where QUANTKIT_KERNELS names one, that if it has the type. Raises KernelError."""
    if kernel is not None:
        _require_known(kernel)
        if kernel not in ("ggml", "ggml-pinned") and qt.name not in OWN[kernel]:
            raise KernelError(f"the kernels '{kernel}' have none for {qt.name}")
        return kernel
    forced = os.environ.get("QUANTKIT_KERNELS") or None
    if forced is not None:
        _require_known(forced)
        if forced in ("ggml", "ggml-pinned") or qt.name in OWN[forced]:
            return forced
    else:
        for name, types in OWN.items():
            if qt.name in types:
                return name
    if qt.name not in DIFFERS_IN_WHEEL:
        return "ggml"
    if _pinned_library is None:
        raise KernelError(
            f"{qt.name} needs the ggml of the pinned llama.cpp, since the wheel's gives other bytes for it; "
            "run: quantkit toolchain install"
        )
    return "ggml-pinned"


def check_choice() -> None:
    """Raise KernelError, before any work, when QUANTKIT_KERNELS names kernels that are not to be had here."""
    forced = os.environ.get("QUANTKIT_KERNELS") or None
    if forced is not None:
        try:
            _require_known(forced)
        except KernelError as e:
            raise KernelError(f"QUANTKIT_KERNELS: {e}") from None


def _require_known(kernel: str) -> None:
    machine = os.uname().machine
    here = [name for name in KERNELS if machine in _ARCHITECTURES.get(name, (machine,))]
    if kernel not in KERNELS:
        raise KernelError(
            f"unknown kernels '{kernel:.40}'{did_you_mean(kernel, here)}; on {machine} there are {', '.join(here)}"
        )
    if kernel not in here:
        raise KernelError(f"the kernels '{kernel}' are not for {machine}, where there are {', '.join(here)}")
    if kernel == "ggml-pinned" and _pinned_library is None:
        raise KernelError("the kernel 'ggml-pinned' needs the toolchain; run: quantkit toolchain install")
    if kernel not in ("ggml", "ggml-pinned", *OWN):
        raise KernelError(f"this processor cannot run the kernels '{kernel}'; it can run {', '.join((*OWN, 'ggml'))}")


@cache
def _wheel() -> _Ggml:
    return _load(wheel_library())


def _library(name: str) -> _Ggml:
    return _load(_pinned_library) if name == "ggml-pinned" and _pinned_library else _wheel()


def active() -> dict[str, str]:
    """Type name -> the kernel that is used for it now, with its version; 'none: …' where there is none."""
    out = {}
    for name, qt in QTYPES.items():
        if name in INTEGER_TYPES:
            continue
        try:
            kernel = select(qt)
            out[name] = kernel if kernel in OWN else f"{kernel} {_library(kernel).version}"
        except KernelError as e:
            out[name] = f"none: {e}"
    return out


def _what(array: npt.NDArray[Any]) -> str:
    order = "" if array.flags.c_contiguous else ", not C-ordered"
    return f"{array.dtype} {list(array.shape)}{order}"


def _require(name: str, array: npt.NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    """What a pointer is taken of must be exactly this: conversion would make a copy, and ggml checks nothing."""
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise KernelError(f"{name} must be C-ordered {np.dtype(dtype)} {list(shape)}, not {_what(array)}")


def quantize(
    rows: F32, qtype_name: str, imatrix: F32 | None = None, kernel: str | None = None, out: U8 | None = None
) -> U8:
    """Quantize rows to ggml blocks, exactly as llama-quantize does.

    rows: float32 [n_rows, n_cols], C order, all finite; n_cols a multiple of the type's block.
    imatrix: float32 [n_cols], the mean squared activation of each column, finite and not negative.
    kernel: force one by name (see `select`).
    out: uint8 [n_rows, row_bytes] to write to; a new array if None. Returned.

    Raises KernelError for wrong shapes or an unknown type, WeightError for NaN/Inf, and when ggml
    finds the blocks it made not valid, or would abort the process (weights out of the type's range).
    """
    qt = qtype(qtype_name)
    if qt.name in INTEGER_TYPES:
        raise KernelError(f"{qt.name} is not a type to quantize to")
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous or rows.shape[1] == 0:
        raise KernelError(f"rows must be C-ordered float32 [n_rows, n_cols], not {_what(rows)}")
    n_rows, n_cols = rows.shape
    row_bytes = qt.row_bytes(n_cols)
    if imatrix is not None:
        _require("the imatrix", imatrix, np.float32, (n_cols,))
        if not _is_importance(imatrix):
            raise KernelError("the imatrix holds values that are NaN, Inf or negative")
    elif qt.name in ABORT_WITHOUT_IMATRIX:
        raise KernelError(f"{qt.name} cannot be quantized without an importance matrix")
    if out is None:
        out = np.empty((n_rows, row_bytes), np.uint8)
    _require("out", out, np.uint8, (n_rows, row_bytes))
    at = first_nonfinite(rows)
    if at is not None:
        raise WeightError(f"row {at[0]}, column {at[1]} is {rows[at]}")
    if qt.name in ABORT_ON_OVERFLOW:
        _require_moderate(rows, imatrix, qt)
    chosen = select(qt, kernel)
    ggml = _library(chosen)
    if chosen in OWN:
        _prepare(qt)
        _native.quantize(chosen, qt.name, rows, imatrix if qt.uses_imatrix else None, out)
    else:
        weights = imatrix.ctypes.data if imatrix is not None else None
        written = ggml.quantize_chunk(qt.id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, weights)
        if written != out.nbytes:
            raise KernelError(f"ggml wrote {written} bytes of {qt.name} where {out.nbytes} were due")
    if not ggml.validate(qt.id, out.ctypes.data, out.nbytes):
        what = "one would be stored as Inf" if qt.is_float else "a block's scale is not valid"
        raise WeightError(f"weights out of the range of {qt.name}: {what}")
    return out


def _is_importance(imatrix: F32) -> bool:
    """Whether all values are finite and not negative."""
    return bool(np.isfinite(imatrix).all() and (imatrix >= 0).all())


def _prepare(qt: QType) -> None:
    """What quantkit's own kernels need once before the first use of a type."""
    if qt.name in CODEBOOKS:
        set_codebook(CODEBOOKS[qt.name])


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


#: the largest weight that each of these stores as a finite value: then there is nothing left to validate
_LARGEST_FINITE = {"F16": 65519.997, "BF16": 3.3961774e38, "F32": np.inf}
#: what quantize_stored can start from
FUSED = frozenset({"F8_E4M3", "BF16", "F16", "F32"})


def quantize_stored(rows: StoredRows, qtype_name: str, imatrix: F32 | None, out: U8) -> bool:
    """Quantize stored rows in one pass, a few rows at a time: what decoding them to float32 and `quantize`
    give, without the float32 in between. `imatrix` and `out` are those of `quantize`.

    False, with `out` unfinished, where quantkit has no kernel of its own or would not quantize these
    weights: then go the long way, which says what is wrong.
    """
    qt = qtype(qtype_name)
    try:
        chosen = select(qt)
    except KernelError:
        return False
    if chosen not in OWN or rows.dtype not in FUSED or (imatrix is None and qt.name in ABORT_WITHOUT_IMATRIX):
        return False
    if imatrix is not None and not qt.uses_imatrix and not _is_importance(imatrix):  # else the kernel looks
        return False
    _prepare(qt)
    limits = (_LARGEST_FINITE.get(qt.name, np.inf), np.inf)
    if qt.name in ABORT_ON_OVERFLOW:
        limits = (_LARGEST_WEIGHT, _LARGEST_PRODUCT)
    done = _native.quantize_rows(
        chosen, qt.name, rows.dtype, rows.stored, rows.n_cols, rows.round_bf16, rows.first_rows, rows.scale,
        *rows.block, imatrix if qt.uses_imatrix else None, *limits, out,
    )  # fmt: skip
    return done and (qt.name in _LARGEST_FINITE or is_valid(out, qt.name))


def _require_moderate(rows: F32, imatrix: F32 | None, qt: QType) -> None:
    """Refuse what would overflow the float32 sums of ggml's grid searches: they abort on NaN."""
    if rows.size == 0:
        return
    largest = max(float(rows.max()), -float(rows.min()))
    if largest > _LARGEST_WEIGHT:
        raise WeightError(f"weights out of the range of {qt.name}: up to {largest:.3g}")
    importance = float(imatrix.max()) if imatrix is not None else 0.0
    if importance * largest * max(1.0, largest**2) > _LARGEST_PRODUCT:
        raise WeightError(
            f"weights of up to {largest:.3g} with an importance of up to {importance:.3g} overflow the search of "
            f"{qt.name}; is the importance matrix damaged?"
        )


def dequantize(blocks: U8, qtype_name: str, n_cols: int, out: F32 | None = None) -> F32:
    """ggml blocks uint8 [n_rows, row_bytes] to float32 [n_rows, n_cols], with ggml's own function."""
    qt = qtype(qtype_name)
    n_rows = blocks.shape[0] if blocks.ndim == 2 else -1
    _require("blocks", blocks, np.uint8, (n_rows, qt.row_bytes(n_cols)))
    if out is None:
        out = np.empty((n_rows, n_cols), np.float32)
    _require("out", out, np.float32, (n_rows, n_cols))
    to_float = _library("ggml").traits(qt.id).contents.to_float
    if not to_float:
        raise KernelError(f"ggml cannot dequantize {qt.name}")
    to_float(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def is_valid(blocks: U8, qtype_name: str) -> bool:
    """Whether uint8 [n_rows, row_bytes] are blocks ggml accepts: no scale that is NaN or Inf."""
    return bool(_library("ggml").validate(qtype(qtype_name).id, blocks.ctypes.data, blocks.nbytes))


def first_nonfinite(rows: F32) -> tuple[int, int] | None:
    """(row, column) of the first NaN or Inf of float32 [n_rows, n_cols], or None."""
    at = _native.first_nonfinite(rows.reshape(-1))
    return None if at == rows.size else divmod(at, rows.shape[1])


def e4m3_to_f32(src: U8, scale: F32, row0: int, block: tuple[int, int], out: F32, round_bf16: bool) -> None:
    """Block-scaled FP8 (E4M3) to float32: out = float32(src) * scale of its block.

    src: uint8 [n_rows, n_cols], rows row0… of the matrix; scale: float32 [ceil(rows/block[0]),
    ceil(n_cols/block[1])] of the whole matrix; out: float32 [n_rows, n_cols]. With `round_bf16`
    each product is rounded to the nearest even bfloat16, as on the way through a BF16 file.
    """
    if src.ndim != 2 or scale.ndim != 2 or min(row0, block[0] - 1, block[1] - 1) < 0:
        raise KernelError(
            f"src and scale must be matrices, row0 and block counts, not {_what(src)}, {_what(scale)}, {row0}, {block}"
        )
    n_rows, n_cols = src.shape
    need = (-(-(row0 + n_rows) // block[0]), -(-n_cols // block[1]))
    if need[1] != scale.shape[1] or need[0] > scale.shape[0]:
        raise KernelError(f"rows up to {row0 + n_rows} of {n_cols} need {need} scales, there are {scale.shape}")
    _require("src", src, np.uint8, src.shape)
    _require("scale", scale, np.float32, scale.shape)
    _require("out", out, np.float32, src.shape)
    _native.e4m3_to_f32(src, scale, row0, block[0], block[1], round_bf16, out)


_FLOATS = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


def float_to_f32(src: U8, dtype: str, out: F32, round_bf16: bool) -> None:
    """Stored F32, F16 or BF16 values (as bytes [n_rows, row_bytes]) to float32 `out` [n_rows, n_cols],
    rounded to bfloat16 if asked."""
    if dtype not in _FLOATS:
        raise KernelError(f"{dtype} is not a float type")
    if out.ndim != 2:
        raise KernelError(f"out must be a matrix, not {_what(out)}")
    _require("out", out, np.float32, out.shape)
    _require("src", src, np.uint8, (out.shape[0], out.shape[1] * np.dtype(_FLOATS[dtype]).itemsize))
    flat, stored = out.reshape(-1), src.reshape(-1).view(_FLOATS[dtype])
    if dtype == "BF16":
        _native.bf16_to_f32(stored, flat)
    elif dtype == "F16":
        _native.f16_to_f32(stored, round_bf16, flat)
    else:
        _native.f32_to_f32(stored, round_bf16, flat)

"""Calls ggml's own quantizers through ctypes, to get the blocks a row must have.

Separate from quantkit's kernels on purpose. Uses the library of the installed llama.cpp (the byte contract) if there is
one, else that of the libggml-python wheel, whose older ggml quantizes IQ1_M differently.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..base.errors import KernelError
from ..gguf.types import QTYPES

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: types that the wheel's ggml quantizes to other bytes
NOT_IN_WHEEL = frozenset({"IQ1_M"})
#: ggml ends the process if the sums of its searches overflow; these limits are far below that, far above any model
_GRIDS = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
_MOST, _MOST_PRODUCT = 3e8, 1e33

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", _ToFloat),
    )  # fmt: skip


def _wheel() -> Path:
    spec = importlib.util.find_spec("libggml")
    for folder in ("lib64", "lib"):
        for suffix in ("so", "dylib"):
            if spec is not None and spec.origin is not None:
                path = Path(spec.origin).parent / folder / f"libggml-base.{suffix}"
                if path.is_file():
                    return path
    raise KernelError("there is no ggml to compare with; run: quantkit toolchain install")


class Ggml:
    """A libggml-base. `pinned` is the toolchain's library, or None for the wheel's. Calls release the GIL."""

    def __init__(self, pinned: Path | None) -> None:
        self.pinned = pinned is not None
        path = pinned or _wheel()
        try:
            lib = ctypes.CDLL(str(path))
            lib.ggml_version.restype = ctypes.c_char_p
            self.version = lib.ggml_version().decode()
            self._quantize, self._traits = lib.ggml_quantize_chunk, lib.ggml_get_type_traits
        except (OSError, AttributeError) as e:
            raise KernelError(f"{path}: is not a ggml library: {e}; run: quantkit toolchain install --force") from None
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        )  # fmt: skip
        self._traits.restype = ctypes.POINTER(_Traits)
        self._traits.argtypes = (ctypes.c_int,)

    def require(self, type_: str) -> None:
        """Raise KernelError for a type that this library does not quantize to the contract's bytes."""
        if type_ in NOT_IN_WHEEL and not self.pinned:
            raise KernelError(
                f"rows of {type_} can only be compared with the ggml of the pinned llama.cpp, since the wheel's makes "
                "others; run: quantkit toolchain install"
            )

    def quantize(self, rows: F32, type_: str, weights: F32 | None) -> U8 | str:
        """Quantize float32 rows [n_rows, n_cols] to blocks uint8 [n_rows, row_bytes], with the importance of each
        column or None. If ggml would end the process or store Inf, return the reason instead."""
        qt = QTYPES[type_]
        rows = np.ascontiguousarray(rows, np.float32)
        if not np.isfinite(rows).all():
            return "the source holds NaN or Inf there"
        if type_ in _GRIDS and rows.size:
            most = float(np.abs(rows).max())
            importance = float(weights.max()) if weights is not None else 0.0
            if most > _MOST or importance * most * max(1.0, most * most) > _MOST_PRODUCT:
                return f"weights of up to {most:.3g} with an importance of up to {importance:.3g} are beyond {type_}"
        out = np.zeros((rows.shape[0], qt.row_bytes(rows.shape[1])), np.uint8)
        done = self._quantize(
            qt.id, rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1],
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        if done != out.nbytes:
            return f"ggml made {done:,} bytes of {type_}, not {out.nbytes:,}"
        return out

    def dequantize(self, blocks: U8, type_: str, n_cols: int) -> F32:
        """Dequantize blocks uint8 [n_rows, row_bytes] to float32 [n_rows, n_cols]. Raises KernelError."""
        blocks = np.ascontiguousarray(blocks)
        out = np.empty((blocks.shape[0], n_cols), np.float32)
        to_float = self._traits(QTYPES[type_].id).contents.to_float
        if not to_float:
            raise KernelError(f"ggml has no way from {type_} to floats")
        to_float(blocks.ctypes.data, out.ctypes.data, out.size)
        return out

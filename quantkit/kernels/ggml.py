"""ggml's own functions, from the libggml-python wheel or the installed toolchain, called by ctypes."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..base.errors import KernelError
from ..llama_cpp.toolchain import ggml_library


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


class Ggml:
    """A libggml-base library; every call releases the GIL. Raises KernelError if the file is not one."""

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
def load(path: Path) -> Ggml:
    return Ggml(path)


def wheel_library() -> Path:
    """Return the path of the libggml-base in the libggml-python wheel."""
    spec = find_spec("libggml")
    if spec is None or spec.origin is None:
        raise KernelError("the package libggml-python is not installed; run: pip install libggml-python")
    base = Path(spec.origin).parent
    for folder in ("lib64", "lib", "."):
        for suffix in (".so", ".dylib"):
            if (base / folder / f"libggml-base{suffix}").exists():
                return base / folder / f"libggml-base{suffix}"
    raise KernelError(f"{base}: the package libggml-python holds no libggml-base; reinstall it")


def pinned_library() -> Path:
    """Return the path of the libggml-base in the installed toolchain. Raises KernelError if there is none."""
    path = ggml_library()
    if path is None:
        raise KernelError("the kernel 'ggml-pinned' needs the toolchain; run: quantkit toolchain install")
    return path


def has_pinned() -> bool:
    return ggml_library() is not None


@cache
def wheel() -> Ggml:
    return load(wheel_library())


def library(kernel: str) -> Ggml:
    """Return the ggml that a kernel belongs to, or for quantkit's own kernels the one used beside them."""
    return load(pinned_library()) if kernel == "ggml-pinned" else wheel()

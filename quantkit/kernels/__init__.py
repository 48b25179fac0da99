"""Kernels by name: rows to blocks, and stored rows to float32. Only this room imports _native and ggml.

May import llama_cpp (to find the toolchain's ggml), gguf and base. Offers `quantize` and `dequantize` for
whole rows, `quantize_stored` for rows as a source stores them, functions that decode and check rows, and the native
part of rounding/ (`feedback_*`), which makes quantkit's own bytes, not ggml's.

ggml defines the bytes; the contract is ggml 0.25.3 of llama-cpp-python 0.3.36. quantkit's own
kernels (native/) make them many times faster, for some types and on processors that have
the instructions; everything else uses ggml's own functions (`ggml_quantize_chunk` of the
libggml-python wheel). The wheel's 0.20.2 gives the same bytes for every type but IQ1_M, whose search
was rewritten later. Where quantkit has no kernel for IQ1_M, the `ggml-base` library of the installed
toolchain is used; without it, quantizing to IQ1_M is refused so that no other bytes are made.

Kernel names, best first: `avx512`, `avx2`, `neon` (quantkit's own), `ggml` (the wheel's),
`ggml-pinned` (the toolchain's). QUANTKIT_KERNELS forces one; types for which it has no kernel use ggml.
"""

from .arrays import F32, U8
from .blocks import dequantize, is_valid, quantize
from .choose import DIFFERS_IN_WHEEL, active, check_choice, select
from .feedback import (
    FEEDBACK,
    feedback_factor,
    feedback_pass_on,
    feedback_products,
    feedback_quantize,
    feedback_set,
    grown,
)
from .floats import e4m3_to_f32, first_nonfinite, float_to_f32
from .ggml import wheel_library
from .limits import ABORT_ON_OVERFLOW, UnfitWeightError, require_fit
from .own import CODEBOOKS, OWN, set_codebook, version
from .stored import StoredRows, can_quantize_stored, quantize_stored

__all__ = [
    "ABORT_ON_OVERFLOW",
    "CODEBOOKS",
    "DIFFERS_IN_WHEEL",
    "F32",
    "FEEDBACK",
    "OWN",
    "U8",
    "StoredRows",
    "UnfitWeightError",
    "active",
    "can_quantize_stored",
    "check_choice",
    "dequantize",
    "e4m3_to_f32",
    "feedback_factor",
    "feedback_pass_on",
    "feedback_products",
    "feedback_quantize",
    "feedback_set",
    "first_nonfinite",
    "float_to_f32",
    "grown",
    "is_valid",
    "quantize",
    "quantize_stored",
    "require_fit",
    "select",
    "set_codebook",
    "version",
    "wheel_library",
]

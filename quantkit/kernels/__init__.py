"""Kernels by name: rows to blocks, and stored rows to float32. The only importer of _native and of ggml.

May import llama_cpp (which says where the toolchain's ggml is), gguf and base. Offers `quantize` and `dequantize` of
whole rows, `quantize_stored` of rows as a source stores them, what decodes and checks rows, and the native part of
rounding/ (`feedback_*`), which makes bytes of its own and not ggml's.

ggml defines the bytes; the contract is the ggml 0.25.3 of llama-cpp-python 0.3.36. quantkit's own
kernels (native/) give them many times sooner, for the types they have and on processors that have
the instructions; everything else goes to ggml's own functions (`ggml_quantize_chunk` of the
libggml-python wheel). The wheel's 0.20.2 gives the same bytes for every type but IQ1_M, whose search
was rewritten since: where quantkit has no kernel for it, the `ggml-base` library of the installed
toolchain is used, and without that quantizing to IQ1_M is refused rather than done differently.

Kernel names, best first: `avx512`, `avx2`, `neon` (quantkit's own), `ggml` (the wheel's),
`ggml-pinned` (the toolchain's). QUANTKIT_KERNELS forces one; types it has no kernel for go to ggml.
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

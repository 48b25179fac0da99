"""The one table of ggml types: name, id, values a block, bytes a block, fallback.

Every size in quantkit comes from here. The ids are those of `enum ggml_type`, the sizes
those of ggml's type traits; a test compares the table with the installed ggml and gguf.

`fallback` is the type llama-quantize gives a tensor whose rows do not divide into the
blocks of the type asked for (src/llama-quant.cpp, tensor_type_fallback).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .errors import KernelError, did_you_mean


class QType(NamedTuple):
    """A ggml tensor type. `block` values are stored in `block_bytes` bytes."""

    name: str
    id: int
    block: int
    block_bytes: int
    fallback: str | None = None
    """what rows that do not divide by `block` get instead; None: see `fit`"""
    needs_imatrix: bool = False
    """llama-quantize refuses it without weights (except for token_embd and output)"""
    uses_imatrix: bool = False
    """ggml's quantizer gives other bytes with an importance matrix than without"""
    is_float: bool = False

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row of `n_cols` values; `n_cols` must divide by the block."""
        if n_cols % self.block:
            raise KernelError(f"a row of {n_cols} values does not divide into {self.name} blocks of {self.block}")
        return n_cols // self.block * self.block_bytes

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.block_bytes / self.block


_ROWS = (
    QType("F32", 0, 1, 4, is_float=True),
    QType("F16", 1, 1, 2, is_float=True),
    QType("Q4_0", 2, 32, 18, uses_imatrix=True),
    QType("Q4_1", 3, 32, 20, uses_imatrix=True),
    QType("Q5_0", 6, 32, 22, uses_imatrix=True),
    QType("Q5_1", 7, 32, 24, uses_imatrix=True),
    QType("Q8_0", 8, 32, 34),
    QType("Q2_K", 10, 256, 84, "Q4_0", uses_imatrix=True),
    QType("Q3_K", 11, 256, 110, "Q4_0", uses_imatrix=True),
    QType("Q4_K", 12, 256, 144, "Q5_0", uses_imatrix=True),
    QType("Q5_K", 13, 256, 176, "Q5_1", uses_imatrix=True),
    QType("Q6_K", 14, 256, 210, "Q8_0", uses_imatrix=True),
    QType("IQ2_XXS", 16, 256, 66, "IQ4_NL", needs_imatrix=True, uses_imatrix=True),
    QType("IQ2_XS", 17, 256, 74, "IQ4_NL", needs_imatrix=True, uses_imatrix=True),
    QType("IQ3_XXS", 18, 256, 98, "IQ4_NL", needs_imatrix=True, uses_imatrix=True),
    QType("IQ1_S", 19, 256, 50, "IQ4_NL", needs_imatrix=True, uses_imatrix=True),
    QType("IQ4_NL", 20, 32, 18, uses_imatrix=True),
    QType("IQ3_S", 21, 256, 110, "IQ4_NL", uses_imatrix=True),
    QType("IQ2_S", 22, 256, 82, "IQ4_NL", needs_imatrix=True, uses_imatrix=True),
    QType("IQ4_XS", 23, 256, 136, "IQ4_NL", uses_imatrix=True),
    QType("IQ1_M", 29, 256, 56, "IQ4_NL", needs_imatrix=True, uses_imatrix=True),
    QType("BF16", 30, 1, 2, is_float=True),
    QType("TQ1_0", 34, 256, 54, "Q4_0"),
    QType("TQ2_0", 35, 256, 66, "Q4_0"),
    QType("MXFP4", 39, 32, 17),
    QType("NVFP4", 40, 64, 36),
    QType("Q1_0", 41, 128, 18),
    QType("Q2_0", 42, 64, 18, "Q4_0"),
    QType("I8", 24, 1, 1),
    QType("I16", 25, 1, 2),
    QType("I32", 26, 1, 4),
    QType("I64", 27, 1, 8),
    QType("F64", 28, 1, 8),
)

QTYPES: dict[str, QType] = {t.name: t for t in _ROWS}
BY_ID: dict[int, QType] = {t.id: t for t in _ROWS}

#: stored in GGUF files but never a target of quantization
INTEGER_TYPES = frozenset({"I8", "I16", "I32", "I64", "F64"})

#: ggml aborts the process when asked for these without weights (ggml_quantize_requires_imatrix)
ABORT_WITHOUT_IMATRIX = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})

#: general.file_type (enum llama_ftype) of the names llama-quantize takes as its last argument
FILE_TYPES: dict[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
    "MXFP4_MOE": 38,
}  # fmt: skip


def qtype(name: str) -> QType:
    """The type of that name (any case). Raises KernelError, with a suggestion, for an unknown one."""
    found = QTYPES.get(name) or QTYPES.get(name.upper())
    if found is None:
        raise KernelError(f"unknown type '{name}'{did_you_mean(name, QTYPES)}")
    return found


#: whose choices are followed: those of the pinned llama.cpp, or those from January 2025 to March 2026
VERSIONS = ("current", "2025")


@lru_cache(maxsize=1 << 12)
def fit(asked: QType, n_cols: int, version: str = VERSIONS[0]) -> QType:
    """The type that rows of `n_cols` values get when `asked` was asked for: itself, else its
    fallback, else F16. Raises KernelError for types that llama-quantize has no fallback for: those
    of blocks above 32 that name none. Source: src/llama-quant.cpp, tensor_type_fallback."""
    if n_cols % asked.block == 0:
        return asked
    if version == "2025" and asked.name in ("Q2_K", "Q3_K") and n_cols % 32 == 0:
        return QTYPES["IQ4_NL"]
    if asked.fallback is None and asked.block > 32:
        raise KernelError(f"{asked.name} needs rows of {asked.block}s, these have {n_cols}, and it has no fallback")
    given = QTYPES[asked.fallback] if asked.fallback else asked
    return given if n_cols % given.block == 0 else QTYPES["F16"]

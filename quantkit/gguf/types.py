"""The one table of ggml types: name, id, values per block, bytes per block, fallback.

Every size in quantkit comes from here. The ids are those of `enum ggml_type`, the sizes
those of ggml's type traits; a test compares the table with the installed ggml and gguf.

`fallback` is the type llama-quantize gives a tensor whose rows do not divide into the
blocks of the type asked for (src/llama-quant.cpp, tensor_type_fallback).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..base.errors import KernelError, did_you_mean


class QType(NamedTuple):
    """A ggml tensor type. `block` values are stored in `block_bytes` bytes."""

    name: str
    id: int
    block: int
    block_bytes: int
    fallback: str | None = None
    """the type of rows whose length `block` does not divide; None: see `fitting_type`"""
    needs_imatrix: bool = False
    """llama-quantize refuses it without weights (except for token_embd and output)"""
    uses_imatrix: bool = False
    """ggml's quantizer gives other bytes with an importance matrix than without"""
    is_float: bool = False
    row_extra: int = 0
    """bytes before the blocks of each row (some types of ik_llama.cpp: the row's scale)"""

    def row_bytes(self, n_cols: int) -> int:
        """Return the bytes of a row of `n_cols` values; `block` must divide `n_cols`."""
        if n_cols % self.block:
            raise KernelError(f"a row of {n_cols} values does not divide into {self.name} blocks of {self.block}")
        return n_cols // self.block * self.block_bytes + self.row_extra

    @property
    def bits(self) -> float:
        """Bits per weight."""
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

#: types that only ik_llama.cpp writes: enough is known to locate tensors in a file, no more. Source:
#: github.com/ikawrakow/ik_llama.cpp, gguf-py/gguf/constants.py (ids, blocks; commit 00ded085) and ggml/src/ggml.c
#: (row_meta_size; commit 96d1235f, and for IQ1_KT, IQ2_KL, IQ3_KS, IQ5_KS the rows that its kernels read)
_IK_ROWS: tuple[tuple[str, int, int, int, int], ...] = (
    ("Q6_0", 133, 32, 26, 0), ("IQ1_BN", 134, 64, 13, 2), ("IQ2_BN", 135, 64, 16, 4),
    ("IQ2_K", 137, 256, 76, 0), ("IQ3_K", 138, 256, 110, 0), ("IQ4_K", 139, 256, 144, 0),
    ("IQ5_K", 140, 256, 176, 0), ("IQ6_K", 141, 256, 212, 0), ("IQ4_KS", 144, 256, 136, 4),
    ("IQ2_KS", 145, 256, 70, 2), ("IQ4_KSS", 146, 256, 128, 4), ("Q8_KV", 151, 32, 32, 8),
    ("IQ5_KS", 152, 256, 168, 4), ("IQ2_KT", 153, 256, 68, 4), ("IQ3_KT", 154, 256, 100, 4),
    ("IQ4_KT", 155, 256, 128, 4), ("IQ3_KS", 156, 256, 102, 2), ("IQ2_KL", 157, 256, 86, 2),
    ("IQ1_KT", 158, 256, 56, 4), ("Q4_0_R8", 202, 32, 18, 0), ("Q5_0_R4", 206, 32, 22, 0),
    ("Q8_0_R8", 208, 32, 34, 0), ("Q2_K_R4", 210, 256, 84, 0), ("Q3_K_R4", 211, 256, 110, 0),
    ("Q4_K_R4", 212, 256, 144, 0), ("Q5_K_R4", 213, 256, 176, 0), ("Q6_K_R4", 214, 256, 210, 0),
    ("IQ2_XXS_R4", 216, 256, 66, 0), ("IQ2_XS_R4", 217, 256, 74, 0), ("IQ3_XXS_R4", 218, 256, 98, 0),
    ("IQ1_S_R4", 219, 32, 6, 2), ("IQ4_NL_R4", 220, 32, 18, 0), ("IQ3_S_R4", 221, 256, 110, 0),
    ("IQ2_S_R4", 222, 256, 82, 0), ("IQ4_XS_R8", 223, 256, 136, 0), ("IQ1_M_R4", 229, 32, 7, 2),
    ("BF16_R16", 230, 1, 2, 0), ("Q6_0_R4", 233, 32, 26, 0), ("IQ2_BN_R4", 335, 64, 16, 4),
    ("IQ2_K_R4", 337, 256, 76, 0), ("IQ3_K_R4", 338, 256, 110, 0), ("IQ4_K_R4", 339, 256, 144, 0),
    ("IQ5_K_R4", 340, 256, 176, 0), ("IQ4_KS_R4", 344, 256, 136, 4), ("IQ5_KS_R4", 352, 256, 168, 4),
    ("Q8_KV_R8", 398, 32, 32, 4), ("Q8_K_R8", 399, 256, 258, 0),
)  # fmt: skip
IK_TYPES: dict[str, QType] = {
    name: QType(name, id_, block, nbytes, row_extra=extra) for name, id_, block, nbytes, extra in _IK_ROWS
}
#: all types that a tensor in a file may have, by name and by id
STORED_TYPES: dict[str, QType] = QTYPES | IK_TYPES
STORED_BY_ID: dict[int, QType] = {t.id: t for t in STORED_TYPES.values()}
#: ids of types that llama.cpp no longer supports
REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip

#: stored in GGUF files but never a target of quantization
INTEGER_TYPES = frozenset({"I8", "I16", "I32", "I64", "F64"})

#: types that use importances, by what ggml's quantizer does to a block whose importances are all zeros: its weights
#: become 0 (in LOST_BY_32, 32 columns in a row are enough), or are far off; all other types keep them
LOST_WITHOUT_WEIGHTS = frozenset(
    {"Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"}
)
LOST_BY_32 = frozenset({"Q4_0", "Q5_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
SPOILED_WITHOUT_WEIGHTS = frozenset({"IQ2_XS", "IQ2_S", "IQ3_XXS"})

#: ggml aborts the process when asked for these without weights (ggml_quantize_requires_imatrix)
ABORT_WITHOUT_IMATRIX = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})

#: general.file_type (enum llama_ftype) for the names that llama-quantize takes as its last argument
FILE_TYPES: dict[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
    "MXFP4_MOE": 38,
}  # fmt: skip

#: other names for some of them that llama-quantize takes (QUANT_OPTIONS of tools/quantize/quantize.cpp)
FILE_TYPE_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> str | None:
    """Return llama-quantize's file type for a name (any case, aliases) or a number; None if there is none."""
    upper = name.upper()
    if upper.isascii() and upper.isdecimal() and len(upper) < 4:
        return next((known for known, number in FILE_TYPES.items() if number == int(upper)), None)
    upper = FILE_TYPE_ALIASES.get(upper, upper)
    return upper if upper in FILE_TYPES else None


def qtype(name: str) -> QType:
    """Return the type with this name (any case). Raises KernelError with a suggestion if there is none."""
    found = QTYPES.get(name) or QTYPES.get(name.upper())
    if found is None:
        raise KernelError(f"unknown type '{name}'{did_you_mean(name, QTYPES)}")
    return found


#: whose choices to follow: the pinned llama.cpp's, or those from January 2025 to March 2026
VERSIONS = ("current", "2025")


@lru_cache(maxsize=1 << 12)
def fitting_type(asked: QType, n_cols: int, version: str = VERSIONS[0]) -> QType:
    """Return the type for rows of `n_cols` values when `asked` was asked for: `asked` itself, else its
    fallback, else F16. Raises KernelError for types without a fallback in llama-quantize: those with
    blocks above 32 that name none. Source: src/llama-quant.cpp, tensor_type_fallback."""
    if n_cols % asked.block == 0:
        return asked
    if version == "2025" and asked.name in ("Q2_K", "Q3_K") and n_cols % 32 == 0:
        return QTYPES["IQ4_NL"]
    if asked.fallback is None and asked.block > 32:
        raise KernelError(f"{asked.name} needs rows of {asked.block}s, these have {n_cols}, and it has no fallback")
    given = QTYPES[asked.fallback] if asked.fallback else asked
    return given if n_cols % given.block == 0 else QTYPES["F16"]

"""The table of types, against every other list of them: the gguf package, ggml itself, llama-quantize's rules."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest

from quantkit import kernels
from quantkit.base.errors import KernelError
from quantkit.gguf.types import (
    ABORT_WITHOUT_IMATRIX,
    FILE_TYPES,
    IK_TYPES,
    INTEGER_TYPES,
    QTYPES,
    STORED_BY_ID,
    STORED_TYPES,
    fitting_type,
    qtype,
)
from quantkit.llama_cpp import toolchain

WRITABLE = [name for name in QTYPES if name not in INTEGER_TYPES]

#: types of the gguf package that quantkit does not have: Q8_1 and Q8_K are for activations and never stored
NEVER_STORED = {"Q8_1", "Q8_K"}
#: newer than the gguf package
NEWER_THAN_GGUF = {"Q2_0"}


@pytest.fixture(scope="module", params=["wheel", pytest.param("pinned", marks=pytest.mark.tools)])
def ggml(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """ggml, with its own answers about its types."""
    lib = ctypes.CDLL(str(kernels.wheel_library() if request.param == "wheel" else toolchain.ggml_library()))
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_is_quantized.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return lib


# ---------------------------------------------------------------- the same types, ids and sizes


def test_the_gguf_package_knows_the_same_types() -> None:
    theirs = {t.name: int(t) for t in gguf.GGMLQuantizationType if t.name not in NEVER_STORED}
    assert {t.name: t.id for t in QTYPES.values() if t.name not in NEWER_THAN_GGUF} == theirs


def test_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {t.name: size for t, size in gguf.GGML_QUANT_SIZES.items() if t.name not in NEVER_STORED}
    assert {t.name: (t.block, t.block_bytes) for t in QTYPES.values() if t.name not in NEWER_THAN_GGUF} == theirs


@pytest.mark.parametrize("name", QTYPES)
def test_ggml_agrees(ggml: ctypes.CDLL, name: str) -> None:
    t = QTYPES[name]
    assert ggml.ggml_type_name(t.id).decode().upper() == name
    assert (ggml.ggml_blck_size(t.id), ggml.ggml_type_size(t.id)) == (t.block, t.block_bytes)
    assert ggml.ggml_is_quantized(t.id) == (not t.is_float and name not in INTEGER_TYPES)
    assert ggml.ggml_quantize_requires_imatrix(t.id) == (name in ABORT_WITHOUT_IMATRIX)


def test_ids_are_distinct_and_lead_back() -> None:
    assert len(STORED_BY_ID) == len(STORED_TYPES) == 33 + 47
    assert all(STORED_BY_ID[t.id] is t for t in (*QTYPES.values(), *IK_TYPES.values()))


def test_file_types_are_those_of_the_gguf_package() -> None:
    theirs = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(t) for t in gguf.LlamaFileType}
    # GUESSED is no type; llama-quantize does not offer NVFP4, and quantkit does not offer Q1_0 yet
    for name in ("GUESSED", "NVFP4", "Q1_0"):
        theirs.pop(name)
    assert theirs == FILE_TYPES


def test_bits_a_weight() -> None:
    bits = {name: QTYPES[name].bits for name in ("F32", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q2_K", "IQ2_XXS", "IQ1_S")}
    assert bits == {
        "F32": 32, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K": 4.5, "Q2_K": 2.625, "IQ2_XXS": 2.0625,
        "IQ1_S": 1.5625,
    }  # fmt: skip


def test_row_bytes() -> None:
    assert QTYPES["Q4_K"].row_bytes(7168) == 28 * 144
    assert QTYPES["F32"].row_bytes(7) == 28
    with pytest.raises(KernelError) as e:
        QTYPES["Q4_K"].row_bytes(128)
    assert str(e.value) == "a row of 128 values does not divide into Q4_K blocks of 256"
    assert e.value.exit_code == 9


@pytest.mark.parametrize(
    ("given", "name"), [("Q4_K", "Q4_K"), ("q4_k", "Q4_K"), ("iq2_xxs", "IQ2_XXS"), ("Bf16", "BF16")]
)
def test_names_in_any_case(given: str, name: str) -> None:
    assert qtype(given) is QTYPES[name]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("IQ1_X", "unknown type 'IQ1_X' (did you mean IQ1_S?)"),
        ("q4_k_m", "unknown type 'q4_k_m' (did you mean Q4_K?)"),
        ("float", "unknown type 'float'"),
        ("", "unknown type ''"),
    ],
)
def test_unknown_names(given: str, message: str) -> None:
    with pytest.raises(KernelError) as e:
        qtype(given)
    assert str(e.value) == message


# ---------------------------------------------------------------- fallbacks (src/llama-quant.cpp:390-443)

#: type asked for -> what rows of 32s get (the table of tensor_type_fallback, written out again)
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


@pytest.mark.parametrize("name", WRITABLE)
def test_rows_that_divide_get_what_was_asked(name: str) -> None:
    assert fitting_type(QTYPES[name], 256) is QTYPES[name]
    assert fitting_type(QTYPES[name], 7168) is QTYPES[name]


@pytest.mark.parametrize(("asked", "given"), FALLBACKS.items())
def test_rows_of_32s_get_the_fallback(asked: str, given: str) -> None:
    assert fitting_type(QTYPES[asked], 32) is QTYPES[given]
    assert fitting_type(QTYPES[asked], 96) is QTYPES[given]
    # 128 (attn_k_b's rows) divides by Q2_0's blocks of 64
    assert fitting_type(QTYPES[asked], 128) is QTYPES["Q2_0" if asked == "Q2_0" else given]


@pytest.mark.parametrize("asked", [n for n in WRITABLE if QTYPES[n].block > 1 and n not in ("NVFP4", "Q1_0")])
@pytest.mark.parametrize("n_cols", [1, 31, 33, 100, 250])
def test_rows_that_divide_by_nothing_get_f16(asked: str, n_cols: int) -> None:
    assert fitting_type(QTYPES[asked], n_cols) is QTYPES["F16"]


@pytest.mark.parametrize("asked", ["F32", "F16", "BF16"])
def test_floats_take_rows_of_any_length(asked: str) -> None:
    assert fitting_type(QTYPES[asked], 7) is QTYPES[asked]


@pytest.mark.parametrize(("asked", "n_cols", "block"), [("NVFP4", 32, 64), ("NVFP4", 7, 64), ("Q1_0", 64, 128)])
def test_no_fallback_where_llama_quantize_has_none(asked: str, n_cols: int, block: int) -> None:
    with pytest.raises(KernelError) as e:
        fitting_type(QTYPES[asked], n_cols)
    assert str(e.value) == f"{asked} needs rows of {block}s, these have {n_cols}, and it has no fallback"


def test_every_fallback_is_in_the_table_above() -> None:
    assert {t.name: t.fallback for t in QTYPES.values() if t.fallback} == FALLBACKS


# ---------------------------------------------------------------- the importance matrix, by what it does

RNG = np.random.default_rng(7)
ROWS = RNG.standard_normal((8, 1024)).astype(np.float32)
IMATRIX = RNG.lognormal(0, 1.5, 1024).astype(np.float32)


@pytest.mark.parametrize("name", [n for n in WRITABLE if n not in ABORT_WITHOUT_IMATRIX])
def test_uses_imatrix_is_what_the_bytes_say(name: str) -> None:
    """Even a matrix of all ones changes the bytes of the types that use one."""
    without = kernels.quantize(ROWS, name, kernel="ggml").tobytes()
    for imatrix in (IMATRIX, np.ones(1024, np.float32)):
        differs = kernels.quantize(ROWS, name, imatrix, kernel="ggml").tobytes() != without
        assert differs == QTYPES[name].uses_imatrix


@pytest.mark.parametrize("name", sorted(ABORT_WITHOUT_IMATRIX))
def test_uses_imatrix_of_types_that_must_have_one(name: str) -> None:
    made = {kernels.quantize(ROWS, name, w).tobytes() for w in (IMATRIX, IMATRIX[::-1].copy(), IMATRIX)}
    assert len(made) == 2
    assert QTYPES[name].uses_imatrix


def test_needs_imatrix() -> None:
    """llama-quantize's list (tensor_requires_imatrix), except for Q2_K in a Q2_K_S file: see the plan."""
    needs = {t.name for t in QTYPES.values() if t.needs_imatrix}
    assert needs == {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
    assert needs > ABORT_WITHOUT_IMATRIX
    assert all(QTYPES[name].uses_imatrix for name in needs)

"""Kernels: FP8 and floats to float32 against torch, blocks against ggml called directly, and refusals."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import _native, kernels
from quantkit.base.errors import KernelError, WeightError
from quantkit.cli import cli
from quantkit.gguf.types import ABORT_WITHOUT_IMATRIX, INTEGER_TYPES, QTYPES
from quantkit.kernels import ggml as ggml_room
from quantkit.kernels import own
from quantkit.llama_cpp import toolchain

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

TYPES = [name for name in QTYPES if name not in INTEGER_TYPES]
GRID_TYPES = sorted(kernels.ABORT_ON_OVERFLOW)
ON_X86 = os.uname().machine in ("x86_64", "amd64")
#: the kernels for this machine's architecture
HERE = [*(["avx512", "avx2"] if ON_X86 else ["neon"]), "ggml", "ggml-pinned"]
SENTINEL = np.float32(-7.25)


def bits(x: F32) -> npt.NDArray[np.uint32]:
    return x.view(np.uint32)


def assert_same_bits(ours: F32, theirs: F32) -> None:
    """Assert that arrays are equal bit for bit; NaN equals NaN, whatever the payload."""
    assert ours.shape == theirs.shape
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    wrong = np.flatnonzero((bits(ours) != bits(theirs)) & ~nan)
    assert wrong.size == 0, f"{wrong.size} differ, first at {wrong[0]}: {ours.flat[wrong[0]]} {theirs.flat[wrong[0]]}"


def guarded(shape: tuple[int, ...], dtype: type = np.float32) -> tuple[Any, Any]:
    """An array between guard values: (the whole, the part to write to)."""
    n = math.prod(shape)
    whole: npt.NDArray[Any] = np.full(n + 128, SENTINEL if dtype is np.float32 else 0xA5, dtype)
    return whole, whole[64 : 64 + n].reshape(shape)


def assert_guards_intact(whole: Any) -> None:
    untouched = SENTINEL if whole.dtype == np.float32 else 0xA5
    assert (whole[:64] == untouched).all()
    assert (whole[-64:] == untouched).all()


# ---------------------------------------------------------------- FP8 to float32


def torch_e4m3(codes: U8, scale: F32, round_bf16: bool) -> F32:
    """What the converter does: float32(weight) * scale, then perhaps bfloat16. `scale` is of codes' shape."""
    product = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float() * torch.from_numpy(scale.copy())
    return np.asarray((product.bfloat16().float() if round_bf16 else product).numpy())


def interesting_scales() -> F32:
    named = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        0.1,
        1 / 3,
        1e-45,
        1e-40,
        1.1754942e-38,
        1.1754944e-38,
        7e35,
        7.6e35,
        1e38,
        3.4028235e38,
    ]
    powers = [2.0**e for e in range(-149, 128, 5)]
    # products that are subnormal, or straddle the smallest normal number
    tiny = [1.7 * 2.0**e for e in range(-149, -115, 3)]
    rng = np.random.default_rng(1)
    anything = rng.integers(0, 0x7F800000, 300, dtype=np.uint32).view(np.float32)
    # as checkpoints have them: amax / 448
    usual = rng.lognormal(-8, 1, 100).astype(np.float32)
    ends = np.array([np.inf, np.nan], np.float32)
    return np.concatenate([np.array([*named, *powers, *tiny], np.float32), anything, usual, ends])


@pytest.mark.parametrize("round_bf16", [False, True])
@pytest.mark.parametrize("rows_a_block", [1, 2, 3])
def test_every_code_with_every_scale(round_bf16: bool, rows_a_block: int) -> None:
    """Blocks of 256 values take one path through the code, blocks of 512 and more another."""
    scales = interesting_scales()
    codes = np.tile(np.arange(256, dtype=np.uint8), (scales.size * rows_a_block, 1))
    out = np.empty(codes.shape, np.float32)
    kernels.e4m3_to_f32(codes, scales.reshape(-1, 1), 0, (rows_a_block, 256), out, round_bf16)
    spread = np.repeat(scales, rows_a_block)[:, None] * np.ones((1, 256), np.float32)
    assert_same_bits(out, torch_e4m3(codes, spread.astype(np.float32), round_bf16))


def test_the_values_of_all_codes() -> None:
    """By the format's definition, not by another implementation."""
    out = np.empty((1, 256), np.float32)
    one = np.ones((1, 1), np.float32)
    kernels.e4m3_to_f32(np.arange(256, dtype=np.uint8).reshape(1, 256), one, 0, (1, 256), out, False)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
        got = float(out[0, code])
        if code & 0x7F == 0x7F:
            assert math.isnan(got)
        else:
            assert got == (-value if code & 0x80 else value)
            assert math.copysign(1, got) == (-1 if code & 0x80 else 1)
    assert out[0, 0x7E] == 448
    assert out[0, 0x01] == 2**-9


@settings(max_examples=150, deadline=None)
@given(
    n_rows=st.integers(0, 150), n_cols=st.integers(1, 200), row0=st.integers(0, 300), block_rows=st.integers(1, 140),
    block_cols=st.integers(1, 140), round_bf16=st.booleans(), more=st.integers(0, 2), seed=st.integers(0, 1 << 32),
)  # fmt: skip
def test_any_rectangle_of_any_blocks(
    n_rows: int, n_cols: int, row0: int, block_rows: int, block_cols: int, round_bf16: bool, more: int, seed: int
) -> None:
    """Edge blocks may be partial, and rows may begin and end anywhere; nothing else is written."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n_rows, n_cols), dtype=np.uint8)
    n_blocks = -(-(row0 + n_rows) // block_rows) + more
    scale = rng.lognormal(-5, 2, (n_blocks, -(-n_cols // block_cols))).astype(np.float32)
    whole, out = guarded((n_rows, n_cols))
    kernels.e4m3_to_f32(codes, scale, row0, (block_rows, block_cols), out, round_bf16)
    r, c = (row0 + np.arange(n_rows)) // block_rows, np.arange(n_cols) // block_cols
    assert_same_bits(out, torch_e4m3(codes, scale[r][:, c], round_bf16))
    assert_guards_intact(whole)


@pytest.mark.parametrize(("row0", "n_rows"), [(0, 384), (0, 300), (1, 127), (1, 128), (127, 2), (100, 200), (256, 44)])
def test_slabs_of_128_blocks_are_those_of_the_whole(row0: int, n_rows: int) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (384, 320), dtype=np.uint8)
    scale = rng.lognormal(-8, 1, (3, 3)).astype(np.float32)
    whole, slab = np.empty(codes.shape, np.float32), np.empty((n_rows, 320), np.float32)
    kernels.e4m3_to_f32(codes, scale, 0, (128, 128), whole, True)
    kernels.e4m3_to_f32(codes[row0 : row0 + n_rows], scale, row0, (128, 128), slab, True)
    assert_same_bits(slab, whole[row0 : row0 + n_rows])


# ---------------------------------------------------------------- floats to float32

CODES16 = np.arange(1 << 16, dtype=np.uint16)


def widen(codes: npt.NDArray[Any], dtype: str, round_bf16: bool) -> F32:
    stored = codes.view(np.uint8).reshape(4, -1)
    whole, out = guarded((4, codes.size // 4))
    kernels.float_to_f32(stored, dtype, out, round_bf16)
    assert_guards_intact(whole)
    return np.asarray(out.reshape(-1))


def to_bf16(x: F32) -> F32:
    return np.asarray(torch.from_numpy(x.copy()).bfloat16().float().numpy())


def test_all_f16_codes() -> None:
    theirs = CODES16.view(np.float16).astype(np.float32)
    assert_same_bits(widen(CODES16, "F16", False), theirs)
    assert_same_bits(widen(CODES16, "F16", True), to_bf16(theirs))


@pytest.mark.parametrize("round_bf16", [False, True])
def test_all_bf16_codes(round_bf16: bool) -> None:
    out = widen(CODES16, "BF16", round_bf16)
    assert np.array_equal(bits(out), CODES16.astype(np.uint32) << 16)
    assert_same_bits(out, torch.from_numpy(CODES16.copy()).view(torch.bfloat16).float().numpy())


def interesting_floats() -> F32:
    """Every upper half, with the lower halves where rounding changes: exact, ties, and their neighbours."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (CODES16.astype(np.uint32)[:, None] << 16 | low).reshape(-1).view(np.float32)


def test_f32_is_taken_as_it_is_or_rounded_to_bf16() -> None:
    x = interesting_floats()
    assert np.array_equal(bits(widen(x, "F32", False)), bits(x))
    assert_same_bits(widen(x, "F32", True), to_bf16(x))


def test_quantizing_to_bf16_rounds_as_torch_does() -> None:
    x = interesting_floats()
    x = x[np.isfinite(x) & np.isfinite(to_bf16(x))]
    x = x[: x.size // 4 * 4].reshape(4, -1)
    ours = kernels.quantize(x, "BF16").view(np.uint16)
    assert np.array_equal(ours, torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy())


def test_quantizing_to_f16_rounds_as_numpy_does() -> None:
    x = interesting_floats()
    x = x[np.abs(x) < 65520]
    x = x[: x.size // 4 * 4].reshape(4, -1)
    assert np.array_equal(kernels.quantize(x, "F16").view(np.uint16), x.astype(np.float16).view(np.uint16))


def test_quantizing_to_f32_copies() -> None:
    x = interesting_floats()
    x = x[np.isfinite(x)].reshape(2, -1)
    assert kernels.quantize(x, "F32").tobytes() == x.tobytes()


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 4097, 8191, 8192, 12_287])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_first_nonfinite_names_row_and_column(at: int, bad: float) -> None:
    x = np.full((12, 1024), np.finfo(np.float32).max, np.float32)
    assert kernels.first_nonfinite(x) is None
    x.flat[-1] = np.nan
    x.flat[at] = bad
    assert kernels.first_nonfinite(x) == divmod(at, 1024)
    assert kernels.first_nonfinite(x[:0]) is None


# ---------------------------------------------------------------- blocks: ggml called directly

RNG = np.random.default_rng(11)
ROWS = RNG.standard_normal((5, 768)).astype(np.float32)
IMATRIX = RNG.lognormal(0, 1.5, 768).astype(np.float32)


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(kernels.wheel_library()))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def direct(lib: ctypes.CDLL, type_id: int, rows: F32, imatrix: F32 | None, n_bytes: int) -> bytes:
    """Call ggml_quantize_chunk directly."""
    out = ctypes.create_string_buffer(n_bytes)
    pointer = ctypes.POINTER(ctypes.c_float)
    weights = None if imatrix is None else imatrix.ctypes.data_as(pointer)
    n_rows, n_cols = (ctypes.c_int64(n) for n in rows.shape)
    start = ctypes.c_int64(0)
    n = lib.ggml_quantize_chunk(type_id, rows.ctypes.data_as(pointer), out, start, n_rows, n_cols, weights)
    assert n == n_bytes
    return out.raw


@pytest.mark.parametrize("weights", ["with an imatrix", "without"])
@pytest.mark.parametrize("name", TYPES)
def test_quantize_is_ggml_quantize_chunk(ggml: ctypes.CDLL, name: str, weights: str) -> None:
    imatrix = IMATRIX if weights == "with an imatrix" else None
    if imatrix is None and name in ABORT_WITHOUT_IMATRIX:
        with pytest.raises(KernelError) as e:
            kernels.quantize(ROWS, name, kernel="ggml")
        assert str(e.value) == f"{name} cannot be quantized without an importance matrix"
        return
    row_bytes = QTYPES[name].row_bytes(768)
    theirs = direct(ggml, QTYPES[name].id, ROWS, imatrix, 5 * row_bytes)
    ours = kernels.quantize(ROWS, name, imatrix, kernel="ggml")
    assert ours.dtype == np.uint8
    assert ours.shape == (5, row_bytes)
    assert ours.tobytes() == theirs
    # into an array passed in, between guards, and row by row
    whole, out = guarded((5, row_bytes), np.uint8)
    assert kernels.quantize(ROWS, name, imatrix, kernel="ggml", out=out) is out
    assert out.tobytes() == theirs
    assert_guards_intact(whole)
    single = b"".join(kernels.quantize(ROWS[i : i + 1], name, imatrix, kernel="ggml").tobytes() for i in range(5))
    assert single == theirs


@pytest.mark.parametrize("name", TYPES)
def test_no_rows_are_no_bytes(name: str) -> None:
    assert kernels.quantize(ROWS[:0], name, IMATRIX, kernel="ggml").shape == (0, QTYPES[name].row_bytes(768))


# ---------------------------------------------------------------- blocks read back by the gguf package

#: decoders for types that the gguf package cannot read; both have a float16 scale and fields of 1 or 2 bits
NOT_IN_GGUF = ("Q1_0", "Q2_0")


def foreign_dequantize(blocks: U8, name: str) -> F32:
    if name not in NOT_IN_GGUF:
        return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(QTYPES[name].id)), np.float32)
    each = blocks.reshape(-1, 18)
    scale = each[:, :2].copy().view(np.float16).astype(np.float32)
    unpacked = np.unpackbits(each[:, 2:], axis=1, bitorder="little").astype(np.float32)
    if name == "Q1_0":
        values = np.where(unpacked == 1, scale, -scale)
    else:
        values = (unpacked[:, 0::2] + 2 * unpacked[:, 1::2] - 1) * scale
    return np.asarray(values.reshape(blocks.shape[0], -1), np.float32)


@pytest.mark.parametrize("name", [n for n in TYPES if n != "F32"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dequantize_is_that_of_the_gguf_package(name: str) -> None:
    """Bit for bit, for blocks of weights and for arbitrary bytes."""
    made = kernels.quantize(ROWS, name, IMATRIX, kernel="ggml")
    anything = np.random.default_rng(5).integers(0, 256, (64, made.shape[1]), dtype=np.uint8)
    for blocks in (made, anything):
        whole, out = guarded((blocks.shape[0], 768))
        assert kernels.dequantize(blocks, name, 768, out) is out
        assert_guards_intact(whole)
        assert_same_bits(out, foreign_dequantize(blocks, name))
        assert np.array_equal(bits(kernels.dequantize(blocks, name, 768)), bits(out))


#: root mean square error of blocks of Gaussian weights, with all-ones importance: from, to. A type that gets better
#: without explanation is as wrong as one that gets worse
ERRORS = {
    "Q8_0": (0.004, 0.007), "Q6_K": (0.012, 0.025), "Q5_K": (0.025, 0.045), "Q4_K": (0.05, 0.09),
    "Q3_K": (0.10, 0.18), "Q2_K": (0.20, 0.33), "IQ4_NL": (0.06, 0.10), "IQ4_XS": (0.06, 0.10),
    "IQ3_S": (0.12, 0.20), "IQ3_XXS": (0.15, 0.25), "IQ2_S": (0.22, 0.34), "IQ2_XS": (0.25, 0.38),
    "IQ2_XXS": (0.30, 0.42), "IQ1_M": (0.40, 0.60), "IQ1_S": (0.40, 0.65),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_blocks_are_as_near_to_the_weights_as_their_bits_allow(name: str) -> None:
    blocks = kernels.quantize(ROWS, name, np.ones(768, np.float32), kernel="ggml")
    rmse = float(np.sqrt(np.mean((kernels.dequantize(blocks, name, 768) - ROWS) ** 2)))
    low, high = ERRORS[name]
    assert low < rmse < high


# ---------------------------------------------------------------- refusals, each with its sentence


def wrong_quantize() -> Iterator[tuple[str, dict[str, Any], str]]:
    rows = np.zeros((2, 256), np.float32)
    odd = np.zeros((2, 512), np.float32)[:, ::2]
    rows_are = "rows must be C-ordered float32 [n_rows, n_cols], not "
    yield "one dimension", {"rows": rows[0]}, rows_are + "float32 [256]"
    yield "three dimensions", {"rows": rows[None]}, rows_are + "float32 [1, 2, 256]"
    yield "float64", {"rows": rows.astype(np.float64)}, rows_are + "float64 [2, 256]"
    yield "float16", {"rows": rows.astype(np.float16)}, rows_are + "float16 [2, 256]"
    yield "strided", {"rows": odd}, rows_are + "float32 [2, 256], not C-ordered"
    yield "Fortran", {"rows": np.asfortranarray(rows)}, rows_are + "float32 [2, 256], not C-ordered"
    yield "no columns", {"rows": rows[:, :0].copy()}, rows_are + "float32 [2, 0]"
    yield (
        "partial block", {"rows": rows[:, :255].copy()},
        "a row of 255 values does not divide into Q4_K blocks of 256",
    )  # fmt: skip
    yield "unknown type", {"qtype_name": "Q4_KK"}, "unknown type 'Q4_KK' (did you mean Q4_K?)"
    yield "integer type", {"qtype_name": "I32"}, "I32 is not a type to quantize to"
    one = np.ones(256, np.float32)
    imatrix_is = "the imatrix must be C-ordered float32 [256], not "
    yield "imatrix short", {"imatrix": one[:255]}, imatrix_is + "float32 [255]"
    yield "imatrix matrix", {"imatrix": one.reshape(1, 256)}, imatrix_is + "float32 [1, 256]"
    yield "imatrix float64", {"imatrix": np.ones(256)}, imatrix_is + "float64 [256]"
    yield "imatrix strided", {"imatrix": np.ones(512, np.float32)[::2]}, imatrix_is + "float32 [256], not C-ordered"
    for bad in (np.nan, np.inf, -np.inf, -1e-30):
        values = one.copy()
        values[200] = bad
        yield f"imatrix {bad}", {"imatrix": values}, "the imatrix holds values that are NaN, Inf or negative"
    out_is = "out must be C-ordered uint8 [2, 144], not "
    yield "out short", {"out": np.zeros((2, 143), np.uint8)}, out_is + "uint8 [2, 143]"
    yield "out flat", {"out": np.zeros(288, np.uint8)}, out_is + "uint8 [288]"
    yield "out int8", {"out": np.zeros((2, 144), np.int8)}, out_is + "int8 [2, 144]"
    yield "out strided", {"out": np.zeros((2, 288), np.uint8)[:, ::2]}, out_is + "uint8 [2, 144], not C-ordered"
    yield (
        "kernel",
        {"kernel": "gmgl"},
        f"unknown kernels 'gmgl' (did you mean ggml?); on {os.uname().machine} there are {', '.join(HERE)}",
    )


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in wrong_quantize()])
def test_quantize_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as e:
        kernels.quantize(**{"rows": np.zeros((2, 256), np.float32), "qtype_name": "Q4_K", **change})
    assert str(e.value) == message
    assert e.value.exit_code == 9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_K", "IQ1_S"])
def test_weights_must_be_finite(name: str, bad: float) -> None:
    rows = np.zeros((3, 256), np.float32)
    rows[1, 17] = bad
    with pytest.raises(WeightError) as e:
        kernels.quantize(rows, name, np.ones(256, np.float32))
    assert str(e.value) == f"row 1, column 17 is {bad}"
    assert e.value.exit_code == 8


TOO_LARGE = {
    "F16": (65520, "one would be stored as Inf"),
    "BF16": (3.4e38, "one would be stored as Inf"),
    **{n: (1e10, "a block's scale is not valid") for n in ("Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K")},
    **{n: (1e10, "a block's scale is not valid") for n in ("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q1_0")},
    **{n: (1e10, "up to 1e+10") for n in GRID_TYPES},
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_weights_too_large_for_the_type(name: str) -> None:
    largest, why = TOO_LARGE[name]
    with pytest.raises(WeightError) as e:
        kernels.quantize(np.full((1, 256), largest, np.float32), name, np.ones(256, np.float32), kernel="ggml")
    assert str(e.value) == f"weights out of the range of {name}: {why}"


@pytest.mark.parametrize("name", GRID_TYPES)
def test_what_would_make_ggml_abort_is_an_error(name: str) -> None:
    """Finite values whose products overflow: ggml's search then finds NaN and ends the process."""
    for largest, importance in ((3.0, 3.4e38), (1e-4, 3.4e38), (6e4, 1e30), (1e6, 1e30)):
        rows = (ROWS[:2, :256] / np.abs(ROWS[:2, :256]).max() * np.float32(largest)).astype(np.float32)
        with pytest.raises(WeightError) as e:
            kernels.quantize(rows, name, np.full(256, importance, np.float32), kernel="ggml")
        assert str(e.value) == (
            f"weights of up to {np.abs(rows).max():.3g} with an importance of up to {importance:.3g} overflow the "
            f"search of {name}; is the importance matrix damaged?"
        )


@pytest.mark.parametrize("name", TYPES)
def test_degenerate_blocks_and_weights_are_quantized(ggml: ctypes.CDLL, name: str) -> None:
    """Zeros, constants, single values, subnormals, one huge outlier; with an imatrix of zeros or next to nothing."""
    n = 256
    one = np.zeros(n, np.float32)
    one[3] = 1
    blocks = np.stack(
        [
            np.zeros(n), np.full(n, -0.0), np.ones(n), np.full(n, -1e-30), np.full(n, 1e-45), one, -one,
            one * 1e4 + ROWS[0, :n], np.tile([1, -1], n // 2), ROWS[0, :n] * 1e-38, ROWS[0, :n] * 1e-8,
        ]
    ).astype(np.float32)  # fmt: skip
    row_bytes = QTYPES[name].row_bytes(n)
    half = IMATRIX[:n].copy()
    half[:128] = 0
    if name == "MXFP4":
        # the exponent that ggml gives the smallest weights wraps around, and its own check refuses the block
        with pytest.raises(WeightError) as e:
            kernels.quantize(blocks[9:10], name)
        assert str(e.value) == "weights out of the range of MXFP4: a block's scale is not valid"
        blocks = np.delete(blocks, 9, axis=0)
    for imatrix in (np.zeros(n, np.float32), np.full(n, 1e-45, np.float32), half, np.full(n, 1e20, np.float32), one):
        made = kernels.quantize(blocks, name, imatrix, kernel="ggml")
        assert made.tobytes() == direct(ggml, QTYPES[name].id, blocks, imatrix, len(blocks) * row_bytes)
        if name != "F32":
            assert np.isfinite(kernels.dequantize(made, name, n)).all()


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(TYPES), seed=st.integers(0, 1 << 32), low=st.floats(-45, 38), high=st.floats(-45, 38),
    low_w=st.floats(-45, 38), high_w=st.floats(-45, 38), zeros=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
)  # fmt: skip
def test_no_finite_input_ends_the_process(
    name: str, seed: int, low: float, high: float, low_w: float, high_w: float, zeros: float
) -> None:
    """Weights and importance over the whole range of float32: blocks of the right size, or an error."""
    rng = np.random.default_rng(seed)
    rows = 10 ** rng.uniform(min(low, high), max(low, high), (2, 256)) * rng.choice([-1, 1], (2, 256))
    imatrix = 10 ** rng.uniform(min(low_w, high_w), max(low_w, high_w), 256)
    imatrix[rng.random(256) < zeros] = 0
    why = ""
    try:
        made = kernels.quantize(rows.astype(np.float32), name, imatrix.astype(np.float32), kernel="ggml")
        assert made.shape == (2, QTYPES[name].row_bytes(256))
    except WeightError as e:
        why = str(e)
    if why:
        assert why.startswith((f"weights out of the range of {name}: ", "weights of up to "))
        assert name == "MXFP4" or max(np.abs(rows).max(), imatrix.max()) > 1000


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ1_S", "IQ2_XXS"])
def test_is_valid(name: str) -> None:
    made = kernels.quantize(ROWS, name, IMATRIX, kernel="ggml")
    assert kernels.is_valid(made, name)
    made[3] = 0x7C  # a float16 of 0x7c7c is a NaN
    assert not kernels.is_valid(made, name)


def test_dequantize_refuses() -> None:
    blocks = np.zeros((2, 144), np.uint8)
    refused: list[tuple[Any, Any, str]] = [
        (blocks[0], None, "blocks must be C-ordered uint8 [-1, 144], not uint8 [144]"),
        (blocks[:, :100].copy(), None, "blocks must be C-ordered uint8 [2, 144], not uint8 [2, 100]"),
        (blocks.astype(np.int16), None, "blocks must be C-ordered uint8 [2, 144], not int16 [2, 144]"),
        (blocks[::-1], None, "blocks must be C-ordered uint8 [2, 144], not uint8 [2, 144], not C-ordered"),
        (blocks, np.zeros((3, 256), np.float32), "out must be C-ordered float32 [2, 256], not float32 [3, 256]"),
        (blocks, np.zeros((2, 256)), "out must be C-ordered float32 [2, 256], not float64 [2, 256]"),
    ]
    for given_, out, message in refused:
        with pytest.raises(KernelError) as e:
            kernels.dequantize(given_, "Q4_K", 256, out)
        assert str(e.value) == message
    with pytest.raises(KernelError) as e:
        kernels.dequantize(np.zeros((1, 8), np.uint8), "I64", 1)
    assert str(e.value) == "ggml cannot dequantize I64"
    with pytest.raises(KernelError) as e:
        kernels.dequantize(blocks, "Q4_K", 200)
    assert str(e.value) == "a row of 200 values does not divide into Q4_K blocks of 256"


def wrong_e4m3() -> Iterator[tuple[str, dict[str, Any], str]]:
    src, out = np.zeros((4, 8), np.uint8), np.zeros((4, 8), np.float32)
    yield "src int8", {"src": src.astype(np.int8)}, "src must be C-ordered uint8 [4, 8], not int8 [4, 8]"
    yield (
        "src strided", {"src": np.zeros((4, 16), np.uint8)[:, ::2]},
        "src must be C-ordered uint8 [4, 8], not uint8 [4, 8], not C-ordered",
    )  # fmt: skip
    yield "scale float64", {"scale": np.ones((1, 1))}, "scale must be C-ordered float32 [1, 1], not float64 [1, 1]"
    yield "out float64", {"out": np.zeros((4, 8))}, "out must be C-ordered float32 [4, 8], not float64 [4, 8]"
    yield "out short", {"out": out[:3]}, "out must be C-ordered float32 [4, 8], not float32 [3, 8]"
    yield (
        "out strided", {"out": np.zeros((4, 16), np.float32)[:, ::2]},
        "out must be C-ordered float32 [4, 8], not float32 [4, 8], not C-ordered",
    )  # fmt: skip
    yield "rows beyond", {"row0": 125}, "rows up to 129 of 8 need (2, 1) scales, there are (1, 1)"
    yield "columns beyond", {"block": (128, 4)}, "rows up to 4 of 8 need (1, 2) scales, there are (1, 1)"
    yield "too many", {"scale": np.ones((1, 2), np.float32)}, "rows up to 4 of 8 need (1, 1) scales, there are (1, 2)"
    shapes = "src and scale must be matrices, row0 and block counts, not uint8 [4, 8], float32 [1, 1], "
    yield "negative row", {"row0": -1}, shapes + "-1, (128, 128)"
    yield "no block", {"block": (0, 128)}, shapes + "0, (0, 128)"
    yield (
        "vector", {"src": src[0], "out": out[0]},
        "src and scale must be matrices, row0 and block counts, not uint8 [8], float32 [1, 1], 0, (128, 128)",
    )  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in wrong_e4m3()])
def test_e4m3_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {
        "src": np.zeros((4, 8), np.uint8), "scale": np.ones((1, 1), np.float32), "row0": 0, "block": (128, 128),
        "out": np.zeros((4, 8), np.float32), "round_bf16": True,
    }  # fmt: skip
    with pytest.raises(KernelError) as e:
        kernels.e4m3_to_f32(**{**arguments, **change})
    assert str(e.value) == message


def test_float_to_f32_refuses() -> None:
    out = np.zeros((2, 4), np.float32)
    refused: list[tuple[Any, str, Any, str]] = [
        (np.zeros((2, 8), np.uint8), "Q8_0", out, "Q8_0 is not a float type"),
        (np.zeros((2, 7), np.uint8), "F16", out, "src must be C-ordered uint8 [2, 8], not uint8 [2, 7]"),
        (np.zeros((2, 8), np.uint8), "F32", out, "src must be C-ordered uint8 [2, 16], not uint8 [2, 8]"),
        (np.zeros((2, 4), np.uint16), "BF16", out, "src must be C-ordered uint8 [2, 8], not uint16 [2, 4]"),
        (np.zeros((2, 8), np.uint8), "BF16", out[0], "out must be a matrix, not float32 [4]"),
        (
            np.zeros((2, 8), np.uint8), "BF16", np.zeros((2, 8), np.float32)[:, ::2],
            "out must be C-ordered float32 [2, 4], not float32 [2, 4], not C-ordered",
        ),
    ]  # fmt: skip
    for src, dtype, to, message in refused:
        with pytest.raises(KernelError) as e:
            kernels.float_to_f32(src, dtype, to, False)
        assert str(e.value) == message


def test_the_compiled_kernels_check_for_themselves() -> None:
    """No call can read or write outside an array, nor write to a copy that is thrown away."""
    src, one, out = np.zeros((4, 8), np.uint8), np.ones((1, 1), np.float32), np.zeros((4, 8), np.float32)
    for args, message in (
        ((src, one, 0, 0, 128, False, out), "e4m3_to_f32: the blocks are empty"),
        ((src, one, 0, 1 << 63, 128, False, out), "e4m3_to_f32: the blocks are too large"),
        ((src, one, 0, 128, (1 << 64) - 1, False, out), "e4m3_to_f32: the blocks are too large"),
        ((src, one, 0, 128, 128, False, out[:2]), "e4m3_to_f32: out has not the shape of src"),
        ((src, one, 0, 128, 4, False, out), "e4m3_to_f32: scale has not a column for each block"),
        ((src, one, 125, 128, 128, False, out), "e4m3_to_f32: scale has too few rows"),
        ((src, one, (1 << 64) - 1, 128, 128, False, out), "e4m3_to_f32: scale has too few rows"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            _native.e4m3_to_f32(*args)
    no_float32: tuple[Any, ...] = (out.astype(np.float64), np.zeros((4, 16), np.float32)[:, ::2])
    for wrong in no_float32:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _native.e4m3_to_f32(src, one, 0, 128, 128, False, wrong)
    codes, flat = np.zeros(4, np.uint16), np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"^bf16_to_f32: out has not the length of src$"):
        _native.bf16_to_f32(codes, flat)
    with pytest.raises(ValueError, match=r"^f16_to_f32: out has not the length of src$"):
        _native.f16_to_f32(codes, False, flat)
    with pytest.raises(ValueError, match=r"^f32_to_f32: out has not the length of src$"):
        _native.f32_to_f32(codes.view(np.float16).astype(np.float32), False, flat)


# ---------------------------------------------------------------- which kernel

NEEDS_PINNED = (
    "IQ1_M needs the ggml of the pinned llama.cpp, since the wheel's gives other bytes for it; "
    "run: quantkit toolchain install"
)


@pytest.fixture
def no_toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of the missing ggml."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANTKIT_KERNELS", raising=False)
    folder = toolchain.root() / "bin"
    folder.mkdir(parents=True)
    return folder / "libggml-base.so"


@pytest.fixture
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that can run none of quantkit's own kernels."""
    monkeypatch.setattr(own, "OWN", {})


@pytest.mark.usefixtures("no_toolchain", "plain_processor")
def test_iq1_m_is_refused_without_the_pinned_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError) as e:
        kernels.quantize(ROWS, "IQ1_M", IMATRIX)
    assert str(e.value) == NEEDS_PINNED
    assert e.value.exit_code == 9
    with pytest.raises(KernelError) as e:
        kernels.quantize(ROWS, "IQ1_S", IMATRIX, kernel="ggml-pinned")
    assert str(e.value) == "the kernel 'ggml-pinned' needs the toolchain; run: quantkit toolchain install"
    monkeypatch.setenv("QUANTKIT_KERNELS", "ggml-pinned")
    with pytest.raises(KernelError) as e:
        kernels.quantize(ROWS, "Q4_K", IMATRIX)
    assert str(e.value) == "the kernel 'ggml-pinned' needs the toolchain; run: quantkit toolchain install"


def test_iq1_m_on_the_command_line(quantkit: Any, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(
        "name: one\narch: [deepseek2]\nfile_type: IQ1_M\nrules:\n"
        '  - {match: "*_exps.weight", type: IQ1_M, why: t}\n  - {match: "*", type: BF16, why: t}\n'
    )
    done = quantkit(
        "build", tiny_v3, "-o", tmp_path / "out.gguf", "--recipe", recipe, "--imatrix", tiny_imatrix,
        "--pre", "deepseek-v3", "--engine", "native", "--threads", "1", "--quiet",
        env={"QUANTKIT_CACHE": str(tmp_path / "no toolchain here")},
    )  # fmt: skip
    if kernels.OWN:
        assert done.returncode == 0
        assert (tmp_path / "out.gguf").exists()
        return
    assert done.returncode == 9
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"{NEEDS_PINNED}\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_which_kernel_is_used(monkeypatch: pytest.MonkeyPatch, no_toolchain: Path) -> None:
    best = next(iter(kernels.OWN), "ggml")
    for name in TYPES:
        sets = [kernel for kernel, types in kernels.OWN.items() if name in types]
        if sets or name not in kernels.DIFFERS_IN_WHEEL:
            assert kernels.select(QTYPES[name]) == (sets[0] if sets else "ggml")
    assert kernels.select(QTYPES["Q4_K"]) == best
    assert kernels.select(QTYPES["TQ1_0"]) == "ggml"
    no_toolchain.write_text("")  # now there is one
    assert kernels.select(QTYPES["Q4_K"], "ggml-pinned") == "ggml-pinned"
    monkeypatch.setenv("QUANTKIT_KERNELS", "ggml-pinned")
    assert kernels.select(QTYPES["Q4_K"]) == "ggml-pinned"
    # an argument takes precedence over the environment, and an empty variable counts as unset
    assert kernels.select(QTYPES["IQ1_M"], "ggml") == "ggml"
    monkeypatch.setenv("QUANTKIT_KERNELS", "")
    assert kernels.select(QTYPES["Q4_K"]) == best
    monkeypatch.setenv("QUANTKIT_KERNELS", "sse9")
    with pytest.raises(KernelError) as e:
        kernels.select(QTYPES["Q4_K"])
    assert str(e.value) == f"unknown kernels 'sse9'; on {os.uname().machine} there are {', '.join(HERE)}"


@pytest.mark.usefixtures("no_toolchain")
def test_kernels_of_another_processor() -> None:
    other = "neon" if ON_X86 else "avx2"
    with pytest.raises(KernelError) as e:
        kernels.select(QTYPES["Q4_K"], other)
    assert str(e.value) == (
        f"the kernels '{other}' are not for {os.uname().machine}, where there are {', '.join(HERE)}"
    )


@pytest.mark.skipif("avx512" in kernels.OWN or not ON_X86, reason="needs an x86 processor without AVX-512")
def test_kernels_of_a_better_processor() -> None:
    with pytest.raises(KernelError) as e:
        kernels.select(QTYPES["Q4_K"], "avx512")
    assert str(e.value) == (
        f"this processor cannot run the kernels 'avx512'; it can run {', '.join((*kernels.OWN, 'ggml'))}"
    )


@pytest.mark.parametrize(
    "command", [("build", "none", "-o", "o.gguf", "-r", "Q4_K_M"), ("demo",), ("dequant", "a", "b")]
)
def test_kernels_that_are_not_here_are_refused_before_anything_else(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTKIT_KERNELS", "bogus")
    done = CliRunner().invoke(cli, command)
    assert isinstance(done.exception, KernelError)
    assert str(done.exception) == (
        f"QUANTKIT_KERNELS: unknown kernels 'bogus'; on {os.uname().machine} there are {', '.join(HERE)}"
    )
    assert (done.output, list(tmp_path.iterdir())) == ("", [])


def test_the_doctor_says_which_variable_to_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_KERNELS", "bogus")
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert done.exit_code == 1
    assert [p for p in json.loads(done.stdout)["problems"] if p["severity"] == "error"] == [
        {
            "severity": "error",
            "what": f"QUANTKIT_KERNELS: unknown kernels 'bogus'; on {os.uname().machine} there are {', '.join(HERE)}",
            "fix": "unset QUANTKIT_KERNELS",
        }
    ]


def test_a_set_without_the_type() -> None:
    for kernel in kernels.OWN:
        with pytest.raises(KernelError) as e:
            kernels.select(QTYPES["TQ1_0"], kernel)
        assert str(e.value) == f"the kernels '{kernel}' have none for TQ1_0"


@pytest.mark.usefixtures("no_toolchain")
def test_active_says_what_is_used_for_each_type(ggml: ctypes.CDLL) -> None:
    ggml.ggml_version.restype = ctypes.c_char_p
    wheel = f"ggml {ggml.ggml_version().decode()}"
    for name, said in kernels.active().items():
        ours = next((kernel for kernel, types in kernels.OWN.items() if name in types), None)
        assert said == (ours or (f"none: {NEEDS_PINNED}" if name == "IQ1_M" else wheel))


@pytest.mark.usefixtures("plain_processor")
def test_a_library_that_is_none(no_toolchain: Path) -> None:
    no_toolchain.write_text("not a library")
    with pytest.raises(KernelError) as e:
        kernels.quantize(ROWS, "IQ1_M", IMATRIX)
    assert str(e.value) == f"{no_toolchain}: not a usable ggml library: {no_toolchain}: file too short"
    no_toolchain.unlink()
    no_toolchain.symlink_to(_native.__file__)
    with pytest.raises(KernelError) as e:
        kernels.quantize(ROWS, "IQ1_M", IMATRIX)
    assert str(e.value) == (
        f"{no_toolchain}: not a usable ggml library: {_native.__file__}: undefined symbol: ggml_quantize_chunk"
    )


def test_a_missing_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ggml_room, "find_spec", lambda _name: None)
    with pytest.raises(KernelError) as e:
        kernels.wheel_library()
    assert str(e.value) == "the package libggml-python is not installed; run: pip install libggml-python"

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(ggml_room, "find_spec", lambda _name: Spec)
    with pytest.raises(KernelError) as e:
        kernels.wheel_library()
    assert str(e.value) == f"{tmp_path}: the package libggml-python holds no libggml-base; reinstall it"


# ---------------------------------------------------------------- the wheel's ggml and the pinned one


def fp8_born(law: str) -> F32:
    """Weights as in an FP8 checkpoint: few distinct values per block, so exact ties abound."""
    rng = np.random.default_rng(17)
    if law == "every code":
        codes = rng.integers(0, 256, (64, 1024), dtype=np.uint8)
    else:
        # the narrower the range, the fewer codes
        values = (
            rng.standard_normal((64, 1024)).astype(np.float32) * {"gauss": 100, "narrow": 3, "few codes": 0.01}[law]
        )
        codes = torch.from_numpy(values.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
    out = np.empty(codes.shape, np.float32)
    scale = rng.uniform(1e-4, 3e-4, (1, 8)).astype(np.float32)
    kernels.e4m3_to_f32(codes, scale, 0, (128, 128), out, True)
    return out


LAWS = ("gauss", "narrow", "few codes", "every code")


def imatrices() -> dict[str, F32 | None]:
    uneven = np.random.default_rng(23).lognormal(0, 2, 1024).astype(np.float32)
    holes = uneven.copy()
    holes[::3] = 0
    return {"none": None, "ones": np.ones(1024, np.float32), "uneven": uneven, "with zeros": holes}


@pytest.mark.tools
@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", [n for n in TYPES if n not in kernels.DIFFERS_IN_WHEEL])
def test_the_wheel_gives_the_bytes_of_the_pinned_ggml(name: str) -> None:
    for law in LAWS:
        rows = fp8_born(law)
        for weights, imatrix in imatrices().items():
            if imatrix is None and name in ABORT_WITHOUT_IMATRIX:
                continue
            ours = kernels.quantize(rows, name, imatrix, kernel="ggml")
            theirs = kernels.quantize(rows, name, imatrix, kernel="ggml-pinned")
            wrong = np.flatnonzero((ours != theirs).reshape(-1, QTYPES[name].block_bytes).any(axis=1))
            assert wrong.size == 0, f"{law}, imatrix {weights}: {wrong.size} blocks differ, the first {wrong[0]}"


@pytest.mark.tools
@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", TYPES)
def test_the_pinned_ggml_reads_blocks_alike(name: str) -> None:
    if name == "F32":
        return
    blocks = np.random.default_rng(5).integers(0, 256, (64, QTYPES[name].row_bytes(768)), dtype=np.uint8)
    out = np.empty((64, 768), np.float32)
    library = toolchain.ggml_library()
    assert library is not None
    ggml_room.load(library).traits(QTYPES[name].id).contents.to_float(blocks.ctypes.data, out.ctypes.data, out.size)
    assert_same_bits(out, kernels.dequantize(blocks, name, 768))


@pytest.mark.tools
@pytest.mark.usefixtures("tools", "plain_processor")
def test_iq1_m_uses_the_pinned_ggml() -> None:
    """Its search, rewritten since the wheel's version, resolves exact ties differently."""
    rows, ones = fp8_born("few codes"), np.ones(1024, np.float32)
    assert kernels.select(QTYPES["IQ1_M"]) == "ggml-pinned"
    made = kernels.quantize(rows, "IQ1_M", ones).tobytes()
    library = toolchain.ggml_library()
    assert library is not None
    lib = ctypes.CDLL(str(library))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    assert made == direct(lib, QTYPES["IQ1_M"].id, rows, ones, 64 * QTYPES["IQ1_M"].row_bytes(1024))
    assert made != kernels.quantize(rows, "IQ1_M", ones, kernel="ggml").tobytes()
    assert kernels.active()["IQ1_M"] == f"ggml-pinned {ggml_room.load(library).version}"

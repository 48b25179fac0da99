"""quantkit's own kernels against ggml's functions, byte by byte, for every instruction set this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_kernels
import laws
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import kernels
from quantkit.base.errors import QuantkitError
from quantkit.gguf.types import ABORT_WITHOUT_IMATRIX, QTYPES

F32 = npt.NDArray[np.float32]
SETS = list(kernels.OWN)
TYPES = sorted(set().union(*kernels.OWN.values()))
PAIRS = [(name, kernel) for name in TYPES for kernel in SETS if name in kernels.OWN[kernel]]
#: weights per type that each instruction set is compared on; fewer under sanitizers (tests/tools/sanitize.py)
N_WEIGHTS = int(os.environ.get("QUANTKIT_TEST_WEIGHTS", "10_000_000"))

pytestmark = pytest.mark.skipif(not SETS, reason="this processor has none of the instruction sets")


def reference(name: str) -> str:
    """The ggml that defines the bytes."""
    return "ggml-pinned" if name in kernels.DIFFERS_IN_WHEEL else "ggml"


def outcome(x: F32, name: str, importance: F32 | None, kernel: str) -> bytes | str:
    """The blocks, or the message of their refusal."""
    try:
        return kernels.quantize(x, name, importance, kernel).tobytes()
    except QuantkitError as e:
        return f"{type(e).__name__}: {e}"


def differing(a: bytes, b: bytes, name: str) -> list[int]:
    """The first blocks that differ."""
    size = QTYPES[name].block_bytes
    x, y = (np.frombuffer(blocks, np.uint8).reshape(-1, size) for blocks in (a, b))
    found: list[int] = np.flatnonzero((x != y).any(1)).tolist()
    return found[:5]


def compare(x: F32, name: str, importance: F32 | None, kernel: str, what: str, expected: bytes | str) -> None:
    got = outcome(x, name, importance, kernel)
    if isinstance(expected, bytes) and isinstance(got, bytes):
        assert got == expected, f"{name} {kernel} {what}: blocks {differing(expected, got, name)} differ"
    else:
        assert got == expected, f"{name} {kernel} {what}"


@pytest.mark.parametrize("name", TYPES)
def test_every_law(name: str) -> None:
    """All laws of weights under all laws of importance, 10^7 weights or more, in the shape of real rows."""
    rng = np.random.default_rng(sum(name.encode()))
    n_cells = len(laws.WEIGHTS) * len(laws.IMPORTANCE)
    n_cols = 2304  # 9 super-blocks: lanes wrap from row to row
    n_rows = -(-N_WEIGHTS // (n_cells * n_cols))
    seen = 0
    for weights, importance, x, w in laws.cells(rng, n_rows, n_cols):
        if w is None and name in ABORT_WITHOUT_IMATRIX:
            continue
        expected = outcome(x, name, w, reference(name))
        for kernel in SETS:
            if name in kernels.OWN[kernel]:
                compare(x, name, w, kernel, f"{weights}, {importance}", expected)
        seen += x.size
    assert seen >= 0.89 * N_WEIGHTS


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_every_tail(name: str, kernel: str) -> None:
    """Numbers of rows and columns that fill no vector; nothing is written beyond the blocks."""
    rng = np.random.default_rng(5)
    qt = QTYPES[name]
    for n_rows, n_blocks in [(1, 1), (1, 3), (3, 1), (2, 5), (7, 3), (17, 1), (5, 7), (1, 33)]:
        x = laws.WEIGHTS["fp8 normal"](rng, (n_rows, n_blocks * qt.block))
        w = laws.IMPORTANCE["lognormal 1"](rng, x.shape[1])
        for importance in (w, None):
            if importance is None and name in ABORT_WITHOUT_IMATRIX:
                continue
            expected = kernels.quantize(x, name, importance, reference(name))
            guarded = np.full(expected.size + 256, 0xA5, np.uint8)
            out = guarded[128 : 128 + expected.size].reshape(expected.shape)
            kernels.quantize(x, name, importance, kernel, out)
            assert out.tobytes() == expected.tobytes()
            assert (guarded[:128] == 0xA5).all()
            assert (guarded[128 + expected.size :] == 0xA5).all()


def any_floats(seed: int, shape: tuple[int, int]) -> F32:
    """Random bit patterns: every exponent as likely as any other. NaN and Inf become zeros."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint32)
    x = bits.view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0))


@pytest.mark.parametrize("name", TYPES)
@given(seed=st.integers(0, 2**32), narrow=st.integers(0, 30), weighted=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_bits(name: str, seed: int, narrow: int, weighted: bool) -> None:
    """Exponents spread over up to 2^narrow: the same bytes as ggml's, or the same refusal."""
    x = any_floats(seed, (3, 4 * 256))
    spread = np.float32(2.0) ** np.clip(np.log2(np.abs(x) + 1e-45), -narrow, narrow)
    x = np.ascontiguousarray(np.copysign(spread, x), np.float32)
    w = np.abs(any_floats(seed + 1, (1, x.shape[1]))[0])
    importance = np.minimum(w, np.float32(2.0**narrow)) if weighted or name in ABORT_WITHOUT_IMATRIX else None
    expected = outcome(x, name, importance, reference(name))
    for kernel in SETS:
        if name in kernels.OWN[kernel]:
            compare(x, name, importance, kernel, f"seed {seed}", expected)


@pytest.mark.parametrize("name", TYPES)
def test_random_bits_of_every_kind(name: str) -> None:
    """A short run of the fuzzer, which reports how to reproduce a difference."""
    for number in range(20):
        try:
            fuzz_kernels.run(name, 1, number)
        except fuzz_kernels.DifferenceError as e:
            pytest.fail(f"{fuzz_kernels.again(name, 1, number)}: {e}")


def test_threads_give_the_same() -> None:
    rng = np.random.default_rng(3)
    jobs = []
    for name, kernel in PAIRS:
        x, w = laws.WEIGHTS["fp8 normal"](rng, (8, 1024)), laws.IMPORTANCE["real"](rng, 1024)
        jobs.append((x, name, w, kernel))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: outcome(*job), jobs * 4))
    assert together == [outcome(*job) for job in jobs] * 4


@pytest.mark.parametrize("kernel", [*SETS, "ggml"])
def test_the_kernel_that_is_forced_runs(kernel: str, tmp_path: Path) -> None:
    """As `active` reports it, in a separate process."""
    code = "from quantkit import gguf, kernels; print(kernels.select(gguf.types.QTYPES['Q4_K']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"QUANTKIT_KERNELS": kernel}, capture_output=True, text=True,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{kernel}\n", "")


# ---------------------------------------------------------------- FP8 to a float file


@pytest.mark.parametrize("kernel", SETS)
@pytest.mark.parametrize("name", ["BF16", "F32"])
@pytest.mark.parametrize(
    "shape", [(3, 7168), (130, 1000), (257, 129), (5, 1), (2304, 4096)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
def test_fp8_to_a_float_file_equals_torch(
    shape: tuple[int, int], name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every code, under scales of every size with finite products. The last shape is written past the caches."""
    monkeypatch.setenv("QUANTKIT_KERNELS", kernel)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    scale = np.exp(rng.uniform(-103, 82, (-(-shape[0] // 128), -(-shape[1] // 128)))).astype(np.float32)
    out = np.empty((shape[0], shape[1] * (2 if name == "BF16" else 4)), np.uint8)
    rows = kernels.StoredRows(codes, "F8_E4M3", shape[1], np.zeros(1, np.uint64), scale, (128, 128), True)
    kernels.quantize_stored(rows, name, None, out)
    spread = torch.from_numpy(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    expected = (torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * spread).bfloat16()
    got = torch.from_numpy(out)
    assert torch.equal(got, (expected if name == "BF16" else expected.float()).view(torch.uint8))


def scales_of_every_size() -> F32:
    """Scales whose product with 448 is still a bfloat16, and those near subnormal or too large products."""
    rng = np.random.default_rng(4)
    tiny, most = np.float32(2.0**-126), np.float32(3.3895314e38 / 448)
    edges = [tiny * np.float32(2.0**k) for k in range(-23, 12)] + [most * np.float32(2.0**-k) for k in range(3)]
    around = [np.nextafter(e, np.float32(side), dtype=np.float32) for e in edges for side in (0, 1e38)]
    spread = np.exp(rng.uniform(-103, 82, 200)).astype(np.float32)
    scales: F32 = np.array([*edges, *around, 1.0, 1.5, 1.75, 1 + 2.0**-8, *spread], np.float32)
    in_range: F32 = scales[(scales > 0) & (scales <= most)]
    return in_range


@pytest.mark.parametrize("kernel", SETS)
@pytest.mark.parametrize(("block_cols", "first"), [(128, 0), (64, 5), (100, 17), (300, 0), (16, 3)])
def test_fp8_to_bfloat16_is_every_code_times_every_scale(
    block_cols: int, first: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 20 rows with scales of one magnitude, so that a row on the slow path does not affect the others."""
    monkeypatch.setenv("QUANTKIT_KERNELS", kernel)
    rng, scales = np.random.default_rng(5), scales_of_every_size()
    n_cols, block_rows = 300, 20
    scale = scales[:, None] * np.array([1, 1, 0.75, 0.5] * 5, np.float32)[None, : -(-n_cols // block_cols)]
    codes = np.concatenate([np.arange(256, dtype=np.uint8)] * (len(scale) * block_rows * n_cols // 256 + 1))
    codes[(codes & 0x7F) == 0x7F] = 0x80
    whole = codes[: len(scale) * block_rows * n_cols].reshape(-1, n_cols)[:, rng.permutation(n_cols)]
    stored = np.ascontiguousarray(whole[first:])
    out = np.empty((len(stored), 2 * n_cols), np.uint8)
    rows = kernels.StoredRows(
        stored, "F8_E4M3", n_cols, np.array([first], np.uint64), scale, (block_rows, block_cols), True
    )
    kernels.quantize_stored(rows, "BF16", None, out)
    spread = torch.from_numpy(scale).repeat_interleave(block_rows, 0).repeat_interleave(block_cols, 1)[:, :n_cols]
    expected = (torch.from_numpy(whole).view(torch.float8_e4m3fn).float() * spread).bfloat16()[first:]
    assert np.array_equal(out, expected.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("kernel", SETS)
@pytest.mark.parametrize("bad", ["NaN code", "scale too large", "NaN scale", "negative scale"])
def test_fp8_to_bfloat16_of_what_no_table_holds(bad: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad code or scale among 32 rows: refused if a value is not finite, and correct if it is only unusual."""
    monkeypatch.setenv("QUANTKIT_KERNELS", kernel)
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 0x7F, (32, 512), dtype=np.uint8)
    scale = np.full((1, 4), 0.01, np.float32)
    if bad == "NaN code":
        codes[31, 511] = 0xFF
    else:
        codes[3, 300] = 0x7E
        scale[0, 2] = {"scale too large": 1e36, "NaN scale": np.nan, "negative scale": -0.01}[bad]
    out = np.empty((32, 1024), np.uint8)
    rows = kernels.StoredRows(codes, "F8_E4M3", 512, np.zeros(1, np.uint64), scale, (128, 128), True)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    expected = (values * torch.from_numpy(scale).repeat_interleave(128, 1)).bfloat16()
    if bad == "negative scale":
        kernels.quantize_stored(rows, "BF16", None, out)
        assert np.array_equal(out, expected.view(torch.uint8).numpy())
        return
    with pytest.raises(kernels.UnfitWeightError) as e:
        kernels.quantize_stored(rows, "BF16", None, out)
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(expected.float().numpy()))[0])
    assert (e.value.row, e.value.column) == at
    assert str(e.value) == f"row {at[0]}, column {at[1]} is {'inf' if bad == 'scale too large' else 'nan'}"

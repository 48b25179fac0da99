"""Rounding by torch: nearly all blocks are the CPU's, where they are not they are as good, and what it cannot do is
done on the CPU. On the CPU here; what differs on a GPU is the order of sums in matrix products."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from covariances import correlated, output_error, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rounding import TYPES, odd_rows

from quantkit import kernels
from quantkit.base.errors import KernelError
from quantkit.gguf.types import QTYPES
from quantkit.kernels import F32, U8, dequantize
from quantkit.rounding import Factor, Options, factor, quantize
from quantkit.rounding import rounder as on_cpu
from quantkit.rounding.on_torch import devices, rounder
from quantkit.rounding.on_torch import factor as factors
from quantkit.rounding.on_torch import rows as device_rows
from quantkit.rounding.policy import FEEDBACK_TYPES

CPU = torch.device("cpu")
N_COLS, N_ROWS = 512, 32
PLAIN, SEARCH = Options(search=False), Options()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def both(n: int) -> tuple[Factor, factors.DeviceFactor]:
    h = correlated(n)
    return factor(h), factors.factor(h, CPU)


def heavy(n_rows: int, n_cols: int, seed: int, freedom: float) -> F32:
    """Rows of Student's t: with 3 degrees of freedom a few weights are far larger than all others."""
    return (np.random.default_rng(seed).standard_t(freedom, (n_rows, n_cols)) * 0.01).astype(np.float32)


def blocks_of(made: U8, name: str) -> U8:
    return made.reshape(len(made), -1, QTYPES[name].block_bytes)


def errors(rows: F32, blocks: U8, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Of each row."""
    h = both(rows.shape[1])[0].h
    return np.array([output_error(rows[i : i + 1], blocks[i : i + 1], name, h) for i in range(len(rows))])


def test_every_type_with_feedback_has_a_way_on_a_device() -> None:
    assert set(device_rows.KINDS) == FEEDBACK_TYPES


@pytest.mark.parametrize("n", [32, 256, 800])
def test_the_factor_is_the_cpus_but_for_the_last_place(n: int) -> None:
    on_cpu, on_device = both(n)
    found = on_device.u.numpy()
    assert np.array_equal(on_device.importance, on_cpu.importance)
    assert not np.tril(found, -1).any()
    assert (np.abs(found - on_cpu.u) <= 2 * np.spacing(np.abs(on_cpu.u))).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_factor_of_tiny_and_large_second_moments_is_the_cpus(scale: float) -> None:
    h = correlated(64) * np.float32(scale)
    assert np.allclose(factors.factor(h, CPU).u.numpy(), factor(h).u, rtol=1e-6, atol=0)


def not_definite() -> F32:
    h = np.eye(40, dtype=np.float32)
    h[30, 29] = h[29, 30] = 0.9999
    h[31, 30] = h[30, 31] = 0.9999
    return h


@pytest.mark.parametrize(
    ("h", "damp"),
    [
        (np.zeros((32, 32), np.float32), 0.01),
        (np.full((32, 32), np.nan, np.float32), 0.01),
        (-np.eye(32, dtype=np.float32), 0.01),
        (np.triu(np.ones((32, 32), np.float32)), 0.01),
        (np.ones((32, 16), np.float32), 0.01),
        (not_definite(), 0.01),
        (np.eye(32, dtype=np.float32), -1.0),
    ],
    ids=["zeros", "nan", "negative", "asymmetric", "oblong", "indefinite", "damping"],
)
def test_what_is_no_covariance_is_refused_as_on_the_cpu(h: F32, damp: float) -> None:
    with pytest.raises(KernelError) as expected:
        factor(h, damp)
    with pytest.raises(KernelError) as found:
        factors.factor(h, CPU, damp)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("options", [PLAIN, SEARCH], ids=str)
@pytest.mark.parametrize("name", TYPES)
@given(seed=st.integers(0, 999), freedom=st.sampled_from([3.0, 5.0, 100.0]))
@settings(max_examples=2, deadline=None)
def test_blocks_are_the_cpus_or_as_good(name: str, options: Options, seed: int, freedom: float) -> None:
    on_cpu, on_device = both(N_COLS)
    rows = heavy(N_ROWS, N_COLS, seed, freedom)
    expected, made = quantize(rows, name, on_cpu, options), device_rows.quantize(rows, name, on_device, options)
    assert made.good.all()
    assert kernels.is_valid(made.blocks, name)
    same = (blocks_of(made.blocks, name) == blocks_of(expected, name)).all(-1)
    # where a block is another one, so are many after it in its row
    assert same.mean() >= 0.8
    assert same[:, : 256 // QTYPES[name].block].mean() >= 0.88
    ratio = errors(rows, made.blocks, name) / errors(rows, expected, name)
    assert (ratio[same.all(1)] == 1).all()
    assert 0.97 <= ratio.mean() <= 1.03


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_1", "IQ2_XXS", "IQ1_S"])
def test_rows_of_the_hidden_states_width_are_as_good(name: str) -> None:
    """Many blocks after each other, and rows that do not fill a thread's share."""
    n_cols = 1792
    on_cpu, on_device = both(n_cols)
    rows = weights(60, n_cols, 3)
    expected, made = quantize(rows, name, on_cpu, PLAIN), device_rows.quantize(rows, name, on_device, PLAIN)
    ratio = errors(rows, made.blocks, name) / errors(rows, expected, name)
    assert 0.99 <= ratio.mean() <= 1.01


@pytest.mark.parametrize("name", TYPES)
def test_rows_that_searches_find_hard_are_no_worse_than_ggmls(name: str) -> None:
    on_cpu_factor, on_device = both(N_COLS)
    rows = odd_rows(N_COLS)
    stock = kernels.quantize(rows, name, on_cpu_factor.importance if QTYPES[name].uses_imatrix else None)
    made = stock.copy()
    _, bad = rounder.improved(rows, made, name, on_device, on_device.h, PLAIN)
    assert kernels.is_valid(made, name)
    assert not len(bad)
    assert (errors(rows, made, name) <= errors(rows, stock, name) * (1 + 1e-5)).all()
    expected = stock.copy()
    on_cpu.improved(rows, expected, name, on_cpu_factor, on_cpu_factor.h, PLAIN)
    same = (blocks_of(made, name) == blocks_of(expected, name)).all(-1)
    assert same.mean() > 0.8
    assert not dequantize(made[:1], name, N_COLS).any()


@pytest.mark.parametrize("name", ["Q4_K", "IQ1_M"])
def test_the_gain_is_put_in(name: str) -> None:
    on_cpu_factor, on_device = both(N_COLS)
    rows, options = weights(40, N_COLS, 8), PLAIN._replace(gain=True)
    stock = kernels.quantize(rows, name, on_cpu_factor.importance)
    made, expected = stock.copy(), stock.copy()
    rounder.improved(rows, made, name, on_device, on_device.h, options)
    on_cpu.improved(rows, expected, name, on_cpu_factor, on_cpu_factor.h, options)
    assert (blocks_of(made, name) == blocks_of(expected, name)).all(-1).mean() > 0.8
    plain = stock.copy()
    on_cpu.improved(rows, plain, name, on_cpu_factor, on_cpu_factor.h, PLAIN)
    assert (blocks_of(made, name) != blocks_of(plain, name)).any(-1).mean() > 0.5


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "IQ2_XXS"])
def test_a_row_whose_errors_grow_is_named_and_harms_no_other(name: str) -> None:
    _, on_device = both(N_COLS)
    rows = weights(9, N_COLS, 1)
    alone = device_rows.quantize(rows, name, on_device, PLAIN).blocks
    rows[4, :] = np.float32(2e8)
    rows[4, ::3] *= np.float32(-1)
    made = device_rows.quantize(rows, name, on_device, PLAIN)
    others = [i for i in range(9) if i != 4]
    assert made.good[others].all()
    assert np.array_equal(made.blocks[others], alone[others])


def test_no_rows_are_no_bytes() -> None:
    made = device_rows.quantize(np.zeros((0, N_COLS), np.float32), "Q4_K", both(N_COLS)[1], PLAIN)
    assert made.blocks.shape == (0, 288)
    assert made.good.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    _, on_device = both(N_COLS)
    rows = weights(2, 256)
    with pytest.raises(KernelError, match="rows of 256 columns do not go with a covariance of 512"):
        device_rows.quantize(rows, "Q4_K", on_device, PLAIN)
    rows = weights(2, N_COLS)
    with pytest.raises(KernelError, match=r"factored with a damping of 0\.01, not 0\.1"):
        device_rows.quantize(rows, "Q4_K", on_device, PLAIN._replace(damp=0.1))
    with pytest.raises(KernelError, match="torch has no feedback for TQ1_0"):
        device_rows.quantize(rows, "TQ1_0", on_device, PLAIN)


def test_devices_are_found_by_name() -> None:
    found = devices.find("torch")
    assert found is not None
    assert found.name == "cpu"
    assert torch.__version__ in found.text
    if not torch.cuda.is_available():
        assert devices.find("auto") is None
        with pytest.raises(KernelError, match="rows are rounded on the CPU without --rounding-device"):
            devices.find("cuda")

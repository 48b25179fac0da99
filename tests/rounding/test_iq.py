"""Error feedback in the IQ types: sets agree, rows stand alone, bytes are what was meant, and better than ggml's."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize as gguf_dequantize

from quantkit import kernels
from quantkit.base.errors import WeightError
from quantkit.gguf.types import QTYPES
from quantkit.rounding import Factor, Options, factor, quantize

F32 = npt.NDArray[np.float32]
TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
N_COLS = 512
PLAIN, SEARCH = Options(search=False), Options(search=True)


@cache
def correlated() -> Factor:
    """The covariance of inputs of which a tenth of the directions carry most."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(N_COLS // 10, N_COLS)) * np.linspace(0.2, 2, N_COLS)
    inputs = (rng.normal(size=(2000, N_COLS // 10)) @ mix + rng.normal(size=(2000, N_COLS))).astype(np.float32)
    return factor(np.ascontiguousarray(inputs.T @ inputs / len(inputs)))


def normal(n_rows: int = 37, seed: int = 2) -> F32:
    return (np.random.default_rng(seed).normal(size=(n_rows, N_COLS)) * 0.05).astype(np.float32)


def hostile() -> F32:
    """Rows of zeros, of tiny and large values, with outliers, alike in all columns, with zeros in between."""
    x = normal(20, 3)
    x[0] = 0
    x[1] *= 1e-30
    x[2] *= 1e-8
    x[3] *= 1e4
    x[4, 300] = 80
    x[5] = 0.25
    x[6] = -0.25
    x[7, ::2] = 0
    x[8, :256] = 0
    x[9, 32:64] = 0
    x[10] = np.abs(x[10])
    x[11, 1:] = 0
    x[12] = -0.0
    x[13, :8] *= 1e5
    return x


def output_error(rows: F32, blocks: kernels.U8, name: str) -> float:
    r = (rows - kernels.dequantize(blocks, name, rows.shape[1])).astype(np.float64)
    return float(((r @ correlated().h.astype(np.float64)) * r).sum())


@pytest.mark.parametrize("name", TYPES)
def test_sets_agree_in_their_search(name: str) -> None:
    rows = np.concatenate([normal(13), hostile()])
    made = {kernel: quantize(rows, name, correlated(), SEARCH, kernel) for kernel in kernels.FEEDBACK}
    assert "plain" in made
    for kernel, blocks in made.items():
        assert blocks.tobytes() == made["plain"].tobytes(), kernel


@pytest.mark.parametrize("name", TYPES)
def test_a_row_stands_alone_in_the_search(name: str) -> None:
    rows = np.concatenate([hostile(), normal(9)])
    together = quantize(rows, name, correlated(), SEARCH)
    for i in range(len(rows)):
        assert quantize(rows[i : i + 1], name, correlated(), SEARCH).tobytes() == together[i].tobytes(), i


@pytest.mark.parametrize("name", TYPES)
def test_ggufs_own_values(name: str) -> None:
    """gguf's reader sees the values that ggml's library sees; with the rule that makes the eighth sign of seven."""
    rows = np.concatenate([normal(9), hostile()])
    blocks = quantize(rows, name, correlated(), SEARCH)
    assert kernels.is_valid(blocks, name)
    values = gguf_dequantize(blocks, getattr(gguf.GGMLQuantizationType, name))
    assert np.array_equal(values, kernels.dequantize(blocks, name, N_COLS))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("options", [PLAIN, SEARCH], ids=["plain", "search"])
def test_what_is_handed_on_is_the_error_of_the_bytes(name: str, options: Options) -> None:
    """The second block is what comes of the first block's values as a reader sees them."""
    rows, f, qt = normal(64), correlated(), QTYPES[name]
    blocks = quantize(rows, name, f, options)
    first = np.ascontiguousarray(blocks[:, : qt.block_bytes])
    current = rows.copy()
    kernels.feedback_pass_on(current, 0, kernels.dequantize(first, name, 256), f.u)
    u = np.ascontiguousarray(f.u[256:, 256:])
    second = kernels.feedback_quantize(
        np.ascontiguousarray(current[:, 256:]), qt, u, np.ascontiguousarray(f.importance[256:]), options.search
    )
    # the sums are in another order: a choice between equals may differ
    same = (second == blocks[:, qt.block_bytes :]).all(axis=1).mean()
    assert same > 0.8


@pytest.mark.parametrize("name", TYPES)
def test_better_than_ggml(name: str) -> None:
    rows = normal(64)
    f = correlated()
    stock = output_error(rows, kernels.quantize(rows, name, np.ascontiguousarray(f.h.diagonal())), name)
    plain = output_error(rows, quantize(rows, name, f, PLAIN), name)
    search = output_error(rows, quantize(rows, name, f, SEARCH), name)
    assert plain < 0.8 * stock
    assert search < 0.9 * plain


@pytest.mark.parametrize("name", TYPES)
def test_weights_that_no_scale_reaches_are_refused(name: str) -> None:
    rows = normal(2)
    rows[1, 7] = 3e8
    with pytest.raises(
        WeightError, match=f"weights out of the range of {name}|the errors of {name} grow beyond float32"
    ):
        quantize(rows, name, correlated(), SEARCH)


#: a block's scale is fitted again once its codes are chosen: the scale they were chosen at, of what the bytes have
RATIOS = np.linspace(0.6, 1.7, 300)


def first_groups(name: str) -> tuple[F32, F32, kernels.U8, npt.NDArray[np.float64]]:
    """The first eight weights of rows, which no error has reached; the values they got; the blocks; M."""
    rows, f = normal(64), correlated()
    blocks = quantize(rows, name, f, PLAIN)
    inverse = np.linalg.inv(f.u[:8, :8].astype(np.float64))
    return rows[:, :8], kernels.dequantize(blocks, name, N_COLS)[:, :8], blocks, inverse @ inverse.T


def costs(x: F32, v: npt.NDArray[np.floating], m: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    r = x.astype(np.float64) - v
    out: npt.NDArray[np.float64] = ((r @ m) * r).sum(axis=-1)
    return out


def grid_of(name: str) -> F32:
    table = getattr(gguf.quants, name)
    table.init_grid()
    return np.asarray(table.grid, np.float32).reshape(-1, table.grid.shape[-1])


def test_iq1_takes_the_nearest_of_all_points() -> None:
    x, _, blocks, m = first_groups("IQ1_S")
    grid = grid_of("IQ1_S")
    d = blocks[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
    word = blocks[:, 34:36].copy().view(np.uint16)[:, 0]
    scale = d * (2 * (word >> 12 & 7) + 1).astype(np.float32)
    delta = np.where(word & 0x8000, -0.125, 0.125).astype(np.float32)
    index = blocks[:, 2] | (word & 7) << 8
    assert (scale > 0).all()
    assert len(set(delta)) == 2
    for i in range(len(x)):
        nearest = {int(costs(x[i], ratio * scale[i] * (grid + delta[i]), m).argmin()) for ratio in RATIOS}
        assert int(index[i]) in nearest
        assert len(nearest) < 100


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S"])
def test_iq2_is_no_worse_under_m_than_the_best_under_its_diagonal(name: str) -> None:
    x, v, _, m = first_groups(name)
    grid = grid_of(name)
    n_known = 0
    for i in range(len(x)):
        sizes = np.abs(v[i]).min() / 8 * grid
        if not np.isclose(sizes, np.abs(v[i])).all(axis=1).any():  # no level of 8 in it: the scale is not known
            continue
        n_known += 1
        signs = np.where(x[i] < 0, -1.0, 1.0)
        codes = np.repeat((sizes * signs)[None], 9, axis=0)
        if name != "IQ2_S":
            assert (v[i] < 0).sum() % 2 == 0
            for k in range(8):
                codes[k, :, k] *= -1
            codes = codes[:8] if (signs < 0).sum() % 2 else codes[8:]
        flat = codes.reshape(-1, 8)
        no_worse = False
        for ratio in RATIOS[::10]:
            diagonal = flat[costs(x[i], ratio * flat, np.diag(np.diag(m))).argmin()]
            no_worse |= bool(costs(x[i], ratio * v[i], m) <= costs(x[i], ratio * diagonal, m) * (1 + 1e-4))
        assert no_worse
    assert n_known > 32

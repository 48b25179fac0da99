"""Rounding under a covariance: the same bytes from every set, a row on its own, and a smaller output error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from covariances import correlated, output_error, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import kernels
from quantkit.base.errors import KernelError, QuantkitError, WeightError
from quantkit.gguf.types import INTEGER_TYPES, QTYPES
from quantkit.kernels import F32, FEEDBACK, OWN, U8, dequantize
from quantkit.rounding import Factor, Method, Options, factor, quantize, supported
from quantkit.rounding.gain import row_gains

TYPES = sorted(FEEDBACK["plain"])
#: whose values are rounded column by column, to the nearest of a group's
SCALAR = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16, "IQ4_XS": 32, "IQ4_NL": 32, "Q4_0": 32,
          "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32}  # fmt: skip
COARSE = Options(Method.COARSE)
PLAIN, SEARCH = Options(search=False), Options()


@cache
def factor_of(n: int) -> Factor:
    return factor(correlated(n))


def stock(rows: F32, name: str, f: Factor) -> U8:
    return kernels.quantize(rows, name, f.importance if QTYPES[name].uses_imatrix else None)


def outcome(rows: F32, name: str, f: Factor, options: Options, kernel: str) -> bytes | str:
    try:
        return quantize(rows, name, f, options, kernel).tobytes()
    except QuantkitError as e:
        return f"{type(e).__name__}: {e}"


def odd_rows(n_cols: int) -> F32:
    """Rows that searches find hard: zeros, one value, tiny and large ones, long tails, equal ones."""
    rng = np.random.default_rng(7)
    rows = weights(21, n_cols, 7)
    rows[0] = 0
    rows[1] = 0
    rows[1, n_cols // 2] = 1.0
    rows[2] *= np.float32(1e-30)
    rows[3] *= np.float32(1e6)
    rows[4] = rng.standard_t(2, n_cols) * 0.01
    rows[5] = 0.25
    rows[6] = np.where(rng.random(n_cols) < 0.5, -1.0, 1.0)
    rows[7, ::2] = 0
    rows[8] = np.abs(rows[8])
    rows[9] *= np.float32(1e-41)
    return rows


@pytest.mark.parametrize("name", TYPES)
def test_every_set_gives_the_same_bytes(name: str) -> None:
    f = factor_of(512)
    rows = np.concatenate([odd_rows(512), weights(30, 512, 1)])
    for options in (PLAIN, SEARCH, SEARCH._replace(gain=True), COARSE):
        made = {kernel: outcome(rows, name, f, options, kernel) for kernel in FEEDBACK}
        assert isinstance(made["plain"], bytes)
        assert set(made.values()) == {made["plain"]}


@pytest.mark.parametrize("name", TYPES)
@given(cuts=st.lists(st.integers(0, 300), max_size=5), threads=st.integers(1, 3))
@settings(max_examples=4, deadline=None)
def test_a_row_depends_on_itself_only(name: str, cuts: list[int], threads: int) -> None:
    n_cols = 256 + QTYPES[name].block
    f, rows = factor_of(n_cols), weights(300, n_cols, 2)
    whole = quantize(rows, name, f, PLAIN)
    parts = [part for part in np.split(rows, sorted(cuts)) if len(part)]
    with ThreadPoolExecutor(threads) as pool:
        made = list(pool.map(lambda part: quantize(part, name, f, PLAIN), parts))
    assert np.concatenate(made).tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_with_search_a_row_depends_on_itself_only(name: str) -> None:
    f, rows = factor_of(512), np.concatenate([odd_rows(512), weights(7, 512, 3)])
    whole = quantize(rows, name, f, SEARCH)
    for i in (0, 4, 20, 27):
        assert quantize(rows[i : i + 1], name, f, SEARCH).tobytes() == whole[i].tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_the_output_error_is_smaller(name: str) -> None:
    f, rows = factor_of(512), weights(64, 512, 4)
    theirs = output_error(rows, stock(rows, name, f), name, f.h)
    coarse, plain, search = (
        output_error(rows, quantize(rows, name, f, options), name, f.h) / theirs for options in (COARSE, PLAIN, SEARCH)
    )
    assert coarse < 0.75
    assert plain < 0.65
    assert search < plain


@pytest.mark.parametrize("name", TYPES)
def test_without_correlation_there_is_nothing_to_pass_on(name: str) -> None:
    f, rows = factor(np.eye(256, dtype=np.float32)), weights(64, 256, 5)
    theirs, ours = stock(rows, name, f), quantize(rows, name, f, PLAIN)
    assert output_error(rows, ours, name, f.h) <= output_error(rows, theirs, name, f.h) * 1.0001
    if name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):  # ggml's levels are the nearest of its scales
        assert np.mean(ours == theirs) > 0.9999


@pytest.mark.parametrize("name", sorted(SCALAR))
@pytest.mark.parametrize("options", [PLAIN, SEARCH], ids=str)
def test_each_value_is_the_nearest_once_the_errors_before_it_are_passed_on(name: str, options: Options) -> None:
    """So the errors that were passed on are those of the bytes: another e, and later columns would not be nearest."""
    n = 512
    f, rows = factor_of(n), weights(16, n, 6)
    values = dequantize(quantize(rows, name, f, options), name, n).astype(np.float64)
    u = f.u.astype(np.float64)
    current = values + np.linalg.solve(u.T, (rows - values).T).T * u.diagonal()
    group = SCALAR[name]
    shape = (len(rows), n // group, group)
    at, others = current.reshape(shape), values.reshape(shape)
    least = np.abs(at[..., :, None] - others[..., None, :]).min(axis=-1)
    taken = np.abs(at - others)
    assert (taken <= least + 1e-5 * np.abs(values).max()).all()


@pytest.mark.parametrize("name", sorted(t for t in QTYPES if t not in INTEGER_TYPES and supported(t)))
def test_coarse_is_ggml_where_there_is_but_one_slab(name: str) -> None:
    f, rows = factor_of(256), weights(5, 256, 8)
    assert quantize(rows, name, f, COARSE).tobytes() == stock(rows, name, f).tobytes()


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "IQ3_S", "TQ2_0"])
def test_coarse_passes_each_slab_on(name: str) -> None:
    n = 640 if QTYPES[name].block == 32 else 768
    f, rows = factor_of(n), weights(5, n, 9)
    expected, current = [], rows.copy()
    for c in range(0, n, 256):
        end = min(c + 256, n)
        slab = np.ascontiguousarray(current[:, c:end])
        importance = f.importance[c:end] if QTYPES[name].uses_imatrix else None
        expected.append(kernels.quantize(slab, name, importance))
        d = slab - dequantize(expected[-1], name, end - c)
        e = np.linalg.solve(f.u[c:end, c:end].T.astype(np.float64), d.T.astype(np.float64)).T
        current[:, end:] -= (e @ f.u[c:end, end:].astype(np.float64)).astype(np.float32)
    made = dequantize(quantize(rows, name, f, COARSE), name, n)
    np.testing.assert_allclose(
        made, dequantize(np.concatenate(expected, axis=1), name, n), atol=0.02 * np.abs(made).max()
    )


@pytest.mark.parametrize("name", [*TYPES, "TQ2_0"])
def test_gain_brings_the_output_to_its_size(name: str) -> None:
    f, rows = factor_of(512), 100 * weights(40, 512, 10)  # large enough that scales are normal half-precision numbers
    options = SEARCH if supported(name) is Method.FEEDBACK else COARSE
    without, with_gain = (quantize(rows, name, f, options._replace(gain=gain)) for gain in (False, True))
    before, after = (row_gains(rows, dequantize(b, name, 512), f) for b in (without, with_gain))
    inside = (before > 0.7) & (before < 1.6)
    assert inside.mean() > 0.5
    assert np.abs(after[inside] - 1).max() < 0.002
    # the levels stay
    changed = np.mean((without != with_gain).any(axis=0))
    assert changed <= (8 if name == "IQ1_M" else 4) / QTYPES[name].block_bytes


def test_every_type_of_blocks_has_a_method() -> None:
    found = {name: supported(name) for name in QTYPES}
    assert {name for name, method in found.items() if method is Method.FEEDBACK} == set(TYPES)
    assert {name for name, method in found.items() if method is None} >= {"F32", "F16", "BF16", "F64", *INTEGER_TYPES}
    assert found["TQ1_0"] is found["MXFP4"] is Method.COARSE
    assert set(SCALAR) <= set(TYPES)


def test_the_options_as_text() -> None:
    texts = [str(o) for o in (SEARCH, PLAIN, COARSE, SEARCH._replace(gain=True), PLAIN._replace(damp=0.1))]
    assert texts == [
        "feedback search damp 0.01", "feedback damp 0.01", "coarse damp 0.01", "feedback search gain damp 0.01",
        "feedback damp 0.1",
    ]  # fmt: skip


def test_quantkit_kernels_names_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FEEDBACK:
        monkeypatch.setenv("QUANTKIT_KERNELS", name)
        assert kernels.feedback_set() == name
    monkeypatch.setenv("QUANTKIT_KERNELS", "ggml")
    assert kernels.feedback_set() == next(iter(FEEDBACK))
    assert set(FEEDBACK) == {*OWN, "plain"}


def with_value(value: float) -> F32:
    rows = weights(3, 512)
    rows[1, 300] = value
    return rows


REFUSED: dict[str, tuple[F32, str, Options, str]] = {
    "float": (weights(3, 512), "BF16", PLAIN, "BF16 has no rounding but its own: its values are rounded one by one"),
    "integer": (weights(3, 512), "I32", PLAIN, "I32 has no rounding but its own: its values are rounded one by one"),
    "no feedback": (weights(3, 512), "MXFP4", PLAIN, "there is no error feedback for MXFP4, only 'coarse'"),
    "columns": (
        weights(3, 256), "Q4_K", PLAIN, "rows of 256 columns do not go with a covariance of 512",
    ),
    "damping": (
        weights(3, 512), "Q4_K", PLAIN._replace(damp=0.1),
        "the covariance was factored with a damping of 0.01, not 0.1",
    ),
    "dtype": (
        weights(3, 512).astype(np.float16), "Q4_K", PLAIN,
        "rows must be C-ordered float32 [n_rows, n_cols], not float16 [3, 512]",
    ),
    "gain": (
        weights(3, 512), "MXFP4", COARSE._replace(gain=True), "MXFP4 has no scale that takes a gain",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    rows, qtype_name, options, sentence = REFUSED[name]
    with pytest.raises(KernelError) as caught:
        quantize(rows, qtype_name, factor_of(512), options)
    assert str(caught.value) == sentence


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(KernelError) as caught:
        quantize(weights(3, 320), "Q4_K", factor_of(320), PLAIN)
    assert str(caught.value) == "a row of 320 values does not divide into Q4_K blocks of 256"


def test_a_set_that_there_is_not_is_refused() -> None:
    with pytest.raises(KernelError) as caught:
        quantize(weights(3, 512), "Q4_K", factor_of(512), PLAIN, "sse9")
    assert str(caught.value) == f"there is no error feedback 'sse9'; there is {', '.join(FEEDBACK)}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [SEARCH, COARSE], ids=str)
def test_a_weight_that_is_none_is_named(value: float, options: Options) -> None:
    with pytest.raises(WeightError) as caught:
        quantize(with_value(value), "Q4_K", factor_of(512), options)
    assert str(caught.value) == f"row 1, column 300 is {value}"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [1e30, -3e38, 1e12])
def test_weights_beyond_the_type_are_refused_or_rounded(name: str, value: float) -> None:
    for options in (PLAIN, SEARCH, COARSE):
        try:
            made = quantize(with_value(value), name, factor_of(512), options)
        except WeightError as e:
            assert "weights out of the range of" in str(e) or "grow beyond float32" in str(e)  # noqa: PT017
        else:
            assert kernels.is_valid(made, name)


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    made = quantize(np.zeros((3, 512), np.float32), name, factor_of(512), SEARCH._replace(gain=True))
    assert not dequantize(made, name, 512).any()


@pytest.mark.parametrize("name", TYPES)
def test_no_rows_are_no_bytes(name: str) -> None:
    assert quantize(np.zeros((0, 512), np.float32), name, factor_of(512), PLAIN).shape == (
        0,
        QTYPES[name].row_bytes(512),
    )

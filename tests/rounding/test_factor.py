"""The factor of a covariance: what it must be, and which covariances are refused with which sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from covariances import as_covariance, correlated

from quantkit.base.errors import KernelError
from quantkit.kernels import F32, FEEDBACK
from quantkit.rounding import factor


def damped(h: F32, damp: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """What the factor is of: H times a power of two, damped."""
    exact = h.astype(np.float64)
    mean = float(exact.diagonal().mean())
    return np.asarray(np.ldexp(exact + damp * mean * np.eye(len(h)), -math.frexp(mean)[1]))


@pytest.mark.parametrize("n", [1, 7, 32, 64, 65, 200])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_it_is_the_upper_triangular_root_of_the_inverse(n: int, damp: float) -> None:
    h = correlated(n, n)
    found = factor(h, damp)
    assert (found.n_cols, found.damp, found.h is h) == (n, damp, True)
    u = found.u.astype(np.float64)
    assert not np.tril(u, -1).any()
    assert (u.diagonal() > 0).all()
    np.testing.assert_allclose(u.T @ u @ damped(h, damp), np.eye(n), atol=2e-5)
    np.testing.assert_allclose(found.importance, damped(h, damp).diagonal(), rtol=1e-6)
    reference = np.linalg.cholesky(np.linalg.inv(damped(h, damp))).T
    np.testing.assert_allclose(u, reference, rtol=1e-5, atol=1e-6 * np.abs(reference).max())


@pytest.mark.parametrize("n", [33, 130, 300])
def test_every_set_makes_the_same(n: int) -> None:
    h = correlated(n, n)
    assert len({factor(h, kernel=name).u.tobytes() for name in FEEDBACK}) == 1


@pytest.mark.parametrize("exponent", [-100, -20, 60])
def test_a_power_of_two_changes_nothing(exponent: int) -> None:
    h = correlated(96)
    one, other = factor(h), factor(np.ldexp(h, exponent))
    assert one.u.tobytes() == other.u.tobytes()
    assert one.importance.tobytes() == other.importance.tobytes()


def test_the_damping_bears_dead_columns_and_few_tokens() -> None:
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((10, 64))
    inputs[:, 5] = inputs[:, 40:] = 0.0
    h = as_covariance(inputs)
    found = factor(h)
    assert np.isfinite(found.u).all()
    assert found.importance.min() > 0
    np.testing.assert_allclose(found.u.T.astype(np.float64) @ found.u @ damped(h, 0.01), np.eye(64), atol=1e-4)


def changed(row: int, column: int, value: float) -> F32:
    h = correlated(64)
    h[row, column] = value
    return h


REFUSED = {
    "nan": (changed(3, 9, np.nan), 0.01, "the covariance is nan at row 3, column 9; collect it again"),
    "inf": (changed(63, 0, np.inf), 0.01, "the covariance is inf at row 63, column 0; collect it again"),
    "negative": (changed(7, 7, -2.0), 0.01, "the covariance of column 7 with itself is -2, below 0"),
    "one-sided": (
        changed(2, 1, 50.0), 0.01,
        f"the covariance is not symmetric: {correlated(64)[1, 2]:.6g} at row 1, column 2, and 50 the other way round",
    ),
    "zero": (
        np.zeros((8, 8), np.float32), 0.01,
        "the covariance of 8 columns is zero: no token has reached the tensor",
    ),
    "dead column, not damped": (
        np.diag([1.0, 1.0, 0.0, 1.0]).astype(np.float32), 0.0,
        "the covariance of 4 columns with a damping of 0 is not positive definite, as column 2 shows; take a larger "
        "damping or more tokens",
    ),
    "indefinite": (
        np.array([[1, 3], [3, 1]], np.float32), 0.01,
        "the covariance of 2 columns with a damping of 0.01 is not positive definite, as column 0 shows; take a larger "
        "damping or more tokens",
    ),
    "damping": (correlated(8), math.nan, "the damping of a covariance must be 0 or more, not nan"),
    "shape": (np.ones((2, 3), np.float32), 0.01, "a covariance must be C-ordered float32 [n, n], not float32 [2, 3]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_covariance_is_refused(name: str) -> None:
    h, damp, sentence = REFUSED[name]
    with pytest.raises(KernelError) as caught:
        factor(h, damp)
    assert str(caught.value) == sentence


def test_another_dtype_is_refused() -> None:
    with pytest.raises(KernelError) as caught:
        factor(np.eye(4))  # type: ignore[arg-type]
    assert str(caught.value) == "a covariance must be C-ordered float32 [n, n], not float64 [4, 4]"

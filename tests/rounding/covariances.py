"""Covariances, and rows to round under them."""

from __future__ import annotations

import numpy as np

from quantkit.kernels import F32, U8, dequantize


def correlated(n: int, seed: int = 0) -> F32:
    """[n, n] of inputs of which few directions carry most, in columns of different size."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.exp(1.2 * rng.standard_normal(n))
    mix = mix.T * np.exp(0.5 * rng.standard_normal(n))
    return as_covariance(rng.standard_normal((4 * n, n)) @ mix)


def as_covariance(inputs: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> F32:
    """The mean of x x^T, symmetric to the bit."""
    h = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return np.asarray(np.tril(h) + np.tril(h, -1).T)


def weights(n_rows: int, n_cols: int, seed: int = 0) -> F32:
    return (0.02 * np.random.default_rng(seed).standard_normal((n_rows, n_cols))).astype(np.float32)


def output_error(rows: F32, blocks: U8, qtype_name: str, h: F32) -> float:
    """The sum of d H d^T over the rows' differences d to what the blocks are, in float64."""
    d = (rows - dequantize(blocks, qtype_name, rows.shape[1])).astype(np.float64)
    return float(np.sum(d @ h.astype(np.float64) * d))

"""Data that kernels are compared on: laws of weights and of importance, seeded; and trained FP8 weights.

Exact ties abound in FP8-born data and hide in Gaussian data, so most laws go through FP8 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Generator = np.random.Generator

TRAINED = Path(__file__).parent.parent / "data" / "trained_fp8.npz"


def bf16(x: npt.NDArray[Any]) -> F32:
    """Rounded to the nearest even bfloat16."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def e4m3_values() -> F32:
    """The value of every E4M3 code; NaN for 0x7f and 0xff."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value[(code & 127) == 127] = np.nan
    return np.where(code & 128, -value, value).astype(np.float32)


def _fp8_codes(rng: Generator, shape: tuple[int, int]) -> F32:
    codes = rng.integers(0, 256, shape)
    codes[(codes & 127) == 127] = 0
    return bf16(e4m3_values()[codes] * np.float32(0.00317))


def _fp8_normal(rng: Generator, shape: tuple[int, int]) -> F32:
    """Gaussian weights as a checkpoint stores them: E4M3 times a scale a block of 128 columns."""
    x = rng.standard_normal(shape)
    scale = np.exp(rng.normal(-9, 0.3, (shape[0], -(-shape[1] // 128)))).repeat(128, 1)[:, : shape[1]]
    magnitude = np.abs(x) * 120
    step = 2.0 ** (np.floor(np.log2(np.maximum(magnitude, 2.0**-6))) - 3)
    return bf16((np.sign(x) * np.minimum(np.round(magnitude / step) * step, 448)).astype(np.float32)
                * scale.astype(np.float32))  # fmt: skip


def _mixed(rng: Generator, shape: tuple[int, int]) -> F32:
    """Neighbouring groups of 64 up to nine orders of magnitude apart."""
    orders = rng.integers(-6, 3, (shape[0], -(-shape[1] // 64))).repeat(64, 1)[:, : shape[1]]
    return bf16(rng.standard_normal(shape) * 10.0**orders)


def _sparse(rng: Generator, shape: tuple[int, int]) -> F32:
    return bf16(rng.standard_normal(shape) * (rng.random(shape) < 0.1))


def _outliers(rng: Generator, shape: tuple[int, int]) -> F32:
    return bf16(rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 40, 1))


def _trained(rng: Generator, shape: tuple[int, int]) -> F32:
    """Rows of a trained expert in FP8, laid end to end from random places."""
    stored = np.load(TRAINED)
    values = e4m3_values()[stored["codes"]] * stored["scale"].repeat(128, 0).repeat(128, 1)
    flat = bf16(values).reshape(-1)
    start = rng.integers(0, flat.size)
    return np.ascontiguousarray(np.resize(np.roll(flat, -start), shape))


#: name -> (rng, shape) -> float32 rows
WEIGHTS: dict[str, Callable[[Generator, tuple[int, int]], F32]] = {
    "trained fp8": _trained,
    "fp8 normal": _fp8_normal,
    "fp8 codes": _fp8_codes,
    "normal": lambda rng, shape: bf16(rng.standard_normal(shape)),
    "normal, not bf16": lambda rng, shape: rng.standard_normal(shape).astype(np.float32),
    "laplace": lambda rng, shape: bf16(rng.laplace(size=shape)),
    "student t": lambda rng, shape: bf16(rng.standard_t(2, shape)),
    "few values": lambda rng, shape: bf16(rng.integers(-3, 4, shape) * 0.1),
    "sparse": _sparse,
    "outliers": _outliers,
    "mixed": _mixed,
    "positive": lambda rng, shape: bf16(np.abs(rng.standard_normal(shape)) + 1),
    "negative": lambda rng, shape: bf16(-np.abs(rng.standard_normal(shape)) - 1),
    "constant": lambda rng, shape: np.full(shape, rng.standard_normal(), np.float32),
    "zeros": lambda rng, shape: np.zeros(shape, np.float32),
    "denormal": lambda rng, shape: (rng.standard_normal(shape) * 1e-38).astype(np.float32),
    "small": lambda rng, shape: (rng.standard_normal(shape) * 1e-20).astype(np.float32),
    "large": lambda rng, shape: (rng.standard_normal(shape) * 1e4).astype(np.float32),
}


def _with_zeros(rng: Generator, n: int) -> F32:
    """Half the columns of no importance at all."""
    return (np.exp(rng.standard_normal(n)) * (rng.random(n) < 0.5)).astype(np.float32)


def _dead(rng: Generator, n: int) -> F32:
    """Long runs of zeros, as of experts that saw almost nothing."""
    alive = (rng.random(-(-n // 64)) < 0.3).repeat(64)[:n]
    return (np.exp(rng.standard_normal(n)) * alive).astype(np.float32)


def _real(rng: Generator, n: int) -> F32:
    """Mean squared activations of a trained model."""
    stored = np.load(TRAINED)["importance"].astype(np.float32)
    return np.ascontiguousarray(np.resize(np.roll(stored, -rng.integers(0, stored.size)), n))


#: name -> (rng, n_cols) -> float32 importance, or None
IMPORTANCE: dict[str, Callable[[Generator, int], F32 | None]] = {
    "none": lambda _rng, _n: None,
    "real": _real,
    "lognormal 1": lambda rng, n: np.exp(rng.standard_normal(n)).astype(np.float32),
    "lognormal 3": lambda rng, n: np.exp(3 * rng.standard_normal(n)).astype(np.float32),
    "lognormal 4": lambda rng, n: np.exp(4 * rng.standard_normal(n)).astype(np.float32),
    "ones": lambda _rng, n: np.ones(n, np.float32),
    "half zeros": _with_zeros,
    "dead": _dead,
    "zeros": lambda _rng, n: np.zeros(n, np.float32),
    "tiny": lambda rng, n: (np.exp(rng.standard_normal(n)) * 1e-30).astype(np.float32),
}


def cells(rng: Generator, n_rows: int, n_cols: int) -> Iterator[tuple[str, str, F32, F32 | None]]:
    """Every law of weights under every law of importance: names, rows [n_rows, n_cols], importance [n_cols] or None."""
    for weights, make in WEIGHTS.items():
        for importance, weigh in IMPORTANCE.items():
            yield weights, importance, make(rng, (n_rows, n_cols)), weigh(rng, n_cols)

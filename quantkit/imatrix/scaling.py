"""Converting values between the two formats so that llama-quantize divides the same float32 out of both.

A GGUF has sums and token counts; the quantizer gets in_sum2 / count. A .dat has one count for a tensor, its calls; the
quantizer gets value / calls. llama-imatrix scales by the chunk size, which sometimes rounds: then this module picks
other calls, which do not. Source: tools/imatrix/imatrix.cpp (save_imatrix_legacy, load_imatrix_legacy).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .entries import Sums

#: integers up to this are exact in float32
_EXACT = 1 << 24
_MAX_CALLS = (1 << 31) - 1


def divided(in_sum2: npt.NDArray[np.floating[Any]], counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return what the quantizer gets: float32 sums [n_mats, n_cols] over counts [n_mats], ones where a count is 0."""
    with np.errstate(all="ignore"):
        out = in_sum2.astype(np.float32, copy=False) / counts.astype(np.float32)[:, None]
    out[counts == 0] = 1
    return out


def for_dat(entry: Sums, chunk_size: int) -> tuple[int, npt.NDArray[np.float32], bool]:
    """Return an entry's calls and values [n_mats, n_cols] for a .dat, and whether the calls are llama-imatrix's: the
    chunks that its most used matrix saw. If not, they are a nearby power of two, or 1."""
    in_sum2 = entry.in_sum2.astype(np.float32, copy=False)
    wanted = divided(in_sum2, entry.counts)
    most = float(entry.counts.max())
    calls = min(max(1, math.ceil(most / chunk_size)), _MAX_CALLS)
    with np.errstate(all="ignore"):
        if len(entry.counts) == 1 and most == calls * chunk_size:
            values = in_sum2 / np.float32(chunk_size)
            if _same(values / np.float32(calls), wanted):
                return calls, values, True
        for n in (calls, 1 << round(math.log2(calls)), 1):
            values = wanted * np.float32(n)
            if n <= _MAX_CALLS and _same(values / np.float32(n), wanted):
                return n, values, n == calls
    raise AssertionError("a value times 1 is that value")


def from_dat(entry: Sums, chunk_size: int) -> Sums:
    """Convert a .dat's entry to sums and a token count, with `chunk_size` tokens in a chunk. Where that would round, a
    chunk counts as fewer tokens: a power of two, or 1."""
    wanted = divided(entry.in_sum2, entry.counts)
    calls = float(entry.counts[0])
    for factor in (chunk_size, 1 << (chunk_size.bit_length() - 1)):
        counts = np.array([calls * factor])
        with np.errstate(all="ignore"):
            in_sum2 = entry.in_sum2 * np.float32(factor)
        if counts[0] <= _EXACT and _same(divided(in_sum2, counts), wanted) and np.isfinite(in_sum2).all():
            return Sums(entry.name, in_sum2, counts)
    return Sums(entry.name, entry.in_sum2, np.array([float(np.float32(calls))]))


def _same(a: npt.NDArray[np.floating[Any]], b: npt.NDArray[np.floating[Any]]) -> bool:
    return bool((a == b).all())

"""Random bit patterns through every kernel of quantkit's own, in every set, against ggml's functions, byte by byte.

    python tests/tools/fuzz_kernels.py [TYPE …] [--seconds 60] [--cases N] [--seed N] [--first N]

Weights: any float32 pattern, within bands of exponents, NaN, Inf and denormals among them; bfloat16 and float16
patterns; E4M3 codes under random scales; sparse, constant, few values, outliers, and all of these mixed in one
matrix. Importance: none, the same bands of patterns, zeros, and what no matrix may hold (negative, NaN, Inf). Row
counts, widths, first rows, interleaved runs and alignment are random. Each case goes both ways, `kernels.quantize` on
float32 and `kernels.quantize_stored` on the stored rows, and must give ggml's bytes or ggml's refusal, with nothing
written beside them; the stored rows are decoded here by numpy.

A difference, or the end of the process, prints the command that shows it again, and exits 1.
"""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import laws
import numpy as np
import numpy.typing as npt

from quantkit import _native, kernels
from quantkit.base.errors import QuantkitError
from quantkit.gguf.types import QTYPES

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
Generator = np.random.Generator
Shape = tuple[int, int]

TYPES = sorted(set().union(*kernels.OWN.values()), key=lambda name: QTYPES[name].id)
GUARD = 0xA5


class DifferenceError(Exception):
    """A kernel did not do what ggml does; says which, and where."""


# ---------------------------------------------------------------- bit patterns


def band(rng: Generator, shape: Shape | int) -> U32:
    """float32 patterns with exponents from a random band, now and then of all there are: mostly finite."""
    low, high = sorted(rng.integers(0, 256, 2)) if rng.random() < 0.1 else (0, 0)
    if high == 0:
        middles = [1, 20, 60, 90, 100, 110, 115, 118, 120, 122, 125, 127, 128, 130, 136, 141, 190, 250]
        middle, half = rng.choice(middles), rng.choice([0, 1, 2, 2, 4, 4, 8, 20])
        low, high = max(0, middle - half), min(255, middle + half)
    if high == 255 and rng.random() < 0.8:
        low, high = min(low, 254), 254
    exponent = rng.integers(low, high, shape, endpoint=True, dtype=np.uint32)
    mantissa = rng.integers(0, 1 << 23, shape, dtype=np.uint32) & np.uint32(rng.choice([0x7FFFFF, 0x7F0000, 0x700000]))
    bits: U32 = (rng.integers(0, 2, shape, dtype=np.uint32) << 31) | (exponent << 23) | mantissa
    return bits


def any_bits(rng: Generator, shape: Shape) -> U32:
    """Every pattern as likely as any other, those that are no numbers left as they are in one case of ten."""
    bits: U32 = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    if rng.random() < 0.9:
        bits[(bits & 0x7F800000) == 0x7F800000] &= 0x807FFFFF
    return bits


def denormal(rng: Generator, shape: Shape) -> U32:
    width = np.uint32((1 << rng.integers(1, 25)) - 1)
    bits: U32 = rng.integers(0, 1 << 32, shape, dtype=np.uint32) & (width | np.uint32(1 << 31))
    return bits


def few_values(rng: Generator, shape: Shape) -> U32:
    """Small multiples of one value: ties, and runs of equal weights."""
    scale = band(rng, 1).view(np.float32)[0]
    with np.errstate(all="ignore"):
        bits: U32 = (rng.integers(-rng.integers(1, 20), 20, shape) * scale).astype(np.float32).view(np.uint32)
    return bits


def constant(rng: Generator, shape: Shape) -> U32:
    return np.full(shape, band(rng, 1)[0], np.uint32)


def sparse(rng: Generator, shape: Shape) -> U32:
    zero = np.uint32(rng.choice([0, 1 << 31]))
    bits: U32 = np.where(rng.random(shape) < rng.choice([0.5, 0.1, 0.01]), band(rng, shape), zero).astype(np.uint32)
    return bits


def outliers(rng: Generator, shape: Shape) -> U32:
    bits = band(rng, shape)
    flat = bits.reshape(-1)
    at = rng.integers(0, flat.size, max(1, flat.size // 200))
    flat[at] = band(rng, at.size)
    return bits


def one_sign(rng: Generator, shape: Shape) -> U32:
    bits: U32 = band(rng, shape) & np.uint32(0x7FFFFFFF) | np.uint32(rng.choice([0, 1 << 31]))
    return bits


def normal(rng: Generator, shape: Shape) -> U32:
    with np.errstate(all="ignore"):
        bits: U32 = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-30, 20)).astype(np.float32).view(np.uint32)
    return bits


LAWS: list[Callable[[Generator, Shape], U32]] = [
    band, any_bits, denormal, few_values, constant, sparse, outliers, one_sign, normal, normal,
]  # fmt: skip


def weights(rng: Generator, shape: Shape) -> U32:
    """float32 patterns by one law, or by another for each group of columns; rarely with a few that are no numbers."""
    bits = LAWS[rng.integers(len(LAWS))](rng, shape)
    if rng.random() < 0.25:
        width = int(rng.choice([16, 32, 64, 256]))
        for c in range(0, shape[1], width):
            part = bits[:, c : c + width]
            part[...] = LAWS[rng.integers(len(LAWS))](rng, (part.shape[0], part.shape[1]))
    if rng.random() < 0.03:
        bits.reshape(-1)[rng.integers(0, bits.size, 2)] = rng.choice([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF])
    return bits


def importance(rng: Generator, n: int) -> F32 | None:
    """What a matrix holds for n columns, in one case of sixteen with values that none may hold."""
    how = rng.integers(0, 16)
    if how < 3:
        return None
    if how < 8:
        out: F32 = np.exp(rng.choice([0.5, 1, 3, 4]) * rng.standard_normal(n)).astype(np.float32)
    else:
        bits = band(rng, n) & np.uint32(0x7FFFFFFF)
        bits[bits >= 0x7F800000] = 0x7F7FFFFF
        out = bits.view(np.float32)
    if rng.random() < 0.3:
        out[rng.random(n) < rng.choice([0.1, 0.5, 0.99, 1])] = 0
    if rng.random() < 0.1:
        out[:] = out[0]
    if how == 15:
        out[rng.integers(0, n, rng.integers(1, 4))] = rng.choice([-1.0, -1e-45, np.nan, np.inf, -np.inf, -0.0])
    return out


# ---------------------------------------------------------------- stored rows


def bf16_rounded(x: F32) -> F32:
    """To nearest even; a NaN stays one."""
    u = x.view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    out: F32 = np.where(np.isnan(x), np.float32(np.nan), rounded).astype(np.float32)
    return out


def unaligned(rng: Generator, values: npt.NDArray[Any], step: int) -> Any:
    """A copy of C-ordered values that begins a random multiple of `step` bytes past a boundary."""
    raw = np.empty(values.nbytes + 64, np.uint8)
    at = int(rng.integers(0, 64 // step)) * step
    out = raw[at : at + values.nbytes].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


def store(rng: Generator, dtype: str, shape: Shape) -> tuple[kernels.StoredRows, F32]:
    """Random rows as a source stores them, and what they are in float32."""
    n_rows, n_cols = shape
    n_runs = int(rng.integers(1, min(n_rows, 4) + 1)) if rng.random() < 0.3 else 1
    first_rows = rng.integers(0, 300, n_runs, dtype=np.uint64)
    block, scale, round_bf16 = (1, 1), None, bool(rng.random() < 0.5)
    # position in the stored runs, one after the other -> the row of the matrix
    lengths = [n_rows // n_runs + (run < n_rows % n_runs) for run in range(n_runs)]
    matrix_row = np.concatenate([int(first) + np.arange(n) for first, n in zip(first_rows, lengths, strict=True)])
    with np.errstate(all="ignore"):
        if dtype == "F8_E4M3":
            codes = rng.integers(0, 256, shape, dtype=np.uint8) & np.uint8(rng.choice([0xFF, 0xFF, 0xF0, 0xBF]))
            if rng.random() < 0.9:
                codes[(codes & 127) == 127] = 0x7E
            if rng.random() < 0.2:
                codes[rng.random(shape) < 0.9] = 0
            block = (int(rng.choice([1, 7, 128])), int(rng.choice([1, 32, 100, 128, 4096])))
            n_blocks = (-(-int(matrix_row.max() + 1) // block[0]), -(-n_cols // block[1]))
            scale = np.ascontiguousarray(band(rng, n_blocks) & np.uint32(0x7FFFFFFF)).view(np.float32)
            if rng.random() < 0.5:
                scale = np.exp(rng.normal(-9, 0.5, n_blocks)).astype(np.float32)
            stored: npt.NDArray[Any] = codes
            spread = scale[matrix_row // block[0]][:, np.arange(n_cols) // block[1]]
            x = laws.e4m3_values()[codes] * spread
        elif dtype == "F16":
            bits = weights(rng, shape)
            any_half = rng.random() < 0.3
            stored = bits.astype(np.uint16).view(np.float16) if any_half else bits.view(np.float32).astype(np.float16)
            x = stored.astype(np.float32)
        else:
            bits = weights(rng, shape)
            if dtype == "BF16":
                bits &= np.uint32(0xFFFF0000)
            x = bits.view(np.float32)
            stored = (bits >> 16).astype(np.uint16) if dtype == "BF16" else x
        if round_bf16 and dtype != "BF16":
            x = bf16_rounded(np.ascontiguousarray(x, np.float32))
    # dealt in turn from the runs
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = [int(starts[i % n_runs]) + i // n_runs for i in range(n_rows)]
    raw = unaligned(rng, np.ascontiguousarray(stored).view(np.uint8).reshape(n_rows, -1), 1)
    rows = kernels.StoredRows(raw, dtype, n_cols, first_rows, scale, block, round_bf16)
    return rows, np.ascontiguousarray(x[order], np.float32)


# ---------------------------------------------------------------- a case


class Case(NamedTuple):
    rows: kernels.StoredRows
    x: F32
    importance: F32 | None


def make(name: str, seed: int, number: int) -> Case:
    """Case `number` of a type: always the same one."""
    rng = np.random.default_rng([seed, number, *name.encode()])
    block = QTYPES[name].block
    widest = {1: 700, 32: 40, 256: 7}[block]
    shape = (int(rng.integers(1, 20)), block * int(rng.integers(1, widest)))
    if rng.random() < 0.02:
        shape = (int(rng.integers(1, 3)), block * int(rng.integers(1, 20 * widest)))
    rows, x = store(rng, str(rng.choice(["F32", "F32", "F32", "BF16", "F16", "F8_E4M3", "F8_E4M3"])), shape)
    w = importance(rng, shape[1])
    return Case(rows, unaligned(rng, x, 4), None if w is None else unaligned(rng, w, 4))


class Guarded:
    """Room for blocks, between bytes that must stay."""

    def __init__(self, shape: Shape) -> None:
        n = shape[0] * shape[1]
        self.whole = np.full(n + 256, GUARD, np.uint8)
        self.out = self.whole[128 : 128 + n].reshape(shape)

    def check(self, what: str) -> None:
        if not ((self.whole[:128] == GUARD).all() and (self.whole[-128:] == GUARD).all()):
            raise DifferenceError(f"{what}: wrote beside its output")


def outcome(case: Case, name: str, kernel: str) -> bytes | str:
    """The blocks, or the sentence they are refused with."""
    room = Guarded((case.x.shape[0], QTYPES[name].row_bytes(case.x.shape[1])))
    try:
        kernels.quantize(case.x, name, case.importance, kernel, room.out)
        return room.out.tobytes()
    except QuantkitError as e:
        return f"{type(e).__name__}: {e}"
    finally:
        room.check(kernel)


def fused(case: Case, name: str, kernel: str) -> bytes | str:
    """The blocks of one pass, or the sentence it refuses them with."""
    room = Guarded((case.x.shape[0], QTYPES[name].row_bytes(case.x.shape[1])))
    os.environ["QUANTKIT_KERNELS"] = kernel
    try:
        kernels.quantize_stored(case.rows, name, case.importance, room.out)
        return room.out.tobytes()
    except QuantkitError as e:
        return f"{type(e).__name__}: {e}"
    finally:
        del os.environ["QUANTKIT_KERNELS"]
        room.check(f"{kernel}, in one pass")


def reference(name: str) -> str:
    """The ggml that defines the bytes of a type."""
    return "ggml-pinned" if name in kernels.DIFFERS_IN_WHEEL else "ggml"


def describe(a: bytes | str, b: bytes | str, name: str) -> str:
    if isinstance(a, str) or isinstance(b, str):
        return f"ggml: {a if isinstance(a, str) else 'blocks'}; here: {b if isinstance(b, str) else 'blocks'}"
    size = QTYPES[name].block_bytes
    x, y = (np.frombuffer(blocks, np.uint8).reshape(-1, size) for blocks in (a, b))
    bad = np.flatnonzero((x != y).any(1))
    i = int(bad[0])
    return f"{bad.size} of {len(x)} blocks differ, the first {i}: {x[i].tobytes().hex()} {y[i].tobytes().hex()}"


def rows_by_set(case: Case, sets: list[str]) -> None:
    """Stored rows to float32, in every set and in plain C++: numpy's bits, where it is a number."""
    rows = case.rows
    if len(rows.first_rows) > 1:
        return
    want, nan = case.x.view(np.uint32), np.isnan(case.x)
    flat = np.empty(case.x.size, np.float32)
    for name in (*sets, "plain"):
        if rows.dtype == "F8_E4M3":
            assert rows.scale is not None
            _native.e4m3_to_f32(
                rows.stored, rows.scale, int(rows.first_rows[0]), *rows.block, rows.round_bf16,
                flat.reshape(case.x.shape), name,
            )  # fmt: skip
        elif rows.dtype == "F32":
            _native.f32_to_f32(rows.stored.copy().view(np.float32).reshape(-1), rows.round_bf16, flat, name)
        elif rows.dtype == "F16":
            _native.f16_to_f32(rows.stored.copy().view(np.uint16).reshape(-1), rows.round_bf16, flat, name)
        else:
            _native.bf16_to_f32(rows.stored.copy().view(np.uint16).reshape(-1), flat, name)
        got = flat.reshape(case.x.shape)
        bad = np.where(nan, ~np.isnan(got), got.view(np.uint32) != want)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise DifferenceError(f"{name}: {rows.dtype} to float32 at {at}: {case.x[at]!r}, here {got[at]!r}")


def run(name: str, seed: int, number: int) -> str:
    """Run a case in every set; what came of it. Raises DifferenceError."""
    case = make(name, seed, number)
    expected = outcome(case, name, reference(name))
    sets = [kernel for kernel, types in kernels.OWN.items() if name in types]
    rows_by_set(case, sets)
    came = "same blocks" if isinstance(expected, bytes) else "same refusal"
    for kernel in sets:
        got = outcome(case, name, kernel)
        if got != expected:
            raise DifferenceError(f"{kernel}: {describe(expected, got, name)}")
        in_one = fused(case, name, kernel)
        if in_one != expected:
            raise DifferenceError(f"{kernel}, in one pass: {describe(expected, in_one, name)}")
    return came


# ---------------------------------------------------------------- many


def cases(types: list[str], first: int) -> Iterator[tuple[str, int]]:
    number = first
    while True:
        yield from ((name, number) for name in types)
        number += 1


def again(name: str, seed: int, number: int) -> str:
    command = f"python tests/tools/fuzz_kernels.py {name} --seed {seed} --first {number} --cases 1"
    return f"{name} case {number} (again: {command})"


def fuzz(types: list[str], seed: int, first: int, n_cases: int | None, seconds: float, at: mmap.mmap) -> int:
    """Run cases until there were so many, or so long; `at` always says which one runs."""
    came: Counter[str] = Counter()
    n, deadline = 0, time.monotonic() + seconds
    for name, number in cases(types, first):
        if n == n_cases or (n_cases is None and time.monotonic() > deadline):
            break
        at[:16] = struct.pack("<QQ", types.index(name), number)
        try:
            came[run(name, seed, number)] += 1
        except DifferenceError as e:
            print(f"{again(name, seed, number)}: {e}")
            return 1
        n += 1
    counts = ", ".join(f"{count:,} {what}" for what, count in came.most_common())
    print(f"{n:,} cases of {len(types)} types, seed {seed}, from case {first}: {counts}")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all that have a kernel of our own")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, help="so many, however long it takes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each type")
    options = parser.parse_args()
    unknown = [name for name in options.types if name not in TYPES]
    if unknown:
        parser.error(f"no kernel of our own for {', '.join(unknown)}; there are {', '.join(TYPES)}")
    types = options.types or TYPES
    for name in types:
        kernels.select(QTYPES[name], reference(name))  # says what is missing
    # ggml ends the process when its search meets NaN: run in a child, and know where it was
    at = mmap.mmap(-1, 16)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = fuzz(types, options.seed, options.first, options.cases, options.seconds, at)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0 or status == 70:
        which, number = struct.unpack("<QQ", at[:16])
        how = signal.Signals(-status).name if status < 0 else "an exception"
        print(f"{again(types[which], options.seed, number)}: the process was ended by {how}")
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()

"""Error feedback beside the stock kernels, one thread: A B A B, medians, in microseconds of processor time a weight.

    python benchmarks/rounding_kernels.py [TYPE …] [--columns 2048] [--rows 256] [--set avx2] [--factor] [--markdown]

Each cell is the time of a whole matrix of that shape over its weights: feedback without and with the search for scales
beside quantkit's own stock kernel and ggml's, and the ratios to the stock kernel. Most of what feedback costs without
the search grows with the columns: what the columns after a slab lose is a product with a part of U. Asserted first: all
sets of this processor give the same bytes, and the output error is below stock's. With --factor: seconds of factoring.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from quantkit import kernels
from quantkit.base.text import columns, markdown_head, markdown_row
from quantkit.gguf.types import QTYPES
from quantkit.kernels import F32, FEEDBACK
from quantkit.rounding import Factor, Options, factor, quantize

ROUNDS = 5
HEAD = ["type", "ggml", "stock", "feedback", "search", "feedback / stock", "search / stock", "error", "error, search"]


def covariance(n: int) -> F32:
    """Of inputs of which few directions carry most."""
    rng = np.random.default_rng(0)
    spectrum = np.exp(1.2 * rng.standard_normal(n))
    inputs = (rng.standard_normal((2 * n, n)) * spectrum) @ np.linalg.qr(rng.standard_normal((n, n)))[0]
    h = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return np.asarray(np.tril(h) + np.tril(h, -1).T)


def seconds(call: Callable[[], object]) -> float:
    """Of the processor, which what else runs here does not lengthen much."""
    start = time.process_time()
    call()
    return time.process_time() - start


def error(rows: F32, blocks: kernels.U8, name: str, f: Factor) -> float:
    d = (rows - kernels.dequantize(blocks, name, rows.shape[1])).astype(np.float64)
    return float(np.sum(d @ f.h.astype(np.float64) * d))


def measure(name: str, rows: F32, f: Factor, chosen: str) -> list[str]:
    qt = QTYPES[name]
    importance = f.importance if qt.uses_imatrix else None
    ggml = "ggml-pinned" if name in kernels.DIFFERS_IN_WHEEL else "ggml"
    plain, search = Options(search=False), Options()
    few = rows[:32]
    for options in (plain, search):
        if len({quantize(few, name, f, options, kernel).tobytes() for kernel in FEEDBACK}) != 1:
            raise SystemExit(f"{name}, {options}: the sets differ")
    jobs: dict[str, Callable[[], kernels.U8]] = {
        "ggml": partial(kernels.quantize, rows, name, importance, ggml),
        "stock": partial(kernels.quantize, rows, name, importance),
        "feedback": partial(quantize, rows, name, f, plain, chosen),
        "search": partial(quantize, rows, name, f, search, chosen),
    }
    made = {job: call() for job, call in jobs.items()}
    errors = {job: error(rows, blocks, name, f) for job, blocks in made.items()}
    if max(errors["feedback"], errors["search"]) >= errors["stock"]:
        raise SystemExit(f"{name}: the output error is not below stock's: {errors}")
    taken: dict[str, list[float]] = {job: [] for job in jobs}
    for _ in range(ROUNDS):
        for job, call in jobs.items():
            taken[job].append(seconds(call))
    each = {job: 1e6 * statistics.median(times) / rows.size for job, times in taken.items()}
    return [
        name,
        *(f"{each[job]:.4f}" for job in jobs),
        *(f"{each[job] / each['stock']:.1f}" for job in ("feedback", "search")),
        *(f"{errors[job] / errors['stock']:.3f}" for job in ("feedback", "search")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all that have error feedback")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--set", dest="name", default=kernels.feedback_set(), choices=list(FEEDBACK))
    parser.add_argument("--factor", action="store_true", help="time the factor of the covariance too")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    h = covariance(options.columns)
    f = factor(h, kernel=options.name)
    if options.factor:
        taken = [seconds(partial(factor, h, kernel=options.name)) for _ in range(3)]
        print(f"factor of {options.columns} columns, {options.name}: {statistics.median(taken):.2f} s")
    rows = (0.02 * np.random.default_rng(1).standard_normal((options.rows, options.columns))).astype(np.float32)
    print(
        f"{options.rows} rows of {options.columns}, {options.name}; microseconds a weight; errors are ratios to stock's"
    )
    if options.markdown:
        print(markdown_head(HEAD))
    else:
        (line,) = columns([HEAD], right=range(1, 9), least=[8] * 9)
        print(line)
    for name in options.types or sorted(FEEDBACK[options.name], key=lambda t: QTYPES[t].id):
        row = measure(name, rows, f, options.name)
        least = [max(8, len(head)) for head in HEAD]
        (line,) = [markdown_row(row)] if options.markdown else columns([row], right=range(1, 9), least=least)
        print(line, flush=True)


if __name__ == "__main__":
    main()

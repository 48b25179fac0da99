"""quantkit's own kernels against ggml's functions, one thread: A B A B, medians, equality first.

    python benchmarks/kernels.py [TYPE …] [--importance LAW …] [--set avx2] [--markdown]

Weights are FP8-born, 256 rows of 4096 unless a type is quick. A ratio is ggml's time over ours in the same run;
cycles are of the time-stamp counter's rate as the kernel reports it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from quantkit import kernels
from quantkit.base.text import columns, markdown_head, markdown_row
from quantkit.gguf.types import ABORT_WITHOUT_IMATRIX, QTYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tools"))

import laws

ROUNDS = 7
SECONDS = 0.15


def hertz() -> float:
    """Cycles a second, by /proc/cpuinfo; 0 where it does not say."""
    try:
        found = re.search(r"cpu MHz\s*:\s*([0-9.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return 0.0
    return float(found[1]) * 1e6 if found else 0.0


def seconds(call: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


HEAD = ["type", "importance", "ggml, Mweights/s", "quantkit, Mweights/s", "ratio", "cycles a weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all that have a kernel of our own")
    parser.add_argument("--importance", nargs="*", default=["real", "lognormal 3", "none"], choices=laws.IMPORTANCE)
    parser.add_argument("--set", dest="name", default=next(iter(kernels.OWN), None), choices=list(kernels.OWN))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    types = options.types or sorted(kernels.OWN[options.name], key=lambda t: QTYPES[t].id)
    rate = hertz()
    rng = np.random.default_rng(1)
    if options.markdown:
        print(markdown_head(HEAD))
    for name in types:
        qt = QTYPES[name]
        reference = "ggml-pinned" if name in kernels.DIFFERS_IN_WHEEL else "ggml"
        for law in options.importance:
            w = laws.IMPORTANCE[law](rng, 4096)
            if (w is None and name in ABORT_WITHOUT_IMATRIX) or (w is not None and not qt.uses_imatrix):
                continue
            x = laws.WEIGHTS["fp8 normal"](rng, (64, 4096))
            out = np.empty((x.shape[0], qt.row_bytes(4096)), np.uint8)

            job = partial(kernels.quantize, x, name, w, out=out)

            job(kernel=reference)
            expected = out.tobytes()
            job(kernel=options.name)
            if out.tobytes() != expected:
                raise SystemExit(f"{name}, importance {law}: the bytes differ")
            once = {k: seconds(partial(job, kernel=k), 1) for k in (reference, options.name)}
            repeat = {k: max(1, round(SECONDS / taken)) for k, taken in once.items()}
            times: dict[str, list[float]] = {reference: [], options.name: []}
            for _ in range(ROUNDS):
                for kernel, taken in times.items():
                    taken.append(seconds(partial(job, kernel=kernel), repeat[kernel]))
            theirs, ours = (statistics.median(t) for t in times.values())
            speeds = [f"{x.size / t / 1e6:.1f}" for t in (theirs, ours)]
            cycles = f"{rate * ours / x.size:.1f}" if rate else ""
            row = [name, law, *speeds, f"{theirs / ours:.1f}", cycles]
            (line,) = [markdown_row(row)] if options.markdown else columns([row], right=range(6), least=[11] * 6)
            print(line, flush=True)


if __name__ == "__main__":
    main()

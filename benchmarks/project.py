"""A PROJECTION, not a measurement: hours and core-hours for the real R1, from rates measured here and its tensor list.

    python benchmarks/project.py [--model deepseek-r1] [--recipe UD-IQ1_S …] [--cores 2 16 64]

Each type's rate is taken in this run on one thread (FP8 to blocks, importance given where the type uses it), and
multiplied out over the plan's tensors; cores are taken to scale without loss, disks to keep up.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from quantkit import kernels
from quantkit.base.text import markdown_head, markdown_row
from quantkit.gguf.types import QTYPES
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tools"))

import laws

SECONDS = 0.5
SHAPE = (128, 4096)


def rate(name: str, kernel: str | None) -> float:
    """Weights a second of a type on one thread, FP8 decoding included."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 120, SHAPE, dtype=np.uint8)
    scale = np.exp(rng.normal(-9, 0.3, (-(-SHAPE[0] // 128), SHAPE[1] // 128))).astype(np.float32)
    w = laws.IMPORTANCE["lognormal 1"](rng, SHAPE[1]) if QTYPES[name].uses_imatrix else None
    x = np.empty(SHAPE, np.float32)
    out = np.empty((SHAPE[0], QTYPES[name].row_bytes(SHAPE[1])), np.uint8)
    n, start = -1, 0.0
    while n < 0 or time.perf_counter() - start < SECONDS:
        kernels.e4m3_to_f32(codes, scale, 0, (128, 128), x, True)
        kernels.quantize(x, name, w, kernel, out)
        if n < 0:  # the first call makes tables
            start = time.perf_counter()
        n += 1
    return max(n, 1) * x.size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-r1")
    parser.add_argument("--recipe", nargs="*", default=["UD-IQ1_S", "UD-IQ1_M", "UD-IQ2_XXS", "UD-Q2_K_XL", "Q4_K_M"])
    parser.add_argument("--cores", nargs="*", type=int, default=[2, 16, 64])
    args = parser.parse_args()
    catalogue = open_model(args.model)
    rates: dict[tuple[str, bool], float] = {}
    print(f"projection for {args.model}: core-hours from rates measured on one thread here; hours at so many cores")
    print(markdown_head(["recipe", "kernels", "core-hours", *(f"{n} cores, h" for n in args.cores)]))
    for name in args.recipe:
        plan = make_plan(catalogue, load(name))
        for own in (True, False):
            hours = 0.0
            for t in plan.tensors:
                if t.tensor.quantizable:
                    key = (t.type, own)
                    if key not in rates:
                        reference = "ggml-pinned" if t.type in kernels.DIFFERS_IN_WHEEL else "ggml"
                        rates[key] = rate(t.type, None if own else reference)
                    hours += t.tensor.n_elements / rates[key] / 3600
            spread = [f"{hours / n:.2f}" for n in args.cores]
            print(markdown_row([name, "quantkit" if own else "ggml", f"{hours:.1f}", *spread]), flush=True)


if __name__ == "__main__":
    main()

"""How a native build scales: threads, slab size, tensor size. In one process, output to a temporary file; medians.

    python benchmarks/scaling.py [--experts 8] [--recipe UD-IQ1_S]

The output's bytes are checked to be the same in every row.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from footprint import CONFIG

from quantkit import build as builds
from quantkit import demo, kernels, toolchain
from quantkit.arch.options import Options
from quantkit.engines.native import SLAB_VALUES, NativeEngine
from quantkit.imatrix import open_imatrix
from quantkit.models import open_model
from quantkit.plan import make_plan
from quantkit.recipe import load

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--recipe", default="UD-IQ1_S")
    args = parser.parse_args()
    kernels.use_pinned_library(toolchain.ggml_library())
    n_cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="quantkit-scaling-") as name:
        folder = Path(name)
        sizes = {"many small tensors": (512, 4 * args.experts), "real experts": (2048, args.experts)}
        for what, (width, experts) in sizes.items():
            checkpoint = folder / f"c{width}"
            checkpoint.mkdir()
            config = {**CONFIG, "n_routed_experts": experts, "moe_intermediate_size": width}
            demo.make_checkpoint(checkpoint, config)
            model = open_model(str(checkpoint), Options(pre=demo.PRE))
            imatrix = folder / f"i{width}.gguf"
            shapes = {t.name: t.shape for t in model.tensors if t.quantizable and t.layer is not None}
            demo.make_imatrix(imatrix, shapes)
            weights = open_imatrix(str(imatrix))
            plan = make_plan(model, load(args.recipe), weights)
            digests, one = set(), 0.0
            print(
                f"{what}: {plan.n_elements:,} weights\n| threads | slab, values | s | Mweights/s | ratio to 1 thread |"
            )
            print("|---|---|---|---|---|")
            rows = [(t, SLAB_VALUES) for t in sorted({1, 2, n_cpus})] + [
                (n_cpus, SLAB_VALUES >> 4),
                (n_cpus, SLAB_VALUES << 2),
            ]
            for threads, slab in rows:
                taken = []
                for _ in range(ROUNDS):
                    out = folder / "out.gguf"
                    ready = builds.prepare(plan, out, weights, force=True)
                    start = time.monotonic()
                    builds.run(ready, NativeEngine(slab), threads, lambda _name, _n: None)
                    taken.append(time.monotonic() - start)
                    digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
                median = statistics.median(taken)
                one = one or median
                speed = plan.n_elements / median / 1e6
                print(f"| {threads} | {slab:,} | {median:.2f} | {speed:.1f} | {one / median:.2f} |", flush=True)
            if len(digests) != 1:
                sys.exit("the bytes depend on threads or slabs")


if __name__ == "__main__":
    main()

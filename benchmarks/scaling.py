"""How a native build scales: threads, slab size, tensor size, and a cold page cache. Rounds alternate; medians.

    python benchmarks/scaling.py [--experts 8] [--recipe UD-IQ1_S] [--rounds 3]

The output's bytes are checked to be the same in every row. "Cores busy" is processor time over wall time: what the
build leaves idle shows there. "Ceiling" is what the machine itself gives: as many processes as threads, each running
one kernel on its own memory and nothing else, against one such process. On shared or boosting processors it is below
the number of threads, and no program scales better.

Cold: the checkpoint's pages are dropped before each build (POSIX_FADV_DONTNEED), and a plain read of the files after
dropping gives the disk's time. A build should take little more than the slower of that and the warm build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from footprint import CONFIG

from quantkit.base.text import markdown_table
from quantkit.building import run as builds
from quantkit.building.engines.native import SLAB_VALUES, NativeEngine
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.model import demo
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe.load import load

ALONE = """
import sys, time
import numpy as np
from quantkit import kernels
rng = np.random.default_rng(1)
x = (rng.standard_normal((128, 7168)) * 0.02).astype(np.float32)
w = rng.random(7168, dtype=np.float32) + 0.01
kernels.quantize(x[:8], "IQ1_S", w)
print("ready", flush=True)
sys.stdin.readline()
start, n = time.perf_counter(), 0
while time.perf_counter() - start < 1.0:
    kernels.quantize(x, "IQ1_S", w)
    n += x.size
print(n / (time.perf_counter() - start), flush=True)
"""


def rate(processes: int) -> float:
    """Weights a second of so many processes together, each with memory of its own."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE],
            cwd=tempfile.gettempdir(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for p in started:
        assert p.stdout is not None
        p.stdout.readline()
    for p in started:
        assert p.stdin is not None
        p.stdin.write("go\n")
        p.stdin.flush()
    total = 0.0
    for p in started:
        assert p.stdout is not None
        total += float(p.stdout.readline())
        p.communicate()
    return total


def build(plan: Plan, weights: Imatrix, out: Path, threads: int, slab: int) -> tuple[float, float, str]:
    """Wall seconds, processor seconds, and the SHA-256 of the file."""
    ready = builds.prepare(plan, out, weights, force=True, resume=False)
    wall, cpu = time.monotonic(), time.process_time()
    builds.run(ready, NativeEngine(slab), threads, lambda _name, _n: None)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    return wall, cpu, hashlib.sha256(out.read_bytes()).hexdigest()


def drop(paths: list[Path]) -> None:
    """Drop the pages of files from the page cache."""
    os.sync()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read(paths: list[Path]) -> float:
    """Seconds of a plain read."""
    start, buffer = time.monotonic(), bytearray(8 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--recipe", default="UD-IQ1_S")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
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
            rows = [(t, SLAB_VALUES) for t in sorted({1, 2, n_cpus})]
            rows += [(n_cpus, SLAB_VALUES >> 4), (n_cpus, SLAB_VALUES << 2)]
            taken: dict[tuple[int, int], list[tuple[float, float, str]]] = {row: [] for row in rows}
            alone: dict[int, list[float]] = {t: [] for t, _ in rows}
            stored = sorted(checkpoint.glob("*.safetensors"))
            disk, cold = [], []
            for _ in range(args.rounds):
                for threads, slab in rows:
                    taken[threads, slab].append(build(plan, weights, folder / "out.gguf", threads, slab))
                for threads, rates_seen in alone.items():
                    rates_seen.append(rate(threads))
                drop(stored)
                disk.append(read(stored))
                drop(stored)
                cold.append(build(plan, weights, folder / "out.gguf", n_cpus, SLAB_VALUES))
            if len({digest for runs in [*taken.values(), cold] for _, _, digest in runs}) != 1:
                sys.exit("the bytes depend on threads or slabs")
            walls = {row: statistics.median(wall for wall, _, _ in runs) for row, runs in taken.items()}
            rates = {threads: statistics.median(found) for threads, found in alone.items()}
            print(f"{what}: {plan.n_elements:,} weights, {args.rounds} rounds")
            head = ["threads", "slab, values", "s", "Mweights/s", "ratio to 1 thread", "ceiling", "cores busy"]
            lines = []
            for (threads, slab), runs in taken.items():
                wall = walls[threads, slab]
                busy = statistics.median(cpu / w for w, cpu, _ in runs)
                ratios = (walls[1, SLAB_VALUES] / wall, rates[threads] / rates[1], busy)
                speed = f"{plan.n_elements / wall / 1e6:.1f}"
                lines.append([str(threads), f"{slab:,}", f"{wall:.2f}", speed, *(f"{r:.2f}" for r in ratios)])
            print(markdown_table(lines, head))
            d, c, w = statistics.median(disk), statistics.median(t for t, _, _ in cold), walls[n_cpus, SLAB_VALUES]
            print(
                f"cold page cache, {n_cpus} threads: disk alone {d:.2f} s, warm build {w:.2f} s, cold build {c:.2f} s: "
                f"{c / max(d, w):.2f} x the slower of the two\n",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""`quantkit imatrix` on files as large as R1's: 58 layers x 256 experts x 3, in_sum too, 2.0 GB each. Seconds and peak
memory of each command, run as a process of its own; the results are checked.

    python benchmarks/imatrix.py [--layers 58] [--dir FOLDER] [--read-only]

The files, and what is made of them, take 8 GB in a temporary folder; with --read-only, which leaves out what writes, 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantkit.imatrix.entries import Sums
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.write import Facts, Shape, write_gguf

DENSE = {
    "attn_k_b": 128 * 128, "attn_kv_a_mqa": 7168, "attn_output": 16384, "attn_q_a": 7168, "attn_q_b": 1536,
    "attn_v_b": 512 * 128,
}  # fmt: skip
EXPERTS = {"ffn_down_exps": 2048, "ffn_gate_exps": 7168, "ffn_up_exps": 7168}


def make(path: Path, n_layers: int, seed: int) -> None:
    """Lognormal sums; a few experts that saw nothing."""
    rng = np.random.default_rng(seed)
    layers = range(3, 3 + n_layers)
    base = rng.lognormal(0, 1.5, (256, 7168)).astype(np.float32)
    counts = {layer: np.floor(rng.lognormal(5, 1.5, 256)) for layer in layers}
    shapes = [Shape(f"blk.{i}.{kind}.weight", 1, n, True) for i in layers for kind, n in DENSE.items()]
    shapes += [Shape(f"blk.{i}.{kind}.weight", 256, n, True) for i in layers for kind, n in EXPERTS.items()]

    def entries() -> Iterator[Sums]:
        for shape in shapes:
            seen = counts[int(shape.name.split(".")[1])] if shape.n_mats > 1 else np.array([200_000.0])
            values = np.resize(base, (shape.n_mats, shape.n_cols)) * seen[:, None].astype(np.float32)
            yield Sums(shape.name, values, seen, values)

    write_gguf(path, Facts((f"{path.stem}.txt",), 390, 512), entries(), shapes)


def run(*words: str | Path, code: int = 0) -> None:
    """Run a command that ends with this code, and print its seconds and peak memory."""
    command = [sys.executable, "-m", "quantkit", "imatrix", *map(str, words)]
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        child = os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        )
        _, status, usage = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == code, command
    told = " ".join(Path(w).name for w in map(str, words))
    mine = usage.ru_utime + usage.ru_stime
    print(
        f"{told:<42} {time.perf_counter() - start:6.1f} s ({mine:.1f} s of processor time), "
        f"peak {usage.ru_maxrss / 1024:,.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--read-only", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        a, b, both, dat = (folder / n for n in ("a.gguf", "b.gguf", "both.gguf", "a.dat"))
        for seed, path in enumerate((a,) if args.read_only else (a, b)):
            make(path, args.layers, seed)
        print(f"files of {a.stat().st_size / 1e9:.2f} GB")
        run("info", a, "-q")
        run("info", a, "--figure", folder / "coverage.svg", "-q")
        run("check", a, "--recipe", "UD-IQ1_S", "--model", "deepseek-r1", code=1)  # experts were never seen
        if args.read_only:
            return
        run("merge", a, b, "-o", both, "-q")
        run("convert", a, "-o", dat, "-q")
        one, two, total, other = (open_imatrix(str(path)) for path in (a, b, both, dat))
        for entry in ("blk.3.ffn_up_exps.weight", "blk.3.attn_q_a.weight"):
            x, y, z = (m.sums(entry) for m in (one, two, total))
            assert (z.counts == x.counts + y.counts).all()
            assert np.array_equal(z.in_sum2, (x.in_sum2.astype(float) + y.in_sum2).astype(np.float32))
            n = one.entries[entry].n_values
            assert one.weights(entry, 0, n).tobytes() == other.weights(entry, 0, n).tobytes()


if __name__ == "__main__":
    main()

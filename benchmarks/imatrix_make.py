"""`quantkit imatrix make` against llama-imatrix on the same text: are the values equal, and which takes longer?

    python benchmarks/imatrix_make.py MODEL.gguf --text calib.txt --ctx 256 --chunks 40
    python benchmarks/imatrix_make.py CHECKPOINT --text calib.txt --pre deepseek-v3

Each runs twice, in turn. llama-imatrix runs on a GGUF: a checkpoint's BF16 file is built first and not timed. Where
they differ: ggml rounds activations to BF16 for a BF16 file's products, and adds in another order; so some tokens on
the edge between two experts go the other way, which an expert with few tokens feels. For an F32 file it rounds nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.llama_cpp import toolchain

#: a value's relative difference: median of all; an entry's, weighed by its values; share of counted tokens
MEDIAN, PER_ENTRY, COUNTS = 0.001, 0.01, 0.001
_FEW = 100


class Took(NamedTuple):
    processor: float
    """seconds of all threads"""
    wall: float
    peak: int
    """bytes"""
    said: str


def run(command: list[str]) -> Took:
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{command[0]} failed:\n{err.read()[-2000:]}")
        return Took(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024, out.read())


def compare(ours: Imatrix, theirs: Imatrix) -> bool:
    """Print how two importance matrices differ; whether they are equal within the bounds."""
    if set(ours.entries) != set(theirs.entries):
        print("other entries:", sorted(set(ours.entries) ^ set(theirs.entries))[:8])
        return False
    every, many, entries, differ, counted = [], [], {}, 0.0, 0.0
    for name in sorted(ours.entries):
        a, b = ours.sums(name), theirs.sums(name)
        differ, counted = differ + float(np.abs(a.counts - b.counts).sum()), counted + float(b.counts.sum())
        means = [s.in_sum2 / np.maximum(s.counts, 1)[:, None] for s in (a, b)]
        off = np.abs(means[0] - means[1])
        relative = off / np.maximum(means[1], np.finfo(np.float32).tiny)
        every.append(relative.ravel())
        many.append(relative[b.counts >= _FEW].ravel())
        entries[name] = float(off.sum() / means[1].sum())
    print(f"entries {len(entries)}, chunks {ours.n_chunks} and {theirs.n_chunks}")
    for what, values in (("all values", every), (f"without experts of fewer than {_FEW} tokens", many)):
        r = np.concatenate(values)
        q = [f"{100 * x:.4f} %" for x in (np.median(r), np.quantile(r, 0.99), r.max())]
        print(f"relative difference, {what} ({r.size:,}): median {q[0]}, 99 % within {q[1]}, largest {q[2]}")
    worst = max(entries, key=lambda name: entries[name])
    print(f"an entry's difference, weighed by its values: largest {100 * entries[worst]:.3f} % ({worst})")
    print(f"counts: {differ:,.0f} of {counted:,.0f} tokens differ")
    median = float(np.median(np.concatenate(every)))
    return median <= MEDIAN and entries[worst] <= PER_ENTRY and differ <= COUNTS * counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pre")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        gguf, pre = args.model, ["--pre", args.pre] if args.pre else []
        quantkit = [sys.executable, "-m", "quantkit"]
        if args.model.is_dir():
            recipe, gguf = work / "bf16.yaml", work / "bf16.gguf"
            rules = 'rules:\n  - {match: "*", type: BF16, why: "as the converter"}\n'
            recipe.write_text("name: bf16\narch: [any]\nfile_type: BF16\nimatrix: optional\n" + rules)
            run([*quantkit, "build", str(args.model), *pre, "-r", str(recipe), "-o", str(gguf), "-q"])
        common = ["-c", str(args.ctx), "-t", str(args.threads)]
        common += ["--chunks", str(args.chunks)] if args.chunks else []
        ours, theirs = work / "ours.gguf", work / "theirs.gguf"
        make = [*quantkit, "imatrix", "make", str(args.model), *pre, "--text", str(args.text), *common, "--force"]
        make += ["--json", "-o", str(ours)]
        tool = [str(toolchain.find("llama-imatrix")), "-m", str(gguf), "-f", str(args.text), *common, "--no-ppl"]
        took: dict[str, list[Took]] = {"quantkit": [], "llama-imatrix": []}
        for _ in range(args.rounds):
            took["quantkit"].append(run(make))
            took["llama-imatrix"].append(run([*tool, "-o", str(theirs)]))
        equal = compare(open_imatrix(str(ours)), open_imatrix(str(theirs)))
        for name, each in took.items():
            seconds = ", ".join(f"{t.processor:.1f} s processor, {t.wall:.1f} s wall" for t in each)
            print(f"{name:14} {seconds}; peak memory {max(t.peak for t in each) / 1e6:,.0f} MB")
        print(f"quantkit read {json.loads(took['quantkit'][0].said)['bytes_read']:,} bytes of weights")
        best = {name: min(t.processor for t in each) for name, each in took.items()}
        print(f"processor time, quantkit / llama-imatrix: {best['quantkit'] / best['llama-imatrix']:.2f}")
    if not equal:
        sys.exit("NOT equal within the bounds")


if __name__ == "__main__":
    main()

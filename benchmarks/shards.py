"""split and merge against cp and llama-gguf-split, in one run: A B A B, medians, ratios.

    python benchmarks/shards.py [--gib 2] [--max-size 500M] [--rounds 3] [--dir DIR]

Makes a file of random tensors, and splits and merges it in both ways; the bytes must be equal before any figure is
printed. quantkit does not end before its files are on disk, cp and llama-gguf-split do: so both are also measured
with a sync of their files behind. Every command starts with the disk at rest and no output there. Wall and
processor time, peak RSS of the process, and the bytes of the files made.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.base.text import markdown_table
from quantkit.gguf.header import STRING, U32, header_bytes, kv, pad
from quantkit.llama_cpp import toolchain

_TENSOR_BYTES = 40_000_000
#: runs a command and says on standard output what it took; a process of its own, since peak RSS is inherited
_METER = """
import os, sys, time
start = time.monotonic()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", 1, 0)])
_, code, usage = os.wait4(pid, 0)
print(code, time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
"""


class Run(NamedTuple):
    wall: float
    cpu: float
    rss: int
    made: int


def make(path: Path, gib: float) -> None:
    """A GGUF of random F16 tensors of about 40 MB, and small F32 ones between them, as in a model."""
    infos, at = [], 0
    n = max(int(gib * 2**30) // _TENSOR_BYTES, 2)
    for i in range(n):
        for name, shape, type_, nbytes in (
            (f"blk.{i}.attn_norm.weight", (1250,), "F32", 5000),
            (f"blk.{i}.ffn_down.weight", (5000, _TENSOR_BYTES // 10_000), "F16", _TENSOR_BYTES),
        ):
            infos.append((name, shape, type_, at))
            at += pad(nbytes)
    kvs = [kv("general.architecture", STRING, "llama"), kv("llama.block_count", U32, n)]
    with path.open("wb") as f:
        f.write(header_bytes(kvs, infos))
        start = f.tell()
        for _, _, type_, offset in infos:
            nbytes = 5000 if type_ == "F32" else _TENSOR_BYTES
            f.write(bytes(start + offset - f.tell()) + os.urandom(nbytes))
        f.write(bytes(start + at - f.tell()))


def measure(command: Sequence[str], outputs: Path) -> Run:
    """Run a command that makes the files of an empty folder."""
    for old in outputs.iterdir():
        old.unlink()
    os.sync()
    done = subprocess.run([sys.executable, "-SE", "-c", _METER, *command], capture_output=True, text=True, check=False)
    code, wall, cpu, rss = done.stdout.split() if done.returncode == 0 else ("1", "0", "0", "0")
    if code != "0":
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr[-2000:]}")
    return Run(float(wall), float(cpu), int(rss), sum(p.stat().st_size for p in outputs.iterdir()))


def same(a: Path, b: Path) -> None:
    names = sorted(p.name for p in a.iterdir())
    if names != sorted(p.name for p in b.iterdir()) or filecmp.cmpfiles(a, b, names, shallow=False)[0] != names:
        sys.exit(f"{a} and {b} have different files")


def table(title: str, ways: dict[str, tuple[list[str], Path]], rounds: int, check: Sequence[tuple[str, str]]) -> None:
    """Time commands in turn and print their medians. `check`: pairs of ways whose files must be the same."""
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (command, outputs) in ways.items():
            runs[way].append(measure(command, outputs))
        for a, b in check:
            same(ways[a][1], ways[b][1])
    medians = {way: statistics.median(r.wall for r in some) for way, some in runs.items()}
    print(f"\n{title}; the same bytes\n")
    head = ["way", "wall, s (median, all)", "to cp", "to cp + sync", "processor, s", "peak RSS, bytes", "bytes made"]
    rows = []
    for way, some in runs.items():
        walls = " ".join(f"{r.wall:.2f}" for r in some)
        to_cp, to_sync = (medians[way] / medians[base] for base in ("cp", "cp + sync"))
        cpu, rss = statistics.median(r.cpu for r in some), max(r.rss for r in some)
        wall = f"{medians[way]:.2f} ({walls})"
        rows.append([way, wall, f"{to_cp:.2f}", f"{to_sync:.2f}", f"{cpu:.2f}", f"{rss:,}", f"{some[0].made:,}"])
    print(markdown_table(rows, head))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--max-size", default="500M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where to work; else the folder for temporary files")
    args = parser.parse_args()
    tool = str(toolchain.find("llama-gguf-split"))
    quantkit = [sys.executable, "-m", "quantkit"]
    with tempfile.TemporaryDirectory(prefix="quantkit-shards-", dir=args.dir) as name:
        folder = Path(name)
        os.chdir(folder)  # not in the repository: there `quantkit` is the source folder, without its compiled module
        whole = folder / "m.gguf"
        start = time.monotonic()
        make(whole, args.gib)
        print(f"{whole.stat().st_size:,} bytes made in {time.monotonic() - start:.1f} s, {os.cpu_count()} processors")
        cp, ours, theirs, shards = (folder / n for n in ("cp", "ours", "theirs", "shards"))
        for each in (cp, ours, theirs, shards):
            each.mkdir()

        def ways(ours_command: list[str], theirs_command: list[str], inputs: list[str]) -> dict[str, Any]:
            synced = [f"{shlex.join(c)} >/dev/null && sync {d}/*" for c, d in (
                (["cp", *inputs, str(cp)], cp), (theirs_command, theirs))]  # fmt: skip
            return {
                "quantkit": ([*quantkit, *ours_command], ours),
                "cp": (["/bin/cp", *inputs, str(cp)], cp),
                "cp + sync": (["/bin/sh", "-c", synced[0]], cp),
                "llama-gguf-split": (theirs_command, theirs),
                "llama-gguf-split + sync": (["/bin/sh", "-c", synced[1]], theirs),
            }

        equal = [("quantkit", "llama-gguf-split")]
        split = ways(
            ["split", str(whole), str(ours / "m"), "--max-size", args.max_size, "--quiet"],
            [tool, "--split", "--split-max-size", args.max_size, str(whole), str(theirs / "m")],
            [str(whole)],
        )
        table(f"split at {args.max_size}", split, args.rounds, equal)
        for path in ours.iterdir():
            path.rename(shards / path.name)
        inputs = sorted(map(str, shards.iterdir()))
        merge = ways(
            ["merge", inputs[0], str(ours / "m.gguf"), "--gguf-split-compat", "--quiet"],
            [tool, "--merge", inputs[0], str(theirs / "m.gguf")],
            inputs,
        )
        table(f"merge of {len(inputs)}", merge, args.rounds, equal)
        subprocess.run([*quantkit, "merge", inputs[0], str(ours / "x.gguf"), "--quiet"], check=True)
        if not filecmp.cmp(whole, ours / "x.gguf", shallow=False):
            sys.exit("the merged file is not the file that was split")
        print("\nsplit and merged again, it is the file it was")


if __name__ == "__main__":
    main()

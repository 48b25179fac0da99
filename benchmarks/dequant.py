"""FP8 to BF16: quantkit dequant against a torch loop and against copying the result with cp. A B C A B C, medians.

    python benchmarks/dequant.py [--experts 32] [--threads 2] [--rounds 5] [--shard-size 1G]

The checkpoint has rows of R1's sizes (seeded weights). The loop is what DeepSeek's fp8_cast_bf16.py does, on the
processor: a source file loaded, its weights dequantized one by one, all saved by safetensors. Bits are compared
before any figure is printed. The source is in the page cache; every way ends with its output on disk (fsync).
Wall and processor time, peak memory of the process, and the most bytes on disk at once beside the source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from footprint import CONFIG, status

from quantkit.base.text import table
from quantkit.model import demo

SYNC = "import os, pathlib, sys\nfor p in pathlib.Path(sys.argv[-1]).iterdir():\n fd = os.open(p, 0); os.fsync(fd)\n"

LOOP = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
src, dst = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
dst.mkdir()
index = json.loads((src / "model.safetensors.index.json").read_text())
weight_map, loaded = index["weight_map"], {}
def get(name):
    file = weight_map[name]
    if file not in loaded:
        loaded[file] = load_file(src / file)
    return loaded[file][name]
for file in sorted(set(weight_map.values())):
    loaded.setdefault(file, load_file(src / file))
    out = {}
    for name, weight in loaded[file].items():
        if name.endswith("_scale_inv"):
            continue
        if weight.dtype == torch.float8_e4m3fn:
            m, n = weight.shape
            scale = get(name + "_scale_inv").repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)[:, :n]
            weight = (weight.float() * scale).bfloat16()
        out[name] = weight
    save_file(out, dst / file, {"format": "pt"})
    while len(loaded) > 2:
        del loaded[next(iter(loaded))]
for path in dst.iterdir():
    fd = os.open(path, 0)
    os.fsync(fd)
"""


class Run(NamedTuple):
    wall: float
    cpu: float
    rss: int
    disk: int


def measure(command: list[str], out: Path) -> Run:
    """Run a command that makes the directory `out`."""
    shutil.rmtree(out, ignore_errors=True)
    start, peak, disk = time.monotonic(), 0, 0
    stop = threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def watch() -> None:
        nonlocal peak, disk
        while not stop.wait(0.02):
            peak = status(process.pid, "status", "VmHWM:") * 1024 or peak  # not ru_maxrss: that has our own in it
            disk = max(disk, used(out))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, code, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    stop.set()
    watcher.join()
    if code:
        sys.exit(f"{command[:3]} failed")
    return Run(wall, usage.ru_utime + usage.ru_stime, peak, max(disk, used(out)))


def used(folder: Path) -> int:
    """Bytes of disk that the files of a directory take."""
    total = 0
    for path in folder.glob("*") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def require_equal(a: Path, b: Path) -> int:
    """Compare the tensors of two directories, however they are cut; their bytes."""
    import torch
    from safetensors import safe_open

    files: dict[str, Any] = {}
    for path in sorted(b.glob("*.safetensors")):
        opened: Any = safe_open(path, "pt")
        files |= dict.fromkeys(opened.keys(), opened)
    total = 0
    for path in sorted(a.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                x, y = f.get_tensor(name), files.pop(name).get_tensor(name)
                same = x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
                if not same:
                    sys.exit(f"{name} differs")
                total += x.nbytes
    if files:
        sys.exit(f"{a} lacks {next(iter(files))}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-size", default="1G")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantkit-dequant-") as name:
        folder = Path(name)
        os.chdir(folder)  # not in the repository: there `quantkit` is the source folder, without its compiled module
        src = folder / "checkpoint"
        src.mkdir()
        demo.make_checkpoint(src, {**CONFIG, "n_routed_experts": args.experts})
        stored = sum(p.stat().st_size for p in src.glob("*.safetensors"))
        ours, theirs, copy = folder / "quantkit", folder / "torch", folder / "copy"
        copied = f"cp -r {ours} {copy} && {sys.executable} -c '{SYNC}' {copy}"
        command = [sys.executable, "-m", "quantkit", "dequant", str(src), str(ours), "-q"]
        ways = {
            "quantkit dequant": ([*command, "-t", str(args.threads), "--shard-size", args.shard_size], ours),
            "torch loop": ([sys.executable, "-c", LOOP, str(src), str(theirs), str(args.threads)], theirs),
            "cp of the output": (["sh", "-c", copied], copy),
        }
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for i in range(args.rounds + 1):  # the first warms up
            for way, (command, out) in ways.items():
                run = measure(command, out)
                if i:
                    runs[way].append(run)
            if i == 0:
                nbytes = require_equal(ours, theirs)
                print(f"bits equal: {nbytes:,} bytes of tensors from {stored:,} of FP8, {args.threads} threads")
        print(f"medians of {args.rounds}")
        rows = []
        for way, made in runs.items():
            wall, cpu, rss, disk = (statistics.median(getattr(r, f) for r in made) for f in Run._fields)
            # the shell waits for cp, whose memory is not the shell's
            memory = "" if way.startswith("cp") else f"{rss / 2**20:.0f}"
            speed = f"{nbytes / wall / 1e6:.0f}"
            rows.append([way, f"{wall:.2f}", speed, f"{cpu:.2f}", memory, f"{disk / 1e6:.0f}"])
        print(table(rows, ["", "wall s", "MB/s", "CPU s", "RSS MiB", "disk MB"], right=range(1, 6)))
        first = runs["quantkit dequant"]
        for way in list(ways)[1:]:
            ratios = [b.wall / a.wall for a, b in zip(first, runs[way], strict=True)]
            print(f"{way}: {statistics.median(ratios):.2f} x the time ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

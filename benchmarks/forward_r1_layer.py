"""One MoE layer of R1's real shapes through the pass: peak memory, bytes read, seconds.

    python benchmarks/forward_r1_layer.py [--tokens 512] [--threads 1] [--full] [--dtype f32]
    python benchmarks/forward_r1_layer.py --read 8      # only reads and decodes 8 experts, twice, on one thread

Makes a checkpoint of one layer (256 experts, 11.4 GB in FP8) with random attention, router and embeddings, so that the
tokens spread over the experts; the experts' own weights are holes in the file, or random bytes with --full, and the
room on the disk that they then take. The bound to hold: under 3 GB at any moment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.forward.buffers import Buffers
from quantkit.forward.layer import Input, Key
from quantkit.forward.model import Model
from quantkit.forward.stream import Options, Pass
from quantkit.model import demo
from quantkit.model.families.known import config
from quantkit.model.families.options import Options as ModelOptions
from quantkit.model.open import open_model

BOUND = 3 * 10**9
_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
_EMBEDDED = 4096
"""tokens whose embeddings are not holes"""


def make(folder: Path, full: bool) -> None:
    """The checkpoint, in one file."""
    known = config("deepseek-r1")
    cfg = {**known, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    header: dict[str, Any] = {}
    end = 0
    for name, shape, kind in demo.checkpoint_tensors(cfg):
        stored = [(name, {"fp8": "F8_E4M3", "bias": "F32"}.get(kind, "BF16"), list(shape))]
        if kind == "fp8":
            stored.append((name + "_scale_inv", "F32", [-(-n // 128) for n in shape]))
        for key, dtype, sizes in stored:
            n = prod(sizes) * _BYTES[dtype]
            header[key] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end + n]}
            end += n
    raw = json.dumps(header).encode()
    rng = np.random.default_rng(1)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        f.truncate(8 + len(raw) + end)
        for name, about in header.items():
            if name != "lm_head.weight" and (full or ".mlp.experts." not in name):  # no logits are asked for
                f.seek(8 + len(raw) + about["data_offsets"][0])
                rows = min(about["shape"][0], _EMBEDDED) if "embed" in name else about["shape"][0]
                f.write(_values(rng, name, about["dtype"], (rows, *about["shape"][1:])))
    (folder / "config.json").write_text(json.dumps(cfg))
    demo.make_tokenizer(folder, cfg["vocab_size"])


def _values(rng: np.random.Generator, name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 112, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
        return bytes(codes.tobytes())
    values = rng.standard_normal(shape, np.float32)
    if name.endswith("_scale_inv"):
        values = np.full(shape, 1e-3, np.float32)
    elif "norm" in name:
        values = np.ones(shape, np.float32)
    elif len(shape) > 1:
        values /= np.float32(shape[-1] ** 0.5)
    else:
        values *= np.float32(1e-3)
    stored = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    return bytes(stored.tobytes())


class Experts:
    """Which experts are computed."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def see(self, given: Input) -> None:
        if "_exps" in given.names[0]:
            self.seen.add(given.mat)

    def end_of_layer(self, number: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def peak() -> int:
    """The most bytes that were resident in this process; getrusage counts the one that it was forked from, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(folder: Path, n_tokens: int, n_threads: int, dtype: str) -> None:
    model = Model(open_model(str(folder), ModelOptions(pre=demo.PRE)))
    at_start, before = peak(), resource.getrusage(resource.RUSAGE_SELF)
    tokens = np.random.default_rng(2).integers(0, _EMBEDDED, (max(1, n_tokens // 512), min(n_tokens, 512)))
    experts = Experts()
    start = time.monotonic()
    Pass([model], tokens, Options(n_threads=n_threads, dtype=dtype), [experts]).run()
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {
        "tokens": tokens.size,
        "threads": n_threads,
        "dtype": dtype,
        "torch": torch.__version__,
        "experts_computed": len(experts.seen),
        "bytes_read": model.weights.bytes_read,
        "rss_bytes_before_the_pass": at_start,
        "peak_rss_bytes": peak(),
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "MB_per_second": round(model.weights.bytes_read / seconds / 1e6, 1),
        "MB_per_processor_second": round(model.weights.bytes_read / used / 1e6, 1),
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    print(json.dumps(result, indent=1))
    if peak() > BOUND:
        sys.exit(f"more than {BOUND:,} bytes")


def read(folder: Path, n_experts: int) -> None:
    """Read experts as the pass does. The first time the memory is new, as for a run's first matrices."""
    model, buffers = Model(open_model(str(folder), ModelOptions(pre=demo.PRE))), Buffers()
    for _ in range(2):
        before, start, first = resource.getrusage(resource.RUSAGE_SELF), time.monotonic(), model.weights.bytes_read
        for expert in range(n_experts):
            for kind in ("gate", "up", "down"):
                model.weights.matrix(Key(f"blk.0.ffn_{kind}_exps.weight", expert), buffers.empty)
        after, nbytes = resource.getrusage(resource.RUSAGE_SELF), model.weights.bytes_read - first
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{nbytes:,} bytes: {nbytes / used / 1e6:,.0f} MB a second of processor time, "
            f"{nbytes / (time.monotonic() - start) / 1e6:,.0f} MB a second"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--read", type=int, metavar="EXPERTS")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None and args.read is not None:
        read(args.folder, args.read)
        return
    if args.folder is not None:
        measure(args.folder, args.tokens, args.threads, args.dtype)
        return
    with tempfile.TemporaryDirectory(prefix="quantkit-r1-layer-") as name:
        make(Path(name), args.full)
        # a process of its own, whose peak is the pass's
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--folder", name], env=os.environ, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()

"""Rows rounded by torch on a device beside the CPU's kernels, whose bytes are the reference: blocks that differ, the
output error of both, and seconds of both.

    python benchmarks/rounding_device.py [TYPE …] [--device cuda] [--columns 2048] [--rows 2048] [--plain] [--heavy]
        [--threads 1] [--markdown]

Normal weights, or with --heavy those of Student's t with 3 degrees of freedom. With search unless --plain. Seconds are
wall-clock, after one run of a few rows; those of the CPU's kernels are of one thread, those of torch of the device and
of the threads that make ggml's blocks for it. `differ`: blocks that are not the CPU's; `error`: the output error beside
the CPU's, with that of rows that differ in brackets. --device torch is torch on the CPU.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rounding_kernels import covariance

from quantkit import kernels
from quantkit.base.text import columns, markdown_head, markdown_row
from quantkit.gguf.types import QTYPES
from quantkit.kernels import F32, U8
from quantkit.rounding import Factor, Options, factor, quantize
from quantkit.rounding.on_torch import devices
from quantkit.rounding.on_torch import factor as factors
from quantkit.rounding.on_torch import rows as device_rows

HEAD = ["type", "differ", "rows", "error", "CPU s", "device s"]
FEW = 32


def errors(rows: F32, blocks: U8, name: str, f: Factor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Of each row."""
    d = rows - kernels.dequantize(blocks, name, rows.shape[1])
    return kernels.feedback_products(d, d, f.h)[:, 0]


def measure(name: str, rows: F32, f: Factor, g: factors.DeviceFactor, options: Options) -> list[str]:
    device_rows.quantize(rows[:FEW], name, g, options)
    start = time.perf_counter()
    expected = quantize(rows, name, f, options)
    between = time.perf_counter()
    made = device_rows.quantize(rows, name, g, options)  # ends with a copy to the CPU, so all is done then
    end = time.perf_counter()
    if not made.good.all():
        raise SystemExit(f"{name}: errors of {int((~made.good).sum())} rows grew beyond float32")
    differ = (made.blocks != expected).reshape(len(rows), -1, QTYPES[name].block_bytes).any(-1)
    others = differ.any(1)
    ours, theirs = errors(rows, made.blocks, name, f), errors(rows, expected, name, f)
    error = f"{ours.sum() / theirs.sum():.5f}"
    if others.any():
        error += f" ({ours[others].sum() / theirs[others].sum():.4f})"
    return [
        name, f"{int(differ.sum()):,} of {differ.size:,}", f"{int(others.sum()):,} of {len(rows):,}", error,
        f"{between - start:.2f}", f"{end - between:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(device_rows.KINDS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or torch (torch on the CPU)")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--plain", action="store_true", help="without the search for scales")
    parser.add_argument("--heavy", action="store_true", help="weights with a heavy tail")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = devices.find(args.device)
    if device is None:
        raise SystemExit("there is no GPU here; give --device torch")
    rng, shape = np.random.default_rng(1), (args.rows, args.columns)
    weights = rng.standard_t(3, shape) / 3**0.5 if args.heavy else rng.standard_normal(shape)
    rows = (0.02 * weights).astype(np.float32)
    h, on = covariance(args.columns), torch.device(device.name)
    factors.factor(h[:FEW, :FEW].copy(), on)
    start = time.perf_counter()
    f = factor(h)
    between = time.perf_counter()
    g = factors.factor(h, on)
    u = g.u.cpu().numpy()
    end = time.perf_counter()
    print(f"{device.text}; {args.rows:,} rows of {args.columns:,}, {'plain' if args.plain else 'search'}")
    print(
        f"factor: CPU {between - start:.2f} s, device {end - between:.2f} s, {(u != f.u).mean():.2%} of U differ, by "
        f"{np.max(np.abs(u - f.u) / np.maximum(np.abs(f.u), 1e-30)):.1e} at most"
    )
    table = [measure(name, rows, f, g, Options(search=not args.plain)) for name in args.types]
    if args.markdown:
        print(markdown_head(HEAD), *map(markdown_row, table), sep="\n")
    else:
        print(*columns([HEAD, *table]), sep="\n")


if __name__ == "__main__":
    main()

"""Block-scaled FP8 to BF16 and to F32, one thread, against torch on the CPU and against copying: A B A B, medians.

    python benchmarks/fp8.py [--set avx2 …] [--experts N] [--rounds N]

Matrices are R1's expert projections, 2048 x 7168 E4M3 codes with a scale for each block of 128 x 128, as many as are
larger than the last-level cache in all. torch does (w.view(float8_e4m3fn).float() * scale, expanded).bfloat16(), or
without the last step, with one thread. The copy is numpy's of a buffer that makes the same traffic: it reads and writes
what a conversion reads and writes. GB/s count bytes read and written (a store into cache may read the line
once more, which is not counted, here and there alike). Equality of every byte is asserted before anything
is timed. Times are processor time of the one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from quantkit import kernels
from quantkit.base.text import markdown_head, markdown_row

SHAPE = (2048, 7168)
BLOCK = 128
#: type -> bytes of a value
TYPES = {"BF16": 2, "F32": 4}

U8 = npt.NDArray[np.uint8]


def seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread: what others do on a busy machine in between is not counted."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def with_torch(codes: U8, scale: npt.NDArray[np.float32], name: str) -> torch.Tensor:
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    product = values * torch.from_numpy(scale).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return product.bfloat16() if name == "BF16" else product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="sets", nargs="*", default=list(kernels.OWN), choices=list(kernels.OWN))
    parser.add_argument("--experts", type=int, default=12, help="matrices, 14.7 MB of codes each")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (options.experts, *SHAPE), dtype=np.uint8)
    codes[(codes & 127) == 127] = 0  # no NaN
    scales = np.exp(rng.normal(-9, 0.3, (options.experts, SHAPE[0] // BLOCK, SHAPE[1] // BLOCK))).astype(np.float32)
    first = np.zeros(1, np.uint64)
    print(markdown_head(["to", "set", "GB/s", "% of memcpy", "ratio to torch"]))
    for name, size in TYPES.items():
        outs = np.zeros((options.experts, SHAPE[0], SHAPE[1] * size), np.uint8)
        traffic = codes.size * (1 + size)
        copied_from, copied_to = np.ones(traffic // 2, np.uint8), np.zeros(traffic // 2, np.uint8)

        def convert(kernel: str, outs: U8 = outs, name: str = name) -> None:
            os.environ["QUANTKIT_KERNELS"] = kernel
            for code, scale, out in zip(codes, scales, outs, strict=True):
                rows = kernels.StoredRows(code, "F8_E4M3", SHAPE[1], first, scale, (BLOCK, BLOCK), name == "BF16")
                kernels.quantize_stored(rows, name, None, out)

        def torch_all(name: str = name) -> None:
            for code, scale in zip(codes, scales, strict=True):
                with_torch(code, scale, name)

        for kernel in options.sets:
            outs[:] = 0xA5
            convert(kernel)
            for i, (code, scale) in enumerate(zip(codes, scales, strict=True)):
                expected = with_torch(code, scale, name).contiguous().view(torch.uint8).numpy()
                if not np.array_equal(outs[i], expected.reshape(outs[i].shape)):
                    raise SystemExit(f"{kernel}: matrix {i} to {name} differs from torch's")
        calls: dict[str, Callable[[], object]] = {k: lambda k=k: convert(k) for k in options.sets}  # type: ignore[misc]
        calls["copy"] = lambda a=copied_from, b=copied_to: np.copyto(b, a)  # type: ignore[misc]
        calls["torch"] = torch_all
        taken: dict[str, list[float]] = {k: [] for k in calls}
        for _ in range(options.rounds):
            for k, call in calls.items():
                taken[k].append(seconds(call))
        median = {k: statistics.median(t) for k, t in taken.items()}
        for kernel in (*options.sets, "copy"):
            share, ratio = median["copy"] / median[kernel], median["torch"] / median[kernel]
            row = [name, kernel, f"{traffic / median[kernel] / 1e9:.1f}", f"{share:.0%}", f"{ratio:.1f}"]
            print(markdown_row(row), flush=True)


if __name__ == "__main__":
    main()

"""quantkit's own kernels against ggml, byte by byte, on as many weights as asked: every law under every importance.

    python tests/tools/identity.py [TYPE …] --weights 1e9 [--seed N] [--threads N] [--record]

--record puts each type's line into tests/tools/results/identity.md, in place of the type's older one.
Prints a line a type: weights compared, blocks that differ (each of the first ten with its law, seed and place).
Exits 1 when any differs. 10^9 weights of a slow type take ggml minutes to an hour of processor time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import laws
import numpy as np

from quantkit import kernels
from quantkit.base.errors import WeightError
from quantkit.base.text import markdown_head, markdown_row
from quantkit.gguf.types import ABORT_WITHOUT_IMATRIX, QTYPES
from quantkit.kernels import F32, U8

SHAPE = (32, 4096 + 256)
RECORD = Path(__file__).parent / "results" / "identity.md"


def blocks(x: F32, name: str, w: F32 | None, kernel: str, size: int) -> U8 | None:
    """The blocks that a kernel makes, None when it refuses the weights."""
    try:
        return kernels.quantize(x, name, w, kernel).reshape(-1, size)
    except WeightError:
        return None


def cell(name: str, weights: str, importance: str, seed: int) -> tuple[int, list[str]]:
    """Compare one draw in every set; the weights seen and what differs."""
    rng = np.random.default_rng([seed, *f"{name}{weights}{importance}".encode()])
    x, w = laws.WEIGHTS[weights](rng, SHAPE), laws.IMPORTANCE[importance](rng, SHAPE[1])
    if w is None and name in ABORT_WITHOUT_IMATRIX:
        return 0, []
    reference = "ggml-pinned" if name in kernels.DIFFERS_IN_WHEEL else "ggml"
    size = QTYPES[name].block_bytes
    expected = blocks(x, name, w, reference, size)
    found = []
    for kernel, types in kernels.OWN.items():
        if name in types:
            got = blocks(x, name, w, kernel, size)
            if got is None or expected is None:  # values that the type cannot hold: refused by both, or by neither
                if (got is None) != (expected is None):
                    found.append(f"{kernel}: {weights}, importance {importance}, seed {seed}: refused by one only")
                continue
            bad = np.flatnonzero((got != expected).any(1))
            found += [f"{kernel}: {weights}, importance {importance}, seed {seed}: block {i}" for i in bad]
    return 0 if expected is None else x.size, found


def record(name: str, seen: int, sets: str, different: int, seed: int) -> None:
    """Put a type's line into the record."""
    head = [
        "# Own kernels against ggml, byte by byte: `python tests/tools/identity.py --record`",
        "",
        *markdown_head(
            ["type", "weights", "compared in each of", "blocks that differ", "seeds from", "built as", "on"]
        ).splitlines(),
    ]
    old = RECORD.read_text().splitlines()[len(head) :] if RECORD.exists() else []
    lines = {line.split("|")[1].strip(): line for line in old}
    today = datetime.now(timezone.utc).date().isoformat()
    lines[name] = markdown_row([name, f"{seen:,}", sets, str(different), str(seed), kernels.version(), today])
    RECORD.parent.mkdir(exist_ok=True)
    ordered = [lines[n] for n in sorted(lines, key=lambda t: QTYPES[t].id)]
    RECORD.write_text("\n".join([*head, *ordered]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all that have a kernel of our own")
    parser.add_argument("--weights", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    types = options.types or sorted(set().union(*kernels.OWN.values()), key=lambda t: QTYPES[t].id)
    failed = False
    for name in types:
        start, seen, different = time.monotonic(), 0, list[str]()
        grid = ((seed, w, i) for seed in itertools.count(options.seed) for w in laws.WEIGHTS for i in laws.IMPORTANCE)
        with ThreadPoolExecutor(options.threads) as pool:
            while seen < options.weights:
                some = list(itertools.islice(grid, 32 * options.threads))
                for n, found in pool.map(lambda c, name=name: cell(name, c[1], c[2], c[0]), some):
                    seen += n
                    different += found
        for line in different[:10]:
            print(f"  {name} {line}")
        took = time.monotonic() - start
        sets = ", ".join(k for k, t in kernels.OWN.items() if name in t)
        print(f"{name}: {seen:,} weights in {sets}, {len(different)} blocks differ, {took:.0f} s", flush=True)
        if options.record:
            record(name, seen, sets, len(different), options.seed)
        failed |= bool(different)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Checksums of a slab's bytes, compared: what the journal could take, and what it would cost a build.

    python benchmarks/checksums.py [--megabytes 256] [--pairs 7] [--threads 2] [--build EXPERTS] [NAME …]

Each is held against BLAKE2b, which the journal took in its first version, in pairs (A B A B …) over the same slabs of
the size that a Q8_0 build has; the median counts. Before it is timed, a checksum must see each of 200 flipped bits.
With several threads at once it is seen whether it lets go of Python's lock. --build also builds a Q8_0 of rows of R1's
sizes with the old and the new one in turn, on one thread, and gives their share of its processor time. Some need
packages that quantkit does not: pip install crc32c google-crc32c.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import random
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from footprint import CONFIG

from quantkit.base import journal
from quantkit.building import run as builds
from quantkit.building.engines.native import SLAB_VALUES, NativeEngine
from quantkit.gguf.types import QTYPES
from quantkit.model import demo
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load

Checksum = Callable[["memoryview | bytes"], "bytes | int"]
BASE, OURS = "BLAKE2b-128", "XXH3-128 (xxhash)"


def _of_a_copy(call: Checksum) -> Checksum:
    return lambda raw: call(bytes(raw))


def checksums() -> dict[str, Checksum]:
    """Those that can be had here."""
    found: dict[str, Checksum] = {
        BASE: lambda raw: hashlib.blake2b(raw, digest_size=16).digest(),
        "SHA-256": lambda raw: hashlib.sha256(raw).digest(),
        "CRC-32 (zlib)": zlib.crc32,
    }
    for name, package, function in (
        ("XXH3-128 (xxhash)", "xxhash", "xxh3_128_digest"),
        ("CRC-32C (crc32c)", "crc32c", "crc32c"),
        ("CRC-32C (google-crc32c)", "google_crc32c", "value"),
    ):
        try:
            module = importlib.import_module(package)
        except ImportError:
            print(f"{name}: no package {package}")
            continue
        call: Checksum = getattr(module, function)
        # google_crc32c takes bytes only, so that a copy belongs to its price
        found[name] = _of_a_copy(call) if package == "google_crc32c" else call
    return found


def check(name: str, checksum: Checksum, slab: memoryview) -> None:
    """Raises AssertionError unless it is the same twice, and another for each of some flipped bits."""
    raw, rng, right = bytearray(slab), random.Random(1), checksum(slab)
    assert checksum(memoryview(raw)) == right, name
    for _ in range(200):
        at, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
        raw[at] ^= bit
        assert checksum(memoryview(raw)) != right, f"{name}: a flipped bit at byte {at:,} is not seen"
        raw[at] ^= bit


def seconds(checksum: Checksum, slabs: Sequence[memoryview], n_threads: int) -> float:
    """Wall time of all slabs, dealt to threads."""

    def work(mine: Sequence[memoryview]) -> None:
        for slab in mine:
            checksum(slab)

    threads = [threading.Thread(target=work, args=(slabs[i::n_threads],)) for i in range(n_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


class Timed:
    """A checksum for the journal that counts the processor time it takes; cut to, or repeated up to, 16 bytes."""

    def __init__(self, checksum: Checksum) -> None:
        self.checksum, self.seconds = checksum, 0.0

    def __call__(self, data: bytes | memoryview) -> bytes:
        start = time.thread_time()
        found = self.checksum(memoryview(data))
        self.seconds += time.thread_time() - start
        return found[:16] if isinstance(found, bytes) else found.to_bytes(16, "little")


def shares(found: dict[str, Checksum], names: Sequence[str], n_experts: int, pairs: int) -> None:
    """Builds a Q8_0 with each, in turn: the same bytes, and what part of the processor time was the checksum."""
    with tempfile.TemporaryDirectory(prefix="quantkit-checksums-") as folder:
        source, out = Path(folder) / "checkpoint", Path(folder) / "m.gguf"
        source.mkdir()
        demo.make_checkpoint(source, {**CONFIG, "n_routed_experts": n_experts})
        model = open_model(str(source), Options(pre=demo.PRE))
        plan = make_plan(model, load("Q8_0"))
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        digests = set()
        for name in [*names[:1], *list(names) * pairs]:
            journal.digest = timed = Timed(found[name])
            ready = builds.prepare(plan, out)
            start = time.process_time()
            builds.run(ready, NativeEngine(), 1, lambda _name, _n: None)
            runs[name].append((timed.seconds, time.process_time() - start))
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
            out.unlink()
        assert len(digests) == 1
        runs[names[0]].pop(0)  # the first reads a cold disk
        print(f"a Q8_0 build of {plan.tensor_bytes:,} bytes on one thread, median of {pairs}, the same bytes")
        for name, some in runs.items():
            own, all_ = (statistics.median(x) for x in zip(*some, strict=True))
            share = statistics.median(a / b for a, b in some)
            print(f"{name:24} {own:6.2f} s of {all_:6.2f} s of processor time, {100 * share:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of a checksum's name; all")
    parser.add_argument("--megabytes", type=int, default=256, help="of slabs in all: more than the caches hold")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="at once, beside the measurement with one")
    parser.add_argument("--build", type=int, metavar="EXPERTS", help="build a Q8_0 too; of so many experts")
    options = parser.parse_args()
    nbytes = QTYPES["Q8_0"].row_bytes(SLAB_VALUES)
    raw = np.random.default_rng(1).integers(0, 256, (max(2, options.megabytes * 10**6 // nbytes), nbytes), np.uint8)
    slabs = [row.data for row in raw]
    found = checksums()
    print(f"{len(slabs)} slabs of {nbytes:,} bytes; MB/s, median of {options.pairs}; ratio to {BASE} in pairs")
    for name, checksum in found.items():
        if not any(part in name for part in options.names or [""]):
            continue
        check(name, checksum, slabs[0])
        cells = []
        for n_threads in dict.fromkeys((1, options.threads)):
            pairs = [
                (seconds(found[BASE], slabs, n_threads), seconds(checksum, slabs, n_threads))
                for _ in range(options.pairs)
            ]
            rate = raw.size / statistics.median(own for _, own in pairs) / 1e6
            ratio = statistics.median(base / own for base, own in pairs)
            cells.append(f"{n_threads} thread{'s' * (n_threads > 1)}: {rate:8,.0f} MB/s, {ratio:5.1f} x")
        print(f"{name:24} {'   '.join(cells)}", flush=True)
    if options.build:
        shares(found, [BASE, OURS], options.build, options.pairs)


if __name__ == "__main__":
    main()

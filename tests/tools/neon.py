"""The NEON kernels against ggml, byte by byte, on a machine that is no ARM: cross-compiled, and run by an emulator.

    python tests/tools/neon.py [TYPE …] [--weights 600000] [--fuzz 30] [--seed N] [--jobs N] [--keep FOLDER]

Builds native/ for aarch64 with neon.cpp in place of the Python module, by the same CMakeLists.txt, and gives it
under qemu-aarch64 what tests/tools/laws.py draws (every law of weights under every importance), the cases of
tests/tools/fuzz_kernels.py (random bits; as float32, and as stored rows, decoded and in one pass), and every code and
pattern of E4M3, BF16 and F16. ggml makes what is expected, on this machine; numpy what the stored rows are. Error
feedback, by the sets `neon` and `plain`, with and without search, is compared with the best set of this machine.

First a control: one bit turned over in a result must be reported. Prints a line a type. Exits 1 when anything differs,
2 where a program is missing. An emulator shows the arithmetic of the kernels, not their speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_kernels
import laws
import numpy as np
import numpy.typing as npt

from quantkit import kernels, rounding
from quantkit.base.errors import QuantkitError
from quantkit.gguf.types import ABORT_WITHOUT_IMATRIX, QTYPES
from quantkit.kernels import F32, U8
from quantkit.kernels.limits import limits_of

REPOSITORY = Path(__file__).resolve().parents[2]

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"
N_COLS = 5 * 256  # lanes wrap from row to row, and the last tile is not full
HEAD = struct.Struct("<16s16s16s8Q2d")  # Head of tests/tools/neon.cpp
ROUNDED = (False, True)


class Job(NamedTuple):
    """What the harness is given, and what it must answer."""

    line: str  # of the table
    one_pass: bool
    what: str
    record: bytes
    expected: npt.NDArray[Any]  # blocks uint8 [blocks, bytes], or float32 [values] of stored rows
    done: bool | None = None  # stored rows to blocks in one pass: whether the kernel is to make them


class Tally:
    """Numbers of a line of the table."""

    def __init__(self) -> None:
        self.weights = [0, 0]  # rows at once, stored rows in one pass
        self.blocks = [0, 0]
        self.different = [0, 0]


# ---------------------------------------------------------------- cases


def record(
    op: str, name: str, shape: tuple[int, int], *payload: npt.NDArray[Any] | None, weighted: bool = False,
    rows: kernels.StoredRows | None = None, limits: tuple[float, float] = (0, 0), dtype: str = "",
) -> bytes:  # fmt: skip
    stored = (0, 0, 0, 1, 1)
    if rows is not None:
        scale_rows = 0 if rows.scale is None else len(rows.scale)
        dtype, stored = rows.dtype, (int(rows.round_bf16), len(rows.first_rows), scale_rows, *rows.block)
    head = HEAD.pack(op.encode(), name.encode(), dtype.encode(), *shape, int(weighted), *stored, *limits)
    return head + b"".join(part.tobytes() for part in payload if part is not None)


def codebook(name: str) -> bytes:
    """A type's table of levels, as kernels.set_codebook hands it on; nothing for a type without."""
    if name not in kernels.CODEBOOKS:
        return b""
    book = kernels.CODEBOOKS[name]
    table = getattr(import_module("gguf.quants"), book)
    if hasattr(table, "kvalues"):
        values = np.array([table.kvalues], np.int8)
    else:
        table.init_grid()
        values = table.grid.reshape(-1, table.grid.shape[-1]).astype(np.int8)
    return record("codebook", book, values.shape, values)


def blocks_of_ggml(x: F32, name: str, w: F32 | None) -> U8 | None:
    """Blocks uint8 [blocks, bytes], or None where ggml's bytes are refused."""
    try:
        return kernels.quantize(x, name, w, fuzz_kernels.reference(name)).reshape(-1, QTYPES[name].block_bytes)
    except QuantkitError:
        return None


def quantize(name: str, what: str, x: F32, w: F32 | None) -> Iterator[Job]:
    expected = blocks_of_ggml(x, name, w)
    if expected is not None:
        used = w if QTYPES[name].uses_imatrix else None
        data = record("quantize", name, (x.shape[0], x.shape[1]), x, used, weighted=used is not None)
        yield Job(name, False, what, data, expected)


def decode(what: str, rows: kernels.StoredRows, x: F32) -> Job:
    shape = (len(rows.stored), rows.n_cols)
    data = record("rows", "", shape, rows.first_rows, rows.stored, rows.scale, rows=rows)
    return Job(f"{rows.dtype} to float32", False, what, data, x.reshape(-1))


def one_pass(name: str, what: str, case: fuzz_kernels.Case) -> Iterator[Job]:
    """Stored rows to blocks, where this machine's own kernels say whether that is to be done."""
    rows, w = case.rows, case.importance
    expected = blocks_of_ggml(case.x, name, w)
    if expected is None:
        return
    room = np.empty((len(rows.stored), QTYPES[name].row_bytes(rows.n_cols)), np.uint8)
    done = None
    if kernels.can_quantize_stored(rows.dtype, name):
        try:
            kernels.quantize_stored(rows, name, w, room)
            done = True
        except QuantkitError:
            done = False
    used = w if QTYPES[name].uses_imatrix else None
    data = record(
        "rows", name, (len(rows.stored), rows.n_cols), rows.first_rows, rows.stored, rows.scale, used,
        weighted=used is not None, rows=rows, limits=limits_of(QTYPES[name]),
    )  # fmt: skip
    yield Job(name, True, what, data, expected, done)


def feedback(name: str, seed: int) -> Iterator[Job]:
    """Rows of all sizes, zeros and long tails under inputs of which few directions carry most."""
    n, rng = 512, np.random.default_rng([seed, *name.encode()])
    inputs = rng.standard_normal((2 * n, 40)) @ rng.standard_normal((40, n)) + rng.standard_normal((2 * n, n))
    h = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    f = rounding.factor(np.asarray(np.tril(h) + np.tril(h, -1).T))
    x = (0.02 * rng.standard_normal((37, n))).astype(np.float32)
    x[:10] *= np.logspace(-12, 3, 10, dtype=np.float32)[:, None]
    x[10:20] *= np.exp(rng.standard_normal((10, n)).astype(np.float32))
    x[20, :300] = 0
    x[21] = 0
    for search in (False, True):
        expected = kernels.feedback_quantize(x, QTYPES[name], f.u, f.importance, search)
        for by in ("neon", "plain"):
            op = "feedback search" if search else "feedback"
            data = record(op, name, (len(x), n), x, f.u, f.importance, dtype=by)
            blocks = expected.reshape(-1, QTYPES[name].block_bytes)
            yield Job(f"{name}, feedback", False, f"{op} by {by}, seed {seed}", data, blocks)


def jobs_of(name: str, n_weights: int, n_fuzz: int, seed: int) -> Iterator[Job]:
    rng = np.random.default_rng([seed, *name.encode()])
    n_rows = -(-n_weights // (len(laws.WEIGHTS) * len(laws.IMPORTANCE) * N_COLS))
    for weights, importance, x, w in laws.cells(rng, n_rows, N_COLS):
        if w is not None or name not in ABORT_WITHOUT_IMATRIX:
            yield from quantize(name, f"{weights}, importance {importance}, seed {seed}", x, w)
    for number in range(n_fuzz):
        case = fuzz_kernels.make(name, seed, number)
        what = f"fuzz_kernels.py {name} --seed {seed} --first {number} --cases 1"
        yield from quantize(name, what, case.x, case.importance)
        yield from one_pass(name, what, case)
        yield decode(what, case.rows, case.x)
    if name in kernels.FEEDBACK["plain"]:
        yield from feedback(name, seed)


def every_pattern(seed: int) -> Iterator[Job]:
    """Every code of E4M3 under scales of every size, every BF16 and F16, as they are and rounded."""
    rng = np.random.default_rng(seed)
    none = np.zeros(1, np.uint64)
    scale = np.exp(rng.uniform(-103.9, 88.7, (500, 3))).astype(np.float32)
    scale[:8, 0] = [0, -0.0, -0.01, 1e-45, np.inf, -np.inf, np.nan, 3.4e38]
    codes = np.stack([rng.permutation(256) for _ in scale]).astype(np.uint8)
    values = laws.e4m3_values()[codes]
    halves = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    for rounded in ROUNDED:
        after = fuzz_kernels.bf16_rounded if rounded else np.asarray
        what = "every code, rounded" if rounded else "every code"
        for width in (128, 100):
            with np.errstate(all="ignore"):
                x = after((values * scale.repeat(width, 1)[:, :256]).astype(np.float32))
            used = np.ascontiguousarray(scale[:, : -(-256 // width)])
            yield decode(what, kernels.StoredRows(codes, "F8_E4M3", 256, none, used, (1, width), rounded), x)
        rows = kernels.StoredRows(halves.view(np.uint8), "F16", 1024, none, None, (1, 1), rounded)
        yield decode(what, rows, after(halves.view(np.float16).astype(np.float32)))
        rows = kernels.StoredRows(halves.view(np.uint8), "BF16", 1024, none, None, (1, 1), rounded)
        yield decode(what, rows, (halves.astype(np.uint32) << 16).view(np.float32))


# ---------------------------------------------------------------- the harness


def build(folder: Path, jobs: int) -> Path:
    """Kernels and harness for aarch64, in `folder`; the program."""
    where = folder / "build"
    where.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
        f"-DQUANTKIT_HARNESS={REPOSITORY / 'tests' / 'tools' / 'neon.cpp'}", str(REPOSITORY / "native"),
    ]  # fmt: skip
    for command in (configure, ["make", f"-j{jobs}"]):
        done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
    return where / "harness"


def emulated(program: Path, *arguments: str) -> str:
    command = [EMULATOR, "-L", LIBRARIES, str(program), "neon", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the harness ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def difference(job: Job, results: memoryview) -> tuple[int, int]:
    """Bytes of the results that are the job's, and blocks or values that differ."""
    at = 0
    if job.one_pass:
        done, at = bool(int.from_bytes(results[:8], "little")), 8
        if job.done is not None and done != job.done:
            return at + (job.expected.nbytes if done else 0), len(job.expected)
        if not done:
            return at, 0
    got = np.frombuffer(results[at : at + job.expected.nbytes], job.expected.dtype).reshape(job.expected.shape)
    at += job.expected.nbytes
    if job.expected.dtype == np.uint8:
        return at, int((got != job.expected).any(1).sum())
    # a NaN need only stay one
    same = np.where(np.isnan(job.expected), np.isnan(got), got.view(np.uint32) == job.expected.view(np.uint32))
    odd = np.flatnonzero(~np.isfinite(job.expected))
    first = int.from_bytes(results[at : at + 8], "little")
    return at + 8, max(int((~same).sum()), int(first != (odd[0] if odd.size else job.expected.size)))


def compare(program: Path, folder: Path, name: str, jobs: list[Job], *options: str) -> list[tuple[Job, int]]:
    """Run jobs; each with the number of its blocks or values that differ."""
    cases, answers = folder / "cases", folder / "results"
    with cases.open("wb") as file:
        file.write(codebook(name))
        for job in jobs:
            file.write(job.record)
    emulated(program, str(cases), str(answers), *options)
    results, at, out = memoryview(answers.read_bytes()), 0, []
    for job in jobs:
        used, different = difference(job, results[at:])
        out.append((job, different))
        at += used
    if at != len(results):
        raise SystemExit(f"the harness wrote {len(results)} bytes of results, {at} are known")
    return out


def control(program: Path, folder: Path) -> None:
    """A bit turned over in the blocks of one kind, and in the values of the other, is one difference."""
    for name, jobs in (("Q4_K", list(jobs_of("Q4_K", 1, 0, 1))[:3]), ("F8_E4M3", list(every_pattern(1))[:2])):
        found = [different for _, different in compare(program, folder, name, jobs, "fault")]
        if found != [1, *[0] * (len(jobs) - 1)]:
            raise SystemExit(f"the control was not reported: {found} differ in {name}, the first is to")
    print("control: a bit turned over is reported, in blocks and in values", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all that the set has")
    parser.add_argument("--weights", type=float, default=600_000, help="a type, by the laws")
    parser.add_argument("--fuzz", type=int, default=30, help="cases of random bits a type")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of make")
    parser.add_argument("--keep", type=Path, help="build here, and leave it for the next time")
    options = parser.parse_args()
    missing = [program for program in ("cmake", "make", COMPILER, EMULATOR) if shutil.which(program) is None]
    if missing:
        print(
            f"tests/tools/neon.py needs {', '.join(missing)}; on Debian or Ubuntu run: "
            "apt-get install cmake make g++-aarch64-linux-gnu qemu-user",
            file=sys.stderr,
        )
        sys.exit(2)
    with tempfile.TemporaryDirectory(prefix="quantkit-neon-") as temporary:
        start = time.monotonic()
        program = build((options.keep or Path(temporary)).resolve(), options.jobs)
        print(f"built for aarch64 in {time.monotonic() - start:.0f} s", flush=True)
        there = emulated(program).split()
        unknown = [name for name in options.types if name not in there]
        if unknown:
            parser.error(f"no NEON kernel for {', '.join(unknown)}; there are {', '.join(there)}")
        types = options.types or there
        for name in types:
            kernels.select(QTYPES[name], fuzz_kernels.reference(name))  # says what is missing
        control(program, Path(temporary))
        head = f"{'weights':>10}{'blocks':>10}{'differ':>8}"
        print(f"\n{'':18}{head}   in one pass:{head}")
        tallies: dict[str, Tally] = defaultdict(Tally)
        failures = list[str]()
        for name in [*types, ""]:
            jobs = list(jobs_of(name, int(options.weights), options.fuzz, options.seed) if name else every_pattern(1))
            for job, different in compare(program, Path(temporary), name, jobs):
                tally = tallies[job.line]
                values = len(job.expected) * (QTYPES[name].block if name and job.expected.ndim == 2 else 1)
                tally.weights[job.one_pass] += values if job.done is not False else 0
                tally.blocks[job.one_pass] += len(job.expected) if job.done is not False else 0
                tally.different[job.one_pass] += different
                if different:
                    failures.append(f"{job.line}{', in one pass' * job.one_pass}: {different} differ: {job.what}")
            for line in [name] if name else [line for line in tallies if line not in types]:
                t = tallies[line]
                parts = [f"{t.weights[i]:>10,}{t.blocks[i]:>10,}{t.different[i]:>8,}" for i in (0, 1)]
                print(f"{line:18}{parts[0]}{' ' * 15 + parts[1] if name else ''}", flush=True)
        for failure in failures[:20]:
            print(f"  {failure}")
        print(f"{'NOT equal' if failures else 'equal'} in {time.monotonic() - start:.0f} s")
        sys.exit(bool(failures))


if __name__ == "__main__":
    main()

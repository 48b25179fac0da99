"""Mutated inputs through every reader: a QuantkitError of plain lines or success, in bounded time and memory.

    python tests/tools/fuzz_inputs.py [READER …] [--cases 1e6] [--seconds N] [--seed N] [--record FILE]
    python tests/tools/fuzz_inputs.py READER --replay FILE

Case k of a reader under a seed is always the same bytes. It runs in this interpreter, in a child process that may take
256 MiB more than it has; the files are in memory. A finding is any other exception (MemoryError and warnings
included), a message that is empty, not printable or long, 5 seconds of processor time, or the end of the process. It is
printed, and its bytes are written to the findings folder, from where those of mended defects go to tests/data/fuzz,
which tests/cli/test_hostile.py replays. Exits 1 when there were any.

The mutator is our own, of fields, trees and lines: a seed and a number name a case, and it takes a tenth of a
millisecond, where hypothesis takes milliseconds. atheris, whose cases no seed names, was not tried.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import fuzz_readers
from fuzz_readers import Reader

from quantkit import __version__
from quantkit.base.errors import QuantkitError, RecipeError
from quantkit.base.text import markdown_head, markdown_row

MAX_SECONDS, MAX_STUCK = 5.0, 60.0
MAX_MEMORY = 256 << 20
MAX_MESSAGE = 2000
#: cases of all readers in turn
ROUND = 20_000
#: files written of findings that look alike
ALIKE = 3


class TooSlowError(BaseException):
    """Raised by the alarm; no `except Exception` stops it."""


class Outcome(NamedTuple):
    what: str
    """accepted, refused, or what kind of finding"""
    where: str
    """the line that raised"""
    detail: str = ""


def _alarm(*_: object) -> NoReturn:
    raise TooSlowError


def _raised_at(e: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f"{os.sep}quantkit{os.sep}" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(e.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def wrong_with(e: QuantkitError) -> str:
    """What is wrong with an error's message: '' if it is one plain line, or for a recipe one a mistake."""
    lines = str(e).split("\n")
    if len(lines) > 1 and not isinstance(e, RecipeError):
        return f"{len(lines)} lines"
    if not all(line and line.isprintable() for line in lines):
        return "empty or not printable"
    longest = max(map(len, lines))
    return f"a line of {longest:,} characters" if longest > MAX_MESSAGE else ""


@contextmanager
def strictly() -> Iterator[None]:
    """Warnings are errors, and the alarm is answered."""
    old = signal.signal(signal.SIGPROF, _alarm)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        signal.signal(signal.SIGPROF, old)


def attempt(reader: Reader, raw: bytes) -> Outcome:
    """Let a reader have some bytes, within `strictly`."""
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            reader.read(raw)
            return Outcome("accepted", "")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except QuantkitError as e:
        return Outcome(wrong_with(e) or "refused", _raised_at(e), f"{e!s:.300}")
    except TooSlowError as e:
        return Outcome("too slow", _raised_at(e))
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        return Outcome(type(e).__name__, _raised_at(e), f"{e!r:.300}")


def limit_memory() -> None:
    """Let this process have so much more memory; it cannot be given back."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        bytearray(2 * MAX_MEMORY)
    except MemoryError:
        return
    raise SystemExit("this system does not keep the limit of memory (RLIMIT_AS)")


def case(name: str, reader: Reader, seed: int, number: int) -> bytes:
    return reader.mutate(random.Random(f"{name}/{seed}/{number}"))


class Tally:
    """What came of a reader's cases."""

    def __init__(self, name: str, findings: Path) -> None:
        self.name, self.findings = name, findings
        self.came: Counter[str] = Counter()
        self.places: set[str] = set()
        self.alike: Counter[tuple[str, str]] = Counter()

    def add(self, seed: int, number: int, raw: bytes, suffix: str, outcome: Outcome) -> None:
        self.came[outcome.what if outcome.what in ("accepted", "refused") else "findings"] += 1
        if outcome.what in ("accepted", "refused"):
            self.places |= {outcome.where} - {""}
            return
        key = (outcome.what, outcome.where)
        self.alike[key] += 1
        if self.alike[key] <= ALIKE:
            self.findings.mkdir(parents=True, exist_ok=True)
            file = self.findings / f"{self.name}-{seed}-{number}{suffix}"
            file.write_bytes(raw)
            print(f"{self.name} seed {seed} case {number}: {' '.join(outcome)}\n  {file}", flush=True)


def run_child(name: str, reader: Reader, seed: int, numbers: range, at: Any, out: Path, findings: Path) -> NoReturn:
    """In the child: run the cases; `at` tells the parent which one runs, `out` what came of them."""
    tally = Tally(name, findings)
    code = 70
    try:
        gc.freeze()
        limit_memory()
        code = 71
        with strictly():
            for number in numbers:
                at[:8] = struct.pack("<Q", number)
                raw = case(name, reader, seed, number)
                tally.add(seed, number, raw, reader.suffix, attempt(reader, raw))
        at[:8] = struct.pack("<Q", numbers.stop)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        alike = [[*k, n] for k, n in tally.alike.items()]
        out.write_text(json.dumps([dict(tally.came), sorted(tally.places), alike]))
        sys.stdout.flush()
        os._exit(code)


def run(total: Tally, reader: Reader, seed: int, numbers: range, folder: Path) -> None:
    """Cases of a reader, in a child process; one that ends or hangs is a finding, and another goes on."""
    name, findings = total.name, total.findings
    at, out = mmap.mmap(-1, 8), folder / "tally.json"
    start = numbers.start
    while start < numbers.stop:
        chunk = range(start, numbers.stop)
        out.unlink(missing_ok=True)
        at[:8] = struct.pack("<Q", start)
        child = os.fork()
        if child == 0:
            run_child(name, reader, seed, chunk, at, out, findings)
        last, since, status = start, time.monotonic(), None
        while status is None:
            pid, ended = os.waitpid(child, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(ended)
                break
            (now,) = struct.unpack("<Q", at[:8])
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > MAX_STUCK:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        if out.exists():
            came, places, alike = json.loads(out.read_text())
            total.came.update(came)
            total.places |= set(places)
            for what, where, n in alike:
                total.alike[what, where] += n
        (number,) = struct.unpack("<Q", at[:8])
        start = chunk.stop
        if status == 70:
            raise SystemExit("the cases could not be run")
        if status != 0:
            if not out.exists():
                total.came["lost with an ended process"] += number - chunk.start
            how = f"ended with {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
            raw = case(name, reader, seed, number)
            total.add(seed, number, raw, reader.suffix, Outcome("process", how))
            start = number + 1


def table(tallies: dict[str, Tally]) -> list[str]:
    """What came of all of them, as Markdown."""
    rows = [markdown_head(["reader", "cases", "accepted", "refused", "at so many places", "findings"])]
    for name, t in tallies.items():
        numbers = (t.came.total(), t.came["accepted"], t.came["refused"], len(t.places), t.came["findings"])
        rows.append(markdown_row([name, *(f"{n:,}" for n in numbers)]))
    for name, t in tallies.items():
        rows += [f"- {name}: {what} ({where}), {n:,} times" for (what, where), n in t.alike.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help="all of them, with a share of the cases each")
    parser.add_argument("--cases", type=float, default=1e5, help="of all readers together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new round of cases after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each reader")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "quantkit-findings")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a table of the run to a Markdown file")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="say what a reader does with this file")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=fuzz_readers.in_memory()) as temporary:
        folder = Path(temporary)
        known = fuzz_readers.readers(folder)
        if unknown := [n for n in options.readers if n not in known]:
            parser.error(f"no reader {', '.join(unknown)}; there are {', '.join(known)}")
        chosen = {name: known[name] for name in options.readers or known}
        if options.replay:
            for name, reader in chosen.items():
                with strictly():
                    outcome = attempt(reader, options.replay.read_bytes())
                print(name, *outcome)
            return
        tallies = {name: Tally(name, options.findings) for name in chosen}
        start, done, first = time.monotonic(), 0, options.first
        shares = sum(reader.share for reader in chosen.values())
        # in rounds, so that however far it comes, every reader has had its share
        while done < options.cases and time.monotonic() - start < options.seconds:
            some = min(ROUND, int(options.cases) - done)
            for name, reader in chosen.items():
                tally = tallies[name]
                n, at = max(1, some * reader.share // shares), first + tally.came.total()
                run(tally, reader, options.seed, range(at, at + n), folder)
            done = sum(t.came.total() for t in tallies.values())
            found = sum(t.came["findings"] for t in tallies.values())
            print(f"{done:,} cases, {found:,} findings, {time.monotonic() - start:.0f} s", flush=True)
        rows = table(tallies)
        print("\n".join(rows))
        if options.record:
            command = " ".join(["python tests/tools/fuzz_inputs.py", *sys.argv[1:]])
            title = f"{date.today()}, quantkit {__version__}: {done:,} cases, {found:,} findings"
            took = f"`{command}`: seed {options.seed}, {(time.monotonic() - start) / 60:.0f} minutes."
            head = "# Mutated inputs: what tests/tools/fuzz_inputs.py did, as it recorded it\n"
            before = options.record.read_text() if options.record.exists() else head
            options.record.write_text("\n".join([before, f"## {title}", "", took, "", *rows, ""]))
        sys.exit(found > 0)


if __name__ == "__main__":
    main()

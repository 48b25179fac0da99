"""Faults, tried: builds that are killed, starved, lied to and cut off, and what became of them.

    python benchmarks/faults.py [--kills 100] [--crashes 200] [--seed N] [--markdown] [CASE …]

Every case disturbs real builds of a small FP8 checkpoint. It holds when a command that ended early said why in one
clear sentence, when no name of the output ever had anything but the whole file, and when the same command, run again,
made the bytes of an undisturbed build without quantizing again what the journal had. A disturbance that came too late
is drawn again. CASE is a part of a case's name. Exits 1 when a case fails; what cannot be tried here is said.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults_damage import caches, damages, place_taken
from faults_io import CASES, SkipError
from faults_kill import kills
from faults_power import kills_at_calls, power_loss
from faults_site import CONFIG, SMALL, FaultError, Row, Site

Case = Callable[[], "Row | list[Row]"]


def cases(site: Site, small: Site, n_kills: int, n_crashes: int) -> Iterator[tuple[str, Case]]:
    """Names and what to call."""
    yield "kill -9", lambda: kills(site, n_kills)
    yield "kill -9 at a system call", lambda: kills_at_calls(small, n_crashes // 2)
    yield "power loss", lambda: power_loss(small, n_crashes)
    for case in CASES:
        yield _name(case), lambda case=case: case(site)
    yield "damage", lambda: damages(site)
    yield "OUT.partial is another's", lambda: place_taken(site)
    yield "cache damage", lambda: caches(site)


def _name(case: Callable[[Site], Row]) -> str:
    held = [c.cell_contents for c in case.__closure__ or () if isinstance(c.cell_contents, str)]
    return f"{case.__qualname__.split('.')[0]} {' '.join(held)}".replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--crashes", type=int, default=200, help="points at which the power is lost")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="a table for the README")
    options = parser.parse_args()
    start, failed, rows = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory(prefix="quantkit-faults-") as name:
        site, small = Site(Path(name) / "site", CONFIG, options.seed), Site(Path(name) / "small", SMALL, options.seed)
        try:
            for what, case in cases(site, small, options.kills, options.crashes):
                if options.cases and not any(part in what for part in options.cases):
                    continue
                try:
                    found = case()
                except SkipError as e:
                    found = Row(what, "not tried", 0, str(e))
                except FaultError as e:
                    found = Row(what, "", 0, "", [str(e)])
                for row in found if isinstance(found, list) else [found]:
                    rows.append(row)
                    failed += bool(row.failures)
                    verdict = "FAILED" if row.failures else "holds" if row.times else "skipped"
                    print(f"{row.case}: {row.what}; {row.times} times: {row.came_of_it}: {verdict}", flush=True)
                    for failure in row.failures[:5]:
                        print(f"    {failure}", flush=True)
        finally:
            site.close()
            small.close()
    if options.markdown:
        print("\n| fault | how | times | what came of it | |\n|---|---|---|---|---|")
        for row in rows:
            verdict = "FAILED" if row.failures else "holds" if row.times else "skipped"
            print(f"| {row.case} | {row.what} | {row.times} | {row.came_of_it} | {verdict} |")
    print(f"\n{len(rows)} cases, {failed} failed, seed {options.seed}, {time.monotonic() - start:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

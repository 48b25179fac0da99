"""Faults, tried: builds that are killed, starved, lied to and cut off, and what became of them.

    python tests/tools/faults.py [--kills 100] [--crashes 120] [--seed N] [--markdown] [CASE …]

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
from functools import partial
from pathlib import Path

from faults_calls import CALLS
from faults_damage import caches, damages, place_taken
from faults_io import CLOSED, ROOM, SOURCES, out_of_memory
from faults_kill import kills
from faults_others import WORKS, kills_of
from faults_power import kills_at_calls, planted, power_loss
from faults_site import CONFIG, SMALL, FaultError, Row, Site, SkipError

from quantkit.base.text import markdown_head, markdown_row

Case = Callable[[], "Row | list[Row]"]
SAID = "one clear sentence or no harm; the rerun made the right bytes"
#: what came of the cases of a group, where all hold; others are shown case by case
GROUPS = {
    "calls that fail": SAID, "memory": SAID, "a source or imatrix": "refused; nothing kept of the other content",
    "room": SAID, "permissions": SAID,
    "unfinished builds damaged": "what is sound is kept, or refused and started again",
    "caches damaged": "the right bytes, made again where need be",
}  # fmt: skip


def cases(site: Site, small: Site, n_kills: int, n_crashes: int) -> Iterator[tuple[str, str, Case]]:
    """Groups, names and what to call."""
    yield "kills", "", lambda: kills(site, n_kills)
    yield "kills at system calls", "", lambda: kills_at_calls(small, n_crashes // 2)
    for work in WORKS:
        yield "kills of dequant, split and merge", work.name, partial(kills_of, work, site, n_crashes // len(WORKS))
    yield "power loss", "", lambda: power_loss(small, n_crashes)
    yield "power loss, planted defects", "", lambda: planted(small, 30)
    groups = {"calls that fail": CALLS, "memory": (out_of_memory,), "a source or imatrix": SOURCES, "room": ROOM,
              "permissions": CLOSED}  # fmt: skip
    for group, every in groups.items():
        for case in every:
            yield group, _name(case), partial(case, site)
    yield "unfinished builds damaged", "", lambda: [*damages(site), place_taken(site)]
    yield "caches damaged", "", lambda: caches(site)


def _name(case: Callable[[Site], Row]) -> str:
    held = [c.cell_contents for c in case.__closure__ or () if isinstance(c.cell_contents, str)]
    return f"{case.__qualname__.split('.')[0]} {' '.join(held)}".replace("_", " ")


def table(found: list[tuple[str, Row]]) -> str:
    """A line a group; a case that failed or was skipped has its own."""
    lines = [markdown_head(["fault", "how", "times", "weights kept", "what came of it", ""])]
    for group in dict.fromkeys(g for g, _ in found):
        rows = [row for g, row in found if g == group]
        for row in rows if group not in GROUPS else [r for r in rows if r.failures or not r.times]:
            verdict = "FAILED" if row.failures else "holds" if row.times else "skipped"
            cells = (row.case, row.what, row.times, f"{row.kept:,}", row.came_of_it, verdict)
            lines.append(markdown_row(map(str, cells)))
        held = [row for row in rows if row.times and not row.failures]
        if group in GROUPS and held:
            names = "; ".join(dict.fromkeys(row.case for row in held))
            notes = "; ".join(row.came_of_it for row in held if "glibc" in row.came_of_it)
            cells = (group, names, sum(row.times for row in held), f"{sum(row.kept for row in held):,}",
                     "; ".join(filter(None, (GROUPS[group], notes))), "holds")  # fmt: skip
            lines.append(markdown_row(map(str, cells)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--crashes", type=int, default=120, help="points at which the power is lost")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="a table for the README")
    options = parser.parse_args()
    start, every = time.monotonic(), list[tuple[str, Row]]()
    with tempfile.TemporaryDirectory(prefix="quantkit-faults-") as folder:
        site, small = (
            Site(Path(folder) / "site", CONFIG, options.seed),
            Site(Path(folder) / "small", SMALL, options.seed),
        )
        try:
            for group, name, case in cases(site, small, options.kills, options.crashes):
                if options.cases and not any(part in f"{group} {name}" for part in options.cases):
                    continue
                try:
                    found = case()
                except SkipError as e:
                    found = Row(name or group, "not tried", 0, str(e))
                except FaultError as e:
                    found = Row(name or group, "", 0, "", [str(e)])
                for row in found if isinstance(found, list) else [found]:
                    every.append((group, row))
                    verdict = "FAILED" if row.failures else "holds" if row.times else "skipped"
                    print(f"{time.monotonic() - start:.0f} s {group}: {row.case}: {row.what}; {row.times} times; "
                          f"{row.kept:,} weights kept; {row.came_of_it}: {verdict}", flush=True)  # fmt: skip
                    for failure in row.failures[:5]:
                        print(f"    {failure}", flush=True)
        finally:
            site.close()
            small.close()
    failed = sum(bool(row.failures) for _, row in every)
    skipped = sum(not row.failures and not row.times for _, row in every)
    if options.markdown:
        print(f"\n{table(every)}")
    print(f"\n{len(every)} cases, {failed} failed, {skipped} skipped, seed {options.seed}, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

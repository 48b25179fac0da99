"""kill -9 at random moments of builds in processes of their own, often several times of the same build."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from faults_site import ONE, SHARDS, FaultError, Row, Site, Way, files_of, require

from quantkit import partial_folder


def phase(site: Site, out: Path) -> str:
    """Where a build that was killed had got to."""
    found = partial_folder.peek(out)
    if found is None or not found.records:
        if files_of(out):
            return "removing its folder"
        return "before the first row" if partial_folder.folder_of(out).exists() else "starting"
    if site.claimed(out) == site.n_weights:
        return "all rows made"
    return "at the rows"


def kills(site: Site, times: int) -> Row:
    """A delay drawn over the time that a build takes; half of the killed are gone on with and killed again."""
    row = Row("kill -9", "", times, "")
    ways = (ONE, SHARDS, Way("cache", (*SHARDS.options, "--cache", str(site.folder / "kill-cache"))))
    came: Counter[str] = Counter()
    done = late = builds = claimed = kept = 0
    while done < times and late < 5 * times:
        way, out = ways[builds % len(ways)], site.place()
        builds += 1
        before, killed = 0, 0
        try:
            while done < times:
                # a build that is gone on with is over sooner
                left = 1 - before / site.n_weights
                delay = site.rng.uniform(0.1, 1.1) * site.seconds(way) * (0.5 + 0.5 * left)
                process = site.start(out, way, "-q")
                if not killed and site.rng.random() < 0.6:
                    _wait_for_journal(out, process)
                    delay = site.rng.uniform(0, 0.6) * site.seconds(way)
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                process.communicate()
                if process.returncode != -signal.SIGKILL:
                    require(process.returncode in (0, 7), f"exit {process.returncode}")
                    late += 1
                    break
                done, killed = done + 1, killed + 1
                came[phase(site, out)] += 1
                site.check_names(out, way)
                now = site.claimed(out)
                require(now >= before or files_of(out) == site.expected(way), f"the journal had {before}, has {now}")
                before = now
                if site.rng.random() < 0.5:
                    break
            if killed and files_of(out) != site.expected(way):
                got = site.check_rerun(out, way, forked=False)
                claimed, kept = claimed + got[0], kept + got[1]
        except FaultError as e:
            row.failures.append(f"{way.name}, kill {done}: {e}")
        shutil.rmtree(out.parent)
    if done < times:
        row.failures.append(f"only {done} of {times} kills took place")
    row.what = f"random moments of {builds} builds: {', '.join(w.name for w in ways)} ({late} too late, drawn again)"
    row.came_of_it = f"{', '.join(f'{n} {w}' for w, n in came.most_common())}; {kept:,} of {claimed:,} weights kept"
    return row


def _wait_for_journal(out: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not (partial_folder.folder_of(out) / "journal").exists():
        time.sleep(0.002)

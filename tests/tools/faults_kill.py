"""kill -9 at moments of builds in processes of their own, drawn phase by phase, often several times of the same build.

A moment is so long after something that is seen from without (the process began, the folder is there, the journal has
its first rows, it has all): up to as long as an undisturbed build takes from there to the next of them.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from faults_journal import claim_of
from faults_site import CACHED, ONE, SHARDS, Done, FaultError, Forked, Row, Site, Way, files_of, require

from quantkit.building.folder import folder_of

#: what has been seen, and how many of 100 kills come after it and before the next
SEEN = {"start": 10, "folder": 20, "rows": 45, "all rows": 25}


def phase(site: Site, out: Path) -> str:
    """Where a build that was killed had got to."""
    found = claim_of(out)
    if found is None or not found.records:
        if files_of(out):
            return "removing its folder"
        return "before the first rows" if folder_of(out).exists() else "starting"
    if site.claimed(out) == site.n_weights:
        return "giving the names" if files_of(out) else "all rows made"
    return "at the rows"


def _has(site: Site, out: Path, what: str, before: int) -> bool:
    if what == "start":
        return True
    if what == "folder":
        return folder_of(out).exists()
    claimed = site.claimed(out)
    # a folder that is gone again had them all
    return claimed > before if what == "rows" else claimed == site.n_weights or _over(out)


def _over(out: Path) -> bool:
    return bool(files_of(out)) and not folder_of(out).exists()


def _wait_for(site: Site, out: Path, process: subprocess.Popen[str] | Forked, what: str, before: int) -> None:
    while process.poll() is None and not _has(site, out, what, before) and not _over(out):
        time.sleep(0.001)


def _forked(site: Site, out: Path, way: Way) -> Forked:
    return site.server.start(site.args(out, way, "-q"), site.env)


def _spans(site: Site, way: Way) -> dict[str, float]:
    """Seconds from each thing that is seen to the next, in an undisturbed build."""
    out = site.place()
    times, process = [time.monotonic()], _forked(site, out, way)
    for what in list(SEEN)[1:]:
        _wait_for(site, out, process, what, 0)
        times.append(time.monotonic())
    process.communicate()
    times.append(time.monotonic())
    require(process.returncode == 0, "an undisturbed build failed")
    shutil.rmtree(out.parent)
    return {what: b - a for what, a, b in zip(SEEN, times, times[1:], strict=False)}


def kills(site: Site, times: int) -> Row:
    """Every killed build is continued to its end; a third of them are also continued and killed again."""
    row = Row("kill -9", "", times, "")
    ways = (ONE, SHARDS, CACHED)
    spans = {way.name: _spans(site, way) for way in ways}
    due = [what for what, n in SEEN.items() for _ in range(n)]
    site.rng.shuffle(due)
    came: Counter[str] = Counter()
    done = late = again = builds = claimed = 0
    out, way, before = site.place(), ONE, 0
    while done < times and late < 5 * times:
        if before < 0 or not builds:
            builds += 1
            out, way, before = site.place(), ways[builds % len(ways)], 0
            if way is CACHED and site.rng.random() < 0.5:
                site.put_half_a_cache(out)
        what = due[done % len(due)]
        # a process of its own, or one forked from another that has imported everything
        process = _forked(site, out, way) if site.rng.random() < 0.7 else site.start(out, way, "-q")
        _wait_for(site, out, process, what, before)
        with suppress(subprocess.TimeoutExpired):
            process.wait(site.rng.uniform(0, spans[way.name][what]))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        folder = out.parent
        was, before = before, -1
        try:
            if process.returncode != -signal.SIGKILL:
                late += 1
                require(process.returncode == 0, f"exit {process.returncode}")
                continue
            done, again = done + 1, again + (was > 0)
            came[phase(site, out)] += 1
            site.check_names(out, way)
            now = site.claimed(out)
            whole = files_of(out) == site.expected(way)
            require(now >= was or whole, f"the journal had {was:,}, has {now:,}")
            twin = site.place()
            shutil.rmtree(twin.parent)
            shutil.copytree(folder, twin.parent)
            claimed += site.check_rerun(out, way, watched=True)[0]
            if not whole and site.rng.random() < 1 / 3:
                out, before = twin, now
            else:
                shutil.rmtree(twin.parent)
        except FaultError as e:
            row.failures.append(f"{way.name}, kill {done}, after {what}: {e}")
        finally:
            shutil.rmtree(folder)
    if done < times:
        row.failures.append(f"only {done} of {times} kills took place")
    row.what = f"moments drawn over all phases of {builds} builds: {', '.join(w.name for w in ways)} ({late} too late)"
    row.came_of_it = f"{', '.join(f'{n} {w}' for w, n in came.most_common())}; {again} while continued"
    row.kept = claimed
    return row


# ---------------------------------------------------------------- for other cases


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill_at_rows(site: Site, out: Path, way: Way, named: bool = False) -> None:
    """An unfinished build with some of its rows; `named`: with some of its shards finished and named."""
    while True:
        process = _forked(site, out, way)
        try:
            stop_at_rows(site, out, process, named)
        except FaultError:
            process.communicate()
            empty(out.parent)
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return


def stop_at_rows(site: Site, out: Path, process: subprocess.Popen[str] | Forked, named: bool = False) -> None:
    """SIGSTOP as soon as the journal has rows, or files have names. Raises FaultError when most are done by then."""
    while process.poll() is None:
        found = claim_of(out)
        if found is not None and found.records and (not named or files_of(out)):
            process.send_signal(signal.SIGSTOP)
            break
        time.sleep(0.001)
    if process.poll() is not None or site.claimed(out) > (0.9 if named else 0.7) * site.n_weights:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        raise FaultError("too late")


def disturbed(site: Site, way: Way, disturb: Callable[[], object], out: Path, *more: str, **how: object) -> Done:
    """A build that is stopped at its first rows, disturbed, and let go on."""
    for _ in range(20):
        process = site.start(out, way, "-q", *more, **how)  # type: ignore[arg-type]
        try:
            stop_at_rows(site, out, process)
        except FaultError:
            process.communicate()
            empty(out.parent)
            continue
        disturb()
        process.send_signal(signal.SIGCONT)
        said, err = process.communicate(timeout=600)
        return Done(process.returncode, said, err)
    raise FaultError("20 builds were over before they could be disturbed")

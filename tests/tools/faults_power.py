"""Crashes at any call: kill -9 there, and the power lost there with whatever was not synced.

A build is run with every change of its folder noted (faults_child.py). For a crash at one of them, what a disk may
then hold: all that a finished sync covered; of each write since, all, nothing, a part of it or some of its pages; of
the names made, moved and removed since their folder was synced, the first few or any of them. The real resume goes on
from there.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from faults_child import Event, events
from faults_site import CACHED, ONE, SHARDS, FaultError, Row, Site, Way, files_of, require

PAGE = 4096


@dataclass
class Disk:
    """Folders, names and contents. A path is absolute."""

    folders: set[str] = field(default_factory=set)
    names: dict[str, int] = field(default_factory=dict)
    contents: dict[int, bytearray] = field(default_factory=dict)

    @staticmethod
    def of(root: Path) -> Disk:
        """What is there now; files are numbered as faults_child.Recorder numbers them."""
        disk = Disk({str(root), *(str(p) for p in root.rglob("*") if p.is_dir())})
        for at, path in enumerate(sorted(str(p) for p in root.rglob("*") if p.is_file())):
            disk.names[path] = at
            disk.contents[at] = bytearray(Path(path).read_bytes())
        return disk

    def put(self, root: Path) -> None:
        """Make a folder hold just this."""
        for there in root.iterdir():
            shutil.rmtree(there) if there.is_dir() else there.unlink()
        for folder in sorted(self.folders - {str(root)}, key=len):
            if str(Path(folder).parent) in self.folders:
                Path(folder).mkdir()
        for path, number in self.names.items():
            if str(Path(path).parent) in self.folders:
                Path(path).write_bytes(self.contents.get(number, b""))

    def apply(self, e: Event) -> None:
        """An event takes place, as far as it can."""
        if e.what == "create":
            self.names[e.path] = e.file
            self.contents.setdefault(e.file, bytearray())
        elif e.what == "write":
            raw = self.contents.setdefault(e.file, bytearray())
            raw.extend(bytes(max(0, e.offset + len(e.data) - len(raw))))
            raw[e.offset : e.offset + len(e.data)] = e.data
        elif e.what == "truncate":
            raw = self.contents.setdefault(e.file, bytearray())
            del raw[e.offset :]
            raw.extend(bytes(e.offset - len(raw)))
        elif e.what == "mkdir":
            self.folders.add(e.path)
        elif e.what == "rename":
            self.names[e.path] = e.file
            if self.names.get(e.old) == e.file:
                del self.names[e.old]
        elif e.what == "unlink" and self.names.get(e.path) == e.file:
            del self.names[e.path]
        elif e.what == "rmdir" and not any(str(Path(p).parent) == e.path for p in self.names):
            self.folders.discard(e.path)


def after_crash(before: Disk, log: list[Event], rng: random.Random) -> tuple[Disk, int]:
    """What a disk may hold when the power is lost after these events, and how many were not on it for sure."""
    pending: dict[int | str, list[int]] = {}
    begun: dict[int, tuple[int | str, int]] = {}
    sure: set[int] = set()
    for i, e in enumerate(log):
        if e.what == "sync-begin":
            key: int | str = e.file if e.file >= 0 else e.path
            begun[e.offset] = (key, len(pending.get(key, [])))
        elif e.what == "sync-end":
            key, n = begun.pop(e.offset)
            done = set(pending.get(key, [])[:n])
            sure |= done
            pending[key] = [p for p in pending.get(key, []) if p not in done]
            for other, (its, count) in begun.items():  # syncs at work count from the same list
                if its == key:
                    begun[other] = (its, max(0, count - n))
        elif e.what in ("write", "truncate"):
            pending.setdefault(e.file, []).append(i)
        else:
            pending.setdefault(str(Path(e.path).parent), []).append(i)
    unsure = [i for i in range(len(log)) if i not in sure and not log[i].what.startswith("sync")]
    names = [i for i in unsure if log[i].what not in ("write", "truncate")]
    share = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    # a journalling filesystem keeps the order of names
    first = names[: rng.randint(0, len(names))] if rng.random() < 0.5 else []
    kept = set(first) or {i for i in names if rng.random() < share}
    disk = Disk(set(before.folders), dict(before.names), {n: bytearray(raw) for n, raw in before.contents.items()})
    for i, e in enumerate(log):
        if i in sure or i in kept or (e.what == "truncate" and rng.random() < share):
            disk.apply(e)
        elif e.what == "write":
            for part in _torn(e, share, rng):
                disk.apply(part)
    return disk, len(unsure)


def _torn(e: Event, share: float, rng: random.Random) -> list[Event]:
    """What is left of a write that was not synced."""
    if rng.random() < share:
        return [e]
    how = rng.choice(("nothing", "length", "head", "pages"))
    if how == "nothing":
        return []
    if how == "length":
        return [e._replace(data=bytes(len(e.data)))]
    if how == "head":
        return [e._replace(data=e.data[: rng.randint(0, len(e.data))])]
    parts = []
    for at in range(-(e.offset % PAGE), len(e.data), PAGE):
        if rng.random() < 0.5:
            some = e.data[max(0, at) : at + PAGE]
            parts.append(e._replace(offset=e.offset + max(0, at), data=some))
    return parts


@dataclass
class Scene:
    """A build to crash: what is there before it, and how it is asked for."""

    name: str
    way: Way
    more: tuple[str, ...] = ()
    older: bool = False
    """files of another build have the names"""
    begun: bool = False
    """an unfinished build is continued"""
    cache: bool = False
    """a cache has half of it; what is written there may be lost too"""

    def prepare(self, site: Site) -> tuple[Path, dict[str, bytes]]:
        """An output's place with what is there before, and those older files."""
        out, made = site.place(), site.folder / f"scene {self.name}"
        if not made.exists():
            made.mkdir()
            if self.older:
                done = site.fork(made / out.name, self.way, "-q", "--imatrix", str(site.other_imatrix))
                require(done.code == 0, f"the older build failed: {done.err}")
                older, now = files_of(made / out.name), site.expected(self.way)
                require(older != now and older.keys() == now.keys(), "no older files")
            if self.begun:
                self._begin(site, made / out.name)
        shutil.copytree(made, out.parent, dirs_exist_ok=True)
        if self.cache:
            site.put_half_a_cache(out)
        return out, files_of(out) if self.older else {}

    def _begin(self, site: Site, out: Path) -> None:
        for at in range(60, 200, 4):  # the sooner the more is left
            done = site.fork(out, self.way, "-q", root=str(out.parent), log=str(site.folder / "log"), kill_at=at,
                             kill="after")  # fmt: skip
            if done.code == -9 and site.claimed(out):
                return
            if done.code == 0:
                break
        raise FaultError(f"no unfinished build: exit {done.code}, {done.err}")


SCENES = (
    Scene("one file", ONE),
    Scene("shards", SHARDS),
    Scene("shards over older ones", SHARDS, ("--force",), older=True),
    Scene("shards, continued", SHARDS, begun=True),
    Scene("one file, continued", ONE, begun=True),
    Scene("shards, with a cache", CACHED, cache=True),
)


def _crash(
    site: Site, scene: Scene, times: int, disturb: Callable[[Path, dict[str, bytes]], str | None], came: Counter[str],
    failures: list[str],
) -> int:  # fmt: skip
    """Disturb and go on, so often; weights kept, all that were claimed."""
    claimed = done = 0
    draws = 0
    while done < times and draws < 10 * times:
        draws += 1
        out, older = scene.prepare(site)
        what: str | None = "at its end"
        try:
            what = disturb(out, older)
            if what is None:  # it was over before
                came["drawn again"] += 1
            else:
                done += 1
                came[what] += 1
                site.check_names(out, scene.way, older)
                claimed += site.check_rerun(out, scene.way, *scene.more)[0]
        except FaultError as e:
            done += what == "at its end"
            failures.append(f"{scene.name}, {what}: {e}")
        shutil.rmtree(out.parent)
    if done < times:
        failures.append(f"{scene.name}: only {done} of {times} crashes took place")
    return claimed


def _recorded(site: Site, scene: Scene, plant: str = "") -> tuple[Disk, list[Event], Path]:
    out, _ = scene.prepare(site)
    before, log = Disk.of(out.parent), site.folder / "log"
    done = site.fork(out, scene.way, "-q", *scene.more, root=str(out.parent), log=str(log), plant=plant)
    require(done.code == 0, f"the watched build failed: {done.err}")
    require(files_of(out) == site.expected(scene.way), "the watched build made something else")
    shutil.rmtree(out.parent)
    return before, events(log), out


def kills_at_calls(site: Site, times: int) -> Row:
    """kill -9 before, after or half-way through a call."""
    row = Row("kill -9 at a system call", "", times, "")
    came: Counter[str] = Counter()
    for scene, n in _shares(times):
        log = _recorded(site, scene)[1]
        numbers = [i + 1 for i in range(len(log))]
        rare = [i for i in numbers if log[i - 1].what not in ("write", "sync-begin", "sync-end")]
        path = site.folder / "log"

        def disturb(out: Path, _older: Mapping[str, bytes], scene: Scene = scene, numbers: list[int] = numbers,
                    rare: list[int] = rare, path: Path = path) -> str | None:  # fmt: skip
            at = site.rng.choice(rare if site.rng.random() < 0.5 else numbers)
            done = site.fork(out, scene.way, "-q", *scene.more, root=str(out.parent), log=str(path), kill_at=at,
                             kill=site.rng.choice(("before", "after", "half")))  # fmt: skip
            if done.code != -9:
                require(done.code == 0, f"{done.code}: {done.err}")
                return None
            return events(path)[-1].old

        row.kept += _crash(site, scene, n, disturb, came, row.failures)
    again = came.pop("drawn again", 0)
    row.what = f"at a call that makes, writes, syncs, renames or removes ({again} drawn again)"
    row.came_of_it = ", ".join(f"{n} {w}" for w, n in came.most_common())
    return row


def power_loss(site: Site, times: int, plant: str = "") -> Row:
    """The power is lost after any call. `plant` as in faults_child.py."""
    row = Row("power loss, simulated", "", times, "")
    came: Counter[str] = Counter()
    for scene, n in _shares(times):
        before, log, recorded = _recorded(site, scene, plant)
        rare = [i for i, e in enumerate(log) if e.what not in ("write", "create", "mkdir")]

        def disturb(out: Path, older: Mapping[str, bytes], before: Disk = before, log: list[Event] = log,
                    rare: list[int] = rare, recorded: Path = recorded, scene: Scene = scene) -> str | None:  # fmt: skip
            at = site.rng.choice(rare if site.rng.random() < 0.5 else range(len(log)))
            if site.rng.random() < 0.1:
                at = len(log) - 1
            elif plant and site.rng.random() < 0.5:  # where such a defect does harm
                told = [i for i, e in enumerate(log) if e.what == "sync-end" and e.path.endswith("/journal")]
                at = len(log) - 1 if plant == "names" else site.rng.choice(told)
            disk, unsure = after_crash(before, log[: at + 1], site.rng)
            # the log's paths are of the place where it was made
            recorded.parent.mkdir()
            try:
                disk.put(recorded.parent)
                for path in out.parent.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for path in recorded.parent.iterdir():
                    path.rename(out.parent / path.name)
            finally:
                shutil.rmtree(recorded.parent)
            if not unsure:
                return None
            if at == len(log) - 1:
                require(files_of(out) == site.expected(scene.way), "the build was done, and its files are not there")
                return "its end"
            return log[at].what

        row.kept += _crash(site, scene, n, disturb, came, row.failures)
    again = came.pop("drawn again", 0)
    row.what = f"unsynced writes and names lost, torn or kept at random ({again} drawn again)"
    row.came_of_it = f"after {', '.join(f'{n} {w}' for w, n in came.most_common())}"
    return row


PLANTED = {"data": "files are not synced", "order": "the journal is written before its rows are synced",
           "names": "names are not synced"}  # fmt: skip


def planted(site: Site, times: int) -> Row:
    """That the power's loss would find these defects: each is put into the builds that are watched."""
    row, found = Row("power loss finds planted defects", "; ".join(PLANTED.values()), 0, ""), []
    for plant, defect in PLANTED.items():
        tried = power_loss(site, times, plant)
        row.times += tried.times
        found.append(f"{len(tried.failures)} of {tried.times}")
        if not tried.failures:
            row.failures.append(f"{defect}: was not found at {tried.times} crashes")
    row.came_of_it = f"found at {', '.join(found)} crashes"
    return row


def _shares(times: int) -> list[tuple[Scene, int]]:
    """How often for each scene, where it is at all."""
    every = [(scene, times // len(SCENES) + (i < times % len(SCENES))) for i, scene in enumerate(SCENES)]
    return [(scene, n) for scene, n in every if n]

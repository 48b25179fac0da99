"""Faults of disks, memory, permissions and sources while a build runs."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from faults_calls import failing
from faults_kill import disturbed, kill_at_rows
from faults_site import ONE, SHARDS, FaultError, Row, Site, SkipError, Way, check_said, files_of, require

from quantkit.building.folder import folder_of

#: what glibc says as it ends a process in such a case
GLIBC = "cannot allocate"
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _PR_CAPBSET_DROP = 1, 2, 24


def source_changes(how: str) -> Callable[[Site], Row]:
    """A source that is changed while a build runs, and put back later with its times: nothing that was made of the
    other content may be kept, neither in the unfinished build nor in a cache."""

    def run(site: Site) -> Row:
        cache = site.folder / f"cache-{how}"
        ways = (ONE, Way("cache", (*SHARDS.options, "--cache", str(cache))))
        row = Row(f"source {how}", "while rows are made, put back afterwards; with a cache too", 2 * len(ways), "")
        for way in ways:
            site.expected(way)  # before anything is changed
        for n in range(2 * len(ways)):
            way, out = ways[n % len(ways)], site.place()
            victim = site.imatrix if how == "imatrix changes" else site.shards[n // len(ways) + 1]
            saved, was = site.folder / "saved", os.stat(victim)
            shutil.copy2(victim, saved)

            def disturb(victim: Path = victim) -> None:
                if how == "shrinks":
                    os.truncate(victim, os.path.getsize(victim) // 2)
                elif how == "vanishes":
                    victim.unlink()
                elif how == "is replaced":
                    new = victim.with_name("new")
                    new.write_bytes(_other(victim))
                    new.replace(victim)
                else:
                    with victim.open("r+b") as f:
                        f.write(_other(victim))

            try:
                got = disturbed(site, way, disturb, out)
                check_said(got, 4, 6)
                site.check_names(out, way)
            except FaultError as e:
                row.failures.append(f"{way.name}: {e}")
            finally:
                with victim.open("r+b" if victim.exists() else "wb") as f:
                    f.write(saved.read_bytes())
                    f.truncate()
                os.utime(victim, ns=(was.st_atime_ns, was.st_mtime_ns))
            try:
                row.kept += site.check_rerun(out, way)[0]
                shutil.rmtree(out.parent)
                out = site.place()
                site.check_finished(out, way, site.fork(out, way))
            except FaultError as e:
                row.failures.append(f"{way.name}, put back: {e}")
            shutil.rmtree(out.parent)
        row.came_of_it = "refused, nothing kept of the other content"
        return row

    return run


def _other(path: Path) -> bytes:
    """The same header, other weights, none of them NaN."""
    raw = bytearray(path.read_bytes())
    begin = len(raw) // 3
    for at in range(begin, len(raw), 97):
        raw[at] ^= 1
    return bytes(raw)


# ---------------------------------------------------------------- room


@contextmanager
def filesystem(site: Site, kind: str, nbytes: int) -> Iterator[Path]:
    """A small tmpfs, or an ext4 on a loop device. Raises SkipError where none can be mounted."""
    folder, image = site.folder / "mount", site.folder / "image"
    folder.mkdir(exist_ok=True)
    commands = [["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(folder)]]
    if kind == "ext4":
        with image.open("wb") as f:
            f.truncate(nbytes + (2 << 20))
        # without a journal of its own, and nothing set aside for root
        commands = [["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", str(image)],
                    ["mount", "-o", "loop", str(image), str(folder)]]  # fmt: skip
    for command in commands:
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True, check=False).returncode:
            raise SkipError(f"no {kind} can be mounted here (that takes root{' and loop devices' * (kind == 'ext4')})")
    try:
        if (folder / "lost+found").exists():
            (folder / "lost+found").rmdir()
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        image.unlink(missing_ok=True)


def fill(folder: Path, but: int = 0) -> Path:
    """Take all the space there is, but for so many bytes."""
    path = folder / "filler"
    with path.open("ab", 0) as f, suppress(OSError):
        while (free := shutil.disk_usage(folder).free - but) > 0 and f.write(bytes(min(free, 65536))):
            pass
    return path


def disk_too_small(kind: str) -> Callable[[Site], Row]:
    def run(site: Site) -> Row:
        row = Row(f"disk too small, {kind}", "less room than the output needs", 2, "refused before the first byte")
        size = sum(map(len, site.expected(ONE).values()))
        with filesystem(site, kind, size + (1 << 20)) as folder:
            fill(folder, size - 65536)
            for way in (ONE, SHARDS):
                got = site.run(folder / "m.gguf", way, "-q")
                check_said(got, 7, says="more, or choose another place")
                require({p.name for p in folder.iterdir()} == {"filler"}, f"left {list(folder.iterdir())}")
        return row

    return run


def disk_filled(kind: str, reserved: bool) -> Callable[[Site], Row]:
    """Another process takes the room while rows are made."""

    def run(site: Site) -> Row:
        what = "after the space was reserved" if reserved else "where no space can be reserved"
        row = Row(f"disk filled by another, {kind}", what, 4, "")
        size = sum(map(len, site.expected(ONE).values())) + (1 << 20)
        env = {} if reserved else failing(site, "fallocate", errno.EOPNOTSUPP)
        went_on = 0
        for n in range(4):
            way = (ONE, SHARDS)[n % 2]
            with filesystem(site, kind, size) as folder:
                out = folder / "m.gguf"
                got = disturbed(site, way, partial(fill, folder), out, env=env)
                require((folder / "filler").stat().st_size > 0, "nothing was filled")
                (folder / "filler").unlink()
                try:
                    site.check_names(out, way)
                    if got.code == 0:
                        went_on += 1
                        site.check_finished(out, way, got)
                    else:
                        check_said(got, 7, says="No space left on device")
                        row.kept += site.check_rerun(out, way)[0]
                except FaultError as e:
                    row.failures.append(f"{way.name}: {e}")
        if not reserved and went_on:
            row.failures.append(f"{went_on} were not disturbed by it")
        row.came_of_it = f"{went_on} went on, {4 - went_on} ended and went on later"
        return row

    return run


def file_too_large(site: Site) -> Row:
    row = Row("RLIMIT_FSIZE", "a limit below the file's size, one below the journal's", 2, "one clear sentence each")
    journal_bytes = 8192
    for limit in (sum(map(len, site.expected(ONE).values())) // 2, journal_bytes):
        out = site.place()

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        got = site.run(out, ONE, "-q", before=limited)
        check_said(got, 7, says="File too large")
        require(not list(out.parent.iterdir()), f"left {list(out.parent.iterdir())}")
        site.check_rerun(out, ONE)
    return row


def out_of_memory(site: Site) -> Row:
    """Address space limited more and more, from where a build works to where Python does not start."""
    row, way, ended = Row("RLIMIT_AS", "", 0, ""), Way("8 threads", ("-t", "8")), Counter[str]()

    def works(limit: int) -> bool:
        """Whether a build gets by with so much; where it began and does not, how it ended is noted."""

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        out = site.place()
        got = site.run(out, way, "-q", before=limited)
        try:
            site.check_names(out, ONE)
            if got.code and (folder_of(out).exists() or got.err.startswith("error:")):
                row.times += 1
                # of a thread whose memory for thread-local data is missing: no program is asked
                by_glibc = got.code == 127 and GLIBC in got.err
                ended["ended by glibc" if by_glibc else "said so"] += 1
                if got.code == 9:
                    check_said(got, 9, says="failed to map")
                elif not by_glibc:
                    check_said(got, 1, says="memory")
                row.kept += site.check_rerun(out, ONE)[0]
        except FaultError as e:
            row.failures.append(f"{limit:,} bytes: {e}")
        shutil.rmtree(out.parent)
        return got.code == 0

    low, high = 64 << 20, 4 << 30
    while high - low > 2 << 20:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    for limit in range(high - (48 << 20), high, 6 << 20):
        works(limit)
    row.what = f"limits below {high >> 20} MiB, where a build of 8 threads begins to work"
    row.came_of_it = ", ".join(f"{n} {how}" for how, n in ended.items())
    if ended["ended by glibc"]:
        row.came_of_it += " (no memory for a thread's own data, which no program can catch; as a kill)"
    return row


# ---------------------------------------------------------------- permissions


def without_override() -> None:
    """In the child: root's files are closed to it where their permissions say so."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def permissions(site: Site) -> Row:
    row = Row("permission denied", "", 0, "one clear sentence each; nothing left; the rerun is right")
    names = []

    def tried(name: str, path: Path, mode: int, out: Path, way: Way, codes: tuple[int, ...]) -> None:
        names.append(name)
        row.times += 1
        was = path.stat().st_mode
        path.chmod(mode)
        try:
            got = site.run(out, way, "-q", before=without_override)
        finally:
            path.chmod(was)
        try:
            if got.code or 0 not in codes:
                check_said(got, *codes, says="ermission")
            if not files_of(out):
                row.kept += site.check_rerun(out, way)[0]
        except FaultError as e:
            row.failures.append(f"{name}: {e}")

    tried("a shard", site.shards[1], 0, site.place(), ONE, (4,))
    tried("the checkpoint's folder", site.source, 0, site.place(), ONE, (4,))
    tried("the imatrix", site.imatrix, 0, site.place(), ONE, (6,))
    out = site.place()
    tried("the output's folder, not writable", out.parent, 0o555, out, ONE, (7,))
    out = site.place()
    tried("the output's folder, closed", out.parent, 0, out, ONE, (7,))
    for name, inner, mode, codes in (
        ("an unfinished build's folder", "", 0, (7, 13)), ("its folder, not writable", "", 0o555, (7, 13)),
        ("its journal", "journal", 0, (7, 13)), ("its file", "m.gguf", 0, (7, 13)), ("its lock", "lock", 0, (7, 13)),
    ):  # fmt: skip
        out = site.place()
        kill_at_rows(site, out, ONE)
        tried(name, folder_of(out) / inner, mode, out, ONE, codes)
    cache = site.folder / "cache-closed"
    way = Way("cache", (*ONE.options, "--cache", str(cache)))
    require(site.run(site.place(), way, "-q").code == 0, "no cache")
    tried("the cache's entries", cache / "objects", 0, site.place(), way, (0, 7))
    row.what = "; ".join(names)
    return row


def read_only(site: Site) -> Row:
    row = Row("read-only output", "a filesystem mounted read-only, with and without an unfinished build", 2, "refused")
    with filesystem(site, "tmpfs", 64 << 20) as folder:
        out = folder / "m.gguf"
        for begun in (False, True):
            if begun:
                kill_at_rows(site, out, ONE)
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            check_said(site.run(out, ONE, "-q"), 7)
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        row.kept = site.check_rerun(out, ONE)[0]
    row.came_of_it = "one clear sentence each"
    return row


SOURCES = tuple(source_changes(how) for how in ("shrinks", "changes", "vanishes", "is replaced", "imatrix changes"))
ROOM: tuple[Callable[[Site], Row], ...] = (
    *(disk_too_small(kind) for kind in ("ext4", "tmpfs")),
    *(disk_filled(kind, reserved) for kind in ("ext4", "tmpfs") for reserved in (True, False)),
    file_too_large,
)  # fmt: skip
CLOSED: tuple[Callable[[Site], Row], ...] = (permissions, read_only)

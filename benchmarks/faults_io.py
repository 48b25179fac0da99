"""Faults of disks, memory, permissions and sources while a build runs."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from faults_site import ONE, SHARDS, Done, FaultError, Row, Site, Way, check_said, files_of, require

from quantkit import partial_folder
from quantkit.partial import folder_of

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _PR_CAPBSET_DROP = 1, 2, 24


class SkipError(Exception):
    """The case cannot be tried here; says why."""


# ---------------------------------------------------------------- calls that fail


def shim(site: Site) -> Path:
    """The library that makes calls fail."""
    out = site.folder / "shim.so"
    if not out.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise SkipError("there is no C compiler")
        source = Path(__file__).with_name("faults_shim.c")
        done = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(out), str(source), "-ldl"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            raise SkipError(f"the shim does not compile here: {done.stderr.splitlines()[0]}")
    return out


def failing(
    site: Site, call: str, error: int, path: str = "", skip: int = 0, times: int = 0, nbytes: int = 0
) -> dict[str, str]:  # fmt: skip
    """The environment in which a call fails."""
    log = site.folder / "fault-log"
    log.unlink(missing_ok=True)
    said = {"CALL": call, "ERRNO": error, "PATH": path, "SKIP": skip, "TIMES": times, "BYTES": nbytes, "LOG": log}
    return {"LD_PRELOAD": str(shim(site)), **{f"FAULT_{k}": str(v) for k, v in said.items()}}


def call_fails(
    case: str, call: str, error: int, path: str, codes: tuple[int, ...], says: str = "",
    skips: tuple[int, int] = (0, 40), times: int = 0, nbytes: int = 0, way: Way = ONE, begun: bool = False, n: int = 3,
) -> Callable[[Site], Row]:  # fmt: skip
    """A case in which a call fails after a number drawn from `skips` have not."""

    def run(site: Site) -> Row:
        row = Row(case, f"{call}: {os.strerror(error) if error else 'half of what was asked'}", n, "")
        done = draws = claimed = survived = 0
        use = Way(way.name, tuple(o.replace("CACHE", str(site.folder / f"cache-{case}")) for o in way.options))
        if "--cache" in use.options and skips == (0, 0):  # reads of a cache: fill it
            out = site.place()
            require(site.run(out, use, "-q").code == 0, "the cache could not be filled")
        while done < n:
            draws += 1
            if draws > 10 * n:
                row.failures.append(f"only {done} of {n} took place")
                break
            out = site.place()
            if begun:
                kill_at_rows(site, out, use)
            skip = site.rng.randint(*skips) if draws < 5 * n else skips[0]
            got = site.run(out, use, "-q", env=failing(site, call, error, path, skip, times, nbytes))
            if not (site.folder / "fault-log").exists():
                continue
            done += 1
            try:
                site.check_names(out, use)
                if got.code == 0 and 0 in codes:
                    survived += 1
                    site.check_finished(out, use, got)
                else:
                    check_said(got, *codes, says=says)
                    claimed += site.check_rerun(out, use)[0]
            except FaultError as e:
                row.failures.append(f"skip {skip}: {e}")
            shutil.rmtree(out.parent)
        row.came_of_it = f"{survived} went on, {done - survived} ended and went on later ({claimed:,} weights kept)"
        return row

    return run


def kill_at_rows(site: Site, out: Path, way: Way) -> None:
    """An unfinished build with some of its rows."""
    while True:
        process = site.start(out, way, "-q")
        try:
            stop_at_rows(site, out, process)
        except FaultError:
            process.communicate()
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return


def stop_at_rows(site: Site, out: Path, process: subprocess.Popen[str]) -> None:
    """SIGSTOP as soon as the journal has rows. Raises FaultError when most are done by then."""
    while process.poll() is None:
        found = partial_folder.peek(out)
        if found is not None and found.records:
            process.send_signal(signal.SIGSTOP)
            break
        time.sleep(0.001)
    if process.poll() is not None or site.claimed(out) > 0.7 * site.n_weights:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        raise FaultError("too late")


def disturbed(site: Site, way: Way, disturb: Callable[[], None], out: Path, *more: str, **how: object) -> Done:
    """A build that is stopped at its first rows, disturbed, and let go on."""
    for _ in range(20):
        process = site.start(out, way, "-q", *more, **how)  # type: ignore[arg-type]
        try:
            stop_at_rows(site, out, process)
        except FaultError:
            process.communicate()
            for path in out.parent.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        disturb()
        process.send_signal(signal.SIGCONT)
        said, err = process.communicate(timeout=600)
        return Done(process.returncode, said, err)
    raise FaultError("20 builds were over before they could be disturbed")


# ---------------------------------------------------------------- sources


def source_changes(how: str) -> Callable[[Site], Row]:
    """A source that is changed while a build runs, and put back later with its times: nothing that was made of the
    other content may be kept, neither in the unfinished build nor in a cache."""

    def run(site: Site) -> Row:
        cache = site.folder / f"cache-{how}"
        ways = (ONE, Way("cache", (*SHARDS.options, "--cache", str(cache))))
        row = Row(f"source {how}", "while rows are made, put back afterwards; with a cache too", 2 * len(ways), "")
        claimed = 0
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
                claimed += site.check_rerun(out, way)[0]
                shutil.rmtree(out.parent)
                out = site.place()
                site.check_finished(out, way, site.fork(out, way))
            except FaultError as e:
                row.failures.append(f"{way.name}, put back: {e}")
            shutil.rmtree(out.parent)
        row.came_of_it = f"refused, nothing kept of the other content; {claimed:,} weights from before were kept"
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
def tmpfs(site: Site, options: str) -> Iterator[Path]:
    """A small filesystem. Raises SkipError where none can be mounted."""
    folder = site.folder / "mount"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        raise SkipError("no filesystem can be mounted here (that takes root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the space there is."""
    path = folder / "filler"
    with path.open("ab", 0) as f, suppress(OSError):
        while f.write(bytes(4096)):
            pass
    return path


def disk_too_small(site: Site) -> Row:
    row = Row("disk too small", "a filesystem with less room than the output needs", 2, "refused before the first byte")
    with tmpfs(site, f"size={sum(map(len, site.expected(ONE).values())) - 65536}") as folder:
        for way in (ONE, SHARDS):
            got = site.run(folder / "m.gguf", way, "-q")
            check_said(got, 7, says="more, or choose another place")
            require(not list(folder.iterdir()), f"left {list(folder.iterdir())}")
    return row


def disk_filled(reserved: bool) -> Callable[[Site], Row]:
    """Another process takes the room while rows are made."""

    def run(site: Site) -> Row:
        what = "after the space was reserved" if reserved else "where no space can be reserved"
        row = Row("disk filled by another", what, 4, "")
        size = sum(map(len, site.expected(ONE).values())) + (1 << 20)
        env = {} if reserved else failing(site, "fallocate", errno.EOPNOTSUPP)
        went_on = claimed = 0
        for n in range(4):
            way = (ONE, SHARDS)[n % 2]
            with tmpfs(site, f"size={size}") as folder:
                out = folder / "m.gguf"
                got = disturbed(site, way, lambda folder=folder: fill(folder), out, env=env)
                require((folder / "filler").stat().st_size > 0, "nothing was filled")
                (folder / "filler").unlink()
                try:
                    site.check_names(out, way)
                    if got.code == 0:
                        went_on += 1
                        site.check_finished(out, way, got)
                    else:
                        check_said(got, 7, says="No space left on device")
                        claimed += site.check_rerun(out, way)[0]
                except FaultError as e:
                    row.failures.append(f"{way.name}: {e}")
        if not reserved and went_on:
            row.failures.append(f"{went_on} were not disturbed by it")
        row.came_of_it = f"{went_on} went on, {4 - went_on} ended and went on later ({claimed:,} weights kept)"
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
    row = Row("RLIMIT_AS", "", 0, "")
    out, high = site.place(), 4 << 30
    low = 64 << 20
    ended: dict[int, int] = {}

    def run(limit: int) -> Done:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        return site.run(out, Way("8 threads", ("-t", "8")), "-q", "--restart", "--force", before=limited)

    while high - low > 2 << 20:
        middle = (low + high) // 2
        got = run(middle)
        ended[middle] = got.code
        if got.code == 0:
            high = middle
            continue
        low = middle
        if folder_of(out).exists() or got.err.startswith("error"):
            try:
                check_said(got, 1, says="memory")
            except FaultError as e:
                row.failures.append(f"{middle:,} bytes: {e}")
        row.times += 1
    for limit in range(low - (48 << 20), high, 6 << 20):
        got = run(limit)
        ended[limit] = got.code
        if got.code and ("begun" in got.err or "error: " in got.err or folder_of(out).exists()):
            row.times += 1
            try:
                check_said(got, 1, says="memory")
            except FaultError as e:
                row.failures.append(f"{limit:,} bytes: {e}")
    row.what = f"limits around {high >> 20} MiB, where a build begins to work"
    row.came_of_it = (
        f"{sum(c == 0 for c in ended.values())} builds worked, {sum(c == 1 for c in ended.values())} said so"
    )
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
                site.check_rerun(out, way)
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
    with tmpfs(site, "size=64m") as folder:
        out = folder / "m.gguf"
        for begun in (False, True):
            if begun:
                kill_at_rows_in(site, out)
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            check_said(site.run(out, ONE, "-q"), 7)
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        claimed = site.check_rerun(out, ONE)[0]
    row.came_of_it = f"one clear sentence each; {claimed:,} weights kept"
    return row


def kill_at_rows_in(site: Site, out: Path) -> None:
    """As kill_at_rows, where the folder cannot be removed."""
    process = site.start(out, ONE, "-q")
    stop_at_rows(site, out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


CACHED = Way("cache", (*ONE.options, "--cache", "CACHE"))
CASES: tuple[Callable[[Site], Row], ...] = (
    call_fails("read error", "pread", errno.EIO, "safetensors", (4,), "Input/output error"),
    call_fails("short reads", "pread", 0, "safetensors", (0,), times=50, n=2),
    call_fails("write error", "pwrite", errno.EIO, ".gguf", (7,), "Input/output error"),
    call_fails("disk full at a write", "pwrite", errno.ENOSPC, ".gguf", (7,), "free some space"),
    call_fails("quota full at a write", "pwrite", errno.EDQUOT, ".gguf", (7,), "free some space", n=2),
    call_fails("short writes", "pwrite", 0, ".partial", (0,), times=50, n=2),
    call_fails("sync error", "fdatasync", errno.EIO, ".partial", (7,), "Input/output error", (0, 8)),
    call_fails("sync error at the end", "fsync", errno.EIO, ".gguf", (7,), "Input/output error", (1, 3), n=2),
    call_fails("disk full at the journal", "write", errno.ENOSPC, "journal", (7,), "No space left", (0, 4)),
    call_fails("rename refused", "rename", errno.EACCES, ".gguf", (7,), "Permission denied", (0, 2), way=SHARDS),
    call_fails("no room to reserve", "fallocate", errno.ENOSPC, ".gguf", (7,), "cannot be reserved", (0, 0), n=1),
    call_fails("cannot reserve", "fallocate", errno.EOPNOTSUPP, ".gguf", (0,), skips=(0, 0), n=1),
    call_fails("out of memory in a worker", "malloc", errno.ENOMEM, "", (1,), "memory", (6, 24), nbytes=1 << 17, n=6),
    call_fails("read error at going on", "pread", errno.EIO, ".partial", (7,), "Input/output", (0, 3), begun=True, n=2),
    call_fails("cache cannot be written", "pwrite", errno.ENOSPC, "cache-", (0,), way=CACHED, skips=(1, 20), n=2),
    call_fails("cache cannot be read", "pread", errno.EIO, "cache-", (0,), way=CACHED, skips=(0, 0), n=2),
    *(source_changes(how) for how in ("shrinks", "changes", "vanishes", "is replaced", "imatrix changes")),
    disk_too_small, disk_filled(True), disk_filled(False), file_too_large, out_of_memory, permissions, read_only,
)  # fmt: skip

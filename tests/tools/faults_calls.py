"""Calls of the C library that fail in the middle of a build: reads, writes, syncs, renames, memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from faults_kill import kill_at_rows
from faults_site import ONE, SHARDS, FaultError, Row, Site, SkipError, Way, check_said, require


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
        done = draws = survived = 0
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
                    row.kept += site.check_rerun(out, use)[0]
            except FaultError as e:
                row.failures.append(f"skip {skip}: {e}")
            shutil.rmtree(out.parent)
        row.came_of_it = f"{survived} went on, {done - survived} ended and went on later"
        return row

    return run


CACHE = Way("cache", (*ONE.options, "--cache", "CACHE"))
CALLS: tuple[Callable[[Site], Row], ...] = (
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
    call_fails("cache cannot be written", "pwrite", errno.ENOSPC, "cache-", (0,), way=CACHE, skips=(1, 20), n=2),
    call_fails("cache cannot be read", "pread", errno.EIO, "cache-", (0,), way=CACHE, skips=(0, 0), n=2),
)  # fmt: skip

"""The folder of an unfinished build: OUT.partial, beside the output.

OUT.partial/lock        held by the working process, with its number
OUT.partial/journal     what is being built, and the rows that are durable (quantkit.building.journal)
OUT.partial/NAME.gguf   a file of the output: header first, full length, rows in place as they are made
OUT.partial/scratch/    an engine's; emptied
OUT.partial/source/     shards of a source on the Hub, while they are needed (quantkit.model.sources.shard_store)
OUT.partial/shards      which of them have come and are left (quantkit.building.shards_told)
OUT.partial/pass/       an engine's computed results, with which it resumes

The folder and its content belong to the user who builds, and only that user writes to it: the content decides which
bytes the output gets. Others may read it (`quantkit status`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder, kind, who
from ..base.lock import HeldError, Lock, holder
from . import journal
from .journal import ToldBuild

LOCK, SCRATCH, SOURCE, LASTING = "lock", "scratch", "source", "pass"
#: only the owner may write to it, whatever the umask
_MODE = 0o755
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def folder_of(out: Path) -> Path:
    """The folder of an unfinished build of `out`."""
    return out.with_name(f"{out.name}.partial")


def held_folder(out: Path, own: bool) -> Folder | None:
    """Hold the folder of an unfinished build of `out`, if there is one; `own`: it must be this user's. Raises
    OutputError for a symbolic link of its name, or another user's folder, and OSError."""
    path = folder_of(out)
    try:
        folder = Folder.hold(path, follow=False)
    except OSError as e:
        if os.path.islink(path):
            raise OutputError(_no_build(path, "is a symbolic link")) from None
        if e.errno in _ABSENT:
            return None
        raise
    if own and not folder.is_own:
        by = folder.info.st_uid
        folder.close()
        raise OutputError(f"{path}: belongs to {who(by)}, not to you; have it moved away, or give another output")
    return folder


def _no_build(path: Path, what: str) -> str:
    return f"{path}: {what} and is no unfinished build of quantkit; move it away, or give another output"


def read_journal(out: Path, own: bool = False) -> ToldBuild | None:
    """Read the journal of an unfinished build of `out`, if there is one; `own`: it must be this user's. Raises
    ResumeError; OutputError for a folder that cannot be an unfinished build."""
    try:
        folder = held_folder(out, own)
    except OSError as e:
        raise ResumeError(f"{folder_of(out)}: cannot be read: {e.strerror or e}") from None
    if folder is None:
        return None
    with folder:
        return journal.read(folder, folder.own if own else None)


def owner(out: Path) -> int | None:
    """The process that is building `out` now; 0 if unknown, None if there is none."""
    try:
        with Folder.hold(folder_of(out), follow=False) as folder:
            return holder(folder, LOCK)
    except (OSError, OutputError):
        return None


class Taken(NamedTuple):
    """The folder of an unfinished build, locked by this process."""

    folder: Folder
    lock: Lock

    def close(self) -> None:
        self.lock.close()
        self.folder.close()


def take(out: Path, ours: Collection[str]) -> Taken:
    """Make the folder if it does not exist, and take its lock. `ours` are names of the build's files that may be in it.
    Raises ResumeError while another process holds it, OutputError for a folder that cannot be made or belongs to
    another user, and OSError."""
    path = folder_of(out)
    while True:
        try:
            with suppress(FileExistsError):
                path.mkdir(_MODE)
            folder = held_folder(out, own=True)
        except OSError as e:
            raise OutputError(f"{path}: cannot be made: {e.strerror or e}; choose another place") from None
        if folder is None:
            info = os.stat(path, follow_symlinks=False) if os.path.lexists(path) else None
            if info is None:
                continue  # its owner has just removed it
            raise OutputError(f"{path}: is {kind(info)}; move it away, or give another output")
        try:
            lock = _locked(out, folder, ours)
        except BaseException:
            folder.close()
            raise
        if lock is not None:
            return Taken(folder, lock)
        folder.close()  # its owner has finished and removed the folder: try again


def _locked(out: Path, folder: Folder, ours: Collection[str]) -> Lock | None:
    """Take the lock of a folder; None if the folder no longer exists."""
    _check_ours(folder, {LOCK, journal.NAME, SCRATCH, SOURCE, *ours})
    folder.close_to_others()
    try:
        lock = Lock.of_file(folder, LOCK, folder.own)
    except FileNotFoundError:
        return None
    except HeldError as e:
        raise ResumeError(f"{out}: is being built by process {e.by}; wait for it, or give another output") from None
    if folder.is_still(folder.path):
        return lock
    lock.close()
    return None


def _check_ours(folder: Folder, ours: set[str]) -> None:
    """Raise OutputError if the folder is not a build's: it would be emptied."""
    there = set(folder.names())
    if there - ours and not there & {LOCK, journal.NAME}:
        raise OutputError(_no_build(folder.path, f"holds '{min(there - ours)}'"))


def clear(folder: Folder, but: Collection[str] = ()) -> None:
    """Remove everything except the lock and the names in `but`; the journal goes last. Raises OSError."""
    for name in sorted(folder.names(), key=lambda n: n == journal.NAME):
        if name not in (LOCK, *but):
            folder.remove(name)


def fetched(folder: Folder) -> int:
    """Size of the source's shards fetched so far, in bytes. Raises OSError."""
    try:
        source = folder.sub(SOURCE)
    except FileNotFoundError:
        return 0
    with source:
        return sum(info.st_size for name in source.names() if (info := source.look(name)) is not None)

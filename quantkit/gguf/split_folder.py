"""The hidden folder beside the output in which a split or merge makes its files, and what an earlier run left there.

.quantkit-shards-…/journal        what is made of what (quantkit.base.journal), and which files are on disk
.quantkit-shards-…/NAME.part      a file of the output, until it gets its name
.quantkit-shards-…/replaced/      existing files of the output's names, while the new ones get them; done/ afterwards

The folder is named after the output's first file, and locked. It outlives only a process that was killed: the same
command then keeps the complete files, and any other starts afresh. Each file is one part of the journal, with one unit,
and is recognized by inode, size and time, since copied data is not read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..base import journal
from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder, who
from ..base.journal import Journal, Record, Told
from ..base.lock import HeldError, Lock
from ..base.version import __version__
from .split import OutputFile, ShardSet

JOURNAL, REPLACED, DONE, OF = "journal", "replaced", "done", "split"
_DAMAGED = "it starts again"


class Made(NamedTuple):
    """A file in the hidden folder, later moved to `path`. `known` identifies it (inode, size, time)."""

    temporary: str
    path: Path
    known: bytes


def known(info: os.stat_result) -> bytes:
    """Return a digest that identifies a written file: of its inode, and size and time too, since the inode number of a
    removed file may be reused."""
    return journal.digest(f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}".encode())


def is_still(info: os.stat_result | None, made: bytes) -> bool:
    return info is not None and known(info) == made


def temporary_of(name: str) -> str:
    return f"{name}.part"


class SplitFolder:
    """The hidden folder, held and locked, once the remains of an earlier run have been sorted out."""

    def __init__(self, scratch: Folder, head: Mapping[str, Any], told: Told[dict[str, Any]] | None) -> None:
        self.folder = scratch
        self.kept: dict[int, bytes] = {}
        """number -> what identifies the file, for files that an earlier run completed"""
        if told is None or told.head != head:
            for name in scratch.names():
                scratch.remove(name)
            self._journal = Journal.begin(scratch, JOURNAL, OF, head)
        else:
            for r in told.records:
                if r.part < len(head["files"]):
                    info = scratch.look(temporary_of(head["files"][r.part][0]))
                    if is_still(info, r.digest):
                        self.kept[r.part] = r.digest
            self._journal = Journal.go_on(scratch, JOURNAL, told)

    def tell(self, number: int, made: Made) -> None:
        """Record that a file is complete and on disk. Raises OSError."""
        self._journal.tell([Record(number, 0, 1, made.known)])

    def close(self) -> None:
        self._journal.close()


@contextmanager
def hidden_folder(folder: Folder, model: ShardSet, files: Sequence[OutputFile]) -> Iterator[SplitFolder]:
    """Hold the hidden folder of these files, which only this user may write to; it is removed at the end.
    Raises ResumeError while another process has it, OutputError if another user owns it, OSError."""
    name = name_of(files[0].path)
    scratch, lock = _held(folder, name, files[0].path)
    try:
        told = _told(scratch)
        _put_back(scratch, folder, told)
        split = SplitFolder(scratch, _head(model, files), told)
        try:
            yield split
        finally:
            split.close()
    finally:
        with suppress(OSError):
            for each in scratch.names():
                if each == REPLACED:  # empty, unless a file could not be put back
                    os.rmdir(each, dir_fd=scratch.fd)
                else:
                    scratch.remove(each)
            os.rmdir(name, dir_fd=folder.fd)
        lock.close()
        scratch.close()


def name_of(first: Path) -> str:
    return f".quantkit-shards-{hashlib.sha256(os.fsencode(first.name)).hexdigest()[:16]}"


def bytes_there(first: Path) -> int:
    """Return the bytes that an earlier run left in the hidden folder, for which the next run needs no more space."""
    with suppress(OSError, OutputError), Folder.hold(first.parent / name_of(first), follow=False) as scratch:
        if scratch.info.st_uid == os.geteuid():
            infos = [scratch.look(name) for name in scratch.names()]
            return sum(info.st_blocks * 512 for info in infos if info is not None)
    return 0


def _held(folder: Folder, name: str, first: Path) -> tuple[Folder, Lock]:
    while True:
        scratch = folder.sub(name, 0o700)
        try:
            if not scratch.is_own:
                raise OutputError(
                    f"{scratch.path}: belongs to {who(scratch.info.st_uid)}, not to you; choose another place"
                )
            scratch.close_to_others()
            lock = Lock.of_folder(scratch)
        except HeldError:
            scratch.close()
            raise ResumeError(f"{first}: another quantkit is writing it; wait for it") from None
        except BaseException:
            scratch.close()
            raise
        now = folder.look(name)
        if now is not None and os.path.samestat(now, scratch.info):
            return scratch, lock
        lock.close()  # its owner finished and removed it: try again
        scratch.close()


def _head(model: ShardSet, files: Sequence[OutputFile]) -> dict[str, Any]:
    """Return the journal's head: what is made of what."""
    return {
        "quantkit": __version__,
        "inputs": [[str(path.absolute()), *facts] for path, *facts in model.inputs],
        "files": [[file.path.name, file.nbytes, journal.digest(file.header).hex()] for file in files],
    }


def _told(scratch: Folder) -> Told[dict[str, Any]] | None:
    """Read an earlier run's journal. No result depends on it, so a damaged one counts as none."""
    with suppress(ResumeError, OutputError):
        return journal.read(scratch, JOURNAL, OF, _parsed, _DAMAGED, scratch.own, alone=True)
    return None


def _parsed(said: dict[str, Any]) -> dict[str, Any]:
    head = {key: said[key] for key in ("quantkit", "inputs", "files")}
    if not all(isinstance(name, str) and journal.is_file_name(name) for name, _, _ in head["files"]):
        raise ValueError
    return head


def _put_back(scratch: Folder, folder: Folder, told: Told[dict[str, Any]] | None) -> None:
    """Undo the renames that a killed run had begun. Raises OutputError if that is impossible, OSError."""
    scratch.remove(DONE)
    if scratch.look(REPLACED) is None:
        return
    names = [name for name, _, _ in told.head["files"]] if told is not None else []
    records = told.records if told is not None else []
    take_back(
        [
            Made(temporary_of(names[r.part]), folder.path / names[r.part], r.digest)
            for r in sorted(records)
            if r.part < len(names)
        ],
        scratch,
        folder,
    )
    with scratch.sub(REPLACED) as old:
        left = old.names()
    if left:
        raise OutputError(
            f"{scratch.path / REPLACED}: holds {left[0]}, which an earlier run was about to replace, and another file "
            "has its name; move one of the two away"
        )
    os.rmdir(REPLACED, dir_fd=scratch.fd)


def take_back(made: Sequence[Made], scratch: Folder, folder: Folder) -> None:
    """Move the new files back and restore the files they replaced, the first shard last, so that new and old
    shards never look like one model. Raises OSError."""
    for each in made:
        if is_still(folder.look(each.path.name), each.known):
            folder.rename(each.path.name, scratch, each.temporary, replace=False)
    with scratch.sub(REPLACED) as old:
        for name in sorted(old.names(), reverse=True):
            with suppress(FileExistsError):
                old.rename(name, folder, name, replace=False)

"""The folder of an unfinished build: OUT.partial, beside the output.

OUT.partial/lock        held by the process at work, with its number
OUT.partial/journal     what the build is, and the rows that are on the disk for good (quantkit.journal)
OUT.partial/NAME.gguf   a file of the output: header first, full length, rows at their place as they come
OUT.partial/scratch/    of an engine; emptied
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from . import journal
from .errors import OutputError, ResumeError
from .journal import Journal


def folder_of(out: Path) -> Path:
    """The folder of an unfinished build of `out`."""
    return out.with_name(f"{out.name}.partial")


def peek(out: Path) -> Journal | None:
    """The journal of an unfinished build of `out`, if there is one. Raises ResumeError."""
    return journal.read(folder_of(out) / "journal")


def owner(out: Path) -> int | None:
    """The process that is building `out` now, 0 when it cannot be told, None when there is none."""
    try:
        fd = os.open(folder_of(out) / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        said = os.read(fd, 32).strip()
        return int(said) if said.isdigit() else 0
    finally:
        os.close(fd)
    return None


def take(out: Path, ours: Collection[str]) -> int:
    """Make the folder if it is not there, and take its lock; the descriptor that holds it. `ours` are the names of
    files of the build that may be in it. Raises ResumeError while another process has it, OutputError for a folder that
    cannot be made or is another's, and OSError."""
    folder = folder_of(out)
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as e:
            raise OutputError(f"{folder}: cannot be made: {e.strerror or e}; choose another place") from None
        _check_ours(folder, {"lock", "journal", "scratch", *ours})
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            by = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise ResumeError(
                f"{out}: is being built by process {by or 'unknown'}; wait for it, or give another output"
            ) from None
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.stat(folder / "lock")):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
        os.close(fd)  # whoever held it has finished and removed the folder: once more


def _check_ours(folder: Path, ours: set[str]) -> None:
    """Raises OutputError when what has the folder's name is another's: it would be emptied."""
    there = {path.name for path in folder.iterdir()}
    if folder.is_symlink() or (there - ours and not there & {"lock", "journal"}):
        what = "is a symbolic link" if folder.is_symlink() else f"holds '{min(there - ours)}'"
        raise OutputError(
            f"{folder}: {what} and is no unfinished build of quantkit; move it away, or give another output"
        )


def clear(folder: Path) -> None:
    """Remove everything but the lock, the journal last. Raises OSError."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "journal"):
        if path.name == "lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

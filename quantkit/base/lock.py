"""A lock between processes, on a file that names its holder, or on a folder. The kernel releases it if a process dies.

    with Folder.hold(path) as folder, Lock.of_file(folder, "lock"):
        ...                     # no other process that asks for the lock is here

On a filesystem without locks, nothing is locked and the work continues.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress

from .folders import Folder, same

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: seconds between two attempts
_PAUSE = 0.02


class HeldError(BlockingIOError):
    """Another process has the lock; `by` is its process number, 'unknown' if the lock does not tell."""

    def __init__(self, fd: int) -> None:
        said = "" if os.path.isdir(fd) else os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        self.by = said or "unknown"
        super().__init__(errno.EAGAIN, f"process {self.by} has locked it")


class Lock:
    """A lock held by this process until `close`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def of_file(cls, folder: Folder, name: str, owner: int | None = None, patience: float = 0.0) -> Lock:
        """Lock a file in a folder, creating it if needed, and waiting up to `patience` seconds. With `owner`, the file
        must be that user's, with one name, and will hold this process's number. Raises HeldError, OutputError
        for any other file, and OSError: FileNotFoundError if the folder is gone."""
        while True:
            fd = _open(folder, name, owner)
            try:
                _take(fd, patience)
                there = folder.look(name)
                if there is not None and same(os.fstat(fd), there):
                    if owner is not None:
                        os.ftruncate(fd, 0)
                        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return cls(fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its owner removed it: try again

    @classmethod
    def of_folder(cls, folder: Folder) -> Lock:
        """Lock a folder itself. Raises HeldError, OSError."""
        fd = os.dup(folder.fd)
        try:
            _take(fd, 0.0)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holder(folder: Folder, name: str) -> int | None:
    """Return the process that holds the lock on a file; 0 if unknown, None if nobody does. Raises OSError,
    OutputError."""
    fd = folder.open(name)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        by = HeldError(fd).by
        return int(by) if by.isdigit() else 0
    except OSError:
        return 0
    finally:
        os.close(fd)
    return None


def _open(folder: Folder, name: str, owner: int | None) -> int:
    while True:
        try:
            try:
                return folder.open(name, os.O_RDWR, owner=owner, alone=owner is not None)
            except PermissionError:  # another user's; locking needs no write permission
                if owner is not None:
                    raise
                return folder.open(name)
        except FileNotFoundError:
            with suppress(FileExistsError):
                return folder.create(name)


def _take(fd: int, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise HeldError(fd) from None
            time.sleep(_PAUSE)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            return None

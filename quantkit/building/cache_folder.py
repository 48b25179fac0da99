"""The folder of a cache on disk (content: quantkit.building.cache), which several users may share deliberately.

Existing files are never written to: every file is new, and gets its name by rename. Only regular files are read, and
their content is checked. Which owners are trusted depends on who may write to the folder: if its owner shares it with a
group, everyone in that group; if it is open to all, only the user, root and the folder's owner. Folders and files get
their permissions from the umask; in a cache that is group-writable, new folders are too.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..base.errors import OutputError
from ..base.files import NewFile
from ..base.folders import Folder, kind, who
from ..base.lock import HeldError, Lock

_SUBS = ("objects", "sources", "tmp")
_SHELF, _KEY = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{64}")
#: age in seconds at which an unfinished file of a vanished process is removed
_STALE = 86_400
#: seconds to wait for another process that removes entries
_PATIENCE = 10.0


def _no_cache(path: Path) -> str:
    return f"{path}: is no folder of `quantkit build --cache`"


class CacheFolder:
    """The folder (see the module). With `make` it is created if it does not exist. Raises OutputError if it cannot be
    used."""

    def __init__(self, path: Path, make: bool) -> None:
        self.path = path
        self._held: list[Folder] = []
        try:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            self.folder = self._keep_open(Folder.hold(path))
            self._check_owner()
            self.objects, self.sources, self.tmp = (self._keep_open(self._sub(name, make)) for name in _SUBS)
        except OSError as e:
            self.close()
            if not make and e.errno in (errno.ENOENT, errno.ENOTDIR):
                raise OutputError(_no_cache(path)) from None
            what = "no cache can be made there" if make else "cannot be read"
            raise OutputError(f"{path}: {what}: {e.strerror or e}") from None
        except BaseException:
            self.close()
            raise

    def _keep_open(self, folder: Folder) -> Folder:
        self._held.append(folder)
        return folder

    def close(self) -> None:
        for folder in self._held:
            folder.close()

    def __del__(self) -> None:
        self.close()

    def _check_owner(self) -> None:
        """Raise OutputError for another user's folder in a place where anyone could have made it, such as /tmp."""
        above = os.stat(self.path.resolve().parent)
        by = self.folder.info.st_uid
        if above.st_mode & stat.S_IWOTH and by not in (0, os.geteuid()) and not self.folder.is_own:
            raise OutputError(
                f"{self.path}: belongs to {who(by)}, in a folder where all may make files; give a cache of your own"
            )

    def _sub(self, name: str, make: bool) -> Folder:
        info = self.folder.look(name)
        if info is not None and not stat.S_ISDIR(info.st_mode):
            raise OutputError(f"{self.path / name}: is {kind(info)}, where a cache has a folder; move it away")
        if info is None and not make:
            raise OutputError(_no_cache(self.path))
        found = self.shelf(self.folder, name) if make else self.folder.sub(name)
        if not self.is_believed(found.info):
            by = found.info.st_uid
            found.close()
            raise OutputError(
                f"{self.path / name}: belongs to {who(by)}, and all may write to {self.path}; have it closed to them "
                "(chmod o-w), or give a cache of your own"
            )
        return found

    def shelf(self, above: Folder, name: str) -> Folder:
        """Open a folder in one of the cache's folders, or make it. Raises OSError."""
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=above.fd)
            made = above.sub(name)
            shared = self.folder.info.st_mode & stat.S_IRWXG
            if shared & stat.S_IWGRP:
                with suppress(OSError):
                    os.fchmod(made.fd, stat.S_IMODE(made.info.st_mode) | shared)
            return made
        return above.sub(name)

    def is_believed(self, info: os.stat_result) -> bool:
        """Whether a file's owner is trusted to have made its content by a build."""
        if not (self.folder.is_open_to_all or any(f.is_open_to_all for f in self._held)):
            return True
        return info.st_uid in (0, os.geteuid(), self.folder.info.st_uid, self.folder.own)

    def require_believed(self, fd: int, path: Path) -> None:
        """Raise OutputError if a file's owner is not trusted."""
        info = os.fstat(fd)
        if not self.is_believed(info):
            raise OutputError(
                f"{path}: belongs to {who(info.st_uid)}, and all may write to {self.path}; it is not used"
            )

    # ------------------------------------------------------------ entries

    def path_of(self, key: str) -> Path:
        return self.objects.path / key[:2] / key

    def open_entry(self, key: str) -> int | None:
        """Open an entry for reading; None if there is none. Raises OSError, OutputError."""
        try:
            with self.objects.sub(key[:2]) as shelf:
                fd = shelf.open(key)
        except FileNotFoundError:
            return None
        try:
            self.require_believed(fd, self.path_of(key))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def has(self, key: str) -> bool:
        """Whether a file for that key exists. Raises OSError."""
        try:
            with self.objects.sub(key[:2]) as shelf:
                info = shelf.look(key)
        except FileNotFoundError:
            return False
        return info is not None and stat.S_ISREG(info.st_mode)

    def drop(self, key: str) -> None:
        """Remove an entry. Raises OSError."""
        with self.objects.sub(key[:2]) as shelf:
            shelf.unlink(key)

    def entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each entry, least recently used first."""
        out = []
        for name in self.objects.names():
            if not _SHELF.fullmatch(name):
                continue
            with suppress(OSError), self.objects.sub(name) as shelf:
                for key in shelf.names():
                    info = shelf.look(key) if _KEY.fullmatch(key) and key[:2] == name else None
                    if info is not None and stat.S_ISREG(info.st_mode):
                        out.append((info.st_mtime, info.st_size, shelf.path / key))
        return sorted(out)

    def evict(self, max_bytes: int) -> int:
        """Remove the least recently used entries until at most `max_bytes` are left; returns how many are. Raises
        OSError, OutputError."""
        with self._locked():
            entries = self.entries()
            total = sum(n for _, n, _ in entries)
            for _, n, path in entries:
                if total <= max_bytes:
                    break
                with suppress(FileNotFoundError):
                    self.drop(path.name)
                total -= n
            for name in self.tmp.names():
                with suppress(OSError):
                    info = self.tmp.look(name)
                    if info is not None and time.time() - info.st_mtime > _STALE:
                        self.tmp.unlink(name)
            return total

    # ------------------------------------------------------------ making files

    def made(self) -> NewFile:
        """Create a file in tmp/, which is removed at the end unless it was given another name. Raises OSError."""
        try:
            return NewFile(self.tmp, f"new-{secrets.token_hex(8)}")
        except OSError as e:
            whose = f", the folder is {who(self.tmp.info.st_uid)}'s" if isinstance(e, PermissionError) else ""
            raise OSError(e.errno, f"{e.strerror}{whose}", str(self.tmp.path)) from None

    def put(self, new: NewFile, key: str) -> None:
        """Give a file from `made` the name of an entry. Raises OSError, OutputError."""
        with self.shelf(self.objects, key[:2]) as shelf:
            new.publish(shelf, key, durable=False)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock against others who remove entries. Raises OSError, OutputError."""
        try:
            lock = Lock.of_file(self.folder, "lock", patience=_PATIENCE)
        except HeldError:
            raise OutputError(
                f"{self.path / 'lock'}: has been held by another process for {_PATIENCE:.0f} seconds; nothing was "
                "removed"
            ) from None
        with lock:
            yield

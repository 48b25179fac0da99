"""The folder of a cache on disk (quantkit.building.cache says what is in it), which several users may share on purpose.

Nothing in it is written through: what is made is a new file, which gets its name by rename. What is read is a regular
file, and what it says is checked. Whose it may be goes by who may write there: in a folder that its owner shares with
a group anyone's of that group, in one that is open to all only one's own, root's and the owner's. Folders and files get
their permissions by the umask; in a cache that its group may write to, folders that are made in it are so too.
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
#: an unfinished file of a process that is gone is removed after so many seconds
_STALE = 86_400
#: so long is waited for another process that removes entries
_PATIENCE = 10.0


def _no_cache(path: Path) -> str:
    return f"{path}: is no folder of `quantkit build --cache`"


class CacheFolder:
    """See the module. With `make` it is made where it is not there. Raises OutputError, which says why it cannot be
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
        """Raises OutputError for a folder of another user where anyone could have made it, such as in /tmp."""
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
        """A folder in one of the cache's, made where it is not there. Raises OSError."""
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
        """Whether what a file says may be taken for what a build of somebody trusted has made."""
        if not (self.folder.is_open_to_all or any(f.is_open_to_all for f in self._held)):
            return True
        return info.st_uid in (0, os.geteuid(), self.folder.info.st_uid, self.folder.own)

    def require_believed(self, fd: int, path: Path) -> None:
        """Raises OutputError."""
        info = os.fstat(fd)
        if not self.is_believed(info):
            raise OutputError(
                f"{path}: belongs to {who(info.st_uid)}, and all may write to {self.path}; it is not used"
            )

    # ------------------------------------------------------------ entries

    def path_of(self, key: str) -> Path:
        return self.objects.path / key[:2] / key

    def open_entry(self, key: str) -> int | None:
        """An entry for reading, None where there is none. Raises OSError, OutputError."""
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
        """Whether there is a file of that key. Raises OSError."""
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
        """When each was used last, its bytes, its path; the longest unused first."""
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
        """Remove what was not used longest until no more bytes are left; how many are. Raises OSError, OutputError."""
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
        """A new file in tmp/, removed in the end unless it has been given another name. Raises OSError."""
        try:
            return NewFile(self.tmp, f"new-{secrets.token_hex(8)}")
        except OSError as e:
            whose = f", the folder is {who(self.tmp.info.st_uid)}'s" if isinstance(e, PermissionError) else ""
            raise OSError(e.errno, f"{e.strerror}{whose}", str(self.tmp.path)) from None

    def put(self, new: NewFile, key: str) -> None:
        """Give a file of `made` the name of an entry. Raises OSError, OutputError."""
        with self.shelf(self.objects, key[:2]) as shelf:
            new.publish(shelf, key, durable=False)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Held against others who remove entries. Raises OSError, OutputError."""
        try:
            lock = Lock.of_file(self.folder, "lock", patience=_PATIENCE)
        except HeldError:
            raise OutputError(
                f"{self.path / 'lock'}: has been held by another process for {_PATIENCE:.0f} seconds; nothing was "
                "removed"
            ) from None
        with lock:
            yield

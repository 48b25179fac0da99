"""Folders that others may be able to write to, held open by a descriptor.

Whatever is opened, made, renamed or removed in such a folder is reached through the descriptor, so that the folder
stays the same one whatever gets its name, and no link in it is followed. What somebody may have put there is looked at
before it is used: a file must be a regular one (a FIFO would be waited for, a device would answer), where it
matters one of our own, and with one name only where it is written to: another name, a hard link, is another's file.
Before a file gets its final name, the name that it has is compared with what was written, by device and inode.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType

from .errors import OutputError

_CLOSED = os.O_CLOEXEC | os.O_NOFOLLOW
_MAX_DEPTH = 64
#: of Linux: fail where the new name is taken
_RENAME_NOREPLACE = 1
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISREG, "a file"),
)  # fmt: skip


def kind(info: os.stat_result) -> str:
    """What a thing is, in words."""
    return next((words for test, words in _KINDS if test(info.st_mode)), "no regular file")


def who(uid: int) -> str:
    """A user, in words."""
    import pwd

    with suppress(KeyError):
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    return f"user {uid}"


def same(a: os.stat_result, b: os.stat_result) -> bool:
    """Whether both are one file."""
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


class Folder:
    """A folder, held open. `path` is what messages call it."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    @classmethod
    def hold(cls, path: Path, follow: bool = True) -> Folder:
        """A folder by its name. A link in its last part is followed only with `follow`, and not where anyone may have
        put it: one of another user, in a folder like /tmp that all may write to. Raises OSError, OutputError."""
        if follow:
            _check_link(path)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        return cls(os.open(path, flags), path)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------ whose it is

    @property
    def info(self) -> os.stat_result:
        return os.fstat(self.fd)

    @cached_property
    def own(self) -> int:
        """The user whose files are ours here: us, but on some filesystems (a network's that takes root for nobody, one
        with a single user for all) the one that the files have which we make."""
        if self.info.st_uid == os.geteuid():
            return os.geteuid()
        name = f".quantkit-{secrets.token_hex(8)}"
        try:
            fd = self.create(name, 0o600)
        except OSError:
            return os.geteuid()
        try:
            return os.fstat(fd).st_uid
        finally:
            os.close(fd)
            with suppress(OSError):
                self.unlink(name)

    @property
    def is_own(self) -> bool:
        return self.info.st_uid == self.own

    @property
    def is_open_to_all(self) -> bool:
        """Whether any user may make files in it."""
        return bool(self.info.st_mode & stat.S_IWOTH)

    def close_to_others(self) -> None:
        """Take from all others the permission to write in it, where it is ours and the filesystem has permissions."""
        mode = stat.S_IMODE(self.info.st_mode)
        if mode & 0o022:
            with suppress(OSError):
                os.fchmod(self.fd, mode & ~0o022)

    def is_still(self, path: Path) -> bool:
        """Whether this folder has that name."""
        try:
            return same(os.stat(path, follow_symlinks=False), self.info)
        except OSError:
            return False

    def for_a_program(self) -> Path:
        """A name for another program, which must inherit `fd`: the folder's own, but one by its descriptor where
        others could give its own name to another folder meanwhile."""
        ours = (0, os.geteuid(), self.own)
        for folder in self.path.absolute().parents:
            above = os.stat(folder)
            if above.st_uid not in ours or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
                return Path(f"/proc/self/fd/{self.fd}")
        return self.path

    # ------------------------------------------------------------ what is in it

    def names(self) -> list[str]:
        return os.listdir(self.fd)

    def look(self, name: str) -> os.stat_result | None:
        """What has a name, links not followed; None where nothing has. Raises OSError."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int = os.O_RDONLY, *, owner: int | None = None, alone: bool = False) -> int:
        """Open a regular file that is there: of user `owner` if given, `alone`: without another name. Raises OSError
        (FileNotFoundError), and OutputError for anything else."""
        self.check(name, os.stat(name, dir_fd=self.fd, follow_symlinks=False), owner, alone)
        fd = os.open(name, flags | _CLOSED | os.O_NONBLOCK, dir_fd=self.fd)
        try:
            self.check(name, os.fstat(fd), owner, alone)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check(self, name: str, info: os.stat_result, owner: int | None = None, alone: bool = False) -> None:
        """Raises OutputError unless that is a regular file, of the owner, with one name."""
        path = self.path / name
        if not stat.S_ISREG(info.st_mode):
            raise OutputError(f"{path}: is {kind(info)}, not a file that quantkit made; move it away and try again")
        if owner is not None and info.st_uid != owner:
            raise OutputError(f"{path}: belongs to {who(info.st_uid)}, not to you; move it away and try again")
        if alone and info.st_nlink > 1:
            raise OutputError(
                f"{path}: is a hard link, one of {info.st_nlink} names of a file, which writing would change; move it "
                "away and try again"
            )

    def create(self, name: str, mode: int = 0o666) -> int:
        """A new file, open for reading and writing. Raises OSError (FileExistsError)."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSED, mode, dir_fd=self.fd)

    def sub(self, name: str, mode: int | None = None) -> Folder:
        """A folder in this one, made where it is not there and `mode` is given. Raises OSError (NotADirectoryError for
        a link too)."""
        if mode is not None:
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=self.fd)
        flags = os.O_RDONLY | os.O_DIRECTORY | _CLOSED
        return Folder(os.open(name, flags, dir_fd=self.fd), self.path / name)

    @contextmanager
    def at(self, name: str, make: bool = False) -> Iterator[tuple[Folder, str]]:
        """The folder that holds `name`, a relative path with slashes, and its last part; folders between are made on
        request. Raises OSError."""
        *above, last = name.split("/")
        held: list[Folder] = []
        try:
            for part in above:
                held.append((held[-1] if held else self).sub(part, 0o777 if make else None))
            yield held[-1] if held else self, last
        finally:
            for folder in held:
                folder.close()

    # ------------------------------------------------------------ changing it

    def give_name(self, name: str, fd: int, to: Folder, new: str, replace: bool = True) -> None:
        """Rename a file to what it is called in the end: `fd` is what was written, and it is what gets the name.
        Raises OSError (FileExistsError where something has the new name, unless `replace`), OutputError."""
        self.require_same(name, fd)
        self.rename(name, to, new, replace)
        to.require_same(new, fd)

    def rename(self, name: str, to: Folder, new: str, replace: bool = True) -> None:
        """Give a file in this folder another name, in this one or another. Without `replace` nothing is replaced, and
        where the system can, that is one step. Raises OSError (FileExistsError)."""
        give = os.replace if replace else rename_to_new
        give(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def require_same(self, name: str, fd: int) -> None:
        """Raises OutputError unless an open file has that name."""
        info = self.look(name)
        if info is None or not same(info, os.fstat(fd)):
            what = "is gone" if info is None else f"is {kind(info)} that somebody else put there"
            raise OutputError(
                f"{self.path / name}: {what} while quantkit was writing it; nothing was taken from it: find out who "
                "writes there, and try again"
            )

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def remove(self, name: str, depth: int = 0) -> None:
        """Remove a file, a link (not what it points to), or a folder with all that is in it. Raises OSError."""
        info = self.look(name)
        if info is None:
            return
        if not stat.S_ISDIR(info.st_mode):
            self.unlink(name)
            return
        if depth > _MAX_DEPTH:
            raise OSError(errno.ENOTEMPTY, f"more than {_MAX_DEPTH} folders in each other", str(self.path / name))
        with self.sub(name) as inner:
            for each in inner.names():
                inner.remove(each, depth + 1)
        os.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Put the names in it on the disk. Raises OSError."""
        os.fsync(self.fd)


def rename_to_new(name: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """os.rename, but where something has the new name: then FileExistsError. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(src_dir_fd, os.fsencode(name), dst_dir_fd, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # which say that the filesystem or the kernel cannot
            raise OSError(code, os.strerror(code), new)
    with suppress(FileNotFoundError):
        os.stat(new, dir_fd=dst_dir_fd, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def _check_link(path: Path) -> None:
    """Raises OutputError for a link of another user in a folder that all may write to, as Linux's
    protected_symlinks has it."""
    info = os.stat(path, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        return
    above = os.stat(path.absolute().parent)
    if above.st_mode & stat.S_IWOTH and info.st_uid not in (0, os.geteuid(), above.st_uid):
        raise OutputError(
            f"{path}: is a symbolic link of {who(info.st_uid)}, in a folder that all may write to; give the folder "
            "itself, or another"
        )

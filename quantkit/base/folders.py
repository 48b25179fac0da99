"""Folders that others may be able to write to, held open by a descriptor.

Everything opened, created, renamed or removed in such a folder goes through the descriptor, so the folder
stays the same even if another one gets its name, and no link in it is followed. What others may have put there is
checked before use: a file must be a regular one (a FIFO would block, a device would answer) and, where it matters, our
own. A file to be written to must have only one name: another one, a hard link, may belong to somebody else.
Before a file gets its final name, the file under its current name is compared with what was written (device and inode).
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
#: a flag of Linux's renameat2: fail if the new name is taken
_RENAME_NOREPLACE = 1
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISREG, "a file"),
)  # fmt: skip


def kind(info: os.stat_result) -> str:
    """Return in words what kind of thing this is."""
    return next((words for test, words in _KINDS if test(info.st_mode)), "no regular file")


def who(uid: int) -> str:
    """Return a user's name and number, for messages."""
    import pwd

    with suppress(KeyError):
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    return f"user {uid}"


def same(a: os.stat_result, b: os.stat_result) -> bool:
    """Whether both are the same file."""
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


class Folder:
    """A folder, held open. `path` is its name in messages."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    @classmethod
    def hold(cls, path: Path, follow: bool = True) -> Folder:
        """Open a folder by name. A link in the last part is followed only with `follow`, and never if anyone could have
        put it there: another user's, in a folder such as /tmp that all may write to. Raises OSError, OutputError."""
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
        """The user id that our files have here: usually our own, but on some filesystems (a network's that maps root to
        nobody, one with a single user for all) the one given to the files that we create."""
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
        """Whether any user may create files in it."""
        return bool(self.info.st_mode & stat.S_IWOTH)

    def close_to_others(self) -> None:
        """Remove all others' write permission, if the folder is ours and the filesystem has permissions."""
        mode = stat.S_IMODE(self.info.st_mode)
        if mode & 0o022:
            with suppress(OSError):
                os.fchmod(self.fd, mode & ~0o022)

    def is_still(self, path: Path) -> bool:
        """Whether this folder still has that path."""
        try:
            return same(os.stat(path, follow_symlinks=False), self.info)
        except OSError:
            return False

    def for_a_program(self) -> Path:
        """Return a path for another program, which must inherit `fd`: normally the folder's own, but a path by the
        descriptor if others could give the folder's path to another folder meanwhile."""
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
        """Return the stat of a name, without following links; None if there is nothing. Raises OSError."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int = os.O_RDONLY, *, owner: int | None = None, alone: bool = False) -> int:
        """Open an existing regular file: `owner` must own it, if given; with `alone` it must have no other name.
        Raises OSError (FileNotFoundError), and OutputError for anything else."""
        self.check(name, os.stat(name, dir_fd=self.fd, follow_symlinks=False), owner, alone)
        fd = os.open(name, flags | _CLOSED | os.O_NONBLOCK, dir_fd=self.fd)
        try:
            self.check(name, os.fstat(fd), owner, alone)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check(self, name: str, info: os.stat_result, owner: int | None = None, alone: bool = False) -> None:
        """Raise OutputError unless this is a regular file, of the owner if given, with `alone` under one name only."""
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
        """Create a file, open for reading and writing. Raises OSError (FileExistsError)."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSED, mode, dir_fd=self.fd)

    def sub(self, name: str, mode: int | None = None) -> Folder:
        """Open a folder in this one; create it if it does not exist and `mode` is given. Raises OSError
        (NotADirectoryError also for a link)."""
        if mode is not None:
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=self.fd)
        flags = os.O_RDONLY | os.O_DIRECTORY | _CLOSED
        return Folder(os.open(name, flags, dir_fd=self.fd), self.path / name)

    @contextmanager
    def at(self, name: str, make: bool = False) -> Iterator[tuple[Folder, str]]:
        """Yield the folder that holds `name`, a relative path with slashes, and its last part; with `make`, missing
        folders on the way are created. Raises OSError."""
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
        """Give a file its final name, checking before and after that it is the file written as `fd`.
        Raises OSError (FileExistsError if the new name is taken, unless `replace`), OutputError."""
        self.require_same(name, fd)
        self.rename(name, to, new, replace)
        to.require_same(new, fd)

    def rename(self, name: str, to: Folder, new: str, replace: bool = True) -> None:
        """Rename a file in this folder, perhaps into another. Without `replace` nothing is replaced; where the system
        supports it, check and rename are one step. Raises OSError (FileExistsError)."""
        give = os.replace if replace else rename_to_new
        give(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def require_same(self, name: str, fd: int) -> None:
        """Raise OutputError unless the name belongs to this open file."""
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
        """Remove a file, a link (not its target), or a folder with everything in it. Raises OSError."""
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
        """Sync the folder's names to disk. Raises OSError."""
        os.fsync(self.fd)


def rename_to_new(name: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Rename like os.rename, but raise FileExistsError if the new name is taken. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(src_dir_fd, os.fsencode(name), dst_dir_fd, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # these mean that the filesystem or kernel does not support it
            raise OSError(code, os.strerror(code), new)
    with suppress(FileNotFoundError):
        os.stat(new, dir_fd=dst_dir_fd, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def _check_link(path: Path) -> None:
    """Raise OutputError for another user's link in a folder that all may write to, like Linux's
    protected_symlinks."""
    info = os.stat(path, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        return
    above = os.stat(path.absolute().parent)
    if above.st_mode & stat.S_IWOTH and info.st_uid not in (0, os.geteuid(), above.st_uid):
        raise OutputError(
            f"{path}: is a symbolic link of {who(info.st_uid)}, in a folder that all may write to; give the folder "
            "itself, or another"
        )

"""Files as a build needs them: reserved, written at an offset, on the disk when that is said, and under their names
only when they are whole; small texts, read to a limit."""

from __future__ import annotations

import codecs
import ctypes
import errno
import hashlib
import io
import os
import stat
from contextlib import suppress
from pathlib import Path

from .first_bytes import ENOUGH, not_the_file
from .folders import Folder


def create(folder: Folder, name: str, header: bytes, nbytes: int) -> int:
    """A new file with its header and its full length, on the disk; the space is reserved where the filesystem can.
    Returns its descriptor, for reading and writing. Raises OSError."""
    fd = folder.create(name)
    try:
        reserve(fd, nbytes)
        os.ftruncate(fd, nbytes)
        write_at(fd, header, 0)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


class NewFile:
    """A file that is made under another name, and gets its own when it is whole: a reader there finds what was
    there before, or all of the new one. It is gone when the block ends, unless `publish` was called.

        with NewFile(folder, ".config.json.new") as new:
            write_at(new.fd, data, 0)
            new.publish(folder, "config.json")
    """

    def __init__(self, folder: Folder, temporary: str) -> None:
        """A file in a folder, in place of a leftover of the temporary name; a link is removed, not followed. `fd` is
        for reading and writing. Raises OSError."""
        self.folder, self.temporary = folder, temporary
        info = folder.look(temporary)
        if info is not None and not stat.S_ISDIR(info.st_mode):
            folder.unlink(temporary)
        self.fd = folder.create(temporary)
        self._has_name = False

    def publish(self, to: Folder, name: str, replace: bool = True, durable: bool = True) -> None:
        """Give it its name, in this folder or another; `durable`: when its bytes are on the disk, and so that the name
        is too. Raises OSError (FileExistsError where something has the name, unless `replace`), and OutputError where
        another file has the temporary name by now."""
        if durable:
            os.fsync(self.fd)
        self.folder.give_name(self.temporary, self.fd, to, name, replace)
        self._has_name = True
        if durable:
            to.sync()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            if not self._has_name:
                with suppress(FileNotFoundError):
                    self.folder.unlink(self.temporary)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reserve(fd: int, nbytes: int) -> None:
    """Reserve the space, where the filesystem can. Not os.posix_fallocate: where it cannot, the C
    library writes to every block instead, which for a model takes longer than building it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    done = libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
    if done != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {nbytes:,} bytes cannot be reserved")


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it. Raises OSError."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """So many bytes, or those up to the file's end. Raises OSError."""
    out = bytearray()
    while len(out) < nbytes:
        got = os.pread(fd, nbytes - len(out), offset + len(out))
        if not got:
            break
        out += got
    return bytes(out)


def special(mode: int) -> str | None:
    """What an `st_mode` is of that is neither a file nor a directory: 'a FIFO', 'a socket', 'a device'; else None."""
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file. Raises OSError, and at once for a pipe, which might never be written to."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    what = special(os.fstat(fd).st_mode)
    if what is not None:
        os.close(fd)
        raise OSError(errno.EINVAL, f"it is {what}, not a regular file")
    return fd


#: byte-order marks and what they stand for; UTF-32's little-endian one begins as UTF-16's does
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_within(path: Path, most: int) -> str | None:
    """A small regular file's text, None where there are more than `most` bytes. UTF-8, or what a byte-order mark says,
    which is no part of the text. Raises OSError, for what is a pointer or a page in its place too, and
    UnicodeDecodeError."""
    if "\0" in str(path):  # which open() does not call an OSError
        raise OSError(errno.EINVAL, "a name cannot hold a NUL")
    with open(open_regular(path), "rb") as f:
        data = f.read(most + 1)
    if says := not_the_file(data[:ENOUGH]):
        raise OSError(errno.EINVAL, f"it {says}")
    if len(data) > most:
        return None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    text = data.decode(encoding)
    if "\0" in text:
        at = data.index(0)
        raise UnicodeDecodeError("utf-8", data, at, at + 1, "a NUL, as in a binary file or UTF-16 without a mark")
    return io.StringIO(text, None).getvalue()  # \r\n as \n


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, 64 hex digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()

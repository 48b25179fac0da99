"""Files for builds: space reserved, written at offsets, synced when needed, and renamed to their final names once
complete; also reading small texts up to a limit."""

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
    """Create a file with its header and its full length, synced to disk; space is reserved if the filesystem can.
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
    """A file written under a temporary name and renamed once it is complete: readers see either the old file or all
    of the new one. It is deleted when the block ends, unless `publish` was called.

        with NewFile(folder, ".config.json.new") as new:
            write_at(new.fd, data, 0)
            new.publish(folder, "config.json")
    """

    def __init__(self, folder: Folder, temporary: str) -> None:
        """Create the file in a folder, replacing a leftover with the temporary name; a link is removed, not followed.
        `fd` is for reading and writing. Raises OSError."""
        self.folder, self.temporary = folder, temporary
        info = folder.look(temporary)
        if info is not None and not stat.S_ISDIR(info.st_mode):
            folder.unlink(temporary)
        self.fd = folder.create(temporary)
        self._has_name = False

    def publish(self, to: Folder, name: str, replace: bool = True, durable: bool = True) -> None:
        """Give the file its name, in this folder or another. `durable`: sync its bytes before and the name afterwards.
        Raises OSError (FileExistsError if the name is taken, unless `replace`), and OutputError if the temporary name
        belongs to another file by now."""
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
    """Reserve the space, if the filesystem can. Not by os.posix_fallocate: if the filesystem cannot, the C
    library writes to every block instead, which for a model takes longer than building it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    done = libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
    if done != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {nbytes:,} bytes cannot be reserved")


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all the data. Raises OSError."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """Read `nbytes` bytes, or fewer if the file ends before. Raises OSError."""
    out = bytearray()
    while len(out) < nbytes:
        got = os.pread(fd, nbytes - len(out), offset + len(out))
        if not got:
            break
        out += got
    return bytes(out)


def special(mode: int) -> str | None:
    """Return 'a FIFO', 'a socket' or 'a device' for such an `st_mode`, else None."""
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


def open_regular(path: Path) -> int:
    """Open a regular file for reading. Raises OSError, also for a pipe, without waiting for a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    what = special(os.fstat(fd).st_mode)
    if what is not None:
        os.close(fd)
        raise OSError(errno.EINVAL, f"it is {what}, not a regular file")
    return fd


#: byte-order marks and their encodings; UTF-32's little-endian mark begins with UTF-16's, so it comes first
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_within(path: Path, most: int) -> str | None:
    """Return a small regular file's text, or None if it has more than `most` bytes. The encoding is UTF-8, or the one
    of the byte-order mark, which is dropped. Raises OSError, also for a Git LFS pointer or a web page, and
    UnicodeDecodeError."""
    if "\0" in str(path):  # for this, open() raises no OSError
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
    """Return the SHA-256 of a file's content, 64 hex digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()

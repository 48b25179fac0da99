"""Files as a build needs them: reserved, written at an offset, and on the disk when that is said; small texts, read
to a limit."""

from __future__ import annotations

import ctypes
import errno
import io
import os
from pathlib import Path

from .first_bytes import ENOUGH, not_the_file


def create(path: Path, header: bytes, nbytes: int) -> None:
    """A new file with its header and its full length, on the disk; the space is reserved where the filesystem can.
    Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _reserve(fd, nbytes)
        os.ftruncate(fd, nbytes)
        write_at(fd, header, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    """Reserve the space, where the filesystem can. Not os.posix_fallocate: where it cannot, the C
    library writes to every block instead, which for a model takes longer than building it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    done = libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
    if done != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {nbytes:,} bytes cannot be reserved")


def sync(path: Path) -> None:
    """Put a file's bytes, or the names in a folder, on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def text_within(path: Path, most: int) -> str | None:
    """A small file's UTF-8 text, None where there are more than `most` bytes: not even a device without an end is read
    further. Raises OSError, for what is a pointer or a page in its place too, and UnicodeDecodeError."""
    with open(path, "rb") as f:
        data = f.read(most + 1)
    if says := not_the_file(data[:ENOUGH]):
        raise OSError(errno.EINVAL, f"it {says}")
    return None if len(data) > most else io.StringIO(data.decode("utf-8"), None).getvalue()  # \r\n as \n

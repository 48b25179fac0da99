"""Copy byte ranges from file to file, in the kernel where possible.

First a reflink (FICLONERANGE), which shares blocks and moves nothing. It needs a filesystem that supports it
(Btrfs, XFS), and offsets that are equal modulo its block size. The rest goes by copy_file_range, else by
sendfile, else through a small buffer. All work is done in bounded pieces, so memory is constant, progress
shows, and an interrupt takes effect soon.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .errors import OutputError, SourceError

#: most bytes per call, and so between two progress reports or checks for an interrupt
CHUNK = 1 << 23
_BUFFER = 1 << 20
_FICLONERANGE = 0x4020940D
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})

Progress = Callable[[int], None]


class Opened(NamedTuple):
    """An open file, and the path that messages use for it."""

    fd: int
    path: Path


def copy_range(
    src: Opened, src_offset: int, dst: Opened, dst_offset: int, nbytes: int, progress: Progress | None = None
) -> str:
    """Copy `nbytes` bytes. Returns how most were copied: "reflink", "copy_file_range", "sendfile" or "read+write".

    `dst` is open for writing, not for appending; its file position may move. `progress` gets the
    number of bytes of each piece. Raises SourceError if the source ends early or cannot be read, OutputError if the
    target has no space or cannot be written; both name the file, the offset and the bytes.
    """
    moved: dict[str, int] = {}
    for start, n, whole_blocks in pieces(src_offset, dst_offset, nbytes, os.fstat(dst.fd).st_blksize):
        at, to = src_offset + start, dst_offset + start
        if whole_blocks and _clone(src.fd, at, dst.fd, to, n):
            way = "reflink"
            if progress is not None:
                progress(n)
        else:
            way = _copy(src, at, dst, to, n, progress)
        moved[way] = moved.get(way, 0) + n
    return max(moved, key=lambda way: moved[way], default="copy_file_range")


def pieces(src_offset: int, dst_offset: int, nbytes: int, block: int) -> list[tuple[int, int, bool]]:
    """Cut a range into (start, bytes, whether these are whole blocks at both offsets): only whole blocks can be
    reflinked. There is only one piece if the offsets differ modulo the block size."""
    before = -src_offset % block
    inside = max(nbytes - before, 0) // block * block
    if (src_offset - dst_offset) % block or not inside:
        return [(0, nbytes, False)] if nbytes else []
    after = nbytes - before - inside
    cut = [(0, before, False), (before, inside, True), (before + inside, after, False)]
    return [piece for piece in cut if piece[1]]


def _clone(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, nbytes: int) -> bool:
    """Try to reflink the range; return whether it worked. A refusal is no error: copying will report real faults."""
    import fcntl

    try:
        fcntl.ioctl(dst_fd, _FICLONERANGE, struct.pack("=qQQQ", src_fd, src_offset, nbytes, dst_offset))
    except OSError:
        return False
    return True


def _copy(src: Opened, src_offset: int, dst: Opened, dst_offset: int, nbytes: int, progress: Progress | None) -> str:
    """Copy in the first way that works here. If a call fails or copies nothing, the next way continues;
    the last one can tell which of the two files is at fault."""
    done = 0
    for way, call in _IN_KERNEL.items():
        while done < nbytes:
            try:
                got = call(src.fd, src_offset + done, dst.fd, dst_offset + done, min(CHUNK, nbytes - done))
            except OSError as e:
                if e.errno in _FULL:
                    raise _unwritable(dst, dst_offset + done, nbytes - done, e) from None
                break
            if got == 0:
                break
            done += got
            if progress is not None:
                progress(got)
        if done == nbytes:
            return way
    buffer = memoryview(bytearray(min(_BUFFER, nbytes - done)))
    while done < nbytes:
        left = nbytes - done
        got = _read(src, src_offset + done, buffer[:left], left)
        _write(dst, dst_offset + done, buffer[:got], left)
        done += got
        if progress is not None:
            progress(got)
    return "read+write"


def _copy_file_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, n: int) -> int:
    return os.copy_file_range(src_fd, dst_fd, n, src_offset, dst_offset) if hasattr(os, "copy_file_range") else 0


def _sendfile(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, n: int) -> int:
    os.lseek(dst_fd, dst_offset, os.SEEK_SET)
    return os.sendfile(dst_fd, src_fd, src_offset, n)


_IN_KERNEL = {"copy_file_range": _copy_file_range, "sendfile": _sendfile}


def _read(src: Opened, offset: int, buffer: memoryview, left: int) -> int:
    """Fill at least one byte of the buffer; return how many. `left`: bytes of the range still to come."""
    try:
        got = os.preadv(src.fd, [buffer], offset)
    except OSError as e:
        raise SourceError(
            f"{src.path}: reading {left:,} bytes at {offset:,} failed: {e.strerror or e}; get the file again"
        ) from None
    if got == 0:
        raise SourceError(
            f"{src.path}: ends at {offset:,}, where {left:,} more bytes should follow; it is truncated or was "
            "changed meanwhile: get it again"
        )
    return got


def _write(dst: Opened, offset: int, data: memoryview, left: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(dst.fd, data[done:], offset + done)
        except OSError as e:
            raise _unwritable(dst, offset + done, left - done, e) from None


def _unwritable(dst: Opened, offset: int, left: int, e: OSError) -> OutputError:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = f"; free {left:,} bytes or more, or choose another place" if full else ""
    return OutputError(f"{dst.path}: writing {left:,} bytes at {offset:,} failed: {e.strerror or e}{hint}")


def write_at(dst: Opened, offset: int, data: bytes) -> None:
    """Write all bytes at an offset. Raises OutputError as `copy_range` does."""
    _write(dst, offset, memoryview(data), len(data))

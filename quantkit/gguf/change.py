"""Change one value in a GGUF's header: in place if its length stays the same, or in a copy of the file. The tensors'
bytes do not change."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ..base.copying import Opened, Progress, copy_range, write_at
from ..base.errors import InternalCheckError, OutputError, SourceError
from ..base.outputs import making
from .header import I32, KV, U32, Header, header_bytes, kv, read_header, read_header_of, string_bytes

#: integer types of four bytes
_OF_FOUR = (U32, I32)


def place_of(header: Header, key: str) -> int | None:
    """Return where the value of a key begins in the file; None if there is no such key."""
    at = 24  # magic, version, two counts
    for item in header.kvs:
        at += len(string_bytes(item.key)) + 4
        if item.key == key:
            return at
        at += len(item.payload)
    return None


def fits_in_place(header: Header, key: str) -> bool:
    """Whether the key's value can be replaced in place by a 32-bit number."""
    return any(item.key == key and item.type in _OF_FOUR for item in header.kvs)


def set_in_place(path: Path, key: str, value: int) -> int:
    """Change a 32-bit number in the file itself, by one write of four bytes, and sync it to disk. Returns the old
    value. Raises SourceError, and OutputError for a file that must not be changed: a symbolic link, one with several
    names, or one without write permission."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        if os.path.islink(path):
            raise OutputError(
                f"{path}: is a symbolic link to {os.path.realpath(path)}, as in Hugging Face's cache, which checks its "
                "files; write a mended copy with -o"
            ) from None
        raise OutputError(f"{path}: cannot be changed: {e.strerror or e}; write a mended copy with -o") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise SourceError(f"{path}: is not a regular file")
        if info.st_nlink > 1:
            raise OutputError(
                f"{path}: has {info.st_nlink} names (hard links), and all of them would change; write a mended copy "
                "with -o"
            )
        with os.fdopen(os.dup(fd), "rb") as file:
            header = read_header_of(file, path)
        item = next(item for item in header.kvs if item.key == key)
        at = place_of(header, key)
        assert at is not None
        assert item.type in _OF_FOUR
        if os.pread(fd, 4, at) != item.payload:
            raise InternalCheckError(f"{path}: {key} is not at {at:,}, where it was looked for; nothing was changed")
        write_at(Opened(fd, path), at, value.to_bytes(4, "little"))
        os.fsync(fd)
        with os.fdopen(os.dup(fd), "rb") as file:
            if read_header_of(file, path).kvs != _with(header, KV(key, item.type, value.to_bytes(4, "little"))):
                raise InternalCheckError(f"{path}: the header is not what was written; verify the file")
        return int.from_bytes(item.payload, "little")
    except OSError as e:
        raise OutputError(f"{path}: cannot be changed: {e.strerror or e}") from None
    finally:
        os.close(fd)


def copy_with(
    path: Path, out: Path, key: str, value: int, replace: bool = False, progress: Progress | None = None
) -> str:
    """Copy the file with the number (u32) in its header; a new key goes after all others. The copy is complete or not
    made at all. Returns how the tensors' bytes were copied: "reflink", "copy_file_range" and so on. Raises SourceError,
    OutputError."""
    header = read_header(path)
    infos = [(t.name, t.shape, t.type, t.offset - header.data_offset) for t in header.tensors]
    head = header_bytes(_with(header, kv(key, U32, value)), infos, header.alignment)
    start = min(header.data_offset, header.file_bytes)
    n = header.file_bytes - start
    with making(out, replace, len(head) + n) as fd:
        write_at(Opened(fd, out), 0, head)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            way = copy_range(Opened(source, path), start, Opened(fd, out), len(head), n, progress)
        finally:
            os.close(source)
    return way


def _with(header: Header, item: KV) -> tuple[KV, ...]:
    kvs: Sequence[KV] = header.kvs
    if any(k.key == item.key for k in kvs):
        return tuple(item if k.key == item.key else k for k in kvs)
    return (*kvs, item)

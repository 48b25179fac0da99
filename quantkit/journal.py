"""The journal of an unfinished build: what it is a build of, and which rows of the output are on the disk for good.

    line 1  = JSON {"quantkit-journal": 1, "identity": {…}, "started": …}, a space, its CRC-32 in 8 hex digits
    records = u32 tensor | u32 row | u32 n_rows | 16 bytes BLAKE2b of those rows' bytes | u32 CRC-32 of the record

Little-endian; `tensor` counts the plan's tensors. A record is appended only when the rows it names have been synced, so
it never claims what the disk may not have. Reading stops at the first record whose CRC is wrong: what was being
appended when the machine went down.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .errors import ResumeError

VERSION = 1
_FIELDS = struct.Struct("<III16s")
_RECORD = struct.Struct("<III16sI")
#: bytes of the first line; R1's names 163 source files in 20 KB
_MAX_HEAD = 1 << 24


class Record(NamedTuple):
    """Rows row… of a tensor, on the disk."""

    tensor: int
    row: int
    n_rows: int
    digest: bytes


class Journal(NamedTuple):
    """What a journal file says. `nbytes` of it are sound."""

    identity: dict[str, str]
    started: str
    records: list[Record]
    nbytes: int


def digest(data: bytes | memoryview) -> bytes:
    """The checksum of rows' bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def create(path: Path, identity: Mapping[str, str], started: str) -> None:
    """A journal without records, on the disk when this returns. Raises OSError."""
    text = json.dumps({"quantkit-journal": VERSION, "identity": dict(identity), "started": started}).encode()
    line = b"%s %08x\n" % (text, zlib.crc32(text))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)


def append(fd: int, records: Iterable[Record]) -> None:
    """Append records and sync them. Raises OSError."""
    raw = bytearray()
    for r in records:
        fields = _FIELDS.pack(*r)
        raw += fields + struct.pack("<I", zlib.crc32(fields))
    _write(fd, raw)
    os.fdatasync(fd)


def _write(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read(path: Path) -> Journal | None:
    """A journal, or None where there is no file or its first line never was written whole. Raises ResumeError
    for anything else that is no journal."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise ResumeError(f"{path}: cannot be read: {e.strerror or e}") from None
    end = raw.find(b"\n", 0, _MAX_HEAD)
    if end < 0 and len(raw) < _MAX_HEAD:
        return None
    line = raw[:end]
    damaged = ResumeError(f"{path}: is damaged and cannot be gone on with; begin anew with --restart")
    try:
        if f"{zlib.crc32(line[:-9]):08x}" != line[-8:].decode():
            raise damaged
        head = json.loads(line[:-9])
        identity, started = head["identity"], head["started"]
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if head.get("quantkit-journal") != VERSION:
        raise ResumeError(
            f"{path}: is of journal version {head.get('quantkit-journal')}, this quantkit reads {VERSION}; begin anew "
            "with --restart"
        )
    records, at = [], end + 1
    while at + _RECORD.size <= len(raw):
        *fields, crc = _RECORD.unpack_from(raw, at)
        if zlib.crc32(raw[at : at + _FIELDS.size]) != crc:
            break
        records.append(Record(*fields))
        at += _RECORD.size
    return Journal(identity, started, records, at)

"""The journal of an unfinished build: what it is a build of, and which rows of the output are on the disk for good.

    line 1  = JSON {"quantkit-journal": 1, "started": …, "identity": {…}, "files": […], "tensors": […]}, a space, its
              CRC-32 in 8 hex digits
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
from bisect import bisect_right
from collections.abc import Iterable
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


class Head(NamedTuple):
    """What is being made: when it was begun, what it is made of (quantkit.fingerprint), and of which files and tensors
    it consists."""

    started: str
    identity: dict[str, str]
    files: list[tuple[str, int]]
    """name, bytes"""
    tensors: list[tuple[str, int, int, int]]
    """name, rows, bytes a row, number of the file"""


class Journal(NamedTuple):
    """What a journal file says. `nbytes` of it are sound."""

    head: Head
    records: list[Record]
    nbytes: int


def digest(data: bytes | memoryview) -> bytes:
    """The checksum of rows' bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def create(path: Path, head: Head) -> None:
    """A journal without records, on the disk when this returns. Raises OSError."""
    text = json.dumps({"quantkit-journal": VERSION, **head._asdict()}).encode()
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
        said = json.loads(line[:-9])
        version = said["quantkit-journal"]
        if version != VERSION:
            raise ResumeError(
                f"{path}: is of journal version {version}, this quantkit reads {VERSION}; begin anew with --restart"
            )
        head = Head(
            said["started"],
            said["identity"],
            [(name, nbytes) for name, nbytes in said["files"]],
            [(name, n, row, file) for name, n, row, file in said["tensors"]],
        )
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    records, at = [], end + 1
    while at + _RECORD.size <= len(raw):
        *fields, crc = _RECORD.unpack_from(raw, at)
        if zlib.crc32(raw[at : at + _FIELDS.size]) != crc:
            break
        records.append(Record(*fields))
        at += _RECORD.size
    return Journal(head, records, at)


class Rows:
    """A set of rows, as intervals."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, row: int, n_rows: int) -> None:
        end = row + n_rows
        i = bisect_right(self.starts, row)
        if i and self.ends[i - 1] >= row:
            i -= 1
            row = self.starts[i]
        j = bisect_right(self.starts, end)
        if j > i:
            end = max(end, self.ends[j - 1])
        self.starts[i:j], self.ends[i:j] = [row], [end]

    def covers(self, row: int, n_rows: int) -> bool:
        i = bisect_right(self.starts, row)
        return bool(i) and self.ends[i - 1] >= row + n_rows

    def __len__(self) -> int:
        return sum(self.ends) - sum(self.starts)


def durable(journal: Journal) -> list[int]:
    """For each tensor, how many of its rows are on the disk by what the journal tells."""
    rows = [Rows() for _ in journal.head.tensors]
    for r in journal.records:
        if r.tensor < len(rows):
            rows[r.tensor].add(r.row, r.n_rows)
    return [len(r) for r in rows]

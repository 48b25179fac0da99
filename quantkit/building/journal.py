"""The journal of an unfinished build: what it is a build of, and which rows of the output are on the disk for good.

    line 1  = JSON {"quantkit-journal": 2, "started": …, "identity": {…}, "files": […], "tensors": […]}, a space, its
              CRC-32 in 8 hex digits
    records = u32 tensor | u32 row | u32 n_rows | 16 bytes XXH3-128 of those rows' bytes, as it is printed | u32 CRC-32
              of the record

Little-endian but for the digest; `tensor` counts the plan's tensors. A record is appended only when the rows it names
have been synced, so it never claims what the disk may not have. Reading stops at the first record whose CRC is wrong:
what was being appended when the machine went down. The digest notices what a disk has lost or changed, at the speed of
memory (benchmarks/checksums.py); that nobody else writes to the files is quantkit.base.folders' to see.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

import xxhash

from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder

NAME = "journal"
VERSION = 2
_FIELDS = struct.Struct("<III16s")
_RECORD = struct.Struct("<III16sI")
#: bytes of the first line; R1's names 163 source files in 20 KB
_MAX_HEAD = 1 << 24
#: characters of a file's name
_MAX_NAME = 255
#: bytes that are read at all; R1's has 20 MB
_MAX_BYTES = 1 << 30


class Record(NamedTuple):
    """Rows row… of a tensor, on the disk."""

    tensor: int
    row: int
    n_rows: int
    digest: bytes


class Head(NamedTuple):
    """What is being made: when it was begun, what it is made of (quantkit.building.identity), and of which files and
    tensors it consists."""

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
    return xxhash.xxh3_128_digest(data)


def create(folder: Folder, head: Head) -> int:
    """A new journal without records, on the disk when this returns; its descriptor, for `append`. Raises OSError."""
    text = json.dumps({"quantkit-journal": VERSION, **head._asdict()}).encode()
    line = b"%s %08x\n" % (text, zlib.crc32(text))
    fd = folder.create(NAME)
    try:
        _write(fd, line)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


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


def read(folder: Folder, owner: int | None = None) -> Journal | None:
    """The journal in a folder, or None where there is no file or its first line never was written whole. Raises
    ResumeError for anything else that is no journal, or with `owner` for one of another user."""
    path = folder.path / NAME
    try:
        fd = folder.open(NAME, owner=owner)
        with open(fd, "rb") as f:
            raw = f.read(_MAX_BYTES)
    except OutputError as e:
        raise ResumeError(f"{str(e).partition(';')[0]}; start again with --restart") from None
    except OSError as e:
        if e.errno == errno.ENOENT:
            return None
        raise ResumeError(f"{path}: cannot be read: {e.strerror or e}") from None
    end = raw.find(b"\n", 0, _MAX_HEAD)
    if end < 0 and len(raw) < _MAX_HEAD:
        return None
    line = raw[:end]
    damaged = ResumeError(f"{path}: is damaged and cannot be gone on with; start again with --restart")
    try:
        if line != b"%s %08x" % (line[:-9], zlib.crc32(line[:-9])):
            raise damaged
        said = json.loads(line[:-9])
        version = said["quantkit-journal"]
        if version != VERSION:
            raise ResumeError(
                f"{path}: is of journal version {version}, this quantkit reads {VERSION}; start again with --restart"
            )
        head = _head(said)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    records, at = [], end + 1
    while at + _RECORD.size <= len(raw):
        *fields, crc = _RECORD.unpack_from(raw, at)
        if zlib.crc32(raw[at : at + _FIELDS.size]) != crc:
            break
        records.append(Record(*fields))
        at += _RECORD.size
    return Journal(head, records, at)


def _head(said: dict[str, Any]) -> Head:
    """What a first line says. Raises KeyError, TypeError or ValueError unless it is what a build writes."""
    started, identity = said["started"], said["identity"]
    files = [(name, nbytes) for name, nbytes in said["files"]]
    tensors = [(name, n_rows, row_bytes, file) for name, n_rows, row_bytes, file in said["tensors"]]
    words = [started, *identity.keys(), *identity.values(), *(name for name, _ in files), *(t[0] for t in tensors)]
    numbers = [*(nbytes for _, nbytes in files), *(n for t in tensors for n in t[1:])]
    if not all(isinstance(word, str) for word in words) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError
    if any(name in ("", ".", "..") or "/" in name or "\0" in name or len(name) > _MAX_NAME for name, _ in files):
        raise ValueError
    if any(t[3] >= len(files) for t in tensors):
        raise ValueError
    return Head(started, identity, files, tensors)


class RowSet:
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
    rows = [RowSet() for _ in journal.head.tensors]
    for r in journal.records:
        if r.tensor < len(rows):
            rows[r.tensor].add(r.row, r.n_rows)
    return [len(r) for r in rows]

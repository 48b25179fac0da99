"""A journal of resumable work: what is being made, and which parts of it are safely on disk.

    line 1  = JSON {"quantkit-journal": 3, "of": what writes it, … further keys}, a space, its CRC-32 in 8 hex digits
    records = u32 part | u64 start | u64 n | 16 bytes digest | u32 CRC-32 of the record

Little-endian, except for the digest. A part consists of units; a record says that the `n` units from `start` on are
there. The writer defines parts and units (a build: rows of a tensor; dequant: bytes of a shard). The digest is the
XXH3-128 of their bytes, as usually printed, or anything else by which the writer recognizes them. A record is appended
only after its units have been synced, so it never claims what the disk may not have. Reading stops at the first record
with a wrong CRC: it was being appended when the machine went down. The digest detects what a disk lost or changed,
at the speed of memory (benchmarks/checksums.py); quantkit.base.folders keeps others from writing to the files.

A writer takes a lock (quantkit.base.lock), reads what the journal has, and continues from there:

>>> import os, tempfile
>>> from pathlib import Path
>>> from quantkit.base.files import create as create_file, write_at
>>> from quantkit.base.folders import Folder
>>> from quantkit.base.lock import Lock
>>> def squares(path, n):                                 # part 0: 8-byte numbers; a unit is a number
...     made = 0
...     with Folder.hold(path) as folder, Lock.of_file(folder, "lock", folder.own):
...         told = read(folder, "journal", "squares", lambda said: said["n"], "remove it")
...         if told is None or told.head != n:
...             folder.remove("squares")
...             os.close(create_file(folder, "squares", b"", 8 * n))
...             book = Journal.begin(folder, "journal", "squares", {"n": n})
...         else:
...             book = Journal.go_on(folder, "journal", told)
...         fd, there = folder.open("squares", os.O_RDWR), Ranges()
...         for r in told.records if told else []:
...             if is_there(fd, 8 * r.start, 8 * r.n, r.digest):
...                 there.add(r.start, r.n)
...         for i in range(n):
...             if not there.covers(i, 1):
...                 data = (i * i).to_bytes(8, "little")
...                 write_at(fd, data, 8 * i)
...                 os.fdatasync(fd)                      # first the bytes, then their record
...                 book.tell([Record(0, i, 1, digest(data))])
...                 made += 1
...         os.close(fd)
...         book.close()
...     return made
>>> with tempfile.TemporaryDirectory() as folder:
...     squares(Path(folder), 5), squares(Path(folder), 5)
(5, 0)
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import xxhash

from .errors import ResumeError
from .files import NewFile, read_at, write_at
from .folders import Folder

VERSION = 3
_FIELDS = struct.Struct("<IQQ16s")
_RECORD = struct.Struct("<IQQ16sI")
#: most bytes of the first line; a build of R1 names 163 source files in 20 KB
_MAX_HEAD = 1 << 24
#: most bytes that are read; a build of R1 has 25 MB
_MAX_BYTES = 1 << 30

HeadT = TypeVar("HeadT")


class Record(NamedTuple):
    """The `n` units from `start` on of a part are on disk."""

    part: int
    start: int
    n: int
    digest: bytes


@dataclass(frozen=True)
class Told(Generic[HeadT]):
    """What a journal says. Its first `nbytes` bytes are sound."""

    head: HeadT
    records: list[Record]
    nbytes: int


def digest(data: bytes | memoryview) -> bytes:
    """Return the checksum of some units' bytes."""
    return xxhash.xxh3_128_digest(data)


def is_there(fd: int, offset: int, nbytes: int, digest_: bytes) -> bool:
    """Whether a file has the bytes that a record describes. Raises OSError."""
    return digest(read_at(fd, nbytes, offset)) == digest_


class Journal:
    """A journal open for writing, by the process that holds the lock."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def begin(
        cls, folder: Folder, name: str, of: str, head: Mapping[str, Any], records: Iterable[Record] = ()
    ) -> Journal:
        """Start a new journal, replacing an existing one; it is complete and on disk when this returns. Raises
        OSError, OutputError."""
        text = json.dumps({"quantkit-journal": VERSION, "of": of, **head}).encode()
        line = b"%s %08x\n" % (text, zlib.crc32(text))
        with NewFile(folder, temporary_name(name)) as new:
            write_at(new.fd, line + _packed(records), 0)
            new.publish(folder, name)
        return cls(_to_append(folder, name))

    @classmethod
    def go_on(cls, folder: Folder, name: str, told: Told[Any]) -> Journal:
        """Continue an existing journal, without its unsound end. Raises OSError, and OutputError for another's."""
        fd = _to_append(folder, name)
        try:
            os.ftruncate(fd, told.nbytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def tell(self, records: Iterable[Record]) -> None:
        """Append records and sync them. Raises OSError."""
        view = memoryview(_packed(records))
        while view:
            view = view[os.write(self.fd, view) :]
        os.fdatasync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def temporary_name(name: str) -> str:
    """Return the temporary name under which a journal is started."""
    return f".{name.lstrip('.')}.new"


def _to_append(folder: Folder, name: str) -> int:
    return folder.open(name, os.O_WRONLY | os.O_APPEND, owner=folder.own, alone=True)


def _packed(records: Iterable[Record]) -> bytes:
    raw = bytearray()
    for r in records:
        fields = _FIELDS.pack(*r)
        raw += fields + struct.pack("<I", zlib.crc32(fields))
    return bytes(raw)


def read(
    folder: Folder, name: str, of: str, parse: Callable[[dict[str, Any]], HeadT], otherwise: str,
    owner: int | None = None, alone: bool = False,
) -> Told[HeadT] | None:  # fmt: skip
    """Read the journal in a folder; None if there is no file or its first line was never written completely. `parse`
    makes a head of the first line's values, and raises KeyError, TypeError or ValueError if `of` could not have written
    them; `otherwise` says what to do if the journal cannot be continued. Raises ResumeError for any other invalid
    journal, OutputError for a file that is not `owner`'s, or with `alone` has another name, and OSError."""
    path = folder.path / name
    try:
        with open(folder.open(name, owner=owner, alone=alone), "rb") as f:
            raw = f.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    end = raw.find(b"\n", 0, _MAX_HEAD)
    if end < 0 and len(raw) < _MAX_HEAD:
        return None
    line = raw[:end]
    damaged = ResumeError(f"{path}: is damaged and cannot be continued; {otherwise}")
    try:
        if line != b"%s %08x" % (line[:-9], zlib.crc32(line[:-9])):
            raise damaged
        said = json.loads(line[:-9])
        version = said["quantkit-journal"]
        if version != VERSION:
            raise ResumeError(f"{path}: is of journal version {version}, this quantkit reads {VERSION}; {otherwise}")
        if said["of"] != of:
            raise damaged
        head = parse(said)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    records, at = [], end + 1
    while at + _RECORD.size <= len(raw):
        *fields, crc = _RECORD.unpack_from(raw, at)
        if zlib.crc32(raw[at : at + _FIELDS.size]) != crc:
            break
        records.append(Record(*fields))
        at += _RECORD.size
    return Told(head, records, at)


def is_file_name(name: str) -> bool:
    """Whether a name from a journal is a plain file name that cannot lead out of its folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(name) <= 255


class Ranges:
    """A set of units, stored as intervals."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, start: int, n: int) -> None:
        end = start + n
        i = bisect_right(self.starts, start)
        if i and self.ends[i - 1] >= start:
            i -= 1
            start = self.starts[i]
        j = bisect_right(self.starts, end)
        if j > i:
            end = max(end, self.ends[j - 1])
        self.starts[i:j], self.ends[i:j] = [start], [end]

    def covers(self, start: int, n: int) -> bool:
        i = bisect_right(self.starts, start)
        return bool(i) and self.ends[i - 1] >= start + n

    def __len__(self) -> int:
        return sum(self.ends) - sum(self.starts)

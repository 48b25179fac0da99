"""A journal of work that can be continued: what is being made, and which parts of it are on the disk for good.

    line 1  = JSON {"quantkit-journal": 3, "of": what writes it, … its own}, a space, its CRC-32 in 8 hex digits
    records = u32 part | u64 start | u64 n | 16 bytes digest | u32 CRC-32 of the record

Little-endian but for the digest. A part is cut into units, of which `n` are there from `start` on; what parts and units
are is the writer's to say (a build: rows of a tensor; dequant: bytes of a shard). The digest is XXH3-128 of their
bytes, as it is printed, or whatever else the writer knows them again by. A record is appended only when what it names
has been synced, so it never claims what the disk may not have. Reading stops at the first record whose CRC is wrong:
what was being appended when the machine went down. The digest notices what a disk has lost or changed, at the speed of
memory (benchmarks/checksums.py); that nobody else writes to the files is quantkit.base.folders' to see.

A writer holds a lock (quantkit.base.lock), asks what was told before, and goes on from there:

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
...                 os.fdatasync(fd)                      # first the bytes, then what is said of them
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
#: bytes of the first line; a build of R1 names 163 source files in 20 KB
_MAX_HEAD = 1 << 24
#: bytes that are read at all; a build of R1 has 25 MB
_MAX_BYTES = 1 << 30

HeadT = TypeVar("HeadT")


class Record(NamedTuple):
    """Units start… of a part, on the disk."""

    part: int
    start: int
    n: int
    digest: bytes


@dataclass(frozen=True)
class Told(Generic[HeadT]):
    """What a journal says. `nbytes` of it are sound."""

    head: HeadT
    records: list[Record]
    nbytes: int


def digest(data: bytes | memoryview) -> bytes:
    """The checksum of some units' bytes."""
    return xxhash.xxh3_128_digest(data)


def is_there(fd: int, offset: int, nbytes: int, digest_: bytes) -> bool:
    """Whether a file has the bytes that a record tells of. Raises OSError."""
    return digest(read_at(fd, nbytes, offset)) == digest_


class Journal:
    """A journal that is written to, by the process that holds the lock."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def begin(
        cls, folder: Folder, name: str, of: str, head: Mapping[str, Any], records: Iterable[Record] = ()
    ) -> Journal:
        """A new journal, in place of one that is there; whole and on the disk when this returns. Raises OSError,
        OutputError."""
        text = json.dumps({"quantkit-journal": VERSION, "of": of, **head}).encode()
        line = b"%s %08x\n" % (text, zlib.crc32(text))
        with NewFile(folder, temporary_name(name)) as new:
            write_at(new.fd, line + _packed(records), 0)
            new.publish(folder, name)
        return cls(_to_append(folder, name))

    @classmethod
    def go_on(cls, folder: Folder, name: str, told: Told[Any]) -> Journal:
        """One that is there, without what is not sound. Raises OSError, and OutputError for one that is another's."""
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
    """What a journal of that name is called while it is begun."""
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
    """The journal in a folder, or None where there is no file or its first line never was written whole. `parse` makes
    a head of what the first line says, and raises KeyError, TypeError or ValueError where `of` writes no such thing;
    `otherwise` is what to do about a journal that cannot be continued. Raises ResumeError for anything else that is
    no journal, OutputError for what is no file of `owner`, or with `alone` has another name, and OSError."""
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
    """Whether a name that a journal tells is one of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(name) <= 255


class Ranges:
    """A set of units, as intervals."""

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

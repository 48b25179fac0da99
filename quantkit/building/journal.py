"""The journal of an unfinished build (quantkit.base.journal): what is being built, and which rows of the output are
durable. Its parts are the plan's tensors, by number; its units are rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..base import journal
from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder
from ..base.journal import Ranges, Told

NAME, OF = "journal", "build"
_OTHERWISE = "start again with --restart"


class Head(NamedTuple):
    """The first line: when the build began, what it is made of (quantkit.building.identity), and its files and
    tensors."""

    started: str
    identity: dict[str, str]
    files: list[tuple[str, int]]
    """name, bytes"""
    tensors: list[tuple[str, int, int, int]]
    """name, rows, bytes per row, number of the file"""


ToldBuild = Told[Head]
"""the content of a build's journal"""


def begin(folder: Folder, head: Head) -> journal.Journal:
    """Create a journal without records; it is durable on return. Raises OSError, OutputError."""
    return journal.Journal.begin(folder, NAME, OF, head._asdict())


def read(folder: Folder, owner: int | None = None) -> ToldBuild | None:
    """Read the journal in a folder; None if there is no file, or its first line was never completely written. Raises
    ResumeError for any other file that is no journal, and with `owner` for another user's."""
    try:
        return journal.read(folder, NAME, OF, _head, _OTHERWISE, owner)
    except OutputError as e:
        raise ResumeError(f"{str(e).partition(';')[0]}; {_OTHERWISE}") from None
    except OSError as e:
        raise ResumeError(f"{folder.path / NAME}: cannot be read: {e.strerror or e}") from None


def _head(said: dict[str, Any]) -> Head:
    """Parse a first line. Raises KeyError, TypeError or ValueError unless a build wrote it."""
    started, identity = said["started"], said["identity"]
    files = [(name, nbytes) for name, nbytes in said["files"]]
    tensors = [(name, n_rows, row_bytes, file) for name, n_rows, row_bytes, file in said["tensors"]]
    words = [started, *identity.keys(), *identity.values(), *(name for name, _ in files), *(t[0] for t in tensors)]
    numbers = [*(nbytes for _, nbytes in files), *(n for t in tensors for n in t[1:])]
    if not all(isinstance(word, str) for word in words) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError
    if not all(journal.is_file_name(name) for name, _ in files) or any(t[3] >= len(files) for t in tensors):
        raise ValueError
    return Head(started, identity, files, tensors)


def durable(told: ToldBuild) -> list[int]:
    """For each tensor, the number of rows that are durable according to the journal."""
    return [len(rows) for rows in _rows(told)]


def rows_of(told: ToldBuild) -> dict[str, Ranges]:
    """The durable rows of each tensor, by name."""
    return {tensor[0]: rows for tensor, rows in zip(told.head.tensors, _rows(told), strict=True)}


def _rows(told: ToldBuild) -> list[Ranges]:
    rows = [Ranges() for _ in told.head.tensors]
    for r in told.records:
        if r.part < len(rows):
            rows[r.part].add(r.start, r.n)
    return rows

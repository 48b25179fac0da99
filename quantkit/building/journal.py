"""The journal of an unfinished build (quantkit.base.journal): what it is a build of, and which rows of the output are
on the disk for good. Its parts are the plan's tensors by number, their units are rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..base import journal
from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder
from ..base.journal import Ranges, Told

NAME, OF = "journal", "build"
_OTHERWISE = "start again with --restart"


class Head(NamedTuple):
    """What is being made: when it was begun, what it is made of (quantkit.building.identity), and of which files and
    tensors it consists."""

    started: str
    identity: dict[str, str]
    files: list[tuple[str, int]]
    """name, bytes"""
    tensors: list[tuple[str, int, int, int]]
    """name, rows, bytes a row, number of the file"""


ToldBuild = Told[Head]
"""what a build's journal says"""


def begin(folder: Folder, head: Head) -> journal.Journal:
    """A new journal without records, on the disk when this returns. Raises OSError, OutputError."""
    return journal.Journal.begin(folder, NAME, OF, head._asdict())


def read(folder: Folder, owner: int | None = None) -> ToldBuild | None:
    """The journal in a folder, or None where there is no file or its first line never was written whole. Raises
    ResumeError for anything else that is no journal, or with `owner` for one of another user."""
    try:
        return journal.read(folder, NAME, OF, _head, _OTHERWISE, owner)
    except OutputError as e:
        raise ResumeError(f"{str(e).partition(';')[0]}; {_OTHERWISE}") from None
    except OSError as e:
        raise ResumeError(f"{folder.path / NAME}: cannot be read: {e.strerror or e}") from None


def _head(said: dict[str, Any]) -> Head:
    """What a first line says. Raises KeyError, TypeError or ValueError unless it is what a build writes."""
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
    """For each tensor, how many of its rows are on the disk by what the journal tells."""
    return [len(rows) for rows in _rows(told)]


def rows_of(told: ToldBuild) -> dict[str, Ranges]:
    """Which rows of each tensor, by its name."""
    return {tensor[0]: rows for tensor, rows in zip(told.head.tensors, _rows(told), strict=True)}


def _rows(told: ToldBuild) -> list[Ranges]:
    rows = [Ranges() for _ in told.head.tensors]
    for r in told.records:
        if r.part < len(rows):
            rows[r.part].add(r.start, r.n)
    return rows

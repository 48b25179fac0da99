"""The output directory and its files, reached without following links; a file gets its name once it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..base.errors import OutputError
from ..base.files import NewFile
from ..base.folders import Folder, who

#: suffix of a file that is being written
PART = ".quantkit-part"


def hold(dst: Path) -> Folder | None:
    """Hold the output directory open; None if it does not exist. Raises OSError, OutputError."""
    try:
        return Folder.hold(dst)
    except FileNotFoundError:
        return None


@contextmanager
def place_of(folder: Folder, name: str, make: bool = False) -> Iterator[tuple[Folder, str]]:
    """Yield the folder of a file in the directory or below, and the file's name in it. No folder on the way may be a
    link or another user's. Raises OSError, OutputError."""
    with folder.at(name, make) as (inner, last):
        if inner is not folder and inner.info.st_uid != folder.own:
            raise OutputError(
                f"{inner.path}: belongs to {who(inner.info.st_uid)}, not to you; move it away and run the same "
                "command again"
            )
        yield inner, last


@contextmanager
def replacing(folder: Folder, name: str) -> Iterator[int]:
    """Yield the descriptor of a new file under a temporary name; it gets its own once it is complete and on disk."""
    with NewFile(folder, part_of(name)) as new:
        yield new.fd
        new.publish(folder, name)


def part_of(name: str) -> str:
    return f".{name.lstrip('.')}{PART}"

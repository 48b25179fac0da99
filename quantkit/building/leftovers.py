"""Removes the finished shards of an unfinished build when another build with other file names replaces it.

These shards already have their names in the output's folder, and the new build would leave them there: half a model
that no journal mentions any more. They are removed, but only if the old build's own journal proves that they are its
own.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ..base.errors import OutputError, ResumeError, SourceError
from ..base.folders import Folder, same
from ..base.journal import is_there
from ..gguf.header import read_header_of
from ..planning.file_layout import file_names
from .folder import held_folder, take
from .journal import ToldBuild, durable, read


def whole_files(journal: ToldBuild) -> set[str]:
    """The names of the files whose rows are all durable according to the journal."""
    there = zip(durable(journal), journal.head.tensors, strict=True)
    short = {file for n, (_, n_rows, _, file) in there if n < n_rows}
    return {name for i, (name, _) in enumerate(journal.head.files) if i not in short}


def finished_shards(out: Path, kept: Collection[Path] = ()) -> list[Path]:
    """The shards, except `kept`, that the unfinished build of `out` has finished. They must have the names of its
    shards, be complete in its journal, have the tensors and length that it states, and match its record with the most
    bytes. Empty if all shards exist: then they are a model."""
    try:
        with Folder.hold(out.absolute().parent) as above:
            return [out.with_name(name) for name, _ in _finished(out, above, kept)]
    except (OSError, ResumeError, OutputError):
        return []


def _finished(out: Path, above: Folder, kept: Collection[Path]) -> list[tuple[str, os.stat_result]]:
    """The same, as names in the output's folder with their stats. Raises ResumeError, OutputError, OSError."""
    folder = held_folder(out, own=True)
    if folder is None:
        return []
    with folder:
        journal = read(folder, folder.own)
        if journal is None:
            return []
        whole = whole_files(journal)
        names = [path.name for path in file_names(out, len(journal.head.files), split=True)]
        if names != [name for name, _ in journal.head.files]:
            return []
        found = [
            (name, _if_its(above, name, folder.own, journal, i)) for i, name in enumerate(names)
            if name in whole and folder.look(name) is None
        ]  # fmt: skip
    its = [(name, info) for name, info in found if info is not None]
    return [(name, info) for name, info in its if out.with_name(name) not in kept] if len(its) < len(names) else []


def _if_its(above: Folder, name: str, owner: int, journal: ToldBuild, file: int) -> os.stat_result | None:
    """The stat of a file, if the file matches the journal; else None."""
    tensors = {i: t for i, t in enumerate(journal.head.tensors) if t[3] == file}
    records = [r for r in journal.records if r.part in tensors]
    try:
        with open(above.open(name, owner=owner), "rb") as f:
            header = read_header_of(f, above.path / name)
            stored = {t.name: t for t in header.tensors}
            told = [(name, n_rows * row_bytes) for name, n_rows, row_bytes, _ in tensors.values()]
            if (
                header.file_bytes != journal.head.files[file][1]
                or [(t.name, t.nbytes) for t in header.tensors] != told
                or not records
            ):
                return None
            most = max(records, key=lambda r: r.n * tensors[r.part][2])
            tensor, n_rows, row_bytes, _ = tensors[most.part]
            offset = stored[tensor].offset + most.start * row_bytes
            its = most.n <= n_rows and is_there(f.fileno(), offset, most.n * row_bytes, most.digest)
            return os.fstat(f.fileno()) if its else None
    except (SourceError, OutputError, OSError):
        return None


def remove(out: Path, kept: Collection[Path]) -> None:
    """Remove the finished shards of the unfinished build of `out`, except `kept`, if no other process holds the build.
    Raises ResumeError, OutputError, OSError."""
    if not finished_shards(out, kept):
        return
    taken = take(out, ())
    try:
        with Folder.hold(out.absolute().parent) as above:
            for name, info in _finished(out, above, kept):  # by the journal that exists now
                now = above.look(name)
                if now is not None and same(now, info):
                    above.unlink(name)
            above.sync()
    finally:
        taken.close()

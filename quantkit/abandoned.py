"""The shards that an unfinished build has finished, when another begins anew in its place with other names.

They have their names in the output's folder already, and the new build would leave them there: half a model that
nothing tells of any more. So they go, but only what that build's own journal shows to be its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from .disk import read_at, sync
from .errors import ResumeError, SourceError
from .gguf_format import read_header
from .journal import Journal, digest, durable
from .layout import file_names
from .partial_folder import folder_of, peek, take


def whole_files(journal: Journal) -> set[str]:
    """The names of the files all of whose rows are on the disk by what the journal tells."""
    there = zip(durable(journal), journal.head.tensors, strict=True)
    short = {file for n, (_, n_rows, _, file) in there if n < n_rows}
    return {name for i, (name, _) in enumerate(journal.head.files) if i not in short}


def finished_shards(out: Path, kept: Collection[Path] = ()) -> list[Path]:
    """The shards, but for `kept`, that the unfinished build of `out` has finished: named as its shards are, whole by
    its journal, of the tensors and length that it tells of, and with the bytes of the most rows that it tells of at
    once. None when all of its shards are there: they are a model."""
    try:
        journal = peek(out)
    except ResumeError:
        return []
    if journal is None:
        return []
    folder, whole = folder_of(out), whole_files(journal)
    names = file_names(out, len(journal.head.files), split=True)
    if [path.name for path in names] != [name for name, _ in journal.head.files]:
        return []
    its = [
        path for i, path in enumerate(names)
        if path.name in whole and not (folder / path.name).exists() and _is_its(path, journal, i)
    ]  # fmt: skip
    return [path for path in its if path not in kept] if len(its) < len(names) else []


def _is_its(path: Path, journal: Journal, file: int) -> bool:
    """Whether a file has what a journal tells of it."""
    tensors = {i: t for i, t in enumerate(journal.head.tensors) if t[3] == file}
    records = [r for r in journal.records if r.tensor in tensors]
    try:
        header = read_header(path)
        stored = {t.name: t for t in header.tensors}
        told = [(name, n_rows * row_bytes) for name, n_rows, row_bytes, _ in tensors.values()]
        if (
            path.is_symlink()
            or header.file_bytes != journal.head.files[file][1]
            or [(t.name, t.nbytes) for t in header.tensors] != told
            or not records
        ):
            return False
        most = max(records, key=lambda r: r.n_rows * tensors[r.tensor][2])
        name, _, row_bytes, _ = tensors[most.tensor]
        with open(path, "rb") as f:
            raw = read_at(f.fileno(), most.n_rows * row_bytes, stored[name].offset + most.row * row_bytes)
    except (SourceError, OSError):
        return False
    return digest(raw) == most.digest


def remove(out: Path, kept: Collection[Path]) -> None:
    """Remove the finished shards of the unfinished build of `out`, but for `kept`, while no other process has it.
    Raises ResumeError, OutputError, OSError."""
    if not finished_shards(out, kept):
        return
    held = take(out, ())
    try:
        for path in finished_shards(out, kept):  # of the journal that is there now
            path.unlink()
        sync(out.absolute().parent)
    finally:
        os.close(held)

"""Finds a GGUF by its file, by any shard of its set, or by its folder."""

from __future__ import annotations

from pathlib import Path

from ..base.errors import SourceError
from ..gguf.shards import split_name


def gguf_in(folder: Path) -> Path:
    """The GGUF in a folder: its only one, or the first shard of its only set. Raises SourceError."""
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf")
    except OSError as e:
        raise SourceError(f"{folder}: cannot be read: {e.strerror or e}") from None
    sets: dict[object, str] = {}
    for name in names:
        parts = split_name(name)
        sets.setdefault(name if parts is None else (parts.prefix, parts.n_shards), name)
    if not sets:
        raise SourceError(f"{folder}: there is no GGUF in it; give a GGUF, or the folder of one")
    if len(sets) > 1:
        raise SourceError(f"{folder}: holds {len(sets)} GGUFs: {', '.join(sets.values())}; give one of them")
    return folder / next(iter(sets.values()))

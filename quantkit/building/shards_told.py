"""OUT.partial/shards: how far a build has come with its source on the Hub, for who asks (`quantkit status`).

A JSON object, replaced whenever a shard has come or gone. It tells and decides nothing: what is there is found by
looking.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..base import outputs
from ..base.errors import OutputError
from ..base.files import text_within
from ..model.catalogue import SourceTensor
from .shard_order import Visit
from .window import Store

NAME = "shards"
_MAX_BYTES = 1 << 20


class ShardsTold(NamedTuple):
    """Shards of the source, and their bytes."""

    fetched: int
    fetched_bytes: int
    """since the build began, with those that came again"""
    kept: int
    kept_bytes: int
    """on the disk now"""
    left: int
    left_bytes: int
    """still to come"""


class Telling:
    """A window's store that writes down what comes and goes; the build does not depend on it."""

    def __init__(self, store: Store, visits: Sequence[Visit], folder: Path) -> None:
        """`folder` is the unfinished build's."""
        self._store, self._path = store, folder / NAME
        self._left = [visit.shard for visit in visits if visit.shard]
        self._there: list[str] = []
        before = read_told(folder)
        self._fetched = (0, 0) if before is None else (before.fetched, before.fetched_bytes)
        self._write()

    def size(self, shard: str) -> int:
        return self._store.size(shard)

    def fetch(self, shard: str, progress: Callable[[int], None] | None = None) -> None:
        came = self._store.fetch(shard, progress)
        if not shard:
            return
        self._left.remove(shard)
        self._there.append(shard)
        if came:
            self._fetched = (self._fetched[0] + 1, self._fetched[1] + self.size(shard))
        self._write()

    def drop(self, shard: str) -> None:
        self._store.drop(shard)
        if shard in self._there:
            self._there.remove(shard)
            self._write()

    def hold(self, tensor: SourceTensor) -> None:
        self._store.hold(tensor)

    def let_go(self, name: str) -> None:
        self._store.let_go(name)

    def _write(self) -> None:
        counted = ((len(some), sum(map(self.size, some))) for some in (self._there, self._left))
        (kept, kept_bytes), (left, left_bytes) = counted
        told = ShardsTold(*self._fetched, kept, kept_bytes, left, left_bytes)
        with suppress(OutputError):
            outputs.write_text(self._path, json.dumps(told._asdict()), replace=True)


def read_told(folder: Path) -> ShardsTold | None:
    """What the build in a folder tells of its shards; None where it tells nothing that can be read."""
    try:
        said: Any = json.loads(text_within(folder / NAME, _MAX_BYTES) or "")
        told = ShardsTold(**said)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return told if all(type(n) is int and n >= 0 for n in told) else None

"""Shards of a repository on the Hub, in a folder, each for as long as it is needed.

A shard is whole and has the repository's hash before a byte of it is read. Its name in the folder is its number and
that hash, so that what an earlier run left is known for what it is; it is hashed again before it is used. Tensors can
be held in memory beyond their shard, for rows that are made from two shards (an FP8 weight and its scales).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...base.errors import InternalCheckError, OutputError, SourceError
from ...hub.repo import Repo
from ..catalogue import SourceTensor
from .files import Files

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Limits:
    """How much of a source may be on the disk at a time."""

    keep: int = 3
    """shards, those on their way included"""
    disk: int | None = None
    """bytes"""

    def allow(self, there: Sequence[int], more: int) -> bool:
        """Whether a shard of `more` bytes may come to those of these sizes."""
        return len(there) < self.keep and (self.disk is None or sum(there) + more <= self.disk)

    def most(self, sizes: Sequence[int]) -> int:
        """The most bytes that shards of these sizes, in this order, have on the disk at a time."""
        most = 0
        there: list[int] = []
        for n in sizes:
            while there and not self.allow(there, n):
                there.pop(0)
            there.append(n)
            most = max(most, sum(there))
        return most


class Bringing(Protocol):
    """Who brings a shard when a tensor of it is read (on_demand)."""

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None: ...


class ShardStore:
    """A reader of tensors (files.Reader) whose shards come and go. Safe for threads."""

    def __init__(self, repo: Repo, folder: Path, shards: Iterable[str] | None = None) -> None:
        """`folder` is where tensors say that their shards are; nothing is read there. `shards` are their paths in the
        repository, else all safetensors."""
        self.repo = repo
        self._said = folder
        self._shards = sorted(
            (path for path in repo.files if path.endswith(".safetensors")) if shards is None else shards
        )
        self._numbers = {path: i for i, path in enumerate(self._shards)}
        self.by_range = False
        """bytes of shards that are not here are read by HTTP range: a few of them, and not held against any hash"""
        self.reader: Bringing | None = None
        """reads in place of this, while there is one"""
        self._folder: Path | None = None
        self._open: dict[str, Files] = {}
        self._held: dict[str, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------ what there is

    def shard(self, tensor: SourceTensor) -> str:
        """The path in the repository of the shard that a tensor is in; "" for one that is computed."""
        path = tensor.file.relative_to(self._said).as_posix()
        return path if path in self._numbers else ""

    def size(self, shard: str) -> int:
        return self.repo.files[shard].size if shard else 0

    @property
    def shards_digest(self) -> str:
        """A hash of the hashes of all shards, hexadecimal."""
        files = [(path, self.repo.files[path]) for path in self._shards]
        lines = (f"{path} {file.size} {file.expected}\n" for path, file in files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def keep_in(self, folder: Path) -> None:
        """From now on shards are kept there. The folder is there, and nobody else's."""
        self._folder = folder

    def leave(self) -> None:
        """Nothing more is read, and the folder may go: others can use the store with another."""
        with self._lock:
            self._open.clear()
        self._held.clear()
        self._folder = None

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise InternalCheckError(f"{self.repo.where()}: there is no folder to keep its shards in")
        return self._folder

    def place(self, shard: str) -> Path:
        return self.folder / f"{self._numbers[shard]:05d}-{self.repo.files[shard].expected}"

    def _part(self, shard: str) -> Path:
        """Where what has come of it lies, as long as it is not whole."""
        place = self.place(shard)
        return place.with_name(f"{place.name}.part")

    def whole(self) -> list[str]:
        """The shards that an earlier run left whole, by their names; what has begun to come of others follows."""
        if self._folder is None:
            return []
        names = set(os.listdir(self._folder))
        there = [s for s in self._shards if self.place(s).name in names]
        return there + [s for s in self._shards if self._part(s).name in names and s not in there]

    def clear(self, but: Iterable[str]) -> None:
        """Remove all that is in the folder, but for these shards. Raises OutputError."""
        if self._folder is None:
            return
        kept = {place.name for s in but if s for place in (self.place(s), self._part(s))}
        try:
            for name in set(os.listdir(self._folder)) - kept:
                (self._folder / name).unlink()
        except OSError as e:
            raise OutputError(
                f"{self._folder}: cannot be emptied: {e.strerror or e}; mend that and try again"
            ) from None

    # ------------------------------------------------------------ coming and going

    def fetch(self, shard: str, progress: Callable[[int], None] | None = None) -> bool:
        """Have a shard in the folder, whole and right; whether it was not there. Raises SourceError, and OutputError
        for the folder."""
        came = False
        if not shard:
            return came
        place, said = self.place(shard), progress or (lambda done: None)
        try:
            if not (place.exists() and self._is_right(shard, place, said)):
                came = True
                self.repo.fetch(shard, place, said)
                fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as e:
            raise OutputError(
                f"{place.parent}: {shard} of {self.size(shard):,} bytes cannot be kept there: {e.strerror or e}; mend "
                "that and give the same command again"
            ) from None
        with self._lock:
            self._open[shard] = Files((place,))
        return came

    def _is_right(self, shard: str, place: Path, said: Callable[[int], None]) -> bool:
        """Whether what an earlier run left is the shard; if not, it is removed."""
        file, done = self.repo.files[shard], 0
        digest = file.digest()
        with open(place, "rb") as f:
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
                said(done := done + len(chunk))
        if done == file.size and file.expected in (None, digest.hexdigest()):
            return True
        place.unlink()
        return False

    def drop(self, shard: str) -> None:
        """The shard is not read any more: its room is free again."""
        if not shard:
            return
        with self._lock:
            self._open.pop(shard, None)
        for place in (self.place(shard), self._part(shard)):
            with suppress(FileNotFoundError):
                place.unlink()

    def hold(self, tensor: SourceTensor) -> None:
        """Keep the bytes of a tensor in memory, beyond its shard."""
        raw = np.empty(tensor.nbytes, np.uint8)
        self.read(tensor, 0, raw)
        self._held[tensor.name] = raw

    def let_go(self, name: str) -> None:
        self._held.pop(name, None)

    # ------------------------------------------------------------ reading

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with the tensor's bytes from `start` on. Raises SourceError, and what `reader` raises."""
        if self.reader is not None:
            self.reader.read(tensor, start, out)
        else:
            self.read_here(tensor, start, out)

    def read_here(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """The same from what is here, or may be read by range. Raises SourceError."""
        raw = self._held.get(tensor.name)
        if raw is not None:
            out.reshape(-1)[:] = raw[start : start + out.size]
            return
        shard = self.shard(tensor)
        with self._lock:
            files = self._open.get(shard)
        if files is None and self.by_range:
            got = self.repo.read(shard, tensor.offset + start, out.size)
            if len(got) != out.size:
                raise SourceError(f"{self.repo.where(shard)}: '{tensor.name}' ends early; try again")
            out.reshape(-1)[:] = np.frombuffer(got, np.uint8)
            return
        if files is None:
            raise SourceError(f"{self.repo.where(shard)}: '{tensor.name}' is to be read, but the shard is not here")
        files.read(tensor._replace(file=self.place(shard)), start, out)

    def will_need(self, tensor: SourceTensor, start: int, nbytes: int) -> None:
        """Have the system read a tensor's bytes ahead, if it can."""
        shard = self.shard(tensor)
        with self._lock:
            files = self._open.get(shard)
        if files is not None and tensor.name not in self._held:
            files.will_need(tensor._replace(file=self.place(shard)), start, nbytes)


def store_of(source: object) -> ShardStore | None:
    """What a source's shards come and go in; None where they lie here."""
    store = getattr(source, "store", None)
    return store if isinstance(store, ShardStore) else None

"""Matrices on their way: read and decoded, changed where it is a variant's, and put on the device, by other threads
while the ones before them compute."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import torch

from ..model import catalogue
from .buffers import Buffers
from .device import Transfer
from .layer import ALL, Key, Tensor
from .model import F32, Model

#: bytes of matrices that are read ahead, as float32; beyond that only what is needed next
_AHEAD_BYTES = 1 << 29

Keys = tuple[Key, ...]


class Place(NamedTuple):
    """A matrix of a model; equal for models in which it is the same."""

    weights: Hashable
    key: Key


class Ahead:
    """A context: `n_threads` read, as many change and put. What several models need is read once."""

    def __init__(self, device: torch.device, dtype: torch.dtype, n_threads: int) -> None:
        self._dtype, self._n_threads = dtype, n_threads
        self._transfer, self._buffers = Transfer(device), Buffers(pinned=device.type == "cuda")
        self._read: dict[tuple[int, Key], Future[F32]] = {}
        self._ready: dict[Place, Future[Tensor]] = {}
        self._nbytes: dict[Place, int] = {}
        """of those that are ready or on their way"""

    def __enter__(self) -> Ahead:
        self._stack = ExitStack()
        self._readers = ThreadPoolExecutor(self._n_threads, "read")
        self._makers = ThreadPoolExecutor(self._n_threads, "change")
        for pool in (self._readers, self._makers):  # the latter waits for the former, so it is ended first
            self._stack.callback(pool.shutdown, cancel_futures=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, e, traceback)

    def prepare(self, model: Model, keys: Keys) -> None:
        """Have matrices made ready."""
        for at in places_of(model, keys):
            if at in self._ready:
                continue
            self._nbytes[at] = 4 * model.weights.n_values(at.key)
            if model.is_ready(at.key.name):
                self._ready[at] = self._makers.submit(self._kept, model, at.key)
                continue
            source = (id(model.weights), at.key)
            if source not in self._read:
                self._read[source] = self._readers.submit(model.weights.matrix, at.key, self._buffers.empty)
            self._ready[at] = self._makers.submit(self._make, model, at.key, self._read[source])

    def prepare_some(self, model: Model, following: Sequence[Keys]) -> None:
        """Have the first of these made ready, and of the others as many as there is room for."""
        for i, keys in enumerate(following):
            new = sum(4 * model.weights.n_values(at.key) for at in places_of(model, keys) if at not in self._ready)
            if i > 0 and sum(self._nbytes.values()) + new > _AHEAD_BYTES:
                return
            self.prepare(model, keys)

    def take(self, model: Model, keys: Keys, later: Collection[Place]) -> list[Tensor]:
        """The matrices that `prepare` was asked for. Those that are not needed `later` are forgotten."""
        made = []
        for at in places_of(model, keys):
            made.append(self._ready[at].result())
            self._transfer.used_here(made[-1])
            if at not in later:
                del self._ready[at], self._nbytes[at]
        return made

    def forget(self, keys: Keys) -> None:
        """Nobody needs any more what was read of these."""
        self._read = {source: read for source, read in self._read.items() if source[1] not in keys}

    def _make(self, model: Model, key: Key, read: Future[F32]) -> Tensor:
        rows, tensor = read.result(), model.weights.tensors[key.name]
        if model.change is not None and model.change.key(key.name) is not None:
            rows = model.change.apply(tensor, key.mat, rows)
        return self._put(tensor, rows)

    def _kept(self, model: Model, key: Key) -> Tensor:
        """A matrix for which the source is not read."""
        tensor = model.weights.tensors[key.name]
        n_rows = tensor.n_rows if key.mat == ALL else tensor.shape[1]
        return self._put(tensor, model.made(key.name, max(0, key.mat) * n_rows, n_rows))

    def _put(self, tensor: catalogue.Tensor, rows: F32) -> Tensor:
        return self._transfer.put(torch.from_numpy(rows), self._dtype if tensor.quantizable else torch.float32)


def places_of(model: Model, keys: Keys) -> list[Place]:
    return [Place(model.key_of(key.name), key) for key in keys]

"""Shards of a repository on the Hub that come when their tensors are read, for who computes a model layer by layer.

One thread fetches: what a reader waits for first, else what will be read next as far as that is known (`expect`). No
more shards are on the disk than the limits allow. What must go for another is what nobody reads now and will be read
last. A weight whose scales lie in another shard is taken into memory, so that the two need not be here together; such
scales stay there.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ...base.errors import InternalCheckError
from ...hub.patience import stop_by
from ..catalogue import Source, SourceTensor
from .safetensors_dir import Checkpoint
from .shard_store import Limits, ShardStore, store_of

U8 = npt.NDArray[np.uint8]
Tell = Callable[[str, int, int], None]
"""Called with a shard, and how many of how many of its bytes are here."""

#: bytes of weights in memory whose scales are in another shard
_MAX_HELD = 1 << 29
#: seconds that the end waits for the thread that fetches, which may be waiting for a server
_PATIENCE = 5.0
_NEVER = 1 << 62
#: places in the expected order by which reading is behind the first who reads, at most
_LATE = 64


class _StoppedError(Exception):
    """Nobody reads any more: fetching ends."""


class OnDemand:
    """A context in which the tensors of a checkpoint whose shards come and go in `store` can be read, by any number of
    threads. `folder` is there and nobody else's; shards that an earlier run left in it are hashed before they are
    used. Reading raises SourceError for what does not come or is not right, OutputError for the folder."""

    def __init__(
        self, source: Checkpoint, store: ShardStore, folder: Path, limits: Limits,
        tell: Tell = lambda shard, done, total: None,
    ) -> None:  # fmt: skip
        self._source, self._store, self._folder, self._limits, self._tell = source, store, folder, limits, tell
        self._changed = threading.Condition()
        self._there: dict[str, bool] = {}
        """shards on the disk, the longest unused first, and whether they may be read: those of an earlier run only when
        they are hashed"""
        self._users: Counter[str] = Counter()
        """of each shard, who reads it or waits for it"""
        self._waited: dict[str, None] = {}
        """shards that are not here and are waited for, in the order in which they were asked for"""
        self._failed: dict[str, BaseException] = {}
        self._stop = threading.Event()
        self._is_abandoned = False
        self._reads: dict[str, list[int]] = {}
        self._uses: dict[str, list[int]] = {}
        """when a tensor, and a shard, is read, of all that is expected: places in that order"""
        self._now = 0
        scales = {name: scale for name, scale in source.scales.items() if self._is_apart(name, scale)}
        self._split = frozenset(scales)
        """weights whose scales are in another shard"""
        self._apart: dict[str, list[SourceTensor]] = {}
        """such scales, by their shard"""
        for scale in scales.values():
            self._apart.setdefault(store.shard(scale), []).append(scale)
        self._scales: dict[str, U8] = {}
        self._weights: OrderedDict[str, U8] = OrderedDict()
        self.n_fetched = self.bytes_fetched = 0
        """shards that came, again where they came again"""
        self._thread = threading.Thread(target=self._come_and_go, name="quantkit-fetch", daemon=True)

    def _is_apart(self, weight: str, scale: SourceTensor) -> bool:
        return weight in self._source.tensors and self._source.tensors[weight].file != scale.file

    def __enter__(self) -> OnDemand:
        if self._store.reader is not None:
            raise InternalCheckError(f"{self._store.repo.where()}: is read by two at the same time")
        self._store.keep_in(self._folder)
        kept: list[str] = []
        for shard in self._store.whole():
            if self._limits.allow([self._store.size(s) for s in kept], self._store.size(shard)):
                kept.append(shard)
        self._store.clear(kept)
        self._there = dict.fromkeys(kept, False)
        self._store.reader = self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Who waits for a server is not waited for: what it does to the folder then, it does in vain."""
        self._store.reader = None
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_PATIENCE)
        self._store.leave()

    def expect(self, tensors: Iterable[str]) -> None:
        """From now on source tensors of these names are read, in about this order, some of them perhaps not at all."""
        reads: dict[str, list[int]] = {}
        uses: dict[str, list[int]] = {}
        for i, name in enumerate(tensors):
            at = self._store.shard(self._source.tensors[name])
            reads.setdefault(name, []).append(i)
            if at:
                uses.setdefault(at, []).append(i)
            if name in self._split:
                uses.setdefault(self._store.shard(self._source.scales[name]), []).append(i)
        with self._changed:
            self._reads, self._uses, self._now, self._is_abandoned = reads, uses, 0, False
            self._changed.notify_all()

    def abandon(self) -> None:
        """Who waits for a shard waits no more: what needed it has failed or was interrupted."""
        with self._changed:
            self._is_abandoned = True
            self._waited.clear()
            self._changed.notify_all()

    def go_on(self) -> None:
        """After `abandon`: shards are waited for again."""
        with self._changed:
            self._is_abandoned = False

    # ------------------------------------------------------------ who reads

    def read(self, tensor: SourceTensor, start: int, out: U8) -> None:
        """Fill `out` with the tensor's bytes from `start` on. Raises SourceError, OutputError."""
        held = self._scales.get(tensor.name)
        if held is None and tensor.name in self._split:
            held = self._held(tensor)
        if held is not None:
            out.reshape(-1)[:] = held[start : start + out.size]
            return
        with self._using(tensor):
            self._store.read_here(tensor, start, out)

    def whole(self, name: str) -> AbstractContextManager[None]:
        """Within it the shard of a source tensor stays here: who reads a tensor by pieces waits for it once."""
        return nullcontext() if name in self._split else self._using(self._source.tensors[name])

    def _held(self, tensor: SourceTensor) -> U8:
        """All bytes of a weight whose scales are in another shard."""
        with self._changed:
            found = self._weights.get(tensor.name)
            if found is not None:
                self._weights.move_to_end(tensor.name)
                return found
        raw = np.empty(tensor.nbytes, np.uint8)
        with self._using(tensor):
            self._store.read_here(tensor, 0, raw)
        with self._changed:
            self._weights[tensor.name] = raw
            while len(self._weights) > 1 and sum(w.nbytes for w in self._weights.values()) > _MAX_HELD:
                self._weights.popitem(last=False)
        return raw

    @contextmanager
    def _using(self, tensor: SourceTensor) -> Iterator[None]:
        """The shard of a tensor is here, and stays."""
        shard = self._store.shard(tensor)
        if not shard:
            yield
            return
        with self._changed:
            self._come_to(tensor.name)
            self._users[shard] += 1
            try:
                self._wait(shard)
            except BaseException:
                self._let_go(shard)
                raise
            self._there[shard] = self._there.pop(shard)
        try:
            yield
        finally:
            with self._changed:
                self._let_go(shard)

    def _come_to(self, name: str) -> None:
        """What is expected has come to where this tensor is read, unless that was a moment ago."""
        places = self._reads.get(name, ())
        at = bisect_left(places, self._now)
        was_there = at > 0 and self._now - places[at - 1] < _LATE
        if at < len(places) and places[at] > self._now and not was_there:
            self._now = places[at]
            self._changed.notify_all()

    def _wait(self, shard: str) -> None:
        while not self._there.get(shard):
            if (e := self._failed.get(shard)) is not None:
                raise e
            if self._stop.is_set() or self._is_abandoned:
                raise _StoppedError
            self._waited.setdefault(shard)
            self._changed.notify_all()
            self._changed.wait()

    def _let_go(self, shard: str) -> None:
        self._users[shard] -= 1
        self._changed.notify_all()

    # ------------------------------------------------------------ the thread that fetches

    def _come_and_go(self) -> None:
        stop_by(self._stop)
        while True:
            with self._changed:
                while (chosen := self._next()) is None and not self._stop.is_set():
                    self._changed.wait()
                if chosen is None or self._stop.is_set():
                    return
                shard, going = chosen
                for gone in going:
                    del self._there[gone]
            failure = self._bring(shard, going)
            with self._changed:
                self._waited.pop(shard, None)
                if failure is None:
                    self._there[shard] = True
                else:
                    self._there.pop(shard, None)
                    self._failed[shard] = failure
                self._changed.notify_all()

    def _bring(self, shard: str, going: Iterable[str]) -> BaseException | None:
        """Drop some shards, and have another here. Returns what went wrong."""
        size = self._store.size(shard)

        def has_come(done: int) -> None:
            if self._stop.is_set():
                raise _StoppedError
            self._tell(shard, done, size)

        try:
            for gone in going:
                self._store.drop(gone)
            if self._store.fetch(shard, has_come):
                self.n_fetched += 1
                self.bytes_fetched += size
            for scale in self._apart.get(shard, ()):
                if scale.name not in self._scales:
                    raw = np.empty(scale.nbytes, np.uint8)
                    self._store.read_here(scale, 0, raw)
                    self._scales[scale.name] = raw
        except BaseException as e:  # who reads the shard raises it
            return e
        return None

    def _next(self) -> tuple[str, list[str]] | None:
        """The shard that should come now, and those that go for it; None where there is none, or no room."""
        waited = next(iter(self._waited), None)
        if waited is not None:
            return self._with_room(waited, -1)
        coming = {s: self._next_use(s) for s in self._uses if not self._there.get(s) and s not in self._failed}
        shard = min(coming, key=coming.__getitem__, default="")
        if not shard or coming[shard] == _NEVER:
            return None
        chosen = self._with_room(shard, coming[shard])
        if chosen is None or not any(places[-1] == self._now for s, places in self._uses.items() if self._there.get(s)):
            return chosen
        # one that is here is read for the last time: it goes soon, rather than what is needed again
        return chosen if all(self._next_use(gone) == _NEVER for gone in chosen[1]) else None

    def _next_use(self, shard: str) -> int:
        places = self._uses.get(shard, ())
        at = bisect_left(places, self._now)
        return places[at] if at < len(places) else _NEVER

    def _with_room(self, shard: str, place: int) -> tuple[str, list[str]] | None:
        """A shard with those that go for it: only such as nobody reads, and that are needed after that place."""
        there = [s for s in self._there if s != shard]
        may_go = [s for s in there if not self._users[s] and self._next_use(s) > place]
        may_go.sort(key=self._next_use, reverse=True)
        going: list[str] = []
        while not self._limits.allow([self._store.size(s) for s in there if s not in going], self._store.size(shard)):
            if not may_go:
                return None
            going.append(may_go.pop(0))
        return shard, going


def on_demand(source: Source) -> OnDemand | None:
    """What brings the shards that a source is read from; None where they are all here, or do not come by themselves."""
    store = store_of(source)
    reader = None if store is None else store.reader
    return reader if isinstance(reader, OnDemand) else None


def whole(source: Source, name: str) -> AbstractContextManager[None]:
    """Around reading a source tensor by pieces."""
    brings = on_demand(source)
    return nullcontext() if brings is None else brings.whole(name)

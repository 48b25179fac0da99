"""A build whose source comes shard by shard: the next ones are fetched while the present one is at work, and a shard
goes when all rows that were made of it are on the disk for good.

One thread fetches and removes, in the order of the visits (shard_order), so that no more is there at a time than was
allowed. Workers take their slabs from `slabs`, which waits for the shard, and tell `done`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from ..model.catalogue import SourceTensor
from ..model.sources.shard_store import Limits
from .shard_order import Visit

S = TypeVar("S")
#: seconds that its end waits for the thread that fetches, which may be waiting for a server
_PATIENCE = 5.0


class Store(Protocol):
    """What quantkit.model.sources.shard_store is here."""

    def size(self, shard: str) -> int: ...
    def fetch(self, shard: str, progress: Callable[[int], None] | None = None) -> object: ...
    def drop(self, shard: str) -> None: ...
    def hold(self, tensor: SourceTensor) -> None: ...
    def let_go(self, name: str) -> None: ...


class _StoppedError(Exception):
    """The build ends: fetching does too."""


class Window(Generic[S]):
    """See the module."""

    def __init__(
        self,
        store: Store,
        visits: Sequence[Visit],
        limits: Limits,
        commit: Callable[[], None],
        tell: Callable[[str], None] = lambda what: None,
    ) -> None:
        """`commit` returns when the rows of all slabs that are done are on the disk for good; `tell` is told what is
        waited for."""
        self._store, self._visits, self._limits, self._commit, self._tell = store, visits, limits, commit, tell
        self._changed = threading.Condition()
        self._n_here = self._n_gone = 0
        """visits whose shard has come, and has been dropped after"""
        self._left = [1] * len(visits)
        """slabs of each visit that are not done, and one until all have been taken"""
        self._failure: BaseException | None = None
        self._stopped = False
        self._waited_for = -1
        self.bytes_fetched = 0
        self._thread = threading.Thread(target=self._come_and_go, name="quantkit-fetch", daemon=True)

    def slabs(self, make: Callable[[Visit], Iterable[S]]) -> Iterator[tuple[int, S]]:
        """The slabs that `make` gives for each visit, with the visit's number, when its shard is there. Ends early
        after `stop`. Raises what went wrong with the source, and what `commit` raises."""
        self._thread.start()
        for i, visit in enumerate(self._visits):
            with self._changed:
                self._waited_for = i
                while self._n_here <= i and self._failure is None and not self._stopped:
                    self._changed.wait()
                if self._failure is not None:
                    raise self._failure
                if self._stopped:
                    return
            for tensor in visit.hold:
                self._store.hold(tensor)
            for slab in make(visit):
                with self._changed:
                    self._left[i] += 1
                yield i, slab
            self.done(i)

    def done(self, visit: int) -> None:
        """A slab of a visit has been given to the sink."""
        with self._changed:
            self._left[visit] -= 1
            finished = self._left[visit] == 0
            self._changed.notify_all()
        if finished:
            for name in self._visits[visit].let_go:
                self._store.let_go(name)

    def stop(self) -> None:
        """Nothing more is to come, soon."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let go. Who waits for a server is not waited for: what it does to its folder then, it does in vain."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)

    # ------------------------------------------------------------ the thread that fetches

    def _come_and_go(self) -> None:
        try:
            for i, visit in enumerate(self._visits):
                self._make_room(i)
                self._store.fetch(visit.shard, lambda done, i=i: self._has_come(i, done))  # type: ignore[misc]
                with self._changed:
                    self._n_here = i + 1
                    self._changed.notify_all()
        except _StoppedError:
            pass
        except BaseException as e:
            with self._changed:
                self._failure = e
                self._changed.notify_all()

    def _has_come(self, visit: int, done: int) -> None:
        if self._stopped:
            raise _StoppedError
        if self._waited_for == visit:
            shard = self._visits[visit].shard
            self._tell(f"{shard}: {100 * done // max(1, self._store.size(shard))} %")

    def _make_room(self, i: int) -> None:
        """Drop what is in the way of the shard of a visit, the oldest first, when its rows are durable."""
        coming = self._visits[i].shard
        while True:
            there = [visit.shard for visit in self._visits[self._n_gone : i]]
            sizes = [self._store.size(shard) for shard in there]
            if coming not in there and (not there or self._limits.allow(sizes, self._store.size(coming))):
                return
            with self._changed:
                while self._left[self._n_gone] and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    raise _StoppedError
            self._commit()
            self._store.drop(there[0])
            self._n_gone += 1

"""Who is told how fetching goes: one watcher a process, set by who talks to the user; by default nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Watcher(Protocol):
    """Called by any thread."""

    def note(self, sentence: str) -> None:
        """What the user should know, such as a wait."""

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are there; the last call has both equal."""


class _Nobody:
    def note(self, sentence: str) -> None:
        pass

    def step(self, what: str, done: int, total: int) -> None:
        pass


_watcher: Watcher = _Nobody()


def note(sentence: str) -> None:
    _watcher.note(sentence)


def step(what: str, done: int, total: int) -> None:
    _watcher.step(what, done, total)


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Within it, `by` is told."""
    global _watcher
    before, _watcher = _watcher, by
    try:
        yield
    finally:
        _watcher = before

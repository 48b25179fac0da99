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


_watchers: list[Watcher] = []


def note(sentence: str) -> None:
    if _watchers:
        _watchers[-1].note(sentence)


def step(what: str, done: int, total: int) -> None:
    if _watchers:
        _watchers[-1].step(what, done, total)


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Within it, `by` is told, and nobody else."""
    _watchers.append(by)
    try:
        yield
    finally:
        _watchers.pop()

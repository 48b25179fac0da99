"""Many requests at the same time; who waits for a server is woken when the rest has failed or was interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from . import patience

A = TypeVar("A")
R = TypeVar("R")
#: requests at the same time
PARALLEL = 16


def each(do: Callable[[A], R], items: Sequence[A]) -> Iterator[R]:
    """`do` of all items by up to `PARALLEL` threads; results and errors in the order of the items."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(PARALLEL, initializer=patience.stop_by, initargs=(stop,))
    try:
        yield from pool.map(do, items)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)

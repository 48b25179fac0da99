"""Jobs done by several threads, so that an error or Ctrl-C ends all of them soon."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def each(jobs: Iterable[T], n_threads: int, make: Callable[[], Callable[[T], None]]) -> None:
    """Do every job. Each thread calls `make` once for a function of its own, which has its buffers; jobs are
    taken from the iterable one at a time. The first error raised ends all, and is raised here."""
    source = iter(jobs)
    lock, stop = threading.Lock(), threading.Event()
    none = object()

    def work() -> None:
        do = make()
        try:
            while not stop.is_set():
                with lock:
                    job = next(source, none)
                if job is none:
                    return
                do(job)  # type: ignore[arg-type]
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(n_threads, "verify") as pool:
        futures = [pool.submit(work) for _ in range(n_threads)]
        try:
            while wait(futures, timeout=0.2).not_done:
                pass  # in short turns, so that Ctrl-C is heard
        finally:
            stop.set()
    for future in futures:
        future.result()

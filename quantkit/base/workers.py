"""Jobs done in order by several threads, so that an error or Ctrl-C ends all of them soon and leaves none running."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from .errors import QuantkitError

T = TypeVar("T")


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(
    jobs: Iterable[T],
    n_threads: int,
    worker: Callable[[], Callable[[T], object]],
    on_stop: Callable[[], object] = lambda: None,
) -> None:
    """Do every job. Each thread calls `worker` once for a function of its own, which has its buffers; jobs are made
    and taken one at a time, in order, under one lock. `on_stop` is called when no more are to be begun, at the end,
    after a failure, at Ctrl-C: where the making of a job waits for something, it must end that.

    After a failure no job is begun, those begun are finished, and the first is raised: a QuantkitError before any
    other, then by the order of the jobs.
    """
    numbered = enumerate(jobs)
    next_job, stop = threading.Lock(), threading.Event()
    failures: list[tuple[int, BaseException]] = []

    def work() -> None:
        number = -1
        try:
            do = worker()
            while not stop.is_set():
                with next_job:
                    taken = next(numbered, None)
                if taken is None:
                    return
                number, job = taken
                do(job)
        except BaseException as e:
            failures.append((number, e))
            stop.set()
            on_stop()
            raise

    # an executor, not bare threads: an interrupted Thread.join takes a running thread for a finished one
    with ThreadPoolExecutor(n_threads, "quantkit") as pool:
        futures = [pool.submit(work) for _ in range(n_threads)]
        try:
            while wait(futures, timeout=0.2).not_done:
                pass  # in short turns, so that Ctrl-C is heard
        finally:
            stop.set()
            on_stop()
    if failures:
        # jobs are taken in order and finished once taken, so the first bad one is the same whatever the threads
        raise min(failures, key=lambda f: (not isinstance(f[1], QuantkitError), f[0]))[1]

"""Running jobs in order on several threads. An error or Ctrl-C stops all of them soon and leaves none running."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from .errors import QuantkitError

T = TypeVar("T")


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(
    jobs: Iterable[T],
    n_threads: int,
    worker: Callable[[], Callable[[T], object]],
    on_stop: Callable[[], object] = lambda: None,
) -> None:
    """Do every job. Each thread calls `worker` once for its own function, which has its own buffers. Jobs are generated
    and taken one at a time, in order, under one lock. `on_stop` is called when no more jobs will be started: at the
    end, after a failure, at Ctrl-C. If generating a job waits for something, `on_stop` must end that wait.

    After a failure no job is started, and those already started are finished. Then the first failure is raised: a
    QuantkitError before any other, and among these by the order of the jobs.
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

    # an executor, not bare threads: an interrupted Thread.join takes a running thread for finished
    with ThreadPoolExecutor(n_threads, "quantkit") as pool:
        futures = [pool.submit(work) for _ in range(n_threads)]
        try:
            while wait(futures, timeout=0.2).not_done:
                pass  # waits in short turns, so that Ctrl-C takes effect
        finally:
            stop.set()
            on_stop()
    if failures:
        # jobs are taken in order and finished once taken, so the first bad job does not depend on the threads
        raise min(failures, key=lambda f: (not isinstance(f[1], QuantkitError), f[0]))[1]

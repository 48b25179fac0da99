"""Jobs shared out to threads: each done once, in order, and what ends them early."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from quantkit.base.errors import SourceError
from quantkit.base.workers import share_out


def running() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("quantkit")]


@pytest.mark.parametrize("n_threads", [1, 3, 16])
def test_every_job_once_each_thread_with_a_worker_of_its_own(n_threads: int) -> None:
    done: list[tuple[int, int]] = []
    workers: list[int] = []

    def worker() -> Callable[[int], None]:
        me = threading.get_ident()
        workers.append(me)

        def do(job: int) -> None:
            assert threading.get_ident() == me
            done.append((me, job))

        return do

    share_out(iter(range(200)), n_threads, worker)
    assert sorted(job for _, job in done) == list(range(200))
    assert len(workers) == n_threads
    for me in workers:
        mine = [job for thread, job in done if thread == me]
        assert mine == sorted(mine)
    assert running() == []


def test_jobs_are_made_as_they_are_taken() -> None:
    """At most one job per thread is made ahead."""
    made: list[int] = []
    done: list[int] = []

    def jobs() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            yield i

    def do(job: int) -> None:
        assert len(made) <= len(done) + 3
        done.append(job)

    share_out(jobs(), 3, lambda: do)
    assert len(done) == 50


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_the_first_bad_job_is_the_one_raised_whatever_the_threads(n_threads: int) -> None:
    """Job 5 takes longer than those that fail after it."""
    begun = []

    def do(job: int) -> None:
        begun.append(job)
        if job == 5:
            time.sleep(0.1)
        if job >= 5:
            raise SourceError(f"job {job}")

    with pytest.raises(SourceError, match=r"^job 5$"):
        share_out(range(1000), n_threads, lambda: do)
    assert set(begun) <= set(range(5 + n_threads))
    assert running() == []


def test_our_own_error_is_raised_before_others() -> None:
    both = threading.Barrier(2, timeout=30)

    def do(job: int) -> None:
        both.wait()
        raise SourceError("ours") if job else ValueError("another")

    with pytest.raises(SourceError, match="ours"):
        share_out([0, 1], 2, lambda: do)


def test_jobs_that_cannot_be_made_and_workers_that_cannot_begin() -> None:
    done: list[int] = []

    def jobs() -> Iterator[int]:
        yield 0
        raise SourceError("no more")

    def worker() -> Callable[[int], None]:
        raise MemoryError

    with pytest.raises(SourceError, match="no more"):
        share_out(jobs(), 2, lambda: done.append)
    assert done == [0]
    with pytest.raises(MemoryError):
        share_out(range(3), 2, worker)


def test_an_interrupt_ends_all_and_leaves_no_thread() -> None:
    """SIGINT while every thread is working: begun jobs are finished, and no further ones begin."""
    begun: list[int] = []
    done: list[int] = []

    def do(job: int) -> None:
        begun.append(job)
        if job == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)
        done.append(job)

    with pytest.raises(KeyboardInterrupt):
        share_out(itertools.count(), 3, lambda: do)
    assert sorted(begun) == sorted(done)
    assert running() == []

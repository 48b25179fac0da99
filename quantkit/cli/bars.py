"""Progress bars, on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .terminal import bars_file, showable


def open_bar(total: int, unit: str, quiet: bool, stage: str | None = None, initial: int = 0) -> Any:
    """A bar of tqdm's, which is none if `quiet`; a context. `initial` was done before, and does not count as speed."""
    from tqdm import tqdm

    # a line now and then where the bar cannot be redrawn
    often = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        desc=stage,
        disable=quiet,
        mininterval=often,
        dynamic_ncols=True,
        file=bars_file(),
    )


def by_name(bar: Any) -> Callable[[str, int], None]:
    """Progress on a bar for any thread: shows the name of what is at work."""
    lock = threading.Lock()

    def progress(name: str, done: int) -> None:
        with lock:
            bar.set_description_str(showable(name), refresh=False)
            bar.update(done)

    return progress


def whole_progress(bar: Any) -> Callable[[str, int, int], None]:
    """Progress on a bar whose length comes with each step."""

    def progress(what: str, n_done: int, n_total: int) -> None:
        bar.total = n_total
        bar.set_description_str(showable(what), refresh=False)
        bar.update(n_done - bar.n)

    return progress


class Bars:
    """A progress bar for each stage, with the time left."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._lock = quiet, threading.Lock()
        self._bar: Any = None

    def start(self, stage: str, total: int, unit: str) -> None:
        self.close()
        self._bar = open_bar(total, unit, self._quiet, stage)

    def advance(self, n: int) -> None:
        with self._lock:
            self._bar.update(n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Fetching:
    """What the Hub's room tells: waits as notes, a second apart at least where many threads wait for the same; steps as
    a bar, if they take longer than two seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        self._last = 0.0

    def note(self, sentence: str) -> None:
        import click

        with self._lock:
            if time.monotonic() - self._last >= 1:
                self._last = time.monotonic()
                click.echo(f"note: {showable(sentence)}", err=True)

    def step(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        with self._lock:
            if self._bar is None:
                often = 0.1 if sys.stderr.isatty() else 10.0
                self._bar = tqdm(
                    total=total, desc=showable(what), delay=2, mininterval=often, dynamic_ncols=True, file=bars_file()
                )
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
                self._bar = None

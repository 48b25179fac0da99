"""Which rows of an unfinished build are on the disk for good, and in which order they get there.

Every few seconds the files are synced, the sources are looked at, and then the journal tells of the rows that were
written before; a file gets its name in the output's folder when all its rows are durable, or, where that would replace
older files, together with all others at the end. What was told before is read back and compared when a build goes on.
What is done with a whole tensor (its copy into the cache) is done in a thread of its own, and nothing here waits for it
but the end.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

from ..base.errors import InternalCheckError, OutputError, QuantkitError
from ..base.journal import Journal, Ranges, Record, is_there
from ..base.workers import share_out
from .unfinished_files import Files

#: between syncs: the most work that a crash can cost, besides what is at work; QUANTKIT_COMMIT_SECONDS sets another
COMMIT_SECONDS = 5.0


class Durability:
    """The journal of a build, and the order in which files, journal and names get to the disk. Safe for threads."""

    def __init__(self, out: Path, files: Files, journal: Journal, check_sources: Callable[[], None]) -> None:
        """`check_sources` raises when a source has changed: then no rows are recorded and no file gets its name."""
        self.out, self.files, self.check_sources = out, files, check_sources
        self._journal = journal
        self._places = list(files.places.values())
        self._names = list(files.places)
        self._durable = [Ranges() for _ in self._places]
        self._missing = [len(file_layout.tensors) for file_layout in files.file_layouts]
        self._pending: list[Record] = []
        self._pending_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self.failure: BaseException | None = None
        """why nothing more may be recorded; raised by the next `put`, and by `finish`"""
        self.on_whole: Callable[[str], object] | None = None
        """called once for each tensor whose rows are all on the disk for good, one at a time, while the files are
        open"""
        self._after = ThreadPoolExecutor(1, "quantkit-whole")
        self._at_work: list[Future[None]] = []

    # ------------------------------------------------------------ from before

    def read_back(
        self, records: Sequence[Record], n_threads: int, progress: Callable[[str, int], None]
    ) -> list[Ranges]:
        """Compare what the journal tells of with what is on the disk; the rows of each tensor that are there.
        `progress` is called with names and values. Raises OSError, OutputError."""
        kept = [Ranges() for _ in self._places]
        lock = threading.Lock()

        def check(r: Record) -> None:
            if r.part >= len(self._places) or r.n == 0 or r.start + r.n > self._places[r.part].n_rows:
                return
            place = self._places[r.part]
            offset, nbytes = place.offset + r.start * place.row_bytes, r.n * place.row_bytes
            if is_there(self.files.fds[place.file], offset, nbytes, r.digest):
                with lock:
                    before = len(kept[r.part])
                    kept[r.part].add(r.start, r.n)
                    more = len(kept[r.part]) - before
                progress(self._names[r.part], more * place.n_cols)

        share_out(records, n_threads, lambda: check)
        for i, final in enumerate(self.files.final):
            mine = [(p, kept[p.number]) for p in self._places if p.file == i]
            if final and not (all(len(rows) == p.n_rows for p, rows in mine) and self.files.is_framed(i)):
                if not any(len(rows) for _, rows in mine):
                    raise OutputError(
                        f"{self.files.names[i]}: is not the file that this build made; move it away, or start again "
                        "with --restart"
                    )
                self.files.take_back(i)
        for number, rows in enumerate(kept):
            for row, end in zip(rows.starts, rows.ends, strict=True):
                self._note_durable(number, row, end - row)
        return kept

    # ------------------------------------------------------------ while the engine is at work

    def note(self, record: Record) -> None:
        """Rows have been written; they are recorded after the next sync."""
        with self._pending_lock:
            self._pending.append(record)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Sync and tell the journal every COMMIT_SECONDS, in a thread of its own."""
        stop, seconds = threading.Event(), _commit_seconds()

        def commit_in_turn() -> None:
            while not stop.wait(seconds) and self.failure is None:
                try:
                    self.commit()
                except BaseException as e:
                    self.failure = e
                    return

        thread = threading.Thread(target=commit_in_turn, name="quantkit-commit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def commit(self) -> None:
        """Sync what was written, then tell the journal; a file whose rows are all durable gets its name.
        Raises OutputError, and what check_sources raises."""
        with self._commit_lock:
            with self._pending_lock:
                records, self._pending = self._pending, []
            if not records:
                return
            try:
                for file in sorted({self._places[r.part].file for r in records}):
                    os.fdatasync(self.files.fds[file])
                self.check_sources()  # before the rows are recorded: they are good for as long as the journal is
                self._journal.tell(records)
            except OSError as e:
                # what a failed sync has lost cannot be told: nothing more may be claimed of this run
                self.failure = os_error(self.out, e)
                raise self.failure from None
            except QuantkitError as e:
                self.failure = e
                raise
            for r in records:
                self._note_durable(r.part, r.start, r.n)

    def _note_durable(self, number: int, row: int, n_rows: int) -> None:
        place, rows = self._places[number], self._durable[number]
        before = len(rows)
        rows.add(row, n_rows)
        if before < place.n_rows == len(rows):
            if self.on_whole is not None:
                self._at_work.append(self._after.submit(self._whole, self.on_whole, self._names[number]))
            self._missing[place.file] -= 1
            if not self._missing[place.file] and not self.files.together and len(self.files.names) > 1:
                self._finalize(place.file)

    def _whole(self, on_whole: Callable[[str], object], name: str) -> None:
        try:
            on_whole(name)
        except BaseException as e:
            self.failure = self.failure or e

    def _finalize(self, i: int) -> None:
        if not self.files.final[i]:
            self.check_sources()
            self.files.publish(i)

    def is_durable(self, name: str) -> bool:
        """Whether all rows of a tensor are on the disk."""
        place = self.files.places[name]
        return len(self._durable[place.number]) == place.n_rows

    @property
    def durable_bytes(self) -> int:
        return sum(len(rows) * p.row_bytes for rows, p in zip(self._durable, self._places, strict=True))

    # ------------------------------------------------------------ the end

    def finish(self, whole_file: bool) -> None:
        """Everything is written: sync, and give every file its name. `whole_file`: the one file was not written row by
        row. Raises OutputError, InternalCheckError, and what went wrong before."""
        self._raise_failure()
        self.commit()
        self.settle()
        self._raise_failure()
        left = [name for name in self._names if not self.is_durable(name)]
        if left and not whole_file:
            raise InternalCheckError(f"{self.out}: rows of {len(left)} tensors were not written, '{left[0]}' the first")
        try:
            self.files.sync()
            self.check_sources()
            self.files.publish_all()
        except OSError as e:
            raise os_error(self.out, e) from None

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Wait for what is done with whole tensors."""
        while wait(self._at_work, timeout=0.2).not_done:
            pass  # in short turns, so that Ctrl-C is heard

    def close(self) -> None:
        """Let go, when all that is done with whole tensors is done: it reads the files."""
        self.settle()
        self._after.shutdown()
        with suppress(OSError):
            self._journal.close()


def _commit_seconds() -> float:
    said = os.environ.get("QUANTKIT_COMMIT_SECONDS", str(COMMIT_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise OutputError(f"QUANTKIT_COMMIT_SECONDS is '{said}'; give seconds between 0 and 3600, such as 5")
    return seconds


def os_error(path: Path, e: OSError) -> OutputError:
    return OutputError(f"{path}: {e.strerror or e}; {mend(e)} and build again")


def mend(e: OSError) -> str:
    """What to do about it, in words."""
    return "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"

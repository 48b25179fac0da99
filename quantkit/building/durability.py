"""Tracks which rows of an unfinished build are durable, and orders the writes to disk.

Every few seconds the files are synced, the sources are checked, and then the journal records the rows written before. A
file gets its name in the output's folder when all its rows are durable, or, if that would replace older files, together
with all others at the end. When a build resumes, recorded rows are read back and compared. Work on complete tensors
(copying them to the cache) runs in its own thread; only the end waits for it.
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

#: seconds between syncs: the most finished work that a crash can cost; QUANTKIT_COMMIT_SECONDS overrides it
COMMIT_SECONDS = 5.0


class Durability:
    """A build's journal, and the order in which files, journal and names reach the disk. Thread-safe."""

    def __init__(self, out: Path, files: Files, journal: Journal, check_sources: Callable[[], None]) -> None:
        """`check_sources` raises if a source has changed; then no rows are recorded and no file gets its name."""
        self.out, self.files, self.check_sources = out, files, check_sources
        self._journal = journal
        self._places = list(files.places.values())
        self._names = list(files.places)
        self._durable = [Ranges() for _ in self._places]
        self._missing = [len(file_layout.tensors) for file_layout in files.file_layouts]
        self._pending: list[Record] = []
        self._pending_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self.failure: BaseException | None = None
        """the reason why nothing more may be recorded; raised by the next `put`, and by `finish`"""
        self.on_whole: Callable[[str], object] | None = None
        """called once per tensor when all its rows are durable, one at a time, while the files are open"""
        self._after = ThreadPoolExecutor(1, "quantkit-whole")
        self._at_work: list[Future[None]] = []

    # ------------------------------------------------------------ from before

    def read_back(
        self, records: Sequence[Record], n_threads: int, progress: Callable[[str, int], None]
    ) -> list[Ranges]:
        """Compare the journal's records with the disk; returns the rows of each tensor that match. `progress` is called
        with names and elements. Raises OSError, OutputError."""
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
        """Note rows that were written; the journal records them after the next sync."""
        with self._pending_lock:
            self._pending.append(record)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Commit every COMMIT_SECONDS in a separate thread."""
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
        """Sync the written rows, then record them in the journal; a file whose rows are all durable gets its name.
        Raises OutputError, and what check_sources raises."""
        with self._commit_lock:
            with self._pending_lock:
                records, self._pending = self._pending, []
            if not records:
                return
            try:
                for file in sorted({self._places[r.part].file for r in records}):
                    os.fdatasync(self.files.fds[file])
                self.check_sources()  # before recording: recorded rows stay valid as long as the journal does
                self._journal.tell(records)
            except OSError as e:
                # a failed sync may have lost anything: this run may record nothing more
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
        """Whether all rows of a tensor are durable."""
        place = self.files.places[name]
        return len(self._durable[place.number]) == place.n_rows

    @property
    def durable_bytes(self) -> int:
        return sum(len(rows) * p.row_bytes for rows, p in zip(self._durable, self._places, strict=True))

    # ------------------------------------------------------------ the end

    def finish(self, whole_file: bool) -> None:
        """End a complete build: sync, and give every file its name. `whole_file`: the one file was not written row by
        row. Raises OutputError, InternalCheckError, and any earlier failure."""
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
        """Wait for the work on complete tensors."""
        while wait(self._at_work, timeout=0.2).not_done:
            pass  # waits in short turns, so that Ctrl-C works

    def close(self) -> None:
        """Release the journal, after the work on complete tensors, which reads the files."""
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
    """The remedy, in words."""
    return "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"

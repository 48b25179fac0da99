"""An unfinished build on disk: the files being made, at their place in OUT.partial, and their journal.

Every few seconds the files are synced, and then the journal tells of the rows that were written before. What it told of
is read back and compared with its checksums when a build goes on. A file gets its name in the output's folder when all
its rows are durable; where that would replace older files, all get theirs together at the end. What gets a name is
the file that was written: both folders are held open (quantkit.base.folders), and all in them is reached that way.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import InternalCheckError, OutputError, QuantkitError, ResumeError
from ..base.files import read_at, write_at
from ..base.folders import Folder
from ..gguf.types import QTYPES
from ..planning.file_layout import FileLayout
from . import journal
from .folder import LOCK, SCRATCH, clear, folder_of, take
from .identity import difference
from .journal import Head, Record, RowSet
from .unfinished_files import Files

#: between syncs: the most work that a crash can cost, besides what is at work; QUANTKIT_COMMIT_SECONDS sets another
COMMIT_SECONDS = 5.0


class Place(NamedTuple):
    """Where a tensor's rows go. `number` counts the plan's tensors, `file` the output's files."""

    number: int
    file: int
    offset: int
    n_rows: int
    row_bytes: int
    n_cols: int


def places(file_layouts: Sequence[FileLayout]) -> dict[str, Place]:
    """The place of every tensor by name."""
    out: dict[str, Place] = {}
    for file, file_layout in enumerate(file_layouts):
        for p in file_layout.tensors:
            t = p.planned.tensor
            row_bytes = QTYPES[p.planned.type].row_bytes(t.n_cols)
            out[t.name] = Place(len(out), file, p.offset, t.n_rows, row_bytes, t.n_cols)
    return out


class Partial:
    """An unfinished build, held by this process: its files, its journal, and the sink of its engine."""

    def __init__(
        self,
        out: Path,
        files: Sequence[tuple[Path, FileLayout]],
        identity: Mapping[str, str],
        check_sources: Callable[[], None],
        replace: Collection[Path] = (),
    ) -> None:
        """`files` are the names and layouts of the output; `check_sources` raises when a source has changed: then
        no rows are told of and no file gets its name. `replace`: the names under which a file may be replaced. Nothing
        is done before `start`."""
        self.out, self.folder = out, folder_of(out)
        self.names = [name for name, _ in files]
        self.file_layouts = [file_layout for _, file_layout in files]
        self.places = places(self.file_layouts)
        self.identity = identity
        self.check_sources = check_sources
        self._replace = replace
        self.n_kept = 0
        """values of tensors that an earlier run made"""
        self._by_number = list(self.places)
        self._kept = [RowSet() for _ in self._by_number]
        self._durable = [RowSet() for _ in self._by_number]
        self._missing = [len(file_layout.tensors) for file_layout in self.file_layouts]
        self._lock_fd = self._journal_fd = -1
        self._held: list[Folder | Files] = []
        self._pending: list[Record] = []
        self._pending_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._failure: BaseException | None = None
        self._whole_file_accepted = False
        self._fresh = False
        self.on_whole: Callable[[str], None] = lambda _name: None
        """called when all rows of a tensor are on the disk for good"""

    # ------------------------------------------------------------ beginning

    def start(self, restart: bool, n_threads: int, progress: Callable[[str, int], None]) -> None:
        """Take the lock, and go on with what is there or begin. Raises ResumeError, OutputError."""
        try:
            self.above = self._hold_above()
            taken = take(self.out, {path.name for path in self.names})
            self._lock_fd, self.inside = taken.lock_fd, taken.folder
            self.files = Files(self.inside, self.above, self.names, self.file_layouts, self._replace)
            self._held += [self.inside, self.files]
            if restart:
                clear(self.inside)
            found = journal.read(self.inside, self.inside.own)
            named = [name.name for name in self.names if self.above.look(name.name) is not None]
            together = bool(named) if not (found and found.records) else any(
                self.inside.look(name) is not None for name in named
            )  # fmt: skip
            if found is not None and found.records:
                self._check_identity(found.head.identity)
            else:
                clear(self.inside)
                self._fresh = True
                now = datetime.now(timezone.utc).isoformat(" ", "seconds")
                found = None
                os.close(journal.create(self.inside, self._head(now)))
            self.files.open(found is not None, together)
            self.inside.sync()
            self.above.sync()
            self._journal_fd = self.inside.open(
                journal.NAME, os.O_WRONLY | os.O_APPEND, owner=self.inside.own, alone=True
            )
            if found is not None:
                os.ftruncate(self._journal_fd, found.nbytes)
                self._read_back(found.records, n_threads, progress)
            self.inside.remove(SCRATCH)
            self.scratch = self.inside.sub(SCRATCH, 0o700)
            self._held.append(self.scratch)
        except OSError as e:
            raise self._os_error(e) from None

    def _hold_above(self) -> Folder:
        try:
            self._held.append(above := Folder.hold(self.out.absolute().parent))
        except OSError as e:
            raise OutputError(f"{self.folder}: cannot be made: {e.strerror or e}; choose another place") from None
        return above

    def _check_identity(self, was: Mapping[str, str]) -> None:
        differs = difference(was, self.identity)
        if differs:
            raise ResumeError(
                f"{self.folder}: is an unfinished build of something else: {differs}; start again with --restart, or "
                "give another output"
            )

    def _head(self, started: str) -> Head:
        files = [
            (name.name, file_layout.nbytes) for name, file_layout in zip(self.names, self.file_layouts, strict=True)
        ]
        tensors = [(name, p.n_rows, p.row_bytes, p.file) for name, p in self.places.items()]
        return Head(started, dict(self.identity), files, tensors)

    def _read_back(self, records: Sequence[Record], n_threads: int, progress: Callable[[str, int], None]) -> None:
        """Compare what the journal tells of with what is on the disk, and keep what is equal."""
        sizes = [p.n_rows for p in self.places.values()]

        def is_there(r: Record) -> bool:
            if r.tensor >= len(sizes) or r.row + r.n_rows > sizes[r.tensor] or r.n_rows == 0:
                return False
            place = self.places[self._by_number[r.tensor]]
            raw = read_at(
                self.files.fds[place.file], r.n_rows * place.row_bytes, place.offset + r.row * place.row_bytes
            )
            return journal.digest(raw) == r.digest

        with ThreadPoolExecutor(n_threads) as pool:
            for r, there in zip(records, pool.map(is_there, records), strict=True):
                if there:
                    before = len(self._kept[r.tensor])
                    self._kept[r.tensor].add(r.row, r.n_rows)
                    name = self._by_number[r.tensor]
                    n = (len(self._kept[r.tensor]) - before) * self.places[name].n_cols
                    self.n_kept += n
                    progress(name, n)
        for i, final in enumerate(self.files.final):
            mine = [self._kept[p.number] for p in self.places.values() if p.file == i]
            whole = [p for p in self.places.values() if p.file == i and len(self._kept[p.number]) == p.n_rows]
            if final and not (len(whole) == len(mine) and self.files.is_framed(i)):
                if not any(len(rows) for rows in mine):
                    raise OutputError(
                        f"{self.names[i]}: is not the file that this build made; move it away, or start again with "
                        "--restart"
                    )
                self.files.take_back(i)
        for number, rows in enumerate(self._kept):
            for row, end in zip(rows.starts, rows.ends, strict=True):
                self._note_durable(number, row, end - row)

    # ------------------------------------------------------------ the sink

    @property
    def is_empty(self) -> bool:
        return not any(len(rows) for rows in self._kept)

    def has(self, name: str, row: int, n_rows: int) -> bool:
        return self._kept[self.places[name].number].covers(row, n_rows)

    def put(self, name: str, row: int, data: npt.NDArray[np.uint8]) -> None:
        if self._failure is not None:
            raise self._failure
        place = self.places[name]
        view = data.data.cast("B")
        at = place.offset + row * place.row_bytes
        try:
            write_at(self.files.fds[place.file], view, at)
        except OSError as e:
            raise OutputError(
                f"{self.folder / self.names[place.file].name}: writing '{name}' at {at:,} failed: "
                f"{e.strerror or e}; {_mend(e)} and build again"
            ) from None
        self.note(name, row, len(data), journal.digest(view))

    def note(self, name: str, row: int, n_rows: int, digest: bytes) -> None:
        """Rows have been written by other means; `digest` is journal.digest of their bytes."""
        with self._pending_lock:
            self._pending.append(Record(self.places[name].number, row, n_rows, digest))

    def have_whole(self, name: str) -> None:
        """All rows of a tensor have been written and told of with `note`: no engine need make them."""
        self._kept[self.places[name].number].add(0, self.places[name].n_rows)

    def target(self, name: str) -> tuple[int, Place]:
        """The descriptor and place of a tensor, for writing by other means; tell with `note`."""
        return self.files.fds[self.places[name].file], self.places[name]

    def discard_rows(self) -> None:
        os.ftruncate(self.files.fds[0], 0)

    def accept_whole_file(self, name: str) -> None:
        fd = self.scratch.open(name, os.O_RDWR, alone=True)
        self.files.replace(0, fd, self.scratch, name)
        self._whole_file_accepted = True

    # ------------------------------------------------------------ durable

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Sync and tell the journal every COMMIT_SECONDS, in a thread of its own."""
        stop, seconds = threading.Event(), _commit_seconds()

        def commit_in_turn() -> None:
            while not stop.wait(seconds):
                try:
                    self.commit()
                except BaseException as e:
                    self._failure = e  # the next `put`, or `finish`, raises it
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
                for file in sorted({self.places[self._by_number[r.tensor]].file for r in records}):
                    os.fdatasync(self.files.fds[file])
                self.check_sources()  # before the rows are told of: they are good for as long as the journal is
                journal.append(self._journal_fd, records)
            except OSError as e:
                # what a failed sync has lost cannot be told: nothing more may be claimed of this run
                self._failure = self._os_error(e)
                raise self._failure from None
            except QuantkitError as e:
                self._failure = e
                raise
            for r in records:
                self._note_durable(r.tensor, r.row, r.n_rows)

    def _note_durable(self, number: int, row: int, n_rows: int) -> None:
        place = self.places[self._by_number[number]]
        rows = self._durable[number]
        before = len(rows)
        rows.add(row, n_rows)
        if before < place.n_rows == len(rows):
            self.on_whole(self._by_number[number])
            self._missing[place.file] -= 1
            if not self._missing[place.file] and not self.files.together and len(self.names) > 1:
                self._finalize(place.file)

    def _finalize(self, i: int) -> None:
        if not self.files.final[i]:
            self.check_sources()
            os.fsync(self.files.fds[i])
            self.files.give_name(i)
            self.above.sync()
            self.inside.sync()

    def is_durable(self, name: str) -> bool:
        """Whether all rows of a tensor are on the disk."""
        return len(self._durable[self.places[name].number]) == self.places[name].n_rows

    @property
    def durable_bytes(self) -> int:
        return sum(len(self._durable[p.number]) * p.row_bytes for p in self.places.values())

    # ------------------------------------------------------------ the end

    def finish(self) -> None:
        """Everything is written: sync, give every file its name, remove the folder. Raises OutputError,
        InternalCheckError."""
        if self._failure is not None:
            raise self._failure
        self.commit()
        left = [n for n in self.places if not self.is_durable(n)]
        if left and not self._whole_file_accepted:
            raise InternalCheckError(f"{self.out}: rows of {len(left)} tensors were not written, '{left[0]}' the first")
        try:
            for i, (fd, file_layout) in enumerate(zip(self.files.fds, self.file_layouts, strict=True)):
                size = os.fstat(fd).st_size
                if size != file_layout.nbytes:
                    raise InternalCheckError(f"{self.names[i]}: has {size:,} bytes, planned are {file_layout.nbytes:,}")
                os.fsync(fd)
            self.check_sources()
            # the first shard last: without it the others are not taken for a model
            for i in reversed(range(len(self.names))):
                if not self.files.final[i]:
                    self.files.give_name(i)
            self.above.sync()
        except OSError as e:
            raise self._os_error(e) from None
        self._remove()

    def abort(self, keep: bool) -> str | None:
        """The build ends early: what was written is kept for the next run, if there is any and `keep`. Says so."""
        if self._lock_fd < 0:
            self.close()
            return None
        with suppress(Exception):
            if keep and self._failure is None:
                self.commit()
        done, total = self.durable_bytes, sum(p.n_rows * p.row_bytes for p in self.places.values())
        keep = any(self.files.final) or (keep and (done > 0 or not self._fresh))
        if not keep:
            self._remove()
            return None
        with suppress(OSError):
            self.inside.remove(SCRATCH)
        self.close()
        return (
            f"{done:,} of {total:,} bytes are kept in {self.folder}: the same command goes on from there, "
            "--restart starts again"
        )

    def _remove(self) -> None:
        """Remove the folder and let go. The lock is held to the end, and goes last: who gets it next finds nothing of
        ours, and who is ended between finds the journal as long as there is anything else."""
        with suppress(OSError):
            clear(self.inside)
            self.inside.unlink(LOCK)
        os.close(self._lock_fd)
        self._lock_fd = -1
        with suppress(OSError):
            os.rmdir(self.folder.name, dir_fd=self.above.fd)
        self.close()

    def close(self) -> None:
        """Let go of files, lock and folders."""
        for fd in (self._journal_fd, self._lock_fd):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        for held in reversed(self._held):
            held.close()
        self._journal_fd, self._lock_fd, self._held = -1, -1, []

    def _os_error(self, e: OSError) -> OutputError:
        return OutputError(f"{self.out}: {e.strerror or e}; {_mend(e)} and build again")


def _commit_seconds() -> float:
    said = os.environ.get("QUANTKIT_COMMIT_SECONDS", str(COMMIT_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise OutputError(f"QUANTKIT_COMMIT_SECONDS is '{said}'; give seconds between 0 and 3600, such as 5")
    return seconds


def _mend(e: OSError) -> str:
    return "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"

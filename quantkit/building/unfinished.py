"""An unfinished build on disk: its files in OUT.partial, and their journal.

Begins, resumes and ends a build. quantkit.building.unfinished_files manages its files, .durability decides when they
are durable and what the journal records, .sink is the engine's view. Names are given only to the files that were
written: both folders are held open (quantkit.base.folders), and everything in them is accessed through these handles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from ..base.errors import OutputError
from ..base.folders import Folder
from ..base.journal import Journal, Ranges
from ..base.lock import Lock
from ..planning.file_layout import FileLayout
from . import journal
from .durability import Durability, os_error
from .folder import LASTING, LOCK, SCRATCH, SOURCE, clear, fetched, folder_of, take
from .identity import require_same
from .journal import Head, ToldBuild
from .sink import RowSink
from .unfinished_files import Files, places


class _Held(Protocol):
    def close(self) -> None: ...


class UnfinishedBuild:
    """An unfinished build, held by this process."""

    def __init__(
        self,
        out: Path,
        files: Sequence[tuple[Path, FileLayout]],
        identity: Mapping[str, str],
        check_sources: Callable[[], None],
        replace: Collection[Path] = (),
    ) -> None:
        """`files` are the names and layouts of the output. `check_sources` raises if a source has changed; then no rows
        are recorded and no file gets its name. `replace`: names under which an existing file may be replaced. Does
        nothing before `start`."""
        self.out, self.folder = out, folder_of(out)
        self.names = [name for name, _ in files]
        self.file_layouts = [file_layout for _, file_layout in files]
        self.places = places(self.file_layouts)
        self.identity = identity
        self.check_sources = check_sources
        self._replace = replace
        self.n_kept = 0
        """elements of tensors that an earlier run made"""
        self._lock: Lock | None = None
        self._held: list[_Held] = []
        self._durability: Durability | None = None
        self._fresh = False

    # ------------------------------------------------------------ beginning

    def start(self, restart: bool, n_threads: int, progress: Callable[[str, int], None]) -> None:
        """Take the lock, and resume what exists, or begin. Raises ResumeError, OutputError."""
        try:
            self.above = self._hold_above()
            taken = take(self.out, {path.name for path in self.names})
            self._lock, self.inside = taken.lock, taken.folder
            self._held.append(self.inside)
            self.files = Files(self.inside, self.above, self.names, self.file_layouts, self._replace)
            self._held.append(self.files)
            if restart:
                clear(self.inside)
            found = journal.read(self.inside, self.inside.own)
            named = [name.name for name in self.names if self.above.look(name.name) is not None]
            together = bool(named) if not (found and found.records) else any(
                self.inside.look(name) is not None for name in named
            )  # fmt: skip
            self._durability = Durability(self.out, self.files, self._journal(found), self.check_sources)
            self._held.append(self._durability)
            self.files.open(not self._fresh, together)
            self.inside.sync()
            self.above.sync()
            kept = [Ranges() for _ in self.places]
            if found is not None and not self._fresh:
                kept = self._durability.read_back(found.records, n_threads, progress)
                self.n_kept = sum(len(kept[p.number]) * p.n_cols for p in self.places.values())
            self.inside.remove(SCRATCH)
            self.scratch = self.inside.sub(SCRATCH, 0o700)
            self._held.append(self.scratch)
            self.sink = RowSink(self.files, self._durability, self.scratch, kept)
        except OSError as e:
            raise os_error(self.out, e) from None

    @property
    def durability(self) -> Durability:
        """Available after `start`."""
        assert self._durability is not None
        return self._durability

    def source_folder(self) -> Path:
        """The folder for shards of the source, made if necessary. Raises OSError."""
        with self.inside.sub(SOURCE, 0o700) as folder:
            if not folder.is_own:
                raise OutputError(f"{folder.path}: belongs to another user; have it moved away")
            return folder.path

    def _hold_above(self) -> Folder:
        try:
            self._held.append(above := Folder.hold(self.out.absolute().parent))
        except OSError as e:
            raise OutputError(f"{self.folder}: cannot be made: {e.strerror or e}; choose another place") from None
        return above

    def _journal(self, found: ToldBuild | None) -> Journal:
        """Resume a journal that has rows, or begin one in an emptied folder. Raises ResumeError, OSError."""
        if found is not None and found.records:
            require_same(self.folder, found.head.identity, self.identity)
            return Journal.go_on(self.inside, journal.NAME, found)
        clear(self.inside, but=(SOURCE,))
        self._fresh = True
        files = [
            (name.name, file_layout.nbytes) for name, file_layout in zip(self.names, self.file_layouts, strict=True)
        ]
        tensors = [(name, p.n_rows, p.row_bytes, p.file) for name, p in self.places.items()]
        now = datetime.now(timezone.utc).isoformat(" ", "seconds")
        return journal.begin(self.inside, Head(now, dict(self.identity), files, tensors))

    def lasting(self) -> Path:
        """The folder inside for results with which an engine resumes."""
        with self.inside.sub(LASTING, 0o700) as folder:
            return folder.path

    # ------------------------------------------------------------ the end

    def finish(self) -> None:
        """End a complete build: sync, give every file its name, remove the folder. Raises OutputError,
        InternalCheckError."""
        self.durability.finish(self.sink.whole_file_accepted)
        self._remove()

    def abort(self, keep: bool) -> str | None:
        """End a build early. With `keep`, anything written is kept for the next run; returns a note that says so."""
        if self._lock is None:
            self.close()
            return None
        done, total = 0, sum(p.n_rows * p.row_bytes for p in self.places.values())
        if self._durability is not None:
            with suppress(Exception):
                if keep and self._durability.failure is None:
                    self._durability.commit()
            done = self._durability.durable_bytes
        came = 0
        with suppress(OSError):
            came = fetched(self.inside)
        keep = any(self.files.final) or (keep and (done > 0 or came > 0 or not self._fresh))
        if not keep:
            self._remove()
            return None
        with suppress(OSError):
            self.inside.remove(SCRATCH)
        self.close()
        return (
            f"{done:,} of {total:,} bytes{f', and {came:,} of the source,' if came else ''} are kept in {self.folder}: "
            "the same command goes on from there, --restart starts again"
        )

    def _remove(self) -> None:
        """Remove the folder and release it. The lock is held to the end and removed last, so the next holder finds
        nothing of this build, and after a crash the journal exists as long as anything else does."""
        with suppress(OSError):
            clear(self.inside)
            self.inside.unlink(LOCK)
        if self._lock is not None:
            self._lock.close()
        with suppress(OSError):
            os.rmdir(self.folder.name, dir_fd=self.above.fd)
        self.close()

    def close(self) -> None:
        """Release files, lock and folders."""
        while self._held:
            with suppress(OSError):
                self._held.pop().close()
        if self._lock is not None:
            self._lock.close()

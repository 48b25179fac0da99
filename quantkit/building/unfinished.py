"""An unfinished build on disk: the files being made, at their place in OUT.partial, and their journal.

Here it is begun, continued, and ended. quantkit.building.unfinished_files has its files, .durability says when they
are on the disk and what the journal tells, .sink is what an engine sees. What gets a name is the file that was written:
both folders are held open (quantkit.base.folders), and all in them is reached that way.
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
        """`files` are the names and layouts of the output; `check_sources` raises when a source has changed: then
        no rows are recorded and no file gets its name. `replace`: the names under which a file may be replaced. Nothing
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
        self._lock: Lock | None = None
        self._held: list[_Held] = []
        self._durability: Durability | None = None
        self._fresh = False

    # ------------------------------------------------------------ beginning

    def start(self, restart: bool, n_threads: int, progress: Callable[[str, int], None]) -> None:
        """Take the lock, and go on with what is there or begin. Raises ResumeError, OutputError."""
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
        """There after `start`."""
        assert self._durability is not None
        return self._durability

    def source_folder(self) -> Path:
        """Where shards of the source are kept, made if need be. Raises OSError."""
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
        """To go on with one that has rows, or a new one in an empty folder. Raises ResumeError, OSError."""
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
        """A folder inside, for what an engine goes on with after it was stopped."""
        with self.inside.sub(LASTING, 0o700) as folder:
            return folder.path

    # ------------------------------------------------------------ the end

    def finish(self) -> None:
        """Everything is written: sync, give every file its name, remove the folder. Raises OutputError,
        InternalCheckError."""
        self.durability.finish(self.sink.whole_file_accepted)
        self._remove()

    def abort(self, keep: bool) -> str | None:
        """The build ends early: what was written is kept for the next run, if there is any and `keep`. Says so."""
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
        """Remove the folder and let go. The lock is held to the end, and goes last: who gets it next finds nothing of
        ours, and who is ended between finds the journal as long as there is anything else."""
        with suppress(OSError):
            clear(self.inside)
            self.inside.unlink(LOCK)
        if self._lock is not None:
            self._lock.close()
        with suppress(OSError):
            os.rmdir(self.folder.name, dir_fd=self.above.fd)
        self.close()

    def close(self) -> None:
        """Let go of files, lock and folders."""
        while self._held:
            with suppress(OSError):
                self._held.pop().close()
        if self._lock is not None:
            self._lock.close()

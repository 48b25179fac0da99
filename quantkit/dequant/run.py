"""Moving the data: from a checked plan to a finished directory, with several threads, bounded memory, and resuming.

Work is cut into slabs: a few rows of an FP8 weight, or a few MiB of any other tensor. A thread reads a slab,
decodes it, and writes it at its own offset, so memory is threads x slab whatever the model's
size. The thread that writes the last slab of a shard syncs and renames it while the others
go on. Each slab's checksum is taken as it is written; a resumed run reads the finished shards back.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.copying import Opened, copy_range
from ..base.errors import OutputError, ResumeError
from ..base.files import NewFile, write_at
from ..base.folders import Folder
from ..base.journal import Journal, Record, Told, digest, is_there, temporary_name
from ..base.lock import HeldError, Lock
from ..base.workers import share_out
from ..model.sources.safetensors_dir import Checkpoint
from ..model.sources.safetensors_header import DTYPE_BYTES, INDEX
from .beside import open_to_copy
from .decode import Decoder, Fp8Rows
from .place import hold, part_of, place_of, replacing
from .plan import CONFIG, FP8, DequantOptions, DequantPlan, Moved, Shard, plan_dequant
from .state import OF, STATE, finished, leftovers, read_state, require_same, state_of

#: called with the name of the current tensor and the bytes written since the last call
Progress = Callable[[str, int], None]

#: bytes in a slab of a tensor that is copied unchanged
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can start."""

    source: Checkpoint
    plan: DequantPlan
    dst: Path
    finished: Mapping[str, list[Record]]
    """shards that an earlier run finished, by name, with their journal records; `run` reads them back"""
    state: dict[str, Any]
    """what identifies this run"""
    found: Told[dict[str, Any]] | None
    """the journal of the unfinished run"""
    restart: bool

    @property
    def todo(self) -> tuple[Shard, ...]:
        return tuple(s for s in self.plan.shards if s.name not in self.finished)

    @property
    def done(self) -> tuple[Shard, ...]:
        return tuple(s for s in self.plan.shards if s.name in self.finished)

    @property
    def need_bytes(self) -> int:
        """Bytes still to be written."""
        return self.plan.nbytes - sum(s.nbytes for s in self.done)


def prepare(source: Checkpoint, dst: Path, options: DequantOptions, restart: bool = False) -> Job:
    """Check everything that can be checked before the first byte; nothing is written. With `restart`, what an
    unfinished run left in `dst` is ignored. Raises SourceError, OutputError, ResumeError."""
    plan = plan_dequant(source, options)
    state = state_of(source, plan)
    try:
        return _prepare(source, plan, dst, state, restart)
    except OSError as e:
        raise OutputError(f"{dst}: {e.strerror or e}; choose another directory") from None


def _prepare(source: Checkpoint, plan: DequantPlan, dst: Path, state: dict[str, Any], restart: bool) -> Job:
    _check_place(source.path, dst)
    folder = hold(dst)
    with nullcontext() if folder is None else folder:
        found = read_state(folder)
        done: dict[str, list[Record]] = {}
        if folder is not None and found is None:
            if any(name != temporary_name(STATE) for name in folder.names()):
                raise OutputError(f"{dst}: is not empty, and holds no unfinished run; choose another directory")
        elif folder is not None and found is not None and not restart:
            require_same(dst, found.head, state)
            done = finished(folder, plan, found.records)
        freed = sum(nbytes for _, nbytes in leftovers(folder, found, restart))
    job = Job(source, plan, dst, done, state, found, restart)
    free = shutil.disk_usage(dst if dst.is_dir() else dst.parent).free + freed
    if job.need_bytes > free:
        raise OutputError(
            f"{dst}: {job.need_bytes:,} bytes are to be written, but {free:,} are free; free {job.need_bytes - free:,} "
            "more, or choose another place"
        )
    return job


def _check_place(src: Path, dst: Path) -> None:
    if dst.exists() and not dst.is_dir():
        raise OutputError(f"{dst}: is a file; give the name of the directory to make")
    if not dst.absolute().parent.is_dir():
        raise OutputError(f"{dst}: there is no directory {dst.absolute().parent}; create it first")
    real, of = dst.resolve(), src.resolve()
    if real == of or of in real.parents:
        raise OutputError(f"{dst}: is the source, or inside it; choose another directory")
    existing = dst if dst.is_dir() else dst.absolute().parent
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise OutputError(f"{existing}: no permission to read and write there")


def run(job: Job, decoder: Decoder, n_threads: int, progress: Progress) -> tuple[str, ...]:
    """Make the directory. Shards that an earlier run finished are read back first; those that have changed are made
    again, and their names returned. `progress` counts the bytes read back, too, and subtracts those of a damaged
    shard's tensors. If the run ends early, finished shards stay for the next run; if there are none, nothing stays.
    Raises WeightError for a value that is not finite in the dtype, SourceError, OutputError, ResumeError."""
    try:
        with _begun(job) as (folder, state):
            damaged = _damaged(job, folder, n_threads, progress)
            todo = replace(job, finished={name: told for name, told in job.finished.items() if name not in damaged})
            if damaged:
                state.begin(todo)
            for name in damaged:
                folder.unlink(name)
            _Mover(todo, folder, decoder, progress, state).run(n_threads)
            for name, _ in job.plan.carried:
                with place_of(folder, name, make=True) as (inner, last), replacing(inner, last) as fd:
                    _copy(job.source.path, name, Opened(fd, job.dst / name))
            for name, data in ((INDEX, job.plan.index), (CONFIG, job.plan.config)):
                if data is not None:
                    with replacing(folder, name) as fd:
                        write_at(fd, data, 0)
            folder.unlink(STATE)
            folder.sync()
            return damaged
    except OSError as e:
        where = job.dst / e.filename if isinstance(e.filename, str) else job.dst
        raise OutputError(
            f"{where}: {e.strerror or e}; fix that and run the same command again: finished shards are kept"
        ) from None


@contextmanager
def _begun(job: Job) -> Iterator[tuple[Folder, _State]]:
    """Hold the directory against other runs, with the journal in it and unfinished files removed."""
    made = not job.dst.exists()
    job.dst.mkdir(exist_ok=True)
    with Folder.hold(job.dst) as folder:
        try:
            lock = Lock.of_folder(folder)
        except HeldError:
            raise ResumeError(f"{job.dst}: another quantkit is running there; wait for it") from None
        with lock, closing(_State(folder)) as state:
            if read_state(folder) != job.found:
                raise ResumeError(f"{job.dst}: has changed in the meantime; run the same command again")
            for name, _ in leftovers(folder, job.found, job.restart):
                with place_of(folder, name) as (inner, last):
                    inner.unlink(last)
            try:
                state.begin(job)
                yield folder, state
            except BaseException:
                if not any(folder.look(s.name) is not None for s in job.plan.shards):
                    _undo(job, folder, made)
                raise


def _undo(job: Job, folder: Folder, made: bool) -> None:
    with suppress(OSError):
        with suppress(FileNotFoundError):
            folder.unlink(STATE)
        if made:
            job.dst.rmdir()


def _copy(source: Path, name: str, to: Opened) -> None:
    """Copy a file of the source folder. Raises SourceError, OutputError."""
    fd = open_to_copy(source, name)
    try:
        copy_range(Opened(fd, source / name), 0, to, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


class _State:
    """The journal, which records each shard once it is finished. Its methods raise OSError, OutputError."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    def begin(self, job: Job) -> None:
        """Start the journal afresh with the records of the finished shards."""
        self.close()
        told = [record for records in job.finished.values() for record in records]
        self._journal = Journal.begin(self.folder, STATE, OF, job.state, told)

    def tell(self, records: Sequence[Record]) -> None:
        assert self._journal is not None
        with self._lock:
            self._journal.tell(records)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def _damaged(job: Job, folder: Folder, n_threads: int, progress: Progress) -> tuple[str, ...]:
    """Return the finished shards whose bytes have changed since they were written, or cannot be read."""
    damaged = set()

    def check(piece: tuple[Shard, Record]) -> None:
        shard, told = piece
        sound = False
        with suppress(OSError, OutputError), open(folder.open(shard.name, owner=folder.own), "rb") as f:
            sound = is_there(f.fileno(), told.start, told.n, told.digest)
        if not sound:
            damaged.add(shard.name)
        progress(shard.name, told.n)

    pieces = ((shard, told) for shard in job.done for told in job.finished[shard.name])
    share_out(pieces, n_threads, lambda: check)
    for shard in job.done:
        if shard.name in damaged:
            progress(shard.name, -shard.tensor_bytes)
    return tuple(s.name for s in job.done if s.name in damaged)


class _File:
    """A shard being written under its temporary name."""

    def __init__(self, folder: Folder, number: int, shard: Shard, n_slabs: int) -> None:
        self.folder, self.number, self.name = folder, number, shard.name
        self.path = folder.path / shard.name
        self.records: list[Record] = []
        self.left = n_slabs
        self.new = NewFile(folder, part_of(shard.name))
        try:
            with self._writing("making it", shard.nbytes):
                os.ftruncate(self.new.fd, shard.nbytes)
            self.write(np.frombuffer(shard.header, np.uint8), 0)
        except BaseException:
            self.close()
            raise

    def write(self, data: npt.NDArray[np.uint8], offset: int) -> None:
        view = data.data.cast("B")
        self.records.append(Record(self.number, offset, len(view), digest(view)))
        with self._writing("writing", offset):
            write_at(self.new.fd, view, offset)

    @contextmanager
    def _writing(self, what: str, at: int) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise OutputError(
                f"{self.path}: {what} at {at:,} bytes failed: {e.strerror or e}; free some space and run the same "
                "command again: finished shards are kept"
            ) from None

    def finish(self, state: _State) -> None:
        """Sync the file, record it, then give it its name."""
        os.fsync(self.new.fd)
        state.tell(self.records)
        self.new.publish(self.folder, self.name)
        self.close()

    def close(self) -> None:
        self.new.close()


class _Slab(NamedTuple):
    file: _File
    tensor: Moved
    start: int
    """first row in an FP8 weight, else first byte in the tensor"""
    n: int


class _Mover:
    """The remaining shards, as slabs in order, and the threads that process them."""

    def __init__(self, job: Job, folder: Folder, decoder: Decoder, progress: Progress, state: _State) -> None:
        self.job, self.folder = job, folder
        self.state = state
        self.decoder = decoder
        self.progress = progress
        self.lock = threading.Lock()
        self.open: list[_File] = []

    def run(self, n_threads: int) -> None:
        try:
            share_out(self._slabs(), n_threads, self._new_worker)
        finally:
            for file in self.open:
                file.close()

    def _new_worker(self) -> Callable[[_Slab], None]:
        worker = _Worker(self.job.source, self.decoder)

        def do(slab: _Slab) -> None:
            self.progress(slab.tensor.source.name, worker.do(slab))
            self._done(slab.file)

        return do

    def _slabs(self) -> Iterator[_Slab]:
        """Yield every slab; a shard's file is created when its first slab is taken."""
        for number, shard in enumerate(self.job.plan.shards):
            if shard.name in self.job.finished:
                continue
            file = _File(self.folder, number, shard, sum(1 for t in shard.tensors for _ in self._cuts(t)))
            with self.lock:
                self.open.append(file)
            if file.left == 0:
                file.finish(self.state)
            for tensor in shard.tensors:
                for start, n in self._cuts(tensor):
                    yield _Slab(file, tensor, start, n)

    def _cuts(self, tensor: Moved) -> Iterator[tuple[int, int]]:
        whole, step = tensor.nbytes, _COPY_BYTES
        if tensor.source.dtype == FP8:
            n_rows, n_cols = tensor.source.shape
            whole, step = (n_rows if n_cols else 0), max(1, self.decoder.slab_values // max(1, n_cols))
        for start in range(0, whole, step):
            yield start, min(step, whole - start)

    def _done(self, file: _File) -> None:
        with self.lock:
            file.left -= 1
            last = file.left == 0
        if last:
            file.finish(self.state)
            with self.lock:
                self.open.remove(file)


class _Worker:
    """The buffers of one thread, and the steps for a slab."""

    def __init__(self, source: Checkpoint, decoder: Decoder) -> None:
        self.source = source
        self.decoder = decoder
        self.stored = np.empty(0, np.uint8)
        self.made = np.empty(0, np.uint8)
        self.scale = np.empty((0, 0), np.float32)
        self.scale_of = ""

    def do(self, slab: _Slab) -> int:
        """Make and write a slab; return the bytes written."""
        tensor, source = slab.tensor, slab.tensor.source
        if source.dtype == FP8:
            n_cols = source.shape[1]
            row_bytes = n_cols * DTYPE_BYTES[tensor.dtype]
            self.stored = _grown(self.stored, slab.n * n_cols)
            self.made = _grown(self.made, slab.n * row_bytes)
            stored = self.stored[: slab.n * n_cols].reshape(slab.n, n_cols)
            made = self.made[: slab.n * row_bytes].reshape(slab.n, row_bytes)
            self.source.read(source, slab.start * n_cols, stored)
            if self.scale_of != source.name:
                self.scale, self.scale_of = np.ascontiguousarray(self.source.scale(source.name)), source.name
            self.decoder(Fp8Rows(source, slab.start, stored, self.scale, self.source.block), tensor.dtype, made)
            offset = slab.start * row_bytes
        else:
            self.made = _grown(self.made, slab.n)
            made, offset = self.made[: slab.n], slab.start
            self.source.read(source, offset, made)
        slab.file.write(made, tensor.offset + offset)
        return made.nbytes


def _grown(buffer: npt.NDArray[np.uint8], n: int) -> npt.NDArray[np.uint8]:
    return buffer if buffer.size >= n else np.empty(n, np.uint8)

"""The files that shards.py plans, made: checked against what is there, copied, and given their names together.

They are made in a hidden folder beside the output, under names that end in `.part`, and each gets its
header last. When all are whole and on disk they get their own names, the first shard last: without it the others are
not taken for a model. What ends the work before that leaves the output as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import output_files
from .copying import Opened, Progress, copy_range, write_at
from .disk import sync
from .errors import OutputError, SourceError
from .output_files import Output
from .shards import Input, OutputFile, ShardSet


def check_output(model: ShardSet, files: Sequence[OutputFile], force: bool = False) -> None:
    """Raises OutputError for a place that cannot be written to, names that are taken, or too little space."""
    folder = files[0].path.parent
    outputs = [Output(file.path, replace=force, suffix=".part") for file in files]
    output_files.check([source.path for source in model.inputs], outputs)
    need, free = sum(file.nbytes for file in files), shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            f"{folder}: the output needs {need:,} bytes, but {free:,} are free; free {need - free:,} more, or choose "
            "another place"
        )


def write(
    model: ShardSet, files: Sequence[OutputFile], progress: Progress | None = None, force: bool = False
) -> dict[str, int]:
    """Make the files and give them their names. Returns the bytes moved by each way of copying.

    Raises SourceError if a file of the set has changed since its header was read, OutputError for what cannot
    be written, or if without `force` a name was taken meanwhile. The output is then as it was before.
    """
    folder = files[0].path.parent
    how: dict[str, int] = {}
    try:
        with _scratch(folder) as scratch, _Sources(model.inputs) as sources:
            made = [(scratch / f"{file.path.name}.part", file.path) for file in files]
            for (temporary, _), file in zip(made, files, strict=True):
                _write_file(temporary, file, sources, how, progress)
            for temporary, _ in made:
                sync(temporary)
            sources.check_all()
            _publish(made, scratch, force)
            sync(folder)
    except OSError as e:
        raise OutputError(f"{files[0].path}: {e.strerror or e}; nothing was changed: mend that and try again") from None
    return how


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".quantkit-shards-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_file(
    temporary: Path, file: OutputFile, sources: _Sources, how: dict[str, int], progress: Progress | None
) -> None:
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        target = Opened(fd, file.path)  # messages name what was asked for
        os.ftruncate(fd, file.nbytes)
        for piece in file.ranges:
            moved = _Moved(fd, piece.dst_offset, progress)
            way = copy_range(sources.open(piece.file), piece.src_offset, target, piece.dst_offset, piece.nbytes, moved)
            how[way] = how.get(way, 0) + piece.nbytes
        write_at(target, 0, file.header)
    finally:
        os.close(fd)


class _Moved:
    """Progress of a range: has the kernel start to write what was copied, so that syncing has little left to do."""

    def __init__(self, fd: int, offset: int, progress: Progress | None) -> None:
        self._fd, self._at, self._progress = fd, offset, progress

    def __call__(self, nbytes: int) -> None:
        # on dirty pages this begins their writing and does not wait; only clean ones would be dropped
        os.posix_fadvise(self._fd, self._at, nbytes, os.POSIX_FADV_DONTNEED)
        self._at += nbytes
        if self._progress is not None:
            self._progress(nbytes)


class _Sources:
    """The files of a set, one open at a time. Each must be the one whose header was read, before and after."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self._inputs = inputs
        self._file = -1
        self._fd = -1

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def open(self, file: int) -> Opened:
        source = self._inputs[file]
        if file != self._file:
            self._close()
            try:
                self._fd = os.open(source.path, os.O_RDONLY)
            except OSError as e:
                raise SourceError(f"{source.path}: cannot be opened: {e.strerror or e}") from None
            self._file = file
            self._check(source, os.fstat(self._fd))
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return Opened(self._fd, source.path)

    def check_all(self) -> None:
        """Raises SourceError if a file is not what it was when its header was read."""
        for source in self._inputs:
            try:
                self._check(source, os.stat(source.path))
            except OSError as e:
                raise SourceError(f"{source.path}: went away while it was read: {e.strerror or e}") from None

    def _check(self, source: Input, now: os.stat_result) -> None:
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (source.nbytes, source.mtime_ns, source.inode):
            raise SourceError(f"{source.path}: has changed since its header was read; try again when it is complete")

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._file = self._fd = -1


def _publish(made: Sequence[tuple[Path, Path]], scratch: Path, force: bool) -> None:
    """Rename all, or none: files that are replaced are kept until the new ones have their names.

    The first shard goes first and comes last, so that at no moment new and old shards look like one model."""
    old = scratch / "replaced"
    old.mkdir()
    try:
        for _, path in made:
            if os.path.lexists(path):
                output_files.check_replaceable(path, force)
                os.replace(path, old / path.name)
        for temporary, path in reversed(made):
            os.replace(temporary, path)
    except BaseException:
        for temporary, path in made:
            if not temporary.exists():
                path.unlink(missing_ok=True)
        for _, path in reversed(made):
            if os.path.lexists(old / path.name):
                os.replace(old / path.name, path)
        raise

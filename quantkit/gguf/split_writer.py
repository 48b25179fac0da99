"""Making the files that split.py plans: they are checked against what exists, copied, and renamed together.

They are made in a hidden folder beside the output (quantkit.gguf.split_folder), under names that end in `.part`;
each gets its header last. Once all are complete and on disk they get their own names, the first shard last, since
without it the others do not look like a model. If the work stops earlier, the output stays as it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from ..base.copying import Opened, Progress, copy_range, write_at
from ..base.errors import OutputError, SourceError
from ..base.folders import Folder
from ..base.outputs import Output, check, check_replaceable
from .split import Input, OutputFile, ShardSet
from .split_folder import (
    DONE,
    REPLACED,
    Made,
    SplitFolder,
    bytes_there,
    hidden_folder,
    is_still,
    known,
    take_back,
    temporary_of,
)


def check_output(model: ShardSet, files: Sequence[OutputFile], force: bool = False) -> None:
    """Raise OutputError if the place is not writable, names are taken, or there is too little space."""
    folder = files[0].path.parent
    outputs = [Output(file.path, replace=force, suffix=".part") for file in files]
    check([source.path for source in model.inputs], outputs)
    need, free = sum(file.nbytes for file in files), shutil.disk_usage(folder).free + bytes_there(files[0].path)
    if need > free:
        raise OutputError(
            f"{folder}: the output needs {need:,} bytes, but {free:,} are free; free {need - free:,} more, or choose "
            "another place"
        )


def write(
    model: ShardSet, files: Sequence[OutputFile], progress: Progress | None = None, force: bool = False
) -> dict[str, int]:
    """Make the files and give them their names. Returns the bytes copied in each way.

    Raises SourceError if a file of the set has changed since its header was read, OutputError if the output cannot
    be written, or without `force` if a name was taken meanwhile, ResumeError while another process makes the same. The
    output then stays as it was.
    """
    how: dict[str, int] = {}
    try:
        with Folder.hold(files[0].path.absolute().parent) as folder, hidden_folder(folder, model, files) as hidden:
            with _Sources(model.inputs) as sources:
                made = _make(hidden, files, sources, how, progress)
                sources.check_all()
            _publish(made, hidden.folder, folder, force)
            folder.sync()
            hidden.folder.rename(REPLACED, hidden.folder, DONE)
    except OSError as e:
        raise OutputError(f"{files[0].path}: {e.strerror or e}; nothing was changed: fix that and try again") from None
    return how


def _make(
    hidden: SplitFolder, files: Sequence[OutputFile], sources: _Sources, how: dict[str, int], progress: Progress | None
) -> list[Made]:
    """Make all files complete, synced and recorded; each is synced while the next one is written."""
    made: list[Made] = []
    told = 0
    for number, file in enumerate(files):
        if number in hidden.kept:
            nbytes = sum(piece.nbytes for piece in file.ranges)
            how["kept from before"] = how.get("kept from before", 0) + nbytes
            if progress is not None:
                progress(nbytes)
            made.append(Made(temporary_of(file.path.name), file.path, hidden.kept[number]))
        else:
            made.append(_write_file(hidden.folder, file, sources, how, progress))
        told = _sync(hidden, made, told, number)
    _sync(hidden, made, told, len(files))
    return made


def _write_file(
    scratch: Folder, file: OutputFile, sources: _Sources, how: dict[str, int], progress: Progress | None
) -> Made:
    temporary = temporary_of(file.path.name)
    scratch.remove(temporary)
    fd = scratch.create(temporary)
    try:
        target = Opened(fd, file.path)  # so that messages name the requested path
        os.ftruncate(fd, file.nbytes)
        for piece in file.ranges:
            moved = _Moved(fd, piece.dst_offset, progress)
            way = copy_range(sources.open(piece.file), piece.src_offset, target, piece.dst_offset, piece.nbytes, moved)
            how[way] = how.get(way, 0) + piece.nbytes
        write_at(target, 0, file.header)
        return Made(temporary, file.path, known(os.fstat(fd)))
    finally:
        os.close(fd)


def _sync(hidden: SplitFolder, made: Sequence[Made], begin: int, end: int) -> int:
    """Sync the files from `begin` to before `end` and record them; return `end`. Raises OutputError if one is no
    longer the file that was written."""
    for number in range(begin, end):
        each = made[number]
        fd = hidden.folder.open(each.temporary)
        try:
            if not is_still(os.fstat(fd), each.known):
                raise OutputError(
                    f"{each.path}: its unfinished file was replaced by another; find out who writes there"
                )
            if number not in hidden.kept:
                os.fsync(fd)
                hidden.folder.sync()
                hidden.tell(number, each)
        finally:
            os.close(fd)
    return end


class _Moved:
    """Progress of a range; also has the kernel start writing what was copied, so that syncing has little left to do."""

    def __init__(self, fd: int, offset: int, progress: Progress | None) -> None:
        self._fd, self._at, self._progress = fd, offset, progress

    def __call__(self, nbytes: int) -> None:
        # for dirty pages this starts writing without waiting; it would drop only clean ones
        os.posix_fadvise(self._fd, self._at, nbytes, os.POSIX_FADV_DONTNEED)
        self._at += nbytes
        if self._progress is not None:
            self._progress(nbytes)


class _Sources:
    """The files of a set, one open at a time. Each is checked, before and after, to be unchanged since its header was
    read."""

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
                self._fd = os.open(source.path, os.O_RDONLY | os.O_NONBLOCK)
            except OSError as e:
                raise SourceError(f"{source.path}: cannot be opened: {e.strerror or e}") from None
            self._file = file
            self._check(source, os.fstat(self._fd))
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return Opened(self._fd, source.path)

    def check_all(self) -> None:
        """Raise SourceError if a file has changed since its header was read."""
        for source in self._inputs:
            try:
                self._check(source, os.stat(source.path))
            except OSError as e:
                raise SourceError(f"{source.path}: disappeared while it was read: {e.strerror or e}") from None

    def _check(self, source: Input, now: os.stat_result) -> None:
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (source.nbytes, source.mtime_ns, source.inode):
            raise SourceError(f"{source.path}: has changed since its header was read; try again when it is complete")

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._file = self._fd = -1


def _publish(made: Sequence[Made], scratch: Folder, folder: Folder, force: bool) -> None:
    """Rename all files, or none: replaced files are kept until the new ones have their names.

    The first shard's old file is moved away first and its new one arrives last, so that new and old shards never look
    like one model."""
    os.mkdir(REPLACED, dir_fd=scratch.fd)
    with scratch.sub(REPLACED) as old:
        try:
            for each in made:
                if os.path.lexists(each.path):
                    check_replaceable(each.path, force)
                    folder.rename(each.path.name, old, each.path.name, replace=False)
            for each in reversed(made):
                if not is_still(scratch.look(each.temporary), each.known):
                    raise OutputError(f"{each.path}: its unfinished file was replaced; find out who writes there")
                scratch.rename(each.temporary, folder, each.path.name, replace=False)
        except BaseException:
            take_back(made, scratch, folder)
            raise

"""The files of an unfinished build, open, in OUT.partial or already under their names beside it, and where in them
each tensor's rows go.

What is found is taken for ours only if it is: a regular file of this user, without another name where it is written to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..base import outputs
from ..base.copying import Opened, copy_range
from ..base.errors import InternalCheckError, OutputError
from ..base.files import create, read_at, write_at
from ..base.folders import Folder
from ..gguf.header import pad
from ..gguf.types import QTYPES
from ..planning.file_layout import FileLayout


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


class Files:
    """The files of a build by number. `inside` is OUT.partial, `above` the output's folder."""

    def __init__(
        self, inside: Folder, above: Folder, names: Sequence[Path], file_layouts: Sequence[FileLayout],
        replace: Collection[Path],
    ) -> None:  # fmt: skip
        """`replace`: the names under which a file may be replaced."""
        self.inside, self.above, self.names, self.file_layouts = inside, above, names, file_layouts
        self.places = places(file_layouts)
        self._replace = replace
        self.together = False
        """none gets its name before all do, since older files have the names"""
        self.fds: list[int] = []
        self.final = [False] * len(names)
        """which have their names"""

    def close(self) -> None:
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        self.fds = []

    def open(self, resumed: bool, together: bool) -> None:
        """Open all, with their headers and full lengths; one that is not there, or not ours, is made. Raises OSError,
        OutputError."""
        self.together = together
        for i, (path, file_layout) in enumerate(zip(self.names, self.file_layouts, strict=True)):
            fd = None
            if resumed:
                there = self.inside.look(path.name) is not None
                fd = self._open_made(path.name, file_layout) if there else self._open_named(i)
            if fd is None:
                self.inside.remove(path.name)
                fd = create(self.inside, path.name, file_layout.header, file_layout.nbytes)
            self.fds.append(fd)
            if resumed and not self.final[i]:
                self._write_padding(i)

    def _open_made(self, name: str, file_layout: FileLayout) -> int | None:
        """An unfinished file for writing; None where it is not ours, or not as it should be."""
        with suppress(OutputError):
            fd = self.inside.open(name, os.O_RDWR, owner=self.inside.own, alone=True)
            if _begins_with(fd, file_layout):
                return fd
            os.close(fd)
        return None

    def _open_named(self, i: int) -> int | None:
        """A file that has its name already, for reading only; None where it is not of this build."""
        name = self.names[i].name
        info = self.above.look(name)
        if info is None or not stat.S_ISREG(info.st_mode):
            return None
        fd = self.above.open(name, owner=None if self.together else self.inside.own)
        if self.together and not _begins_with(fd, self.file_layouts[i]):
            os.close(fd)
            return None
        self.final[i] = True
        return fd

    def _padding(self, i: int) -> Iterator[tuple[int, int]]:
        """Begin and end of what is between the tensors of a file."""
        for p in self.file_layouts[i].tensors:
            end = p.offset + p.planned.nbytes
            yield end, pad(end)

    def _write_padding(self, i: int) -> None:
        for begin, end in self._padding(i):
            write_at(self.fds[i], bytes(end - begin), begin)

    def is_framed(self, i: int) -> bool:
        """Whether everything but the tensors' rows is as it should be. Raises OSError."""
        return _begins_with(self.fds[i], self.file_layouts[i]) and not any(
            any(read_at(self.fds[i], end - begin, begin)) for begin, end in self._padding(i)
        )

    def take_back(self, i: int) -> None:
        """A file that has its name but is not whole goes back to the unfinished ones, open for writing; where it must
        stay as it is, a copy of it. Raises OSError, OutputError."""
        name, file_layout, fd = self.names[i].name, self.file_layouts[i], self.fds[i]
        if self.together or os.fstat(fd).st_nlink > 1:
            self.fds[i] = create(self.inside, name, file_layout.header, file_layout.nbytes)
            nbytes = min(os.fstat(fd).st_size, file_layout.nbytes)
            copy_range(Opened(fd, self.names[i]), 0, Opened(self.fds[i], self.inside.path / name), 0, nbytes)
            if not self.together:
                self.above.unlink(name)
        else:
            self.above.give_name(name, fd, self.inside, name)
            self.fds[i] = self.inside.open(name, os.O_RDWR, owner=self.inside.own, alone=True)
        os.close(fd)
        self.final[i] = False
        os.ftruncate(self.fds[i], file_layout.nbytes)
        write_at(self.fds[i], file_layout.header, 0)
        self._write_padding(i)

    def replace(self, i: int, fd: int, scratch: Folder, name: str) -> None:
        """Take a whole file of a scratch folder, open as `fd`, for file `i`. Raises OSError, OutputError."""
        os.close(self.fds[i])
        self.fds[i] = fd
        scratch.give_name(name, fd, self.inside, self.names[i].name)

    def sync(self) -> None:
        """Bring all to the disk. Raises OSError, and InternalCheckError for one that is not as long as planned."""
        for fd, name, file_layout in zip(self.fds, self.names, self.file_layouts, strict=True):
            size = os.fstat(fd).st_size
            if size != file_layout.nbytes:
                raise InternalCheckError(f"{name}: has {size:,} bytes, planned are {file_layout.nbytes:,}")
            os.fsync(fd)

    def publish(self, i: int) -> None:
        """Bring a file and its name to the disk. Raises OSError, OutputError."""
        os.fsync(self.fds[i])
        self._give_name(i)
        self.above.sync()
        self.inside.sync()

    def publish_all(self) -> None:
        """Give those their names that have none yet, the first shard last: without it the others are not taken for a
        model. Raises OSError, OutputError."""
        for i in reversed(range(len(self.names))):
            if not self.final[i]:
                self._give_name(i)
        self.above.sync()

    def _give_name(self, i: int) -> None:
        """A file gets its final name, if it is still the one that was written. Raises OSError, and OutputError where
        something else has the name, which it had not when the build began."""
        path = self.names[i]
        outputs.give_name(self.inside, path.name, self.fds[i], self.above, path, path in self._replace)
        self.final[i] = True


def _begins_with(fd: int, file_layout: FileLayout) -> bool:
    return os.fstat(fd).st_size == file_layout.nbytes and read_at(fd, len(file_layout.header), 0) == file_layout.header

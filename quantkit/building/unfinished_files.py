"""The open files of an unfinished build, in OUT.partial or already under their final names beside it, and the place of
each tensor's rows in them.

A file that exists is accepted only if it is a regular file of this user; to be written to, it must have no other link.
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
    """The place of a tensor's rows. `number` is the tensor's number in the plan, `file` the number of the output
    file."""

    number: int
    file: int
    offset: int
    n_rows: int
    row_bytes: int
    n_cols: int


def places(file_layouts: Sequence[FileLayout]) -> dict[str, Place]:
    """The place of every tensor, by name."""
    out: dict[str, Place] = {}
    for file, file_layout in enumerate(file_layouts):
        for p in file_layout.tensors:
            t = p.planned.tensor
            row_bytes = QTYPES[p.planned.type].row_bytes(t.n_cols)
            out[t.name] = Place(len(out), file, p.offset, t.n_rows, row_bytes, t.n_cols)
    return out


class Files:
    """A build's files, by number. `inside` is OUT.partial, `above` the output's folder."""

    def __init__(
        self, inside: Folder, above: Folder, names: Sequence[Path], file_layouts: Sequence[FileLayout],
        replace: Collection[Path],
    ) -> None:  # fmt: skip
        """`replace`: final names under which an existing file may be replaced."""
        self.inside, self.above, self.names, self.file_layouts = inside, above, names, file_layouts
        self.places = places(file_layouts)
        self._replace = replace
        self.together = False
        """whether all files get their names at the end together, since older files have these names"""
        self.fds: list[int] = []
        self.final = [False] * len(names)
        """which files have their final names"""

    def close(self) -> None:
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        self.fds = []

    def open(self, resumed: bool, together: bool) -> None:
        """Open all files, with headers and full lengths. A missing file, or one that is not the build's, is created.
        Raises OSError, OutputError."""
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
        """Open an unfinished file for writing; None if it is not the build's, or not as expected."""
        with suppress(OutputError):
            fd = self.inside.open(name, os.O_RDWR, owner=self.inside.own, alone=True)
            if _begins_with(fd, file_layout):
                return fd
            os.close(fd)
        return None

    def _open_named(self, i: int) -> int | None:
        """Open a file with its final name, for reading only; None if it is not this build's."""
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
        """Begin and end of each gap between the tensors of a file."""
        for p in self.file_layouts[i].tensors:
            end = p.offset + p.planned.nbytes
            yield end, pad(end)

    def _write_padding(self, i: int) -> None:
        for begin, end in self._padding(i):
            write_at(self.fds[i], bytes(end - begin), begin)

    def is_framed(self, i: int) -> bool:
        """Whether everything except the tensors' rows is as planned. Raises OSError."""
        return _begins_with(self.fds[i], self.file_layouts[i]) and not any(
            any(read_at(self.fds[i], end - begin, begin)) for begin, end in self._padding(i)
        )

    def take_back(self, i: int) -> None:
        """Move an incomplete file with its final name back to the unfinished ones, open for writing; copy it if it must
        stay as it is. Raises OSError, OutputError."""
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
        """Use a whole file from a scratch folder, open as `fd`, as file `i`. Raises OSError, OutputError."""
        os.close(self.fds[i])
        self.fds[i] = fd
        scratch.give_name(name, fd, self.inside, self.names[i].name)

    def sync(self) -> None:
        """Sync all files. Raises OSError; InternalCheckError for a file whose length is not as planned."""
        for fd, name, file_layout in zip(self.fds, self.names, self.file_layouts, strict=True):
            size = os.fstat(fd).st_size
            if size != file_layout.nbytes:
                raise InternalCheckError(f"{name}: has {size:,} bytes, planned are {file_layout.nbytes:,}")
            os.fsync(fd)

    def publish(self, i: int) -> None:
        """Sync a file, give it its final name, and sync that. Raises OSError, OutputError."""
        os.fsync(self.fds[i])
        self._give_name(i)
        self.above.sync()
        self.inside.sync()

    def publish_all(self) -> None:
        """Give all other files their final names, the first shard last: without it the rest is not taken for a model.
        Raises OSError, OutputError."""
        for i in reversed(range(len(self.names))):
            if not self.final[i]:
                self._give_name(i)
        self.above.sync()

    def _give_name(self, i: int) -> None:
        """Give a file its final name, if it is still the file that was written. Raises OSError; OutputError if
        something took the name since the build began."""
        path = self.names[i]
        outputs.give_name(self.inside, path.name, self.fds[i], self.above, path, path in self._replace)
        self.final[i] = True


def _begins_with(fd: int, file_layout: FileLayout) -> bool:
    return os.fstat(fd).st_size == file_layout.nbytes and read_at(fd, len(file_layout.header), 0) == file_layout.header

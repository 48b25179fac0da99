"""The sink of an unfinished build, to which engines and the cache write rows of tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..base import journal
from ..base.errors import OutputError
from ..base.files import write_at
from ..base.folders import Folder
from ..base.journal import Ranges, Record
from .durability import Durability, mend
from .unfinished_files import Files, Place


class RowSink:
    """The sink of quantkit.building.engines.Sink. Thread-safe."""

    def __init__(self, files: Files, durability: Durability, scratch: Folder, kept: Sequence[Ranges]) -> None:
        """`kept`: for each tensor of the plan, the rows that an earlier run wrote."""
        self._files, self._durability, self._scratch, self._kept = files, durability, scratch, kept
        self.folder = files.inside.path
        self.whole_file_accepted = False

    @property
    def is_empty(self) -> bool:
        return not any(len(rows) for rows in self._kept)

    def has(self, name: str, row: int, n_rows: int) -> bool:
        return self._kept[self._files.places[name].number].covers(row, n_rows)

    def put(self, name: str, row: int, data: npt.NDArray[np.uint8]) -> None:
        if self._durability.failure is not None:
            raise self._durability.failure
        fd, place = self.target(name)
        view = data.data.cast("B")
        at = place.offset + row * place.row_bytes
        try:
            write_at(fd, view, at)
        except OSError as e:
            raise OutputError(
                f"{self.folder / self._files.names[place.file].name}: writing '{name}' at {at:,} failed: "
                f"{e.strerror or e}; {mend(e)} and build again"
            ) from None
        self.note(name, row, len(data), journal.digest(view))

    def commit(self) -> None:
        self._durability.commit()

    def note(self, name: str, row: int, n_rows: int, digest: bytes) -> None:
        """Record rows that were written by other means; `digest` is quantkit.base.journal's of their bytes."""
        self._durability.note(Record(self._files.places[name].number, row, n_rows, digest))

    def have_whole(self, name: str) -> None:
        """Mark a tensor as complete: all its rows were written and recorded with `note`, and no engine need make
        them."""
        place = self._files.places[name]
        self._kept[place.number].add(0, place.n_rows)

    def target(self, name: str) -> tuple[int, Place]:
        """The file descriptor and place of a tensor, for writing by other means; record the rows with `note`."""
        place = self._files.places[name]
        return self._files.fds[place.file], place

    def discard_rows(self) -> None:
        os.ftruncate(self._files.fds[0], 0)

    def accept_whole_file(self, name: str) -> None:
        fd = self._scratch.open(name, os.O_RDWR, alone=True)
        self._files.replace(0, fd, self._scratch, name)
        self.whole_file_accepted = True

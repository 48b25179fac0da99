"""Engines make tensor data. There are two, with one interface and the same output bytes.

An engine gets a `Work`, and gives every row of every tensor to its sink, which writes it to its place in the output and
knows which rows already exist. It reports progress in source elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...base.errors import InternalCheckError
from ...base.folders import Folder
from ...model.sources.shard_store import Limits
from ...planning.file_layout import FileLayout
from ...planning.plan import Plan

#: called with the name of the current tensor and the elements finished since the last call
Progress = Callable[[str, int], None]


class ImportanceValues(Protocol):
    """An importance matrix as engines use it."""

    @property
    def path_as_given(self) -> str: ...
    @property
    def path(self) -> Path: ...
    def weights(self, name: str, mat: int, n_cols: int) -> npt.NDArray[np.float32]: ...


class Sink(Protocol):
    """The destination of tensor data. Thread-safe."""

    def has(self, name: str, row: int, n_rows: int) -> bool:
        """Whether rows of a tensor, from `row` on, already exist from an earlier run."""

    def put(self, name: str, row: int, data: npt.NDArray[np.uint8]) -> None:
        """Write rows of a tensor, from `row` on, uint8 [n_rows, row_bytes]; the caller may reuse `data` afterwards.
        Raises OutputError."""

    def commit(self) -> None:
        """Make everything that was put durable. Raises OutputError, SourceError."""

    @property
    def is_empty(self) -> bool:
        """Whether no rows exist from an earlier run."""

    def discard_rows(self) -> None:
        """Discard all rows that were put: the engine writes the one output file as a whole into the scratch folder."""

    def accept_whole_file(self, name: str) -> None:
        """Accept that file in the scratch folder, with all tensors and the planned header. Raises OutputError if it is
        not the build's own file."""


def _no_folder() -> Path:
    raise InternalCheckError("this work has no folder that lasts")


@dataclass(frozen=True)
class Work:
    """An engine's task."""

    plan: Plan
    file_layouts: tuple[FileLayout, ...]
    """the output files, in order"""
    sink: Sink
    imatrix: ImportanceValues | None
    n_threads: int
    progress: Progress
    scratch: Folder
    """the build's own folder, on the output's filesystem"""
    commit: Callable[[], None] = lambda: None
    """makes everything that was put durable. Raises what ends a build"""
    lasting: Callable[[], Path] = _no_folder
    """makes a second folder, which survives when the build is stopped and resumed"""


class Engine(Protocol):
    name: str
    rounds: bool
    """whether it supports roundings other than ggml's"""

    @property
    def limits(self) -> Limits | None:
        """How much of a source on the Hub may be on the disk at a time; None if it must be there completely."""

    def scratch_bytes(self, plan: Plan) -> int:
        """Upper limit of the disk space that it needs besides the output."""

    def run(self, work: Work) -> None:
        """Write the data of every tensor. After a QuantkitError, the files are not usable."""

"""Engines make tensor data. Two stand behind one interface, and give the same bytes.

An engine gets a `Work` and gives every row of every tensor to its sink, which puts it at its place in the
output and knows what is there already. It reports progress in source elements done.
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

#: called with the name of the tensor at work and the elements finished since the last call
Progress = Callable[[str, int], None]


class ImportanceValues(Protocol):
    """An importance matrix, as an engine reads it."""

    @property
    def path_as_given(self) -> str: ...
    @property
    def path(self) -> Path: ...
    def weights(self, name: str, mat: int, n_cols: int) -> npt.NDArray[np.float32]: ...


class Sink(Protocol):
    """Where tensor data goes. Safe for threads."""

    def has(self, name: str, row: int, n_rows: int) -> bool:
        """Whether rows row… of a tensor are there already, from an earlier run."""

    def put(self, name: str, row: int, data: npt.NDArray[np.uint8]) -> None:
        """Write rows row… of a tensor, uint8 [n_rows, row_bytes]; `data` may be changed afterwards. Raises
        OutputError."""

    def commit(self) -> None:
        """What was put is on the disk for good when it returns. Raises OutputError, SourceError."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is there from an earlier run."""

    def discard_rows(self) -> None:
        """What `put` wrote is not needed: the engine writes the one output file as a whole, into the scratch folder."""

    def accept_whole_file(self, name: str) -> None:
        """Take that file of the scratch folder, with all tensors and the planned header. Raises OutputError for one
        that is not ours."""


def _no_folder() -> Path:
    raise InternalCheckError("this work has no folder that lasts")


@dataclass(frozen=True)
class Work:
    """What an engine has to do."""

    plan: Plan
    file_layouts: tuple[FileLayout, ...]
    """the output files, in order"""
    sink: Sink
    imatrix: ImportanceValues | None
    n_threads: int
    progress: Progress
    scratch: Folder
    """a folder of the build's own, on the output's filesystem"""
    commit: Callable[[], None] = lambda: None
    """returns when all that was put is on the disk for good. Raises what a build's end raises"""
    lasting: Callable[[], Path] = _no_folder
    """makes another, that is there when the build goes on after it was stopped"""


class Engine(Protocol):
    name: str
    rounds: bool
    """whether it can round otherwise than ggml"""

    @property
    def limits(self) -> Limits | None:
        """How much of a source on the Hub may be on the disk at a time; None where all of it must be."""

    def scratch_bytes(self, plan: Plan) -> int:
        """The most disk space that it needs beside the output."""

    def run(self, work: Work) -> None:
        """Write the data of every tensor. Raises a QuantkitError; the files are then not usable."""

"""Engines fill output files with tensor data. Two stand behind one interface, and give the same bytes.

An engine gets a `Work` and writes every tensor's data at its offset in files that already have
their header and full length. It reports progress in source elements done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..layout import FileLayout
from ..plan import Plan

#: called with the name of the tensor at work and the elements finished since the last call
Progress = Callable[[str, int], None]


class Weights(Protocol):
    """An importance matrix, as an engine reads it."""

    @property
    def typed(self) -> str: ...
    @property
    def path(self) -> Path: ...
    def weights(self, name: str, mat: int, n_cols: int) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Work:
    """What an engine has to do."""

    plan: Plan
    files: tuple[tuple[Path, FileLayout], ...]
    """where to write: (path, layout); the files exist, with header and full length"""
    imatrix: Weights | None
    n_threads: int
    progress: Progress
    scratch: Path
    """a folder of the build's own, on the output's filesystem"""


class Engine(Protocol):
    name: str

    def scratch_bytes(self, plan: Plan) -> int:
        """The most disk space that it needs beside the output."""

    def run(self, work: Work) -> None:
        """Write the data of every tensor. Raises a QuantkitError; the files are then not usable."""

"""Bytes of source files, read at an offset by any thread, with an error for each way that can go wrong.

Plain `pread` into the caller's buffer, not a mapping: a file that is truncated while it is mapped
ends the process with SIGBUS, where a short read can be reported. The copy is not measurable beside
the quantization.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError
from ..catalogue import SourceTensor


def regular_size(path: Path) -> int:
    """The size of a file; a pipe or device, which might never answer, raises SourceError."""
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise SourceError(f"{path}: is a directory, not a file")
    if not stat.S_ISREG(info.st_mode):
        raise SourceError(f"{path}: is not a regular file")
    return info.st_size


class Reader(Protocol):
    """Who reads bytes of shards: `Files`, for those that lie here."""

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None: ...
    def will_need(self, tensor: SourceTensor, start: int, nbytes: int) -> None: ...


class Files:
    """Open files by path; opened when first read, safe for threads."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.paths = tuple(paths)

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` (contiguous) with the tensor's bytes from `start` on. Raises SourceError."""
        fd = self._fds.get(tensor.file)
        if fd is None:
            fd = self._open(tensor.file)
        view = out.data.cast("B")
        at, done = tensor.offset + start, 0
        while done < len(view):
            try:
                n = os.preadv(fd, [view[done:]], at + done)
            except OSError as e:
                raise SourceError(
                    f"{tensor.file}: reading '{tensor.name}' at {at + done:,} failed: {e.strerror or e}"
                ) from None
            if n == 0:
                raise SourceError(
                    f"{tensor.file}: '{tensor.name}' should end at {at + len(view):,}, but the file now ends at "
                    f"{at + done:,}; it has changed since it was opened"
                )
            done += n

    def will_need(self, tensor: SourceTensor, start: int, nbytes: int) -> None:
        """Have the system read a tensor's bytes ahead, if it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError, SourceError):  # advice only: what is wrong with the file, reading it will say
            fd = self._fds.get(tensor.file)
            if fd is None:
                fd = self._open(tensor.file)
            os.posix_fadvise(fd, tensor.offset + start, nbytes, os.POSIX_FADV_WILLNEED)

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY)
                except OSError as e:
                    raise SourceError(f"{path}: cannot be opened: {e.strerror or e}") from None
            return self._fds[path]

    def __del__(self) -> None:
        for fd in getattr(self, "_fds", {}).values():
            os.close(fd)

"""Quantized tensors of plans that have no file: made once into a cache, and read from there matrix by matrix.

The cache holds what a build would write, so builds can use it too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..base import journal
from ..base.errors import OutputError
from ..base.files import NewFile, write_at
from ..base.folders import Folder
from ..gguf.types import QTYPES
from ..model.catalogue import Tensor
from ..planning.plan import Plan, Planned
from .cache import Cache
from .engines import Progress, Work
from .engines.native import NativeEngine

U8 = npt.NDArray[np.uint8]
#: most bytes in a piece of a tensor; each piece has a digest
_PIECE = 1 << 24


@dataclass
class CachedTensor:
    """A tensor in a cache. Any number of threads may read it."""

    cache: Cache
    key: str
    tensor: Tensor
    type: str
    _digests: list[bytes] | None = None
    _is_checked: bool = False
    _checking: threading.Lock = field(default_factory=threading.Lock)

    def rows(self, first: int, n_rows: int) -> U8 | None:
        """uint8 [n_rows, row_bytes]: the blocks of rows from `first` on; None if the cache no longer has them, or they
        are damaged. The first read compares the whole entry with its digest, and later reads compare their pieces with
        that first read."""
        row_bytes, step = QTYPES[self.type].row_bytes(self.tensor.n_cols), self._step
        with self._checking:
            if not self._is_checked:
                n = self.tensor.n_rows
                sizes = [min(step, n - at) * row_bytes for at in range(0, n, step)]
                self._digests = self.cache.pieces(self.key, sizes)
                self._is_checked = True
        if self._digests is None:
            return None
        low, high = first // step, -(-(first + n_rows) // step)
        found = []
        for i in range(low, high):
            n = min(step, self.tensor.n_rows - i * step)
            raw = self.cache.read(self.key, i * step * row_bytes, n * row_bytes)
            if raw is None or journal.digest(raw) != self._digests[i]:
                return None
            found.append(np.frombuffer(raw, np.uint8).reshape(n, row_bytes))
        blocks = found[0] if len(found) == 1 else np.concatenate(found)
        return blocks[first - low * step :][:n_rows]

    @property
    def _step(self) -> int:
        """Rows per piece: one matrix, unless it is too large."""
        per_mat = self.tensor.shape[1] if len(self.tensor.shape) > 1 else 1
        return max(1, min(per_mat, _PIECE // QTYPES[self.type].row_bytes(self.tensor.n_cols)))


class CachedTensors:
    """The cached tensors of all plans of a model, by their content's key. See the module."""

    def __init__(self, cache: Cache, n_threads: int) -> None:
        self.cache, self.n_threads = cache, n_threads
        self.n_made = 0
        self._known: dict[str, CachedTensor] = {}

    def of(
        self, plan: Plan, wanted: Iterable[str], progress: Progress = lambda name, n: None
    ) -> Mapping[str, CachedTensor]:
        """Return the `wanted` tensors of a plan that the cache can hold, by name; missing ones are made now. Raises
        what reading and quantizing raise. A cache that cannot be written holds fewer, and `failure` says why."""
        names = set(wanted)
        keys = self.cache.keys(plan, names, plan.weights, self.n_threads)
        planned = [t for t in plan.tensors if t.tensor.name in names]
        lacking = []
        for t in planned:
            key = keys[t.tensor.name]
            if key not in self._known and t.nbytes < self.cache.max_bytes and not self.cache.has(key):
                lacking.append(t)
        if lacking:
            self._make(plan, lacking, keys, progress)
        out = {}
        for t in planned:
            key = keys[t.tensor.name]
            if key not in self._known and self.cache.has(key):
                self._known[key] = CachedTensor(self.cache, key, t.tensor, t.type)
            if key in self._known:
                out[t.tensor.name] = self._known[key]
        return out

    def _make(self, plan: Plan, lacking: list[Planned], keys: Mapping[str, str], progress: Progress) -> None:
        sink = _Sink(self.cache, lacking, keys)
        some = replace(plan, tensors=tuple(lacking))
        engine = NativeEngine()
        try:
            folder = Folder.hold(self.cache.folder)
        except OSError as e:
            raise OutputError(f"{self.cache.folder}: cannot be used: {e.strerror or e}") from None
        with folder:
            try:
                engine.run(Work(some, (), sink, plan.weights, self.n_threads, progress, folder))
            finally:
                sink.close()
        self.n_made += sink.n_whole
        self.cache.settle()


class _Sink:
    """Receives an engine's rows: files of the cache, each of which becomes an entry when its rows are complete."""

    whole_file_accepted = False
    is_empty = True

    def __init__(self, cache: Cache, lacking: Iterable[Planned], keys: Mapping[str, str]) -> None:
        self._cache, self._keys = cache, keys
        self._planned = {t.tensor.name: t for t in lacking}
        self._open: dict[str, NewFile] = {}
        self._left = {name: t.tensor.n_rows for name, t in self._planned.items()}
        self._lock = threading.Lock()
        self.n_whole = 0

    def has(self, name: str, row: int, n_rows: int) -> bool:
        return False

    def commit(self) -> None:
        """Do nothing: entries become durable when complete."""

    def put(self, name: str, row: int, data: U8) -> None:
        t = self._planned[name]
        row_bytes = QTYPES[t.type].row_bytes(t.tensor.n_cols)
        try:
            with self._lock:
                if name not in self._open:
                    self._open[name] = self._cache.begin()
                new = self._open[name]
            write_at(new.fd, data.data.cast("B"), row * row_bytes)
            with self._lock:
                self._left[name] -= len(data)
                is_whole = self._left[name] == 0
                if is_whole:
                    del self._open[name]
                    self.n_whole += 1
            if is_whole:
                with new:
                    self._cache.end(new, self._keys[name], t.tensor.n_rows * row_bytes)
        except OSError as e:
            path: Path = self._cache.folder
            raise OutputError(
                f"{path}: a tensor cannot be kept: {e.strerror or e}; free space there, or leave out --cache"
            ) from None

    def discard_rows(self) -> None:
        raise AssertionError("the native engine writes rows")

    def accept_whole_file(self, name: str) -> None:
        raise AssertionError("the native engine writes rows")

    def close(self) -> None:
        """Remove incomplete files."""
        for new in self._open.values():
            new.close()
        self._open.clear()

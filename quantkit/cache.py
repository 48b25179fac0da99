"""Finished tensors kept from build to build, by what they are made of: another recipe re-quantizes only what differs.

    DIR/objects/ab/KEY        a tensor's data, then SHA-256 of it and of KEY | u64 its bytes | "qkcache2"
    DIR/sources/FILE.json     digests of source tensors, for a file of that path, inode, size and time, and of these
    DIR/tmp/                  what is being written
    DIR/lock                  held while entries are removed

KEY is SHA-256 over the type, the shape, the source's rows by content (dtype, scales, and how the rows are dealt), the
importance values, and the version of the kernels; the tensor's name is not in it. Reading a source for its digests is
done once for each of its files. Any number of processes may use one folder: entries appear whole by rename, are read
through an open file that outlives its removal, and are compared with their digest before they are used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from . import fingerprint, journal, kernels
from .catalogue import Source, SourceTensor
from .copying import Opened, copy_range
from .disk import read_at
from .engines import Weights
from .errors import OutputError, QuantkitError
from .partial import Partial
from .plan import Plan, Planned

MAGIC = b"qkcache2"
_TRAILER = struct.Struct("<32sQ8s")
_CHUNK = 1 << 22
#: an unfinished file of a process that is gone is removed after so many seconds
_STALE = 86_400


class Cache:
    """See the module. Raises OutputError when the folder cannot be made."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.n_found = self.n_kept = self.n_corrupt = 0
        """tensors that came from here, that were put here, that were here but not as they should be"""
        self.bytes_found = 0
        self._counting = threading.Lock()
        self.failure = ""
        """why a tensor could not be kept, if one could not; the build does not end for it"""
        try:
            for name in ("objects", "sources", "tmp"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{folder}: no cache can be made there: {e.strerror or e}") from None

    # ------------------------------------------------------------ what a tensor is made of

    def keys(
        self, plan: Plan, wanted: Iterable[str], weights: Weights | None, n_threads: int,
        progress: Callable[[str, int], None] = lambda _name, _n: None,
    ) -> dict[str, str]:  # fmt: skip
        """The keys of the tensors named. Reads those source tensors whose digest is not known yet; `progress` is
        called with names and bytes."""
        source = plan.catalogue.source
        assert source is not None
        names = set(wanted)
        tensors = [t for t in plan.tensors if t.tensor.name in names]
        digests = self._digests(source, {p.source for t in tensors for p in t.tensor.parts}, n_threads, progress)
        with ThreadPoolExecutor(n_threads) as pool:
            return dict(
                pool.map(lambda t: (t.tensor.name, _key(t, source.block, digests, weights)), tensors)
            )  # fmt: skip

    def _digests(
        self, source: Source, names: set[str], n_threads: int, progress: Callable[[str, int], None]
    ) -> dict[str, str]:
        known: dict[str, str] = {}
        memos: dict[Path, Path] = {}
        before: dict[Path, fingerprint.FileStat] = {}
        for file in {source.tensor(n).file for n in names}:
            s = before[file] = fingerprint.stat_of(file)
            memos[file] = self.folder / "sources" / f"{fingerprint.short(str(file.resolve()), repr(s))}.json"
            known.update({n: d for n, d in _read_memo(memos[file]).items() if n in names})
        missing = [source.tensor(n) for n in sorted(names - known.keys())]

        def digest(st: SourceTensor) -> tuple[SourceTensor, str]:
            found = _digest(source, st)
            progress(st.name, st.nbytes)
            return st, found

        fresh: dict[Path, dict[str, str]] = {}
        with ThreadPoolExecutor(n_threads) as pool:
            for st, found in pool.map(digest, missing):
                known[st.name] = found
                fresh.setdefault(st.file, {})[st.name] = found
        with suppress(OSError):  # without its memo the next build reads the source again, no more
            for file, found_there in fresh.items():
                if fingerprint.stat_of(file) == before[file]:
                    _write_memo(self.folder / "tmp", memos[file], {**_read_memo(memos[file]), **found_there})
        return known

    # ------------------------------------------------------------ entries

    def _path(self, key: str) -> Path:
        return self.folder / "objects" / key[:2] / key

    def fill(self, key: str, name: str, partial: Partial) -> bool:
        """Put a tensor from the cache into an unfinished build, if it is here and sound."""
        fd_out, place = partial.target(name)
        nbytes = place.n_rows * place.row_bytes
        path = self._path(key)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            digest, step = hashlib.sha256(), max(1, _CHUNK // place.row_bytes)
            rows = []
            for row in range(0, place.n_rows, step):
                n = min(step, place.n_rows - row)
                raw = read_at(fd, n * place.row_bytes, row * place.row_bytes)
                digest.update(raw)
                rows.append((row, n, journal.digest(raw)))
            digest.update(key.encode())
            if read_at(fd, _TRAILER.size + 1, nbytes) != _TRAILER.pack(digest.digest(), nbytes, MAGIC):
                with self._counting:
                    self.n_corrupt += 1
                with suppress(OSError):
                    path.unlink()
                return False
            copy_range(Opened(fd, path), 0, Opened(fd_out, partial.folder), place.offset, nbytes)
            with suppress(OSError):
                os.utime(path)  # used now: the last to be evicted
        except OSError:
            return False
        finally:
            os.close(fd)
        for row, n, found in rows:
            partial.note(name, row, n, found)
        with self._counting:
            self.n_found += 1
            self.bytes_found += nbytes
        return True

    def keep(self, key: str, name: str, partial: Partial) -> None:
        """Keep a tensor that a build has on the disk."""
        fd, place = partial.target(name)
        nbytes = place.n_rows * place.row_bytes
        if nbytes + _TRAILER.size > self.max_bytes or self._path(key).exists():
            return
        try:
            out, temporary = tempfile.mkstemp(dir=self.folder / "tmp")
            try:
                copy_range(Opened(fd, partial.folder), place.offset, Opened(out, Path(temporary)), 0, nbytes)
                digest = hashlib.sha256()
                for at in range(0, nbytes, _CHUNK):
                    digest.update(read_at(out, min(_CHUNK, nbytes - at), at))
                digest.update(key.encode())  # so that no entry is taken for another
                os.pwrite(out, _TRAILER.pack(digest.digest(), nbytes, MAGIC), nbytes)
                self._path(key).parent.mkdir(exist_ok=True)
                os.replace(temporary, self._path(key))
            except BaseException:
                os.unlink(temporary)
                raise
            finally:
                os.close(out)
            self.n_kept += 1
            self.evict()
        except (OSError, QuantkitError) as e:
            self.failure = str(e)

    def entries(self) -> list[tuple[float, int, Path]]:
        """When each was used last, its bytes, its path; the longest unused first."""
        out = []
        for path in self.folder.glob("objects/??/*"):
            with suppress(OSError):
                s = path.stat()
                out.append((s.st_mtime, s.st_size, path))
        return sorted(out)

    def evict(self) -> None:
        """Remove what was not used longest until the size is kept. Raises OSError."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self.entries()
            total = sum(n for _, n, _ in entries)
            for _, n, path in entries:
                if total <= self.max_bytes:
                    break
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= n
            for path in (self.folder / "tmp").iterdir():
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE:
                        path.unlink()


def _key(planned: Planned, block: tuple[int, int], digests: dict[str, str], weights: Weights | None) -> str:
    t = planned.tensor
    h = hashlib.sha256()
    made_of: list[Any] = [kernels.version(), planned.type, t.source_type, t.quantizable, t.shape, block]
    made_of += [(digests[p.source], p[1:]) for p in t.parts]
    h.update(repr(made_of).encode())
    if weights is not None and planned.imatrix == "used":
        for mat in range(t.shape[2] if len(t.shape) > 2 else 1):
            h.update(np.ascontiguousarray(weights.weights(t.name, mat, t.n_cols)).tobytes())
    return h.hexdigest()


def _digest(source: Source, st: SourceTensor) -> str:
    """SHA-256 of a source tensor: its dtype, shape and bytes, and its scales."""
    h = hashlib.sha256(repr((st.dtype, st.shape)).encode())
    buffer = np.empty(min(_CHUNK, st.nbytes), np.uint8)
    for at in range(0, st.nbytes, _CHUNK):
        some = buffer[: min(_CHUNK, st.nbytes - at)]
        source.read(st, at, some)
        h.update(some.data)
    if st.dtype == "F8_E4M3":
        h.update(np.ascontiguousarray(source.scale(st.name), np.float32).tobytes())
    return h.hexdigest()


def _read_memo(path: Path) -> dict[str, str]:
    """The digests that a memo holds, none when it is damaged or another's."""
    try:
        found = json.loads(path.read_bytes())
        digests, check = found["digests"], found["check"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(digests, dict) or check != _memo_check(path, digests):
        return {}
    return {k: v for k, v in digests.items() if isinstance(k, str) and isinstance(v, str)}


def _memo_check(path: Path, digests: Any) -> str:
    return fingerprint.short(path.name, json.dumps(digests, sort_keys=True))


def _write_memo(folder: Path, path: Path, digests: dict[str, str]) -> None:
    fd, temporary = tempfile.mkstemp(dir=folder)
    with os.fdopen(fd, "w") as f:
        json.dump({"digests": digests, "check": _memo_check(path, digests)}, f)
    os.replace(temporary, path)

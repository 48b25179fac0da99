"""Keeps finished tensors between builds, keyed by what they are made of: another recipe quantizes only what differs.

DIR/objects/ab/KEY        a tensor's data, then SHA-256 of it and of KEY | u64 its bytes | "qkcache2"
DIR/sources/FILE.json     digests of source tensors, for a file of that path, inode, size and time, and of these
DIR/tmp/                  files being written
DIR/lock                  held while entries are removed

KEY is SHA-256 over the type, the shape, the source's rows by content (dtype, scales, and how the rows are dealt), the
importance values, and the version of the kernels. It does not contain the tensor's name, except through a rounding
other than ggml's, which it identifies together with the covariance. Each source file is read once for its digests. Any
number of processes may use one folder: entries appear complete by rename, are read through an open file that outlives
their removal, and copied data is compared with their digest before use. quantkit.building.cache_folder decides whose
entries are trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..base import journal
from ..base.copying import Opened, copy_range
from ..base.errors import OutputError, QuantkitError, SourceError
from ..base.files import NewFile, read_at, write_at
from ..base.workers import share_out
from ..model.catalogue import Source, SourceTensor
from ..planning.plan import ImatrixStatus, Plan, Planned
from ..planning.rounding import Rounding
from . import identity
from .cache_folder import CacheFolder
from .engines import ImportanceValues
from .sink import RowSink

MAGIC = b"qkcache2"
_TRAILER = struct.Struct("<32sQ8s")
_CHUNK = 1 << 22
#: after this fraction of the size has been added, the entries are listed again: others may add to the same folder
_LOOKS = 16
#: most bytes read from a memo; that of one of R1's files names 600 tensors
_MAX_MEMO = 1 << 26


class Cache:
    """A cache (see the module). Raises OutputError if the folder cannot be used; without `make`, also if it does not
    exist."""

    def __init__(self, folder: Path, max_bytes: int, make: bool = True) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.n_found = self.n_kept = self.n_corrupt = 0
        """tensors taken from the cache, put into it, and found damaged in it"""
        self.bytes_found = 0
        self._counting = threading.Lock()
        self.failure = ""
        """the first reason why something could not be read or kept; it does not end the build"""
        self._room = 0
        """bytes that may still be added before the entries are listed again"""
        self._disk = CacheFolder(folder, make)

    def _failed(self, what: Path, e: Exception) -> None:
        if isinstance(e, OSError):
            named = e.filename if isinstance(e.filename, str) and os.path.isabs(e.filename) else what
            self.failure = self.failure or f"{named}: {e.strerror or e}"
        else:
            self.failure = self.failure or str(e)

    # ------------------------------------------------------------ what a tensor is made of

    def keys(
        self, plan: Plan, wanted: Iterable[str], weights: ImportanceValues | None, n_threads: int,
        progress: Callable[[str, int], None] = lambda _name, _n: None,
    ) -> dict[str, str]:  # fmt: skip
        """Return the keys of the named tensors. Reads the source tensors whose digests are not known yet; `progress` is
        called with names and bytes."""
        source = plan.catalogue.source
        assert source is not None
        names = set(wanted)
        tensors = [t for t in plan.tensors if t.tensor.name in names]
        digests = self._digests(source, {p.source for t in tensors for p in t.tensor.parts}, n_threads, progress)
        keys: dict[str, str] = {}

        def make(t: Planned) -> None:
            keys[t.tensor.name] = _key(t, source.block, digests, weights, plan.rounding, plan.weights_in_pass)

        share_out(tensors, n_threads, lambda: make)
        return keys

    def _digests(
        self, source: Source, names: set[str], n_threads: int, progress: Callable[[str, int], None]
    ) -> dict[str, str]:
        known: dict[str, str] = {}
        memos: dict[Path, str] = {}
        before: dict[Path, identity.FileStat] = {}
        for file in {source.tensor(n).file for n in names}:
            s = before[file] = identity.stat_of(file)
            memos[file] = f"{identity.short(str(file.resolve()), repr(s))}.json"
            known.update({n: d for n, d in self._read_memo(memos[file]).items() if n in names})
        missing = [source.tensor(n) for n in sorted(names - known.keys())]

        def digest(st: SourceTensor) -> None:
            known[st.name] = _digest(source, st)
            progress(st.name, st.nbytes)

        share_out(missing, n_threads, lambda: digest)
        fresh: dict[Path, dict[str, str]] = {}
        for st in missing:
            fresh.setdefault(st.file, {})[st.name] = known[st.name]
        try:  # without its memo, the next build only has to read the source again
            for file, found_there in fresh.items():
                if identity.stat_of(file) == before[file]:
                    self._write_memo(memos[file], {**self._read_memo(memos[file]), **found_there})
        except (OSError, OutputError) as e:
            self._failed(self.folder / "sources", e)
        return known

    def _read_memo(self, name: str) -> dict[str, str]:
        """The digests in a memo; empty if it is missing, damaged or not trusted."""
        path = self.folder / "sources" / name
        try:
            with open(self._disk.sources.open(name), "rb") as f:
                self._disk.require_believed(f.fileno(), path)
                found = json.loads(f.read(_MAX_MEMO))
            digests, check = found["digests"], found["check"]
        except (OSError, OutputError) as e:
            if not isinstance(e, FileNotFoundError):
                self._failed(path, e)
            return {}
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
        if not isinstance(digests, dict) or check != _memo_check(name, digests):
            return {}
        return {k: v for k, v in digests.items() if isinstance(k, str) and isinstance(v, str)}

    def _write_memo(self, name: str, digests: dict[str, str]) -> None:
        """Write a memo. Raises OSError, OutputError."""
        with self._disk.made() as new:
            write_at(new.fd, json.dumps({"digests": digests, "check": _memo_check(name, digests)}).encode(), 0)
            new.publish(self._disk.sources, name, durable=False)

    # ------------------------------------------------------------ entries

    def fill(self, key: str, name: str, sink: RowSink) -> bool:
        """Copy a tensor from the cache into an unfinished build; returns whether it was there and sound."""
        path = self._disk.path_of(key)
        try:
            fd = self._disk.open_entry(key)
        except (OSError, OutputError) as e:
            self._failed(path, e)
            return False
        if fd is None:
            return False
        try:
            rows = self._copied(fd, key, name, sink)
            if rows is None:
                with self._counting:
                    self.n_corrupt += 1
                with suppress(OSError):
                    self._disk.drop(key)
                return False
            with suppress(OSError):
                os.utime(fd)  # marks it as used now, so that it is evicted last
        except (OSError, SourceError) as e:
            self._failed(path, e)
            return False
        finally:
            os.close(fd)
        for row, n, found in rows:
            sink.note(name, row, n, found)
        with self._counting:
            self.n_found += 1
            self.bytes_found += sink.target(name)[1].n_rows * sink.target(name)[1].row_bytes
        return True

    def _copied(self, fd: int, key: str, name: str, sink: RowSink) -> list[tuple[int, int, bytes]] | None:
        """Copy an entry to its place; returns row, count and digest of the rows, or None if it is not sound. The check
        reads the copy, since the entry's owner may write to it meanwhile. Raises OSError, QuantkitError."""
        fd_out, place = sink.target(name)
        nbytes = place.n_rows * place.row_bytes
        if os.fstat(fd).st_size != nbytes + _TRAILER.size:
            return None
        copy_range(Opened(fd, self._disk.path_of(key)), 0, Opened(fd_out, sink.folder), place.offset, nbytes)
        digest, step = hashlib.sha256(), max(1, _CHUNK // place.row_bytes)
        rows = []
        for row in range(0, place.n_rows, step):
            n = min(step, place.n_rows - row)
            raw = read_at(fd_out, n * place.row_bytes, place.offset + row * place.row_bytes)
            digest.update(raw)
            rows.append((row, n, journal.digest(raw)))
        digest.update(key.encode())
        return rows if read_at(fd, _TRAILER.size, nbytes) == _TRAILER.pack(digest.digest(), nbytes, MAGIC) else None

    def keep(self, key: str, name: str, sink: RowSink) -> None:
        """Add a tensor that is durable in a build."""
        fd, place = sink.target(name)
        nbytes = place.n_rows * place.row_bytes
        if nbytes + _TRAILER.size > self.max_bytes:
            return
        try:
            if self._disk.has(key):
                return
            with self._disk.made() as new:
                path = self._disk.tmp.path / new.temporary
                copy_range(Opened(fd, sink.folder), place.offset, Opened(new.fd, path), 0, nbytes)
                self._publish(new, key, nbytes)
        except (OSError, QuantkitError) as e:
            self._failed(self.folder, e)

    def _publish(self, new: NewFile, key: str, nbytes: int) -> None:
        """Make an entry from a file with a tensor's data. Raises OSError, OutputError."""
        digest = hashlib.sha256()
        for at in range(0, nbytes, _CHUNK):
            digest.update(read_at(new.fd, min(_CHUNK, nbytes - at), at))
        digest.update(key.encode())  # so that no entry passes for another
        write_at(new.fd, _TRAILER.pack(digest.digest(), nbytes, MAGIC), nbytes)
        self._disk.put(new, key)
        with self._counting:
            self.n_kept += 1
            self._room -= nbytes + _TRAILER.size
            if self._room < 0:
                self.evict()

    # ------------------------------------------------------------ without a build

    def has(self, key: str) -> bool:
        """Whether an entry exists, sound or not."""
        try:
            return self._disk.has(key)
        except OSError as e:
            self._failed(self._disk.path_of(key), e)
            return False

    def begin(self) -> NewFile:
        """Create a file for a tensor's data, which `end` turns into an entry. Raises OSError."""
        return self._disk.made()

    def end(self, new: NewFile, key: str, nbytes: int) -> None:
        """Turn a file from `begin` into an entry. Raises OSError, OutputError."""
        self._publish(new, key, nbytes)

    def pieces(self, key: str, sizes: Sequence[int]) -> list[bytes] | None:
        """Digests (quantkit.base.journal's) of an entry's pieces, which have these sizes in bytes; None if the entry is
        missing or not sound."""
        try:
            fd = self._disk.open_entry(key)
        except (OSError, OutputError) as e:
            self._failed(self._disk.path_of(key), e)
            return None
        if fd is None:
            return None
        nbytes, at, whole, out = sum(sizes), 0, hashlib.sha256(), []
        try:
            if os.fstat(fd).st_size == nbytes + _TRAILER.size:
                for n in sizes:
                    raw = read_at(fd, n, at)
                    whole.update(raw)
                    out.append(journal.digest(raw))
                    at += n
                whole.update(key.encode())
                if read_at(fd, _TRAILER.size, nbytes) == _TRAILER.pack(whole.digest(), nbytes, MAGIC):
                    with suppress(OSError):
                        os.utime(fd)  # marks it as used now, so that it is evicted last
                    with self._counting:
                        self.n_found += 1
                        self.bytes_found += nbytes
                    return out
            with self._counting:
                self.n_corrupt += 1
            with suppress(OSError):
                self._disk.drop(key)
        except OSError as e:
            self._failed(self._disk.path_of(key), e)
        finally:
            os.close(fd)
        return None

    def read(self, key: str, at: int, nbytes: int) -> bytes | None:
        """Read bytes of an entry; None if it is gone."""
        try:
            fd = self._disk.open_entry(key)
            if fd is None:
                return None
            try:
                raw = read_at(fd, nbytes, at)
            finally:
                os.close(fd)
        except (OSError, OutputError) as e:
            self._failed(self._disk.path_of(key), e)
            return None
        return raw if len(raw) == nbytes else None

    # ------------------------------------------------------------ its size

    def settle(self) -> None:
        """At the end of a build that added entries, enforce the size limit, including what others added meanwhile."""
        if self.n_kept:
            try:
                self.evict()
            except (OSError, QuantkitError) as e:
                self._failed(self.folder, e)

    def entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each entry, least recently used first."""
        return self._disk.entries()

    def evict(self) -> None:
        """Remove the least recently used entries until the size limit is met. Raises OSError, OutputError."""
        self._room = min(self.max_bytes - self._disk.evict(self.max_bytes), self.max_bytes // _LOOKS)


def _key(
    planned: Planned, block: tuple[int, int], digests: dict[str, str], weights: ImportanceValues | None,
    rounding: Rounding | None, in_pass: bool,
) -> str:  # fmt: skip
    """`in_pass`: the weights, where it has some, are of the covariance's pass."""
    t = planned.tensor
    h = hashlib.sha256()
    made_of: list[Any] = [kernels.version(), planned.type, t.source_type, t.quantizable, t.shape, block]
    made_of += [(digests[p.source], p[1:]) for p in t.parts]
    if rounding is not None and (said := rounding.identity(t.name)):
        made_of.append(said)
    if in_pass and planned.imatrix_status == ImatrixStatus.USED:
        assert rounding is not None
        made_of.append(("weights", rounding.digest()))
    h.update(repr(made_of).encode())
    if weights is not None and planned.imatrix_status == ImatrixStatus.USED:
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


def _memo_check(name: str, digests: Any) -> str:
    return identity.short(name, json.dumps(digests, sort_keys=True))

"""What results and unfinished work are of, as digests: models by their weights, texts by their tokens, runs by all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError
from ..hub.parallel import each
from ..model.catalogue import Catalogue, Source
from ..model.sources.shard_store import ShardStore, store_of

if TYPE_CHECKING:
    from ..forward.stream import Options

I32 = npt.NDArray[np.int32]
#: bytes of each end of a file that say which weights it has
_SAMPLE = 1 << 16


def of_model(catalogue: Catalogue) -> str:
    """Of a model, wherever its files lie: names, shapes and types of its tensors, and of each file its name, its size
    and both of its ends. Models of one shape have files of one size, but other weights in them. Raises SourceError."""
    source = catalogue.source
    if source is None:
        raise SourceError(
            catalogue.lacks
            or f"{catalogue.model}: there are no weights here, only a config; give the checkpoint or a GGUF"
        )
    h = hashlib.sha256()
    for t in catalogue.tensors:
        h.update(f"{t.name} {t.shape} {t.source_type}\n".encode())
    store = store_of(source)
    for file, size, ends in _ends_here(source.files) if store is None else _ends_there(store, source.files):
        h.update(f"{file.name} {size}\n".encode())
        for end in ends:
            h.update(end)
    return h.hexdigest()[:16]


_Ends = Iterator[tuple[Path, int, tuple[bytes, bytes]]]


def _ends_here(files: Iterable[Path]) -> _Ends:
    """Each file with its size, and the first and last of its bytes."""
    for file in files:
        try:
            with file.open("rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(0)
                first = f.read(_SAMPLE)
                f.seek(max(0, size - _SAMPLE))
                yield file, size, (first, f.read(_SAMPLE))
        except OSError as e:
            raise _unreadable(file, e) from None


def _ends_there(store: ShardStore, files: Sequence[Path]) -> _Ends:
    """The same of files on the Hub, by range, many at a time."""

    def ends(file: Path) -> tuple[Path, int, tuple[bytes, bytes]]:
        size = store.repo.files[file.name].size
        first, last = (store.repo.read(file.name, at, min(size, _SAMPLE)) for at in (0, max(0, size - _SAMPLE)))
        return file, size, (first, last)

    return each(ends, files)


def of_tokens(*arrays: I32) -> str:
    """Of tokens [n_chunks, n_ctx], and of what else is given beside them."""
    h = hashlib.sha256()
    for values in arrays:
        h.update(repr(values.shape).encode())
        h.update(np.ascontiguousarray(values, np.int32).tobytes())
    return h.hexdigest()[:16]


def of_run(source: Source, tokens: I32, settings: object) -> str:
    """Of an unfinished run, which goes on only with the same settings and tokens, and while no file of the source has
    been written to; of one on the Hub only at the same commit. Raises SourceError."""
    h = hashlib.sha256(repr((settings, tokens.shape)).encode())
    h.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    store = store_of(source)
    if store is not None:
        h.update(f"hf://{store.repo.name} {store.repo.commit} {store.shards_digest}".encode())
        return h.hexdigest()
    for file in source.files:
        try:
            s = file.stat()
        except OSError as e:
            raise _unreadable(file, e) from None
        h.update(repr((os.path.realpath(file), s.st_size, s.st_mtime_ns)).encode())
    return h.hexdigest()


def of_pass(
    catalogue: Catalogue, tokens: I32, forward: Options, n_threads: int, own_experts: bool, weighting: str = ""
) -> str:
    """Of the second moments that a pass gives, wherever its files lie: 64 hex digits. Raises SourceError."""
    how = (forward.dtype, forward.device.partition(":")[0], n_threads, own_experts, *([weighting] if weighting else []))
    settings = ("second moments 1", of_model(catalogue), of_tokens(tokens), how)
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def _unreadable(file: Path, e: OSError) -> SourceError:
    return SourceError(f"{file}: cannot be read: {e.strerror or e}")


def said(file: Path) -> str | None:
    """A small file's text, such as a digest that was written down; None where there is none."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return None

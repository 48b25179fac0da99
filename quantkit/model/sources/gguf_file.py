"""A GGUF file as a source of weights: single, or split into shards by llama-gguf-split or llama-quantize."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError
from ...gguf.header import KV, TensorInfo, read_header
from ...gguf.shards import SPLIT_KEYS, Shard, read_files
from ..catalogue import SourceTensor
from .files import Files, Reader


class GgufHeaders:
    """The checked headers of a GGUF, wherever it is: `infos` in file order, `kvs` without the split keys. Where `lacks`
    says why weights cannot be read, `note` says what is not here."""

    def __init__(
        self, where: str, stem: str, kvs: tuple[KV, ...], infos: list[TensorInfo], lacks: str = "", note: str = ""
    ) -> None:
        self.where, self.stem, self.kvs, self.infos = where, stem, kvs, infos
        self.lacks, self.note = lacks, note
        self.commit = ""
        """at which it was read on the Hub"""


class GgufFile(GgufHeaders):
    """A GGUF whose weights can be read: `tensors` by name in file order. `reader` reads them otherwise than from the
    files."""

    block = (1, 1)

    def __init__(
        self, path: Path, kvs: tuple[KV, ...], infos: list[tuple[Path, TensorInfo]], reader: Reader | None = None
    ) -> None:
        super().__init__(str(path), path.stem, kvs, [info for _, info in infos])
        self.path = path
        self.tensors = {
            i.name: SourceTensor(i.name, i.type, tuple(reversed(i.shape)), file, i.offset, i.nbytes)
            for file, i in infos
        }
        self.files = tuple(dict.fromkeys(file for file, _ in infos)) or (path,)
        self._files: Reader = reader or Files(self.files)
        self.store = reader
        """what shards of a repository on the Hub come and go in (shard_store); None where they lie here"""

    def tensor(self, name: str) -> SourceTensor:
        return self.tensors[name]

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with the stored bytes of a tensor from byte `start` on."""
        self._files.read(tensor, start, out)

    def will_need(self, tensor: SourceTensor, start: int, nbytes: int) -> None:
        """Ask for stored bytes of a tensor ahead of their reading."""
        self._files.will_need(tensor, start, nbytes)

    def scale(self, name: str) -> npt.NDArray[np.float32]:
        raise SourceError(f"{self.path}: '{name}' has no scales; GGUF blocks carry their own")


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF; for a split one give the first shard. Raises SourceError for anything inconsistent."""
    kvs, infos = joined(read_files(path, read_header))
    return GgufFile(path, kvs, [(path.with_name(shard.name), info) for shard, info in infos])


def open_as_far(path: Path) -> GgufHeaders:
    """A GGUF or, where its data is cut short or later shards are missing, its headers as far as they are here. Raises
    SourceError."""
    try:
        return open_gguf(path)
    except SourceError as e:
        if not e.cut:
            raise
        whole = e
    shards: list[Shard] = []
    try:
        shards.extend(read_files(path, lambda file: read_header(file, cut=True)))
        kvs, infos = joined(shards)
        note = "not whole, so nothing can be built from it: the file ends before its data"
    except SourceError as e:
        if not e.cut:
            raise
        shards = list(_those_here(path))
        first = shards[0]
        kvs = tuple(item for item in first.header.kvs if item.key not in SPLIT_KEYS)
        infos = [(shard, info) for shard in shards for info in shard.header.tensors]
        total = first.numbers.get("split.tensors.count")
        of = f" of {total:,}" if total is not None else ""
        note = (
            f"not whole: {len(shards)} of {first.n_shards} shards are here with {len(infos):,}{of} tensors; all sizes "
            "are of those only, and nothing can be built from it"
        )
    return GgufHeaders(str(path), path.stem, kvs, [info for _, info in infos], str(whole), note)


def _those_here(first: Path) -> Iterator[Shard]:
    """The shards up to the first that is missing."""
    try:
        yield from read_files(first, lambda file: read_header(file, cut=True))
    except SourceError as e:
        if not e.cut:
            raise


def joined(shards: Iterable[Shard]) -> tuple[tuple[KV, ...], list[tuple[Shard, TensorInfo]]]:
    """The keys (without the split ones) and the tensors of a GGUF, each with its shard. Raises SourceError for shards
    that do not fit together."""
    found: list[Shard] = []
    for shard in shards:
        if found and not shard.is_in_its_place:
            raise SourceError(
                f"{shard.where}: its name says shard {shard.no + 1} of {shard.n_shards}, but its split keys say "
                f"{shard.said}; get it again"
            )
        found.append(shard)
    first = found[0]
    infos = [(shard, info) for shard in found for info in shard.header.tensors]
    names = {info.name for _, info in infos}
    if len(names) != len(infos):
        raise SourceError(
            f"{first.where}: {len(infos) - len(names)} tensor names occur in more than one shard; are all of one model?"
        )
    total = first.numbers.get("split.tensors.count")
    if first.n_shards > 1 and total is not None and total != len(infos):
        raise SourceError(
            f"{first.where}: split.tensors.count says {total} tensors, the {first.n_shards} shards hold {len(infos)}; "
            "are all of one model?"
        )
    return tuple(item for item in first.header.kvs if item.key not in SPLIT_KEYS), infos

"""A GGUF file as a source of weights: single, or split into shards by llama-gguf-split or llama-quantize."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..catalogue import SourceTensor
from ..errors import SourceError
from ..gguf_format import ALIGNMENT, INTEGERS, KV, TYPE_NAMES, Header, TensorInfo, decode, read_header
from .files import Files

_SHARD = re.compile(r"^(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


class GgufHeaders:
    """The checked headers of a GGUF, wherever it is: `infos` in file order, `kvs` without the split keys."""

    def __init__(self, where: str, stem: str, kvs: tuple[KV, ...], infos: list[TensorInfo]) -> None:
        self.where, self.stem, self.kvs, self.infos = where, stem, kvs, infos


class GgufFile(GgufHeaders):
    """A GGUF whose weights can be read: `tensors` by name in file order."""

    block = (1, 1)

    def __init__(self, path: Path, kvs: tuple[KV, ...], infos: list[tuple[Path, TensorInfo]]) -> None:
        super().__init__(str(path), path.stem, kvs, [info for _, info in infos])
        self.path = path
        self.tensors = {
            i.name: SourceTensor(i.name, i.type, tuple(reversed(i.shape)), file, i.offset, i.nbytes)
            for file, i in infos
        }
        self.files = tuple(dict.fromkeys(file for file, _ in infos)) or (path,)
        self._files = Files(self.files)

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


def _split(where: str, header: Header) -> dict[str, int]:
    found = {}
    for item in header.kvs:
        if item.key in SPLIT_KEYS:
            if item.type not in INTEGERS:
                raise SourceError(f"{where}: {item.key} is of type {TYPE_NAMES[item.type]}, not an integer")
            found[item.key] = int(decode(item))
    return found


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF; for a split one give the first shard. Raises SourceError for anything inconsistent."""

    def header(name: str) -> Header:
        if name != path.name and not path.with_name(name).exists():
            raise FileNotFoundError
        return read_header(path.with_name(name))

    kvs, infos = read_shards(path.name, lambda name: str(path.with_name(name)), header)
    return GgufFile(path, kvs, [(path.with_name(name), info) for name, info in infos])


def read_shards(
    first_name: str, where: Callable[[str], str], read: Callable[[str], Header]
) -> tuple[tuple[KV, ...], list[tuple[str, TensorInfo]]]:
    """The keys (without the split ones) and the tensors, each with the name of its file, of a GGUF whose
    first or only file is called `first_name`. `where` gives the place of a file for messages; `read` gives
    its header, or raises FileNotFoundError. Raises SourceError for shards that do not fit together."""
    first = read(first_name)
    split = _split(where(first_name), first)
    count = split.get("split.count", 0)
    headers = [(first_name, first)]
    if count > 1:
        m = _SHARD.match(first_name)
        if split.get("split.no", 0) != 0 or (m and int(m["no"]) != 1):
            want = f"{m['prefix']}-00001-of-{m['count']}.gguf" if m else "the one with split.no = 0"
            raise SourceError(
                f"{where(first_name)}: this is shard {split.get('split.no', 0) + 1} of {count}; give the first, {want}"
            )
        if not m or int(m["count"]) != count:
            raise SourceError(
                f"{where(first_name)}: is the first of {count} shards, but not named …-00001-of-{count:05d}.gguf; "
                "give it and the others their names back"
            )
        for no in range(2, count + 1):
            shard = f"{m['prefix']}-{no:05d}-of-{count:05d}.gguf"
            try:
                header = read(shard)
            except FileNotFoundError:
                raise SourceError(
                    f"{where(shard)}: shard {no} of {count} is missing; get it and put it beside the first"
                ) from None
            got = _split(where(shard), header)
            if got.get("split.no") != no - 1 or got.get("split.count") != count:
                says = ", ".join(f"{k} {v}" for k, v in got.items()) or "nothing"
                raise SourceError(
                    f"{where(shard)}: its name says shard {no} of {count}, but its split keys say {says}; get it again"
                )
            headers.append((shard, header))
    for name, header in headers:
        if header.alignment != ALIGNMENT:
            raise SourceError(
                f"{where(name)}: general.alignment is {header.alignment}; llama-quantize copies that key and aligns to "
                f"{ALIGNMENT}, which breaks the file: convert the model again without it"
            )
    infos = [(name, info) for name, header in headers for info in header.tensors]
    names = {info.name for _, info in infos}
    if len(names) != len(infos):
        raise SourceError(
            f"{where(first_name)}: {len(infos) - len(names)} tensor names occur in more than one shard; are all of one "
            "model?"
        )
    total = split.get("split.tensors.count")
    if count > 1 and total is not None and total != len(infos):
        raise SourceError(
            f"{where(first_name)}: split.tensors.count says {total} tensors, the {count} shards hold {len(infos)}; are "
            "all of one model?"
        )
    return tuple(item for item in first.kvs if item.key not in SPLIT_KEYS), infos

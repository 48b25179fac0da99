"""What the shards of a GGUF are, for all who read or make them: names, keys, where they end, and how a set is read.

Every shard has split.no, split.tensors.count and split.count; the first has all other keys. Source:
tools/gguf-split/gguf-split.cpp, llama_split_path of src/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import OutputError, SourceError
from .gguf_format import I32, INTEGERS, KV, TYPE_NAMES, U16, Header, decode, kv, pad

SPLIT_KEYS = ("split.no", "split.tensors.count", "split.count")
MAX_SHARDS = 65535
DEFAULT_MAX_TENSORS = 128

_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5,})-of-(?P<count>\d{5,})\.gguf", re.S)


class Limits(NamedTuple):
    """How to cut: at `max_bytes` of tensor data a shard if given (each tensor padded to 32, headers not
    counted), else after every `max_tensors` tensors. `no_tensor_first` puts a shard with the keys only before."""

    max_tensors: int = DEFAULT_MAX_TENSORS
    max_bytes: int | None = None
    no_tensor_first: bool = False


class Shard(NamedTuple):
    """A file of a set, or the only one. `no`, from 0, and `n_shards` are by its name; `numbers` is what its split keys
    say; `where` is its place for messages."""

    name: str
    where: str
    no: int
    n_shards: int
    header: Header
    numbers: dict[str, int]

    @property
    def is_in_its_place(self) -> bool:
        """Whether the split keys agree with the name."""
        return self.numbers.get("split.no") == self.no and self.numbers.get("split.count") == self.n_shards

    @property
    def said(self) -> str:
        """What the split keys say, for messages."""
        return ", ".join(f"{key} {number}" for key, number in self.numbers.items()) or "nothing"


class SplitName(NamedTuple):
    """What a shard's name says: `no` from 1."""

    prefix: str
    no: int
    n_shards: int


def split_name(name: str) -> SplitName | None:
    """The parts of the name of a shard, PREFIX-00001-of-00003.gguf; None for any other name."""
    m = _NAME.fullmatch(name)
    return SplitName(m["prefix"], int(m["no"]), int(m["count"])) if m else None


def check_prefix(out: Path) -> None:
    """Raise OutputError where the name that shards get theirs from is a shard's: they would be numbered twice."""
    stem = out.name.removesuffix(".gguf")
    given = split_name(f"{stem}.gguf")
    if given is not None:
        right = out.with_name(given.prefix + out.name.removeprefix(stem))
        raise OutputError(f"{out}: has a shard's number already, and shards are numbered here; give {right}")


def shard_name(prefix: str, no: int, count: int) -> str:
    """llama.cpp's name of shard `no`, counted from 0 (llama_split_path)."""
    return f"{prefix}-{no + 1:05d}-of-{count:05d}.gguf"


def split_kvs(no: int, n_shards: int, n_tensors: int) -> list[KV]:
    """The keys of shard `no` of a model of so many tensors."""
    return [
        kv("split.no", U16, no),
        kv("split.tensors.count", I32, n_tensors),
        kv("split.count", U16, n_shards),
    ]


def groups(sizes: Sequence[int], limits: Limits) -> list[tuple[int, int]]:
    """The shards of tensors of these sizes in bytes, each as the first index and the one after the last."""
    starts, current = [0], 0
    for i, nbytes in enumerate(sizes):
        n = pad(nbytes)
        if limits.max_bytes is None:
            full = i > 0 and i % limits.max_tensors == 0
        else:
            full = i > starts[-1] and current + n > limits.max_bytes
        if full:
            starts.append(i)
            current = 0
        current += n
    cut = list(zip(starts, [*starts[1:], len(sizes)], strict=True))
    return [(0, 0), *cut] if limits.no_tensor_first else cut


# ---------------------------------------------------------------- reading


def read_set(first: str, where: Callable[[str], str], read: Callable[[str], Header]) -> Iterator[Shard]:
    """The files of a GGUF whose first or only one is called `first`, in order, each when its header has been read.
    `where` gives the place of a file for messages; `read` gives its header, or raises FileNotFoundError.

    Raises SourceError where `first` is not the first of its set or not named so, for a shard that is missing, and for
    split keys that are no integers. Whether the shards fit together is for the caller to see.
    """
    header = read(first)
    numbers = _numbers(where(first), header)
    count = max(1, numbers.get("split.count", 0))
    prefix = _prefix(where(first), first, numbers.get("split.no", 0), count) if count > 1 else ""
    yield Shard(first, where(first), 0, count, header, numbers)
    for no in range(1, count):
        name = shard_name(prefix, no, count)
        try:
            header = read(name)
        except FileNotFoundError:
            raise SourceError(
                f"{where(name)}: shard {no + 1} of {count} is missing; get it and put it beside the first"
            ) from None
        yield Shard(name, where(name), no, count, header, _numbers(where(name), header))


def read_files(first: Path, read: Callable[[Path], Header]) -> Iterator[Shard]:
    """`read_set` of files: the others lie beside the first."""

    def place(name: str) -> Path:
        return first if name == first.name else first.with_name(name)

    def header(name: str) -> Header:
        path = place(name)
        if path is not first and not path.exists():
            raise FileNotFoundError
        return read(path)

    return read_set(first.name, lambda name: str(place(name)), header)


def _numbers(where: str, header: Header) -> dict[str, int]:
    found = {}
    for item in header.kvs:
        if item.key in SPLIT_KEYS:
            if item.type not in INTEGERS:
                raise SourceError(f"{where}: {item.key} is of type {TYPE_NAMES[item.type]}, not an integer")
            found[item.key] = int(decode(item))
    return found


def _prefix(where: str, first: str, no: int, count: int) -> str:
    """The prefix of the names of a set. Raises SourceError unless `first` is the name of the first shard."""
    if count > MAX_SHARDS:
        raise SourceError(f"{where}: split.count says {count:,} shards, more than {MAX_SHARDS:,}; get it again")
    m = _NAME.fullmatch(first)
    if no != 0 or (m and int(m["no"]) != 1):
        want = shard_name(m["prefix"], 0, count) if m else "the one with split.no = 0"
        raise SourceError(f"{where}: this is shard {no + 1} of {count}; give the first, {want}")
    if not m or first != shard_name(m["prefix"], 0, count):
        raise SourceError(
            f"{where}: is the first of {count} shards, but not named …{shard_name('', 0, count)}; give it and the "
            "others their names back"
        )
    return m["prefix"]

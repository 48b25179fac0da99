"""The shards of a GGUF, for everything that reads or makes them: names, keys, where to cut, how to read a set.

Every shard has split.no, split.tensors.count and split.count; the first has all other keys. Source:
tools/gguf-split/gguf-split.cpp, llama_split_path of src/llama.cpp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..base.errors import OutputError, SourceError
from .header import (
    I32,
    INTEGERS,
    KV,
    MAGIC,
    TYPE_NAMES,
    U16,
    Header,
    PrefixTooShortError,
    decode,
    kv,
    pad,
    parse_header,
)

SPLIT_KEYS = ("split.no", "split.tensors.count", "split.count")
MAX_SHARDS = 65535
DEFAULT_MAX_TENSORS = 128

#: accepts capitals, which some downloads and file systems use; llama.cpp itself needs small letters
_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5,})-(?P<of>of)-(?P<count>\d{5,})(?P<end>\.gguf)", re.S | re.I)
#: most bytes read of the header of a shard that follows the first one in the same file
_LATER_HEADER = 1 << 22


class Limits(NamedTuple):
    """Where to cut: at `max_bytes` of tensor data in a shard if given (tensors padded to 32, headers not
    counted), else after every `max_tensors` tensors. `no_tensor_first` starts with a shard that has only the keys."""

    max_tensors: int = DEFAULT_MAX_TENSORS
    max_bytes: int | None = None
    no_tensor_first: bool = False


class Shard(NamedTuple):
    """A file of a set, or the only file. `no`, from 0, and `n_shards` come from its name, `numbers` from its split
    keys; `where` is its place for messages."""

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
    """The parts of a shard's name; `no` counts from 1."""

    prefix: str
    no: int
    n_shards: int


def split_name(name: str) -> SplitName | None:
    """Parse the name of a shard, PREFIX-00001-of-00003.gguf; None for any other name."""
    m = _NAME.fullmatch(name)
    return SplitName(m["prefix"], int(m["no"]), int(m["count"])) if m else None


def check_prefix(out: Path) -> None:
    """Raise OutputError if the name from which shards get theirs is a shard's: they would be numbered twice."""
    stem = out.name.removesuffix(".gguf")
    given = split_name(f"{stem}.gguf")
    if given is not None:
        right = out.with_name(given.prefix + out.name.removeprefix(stem))
        raise OutputError(f"{out}: has a shard's number already, and shards are numbered here; give {right}")


def shard_name(prefix: str, no: int, count: int) -> str:
    """Return llama.cpp's name of shard `no`, counted from 0 (llama_split_path)."""
    return f"{prefix}-{no + 1:05d}-of-{count:05d}.gguf"


def is_usual_name(name: str) -> bool:
    """Whether llama.cpp finds the other shards from this name of the first one."""
    m = _NAME.fullmatch(name)
    return m is not None and m["of"] == "of" and m["end"] == ".gguf"


def split_kvs(no: int, n_shards: int, n_tensors: int) -> list[KV]:
    """Return the split keys of shard `no`; `n_tensors`: tensors of the whole model."""
    return [
        kv("split.no", U16, no),
        kv("split.tensors.count", I32, n_tensors),
        kv("split.count", U16, n_shards),
    ]


def groups(sizes: Sequence[int], limits: Limits) -> list[tuple[int, int]]:
    """Divide tensors of these sizes in bytes into shards, each as (first index, index after the last)."""
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


def read_set(
    first: str,
    where: Callable[[str], str],
    read: Callable[[str], Header],
    called: Callable[[str], str] = lambda name: name,
) -> Iterator[Shard]:
    """Yield the files of a GGUF in order, each once its header has been read. `first` is the name of the first or only
    file. `where` returns the place of a file for messages; `read` its header, or raises FileNotFoundError; `called` the
    name that a shard really has, which may differ in capitals.

    Raises SourceError if `first` is not the first of its set or not named so, if a shard is missing, and for
    split keys that are not integers. The caller must check that the shards fit together.
    """
    header = read(first)
    numbers = _numbers(where(first), header)
    count = max(1, numbers.get("split.count", 0))
    name_of = _names(where(first), first, numbers.get("split.no", 0), count) if count > 1 else None
    yield Shard(first, where(first), 0, count, header, numbers)
    for no in range(1, count):
        assert name_of is not None
        name = called(name_of(no))
        try:
            header = read(name)
        except FileNotFoundError:
            raise SourceError(
                f"{where(name)}: shard {no + 1} of {count} is missing; get it and put it beside the first", cut=True
            ) from None
        yield Shard(name, where(name), no, count, header, _numbers(where(name), header))


def read_files(first: Path, read: Callable[[Path], Header]) -> Iterator[Shard]:
    """Run `read_set` on files: the others lie beside the first."""

    def place(name: str) -> Path:
        return first if name == first.name else first.with_name(name)

    def header(name: str) -> Header:
        path = place(name)
        if path is not first and not path.exists():
            raise FileNotFoundError
        found = read(path)
        if path is first:
            _refuse_joined(path, found)
        return found

    return read_set(first.name, lambda name: str(place(name)), header, lambda name: _called(first.parent, name))


def _called(folder: Path, name: str) -> str:
    """Return a file's name in the folder: as given, or with other capitals."""
    if (folder / name).exists():
        return name
    return next((other for other in os.listdir(folder) if other.lower() == name.lower()), name)


def _refuse_joined(path: Path, header: Header) -> None:
    """Raise SourceError for a file that is several shards joined one after the other, as by cat."""
    count = _numbers(str(path), header).get("split.count", 0)
    if count < 2:
        return
    starts, at = [0], _end(header)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(starts) < count and os.pread(file.fileno(), len(MAGIC), at) == MAGIC:
            starts.append(at)
            try:
                at += _end(parse_header(str(path), os.pread(file.fileno(), _LATER_HEADER, at), size - at))
            except (PrefixTooShortError, SourceError):
                break
    if len(starts) == 1:
        return
    shown = ", ".join(f"{at:,}" for at in starts[:6]) + (", …" if len(starts) > 6 else "")
    raise SourceError(
        f"{path}: is {len(starts)} of {count} shards one behind the other in one file, as `cat` joins them, which no "
        f"program can use; download the shards again, or cut the file where they begin (bytes {shown}) and name the "
        f"pieces {shard_name('MODEL', 0, count)} and so on; `quantkit merge` then makes one file of them"
    )


def _end(header: Header) -> int:
    """Return where a file ends according to its header."""
    end = max((t.offset + t.nbytes for t in header.tensors), default=header.data_offset)
    return header.data_offset + pad(end - header.data_offset, header.alignment)


def _numbers(where: str, header: Header) -> dict[str, int]:
    found = {}
    for item in header.kvs:
        if item.key in SPLIT_KEYS:
            if item.type not in INTEGERS:
                raise SourceError(f"{where}: {item.key} is of type {TYPE_NAMES[item.type]}, not an integer")
            found[item.key] = int(decode(item))
    return found


def _names(where: str, first: str, no: int, count: int) -> Callable[[int], str]:
    """Return a function from a shard's number (from 0) to its name, spelled like `first`. Raises SourceError unless
    `first` is the first shard's name."""
    if count > MAX_SHARDS:
        raise SourceError(f"{where}: split.count says {count:,} shards, more than {MAX_SHARDS:,}; get it again")
    m = _NAME.fullmatch(first)

    def name(i: int) -> str:
        return f"{m['prefix']}-{i + 1:05d}-{m['of']}-{count:05d}{m['end']}" if m else ""

    if no != 0 or (m and int(m["no"]) != 1):
        want = name(0) if m else "the one with split.no = 0"
        raise SourceError(f"{where}: this is shard {no + 1} of {count}; give the first, {want}")
    if not m or first != name(0):
        raise SourceError(
            f"{where}: is the first of {count} shards, but not named …{shard_name('', 0, count)}; give it and the "
            "others their names back"
        )
    return name

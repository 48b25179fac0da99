"""Shards of a GGUF: reading and checking a set, and planning how to split, re-split or merge it.

The files are those of llama-gguf-split for the same options (tools/gguf-split/gguf-split.cpp), except where it
is wrong: tensors above the limit get their own shard even when they come first, a set given by its
first shard is split as the whole model, and a truncated or foreign shard is refused. This module reads only headers and
the few bytes between tensors; split_writer.py moves the data.

Only the split keys tie a set together. So a foreign shard is recognized by its name, its numbers, its tensors
(duplicate or missing), or a key whose value differs in the first shard. A shard from another build of the same model
with the same tensors cannot be told from the right one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..base.errors import DamageError, OutputError, SourceError, UnsupportedError
from .header import (
    ALIGNMENT,
    KV,
    U16,
    VERSION,
    Header,
    PrefixTooShortError,
    TensorInfo,
    decode,
    header_bytes,
    kv,
    pad,
    parse_header,
)
from .shards import MAX_SHARDS, SPLIT_KEYS, Limits, Shard, check_prefix, groups, read_files, shard_name, split_kvs
from .types import IK_TYPES

_FIRST_READ = 1 << 20
#: file size assumed while a header is parsed; the length is checked later, for a message that gives exact numbers
_ANY_LENGTH = 1 << 62
#: most bytes read between two tensors; a regular gap is shorter than the alignment
_MAX_GAP = 1 << 16


class Input(NamedTuple):
    """A file of a set, as it was when its header was read. `mtime_ns` and `inode` show whether it has changed."""

    path: Path
    nbytes: int
    mtime_ns: int
    inode: int


class Stored(NamedTuple):
    """A tensor in a file of a set. `zeros`: bytes between its data and what comes next, if all are zero."""

    file: int
    info: TensorInfo
    zeros: int


@dataclass(frozen=True)
class ShardSet:
    """A model in one or several files, checked."""

    inputs: tuple[Input, ...]
    kvs: tuple[KV, ...]
    """keys of the first file, including the split keys"""
    tensors: tuple[Stored, ...]
    alignment: int
    """alignment of the first file, which alone has general.alignment; the others have 32"""
    notes: tuple[str, ...]
    """why splitting this file and merging the result will not give the same bytes; empty for shards"""

    @property
    def own_kvs(self) -> tuple[KV, ...]:
        """The keys of the model itself."""
        return tuple(item for item in self.kvs if item.key not in SPLIT_KEYS)


class Range(NamedTuple):
    """Bytes to copy from a file of the set to an offset in the output."""

    file: int
    src_offset: int
    dst_offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: its header, data copied from other files, and zeros elsewhere."""

    path: Path
    header: bytes
    ranges: tuple[Range, ...]
    nbytes: int
    n_tensors: int


# ---------------------------------------------------------------- reading


def open_set(first: Path) -> ShardSet:
    """Read the headers of a GGUF: of a single file, or of all shards if given the first one.

    Raises SourceError if something is missing, malformed or not the first shard, DamageError for a shard that is
    truncated, too long, or from another set.
    """
    inputs: list[Input] = []
    first_raw = b""

    def read(path: Path) -> Header:
        nonlocal first_raw
        opened, header, raw = _read(path)
        inputs.append(opened)
        first_raw = first_raw or raw
        return header

    shards = read_files(first, read)
    head = next(shards)
    _check_length(inputs[0], head)
    tensors = list(_stored(0, inputs[0], head.header))
    for shard in shards:
        opened = inputs[shard.no]
        _check_same_set(head, shard)
        _check_length(opened, shard)
        tensors += _stored(shard.no, opened, shard.header)
    if head.n_shards > 1:
        _check_tensors(inputs, tensors, head.numbers)
    notes = () if head.n_shards > 1 else tuple(_notes(inputs[0], head.header, first_raw, tensors, head.numbers))
    return ShardSet(tuple(inputs), head.header.kvs, tuple(tensors), head.header.alignment, notes)


def _read(path: Path) -> tuple[Input, Header, bytes]:
    """Return a file, its header, and the header's bytes."""
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise SourceError(f"{path}: is not a regular file")
            n = _FIRST_READ
            while True:
                prefix = os.pread(file.fileno(), n, 0)
                try:
                    header = parse_header(str(path), prefix, _ANY_LENGTH)
                    break
                except PrefixTooShortError as e:
                    if len(prefix) < n:
                        raise DamageError(
                            f"{path}: is truncated: the file ends at {info.st_size:,}, inside its header, which needs "
                            f"{e.needed:,} bytes or more; get it again"
                        ) from None
                    n *= 4
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    return Input(path, info.st_size, info.st_mtime_ns, info.st_ino), header, prefix[: header.data_offset]


def _stored(file: int, opened: Input, header: Header) -> tuple[Stored, ...]:
    """Return the tensors in the order of the header, each with the number of zeros after its data."""
    starts = sorted(t.offset for t in header.tensors)
    following = dict(zip(starts, [*starts[1:], opened.nbytes], strict=True)) if starts else {}
    gaps = {t.name: following[t.offset] - t.offset - t.nbytes for t in header.tensors}
    for t in header.tensors:
        if t.type in IK_TYPES and gaps[t.name] >= header.alignment:
            raise UnsupportedError(
                f"{opened.path}: {gaps[t.name]:,} bytes follow '{t.name}' ({t.type}), which may be its own: types of "
                "ik_llama.cpp have had other sizes over time; use ik_llama.cpp's own llama-gguf-split"
            )
    zeros = {}
    if any(0 < gap <= _MAX_GAP for gap in gaps.values()):
        try:
            with open(opened.path, "rb") as f:
                for t in header.tensors:
                    n = gaps[t.name]
                    if 0 < n <= _MAX_GAP and os.pread(f.fileno(), n, t.offset + t.nbytes) == bytes(n):
                        zeros[t.name] = n
        except OSError as e:
            raise SourceError(f"{opened.path}: cannot be read: {e.strerror or e}") from None
    return tuple(Stored(file, t, zeros.get(t.name, 0)) for t in header.tensors)


# ---------------------------------------------------------------- checks


def _check_length(opened: Input, shard: Shard) -> None:
    """Check that the file has all its data and, if it is one of several, nothing more; the padding after the last
    tensor may be missing. Raises DamageError."""
    header, is_one_of_several = shard.header, shard.n_shards > 1
    end = max((t.offset + t.nbytes for t in header.tensors), default=header.data_offset - header.alignment + 1)
    whole = header.data_offset + pad(max(end - header.data_offset, 0), header.alignment)
    what = f"shard {shard.no + 1} of {shard.n_shards} " if is_one_of_several else ""
    if opened.nbytes < end:
        raise DamageError(
            f"{opened.path}: {what}is truncated: by its header it has {whole:,} bytes, found are {opened.nbytes:,}, "
            f"{whole - opened.nbytes:,} less; get it again"
        )
    if is_one_of_several and opened.nbytes > whole:
        raise DamageError(
            f"{opened.path}: {what}is too long: by its header it has {whole:,} bytes, found are {opened.nbytes:,}, "
            f"{opened.nbytes - whole:,} more; get it again"
        )


def _check_same_set(first: Shard, shard: Shard) -> None:
    """Raise DamageError if the header of a later shard contradicts its name or the first shard."""
    if not shard.is_in_its_place:
        raise DamageError(
            f"{shard.where}: its name says shard {shard.no + 1} of {shard.n_shards} (split.no {shard.no}), but its "
            f"split keys say {shard.said}; it is another shard under this name: get the right one"
        )
    total, own = (numbers.get("split.tensors.count") for numbers in (first.numbers, shard.numbers))
    if own is not None and own != total:
        raise DamageError(
            f"{shard.where}: is of another set: it says the model has {own:,} tensors, the first shard says {total}; "
            "get the shards of one build"
        )
    firsts = {item.key: item for item in first.header.kvs}
    for item in shard.header.kvs:
        if item.key not in SPLIT_KEYS and item.key in firsts and item != firsts[item.key]:
            shown = f"'{decode(item)}', not '{decode(firsts[item.key])}'"
            raise DamageError(
                f"{shard.where}: is of another set: its {item.key} is {shown if len(shown) < 200 else 'another'} as in "
                "the first shard; get the shards of one build"
            )


def _check_tensors(inputs: Sequence[Input], tensors: Sequence[Stored], split: dict[str, int]) -> None:
    seen: dict[str, int] = {}
    for t in tensors:
        before = seen.setdefault(t.info.name, t.file)
        if before != t.file:
            raise DamageError(
                f"{inputs[t.file].path}: '{t.info.name}' is also in {inputs[before].path.name}: shards "
                f"{before + 1} and {t.file + 1} are not of one set; get the shards of one build"
            )
    total = split.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise DamageError(
            f"{inputs[0].path}: split.tensors.count says {total:,} tensors, its {len(inputs)} shards hold "
            f"{len(tensors):,}; get the shards of one build"
        )


def _notes(opened: Input, header: Header, raw: bytes, stored: Sequence[Stored], split: dict[str, int]) -> list[str]:
    """Explain what neither its shards nor llama-gguf-split's can preserve of a single file; [] if nothing is lost."""
    notes = []
    if split:
        keys = ", ".join(k for k in SPLIT_KEYS if k in split)
        notes.append(f"it has {keys}, as llama-gguf-split --merge leaves them; `quantkit merge` writes them with "
                     "--gguf-split-compat only")  # fmt: skip
    made = _file(opened.path, header.kvs, stored, header.alignment)
    n_data = made.nbytes - len(made.header)
    in_place = opened.nbytes == header.data_offset + n_data and (
        not stored or (len(made.ranges) == 1 and stored[-1].zeros == n_data - made.ranges[0].nbytes)
    )
    if not in_place:
        notes.append("its data is not as llama.cpp lays it out: in the order of the header, padded with zeros, nothing "
                     "between or after")  # fmt: skip
    if header.version != VERSION:
        notes.append(f"it is GGUF version {header.version}, what is written is version {VERSION}")
    elif in_place and made.header != raw:
        notes.append("its header is not as llama.cpp writes it: it states trailing dimensions of 1, or is padded with "
                     "something else than zeros")  # fmt: skip
    return notes


# ---------------------------------------------------------------- planning


def plan_split(model: ShardSet, prefix: Path, limits: Limits) -> tuple[OutputFile, ...]:
    """Plan the shards of a model. Raises OutputError if there are more than can be numbered, or if the prefix is
    already a shard's name."""
    check_prefix(prefix)
    cut = groups([t.info.nbytes for t in model.tensors], limits)
    count = len(cut)
    if count > MAX_SHARDS:
        raise OutputError(f"{prefix}: these limits make {count:,} shards, more than {MAX_SHARDS:,}; raise the limit")
    out = []
    for no, (start, stop) in enumerate(cut):
        own = split_kvs(no, count, len(model.tensors))
        kvs = [*model.own_kvs, *own] if no == 0 else own
        path = prefix.with_name(shard_name(prefix.name, no, count))
        out.append(_file(path, kvs, model.tensors[start:stop], model.alignment if no == 0 else ALIGNMENT))
    return tuple(out)


def plan_merge(model: ShardSet, out: Path, gguf_split_compat: bool = False) -> OutputFile:
    """Plan the merged file of a set: as it was before the split, or with the split keys as llama-gguf-split --merge
    leaves them (split.count last, and 0). Raises SourceError for a file that was never split."""
    if not any(item.key in SPLIT_KEYS for item in model.kvs):
        raise SourceError(f"{model.inputs[0].path}: is one whole file, not a shard: there is nothing to merge")
    kvs = model.own_kvs
    if gguf_split_compat:
        kvs = (*(item for item in model.kvs if item.key != "split.count"), kv("split.count", U16, 0))
    return _file(out, kvs, model.tensors, model.alignment)


def _file(path: Path, kvs: Sequence[KV], tensors: Sequence[Stored], alignment: int) -> OutputFile:
    """Plan a file with these keys and tensors. Tensors that are adjacent in source and output share one range."""
    infos, at = [], 0
    for t in tensors:
        infos.append((t.info.name, t.info.shape, t.info.type, at))
        at += pad(t.info.nbytes, alignment)
    header = header_bytes(kvs, infos, alignment)
    ranges: list[Range] = []
    zeros = 0
    for t, (_, _, _, offset) in zip(tensors, infos, strict=True):
        made = Range(t.file, t.info.offset, len(header) + offset, t.info.nbytes)
        if ranges and (joined := _joined(ranges[-1], made, zeros)):
            ranges[-1] = joined
        else:
            ranges.append(made)
        zeros = t.zeros
    return OutputFile(path, header, tuple(ranges), len(header) + at, len(tensors))


def _joined(a: Range, b: Range, zeros: int) -> Range | None:
    """Join two ranges if the same number of bytes, all zero, lies between them in both files; else None."""
    gap = b.src_offset - a.src_offset - a.nbytes
    if a.file != b.file or gap < 0 or gap > zeros or gap != b.dst_offset - a.dst_offset - a.nbytes:
        return None
    return Range(a.file, a.src_offset, a.dst_offset, b.src_offset + b.nbytes - a.src_offset)

"""A second reader of GGUF headers, independent of the code that writes them.

    "GGUF" u32 version, u64 tensors, u64 keys
    key:    string name, u32 type, value          string: u64 length, bytes
    array:  u32 type, u64 length, values          tensor: string name, u32 n, u64 ne[n], u32 type, u64 offset

All little-endian. The data begin at the next multiple of the alignment, and offsets count from there. No claim of a
header is trusted: sizes are checked against the rest of the file before memory is allocated, and counts against the
limits of any model. Source: ggml/src/gguf.cpp, gguf_init_from_file.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError, UnsupportedError
from ..base.first_bytes import ENOUGH, not_the_file
from ..gguf.types import REMOVED_TYPES, STORED_BY_ID, QType
from .verdict import Finding, Findings

MAX_HEADER = 1 << 26
MAX_TENSORS, MAX_KEYS = 1 << 18, 1 << 16
MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_DEPTH = 65535, 63, 4
DEFAULT_ALIGNMENT = 32

#: value type id -> (name, struct format); str and arr have none
TYPES = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"),
    6: ("f32", "f"), 7: ("bool", "B"), 8: ("str", ""), 9: ("arr", ""), 10: ("u64", "Q"), 11: ("i64", "q"),
    12: ("f64", "d"),
}  # fmt: skip
_STR, _ARR, _BOOL = 8, 9, 7


class Key(NamedTuple):
    """A key: the id of its value's type, and the value's bytes as they are in the file."""

    name: str
    type: int
    raw: bytes
    offset: int

    @property
    def type_name(self) -> str:
        return TYPES[self.type][0]

    def number(self) -> int | None:
        """The value, if it is an integer."""
        name, form = TYPES[self.type]
        return int(struct.unpack("<" + form, self.raw)[0]) if name[0] in "ui" else None

    def text(self) -> str:
        """The value, if it is a string; else ''."""
        return self.raw[8:].decode("utf-8", "replace") if self.type == _STR else ""

    def shown(self, limit: int = 60) -> str:
        """The type and the value, for a message."""
        if self.type == _STR:
            text = repr(self.raw[8:].decode("utf-8", "replace"))
        elif self.type == _ARR:
            element, n = struct.unpack_from("<IQ", self.raw)
            return f"{n:,} x {TYPES[element][0]}"
        else:
            text = str(struct.unpack("<" + TYPES[self.type][1], self.raw)[0])
        return f"{self.type_name} {text if len(text) <= limit else text[: limit - 1] + '…'}"


class Info(NamedTuple):
    """A tensor's entry in the header. `start` is its first byte, from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: QType
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    @property
    def n_rows(self) -> int:
        n = 1
        for size in self.shape[1:]:
            n *= size
        return n

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.n_rows

    def place(self, row: int) -> str:
        """'row 17' of a matrix; in a stacked tensor 'row 17 (expert 2, its row 1)'."""
        if len(self.shape) < 3 or self.shape[2] == 1:
            return f"row {row:,}"
        what = "expert" if "_exps" in self.name else "matrix"
        return f"row {row:,} ({what} {row // self.shape[1]:,}, its row {row % self.shape[1]:,})"


@dataclass
class Gguf:
    """A file whose header could be read completely."""

    path: Path
    nbytes: int
    version: int
    keys: dict[str, Key]
    alignment: int
    header_end: int
    """end of the last tensor's entry"""
    tensors: list[Info] = field(default_factory=list)
    """the valid ones, in file order"""
    n_claimed: int = 0
    """number of tensors according to the header"""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def data_start(self) -> int:
        return aligned(self.header_end, self.alignment)


def kind_of(g: Gguf) -> str:
    """The kind of a GGUF that is no model, with its article; '' for a model, or if the kind is unknown."""
    said = {name: key.text() for name, key in g.keys.items() if name in ("general.type", "general.architecture")}
    type_, arch = said.get("general.type", ""), said.get("general.architecture", "")
    if type_ == "imatrix" or (g.tensors and all(t.name.endswith((".in_sum2", ".counts")) for t in g.tensors)):
        return "an importance matrix"
    if type_ == "adapter" or "adapter.type" in g.keys:
        return "a LoRA adapter"
    if arch == "controlvector":
        return "a control vector"
    if type_ == "mmproj" or arch == "clip":
        return "a multimodal projector (mmproj)"
    n_shards = g.keys["split.count"].number() if "split.count" in g.keys else 0
    if g.n_claimed == 0 and "tokenizer.ggml.tokens" in g.keys and (n_shards or 0) < 2:
        return "a vocabulary without weights"
    return ""


def aligned(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple."""
    return (n + alignment - 1) // alignment * alignment


class _BrokenError(Exception):
    """The header cannot be read beyond this point."""

    def __init__(self, text: str, offset: int) -> None:
        super().__init__(text)
        self.text, self.offset = text, offset


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def take(self, n: int, what: str) -> bytes:
        if n > min(self.size, MAX_HEADER) - self.at:
            limit = "the file ends" if self.size <= MAX_HEADER else "the longest header would end"
            raise _BrokenError(
                f"{what} should have {n:,} bytes, but {limit} {min(self.size, MAX_HEADER) - self.at:,} further", self.at
            )
        raw = self.file.read(n)
        if len(raw) != n:
            raise _BrokenError(f"{what}: {len(raw):,} of {n:,} bytes could be read", self.at)
        self.at += n
        return raw

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, most: int) -> str:
        at, n = self.at, self.u64(f"the length of {what}")
        if n > most:
            raise _BrokenError(f"{what} is said to have {n:,} bytes, more than {most:,}", at)
        raw = self.take(n, what)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _BrokenError(f"{what} is not UTF-8: {raw[:32]!r}", at) from None
        if not text or not text.isprintable():
            raise _BrokenError(f"{what} is not printable: {text[:32]!r}", at)
        return text

    def value(self, type_: int, what: str, depth: int = 0) -> bytes:
        if type_ not in TYPES:
            raise _BrokenError(f"{what} has the unknown type {type_}", self.at)
        if type_ == _STR:
            head = self.take(8, f"the length of {what}")
            return head + self.take(int.from_bytes(head, "little"), what)
        if type_ != _ARR:
            at, raw = self.at, self.take(struct.calcsize(TYPES[type_][1]), what)
            if type_ == _BOOL and raw[0] > 1:
                raise _BrokenError(f"{what} is a bool of value {raw[0]}", at)
            return raw
        if depth == MAX_DEPTH:
            raise _BrokenError(f"{what} nests arrays deeper than {MAX_DEPTH}", self.at)
        at, head = self.at, self.take(12, what)
        element, n = struct.unpack("<IQ", head)
        if element not in TYPES:
            raise _BrokenError(f"{what} is an array of the unknown type {element}", at)
        if TYPES[element][1]:
            return head + self.take(n * struct.calcsize(TYPES[element][1]), what)
        if n > (self.size - self.at) // 8:
            raise _BrokenError(f"{what} is said to have {n:,} elements, more than the file has room for", at)
        return head + b"".join(self.value(element, what, depth + 1) for _ in range(n))


def read_into(fd: int, at: int, out: npt.NDArray[np.uint8]) -> int:
    """Fill contiguous `out` with the bytes of a file from `at` on; returns the number of bytes read. Raises OSError."""
    view, done = out.reshape(-1).data, 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], at + done)
        if n == 0:
            break
        done += n
    return done


def regular(path: Path) -> int:
    """The size of a file in bytes. Raises SourceError if it cannot be read or is not a regular file."""
    try:
        info = os.stat(path)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    if not stat.S_ISREG(info.st_mode):
        raise SourceError(f"{path}: is not a regular file; give a GGUF file")
    return info.st_size


def read(path: Path, findings: Findings) -> Gguf | None:
    """Read the header of a file. Faults go to `findings`; returns None if the header cannot be read to its end. Raises
    SourceError if the file itself cannot be read."""
    size = regular(path)
    try:
        with open(path, "rb") as file:
            return _read(_Reader(file, size), path, findings)
    except _BrokenError as e:
        findings.add(Finding("header", path.name, e.text, offset=e.offset))
        return None
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None


def _read(r: _Reader, path: Path, findings: Findings) -> Gguf:
    magic = r.take(4, "the magic")
    if magic != b"GGUF":
        if says := not_the_file(magic + r.file.read(ENOUGH)):
            raise SourceError(f"{path}: {says}")
        text = "zeros in place of the magic: an interrupted llama-quantize leaves that" if not any(magic) else "magic"
        raise _BrokenError(f"{text}: expected b'GGUF', found {magic!r}", 0)
    version = r.u32("the version")
    if version not in (2, 3):  # 3 only added big-endian files to 2
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            raise UnsupportedError(
                f"{path}: is a big-endian GGUF, which is not read here; verify it after gguf_convert_endian.py of "
                "llama.cpp's gguf-py has made it little-endian"
            )
        if version == 1:
            raise UnsupportedError(f"{path}: is a GGUF of version 1, of August 2023, which is not read here")
        raise _BrokenError(f"version: expected 3, found {version}", 4)
    n_tensors, n_keys = r.u64("the number of tensors"), r.u64("the number of keys")
    for n, most, each, what in ((n_keys, MAX_KEYS, 13, "keys"), (n_tensors, MAX_TENSORS, 33, "tensors")):
        if n > most or n * each > r.size - r.at:
            raise _BrokenError(f"{n:,} {what}: more than a model has, or than the file has room for", 8)
    keys: dict[str, Key] = {}
    for i in range(n_keys):
        at = r.at
        name = r.text(f"the name of key {i}", MAX_KEY_BYTES)
        type_ = r.u32(f"the type of '{name}'")
        if name in keys:
            findings.add(Finding("header", path.name, f"key '{name}' is there twice", offset=at))
        keys[name] = Key(name, type_, r.value(type_, f"the value of '{name}'"), at)
    made = Gguf(path, r.size, version, keys, _alignment(keys, path.name, findings), 0, n_claimed=n_tensors)
    relative: list[tuple[str, tuple[int, ...], QType, int, int]] = []
    seen: set[str] = set()
    for i in range(n_tensors):
        info = _info(r, i, path.name, findings, seen)
        if info is not None:
            relative.append(info)
    made.header_end = r.at
    start = made.data_start
    made.tensors = [Info(name, shape, qt, start + offset, n) for name, shape, qt, offset, n in relative]
    return made


def _alignment(keys: dict[str, Key], file: str, findings: Findings) -> int:
    key = keys.get("general.alignment")
    if key is None:
        return DEFAULT_ALIGNMENT
    n = key.number() if key.type_name == "u32" else None
    if n is None or n < 8 or n > 1 << 20 or n & (n - 1):
        findings.add(
            Finding(
                "header",
                file,
                "general.alignment",
                offset=key.offset,
                expected="u32, a power of two",
                found=key.shown(),
            )
        )
        return DEFAULT_ALIGNMENT
    return n


def _info(
    r: _Reader, i: int, file: str, findings: Findings, seen: set[str]
) -> tuple[str, tuple[int, ...], QType, int, int] | None:
    """Read a tensor's entry; None if it is invalid."""
    at = r.at
    name = r.text(f"the name of tensor {i}", MAX_NAME_BYTES)
    n_dims = r.u32(f"the dimensions of '{name}'")
    if not 1 <= n_dims <= 4:
        raise _BrokenError(f"'{name}' has {n_dims:,} dimensions, not 1 to 4", at)
    shape = struct.unpack(f"<{n_dims}Q", r.take(8 * n_dims, f"the shape of '{name}'"))
    type_id, offset = r.u32(f"the type of '{name}'"), r.u64(f"the offset of '{name}'")

    def wrong(text: str, expected: str = "", found: str = "") -> None:
        findings.add(Finding("header", file, text, name, at, expected=expected, found=found))

    if name in seen:
        wrong("is there twice")
    seen.add(name)
    n_values = 1
    for n in shape:
        n_values *= n
    qt = STORED_BY_ID.get(type_id)
    if qt is None:
        once = f" ({REMOVED_TYPES[type_id]}, which llama.cpp has given up)" if type_id in REMOVED_TYPES else ""
        wrong("ggml has no such type", found=f"{type_id}{once}")
    elif n_values == 0 or n_values >= 1 << 60:
        wrong("impossible shape", found=str(list(shape)))
    elif shape[0] % qt.block:
        wrong(f"rows do not divide into {qt.name} blocks", f"a multiple of {qt.block}", f"{shape[0]:,}")
    else:
        return name, shape, qt, offset, (shape[0] // qt.block * qt.block_bytes + qt.row_extra) * (n_values // shape[0])
    return None

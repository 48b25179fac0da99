"""The GGUF file format, little-endian: writes headers of version 3, and reads version 2 and 3, checking every claim.
(Version 3 only added big-endian files.)

    "GGUF" | u32 version | u64 n_tensors | u64 n_kv
    n_kv      x  string key | u32 value type | value
    n_tensors x  string name | u32 n_dims | u64 ne[n_dims] | u32 ggml type | u64 offset
    zero padding to the alignment, then the tensor data; offsets count from there, and the data of
    each tensor (the last one's too) is padded to the alignment with zeros

string = u64 length + bytes. An array is u32 element type | u64 count | elements.
Source: ggml/src/gguf.cpp. Values stay the bytes that the file has (`KV.payload`),
so whatever is copied from a source is copied exactly; `decode` reads a value.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..base.errors import SourceError, UnsupportedError
from ..base.first_bytes import ENOUGH, not_the_file
from .types import REMOVED_TYPES, STORED_BY_ID, STORED_TYPES

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)

_SCALARS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?",
    U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip
_SIZES = {t: struct.calcsize(f) for t, f in _SCALARS.items()}
INTEGERS = frozenset({U8, I8, U16, I16, U32, I32, U64, I64})
TYPE_NAMES = (
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64",
)  # fmt: skip

MAX_DIMS = 4
#: most bytes of a key; of a tensor's name (GGML_MAX_NAME, without the terminator)
MAX_KEY, MAX_NAME = 65535, 63
MAX_ARRAY_DEPTH = 4
#: most strings and nested arrays in all keys together: the largest vocabularies and merges have under a million
MAX_ELEMENTS = 1 << 21
#: most keys; most tensors: a model with a separate tensor for each expert has tens of thousands
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 18
#: most bytes of a header: R1's has 5 MB, and anything that claims more than this is not a header
MAX_HEADER = 1 << 26
#: assumed size of the whole file (bytes) when a truncated one is read
_MAX_FILE = 1 << 46


class KV(NamedTuple):
    """A key with its value as stored in the file: the value's type and bytes."""

    key: str
    type: int
    payload: bytes


class TensorInfo(NamedTuple):
    """A tensor as described by a GGUF header. `shape` in ne order, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class Header(NamedTuple):
    """What a GGUF file holds before its data."""

    version: int
    kvs: tuple[KV, ...]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    alignment: int
    file_bytes: int


def pad(n: int, alignment: int = ALIGNMENT) -> int:
    """Round `n` up to a multiple of the alignment."""
    return -(-n // alignment) * alignment


# ---------------------------------------------------------------- values


def is_utf8(text: str) -> bool:
    """Whether a text can be a string in a GGUF; a path that is not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def string_bytes(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str, type_: int, value: Any) -> KV:
    """Return a scalar or string key/value."""
    return KV(key, type_, string_bytes(value) if type_ == STRING else struct.pack(_SCALARS[type_], value))


def kv_array(key: str, element: int, values: Iterable[Any]) -> KV:
    """Return a key/value whose value is an array of scalars or strings."""
    items = list(values)
    head = struct.pack("<IQ", element, len(items))
    if element == STRING:
        return KV(key, ARRAY, head + b"".join(string_bytes(v) for v in items))
    return KV(key, ARRAY, head + struct.pack(f"<{len(items)}{_SCALARS[element][1]}", *items))


def decode(item: KV) -> Any:
    """Return the Python value of a key. Invalid UTF-8 in strings becomes replacement characters."""
    return _decode(item.type, item.payload, 0)[0]


def _decode(type_: int, buf: bytes, at: int) -> tuple[Any, int]:
    if type_ == STRING:
        (n,) = struct.unpack_from("<Q", buf, at)
        return buf[at + 8 : at + 8 + n].decode("utf-8", "replace"), at + 8 + n
    if type_ != ARRAY:
        return struct.unpack_from(_SCALARS[type_], buf, at)[0], at + _SIZES[type_]
    element, count = struct.unpack_from("<IQ", buf, at)
    at += 12
    if element in _SCALARS:
        size = _SIZES[element]
        values = struct.unpack_from(f"<{count}{_SCALARS[element][1]}", buf, at)
        return list(values), at + size * count
    out = []
    for _ in range(count):
        value, at = _decode(element, buf, at)
        out.append(value)
    return out, at


def array_head(item: KV) -> tuple[str, int]:
    """Return an array's element type name and count."""
    element, count = struct.unpack_from("<IQ", item.payload, 0)
    return TYPE_NAMES[element], count


def is_other_alignment(item: KV) -> bool:
    """Whether a key sets an alignment other than the one that llama.cpp and quantkit use for files they build."""
    return item.key == "general.alignment" and item.type == U32 and decode(item) != ALIGNMENT


# ---------------------------------------------------------------- writing


def n_dims(shape: Sequence[int]) -> int:
    """Return how many dimensions a header states: ggml drops trailing ones (ggml_n_dims)."""
    return max((i + 1 for i, n in enumerate(shape) if n > 1), default=1)


def header_bytes(
    kvs: Sequence[KV], tensors: Sequence[tuple[str, Sequence[int], str, int]], alignment: int = ALIGNMENT
) -> bytes:
    """Return the header of a file with these keys and tensors (name, ne shape, type, offset from the data's
    start), padded to the alignment."""
    out = io.BytesIO()
    out.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(kvs)))
    for item in kvs:
        out.write(string_bytes(item.key) + struct.pack("<I", item.type) + item.payload)
    for name, shape, type_, offset in tensors:
        dims = shape[: n_dims(shape)]
        out.write(string_bytes(name))
        out.write(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, STORED_TYPES[type_].id, offset))
    raw = out.getvalue()
    return raw.ljust(pad(len(raw), alignment), b"\0")


# ---------------------------------------------------------------- reading


class PrefixTooShortError(Exception):
    """The given first bytes of a file end before its header does; `needed`: how many bytes are needed at least."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"the header needs {needed:,} bytes or more")
        self.needed = needed


class _Cursor:
    """Reads a header piece by piece, never past the end of its file of `size` bytes. `file` may hold only the first
    of these bytes."""

    def __init__(self, where: str | Path, file: BinaryIO, size: int, is_prefix: bool = False) -> None:
        self.where, self.file, self.size, self.is_prefix, self.at = where, file, size, is_prefix, 0
        self.n_elements = 0
        self.may_be_cut = False

    def fail(self, what: str, cut: bool = False) -> SourceError:
        return SourceError(f"{self.where}: not a usable GGUF file: {what}", cut)

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.fail(
                f"{what} needs {n:,} bytes at {self.at:,}, but the file ends at {self.size:,}; "
                "it is truncated or its header is corrupt: get it again"
            )
        if n > MAX_HEADER - self.at:
            raise self.fail(
                f"{what} needs {n:,} bytes at {self.at:,}, but no header is longer than {MAX_HEADER:,}: get it again"
            )
        got = self.file.read(n)
        if len(got) != n:
            if self.is_prefix:
                raise PrefixTooShortError(self.at + n)
            raise self.fail(f"{what} at {self.at:,}: only {len(got):,} of {n:,} bytes could be read")
        self.at += n
        return got

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, limit: int | None = None) -> bytes:
        head = self.take(8, f"the length of {what}")
        (n,) = struct.unpack("<Q", head)
        if limit is not None and n > limit:
            raise self.fail(f"{what} claims a length of {n:,} bytes (at most {limit:,})")
        return head + self.take(n, what)

    def name(self, what: str, limit: int) -> str:
        raw = self.string(what, limit)[8:]
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8: {raw[:40]!r}") from None
        if not name or not name.isprintable():
            raise self.fail(f"{what} is not printable text: {name[:40]!r}")
        return name

    def value(self, type_: int, what: str, depth: int = 0) -> bytes:
        if type_ in _SIZES:
            return self.take(_SIZES[type_], what)
        if type_ == STRING:
            return self.string(what)
        if type_ != ARRAY:
            raise self.fail(f"{what} has the unknown value type {type_}")
        if depth >= MAX_ARRAY_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        out = bytearray(self.take(12, what))
        element, count = struct.unpack("<IQ", out)
        if element in _SIZES:
            return bytes(out) + self.take(_SIZES[element] * count, what)
        if element not in (STRING, ARRAY):
            raise self.fail(f"{what} is an array of the unknown value type {element}")
        smallest = 8 if element == STRING else 12
        if count > (self.size - self.at) // smallest:
            raise self.fail(f"{what} claims {count:,} elements, more than the file can hold")
        self.n_elements += count
        if self.n_elements > MAX_ELEMENTS:
            raise self.fail(f"{what} brings the elements of arrays to {self.n_elements:,} (at most {MAX_ELEMENTS:,})")
        for _ in range(count):
            out += self.value(element, what, depth + 1)
        return bytes(out)


def is_gguf(path: Path) -> bool:
    """Whether a file starts with GGUF's magic. Raises OSError."""
    with open(path, "rb") as f:
        return f.read(4) == MAGIC


def read_header(path: Path, cut: bool = False) -> Header:
    """Read and check the header of a GGUF file. The data is not read; with `cut` its end may be missing.

    Raises SourceError for anything the format does not allow: wrong magic or version, counts and
    lengths beyond the file, duplicate names, unknown types, sizes that overflow, data that is
    misaligned, overlaps or lies outside the file.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise SourceError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            cursor = _Cursor(path, file, info.st_size)
            cursor.may_be_cut = cut
            return _read(cursor)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None


def read_header_of(file: BinaryIO, where: Path) -> Header:
    """Read the header of an open file, called `where` in messages. Raises SourceError, OSError."""
    file.seek(0)
    return _read(_Cursor(where, file, os.fstat(file.fileno()).st_size))


def parse_header(where: str, prefix: bytes, file_bytes: int) -> Header:
    """Parse the header of a GGUF of `file_bytes` bytes from its first bytes, `prefix`, with the checks of
    `read_header`; `where` is for messages. Raises PrefixTooShortError if more bytes are needed, else SourceError."""
    return _read(_Cursor(where, io.BytesIO(prefix), file_bytes, is_prefix=True))


def _read(c: _Cursor) -> Header:
    magic = c.take(4, "the magic")
    if magic != MAGIC:
        if says := not_the_file(magic + c.file.read(ENOUGH)):
            raise SourceError(f"{c.where}: {says}")
        hint = "; zeros at the start are what an interrupted llama-quantize leaves" if magic == bytes(4) else ""
        raise c.fail(f"it begins with {magic!r}, not {MAGIC!r}{hint}")
    version = c.number("<I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, 3):
            raise UnsupportedError(
                f"{c.where}: is a big-endian GGUF, for machines such as s390x, and only little-endian ones are read "
                "here; convert it with gguf_convert_endian.py of llama.cpp's gguf-py"
            )
        if version == 1:
            raise UnsupportedError(
                f"{c.where}: is a GGUF of version 1, of August 2023, which llama.cpp does not read any more either; "
                "get a newer file of the model, or convert the model again"
            )
        raise c.fail(f"version {version} is not supported (2 and 3 are)")
    n_tensors, n_kv = c.number("<Q", "the tensor count"), c.number("<Q", "the key count")
    for n, smallest, most, what in ((n_kv, 13, MAX_KEYS, "keys"), (n_tensors, 32, MAX_TENSORS, "tensors")):
        if n > (c.size - c.at) // smallest:
            raise c.fail(f"it claims {n:,} {what}, more than its {c.size:,} bytes can hold")
        if n > most:
            raise c.fail(f"it claims {n:,} {what} (at most {most:,})")
    kvs: list[KV] = []
    seen: set[str] = set()
    for i in range(n_kv):
        key = c.name(f"key {i}", MAX_KEY)
        if key in seen:
            raise c.fail(f"key '{key}' occurs twice")
        seen.add(key)
        type_ = c.number("<I", f"the type of '{key}'")
        kvs.append(KV(key, type_, c.value(type_, f"the value of '{key}'")))
    alignment = _alignment(c, kvs)
    infos: list[tuple[str, tuple[int, ...], str, int, int]] = []
    seen.clear()
    for i in range(n_tensors):
        info = _tensor_info(c, i, alignment)
        if info[0] in seen:
            raise c.fail(f"tensor '{info[0]}' occurs twice")
        seen.add(info[0])
        infos.append(info)
    data_offset = pad(c.at, alignment)
    end = 0
    for name, _, _, offset, nbytes in sorted(infos, key=lambda t: t[3]):
        if offset < end:
            raise c.fail(f"the data of '{name}' at {offset:,} overlaps the tensor before it, which ends at {end:,}")
        end = offset + nbytes
        if data_offset + end > (_MAX_FILE if c.may_be_cut else c.size):
            raise c.fail(
                f"the data of '{name}' should end at {data_offset + end:,}, but the file ends at {c.size:,}; "
                "the file is truncated: get it again",
                cut=data_offset + end < _MAX_FILE,
            )
    tensors = tuple(TensorInfo(n, s, t, data_offset + o, b) for n, s, t, o, b in infos)
    return Header(version, tuple(kvs), tensors, data_offset, alignment, c.size)


def _alignment(c: _Cursor, kvs: Sequence[KV]) -> int:
    for item in kvs:
        if item.key == "general.alignment":
            if item.type != U32:
                raise c.fail(f"general.alignment is of type {TYPE_NAMES[item.type]}, not u32")
            alignment = int(decode(item))
            if alignment == 0 or alignment & (alignment - 1):
                raise c.fail(f"general.alignment is {alignment}, not a power of two")
            return alignment
    return ALIGNMENT


def _tensor_info(c: _Cursor, i: int, alignment: int) -> tuple[str, tuple[int, ...], str, int, int]:
    name = c.name(f"the name of tensor {i}", MAX_NAME)
    dims = c.number("<I", f"the dimensions of '{name}'")
    if not 1 <= dims <= MAX_DIMS:
        raise c.fail(f"tensor '{name}' has {dims} dimensions (1 to {MAX_DIMS})")
    shape = struct.unpack(f"<{dims}Q", c.take(8 * dims, f"the shape of '{name}'"))
    n_elements = 1
    for n in shape:
        n_elements *= n
    if n_elements >= 1 << 62 or 0 in shape:
        raise c.fail(f"tensor '{name}' has the impossible shape {list(shape)}")
    type_id = c.number("<I", f"the type of '{name}'")
    offset = c.number("<Q", f"the offset of '{name}'")
    if type_id in REMOVED_TYPES:
        raise UnsupportedError(
            f"{c.where}: '{name}' is of ggml type {type_id}, {REMOVED_TYPES[type_id]}, which llama.cpp does not read "
            "any more either; get the model in another type, such as Q4_0"
        )
    if type_id not in STORED_BY_ID:
        raise c.fail(f"tensor '{name}' has the unknown ggml type {type_id}")
    qt = STORED_BY_ID[type_id]
    if shape[0] % qt.block:
        raise c.fail(f"tensor '{name}' is {qt.name}, but its rows of {shape[0]} are no multiple of {qt.block}")
    if offset % alignment:
        raise c.fail(f"the data of '{name}' at {offset:,} is not aligned to {alignment}")
    return name, shape, qt.name, offset, qt.row_bytes(shape[0]) * (n_elements // shape[0])

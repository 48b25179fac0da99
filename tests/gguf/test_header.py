"""The GGUF format: we read what we write, the `gguf` package reads it too, and vice versa; each thing the format
forbids is refused in one sentence, checked on bytes written by hand."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from factory import gguf_file
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import SourceError, UnsupportedError
from quantkit.gguf.header import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    KV,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Header,
    TensorInfo,
    array_head,
    decode,
    header_bytes,
    is_gguf,
    kv,
    kv_array,
    pad,
    read_header,
    string_bytes,
)
from quantkit.gguf.types import QTYPES

LIMITS = {
    U8: (0, 2**8 - 1), I8: (-(2**7), 2**7 - 1), U16: (0, 2**16 - 1), I16: (-(2**15), 2**15 - 1), U32: (0, 2**32 - 1),
    I32: (-(2**31), 2**31 - 1), U64: (0, 2**64 - 1), I64: (-(2**63), 2**63 - 1),
}  # fmt: skip

# ---------------------------------------------------------------- values


@pytest.mark.parametrize("type_", LIMITS)
def test_integers_of_every_type_to_their_limits(type_: int) -> None:
    low, high = LIMITS[type_]
    assert [decode(kv("k", type_, n)) for n in (low, 0, high)] == [low, 0, high]
    assert decode(kv_array("k", type_, [low, 0, high])) == [low, 0, high]
    with pytest.raises(struct.error):
        kv("k", type_, high + 1)


def test_the_bytes_of_each_kind_of_value() -> None:
    assert kv("k", F32, 0.5).payload == b"\x00\x00\x00\x3f"
    assert kv("k", F64, -2.0).payload == bytes(7) + b"\xc0"
    assert kv("k", BOOL, True).payload == b"\x01"
    assert kv("k", STRING, "é").payload == b"\x02" + bytes(7) + b"\xc3\xa9"
    assert kv_array("k", I16, [1, -1]).payload == b"\x03\0\0\0\x02" + bytes(7) + b"\x01\0\xff\xff"
    assert kv_array("k", STRING, ["a", ""]).payload == (
        b"\x08\0\0\0\x02" + bytes(7) + b"\x01" + bytes(7) + b"a" + bytes(8)
    )
    assert kv_array("k", STRING, []) == KV("k", ARRAY, b"\x08\0\0\0" + bytes(8))


def test_strings_that_are_not_utf8_are_kept_and_shown_with_replacements() -> None:
    item = kv("k", STRING, b"a\xffb")
    assert item.payload == b"\x03" + bytes(7) + b"a\xffb"
    assert decode(item) == "a\ufffdb"


def test_arrays_of_arrays() -> None:
    inner = [kv_array("", U8, [1, 2]).payload, kv_array("", STRING, ["x"]).payload]
    item = KV("k", ARRAY, struct.pack("<IQ", ARRAY, 2) + b"".join(inner))
    assert decode(item) == [[1, 2], ["x"]]
    assert array_head(item) == ("arr", 2)


# ---------------------------------------------------------------- round trips

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x24FF, exclude_categories=("C", "Z")), min_size=1)
SCALARS = st.one_of(
    *(st.tuples(st.just(t), st.integers(*limits)) for t, limits in LIMITS.items()),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(st.just(F32), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just(F64), st.floats(allow_nan=False)),
    st.tuples(st.just(STRING), st.text(st.characters(codec="utf-8"), max_size=20)),
)


@st.composite
def pairs(draw: st.DrawFn) -> KV:
    """A key with a value of any type, or an array."""
    key = draw(NAMES.filter(lambda n: n.isprintable()))
    type_, value = draw(SCALARS)
    if draw(st.booleans()):
        return kv(key, type_, value)
    return kv_array(key, type_, [value] * draw(st.integers(0, 3)))


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    out = {}
    names = st.text("abcdefghijklmnopqrstuvwxyz_.0123456789", min_size=1, max_size=63)
    for name in draw(st.sets(names, max_size=4)):
        qt = QTYPES[draw(st.sampled_from(sorted(QTYPES)))]
        cols = qt.block * draw(st.integers(1, 2))
        rows = draw(st.lists(st.integers(1, 3), max_size=3))
        n = qt.row_bytes(cols) * int(np.prod(rows))
        out[name] = ((cols, *rows), qt.name, bytes([draw(st.integers(0, 255))]) * n)
    return out


def stated(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as files state it: without trailing ones."""
    dims = list(shape)
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


@given(st.lists(pairs(), max_size=6, unique_by=lambda item: item.key), tensor_sets())
@settings(max_examples=120, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, kvs: list[KV], tensors: dict[str, tuple[tuple[int, ...], str, bytes]]
) -> None:
    path = gguf_file(tmp_path_factory.mktemp("gguf") / "x.gguf", tensors, kvs)
    h = read_header(path)
    assert (h.version, h.kvs, h.alignment, h.file_bytes) == (3, tuple(kvs), 32, path.stat().st_size)
    assert h.data_offset % 32 == 0
    assert [(t.name, t.shape, t.type) for t in h.tensors] == [(n, stated(s), t) for n, (s, t, _) in tensors.items()]
    blob = path.read_bytes()
    assert [blob[t.offset : t.offset + t.nbytes] for t in h.tensors] == [data for *_, data in tensors.values()]
    assert all(t.offset % 32 == 0 for t in h.tensors)


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    kvs = [
        kv("general.architecture", STRING, "deepseek2"),
        *(kv(f"int.{t}", t, limits[1]) for t, limits in LIMITS.items()),
        kv("f32", F32, 0.5),
        kv("f64", F64, 1e300),
        kv("yes", BOOL, True),
        kv_array("words", STRING, ["a", "", "…"]),
        kv_array("numbers", I32, [-1, 2]),
    ]
    rng = np.random.default_rng(1)
    tensors = {
        "f": ((8, 3), "F32", rng.standard_normal((3, 8), np.float32).tobytes()),
        "q": ((256, 2, 2), "Q4_K", rng.bytes(4 * 144)),
        "one": ((5,), "F16", rng.bytes(10)),
    }
    reader = gguf.GGUFReader(gguf_file(tmp_path / "x.gguf", tensors, kvs))
    got = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert got == {item.key: decode(item) for item in kvs}
    for t in reader.tensors:
        shape, type_, data = tensors[t.name]
        assert (tuple(int(n) for n in t.shape), t.tensor_type.name) == (shape, type_)
        assert t.data.tobytes() == data
    assert [t.name for t in reader.tensors] == list(tensors)


@pytest.mark.parametrize("alignment", [32, 64])
def test_we_read_what_the_gguf_package_writes(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("n", 7)
    writer.add_array("words", ["a", "bc"])
    writer.add_float64("x", 2.5)
    a, b = np.arange(24, dtype=np.float32).reshape(3, 8), np.arange(5, dtype=np.float16)
    writer.add_tensor("a", a)
    writer.add_tensor("b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    h = read_header(path)
    values = {item.key: decode(item) for item in h.kvs}
    assert values.pop("general.alignment", 32) == alignment == h.alignment
    assert values == {"general.architecture": "deepseek2", "n": 7, "words": ["a", "bc"], "x": 2.5}
    assert [(t.name, t.shape, t.type) for t in h.tensors] == [("a", (8, 3), "F32"), ("b", (5,), "F16")]
    blob = path.read_bytes()
    assert [blob[t.offset : t.offset + t.nbytes] for t in h.tensors] == [a.tobytes(), b.tobytes()]


def test_the_header_byte_for_byte(tmp_path: Path) -> None:
    blob = header_bytes([kv("k", U8, 7)], [("t", (32, 2, 1), "Q8_0", 64)])
    assert blob == (
        b"GGUF\x03\0\0\0" + struct.pack("<QQ", 1, 1)  # version, tensors, keys
        + struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 7)
        + struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 2, 8, 64)  # trailing ones are not stated
        + bytes(17)
    )  # fmt: skip
    path = tmp_path / "x.gguf"
    path.write_bytes(blob + bytes(64 + 68))
    assert read_header(path) == Header(
        3, (kv("k", U8, 7),), (TensorInfo("t", (32, 2), "Q8_0", 96 + 64, 68),), 96, 32, 96 + 132
    )


def test_a_file_of_version_2_and_one_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x02\0\0\0" + bytes(16))
    assert read_header(path) == Header(2, (), (), 32, 32, 24)


def test_the_padding_after_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header_bytes([], [("t", (1,), "F32", 0)]) + bytes(4))
    assert read_header(path).tensors[0].nbytes == 4


@pytest.mark.parametrize(("n", "padded"), [(0, 0), (1, 32), (31, 32), (32, 32), (33, 64)])
def test_pad(n: int, padded: int) -> None:
    assert pad(n) == padded


def test_is_gguf(tmp_path: Path) -> None:
    (tmp_path / "yes").write_bytes(b"GGUFx")
    (tmp_path / "no").write_bytes(b"ggjt")
    (tmp_path / "short").write_bytes(b"GG")
    assert [is_gguf(tmp_path / name) for name in ("yes", "no", "short")] == [True, False, False]


# ---------------------------------------------------------------- what the format does not allow


def s(text: str | bytes) -> bytes:
    return string_bytes(text)


def head(n_tensors: int = 0, n_kv: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv)


def key(name: str | bytes, type_: int, payload: bytes) -> bytes:
    return s(name) + struct.pack("<I", type_) + payload


def tensor(name: str | bytes, dims: Sequence[int], type_: int = 0, offset: int = 0) -> bytes:
    return s(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def file(*tensors: bytes, kvs: Sequence[bytes] = (), data: int = 0) -> bytes:
    raw = head(len(tensors), len(kvs)) + b"".join(kvs) + b"".join(tensors)
    return raw.ljust(pad(len(raw)), b"\0") + bytes(data)


CUT = "it is truncated or its header is corrupt: get it again"

EVIL: list[tuple[str, bytes, str]] = [
    ("empty", b"", f"the magic needs 4 bytes at 0, but the file ends at 0; {CUT}"),
    ("other_magic", b"ggjt" + bytes(30), "it begins with b'ggjt', not b'GGUF'"),
    (
        "zeros",
        bytes(64),
        "it begins with b'\\x00\\x00\\x00\\x00', not b'GGUF'; zeros at the start are what an interrupted "
        "llama-quantize leaves",
    ),
    ("version_4", b"GGUF\x04\0\0\0" + bytes(16), "version 4 is not supported (2 and 3 are)"),
    ("cut_in_counts", head()[:20], f"the key count needs 8 bytes at 16, but the file ends at 20; {CUT}"),
    ("keys_beyond_the_file", head(0, 1), "it claims 1 keys, more than its 24 bytes can hold"),
    (
        "keys_2^64",
        head(0, 2**64 - 1) + bytes(40),
        "it claims 18,446,744,073,709,551,615 keys, more than its 64 bytes can hold",
    ),
    (
        "tensors_2^63",
        head(2**63) + bytes(40),
        "it claims 9,223,372,036,854,775,808 tensors, more than its 64 bytes can hold",
    ),
    (
        "key_too_long",
        head(0, 1) + struct.pack("<Q", 65536) + bytes(70000),
        "key 0 claims a length of 65,536 bytes (at most 65,535)",
    ),
    (
        "key_beyond_the_file",
        head(0, 1) + struct.pack("<Q", 100) + bytes(20),
        f"key 0 needs 100 bytes at 32, but the file ends at 52; {CUT}",
    ),
    ("key_not_utf8", file(kvs=[key(b"\xff\xfe", U8, b"\0")]), "key 0 is not UTF-8: b'\\xff\\xfe'"),
    ("key_empty", file(kvs=[key("", U8, b"\0")]), "key 0 is not printable text: ''"),
    ("key_with_newline", file(kvs=[key("a\nb", U8, b"\0")]), "key 0 is not printable text: 'a\\nb'"),
    (
        "key_with_escape",
        file(kvs=[key("a", U8, b"\0"), key("\x1b[2J", U8, b"\0")]),
        "key 1 is not printable text: '\\x1b[2J'",
    ),
    ("key_twice", file(kvs=[key("a", U8, b"\0")] * 2), "key 'a' occurs twice"),
    ("value_type", file(kvs=[key("a", 13, b"\0")]), "the value of 'a' has the unknown value type 13"),
    (
        "value_cut",
        head(0, 1) + key("a", U64, b"\0"),
        f"the value of 'a' needs 8 bytes at 37, but the file ends at 38; {CUT}",
    ),
    (
        "string_2^64",
        file(kvs=[key("a", STRING, b"\xff" * 8)]),
        f"the value of 'a' needs 18,446,744,073,709,551,615 bytes at 45, but the file ends at 64; {CUT}",
    ),
    (
        "array_2^60",
        file(kvs=[key("a", ARRAY, struct.pack("<IQ", U32, 1 << 60))]),
        f"the value of 'a' needs 4,611,686,018,427,387,904 bytes at 49, but the file ends at 64; {CUT}",
    ),
    (
        "array_of_strings_2^60",
        file(kvs=[key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))]),
        "the value of 'a' claims 1,152,921,504,606,846,976 elements, more than the file can hold",
    ),
    (
        "array_of_arrays_2^60",
        file(kvs=[key("a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 60))]),
        "the value of 'a' claims 1,152,921,504,606,846,976 elements, more than the file can hold",
    ),
    (
        "array_element_type",
        file(kvs=[key("a", ARRAY, struct.pack("<IQ", 99, 1))]),
        "the value of 'a' is an array of the unknown value type 99",
    ),
    (
        "empty_array_element_type",
        file(kvs=[key("a", ARRAY, struct.pack("<IQ", 99, 0))]),
        "the value of 'a' is an array of the unknown value type 99",
    ),
    (
        "array_too_deep",
        file(kvs=[key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5)]),
        "the value of 'a' nests arrays deeper than 4",
    ),
    (
        "alignment_type",
        file(kvs=[key("general.alignment", U64, struct.pack("<Q", 32))]),
        "general.alignment is of type u64, not u32",
    ),
    (
        "alignment_0",
        file(kvs=[key("general.alignment", U32, struct.pack("<I", 0))]),
        "general.alignment is 0, not a power of two",
    ),
    (
        "alignment_33",
        file(kvs=[key("general.alignment", U32, struct.pack("<I", 33))]),
        "general.alignment is 33, not a power of two",
    ),
    (
        "tensor_name_too_long",
        file(tensor("n" * 64, [4]), data=32),
        "the name of tensor 0 claims a length of 64 bytes (at most 63)",
    ),
    (
        "tensor_name_not_utf8",
        file(tensor(b"\x80", [4]), data=32),
        "the name of tensor 0 is not UTF-8: b'\\x80'",
    ),
    ("tensor_name_empty", file(tensor("", [4]), data=32), "the name of tensor 0 is not printable text: ''"),
    (
        "tensor_twice",
        file(tensor("a", [4]), tensor("a", [4], offset=32), data=64),
        "tensor 'a' occurs twice",
    ),
    ("no_dimensions", file(tensor("a", []), data=32), "tensor 'a' has 0 dimensions (1 to 4)"),
    ("5_dimensions", file(tensor("a", [1] * 5), data=32), "tensor 'a' has 5 dimensions (1 to 4)"),
    (
        "dimensions_2^32",
        head(1) + s("a") + b"\xff" * 40,
        "tensor 'a' has 4294967295 dimensions (1 to 4)",
    ),
    ("no_elements", file(tensor("a", [4, 0]), data=32), "tensor 'a' has the impossible shape [4, 0]"),
    (
        "elements_overflow",
        file(tensor("a", [1 << 32, 1 << 32]), data=32),
        "tensor 'a' has the impossible shape [4294967296, 4294967296]",
    ),
    ("type_unknown", file(tensor("a", [4], 99), data=32), "tensor 'a' has the unknown ggml type 99"),
    (
        "rows_of_no_block",
        file(tensor("a", [200, 2], 12), data=512),
        "tensor 'a' is Q4_K, but its rows of 200 are no multiple of 256",
    ),
    ("misaligned", file(tensor("a", [4], offset=4), data=32), "the data of 'a' at 4 is not aligned to 32"),
    (
        "overlap",
        file(tensor("a", [16]), tensor("b", [4], offset=32), data=64),
        "the data of 'b' at 32 overlaps the tensor before it, which ends at 64",
    ),
    (
        "same_place",
        file(tensor("b", [4]), tensor("a", [4]), data=64),
        "the data of 'a' at 0 overlaps the tensor before it, which ends at 16",
    ),
    (
        "out_of_file",
        file(tensor("a", [4]), data=15),
        "the data of 'a' should end at 80, but the file ends at 79; the file is truncated: get it again",
    ),
    (
        "offset_2^64",
        file(tensor("a", [4], offset=2**64 - 32), data=32),
        "the data of 'a' should end at 18,446,744,073,709,551,664, but the file ends at 96; the file is truncated: get "
        "it again",
    ),
    (
        "cut_in_a_tensor",
        head(1) + tensor("abcdefgh", [4])[:-4],
        f"the offset of 'abcdefgh' needs 8 bytes at 56, but the file ends at 60; {CUT}",
    ),
]


@pytest.mark.parametrize(("blob", "says"), [pytest.param(*case[1:], id=case[0]) for case in EVIL])
def test_evil_bytes(tmp_path: Path, blob: bytes, says: str) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(blob)
    with pytest.raises(SourceError) as e:
        read_header(path)
    assert type(e.value) is SourceError
    assert str(e.value) == f"{path}: not a usable GGUF file: {says}"


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (
            b"GGUF\x01\0\0\0" + bytes(16),
            ": is a GGUF of version 1, of August 2023, which llama.cpp does not read any more either; get a newer file "
            "of the model, or convert the model again",
        ),
        (
            b"GGUF\0\0\0\x03" + bytes(16),
            ": is a big-endian GGUF, for machines such as s390x, and only little-endian ones are read here; convert it "
            "with gguf_convert_endian.py of llama.cpp's gguf-py",
        ),
        (
            file(tensor("a", [32], 31), data=32),
            ": 'a' is of ggml type 31, Q4_0_4_4, which llama.cpp does not read any more either; get the model in "
            "another type, such as Q4_0",
        ),
    ],
    ids=["version 1", "big-endian", "a type given up"],
)
def test_sound_files_that_are_not_read(tmp_path: Path, blob: bytes, says: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(blob)
    with pytest.raises(UnsupportedError) as e:
        read_header(path)
    assert (str(e.value), e.value.exit_code) == (f"{path}{says}", 5)


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        (
            key("a", STRING, struct.pack("<Q", 1 << 39)),
            "the value of 'a' needs 549,755,813,888 bytes at 45, but no header is longer than 67,108,864: get it again",
        ),
        (
            key("a", ARRAY, struct.pack("<IQ", U8, 1 << 39)),
            "the value of 'a' needs 549,755,813,888 bytes at 49, but no header is longer than 67,108,864: get it again",
        ),
    ],
    ids=["string", "array"],
)
def test_a_length_that_a_large_file_could_hold_is_not_read(tmp_path: Path, claim: bytes, says: str) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(head(0, 1) + claim)
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(SourceError) as e:
        read_header(path)
    assert str(e.value) == f"{path}: not a usable GGUF file: {says}"


def test_counts_that_a_large_file_could_hold_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.gguf.header.MAX_HEADER", 1 << 16)
    path = tmp_path / "evil.gguf"
    path.write_bytes(head(0, 1) + key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 20)))
    os.truncate(path, 1 << 40)
    start = time.monotonic()
    with pytest.raises(SourceError) as e:
        read_header(path)
    assert time.monotonic() - start < 5
    assert str(e.value) == (
        f"{path}: not a usable GGUF file: the length of the value of 'a' needs 8 bytes at 65,529, but no header is "
        "longer than 65,536: get it again"
    )


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("directory", "is not a regular file"),
        ("pipe", "is not a regular file"),
    ],
)
def test_what_is_no_file(tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "x.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(SourceError) as e:
        read_header(path)
    assert str(e.value) == f"{path}: {says}"


SEED_FILE = file(
    tensor("blk.0.a", [32, 2], 8, 0),
    tensor("b", [4], 0, 96),
    kvs=[
        key("general.alignment", U32, struct.pack("<I", 32)),
        key("words", ARRAY, struct.pack("<IQ", STRING, 2) + s("x") + s("")),
        key("deep", ARRAY, struct.pack("<IQIQ", ARRAY, 1, I32, 1) + bytes(4)),
        key("text", STRING, s("hello")),
    ],
    data=128,
)
EDGES = st.sampled_from([0, 1, 8, 9, 13, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SEED_FILE) - 1),
            st.one_of(
                st.binary(min_size=1, max_size=8),
                EDGES.map(lambda n: struct.pack("<Q", n)),
                EDGES.map(lambda n: struct.pack("<I", n % 2**32)),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    st.one_of(st.none(), st.integers(0, len(SEED_FILE))),
)
@settings(max_examples=300, deadline=None)
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], end: int | None
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    blob = bytearray(SEED_FILE)
    for at, new in edits:
        blob[at : at + len(new)] = new
    path.write_bytes(blob[:end])
    header, says = attempt(path)
    if header is None:
        assert says.startswith(f"{path}: not a usable GGUF file: ")
        assert says.isprintable()
    else:
        assert all(t.offset + t.nbytes <= header.file_bytes for t in header.tensors)
        # whatever was accepted can be displayed
        assert len([(decode(item), item.type == ARRAY and array_head(item)) for item in header.kvs]) == len(header.kvs)


def attempt(path: Path) -> tuple[Header | None, str]:
    """A header, or why it is refused; any other exception fails the test."""
    try:
        return read_header(path), ""
    except SourceError as e:
        return None, str(e)


def test_the_seed_of_the_fuzzing_is_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "seed.gguf"
    path.write_bytes(SEED_FILE)
    values: dict[str, Any] = {item.key: decode(item) for item in read_header(path).kvs}
    assert values == {"general.alignment": 32, "words": ["x", ""], "deep": [[0]], "text": "hello"}

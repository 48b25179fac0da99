"""Safetensors directories: what is accepted reads as the reference library reads it, and what a shard, an index or a
config should not say is refused in one sentence, asserted whole."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import edit_json, edit_safetensors, shard_of, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit.base.errors import QuantkitError, SourceError, UnsupportedError
from quantkit.model.catalogue import SourceTensor
from quantkit.model.sources.files import Files
from quantkit.model.sources.safetensors_dir import open_checkpoint, read_shard
from quantkit.model.sources.safetensors_header import DTYPE_BYTES, INDEX, MAX_HEADER

TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def sentence(call: Callable[[], Any], error: type[QuantkitError] = SourceError) -> str:
    """The message of exactly that error."""
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error
    return str(e.value)


# ---------------------------------------------------------------- one shard: what is accepted


TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
TORCH |= {"I64": torch.int64, "BOOL": torch.bool}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12),
        st.tuples(st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_what_the_reference_library_writes_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    values = {n: torch.randint(0, 2, shape).to(TORCH[d]) for n, (d, shape) in tensors.items()}
    path = tmp_path_factory.mktemp("reference") / "x.safetensors"
    save_file(values, path, {"format": "pt"})
    found, blob = read_shard(path), path.read_bytes()
    assert {n: (t.dtype, list(t.shape)) for n, t in found.items()} == tensors
    stored = {n: blob[t.offset : t.offset + t.nbytes] for n, t in found.items()}
    assert stored == {n: bytes(v.untyped_storage()) for n, v in values.items()}


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_has_its_size(tmp_path: Path, dtype: str) -> None:
    n = 3 * DTYPE_BYTES[dtype]
    path = write_safetensors(
        tmp_path / "x.safetensors", {"a": {"dtype": dtype, "shape": [3], "data_offsets": [0, n]}}, bytes(n)
    )
    assert read_shard(path)["a"] == SourceTensor("a", dtype, (3,), path, path.stat().st_size - n, n)


def test_scalars_empty_tensors_metadata_and_padding_are_accepted(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
    }
    raw = json.dumps(header).encode() + b"   "
    path = write_safetensors(tmp_path / "x.safetensors", raw, bytes(4))
    found = read_shard(path)
    assert {n: (t.shape, t.offset - 8 - len(raw), t.nbytes) for n, t in found.items()} == {
        "scalar": ((), 0, 4),
        "empty": ((0, 7), 4, 0),
    }


# ---------------------------------------------------------------- one shard: what is refused


def entry(**changes: Any) -> bytes:
    """The header of a file with the one tensor 'a', changed."""
    return json.dumps({"a": {**TENSOR, **changes}}).encode()


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    """The header of two byte tensors at these offsets."""
    spans = {"a": first, "b": second}
    return json.dumps(
        {n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in spans.items()}
    ).encode()


MALFORMED = "the header entry of 'a' is malformed: "
AGAIN = "; download it again"

#: (test id, header bytes, data bytes, the error, the sentence after the path)
EVIL_HEADERS: list[tuple[str, bytes, int, type[QuantkitError], str]] = [
    (
        "not_json",
        b'{"a": ',
        0,
        SourceError,
        "the header is not valid JSON: Expecting value: line 1 column 7 (char 6)" + AGAIN,
    ),
    (
        "not_utf8",
        b'{"\xff": 1}',
        0,
        SourceError,
        "the header is not valid JSON: 'utf-8' codec can't decode byte 0xff in position 2: invalid start byte" + AGAIN,
    ),
    (
        "nested",
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        0,
        SourceError,
        "the header is not valid JSON: nested deeper than 32" + AGAIN,
    ),
    ("a_list", b"[]", 0, SourceError, "the header is a JSON list, not an object" + AGAIN),
    (
        "name_twice",
        b'{"a":%b,"a":%b}' % (json.dumps(TENSOR).encode(), json.dumps(TENSOR).encode()),
        16,
        SourceError,
        "the header is not valid JSON: 'a' occurs twice" + AGAIN,
    ),
    (
        "shape_twice",
        b'{"a":{"dtype":"F32","shape":[1],"shape":[4],"data_offsets":[0,16]}}',
        16,
        SourceError,
        "the header is not valid JSON: 'shape' occurs twice" + AGAIN,
    ),
    (
        "name_empty",
        json.dumps({"": TENSOR}).encode(),
        16,
        SourceError,
        "'' is no name for a tensor (1 to 256 printable characters)",
    ),
    (
        "name_with_newline",
        json.dumps({"a\nb": TENSOR}).encode(),
        16,
        SourceError,
        "'a\\nb' is no name for a tensor (1 to 256 printable characters)",
    ),
    (
        "name_with_escape",
        json.dumps({"\x1b[2J": TENSOR}).encode(),
        16,
        SourceError,
        "'\\x1b[2J' is no name for a tensor (1 to 256 printable characters)",
    ),
    (
        "name_surrogate",
        json.dumps({"\ud800": TENSOR}).encode(),
        16,
        SourceError,
        "'\\ud800' is no name for a tensor (1 to 256 printable characters)",
    ),
    (
        "name_long",
        json.dumps({"n" * 257: TENSOR}).encode(),
        16,
        SourceError,
        "'" + "n" * 79 + " is no name for a tensor (1 to 256 printable characters)",
    ),
    ("entry_null", b'{"a":null}', 0, SourceError, MALFORMED + "None" + AGAIN),
    ("entry_text", b'{"a":"dtype"}', 0, SourceError, MALFORMED + "'dtype'" + AGAIN),
    ("entry_empty", b'{"a":{}}', 0, SourceError, MALFORMED + "{}" + AGAIN),
    (
        "dtype_list",
        entry(dtype=["F32"]),
        16,
        SourceError,
        MALFORMED + "{'dtype': ['F32'], 'shape': [2, 2], 'data_offsets': [0, 16]}" + AGAIN,
    ),
    ("dtype_unknown", entry(dtype="F4"), 16, UnsupportedError, "'a' has the unknown dtype 'F4'"),
    (
        "shape_text",
        entry(shape="22"),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': '22', 'data_offsets': [0, 16]}" + AGAIN,
    ),
    (
        "shape_negative",
        entry(shape=[-2, -2]),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [-2, -2], 'data_offsets': [0, 16]}" + AGAIN,
    ),
    (
        "shape_of_floats",
        entry(shape=[2.0, 2]),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [2.0, 2], 'data_offsets': [0, 16]}" + AGAIN,
    ),
    (
        "shape_of_bools",
        entry(shape=[True, 4]),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [True, 4], 'data_offsets': [0, 16]}" + AGAIN,
    ),
    (
        "shape_huge",
        entry(shape=[1 << 62]),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [4611686018427387904], 'data_offsets': [0, 16]}" + AGAIN,
    ),
    (
        "shape_too_long",
        entry(shape=[1] * 9),
        4,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [1, 1, 1, 1, 1, 1, 1, 1, 1], 'data_offsets': [0, 16]}" + AGAIN,
    ),
    (
        "shape_product_overflows",
        entry(shape=[1 << 61, 1 << 61]),
        16,
        SourceError,
        "'a' is F32 [2305843009213693952, 2305843009213693952], 21,267,647,932,558,653,966,460,912,964,485,513,216 "
        "bytes, but its offsets span 16" + AGAIN,
    ),
    (
        "offsets_three",
        entry(data_offsets=[0, 8, 16]),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 8, 16]}" + AGAIN,
    ),
    (
        "offsets_text",
        entry(data_offsets="01"),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [2, 2], 'data_offsets': '01'}" + AGAIN,
    ),
    (
        "offsets_negative",
        entry(data_offsets=[-16, 0]),
        16,
        SourceError,
        MALFORMED + "{'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [-16, 0]}" + AGAIN,
    ),
    (
        "offsets_backwards",
        entry(data_offsets=[16, 0]),
        16,
        SourceError,
        "the data of 'a' is said to be at 16-0, outside the file's 16 data bytes; the shard is truncated: "
        "download it again",
    ),
    (
        "out_of_file",
        entry(),
        15,
        SourceError,
        "the data of 'a' is said to be at 0-16, outside the file's 15 data bytes; the shard is truncated: "
        "download it again",
    ),
    (
        "size_not_of_shape",
        entry(shape=[2, 3]),
        16,
        SourceError,
        "'a' is F32 [2, 3], 24 bytes, but its offsets span 16" + AGAIN,
    ),
    (
        "overlap",
        two((0, 8), (4, 12)),
        12,
        SourceError,
        "the data of 'b' at 4 overlaps the tensor before it, which ends at 8" + AGAIN,
    ),
    (
        "same_place",
        two((0, 8), (0, 8)),
        8,
        SourceError,
        "the data of 'b' at 0 overlaps the tensor before it, which ends at 8" + AGAIN,
    ),
    (
        "hole",
        two((0, 8), (9, 12)),
        12,
        SourceError,
        "the data of 'b' at 9 leaves a hole before it, which ends at 8" + AGAIN,
    ),
    (
        "hole_at_the_start",
        two((4, 8), (8, 12)),
        12,
        SourceError,
        "the data of 'a' at 4 leaves a hole before it, which ends at 0" + AGAIN,
    ),
    (
        "data_after_the_last",
        entry(),
        20,
        SourceError,
        "the tensors end at 16 of 20 data bytes; the file is not as it was written: download it again",
    ),
]


@pytest.mark.parametrize(
    ("header", "n_data", "error", "says"), [pytest.param(*case[1:], id=case[0]) for case in EVIL_HEADERS]
)
def test_evil_header(tmp_path: Path, header: bytes, n_data: int, error: type[QuantkitError], says: str) -> None:
    path = write_safetensors(tmp_path / "evil.safetensors", header, bytes(n_data))
    assert sentence(lambda: read_shard(path), error) == f"{path}: {says}"


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        pytest.param(b"", "0 bytes are too few for a safetensors file; download it again", id="empty"),
        pytest.param(b"\x02" + bytes(6), "7 bytes are too few for a safetensors file; download it again", id="7_bytes"),
        pytest.param(
            struct.pack("<Q", 3) + b"{}",
            "claims a header of 3 bytes, but has 2 after the length (at most 100,000,000); it is truncated or no "
            "safetensors file: download it again",
            id="header_beyond_the_file",
        ),
        pytest.param(
            b"\xff" * 8 + b"{}",
            "claims a header of 18,446,744,073,709,551,615 bytes, but has 2 after the length (at most 100,000,000); it "
            "is truncated or no safetensors file: download it again",
            id="header_of_2^64",
        ),
    ],
)
def test_evil_length(tmp_path: Path, blob: bytes, says: str) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(blob)
    assert sentence(lambda: read_shard(path)) == f"{path}: {says}"


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1))
    os.truncate(path, 10 * MAX_HEADER)  # sparse: the claim is true
    assert sentence(lambda: read_shard(path)) == (
        f"{path}: claims a header of 100,000,001 bytes, but has 999,999,992 after the length (at most 100,000,000); it "
        "is truncated or no safetensors file: download it again"
    )


def test_many_names_and_one_twice_are_refused_at_once(tmp_path: Path) -> None:
    names = [*(f'"n{i}":0' for i in range(100_000)), '"n99999":0']
    path = write_safetensors(tmp_path / "evil.safetensors", ("{" + ",".join(names) + "}").encode())
    start = time.monotonic()
    says = sentence(lambda: read_shard(path))
    assert time.monotonic() - start < 5
    assert says == f"{path}: the header is not valid JSON: 'n99999' occurs twice; download it again"


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_a_shard_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    what = "is a directory, not a file" if kind == "directory" else "is not a regular file"
    assert sentence(lambda: read_shard(path)) == f"{path}: {what}"


def attempt(path: Path) -> tuple[dict[str, SourceTensor] | None, str]:
    """What a shard holds, or why it is refused; any other exception fails the test."""
    try:
        return read_shard(path), ""
    except SourceError as e:
        return None, str(e)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from([*DTYPE_BYTES, "X"]) | JSON_VALUES,
                "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON_VALUES,
                "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)) | JSON_VALUES,
            },
        )
        | JSON_VALUES,
        max_size=4,
    )
    | JSON_VALUES,
    st.binary(max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_any_json_for_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.safetensors"
    write_safetensors(path, header, data)
    found, says = attempt(path)
    if found is None:
        assert says.startswith(f"{path}: ")
        assert says.isprintable()
    else:
        assert sum(t.nbytes for t in found.values()) == len(data)


@given(st.binary(max_size=80), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_any_bytes_for_a_shard_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, cut: int
) -> None:
    path = write_safetensors(tmp_path_factory.mktemp("any") / "any.safetensors", {"a": TENSOR}, bytes(16))
    blob = bytearray(path.read_bytes())
    at = cut * len(blob) // 8
    blob[at : at + len(noise)] = noise
    path.write_bytes(blob)
    found, says = attempt(path)
    assert found is not None or (says.startswith(f"{path}: ") and says.isprintable())


# ---------------------------------------------------------------- a directory: index, shards and config


def checkpoint(
    folder: Path, shards: dict[str, dict[str, tuple[str, list[int]]]], config: Any = None, index: Any = None
) -> Path:
    """A directory of these shards (zeros), with an index that fits unless another is given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    for file, tensors in shards.items():
        header, at = {}, 0
        for name, (dtype, shape) in tensors.items():
            n = int(np.prod(shape)) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
            at += n
        write_safetensors(folder / file, header, bytes(at))
    if index is None and len(shards) > 1:
        index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))
    return folder


ONE = {"model.safetensors": {"w": ("BF16", [2, 2])}}
A_AND_B = {"a.safetensors": {"w": ("BF16", [2, 2])}, "b.safetensors": {"v": ("F32", [3])}}
FP8 = {"model.safetensors": {"w": ("F8_E4M3", [130, 300]), "w_scale_inv": ("F32", [2, 3])}}


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    c = open_checkpoint(checkpoint(tmp_path, ONE))
    assert (list(c.tensors), c.scales, c.files) == (["w"], {}, (tmp_path / "model.safetensors",))


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    c = open_checkpoint(checkpoint(tmp_path, {"other.safetensors": ONE["model.safetensors"]}))
    assert c.files == (tmp_path / "other.safetensors",)


def test_shards_are_joined_by_the_index(tmp_path: Path) -> None:
    c = open_checkpoint(checkpoint(tmp_path, A_AND_B))
    assert {n: (t.file.name, t.shape) for n, t in c.tensors.items()} == {
        "w": ("a.safetensors", (2, 2)),
        "v": ("b.safetensors", (3,)),
    }


def test_files_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, A_AND_B)
    (tmp_path / "consolidated.safetensors").write_bytes(b"something else")
    assert len(open_checkpoint(tmp_path).files) == 2


def test_a_wrong_total_size_in_the_index_is_of_no_account(tmp_path: Path) -> None:
    checkpoint(tmp_path, A_AND_B)
    edit_json(tmp_path / INDEX, lambda index: index.update(metadata={"total_size": 1}))
    assert len(open_checkpoint(tmp_path).tensors) == 2


@pytest.mark.parametrize(
    ("shape", "scale"),
    [([128, 128], [1, 1]), ([129, 128], [2, 1]), ([1, 1], [1, 1]), ([130, 300], [2, 3]), ([256, 384], [2, 3])],
)
def test_fp8_has_a_scale_a_block_partial_ones_too(tmp_path: Path, shape: list[int], scale: list[int]) -> None:
    c = open_checkpoint(
        checkpoint(tmp_path, {"model.safetensors": {"w": ("F8_E4M3", shape), "w_scale_inv": ("F32", scale)}})
    )
    assert (list(c.tensors), c.scales["w"].shape, c.scale("w").shape) == (["w"], tuple(scale), tuple(scale))


def test_the_block_size_comes_from_the_config(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 256]}}
    shards = {"model.safetensors": {"w": ("F8_E4M3", [130, 300]), "w_scale_inv": ("F32", [3, 2])}}
    c = open_checkpoint(checkpoint(tmp_path, shards, config))
    assert (c.block, c.scale("w").shape) == ((64, 256), (3, 2))


@pytest.mark.parametrize(
    ("dtype", "raw", "values"),
    [
        ("F32", np.array([1.5, -0.0, 3e-39], np.float32).tobytes(), [1.5, -0.0, np.float32(3e-39)]),
        ("F16", np.array([1.5, 6e-8, np.inf], np.float16).tobytes(), [1.5, np.float32(np.float16(6e-8)), np.inf]),
        ("BF16", np.array([0x3FC0, 0x0001, 0x7F80], np.uint16).tobytes(), [1.5, 2.0**-133, np.inf]),
        # 2^(code - 127); 255 is NaN
        ("F8_E8M0", bytes([127, 0, 254]), [1.0, 2.0**-127, 2.0**127]),
        ("F8_E8M0", bytes([255, 126, 128]), [np.nan, 0.5, 2.0]),
    ],
)
def test_scales_of_every_dtype_as_float32(tmp_path: Path, dtype: str, raw: bytes, values: list[float]) -> None:
    n = len(raw)
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [128, 384], "data_offsets": [0, 128 * 384]},
        "w_scale_inv": {"dtype": dtype, "shape": [1, 3], "data_offsets": [128 * 384, 128 * 384 + n]},
    }
    checkpoint(tmp_path, {})
    write_safetensors(tmp_path / "model.safetensors", header, bytes(128 * 384) + raw)
    got = open_checkpoint(tmp_path).scale("w")
    assert got.dtype == np.float32
    assert got.tobytes() == np.array([values], np.float32).tobytes()


def test_u8_scales_are_ue8m0_where_the_config_says_so(tmp_path: Path) -> None:
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [1, 256], "data_offsets": [0, 256]},
        "w_scale_inv": {"dtype": "U8", "shape": [1, 2], "data_offsets": [256, 258]},
    }
    checkpoint(tmp_path, {}, {"quantization_config": {"scale_fmt": "ue8m0"}})
    write_safetensors(tmp_path / "model.safetensors", header, bytes(256) + bytes([128, 1]))
    assert open_checkpoint(tmp_path).scale("w").tolist() == [[2.0, 2.0**-126]]
    checkpoint(tmp_path, {}, {"quantization_config": {"scale_fmt": "float"}})
    write_safetensors(tmp_path / "model.safetensors", header, bytes(256) + bytes([128, 1]))
    said = sentence(lambda: open_checkpoint(tmp_path), UnsupportedError)
    assert said.endswith("scale 'w_scale_inv' is U8; quantkit reads F32, BF16, F16, F8_E8M0")


def test_read_gives_the_stored_bytes_from_anywhere(tmp_path: Path) -> None:
    data = bytes(range(32))
    header = {
        "v": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "w": {"dtype": "U8", "shape": [24], "data_offsets": [8, 32]},
    }
    checkpoint(tmp_path, {})
    write_safetensors(tmp_path / "model.safetensors", header, data)
    c = open_checkpoint(tmp_path)
    out = np.empty((2, 5), np.uint8)
    c.read(c.tensor("w"), 7, out)
    assert out.tobytes() == data[15:25]


BAD_INDEX: list[tuple[str, Any, str]] = [
    ("no_weight_map", {}, "has no weight_map object; download it again"),
    ("weight_map_empty", {"weight_map": {}}, "has no weight_map object; download it again"),
    ("weight_map_list", {"weight_map": ["w"]}, "has no weight_map object; download it again"),
    ("file_no_text", {"weight_map": {"w": 7}}, "weight_map gives 'w' the file 7, not a name"),
    (
        "tensor_name_with_newline",
        {"weight_map": {"w\n": "a.safetensors"}},
        "'w\\n' is no name for a tensor (1 to 256 printable characters)",
    ),
    ("file_empty", {"weight_map": {"w": ""}}, "weight_map names '', which is no file name"),
    ("file_null", {"weight_map": {"w": "a\0b"}}, "weight_map names 'a\\x00b', which is no file name"),
    ("file_surrogate", {"weight_map": {"w": "\udcff"}}, "weight_map names '\\udcff', which is no file name"),
    ("file_long", {"weight_map": {"w": "x" * 257}}, f"weight_map names '{'x' * 79}, which is no file name"),
    (
        "file_above",
        {"weight_map": {"w": "../a.safetensors"}},
        "weight_map names '../a.safetensors', which is outside the checkpoint directory",
    ),
    (
        "file_above_after_all",
        {"weight_map": {"w": "x/../../a.safetensors"}},
        "weight_map names 'x/../../a.safetensors', which is outside the checkpoint directory",
    ),
    (
        "file_absolute",
        {"weight_map": {"w": "/a.safetensors"}},
        "weight_map names '/a.safetensors', which is outside the checkpoint directory",
    ),
    (
        "file_backslash",
        {"weight_map": {"w": "..\\a.safetensors"}},
        "weight_map names '..\\a.safetensors', which is outside the checkpoint directory",
    ),
]


@pytest.mark.parametrize(("index", "says"), [pytest.param(*case[1:], id=case[0]) for case in BAD_INDEX])
def test_bad_index(tmp_path: Path, index: Any, says: str) -> None:
    checkpoint(tmp_path, A_AND_B, index=index)
    assert sentence(lambda: open_checkpoint(tmp_path)) == f"{tmp_path / INDEX}: {says}"


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1', "is not valid JSON: Expecting ',' delimiter: line 1 column 8 (char 7); download it again"),
        ("", "is not valid JSON: Expecting value: line 1 column 1 (char 0); download it again"),
        ("[1]", "is a JSON list, not an object; download it again"),
        ("[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
        ('{"a":' + "[" * 40 + "]" * 40 + "}", "is not valid JSON: nested deeper than 32; download it again"),
        ('{"a":' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit (4300 digits) for integer string"),
    ],
    ids=["truncated", "empty", "a_list", "deep", "nested", "long_number"],
)
def test_json_that_is_none(tmp_path: Path, name: str, text: str, says: str) -> None:
    checkpoint(tmp_path, A_AND_B)
    (tmp_path / name).write_text(text)
    # the rest of the last two is Python's own and changes with its version
    assert sentence(lambda: open_checkpoint(tmp_path)).startswith(f"{tmp_path / name}: {says}")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, A_AND_B)
    os.truncate(tmp_path / name, 1 << 40)
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path / name}: 1,099,511,627,776 bytes are too many for it (at most 100,000,000)"
    )


def test_a_pipe_for_a_config_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert sentence(lambda: open_checkpoint(tmp_path)) == f"{tmp_path / 'config.json'}: is not a regular file"


def test_no_config(tmp_path: Path) -> None:
    says = f"{tmp_path / 'config.json'}: cannot be read: No such file or directory"
    assert sentence(lambda: open_checkpoint(tmp_path)) == says


def test_no_shards(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path}: a checkpoint directory needs model.safetensors.index.json or model.safetensors; it has no "
        "safetensors files: download what is missing"
    )


def test_shards_without_an_index(tmp_path: Path) -> None:
    checkpoint(tmp_path, A_AND_B)
    (tmp_path / INDEX).unlink()
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path}: a checkpoint directory needs model.safetensors.index.json or model.safetensors; it has 2 "
        "safetensors files (a.safetensors, …) but no model.safetensors.index.json: download what is missing"
    )


def test_a_missing_shard(tmp_path: Path) -> None:
    checkpoint(tmp_path, A_AND_B)
    (tmp_path / "b.safetensors").unlink()
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path}: shard b.safetensors of the 2 that model.safetensors.index.json names is missing; download it "
        "again"
    )


def test_several_missing_shards(tmp_path: Path) -> None:
    checkpoint(tmp_path, A_AND_B)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "b.safetensors").unlink()
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path}: shard a.safetensors and 1 more of the 2 that model.safetensors.index.json names is missing; "
        "download it again"
    )


def test_a_tensor_the_index_places_in_a_shard_that_lacks_it(tmp_path: Path) -> None:
    weight_map = {"w": "a.safetensors", "v": "b.safetensors", "u": "b.safetensors"}
    checkpoint(tmp_path, A_AND_B, index={"weight_map": weight_map})
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path / 'b.safetensors'}: 'u' should be here by model.safetensors.index.json, but is not; download both "
        "again"
    )


def test_a_tensor_the_index_does_not_name(tmp_path: Path) -> None:
    shards = {**A_AND_B, "b.safetensors": {"v": ("F32", [3]), "x": ("F32", [1])}}
    checkpoint(tmp_path, shards, index={"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}})
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path / 'b.safetensors'}: holds 'x', but model.safetensors.index.json does not name it; download both "
        "again"
    )


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {**A_AND_B, "b.safetensors": {"v": ("F32", [3]), "w": ("BF16", [2, 2])}}
    checkpoint(tmp_path, shards, index={"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}})
    assert sentence(lambda: open_checkpoint(tmp_path)) == (
        f"{tmp_path / 'b.safetensors'}: holds 'w', but model.safetensors.index.json places it in a.safetensors; "
        "download both again"
    )


BAD_SCALES: list[tuple[str, dict[str, tuple[str, list[int]]], type[QuantkitError], str]] = [
    (
        "scale_without_its_weight",
        {"w_scale_inv": ("F32", [1, 1])},
        SourceError,
        "scale 'w_scale_inv' has no weight 'w' in any shard; the checkpoint is not whole: download it again",
    ),
    (
        "weight_without_its_scale",
        {"w": ("F8_E4M3", [4, 4])},
        SourceError,
        "'w' is F8_E4M3, but its scale 'w_scale_inv' is in no shard; the checkpoint is not whole: download it again",
    ),
    (
        "scale_of_a_weight_that_is_not_fp8",
        {"w": ("BF16", [4, 4]), "w_scale_inv": ("F32", [1, 1])},
        SourceError,
        "'w' has a scale, but is BF16, not F8_E4M3; only one of the two can be right: download the checkpoint again",
    ),
    (
        "scale_of_the_wrong_shape",
        {"w": ("F8_E4M3", [130, 300]), "w_scale_inv": ("F32", [3, 2])},
        SourceError,
        "scale 'w_scale_inv' has the shape [3, 2], but a weight of [130, 300] in blocks of 128x128 needs [2, 3]; do "
        "config.json and shards belong together?",
    ),
    (
        "scale_with_a_dimension_more",
        {"w": ("F8_E4M3", [4, 4]), "w_scale_inv": ("F32", [1, 1, 1])},
        SourceError,
        "scale 'w_scale_inv' has the shape [1, 1, 1], but a weight of [4, 4] in blocks of 128x128 needs [1, 1]; do "
        "config.json and shards belong together?",
    ),
    (
        "scale_of_a_wrong_dtype",
        {"w": ("F8_E4M3", [4, 4]), "w_scale_inv": ("F64", [1, 1])},
        UnsupportedError,
        "scale 'w_scale_inv' is F64; quantkit reads F32, BF16, F16, F8_E8M0",
    ),
    (
        "fp8_of_one_dimension",
        {"w": ("F8_E4M3", [4]), "w_scale_inv": ("F32", [1])},
        SourceError,
        "'w' is FP8 with the shape [4]; blocks of scales need two dimensions",
    ),
    ("the_other_fp8", {"w": ("F8_E5M2", [4, 4])}, UnsupportedError, "'w' is F8_E5M2; quantkit reads F8_E4M3"),
]


@pytest.mark.parametrize(("tensors", "error", "says"), [pytest.param(*case[1:], id=case[0]) for case in BAD_SCALES])
def test_bad_scales(tmp_path: Path, tensors: Any, error: type[QuantkitError], says: str) -> None:
    checkpoint(tmp_path, {"model.safetensors": tensors})
    assert sentence(lambda: open_checkpoint(tmp_path), error) == f"{tmp_path / 'model.safetensors'}: {says}"


def test_a_scale_may_lie_in_another_shard_than_its_weight(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"w": ("F8_E4M3", [4, 4])}, "b.safetensors": {"w_scale_inv": ("F32", [1, 1])}}
    assert open_checkpoint(checkpoint(tmp_path, shards)).scales["w"].file.name == "b.safetensors"


READS = "quantkit reads FP8 (E4M3) and unquantized checkpoints: "
ORIGINAL = "get the weights it was made from"
CONVERT = f"convert it with convert_hf_to_gguf.py --outtype bf16 and give the GGUF, or {ORIGINAL}"


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


BAD_QUANTIZATION: list[tuple[str, Any, type[QuantkitError], str]] = [
    (
        "another_method",
        {"quant_method": "gptq"},
        UnsupportedError,
        f"the checkpoint is quantized as GPTQ; {READS}{CONVERT}",
    ),
    (
        "another_format",
        {"quant_method": "fp8", "fmt": "e5m2"},
        UnsupportedError,
        f"the checkpoint is quantized as FP8 in the format 'e5m2'; {READS}{ORIGINAL}",
    ),
    ("no_object", "fp8", SourceError, "quantization_config is 'fp8', not an object"),
    (
        "block_of_zero",
        {"weight_block_size": [128, 0]},
        SourceError,
        "weight_block_size is [128, 0], not two positive integers",
    ),
    (
        "block_of_three",
        {"weight_block_size": [1, 1, 1]},
        SourceError,
        "weight_block_size is [1, 1, 1], not two positive integers",
    ),
    (
        "block_of_text",
        {"weight_block_size": "128"},
        SourceError,
        "weight_block_size is '128', not two positive integers",
    ),
    (
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        UnsupportedError,
        f"the checkpoint is quantized as AWQ of 4 bits; {READS}{ORIGINAL}",
    ),
    (
        "bitsandbytes",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        UnsupportedError,
        f"the checkpoint is quantized as bitsandbytes; {READS}{ORIGINAL}",
    ),
    (
        "bitsandbytes_of_old",
        {"load_in_8bit": True},
        UnsupportedError,
        f"the checkpoint is quantized as bitsandbytes; {READS}{ORIGINAL}",
    ),
    ("mxfp4", {"quant_method": "mxfp4"}, UnsupportedError, f"the checkpoint is quantized as MXFP4; {READS}{CONVERT}"),
    (
        "a_method_of_tomorrow",
        {"quant_method": "zip"},
        UnsupportedError,
        f"the checkpoint is quantized as 'zip'; {READS}{ORIGINAL}",
    ),
    ("no_method", {"quant_method": 7}, UnsupportedError, f"the checkpoint is quantized as 7; {READS}{ORIGINAL}"),
    (
        "modelopt_nvfp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        UnsupportedError,
        f"the checkpoint is quantized as ModelOpt's 'NVFP4'; {READS}{CONVERT}",
    ),
    (
        "compressed_pack",
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {}}},
        UnsupportedError,
        f"the checkpoint is quantized as compressed-tensors in the format 'pack-quantized'; {READS}{CONVERT}",
    ),
    (
        "compressed_int8",
        compressed(type="int", strategy="channel"),
        UnsupportedError,
        f"the checkpoint is quantized as compressed-tensors of 8-bit 'int'; {READS}{CONVERT}",
    ),
    (
        "compressed_tensor",
        compressed(strategy="tensor"),
        UnsupportedError,
        f"the checkpoint is quantized as compressed-tensors with the strategy 'tensor'; {READS}{ORIGINAL}",
    ),
    (
        "compressed_groups",
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {}, "b": {}}},
        UnsupportedError,
        f"the checkpoint is quantized as compressed-tensors in 2 groups; {READS}{ORIGINAL}",
    ),
    (
        "block_huge",
        {"weight_block_size": [1 << 31, 1]},
        SourceError,
        "weight_block_size is [2147483648, 1], not two positive integers",
    ),
]


@pytest.mark.parametrize(("value", "error", "says"), [pytest.param(*case[1:], id=case[0]) for case in BAD_QUANTIZATION])
def test_bad_quantization_config(tmp_path: Path, value: Any, error: type[QuantkitError], says: str) -> None:
    checkpoint(tmp_path, FP8, {"quantization_config": value})
    assert sentence(lambda: open_checkpoint(tmp_path), error) == f"{tmp_path}/config.json: {says}"


@pytest.mark.parametrize(
    ("tensors", "quantization", "error", "says"),
    [
        pytest.param(
            {"w": ("F8_E4M3", [130, 300]), "w_scale_inv": ("F32", [2, 3])},
            {"weight_block_size": None},
            SourceError,
            "scale 'w_scale_inv' has the shape [2, 3], but a weight of [130, 300] with one a row needs [130, 1]; do "
            "config.json and shards belong together?",
            id="blocks_where_none_are_said",
        ),
        pytest.param(
            {"x.weight": ("F8_E4M3", [4, 4]), "x.weight_scale": ("F32", [])},
            {"quant_method": "fp8", "activation_scheme": "static"},
            UnsupportedError,
            "the scale of the FP8 weight 'x.weight' is 'x.weight_scale', where a checkpoint of its config.json has "
            "'x.weight_scale_inv'; quantkit and llama.cpp's converter read that only: get the weights it was made "
            "from, or FP8 with such scales",
            id="static",
        ),
        pytest.param(
            {"x.weight": ("F8_E4M3", [4, 4]), "x.scale": ("F32", [1, 1])},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            UnsupportedError,
            "the scale of the FP8 weight 'x.weight' is 'x.scale', where a checkpoint of its config.json has "
            "'x.weight_scale_inv'; quantkit and llama.cpp's converter read that only: get the weights it was made "
            "from, or FP8 with such scales",
            id="deepseeks_own_names",
        ),
        pytest.param(
            {"x.weight": ("F8_E4M3", [4, 4]), "x.weight_scale_inv": ("F32", [])},
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            UnsupportedError,
            "the scale of the FP8 weight 'x.weight' is 'x.weight_scale_inv', where a checkpoint of its config.json has "
            "'x.weight_scale'; quantkit and llama.cpp's converter read that only: get the weights it was made from, or "
            "FP8 with such scales",
            id="modelopt_by_the_other_name",
        ),
        pytest.param(
            {
                "x.weight": ("F8_E4M3", [4, 4]), "x.weight_scale": ("F32", []),
                "y.weight": ("F8_E4M3", [4, 4]), "y.weight_scale": ("F32", [4]),
            },
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            UnsupportedError,
            "scale 'y.weight_scale' has the shape [4], and 'x.weight_scale' is a single number; quantkit reads a "
            "checkpoint with either kind: get the weights it was made from",
            id="of_tensors_and_of_rows",
        ),
        pytest.param(
            {"x.qweight": ("I32", [4, 4]), "x.qzeros": ("I32", [1, 4]), "x.scales": ("F16", [1, 4])},
            None,
            UnsupportedError,
            f"'x.qweight': the checkpoint is quantized as GPTQ or AWQ; {READS}{ORIGINAL}",
            id="gptq_without_a_config",
        ),
    ],
)  # fmt: skip
def test_scales_of_another_scheme(
    tmp_path: Path, tensors: Any, quantization: Any, error: type[QuantkitError], says: str
) -> None:
    config = {} if quantization is None else {"quantization_config": quantization}
    checkpoint(tmp_path, {"model.safetensors": tensors}, config)
    assert sentence(lambda: open_checkpoint(tmp_path), error) == f"{tmp_path / 'model.safetensors'}: {says}"


def test_modelopts_own_file(tmp_path: Path) -> None:
    """NVIDIA's FP4 releases of R1 have no quantization_config, but this."""
    checkpoint(tmp_path, ONE)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert sentence(lambda: open_checkpoint(tmp_path), UnsupportedError) == (
        f"{tmp_path}/hf_quant_config.json: the checkpoint is quantized as ModelOpt's 'NVFP4'; {READS}{CONVERT}"
    )


@pytest.mark.parametrize("keep", [0, 7, 8, 1000, -1], ids=["all", "length", "header", "within_header", "last_byte"])
def test_a_shard_truncated_anywhere(v3: Path, keep: int) -> None:
    """Whatever is cut off a real shard, it is refused, with its name and the way out."""
    shard = shard_of(v3, "model.norm.weight")
    os.truncate(shard, keep if keep >= 0 else shard.stat().st_size - 1)
    says = sentence(lambda: open_checkpoint(v3))
    assert says.startswith(f"{shard}: ")
    assert says.endswith("download it again")


def test_a_header_edited_by_hand(v3: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    shard = shard_of(v3, name)
    edit_safetensors(shard, lambda header: header[name].update(shape=[256, 64]))
    assert sentence(lambda: open_checkpoint(v3)) == (
        f"{shard}: '{name}' is F8_E4M3 [256, 64], 16,384 bytes, but its offsets span 32,768; download it again"
    )


# ---------------------------------------------------------------- files that change under our hands


def source_tensor(path: Path, nbytes: int = 100) -> SourceTensor:
    path.write_bytes(bytes(range(200)))
    return SourceTensor("w", "U8", (nbytes,), path, 50, nbytes)


def test_a_file_truncated_after_it_was_opened(tmp_path: Path) -> None:
    t = source_tensor(tmp_path / "x")
    files = Files([t.file])
    out = np.empty(100, np.uint8)
    files.read(t, 0, out)
    assert out.tobytes() == bytes(range(50, 150))
    os.truncate(t.file, 120)
    assert sentence(lambda: files.read(t, 0, out)) == (
        f"{t.file}: 'w' should end at 150, but the file now ends at 120; it has changed since it was opened"
    )


def test_a_file_gone_before_it_was_opened(tmp_path: Path) -> None:
    t = source_tensor(tmp_path / "x")
    files = Files([t.file])
    t.file.unlink()
    says = f"{t.file}: cannot be opened: No such file or directory"
    assert sentence(lambda: files.read(t, 0, np.empty(1, np.uint8))) == says


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    t = source_tensor(tmp_path / "x")._replace(file=tmp_path)
    says = f"{tmp_path}: reading 'w' at 50 failed: Is a directory"
    assert sentence(lambda: Files([tmp_path]).read(t, 0, np.empty(1, np.uint8))) == says


def test_the_files_are_closed_in_the_end(tmp_path: Path) -> None:
    t = source_tensor(tmp_path / "x")
    files = Files([t.file])
    before = len(os.listdir("/proc/self/fd"))
    files.read(t, 0, np.empty(1, np.uint8))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del files
    assert len(os.listdir("/proc/self/fd")) == before

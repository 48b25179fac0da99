"""Layouts: offsets, padding, shards and header bytes, read back by our reader and by the gguf package's."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import OutputError
from quantkit.gguf.header import BOOL, F32, I32, KV, STRING, U16, U32, decode, kv, kv_array, read_header
from quantkit.gguf.types import QTYPES
from quantkit.model.catalogue import Catalogue, MlaLayout, Role, Tensor
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning import file_layout
from quantkit.planning.file_layout import FileLayout, file_names, lay_out, output_kvs
from quantkit.planning.plan import ImatrixStatus, Plan, Planned, make_plan
from quantkit.recipe.load import Recipe, load, parse

#: newer than the gguf package's reader
UNKNOWN_TO_GGUF = ("Q2_0",)


def recipe(file_type: str = "Q4_K_M") -> Recipe:
    head = f"name: r\narch: [a]\nfile_type: {file_type}\n"
    type_ = file_type if QTYPES.get(file_type, QTYPES["Q4_K"]).is_float else "Q4_K"
    return parse(f'{head}rules:\n  - {{match: "*", type: {type_}, why: t}}\n', "r.yaml")


def planned(name: str, shape: tuple[int, ...], type_: str) -> Planned:
    nbytes = QTYPES[type_].row_bytes(shape[0]) * math.prod(shape[1:])
    return Planned(
        Tensor(name, shape, Role.OTHER, None, True, "BF16"), type_, type_, nbytes, "", "", ImatrixStatus.NOT_USED
    )


def plan_of(tensors: Sequence[Planned], kvs: Sequence[KV] = (), file_type: str = "Q4_K_M") -> Plan:
    catalogue = Catalogue("m", "a", MlaLayout.AS_IS, 1, (), (), tuple(t.tensor for t in tensors), tuple(kvs), True)
    return Plan(catalogue, recipe(file_type), tuple(tensors), ())


# ---------------------------------------------------------------- any plan

NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12),
    unique=True,
    max_size=8,
)
SHAPES = st.tuples(st.integers(1, 3), st.lists(st.integers(1, 4), max_size=3))
TYPES = st.sampled_from([n for n in QTYPES if n not in UNKNOWN_TO_GGUF])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Tensors of any type and (small) shape, trailing dimensions of one included, and some keys."""
    tensors = []
    for name in draw(NAMES):
        type_ = draw(TYPES)
        blocks, rest = draw(SHAPES)
        tensors.append(planned(name, (blocks * QTYPES[type_].block, *rest), type_))
    kvs = [kv("general.architecture", STRING, "a")]
    kvs += draw(
        st.lists(
            st.sampled_from(
                [
                    kv("a.block_count", U32, 7), kv("a.scale", F32, 2.5), kv("a.flag", BOOL, True),
                    kv("a.name", STRING, "zwölf 12"), kv_array("a.list", STRING, ["x", "", "日本"]),
                    kv_array("a.numbers", I32, [1, -2, 3]), kv_array("a.none", U32, []),
                ]
            ),
            unique_by=lambda item: item.key,
        )
    )  # fmt: skip
    return plan_of(tensors, kvs)


def naive_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as ggml writes it: without trailing ones, except the first dimension."""
    dims = list(shape)
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def check_file(file: FileLayout, tensors: Sequence[Planned]) -> None:
    """Check that there are no holes or overlaps, that all is aligned, and that the size is exact."""
    assert [p.planned for p in file.tensors] == list(tensors)
    at = len(file.header)
    for p in file.tensors:
        assert at % 32 == 0
        assert p.offset == at
        at += p.planned.nbytes
        at += -at % 32
    assert file.nbytes == at
    assert file.nbytes % 32 == 0


def write(file: FileLayout, path: Path) -> Path:
    """Write the file as a build first makes it: header and full length."""
    path.write_bytes(file.header)
    os.truncate(path, file.nbytes)
    return path


def check_read_back(path: Path, file: FileLayout, kvs: Sequence[KV]) -> None:
    expected = [(p.planned.tensor.name, naive_dims(p.planned.tensor.shape), p.planned.type) for p in file.tensors]
    ours = read_header(path)
    assert [(t.name, t.shape, t.type) for t in ours.tensors] == expected
    assert [(t.offset, t.nbytes) for t in ours.tensors] == [(p.offset, p.planned.nbytes) for p in file.tensors]
    assert ours.kvs == tuple(kvs)
    assert (ours.version, ours.alignment, ours.data_offset) == (3, 32, len(file.header))
    assert ours.file_bytes == file.nbytes == path.stat().st_size
    theirs = gguf.GGUFReader(path)
    assert [(t.name, tuple(int(n) for n in t.shape), t.tensor_type.name) for t in theirs.tensors] == expected
    assert [(t.data_offset, t.n_bytes) for t in theirs.tensors] == [(p.offset, p.planned.nbytes) for p in file.tensors]
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields == {item.key: decode(item) for item in kvs}
    assert list(fields) == [item.key for item in kvs]


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_one_file(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    (file,) = lay_out(plan, plan.catalogue.kvs)
    check_file(file, plan.tensors)
    assert sum(p.planned.nbytes for p in file.tensors) == plan.tensor_bytes
    check_read_back(write(file, tmp_path_factory.getbasetemp() / "one.gguf"), file, plan.catalogue.kvs)


@settings(max_examples=80, deadline=None)
@given(plan=plans(), limit=st.one_of(st.integers(0, 400), st.integers(0, 20_000)))
def test_shards(tmp_path_factory: pytest.TempPathFactory, plan: Plan, limit: int) -> None:
    kvs = plan.catalogue.kvs
    files = lay_out(plan, kvs, limit)
    groups = [[p.planned for p in file.tensors] for file in files]
    assert [t for group in groups for t in group] == list(plan.tensors)
    sizes = [[t.nbytes + -t.nbytes % 32 for t in group] for group in groups]
    for i, group in enumerate(sizes):
        # a shard holds one tensor, or exactly as many as fit
        assert len(group) == 1 or sum(group) <= limit
        assert i + 1 == len(sizes) or sum(group) + sizes[i + 1][0] > limit
    for no, (file, tensors) in enumerate(zip(files, groups, strict=True)):
        check_file(file, tensors)
        own = [
            KV("split.no", U16, no.to_bytes(2, "little")),
            KV("split.tensors.count", I32, len(plan.tensors).to_bytes(4, "little")),
            KV("split.count", U16, len(files).to_bytes(2, "little")),
        ]
        path = tmp_path_factory.getbasetemp() / "shard.gguf"
        check_read_back(write(file, path), file, [*kvs, *own] if no == 0 else own)


@given(plan=plans(), limit=st.none() | st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_the_same_twice(plan: Plan, limit: int | None) -> None:
    assert lay_out(plan, plan.catalogue.kvs, limit) == lay_out(plan, plan.catalogue.kvs, limit)


# ---------------------------------------------------------------- by hand


def f32s(*sizes: int) -> Plan:
    """F32 vectors of these lengths."""
    return plan_of([planned(f"t{i}", (n,), "F32") for i, n in enumerate(sizes)])


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        # 8 values are 32 bytes, 9 are 36 and take 64
        ((8, 8, 8), 96, [3]),
        ((8, 8, 8), 95, [2, 1]),
        ((8, 8, 8), 64, [2, 1]),
        ((8, 8, 8), 63, [1, 1, 1]),
        ((9, 9), 128, [2]),
        ((9, 9), 72, [1, 1]),
        # a tensor above the limit gets its own shard, even the first one
        ((100, 8, 8), 64, [1, 2]),
        ((8, 100, 8), 64, [1, 1, 1]),
        ((8, 8, 100), 64, [2, 1]),
        ((8,), 1, [1]),
        ((), 1, [0]),
    ],
)
def test_where_shards_end(sizes: tuple[int, ...], limit: int, groups: list[int]) -> None:
    assert [len(f.tensors) for f in lay_out(f32s(*sizes), (), limit)] == groups


def test_the_limit_does_not_count_the_header() -> None:
    keys = [kv("general.architecture", STRING, "a" * 10_000)]
    (file,) = lay_out(f32s(8, 8), keys, 64)
    assert len(file.header) > 10_000
    assert file.nbytes == len(file.header) + 64


def test_a_whole_file_byte_by_byte() -> None:
    plan = plan_of([planned("a", (3,), "F32"), planned("bb", (256, 2, 1), "Q4_K")])
    (file,) = lay_out(plan, [kv("k", U32, 5)])
    header = b"GGUF" + b"\3\0\0\0" + (2).to_bytes(8, "little") + (1).to_bytes(8, "little")
    header += (1).to_bytes(8, "little") + b"k" + b"\4\0\0\0" + b"\5\0\0\0"
    header += (1).to_bytes(8, "little") + b"a" + b"\1\0\0\0" + (3).to_bytes(8, "little")
    header += (0).to_bytes(4, "little") + (0).to_bytes(8, "little")
    header += (2).to_bytes(8, "little") + b"bb" + b"\2\0\0\0" + (256).to_bytes(8, "little") + (2).to_bytes(8, "little")
    header += (12).to_bytes(4, "little") + (32).to_bytes(8, "little")
    assert file.header == header.ljust(128, b"\0")
    assert [p.offset for p in file.tensors] == [128, 160]
    assert file.nbytes == 160 + 288


def test_too_many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    one = planned("t", (8,), "F32")
    with pytest.raises(OutputError) as e:
        lay_out(plan_of([one] * 65_536), (), 1)
    assert str(e.value) == "--split-max-size 1 makes 65,536 shards, more than 65,535"
    assert e.value.exit_code == 7
    monkeypatch.setattr(file_layout, "MAX_SHARDS", 3)
    assert len(lay_out(plan_of([one] * 3), (), 1)) == 3
    with pytest.raises(OutputError):
        lay_out(plan_of([one] * 4), (), 1)


@pytest.mark.parametrize(
    ("out", "n", "split", "names"),
    [
        ("m.gguf", 1, False, ["m.gguf"]),
        ("m", 1, False, ["m"]),
        ("m.gguf", 1, True, ["m-00001-of-00001.gguf"]),
        ("m", 2, True, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        ("R1.gguf.v2", 1, True, ["R1.gguf.v2-00001-of-00001.gguf"]),
        ("V3.1.gguf", 1, True, ["V3.1-00001-of-00001.gguf"]),
        ("V3.1", 1, True, ["V3.1-00001-of-00001.gguf"]),
    ],
)
def test_file_names(out: str, n: int, split: bool, names: list[str]) -> None:
    assert file_names(Path("dir") / out, n, split) == tuple(Path("dir") / name for name in names)


def test_file_names_of_many_shards() -> None:
    names = [path.name for path in file_names(Path("m.gguf"), 12_345, True)]
    assert (names[8], names[9]) == ("m-00009-of-12345.gguf", "m-00010-of-12345.gguf")
    assert names[-1] == "m-12345-of-12345.gguf"
    assert names == sorted(set(names))


# ---------------------------------------------------------------- keys


class Imatrix(NamedTuple):
    """The part of an importance matrix that layouts use."""

    path_as_given: str = "imatrix.gguf"
    datasets: tuple[str, ...] = ("calib.txt", "more.txt")
    n_chunks: int = 64
    entries: dict[str, object] = {"a": 1, "b": 2}  # noqa: RUF012


SOURCE_KEYS = (
    kv("general.architecture", STRING, "a"),
    kv("general.file_type", U32, 32),
    kv("a.block_count", U32, 3),
    kv("general.quantization_version", U32, 1),
    kv("tokenizer.ggml.model", STRING, "gpt2"),
)


def keys(
    imatrix: Imatrix | None, source: Sequence[KV] = SOURCE_KEYS, file_type: str = "IQ1_S"
) -> list[tuple[str, object]]:
    made = output_kvs(plan_of([], source, file_type), imatrix)
    return [(item.key, decode(item)) for item in made]


def test_keys_without_an_imatrix() -> None:
    """The source's keys in order; version and file type move to the end, since llama.cpp sets them again."""
    assert keys(None) == [
        ("general.architecture", "a"),
        ("a.block_count", 3),
        ("tokenizer.ggml.model", "gpt2"),
        ("general.quantization_version", 2),
        ("general.file_type", 24),
    ]


def test_keys_with_an_imatrix() -> None:
    assert keys(Imatrix())[3:] == [
        ("general.quantization_version", 2),
        ("general.file_type", 24),
        ("quantize.imatrix.file", "imatrix.gguf"),
        ("quantize.imatrix.dataset", "calib.txt"),
        ("quantize.imatrix.entries_count", 2),
        ("quantize.imatrix.chunks_count", 64),
    ]


def test_keys_of_an_imatrix_that_says_little() -> None:
    least = [("quantize.imatrix.file", "imatrix.gguf"), ("quantize.imatrix.entries_count", 2)]
    assert keys(Imatrix(datasets=(), n_chunks=0))[5:] == least
    assert keys(Imatrix(datasets=(), n_chunks=1))[5:] == [*least, ("quantize.imatrix.chunks_count", 1)]


def test_keys_of_a_source_that_was_quantized_are_replaced() -> None:
    """Keys that are set again are replaced; others stay, as in llama-quantize."""
    source = (
        kv("quantize.imatrix.file", STRING, "old"),
        kv("quantize.imatrix.chunks_count", U32, 1),
        *SOURCE_KEYS,
        kv("quantize.imatrix.dataset", STRING, "old"),
    )
    assert keys(Imatrix(datasets=()), source) == [
        ("general.architecture", "a"),
        ("a.block_count", 3),
        ("tokenizer.ggml.model", "gpt2"),
        ("quantize.imatrix.dataset", "old"),
        ("general.quantization_version", 2),
        ("general.file_type", 24),
        ("quantize.imatrix.file", "imatrix.gguf"),
        ("quantize.imatrix.entries_count", 2),
        ("quantize.imatrix.chunks_count", 64),
    ]


def test_recorded_strings_are_cut_to_127_bytes() -> None:
    made = dict(keys(Imatrix(path_as_given="x" * 128, datasets=("y" * 127,))))
    assert made["quantize.imatrix.file"] == "x" * 127
    assert made["quantize.imatrix.dataset"] == "y" * 127
    # cut in the middle of a character, as llama-quantize does
    item = next(i for i in output_kvs(plan_of([]), Imatrix(path_as_given="é" * 64)) if i.key == "quantize.imatrix.file")
    assert item.payload == (127).to_bytes(8, "little") + ("é" * 64).encode()[:127]


@pytest.mark.parametrize(("file_type", "number"), [("BF16", 32), ("Q2_K", 10), ("Q2_K_S", 21), ("IQ2_XXS", 19)])
def test_file_type_is_the_recipes(file_type: str, number: int) -> None:
    assert ("general.file_type", number) in keys(None, file_type=file_type)


# ---------------------------------------------------------------- a whole R1, without its weights


@pytest.mark.parametrize("split", [None, 50_000_000_000])
def test_r1_as_sparse_files(tmp_path: Path, split: int | None) -> None:
    """140 GB that take no space: every header is readable, and every tensor lies inside its file."""
    plan = make_plan(open_model("deepseek-r1", Options(layout="kv_b")), load("UD-IQ1_S"))
    kvs = output_kvs(plan, None)
    files = lay_out(plan, kvs, split)
    names = file_names(tmp_path / "R1.gguf", len(files), split is not None)
    assert [n.name for n in names] == (
        ["R1.gguf"] if split is None else [f"R1-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    )
    found = []
    for path, file in zip(names, files, strict=True):
        header = read_header(write(file, path))
        assert header.file_bytes == file.nbytes
        last = header.tensors[-1]
        assert last.offset + last.nbytes <= file.nbytes < last.offset + last.nbytes + 32
        found += [(t.name, t.shape, t.type, t.nbytes) for t in header.tensors]
    assert found == [(t.tensor.name, t.tensor.shape, t.type, t.nbytes) for t in plan.tensors]
    assert sum(n for *_, n in found) == 140_226_135_552
    assert sum(f.nbytes - len(f.header) for f in files) == 140_226_135_552
    assert read_header(names[0]).kvs[: len(kvs)] == kvs

"""A GGUF as a source: single or split, its bytes, the catalogue made of it, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import gguf_file

from quantkit.base.errors import QuantkitError, SourceError
from quantkit.gguf.header import F32, I32, KV, STRING, U16, U32, U64, decode, kv
from quantkit.model.catalogue import Part, Role, Tensor
from quantkit.model.families.known import MODELS
from quantkit.model.open import open_model
from quantkit.model.sources.gguf_file import open_gguf

ARCH = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]


def sentence(call: Callable[[], Any], error: type[QuantkitError] = SourceError) -> str:
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error
    return str(e.value)


def f32(n: int, first: int = 0) -> tuple[tuple[int, ...], str, bytes]:
    """A tensor of n float32, counting from `first`."""
    return (n,), "F32", np.arange(first, first + n, dtype=np.float32).tobytes()


def split_keys(no: int, count: int, total: int = 3, types: tuple[int, int, int] = (U16, U16, I32)) -> list[KV]:
    return [
        kv("split.no", types[0], no),
        kv("split.count", types[1], count),
        kv("split.tensors.count", types[2], total),
    ]


def shard(folder: Path, no: int, count: int = 3) -> Path:
    return folder / f"m-{no:05d}-of-{count:05d}.gguf"


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of three shards with a tensor each."""
    for no in (1, 2, 3):
        kvs = [*(ARCH if no == 1 else []), *split_keys(no - 1, 3)]
        gguf_file(shard(tmp_path, no), {f"t{no}": f32(4 * no, 10 * no)}, kvs)
    return shard(tmp_path, 1)


# ---------------------------------------------------------------- what is accepted


def test_a_single_file(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", {"a": ((32, 2), "Q8_0", bytes(range(68))), "b": f32(5)}, ARCH)
    g = open_gguf(path)
    assert (g.path, g.files, g.kvs) == (path, (path,), tuple(ARCH))
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in g.tensors.items()} == {
        "a": ("Q8_0", (2, 32), 68),
        "b": ("F32", (5,), 20),
    }
    out = np.empty(30, np.uint8)
    g.read(g.tensor("a"), 34, out)
    assert out.tobytes() == bytes(range(34, 64))


def test_a_split_file_is_read_as_one(first: Path) -> None:
    g = open_gguf(first)
    assert g.files == tuple(shard(first.parent, no) for no in (1, 2, 3))
    assert g.kvs == tuple(ARCH)  # the split keys do not belong to the model
    for no in (1, 2, 3):
        out = np.empty(4 * no, np.float32)
        g.read(g.tensor(f"t{no}"), 0, out.view(np.uint8))
        assert out.tolist() == list(range(10 * no, 14 * no))


def test_a_first_shard_without_tensors(tmp_path: Path) -> None:
    """llama-gguf-split --no-tensor-first-split makes these."""
    gguf_file(shard(tmp_path, 1, 2), {}, [*ARCH, *split_keys(0, 2, 1)])
    gguf_file(shard(tmp_path, 2, 2), {"t": f32(4)}, split_keys(1, 2, 1))
    assert open_gguf(shard(tmp_path, 1, 2)).files == (shard(tmp_path, 2, 2),)


def test_a_split_count_of_one_is_a_single_file(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "any name.gguf", {"t": f32(4)}, [*ARCH, *split_keys(0, 1, 1)])
    assert open_gguf(path).kvs == tuple(ARCH)


def test_split_keys_of_any_integer_type(first: Path) -> None:
    gguf_file(first, {"t1": f32(4)}, [*ARCH, *split_keys(0, 3, types=(U64, I32, U64))])
    assert len(open_gguf(first).tensors) == 3


def test_gguf_blocks_have_no_scales_beside_them(tmp_path: Path) -> None:
    g = open_gguf(gguf_file(tmp_path / "x.gguf", {"a": f32(4)}, ARCH))
    says = f"{tmp_path / 'x.gguf'}: 'a' has no scales; GGUF blocks carry their own"
    assert sentence(lambda: g.scale("a")) == says


# ---------------------------------------------------------------- split files that do not fit


def test_a_missing_shard(first: Path) -> None:
    shard(first.parent, 2).unlink()
    assert sentence(lambda: open_gguf(first)) == (
        f"{shard(first.parent, 2)}: shard 2 of 3 is missing; get it and put it beside the first"
    )


@pytest.mark.parametrize("no", [2, 3])
def test_another_shard_than_the_first_given(first: Path, no: int) -> None:
    given = shard(first.parent, no)
    assert sentence(lambda: open_gguf(given)) == (
        f"{given}: this is shard {no} of 3; give the first, m-00001-of-00003.gguf"
    )


def test_another_shard_than_the_first_given_under_another_name(first: Path) -> None:
    given = Path(shutil.copy(shard(first.parent, 2), first.parent / "x.gguf"))
    assert sentence(lambda: open_gguf(given)) == (
        f"{given}: this is shard 2 of 3; give the first, the one with split.no = 0"
    )


@pytest.mark.parametrize("name", ["x.gguf", "m-00001-of-00004.gguf"])
def test_a_first_shard_whose_name_does_not_lead_to_the_others(first: Path, name: str) -> None:
    given = first.rename(first.with_name(name))
    assert sentence(lambda: open_gguf(given)) == (
        f"{given}: is the first of 3 shards, but not named …-00001-of-00003.gguf; give it and the others "
        "their names back"
    )


def test_two_shards_with_their_names_changed_over(first: Path) -> None:
    second, third = shard(first.parent, 2), shard(first.parent, 3)
    aside = second.rename(first.parent / "aside")
    third.rename(second)
    aside.rename(third)
    assert sentence(lambda: open_gguf(first)) == (
        f"{second}: its name says shard 2 of 3, but its split keys say split.no 2, split.count 3, split.tensors.count "
        "3; get it again"
    )


def test_a_shard_without_split_keys(first: Path) -> None:
    second = gguf_file(shard(first.parent, 2), {"t2": f32(8)}, [])
    assert sentence(lambda: open_gguf(first)) == (
        f"{second}: its name says shard 2 of 3, but its split keys say nothing; get it again"
    )


def test_a_tensor_in_two_shards(first: Path) -> None:
    gguf_file(shard(first.parent, 3), {"t1": f32(4)}, split_keys(2, 3))
    assert sentence(lambda: open_gguf(first)) == (
        f"{first}: 1 tensor names occur in more than one shard; are all of one model?"
    )


def test_shards_with_another_number_of_tensors_than_said(first: Path) -> None:
    gguf_file(shard(first.parent, 3), {"t3": f32(4), "t4": f32(4)}, split_keys(2, 3))
    assert sentence(lambda: open_gguf(first)) == (
        f"{first}: split.tensors.count says 3 tensors, the 3 shards hold 4; are all of one model?"
    )


def test_a_split_key_that_is_no_integer(first: Path) -> None:
    gguf_file(first, {"t1": f32(4)}, [*ARCH, kv("split.no", U16, 0), kv("split.count", F32, float("nan"))])
    assert sentence(lambda: open_gguf(first)) == f"{first}: split.count is of type f32, not an integer"


def test_more_shards_than_can_be_numbered(first: Path) -> None:
    gguf_file(first, {"t1": f32(4)}, [*ARCH, *split_keys(0, 1 << 40, types=(U16, U64, I32))])
    assert sentence(lambda: open_gguf(first)) == (
        f"{first}: split.count says 1,099,511,627,776 shards, more than 65,535; get it again"
    )


def test_a_truncated_shard(first: Path) -> None:
    third = shard(first.parent, 3)
    os.truncate(third, third.stat().st_size - 20)
    data = third.stat().st_size
    assert sentence(lambda: open_gguf(first)) == (
        f"{third}: not a usable GGUF file: the data of 't3' should end at {data + 4:,}, but the file ends at {data:,}; "
        "the file is truncated: get it again"
    )


def test_the_usual_alignment_may_be_stated(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", {"a": f32(4)}, [*ARCH, kv("general.alignment", U32, 32)])
    assert list(open_gguf(path).tensors) == ["a"]


# ---------------------------------------------------------------- the catalogue of a GGUF


def test_the_catalogue_of_a_gguf(tmp_path: Path) -> None:
    tensors = {
        "output.weight": ((32, 2), "F16", bytes(128)),
        "blk.10.attn_norm.weight": f32(4),
        "blk.2.ffn_up_exps.weight": ((32, 2, 3), "Q8_0", bytes(6 * 34)),
        "blk.2.attn_kv_b.weight": ((32, 2), "BF16", bytes(128)),
        "blk.0.ffn_up.weight": ((32, 2), "BF16", bytes(128)),
    }
    kvs = [kv("general.architecture", STRING, "deepseek2"), kv("general.name", STRING, "My Model")]
    c = open_model(str(gguf_file(tmp_path / "x.gguf", tensors, kvs)))
    # as llama-quantize sorts: layers by number, what has none first
    assert [t.name for t in c.tensors] == [
        "output.weight",
        "blk.0.ffn_up.weight",
        "blk.2.attn_kv_b.weight",
        "blk.2.ffn_up_exps.weight",
        "blk.10.attn_norm.weight",
    ]
    assert (c.model, c.arch, c.layout, c.n_layers) == ("My Model", "deepseek2", "kv_b", 11)
    assert (c.dense_layers, c.moe_layers, c.kvs_complete) == ((0, 10), (2,), True)
    experts = Part("blk.2.ffn_up_exps.weight", (6, 32), 0, 6)
    assert c.tensors[3] == Tensor(experts.source, (32, 2, 3), Role.ROUTED_EXPERT, 2, True, "Q8_0", (experts,))
    assert (c.tensors[4].quantizable, c.tensors[4].source_type) == (False, "F32")
    assert c.source is not None
    assert [decode(item) for item in c.kvs] == ["deepseek2", "My Model"]


@pytest.mark.parametrize(("name", "shown"), [("", "x"), ("a\nb", "x"), ("n" * 201, "x"), ("n" * 200, "n" * 200)])
def test_a_name_that_cannot_be_shown_gives_way_to_the_files(tmp_path: Path, name: str, shown: str) -> None:
    kvs = [*ARCH, kv("general.name", STRING, name)]
    assert open_model(str(gguf_file(tmp_path / "x.gguf", {"a": f32(4)}, kvs))).model == shown


def test_no_architecture(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", {"a": f32(4)}, [kv("n", U32, 1)])
    assert sentence(lambda: open_model(str(path))) == f"{path}: has no general.architecture; it is not a model"


@pytest.mark.parametrize("arch", ["", "a\nb", "x" * 65, "\x1b[2J"])
def test_an_architecture_that_is_no_name(tmp_path: Path, arch: str) -> None:
    path = gguf_file(tmp_path / "x.gguf", {"a": f32(4)}, [kv("general.architecture", STRING, arch)])
    assert sentence(lambda: open_model(str(path))) == (
        f"{path}: general.architecture is {arch!r:.60}; it is not a model"
    )


def test_no_tensors(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "vocab.gguf", {}, ARCH)
    assert sentence(lambda: open_model(str(path))) == (
        f"{path}: has no tensors, only metadata; give the file that holds the weights"
    )


@pytest.mark.parametrize(
    ("blocks", "tensor", "odd"),
    [
        (2**32 - 1, "a", "4,294,967,295"),
        (1, "blk.4096.a", "4,096"),
        (1, "blk.-1.a", "-1"),
        (1, f"blk.{'9' * 50}.a", ",".join(["99", *["999"] * 16])),
    ],
)
def test_layers_that_no_model_has(tmp_path: Path, blocks: int, tensor: str, odd: str) -> None:
    kvs = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, blocks)]
    path = gguf_file(tmp_path / "x.gguf", {tensor: f32(4)}, kvs)
    assert sentence(lambda: open_model(str(path))) == (
        f"{path}: layer number or count {odd} is beyond 4,096; the header is corrupt"
    )


# ---------------------------------------------------------------- what SOURCE may be

KNOWN = ", ".join(MODELS)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("deepseek-rl", " (did you mean deepseek-r1?)"),
        ("no/such/file", ""),
        ("~nobody-of-that-name/x", ""),
        ("./deepseek-r1/", " (did you mean deepseek-r1?)"),
    ],
)
def test_a_source_that_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence(lambda: open_model(source)) == (
        f"'{source}' is not a directory, file or known model{hint}; give a checkpoint directory, a GGUF, a "
        "config.json, "
        f"or one of {KNOWN}"
    )
    assert sentence(lambda: open_model("no/such/file.gguf")) == "no/such/file.gguf: there is no such file"


def test_a_source_with_a_name_too_long(tmp_path: Path) -> None:
    source = str(tmp_path / ("x" * 300))
    assert sentence(lambda: open_model(source)) == f"{source}: cannot be read: File name too long"


def test_a_source_whose_path_is_not_utf8(tmp_path: Path) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")
    gguf_file(Path(source), {"a": f32(4)}, ARCH)
    assert sentence(lambda: open_model(source)) == (
        f"{source!a}: the path gives the model its name, but is not UTF-8; rename the folder or file"
    )


def test_a_shard_of_a_checkpoint_for_a_source(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(bytes(8))
    assert sentence(lambda: open_model(str(path))) == (
        f"{path}: is one shard of a checkpoint; give the directory: {tmp_path}"
    )


def test_a_directory_of_ggufs_for_a_source(first: Path) -> None:
    assert sentence(lambda: open_model(str(first.parent))) == (
        f"{first.parent}: has no config.json, so it is not a checkpoint directory; to read a GGUF, give the file: "
        f"{first}"
    )


def test_an_empty_directory_for_a_source(tmp_path: Path) -> None:
    assert sentence(lambda: open_model(str(tmp_path))) == (
        f"{tmp_path}: has no config.json, so it is not a checkpoint directory"
    )

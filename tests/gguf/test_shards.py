"""split and merge: byte for byte like llama-gguf-split, lossless in both directions, and every refused shard set."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, Tools
from factory import LLAMA_KVS as KVS
from factory import gguf_file, sized_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import DamageError, OutputError, QuantkitError, ResumeError, SourceError
from quantkit.base.folders import Folder
from quantkit.gguf.header import I32, STRING, U16, U32, U64, header_bytes, kv, pad, read_header
from quantkit.gguf.shards import Limits, groups
from quantkit.gguf.split import OutputFile, open_set, plan_merge, plan_split
from quantkit.gguf.split_writer import check_output, write


def split(source: Path, prefix: Path, limits: Limits) -> list[Path]:
    files = plan_split(open_set(source), prefix, limits)
    return make(source, files)


def merge(first: Path, out: Path, compat: bool = False) -> Path:
    return make(first, (plan_merge(open_set(first), out, compat),))[0]


def make(source: Path, files: Sequence[OutputFile], force: bool = False) -> list[Path]:
    found = open_set(source)
    check_output(found, files, force)
    write(found, files, force=force)
    for file in files:
        assert file.path.stat().st_size == file.nbytes
    return [file.path for file in files]


def sentence(call: Callable[[], object], error: type[QuantkitError]) -> str:
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error
    return str(e.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_tool(tools: Tools, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(tools.gguf_split), *map(str, args)], capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- against llama-gguf-split


#: sums exactly at the limit of 1,000,000, or a block above it; sizes that need padding; a tensor above the limit
SIZES = (500_000, 500_000, 1_000_000, 32, 999_968, 1, 2_500_000, 999_937, 64, 999_905, 33, 700_000, 300_001, 5, 5, 5)


@pytest.mark.tools
@pytest.mark.parametrize("no_tensor_first", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((("--max-tensors", n), ("--split-max-tensors", n)) for n in ("1", "2", "3", "7", "15", "16", "128")),
        *((("--max-size", n), ("--split-max-size", n)) for n in ("1M", "2M", "3M", "7M", "1G")),
        ((), ()),
    ],
    ids=lambda args: "-".join(args).strip("-"),
)
def test_shards_and_merged_files_equal_the_tools(
    tools: Tools, quantkit: Run, tmp_path: Path, ours: tuple[str, ...], theirs: tuple[str, ...], no_tensor_first: bool
) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", SIZES)
    extra = ("--no-tensor-first-split",) if no_tensor_first else ()
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    assert run_tool(tools, "--split", *theirs, *extra, whole, tmp_path / "theirs" / "m.v1").returncode == 0
    done = quantkit("split", whole, tmp_path / "ours" / "m.v1", *ours, *extra)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")

    first = next((tmp_path / "theirs").glob("m.v1-00001-of-*.gguf"))
    assert merge(first, tmp_path / "back.gguf").read_bytes() == whole.read_bytes()
    assert run_tool(tools, "--merge", first, tmp_path / "tool.gguf").returncode == 0
    done = quantkit("merge", first, tmp_path / "compat.gguf", "--gguf-split-compat")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "compat.gguf").read_bytes() == (tmp_path / "tool.gguf").read_bytes()


@pytest.mark.tools
def test_a_converted_model(tools: Tools, tiny_bf16: Path, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    assert run_tool(tools, "--split-max-size", "2M", tiny_bf16, tmp_path / "theirs" / "m").returncode == 0
    shards = split(tiny_bf16, tmp_path / "ours" / "m", Limits(max_bytes=2_000_000))
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert len(shards) > 2
    assert merge(shards[0], tmp_path / "back.gguf").read_bytes() == tiny_bf16.read_bytes()


@pytest.mark.tools
def test_shards_of_llama_quantize_keep_their_key_order_in_compat(tools: Tools, tmp_path: Path) -> None:
    """llama-quantize and the converter write no, count, tensors.count; the tool moves count to the end."""
    whole = sized_gguf(tmp_path / "whole.gguf", [64, 32])
    for no in (0, 1):
        keys = [kv("split.no", U16, no), kv("split.count", U16, 2), kv("split.tensors.count", I32, 2)]
        info = open_set(whole).tensors[no].info
        data = whole.read_bytes()[info.offset : info.offset + info.nbytes]
        path = tmp_path / f"m-{no + 1:05d}-of-00002.gguf"
        gguf_file(path, {info.name: (info.shape, info.type, data)}, [*(KVS if no == 0 else []), *keys])
    first = tmp_path / "m-00001-of-00002.gguf"
    assert run_tool(tools, "--merge", first, tmp_path / "tool.gguf").returncode == 0
    assert merge(first, tmp_path / "compat.gguf", True).read_bytes() == (tmp_path / "tool.gguf").read_bytes()
    assert merge(first, tmp_path / "back.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.tools
def test_a_file_that_the_tool_merged(tools: Tools, tmp_path: Path) -> None:
    """It still has the split keys, with split.count 0. The tool splits it, but does not merge it again."""
    whole = sized_gguf(tmp_path / "whole.gguf", SIZES[4:])
    first = split(whole, tmp_path / "m", Limits(3))[0]
    merged = tmp_path / "merged.gguf"
    assert run_tool(tools, "--merge", first, merged).returncode == 0
    assert merge(merged, tmp_path / "clean.gguf").read_bytes() == whole.read_bytes()

    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    assert run_tool(tools, "--split-max-tensors", "4", merged, tmp_path / "theirs" / "n").returncode == 0
    shards = split(merged, tmp_path / "ours" / "n", Limits(4))
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert merge(shards[0], tmp_path / "again.gguf", True).read_bytes() == merged.read_bytes()
    assert merge(shards[0], tmp_path / "before.gguf").read_bytes() == whole.read_bytes()
    assert open_set(merged).notes == (
        "it has split.no, split.tensors.count, split.count, as llama-gguf-split --merge leaves them; `quantkit merge` "
        "writes them with --gguf-split-compat only",
    )


@pytest.mark.tools
def test_a_file_without_tensors(tools: Tools, tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [])
    for name, extra in (("one", ()), ("two", ("--no-tensor-first-split",))):
        (tmp_path / name).mkdir()
        assert run_tool(tools, *extra, whole, tmp_path / name / "m").returncode == 0
        (tmp_path / f"our-{name}").mkdir()
        shards = split(whole, tmp_path / f"our-{name}" / "m", Limits(no_tensor_first=bool(extra)))
        assert contents(tmp_path / f"our-{name}") == contents(tmp_path / name)
        assert merge(shards[0], tmp_path / f"{name}.gguf").read_bytes() == whole.read_bytes()


# ---------------------------------------------------------------- where the tool is wrong


@pytest.mark.tools
@pytest.mark.parametrize("no_tensor_first", [False, True])
def test_a_first_tensor_above_the_limit(tools: Tools, tmp_path: Path, no_tensor_first: bool) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [1_500_000, 10, 999_968, 1])
    extra = ["--no-tensor-first-split"] if no_tensor_first else []
    done = run_tool(tools, "--split-max-size", "1M", *extra, whole, tmp_path / "theirs")
    assert done.returncode == 1
    assert "one of splits have 0 tensors" in done.stderr
    shards = split(whole, tmp_path / "m", Limits(max_bytes=1_000_000, no_tensor_first=no_tensor_first))
    assert [len(read_header(p).tensors) for p in shards] == [*([0] if no_tensor_first else []), 1, 2, 1]
    assert merge(shards[0], tmp_path / "back.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.tools
def test_a_truncated_shard_which_the_tool_merges(tools: Tools, tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [4096] * 4)
    shards = split(whole, tmp_path / "m", Limits(2))
    os.truncate(shards[1], shards[1].stat().st_size - 1000)
    assert run_tool(tools, "--merge", shards[0], tmp_path / "tool.gguf").returncode == 0
    assert sentence(lambda: merge(shards[0], tmp_path / "x.gguf"), DamageError) == (
        f"{shards[1]}: shard 2 of 2 is truncated: by its header it has 8,384 bytes, found are 7,384, 1,000 less; "
        "get it again"
    )


@pytest.mark.tools
def test_one_shard_of_a_set_is_the_whole_model(tools: Tools, tmp_path: Path) -> None:
    """The tool splits only that shard."""
    whole = sized_gguf(tmp_path / "whole.gguf", SIZES)
    first = split(whole, tmp_path / "m", Limits(5))[0]
    (tmp_path / "again").mkdir()
    (tmp_path / "direct").mkdir()
    split(first, tmp_path / "again" / "n", Limits(max_bytes=2_000_000))
    assert run_tool(tools, "--split-max-size", "2M", whole, tmp_path / "direct" / "n").returncode == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "direct")


@pytest.mark.tools
@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment(tools: Tools, tmp_path: Path, alignment: int) -> None:
    """The tool copies the key but lays out all shards at 32, so its first shard is unreadable (64, 4096). quantkit lays
    out the first shard, which has the key, by the key, and the others by 32, as they are read."""
    from gguf import GGUFReader

    kvs = [*KVS, kv("general.alignment", U32, alignment)]
    rng = np.random.default_rng(3)
    data = {f"t{i}": rng.bytes(n) for i, n in enumerate((40, 5000, 100, 33, 64))}
    infos, blobs, at = [], b"", 0
    for name, raw in data.items():
        infos.append((name, (len(raw),), "I8", at))
        blobs += raw.ljust(pad(len(raw), alignment), b"\0")
        at += pad(len(raw), alignment)
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(header_bytes(kvs, infos, alignment) + blobs)
    shards = split(whole, tmp_path / "m", Limits(2))
    for path in shards:
        for t in GGUFReader(path).tensors:
            assert t.data.tobytes() == data[t.name]
        assert run_tool(tools, "--dry-run", path, tmp_path / "x").returncode == 0  # gguf.cpp reads it
    assert merge(shards[0], tmp_path / "back.gguf").read_bytes() == whole.read_bytes()


# ---------------------------------------------------------------- any sizes, any limits

_limits = st.builds(Limits, st.integers(1, 12), st.none() | st.integers(1, 1500), st.booleans())
#: in memory if possible: hundreds of files are synced to disk
_quick = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 700), max_size=14), _limits, _limits)
def test_splitting_splitting_anew_and_merging(sizes: list[int], first: Limits, second: Limits) -> None:
    with tempfile.TemporaryDirectory(dir=_quick) as name:
        folder = Path(name)
        whole = sized_gguf(folder / "whole.gguf", sizes)
        for sub in ("a", "b", "c"):
            (folder / sub).mkdir()
        shards = split(whole, folder / "a" / "m", first)
        assert merge(shards[0], folder / "back.gguf").read_bytes() == whole.read_bytes()
        anew = split(shards[0], folder / "b" / "n", second)
        split(whole, folder / "c" / "n", second)
        assert contents(folder / "b") == contents(folder / "c")
        assert merge(anew[0], folder / "back2.gguf").read_bytes() == whole.read_bytes()
        assert open_set(whole).notes == ()


@given(st.lists(st.integers(1, 700), max_size=30), _limits)
def test_groups(sizes: list[int], limits: Limits) -> None:
    """Every tensor occurs once and in order; no shard could be left out or joined to the one before."""
    cut = groups(sizes, limits)
    if limits.no_tensor_first:
        assert cut.pop(0) == (0, 0)
    assert [i for start, stop in cut for i in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in cut) or not sizes
    if limits.max_bytes is None:
        assert all(stop - start == limits.max_tensors for start, stop in cut[:-1])
        assert cut[-1][1] - cut[-1][0] <= limits.max_tensors
        return
    held = [sum(pad(n) for n in sizes[start:stop]) for start, stop in cut]
    assert all(n <= limits.max_bytes or stop - start == 1 for n, (start, stop) in zip(held, cut, strict=True))
    assert all(n + pad(sizes[stop]) > limits.max_bytes for n, (_, stop) in zip(held, cut[:-1], strict=False))


def test_more_shards_than_can_be_numbered(tmp_path: Path) -> None:
    infos = [(f"t{i}", (32,), "I8", 32 * i) for i in range(65_536)]
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(header_bytes(KVS, infos) + bytes(32 * len(infos)))
    found = open_set(whole)
    assert sentence(lambda: plan_split(found, tmp_path / "m", Limits(1)), OutputError) == (
        f"{tmp_path / 'm'}: these limits make 65,536 shards, more than 65,535; raise the limit"
    )


# ---------------------------------------------------------------- what the shards cannot keep


def test_notes_say_what_merging_will_not_give_back(tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [40, 50, 60])
    raw = whole.read_bytes()
    at = open_set(whole).tensors[0].info.offset
    layout = (
        "its data is not as llama.cpp lays it out: in the order of the header, padded with zeros, nothing between or "
        "after",
    )
    changed = {
        "padding": raw[: at + 45] + b"x" + raw[at + 46 :],
        "last padding": raw[:-1] + b"x",
        "no last padding": raw[:-4],
        "longer": raw + bytes(64),
        "followed": raw + b"x" * 64,
    }
    for name, data in changed.items():
        path = tmp_path / "changed.gguf"
        path.write_bytes(data)
        assert open_set(path).notes == layout, name
        shards = split(path, tmp_path / name, Limits(2))
        assert merge(shards[0], tmp_path / f"{name}.gguf").read_bytes() == raw  # the same tensors, laid out well


def test_notes_on_the_header(tmp_path: Path) -> None:
    path = sized_gguf(tmp_path / "m.gguf", [64])
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + struct.pack("<I", 2) + raw[8:])
    assert open_set(path).notes == ("it is GGUF version 2, what is written is version 3",)
    # [64, 1] in two dimensions, as gguf-py writes it
    name = struct.pack("<Q", 1) + b"t"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<I2QIQ", 2, 64, 1, 24, 0)
    path.write_bytes(head.ljust(pad(len(head)), b"\0") + bytes(64))
    assert open_set(path).notes == (
        "its header is not as llama.cpp writes it: it states trailing dimensions of 1, or is padded with something "
        "else than zeros",
    )


# ---------------------------------------------------------------- shards that are refused


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Four shards of two tensors each."""
    whole = sized_gguf(tmp_path / "whole.gguf", [100, 200, 300, 400, 500, 600, 700, 800])
    return split(whole, tmp_path / "m", Limits(2))


def refused(shards: Sequence[Path], error: type[QuantkitError] = DamageError) -> str:
    """The error message for a set, without the folder; a refused set leaves nothing behind."""
    out = shards[0].with_name("out.gguf")
    before = set(out.parent.iterdir())
    said = sentence(lambda: merge(shards[0], out), error)
    assert said == sentence(lambda: split(shards[0], out, Limits(3)), error)
    assert set(out.parent.iterdir()) == before
    return said.replace(f"{out.parent}{os.sep}", "")


@pytest.mark.parametrize("no", [0, 1, 3])
def test_truncated(shards: list[Path], no: int) -> None:
    size = shards[no].stat().st_size
    lost = 100  # more than the last tensor's padding
    os.truncate(shards[no], size - lost)
    assert refused(shards) == (
        f"{shards[no].name}: shard {no + 1} of 4 is truncated: by its header it has {size:,} bytes, found are "
        f"{size - lost:,}, {lost} less; get it again"
    )


@pytest.mark.parametrize("kept", [0, 3, 20, 100])
def test_truncated_inside_the_header(shards: list[Path], kept: int) -> None:
    os.truncate(shards[2], kept)
    assert refused(shards).startswith(
        f"{shards[2].name}: is truncated: the file ends at {kept}, inside its header, which needs "
    )


def test_too_long(shards: list[Path]) -> None:
    size = shards[1].stat().st_size
    with shards[1].open("ab") as f:
        f.write(b"x")
    assert refused(shards) == (
        f"{shards[1].name}: shard 2 of 4 is too long: by its header it has {size:,} bytes, found are {size + 1:,}, "
        "1 more; get it again"
    )


def test_missing(shards: list[Path]) -> None:
    shards[2].unlink()
    says = f"{shards[2].name}: shard 3 of 4 is missing; get it and put it beside the first"
    assert refused(shards, SourceError) == says


def test_swapped(shards: list[Path]) -> None:
    aside = shards[1].with_name("aside")
    shards[1].rename(aside)
    shards[2].rename(shards[1])
    aside.rename(shards[2])
    assert refused(shards) == (
        f"{shards[1].name}: its name says shard 2 of 4 (split.no 1), but its split keys say split.no 2, "
        "split.tensors.count 8, split.count 4; it is another shard under this name: get the right one"
    )


def test_not_the_first(shards: list[Path]) -> None:
    says = f"{shards[1].name}: this is shard 2 of 4; give the first, {shards[0].name}"
    assert refused(shards[1:], SourceError) == says


def test_the_first_under_another_name(shards: list[Path]) -> None:
    other = shards[0].rename(shards[0].with_name("first.gguf"))
    assert refused([other], SourceError) == (
        "first.gguf: is the first of 4 shards, but not named …-00001-of-00004.gguf; give it and the others their names "
        "back"
    )


def test_a_shard_of_a_model_with_another_number_of_tensors(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = sized_gguf(tmp_path / "other.gguf", [100, 200, 300, 400, 500, 600, 700])
    split(other, tmp_path / "other" / "m", Limits(2))[1].replace(shards[1])
    assert refused(shards) == (
        f"{shards[1].name}: is of another set: it says the model has 7 tensors, the first shard says 8; get the shards "
        "of one build"
    )


def test_a_shard_of_the_same_model_cut_elsewhere(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sizes = [10, 20, 30_000, 40, 50, 60, 70, 30_000]
    other = split(sized_gguf(tmp_path / "other.gguf", sizes), tmp_path / "other" / "m", Limits(max_bytes=30_000))
    assert len(other) == 4
    other[2].replace(shards[2])  # tensors 3 to 6, where 4 and 5 should be
    assert refused(shards) == (
        f"{shards[2].name}: 'blk.3.t' is also in {shards[1].name}: shards 2 and 3 are not of one set; get the shards "
        "of one build"
    )


def test_a_tensor_too_few(shards: list[Path]) -> None:
    header = read_header(shards[3])
    gguf_file(shards[3], {"blk.6.t": ((700,), "I8", bytes(700))}, list(header.kvs))
    assert refused(shards) == (
        f"{shards[0].name}: split.tensors.count says 8 tensors, its 4 shards hold 7; get the shards of one build"
    )


def test_a_later_shard_with_another_architecture(shards: list[Path]) -> None:
    """Its keys are ignored, but an architecture that contradicts the first shard's reveals it."""
    found = open_set(shards[0])
    kvs = [*read_header(shards[1]).kvs, kv("general.architecture", STRING, "qwen2")]
    stored = {t.info.name: t.info for t in found.tensors if t.file == 1}
    raw = shards[1].read_bytes()
    data = {n: (i.shape, i.type, raw[i.offset : i.offset + i.nbytes]) for n, i in stored.items()}
    gguf_file(shards[1], data, kvs)
    assert refused(shards) == (
        f"{shards[1].name}: is of another set: its general.architecture is 'qwen2', not 'llama' as in the first shard; "
        "get the shards of one build"
    )
    gguf_file(shards[1], data, [*kvs[:-1], kv("general.architecture", STRING, "llama")])
    out, whole = (shards[0].with_name(f"{n}.gguf") for n in ("out", "whole"))
    assert merge(shards[0], out).read_bytes() == whole.read_bytes()


def test_not_a_gguf(shards: list[Path]) -> None:
    shards[1].write_bytes(bytes(1000))
    assert refused(shards, SourceError).startswith(f"{shards[1].name}: not a usable GGUF file: it begins with ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "p.gguf"
    os.mkfifo(pipe)
    assert sentence(lambda: open_set(pipe), SourceError) == f"{pipe}: is not a regular file"


def test_a_file_that_was_never_split(tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [10])
    assert sentence(lambda: merge(whole, tmp_path / "x.gguf"), SourceError) == (
        f"{whole}: is one whole file, not a shard: there is nothing to merge"
    )


def test_a_truncated_single_file(tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [1000])
    size = whole.stat().st_size
    os.truncate(whole, size - 500)
    assert sentence(lambda: split(whole, tmp_path / "m", Limits()), DamageError) == (
        f"{whole}: is truncated: by its header it has {size:,} bytes, found are {size - 500:,}, 500 less; get it again"
    )


def test_split_keys_of_other_types(tmp_path: Path) -> None:
    path = sized_gguf(tmp_path / "m-00001-of-00002.gguf", [10], [*KVS, kv("split.count", STRING, "2")])
    assert sentence(lambda: open_set(path), SourceError) == f"{path}: split.count is of type str, not an integer"
    path = sized_gguf(path, [10], [*KVS, kv("split.count", U64, 1 << 40)])
    assert sentence(lambda: open_set(path), SourceError) == (
        f"{path}: split.count says 1,099,511,627,776 shards, more than 65,535; get it again"
    )


# ---------------------------------------------------------------- the place to write


def test_outputs_that_are_refused(shards: list[Path], tmp_path: Path) -> None:
    first, taken = shards[0], tmp_path / "taken.gguf"
    taken.write_bytes(b"mine")
    inside = "is one of the files read and would be overwritten; choose another name"
    hard, soft = tmp_path / "hard.gguf", tmp_path / "soft.gguf"
    os.link(shards[3], hard)
    soft.symlink_to(shards[2])
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[Path, bool, str]] = [
        (taken, False, "exists; choose another name, or replace it with --force"),
        (shards[1], True, inside),
        (hard, True, inside),
        (soft, True, inside),
        (
            tmp_path,
            True,
            f"is a directory; give the name of the file to make, such as {tmp_path / 'model.gguf'}",
        ),
        (tmp_path / "pipe", True, "is not a regular file and will not be replaced; choose another name"),
        (tmp_path / "no" / "x", False, f"there is no directory {tmp_path / 'no'}; create it first"),
    ]
    before = {p: p.lstat().st_size for p in tmp_path.iterdir()}
    for out, force, says in cases:
        check = partial(check_output, open_set(first), (plan_merge(open_set(first), out),), force)
        assert sentence(check, OutputError) == f"{out}: {says}"
    assert {p: p.lstat().st_size for p in tmp_path.iterdir()} == before
    make(first, (plan_merge(open_set(first), taken),), force=True)
    assert taken.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_too_little_space(quantkit: Run, tmp_path: Path) -> None:
    """A sparse file of 10 TB, which itself takes no space."""
    infos = [("t", (10**13,), "I8", 0)]
    whole, header = tmp_path / "whole.gguf", header_bytes(KVS, infos)
    with whole.open("wb") as f:
        f.write(header)
        try:
            f.truncate(len(header) + 10**13)
        except OSError:
            pytest.skip("no sparse file of this size here")
    done = quantkit("split", whole, tmp_path / "m")
    assert done.returncode == 7
    assert done.stderr.startswith(f"error: {tmp_path}: the output needs 10,000,000,000,")
    assert list(tmp_path.iterdir()) == [whole]


# ---------------------------------------------------------------- interrupted


class Stop(BaseException):
    """Stands for the exception that the command line's signal handlers raise, in the same places."""


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_stopped_while_copying(shards: list[Path], tmp_path: Path, at: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "n-00001-of-00008.gguf").write_bytes(b"old")
    found = open_set(shards[0])
    files = plan_split(found, tmp_path / "out" / "n", Limits(1))
    left = at

    def progress(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop

    with pytest.raises(Stop):
        write(found, files, progress)
    assert contents(tmp_path / "out") == {"n-00001-of-00008.gguf": b"old"}


@pytest.mark.parametrize("blocked", [0, 1, 7])
def test_a_name_that_cannot_be_taken(shards: list[Path], tmp_path: Path, blocked: int) -> None:
    """A folder of that name appears during the run: no file gets its name, and the old ones are unchanged."""
    out = tmp_path / "out"
    out.mkdir()
    found = open_set(shards[0])
    files = plan_split(found, out / "n", Limits(1))
    for file in (files[0], files[3], files[7]):
        file.path.write_bytes(b"old " + file.path.name.encode())
    names = {f.path.name for f in (files[0], files[3], files[7])}
    path = files[blocked].path
    old = contents(out)

    def progress(_: int) -> None:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            path.mkdir()
            (path / "x").write_bytes(b"x")

    says = sentence(lambda: write(found, files, progress, force=True), OutputError)
    assert says == f"{path}: is a directory; give the name of the file to make"
    want = {n: v for n, v in old.items() if n != path.name} | {f"{path.name}/x": b"x"}
    assert contents(out) == want
    assert names - {path.name} == {p.name for p in out.iterdir() if p.is_file()}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(7))
def test_stopped_while_the_files_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    """An interrupt just before or after any rename: three old files are set aside, then four new ones get their
    names."""
    found = open_set(sized_gguf(tmp_path / "whole.gguf", [100, 200, 300, 400]))
    out = tmp_path / "out"
    out.mkdir()
    files = plan_split(found, out / "n", Limits(1))
    for file in files[:3]:
        file.path.write_bytes(b"old " + file.path.name.encode())
    old, rename, left = contents(out), Folder.rename, at + 1

    def stop(a: Folder, name: str, b: Folder, new: str, replace: bool = True) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise Stop
        rename(a, name, b, new, replace)
        # new and old files together never have all the names
        kinds = {data[:4] for name, data in contents(out).items() if "/" not in name}
        assert len(kinds) <= 1 or not (out / files[0].path.name).exists()
        if left == 0:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "rename", stop)
        with pytest.raises(Stop):
            write(found, files, force=True)
    assert contents(out) == old
    assert sorted(p.name for p in out.iterdir()) == sorted(old)


def test_a_name_that_is_taken_meanwhile(shards: list[Path], tmp_path: Path) -> None:
    """Without --force nothing is replaced, even if the name was free at first."""
    (tmp_path / "out").mkdir()
    found = open_set(shards[0])
    files = plan_split(found, tmp_path / "out" / "n", Limits(1))
    taken = files[5].path

    def progress(_: int) -> None:
        taken.write_bytes(b"mine")

    says = sentence(lambda: write(found, files, progress), OutputError)
    assert says == f"{taken}: exists; choose another name, or replace it with --force"
    assert contents(tmp_path / "out") == {taken.name: b"mine"}


def test_a_source_that_changes_meanwhile(shards: list[Path], tmp_path: Path) -> None:
    found = open_set(shards[0])
    plan = plan_merge(found, tmp_path / "x.gguf")

    def progress(_: int) -> None:
        os.utime(shards[0], ns=(1, 1))

    assert sentence(lambda: write(found, (plan,), progress), SourceError) == (
        f"{shards[0]}: has changed since its header was read; try again when it is complete"
    )
    assert not (tmp_path / "x.gguf").exists()


_DRIVER = """
import os, sys
import tqdm
from quantkit.base import copying
from quantkit.cli import main

copying.CHUNK = 1 << 16
left, number = int(sys.argv[1]), int(sys.argv[2])
update = tqdm.tqdm.update

def stop(bar, n=1):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
    return update(bar, n)

tqdm.tqdm.update = stop
sys.argv[1:] = sys.argv[3:]
main()
"""


@pytest.mark.parametrize("command", ["split", "merge"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped(tmp_path: Path, command: str, number: signal.Signals) -> None:
    """A real process, stopped at a given copied piece. kill -9 leaves files, but none that looks complete."""
    whole = sized_gguf(tmp_path / "whole.gguf", [1_000_000] * 4)
    first = split(whole, tmp_path / "m", Limits(1))[0]
    out = tmp_path / "out"
    out.mkdir()
    args = ["split", whole, out / "n", "--max-tensors=2"] if command == "split" else ["merge", first, out / "n.gguf"]
    driver = [sys.executable, "-c", _DRIVER, "40", str(int(number)), *map(str, args)]
    done = subprocess.run(driver, cwd=tmp_path, capture_output=True, text=True, check=False)
    left = contents(out)
    if number != signal.SIGKILL:
        assert done.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], done.stderr
        assert left == {}
        assert list(out.iterdir()) == []
        return
    assert done.returncode == -signal.SIGKILL
    assert left
    for name, data in left.items():
        assert name.startswith(".quantkit-shards-")
        assert name.endswith((".part", "/journal"))
        complete = len(data) > 4 and data[:4] == b"GGUF"
        assert not complete or (command == "split" and "-00001-of-00002" in name)
    again = subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, args)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr  # the remains are not in the way
    assert [name for name in contents(out) if "/" in name] == []


def killed(cwd: Path, at: int, *args: str | Path) -> None:
    """Run a command that kills itself at a copied piece of 64 KiB."""
    driver = [sys.executable, "-c", _DRIVER, str(at), str(int(signal.SIGKILL)), *map(str, args)]
    done = subprocess.run(driver, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def copied(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """The bytes copied by each method, from a command's --json."""
    assert done.returncode == 0, done.stderr
    said: dict[str, int] = json.loads(done.stdout)["copied"]
    return said


def test_a_killed_split_is_gone_on_with(quantkit: Run, tmp_path: Path) -> None:
    """It keeps the files that were whole and recorded. The third was being written, the second may not be recorded
    yet."""
    whole = sized_gguf(tmp_path / "whole.gguf", [1_000_000] * 4)
    (out := tmp_path / "out").mkdir()
    (right := tmp_path / "right").mkdir()
    args = ("--max-tensors=1", "--json")
    assert "kept from before" not in copied(quantkit("split", whole, right / "n", *args))
    killed(tmp_path, 40, "split", whole, out / "n", "--max-tensors=1")
    (hidden,) = out.iterdir()
    made = {path.name: path.stat().st_ino for path in hidden.glob("*.part")}
    how = copied(quantkit("split", whole, out / "n", *args))
    n_kept = how["kept from before"] // 1_000_000
    assert n_kept >= 1
    assert sum(how.values()) == 4_000_000
    assert contents(out) == contents(right)
    first = [out / f"n-0000{i}-of-00004.gguf" for i in range(1, n_kept + 1)]
    assert [path.stat().st_ino for path in first] == [made[f"{path.name}.part"] for path in first]


@pytest.mark.parametrize("how", ["another source", "touched", "a journal cut short", "a file cut short"])
def test_what_a_killed_split_left_is_not_used_for_anything_else(quantkit: Run, tmp_path: Path, how: str) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [1_000_000] * 4)
    (out := tmp_path / "out").mkdir()
    killed(tmp_path, 60, "split", whole, out / "n", "--max-tensors=1")
    (hidden,) = out.iterdir()
    if how == "another source":
        whole = sized_gguf(tmp_path / "other.gguf", [1_000_001] * 4)
    elif how == "touched":
        os.utime(whole, ns=(1, 1))
    elif how == "a journal cut short":
        os.truncate(hidden / "journal", 100)
    else:
        for path in hidden.glob("*.part"):
            os.truncate(path, path.stat().st_size - 1)
    assert "kept from before" not in copied(quantkit("split", whole, out / "n", "--max-tensors=1", "--json"))
    (right := tmp_path / "right").mkdir()
    quantkit("split", whole, right / "n", "--max-tensors=1")
    assert contents(out) == contents(right)


def test_two_splits_to_the_same_names_at_once(tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [100, 200])
    (out := tmp_path / "out").mkdir()
    found = open_set(whole)
    files = plan_split(found, out / "n", Limits(1))
    said: list[str] = []

    def progress(_: int) -> None:
        said.append(sentence(lambda: write(found, files), ResumeError))

    write(found, files, progress)
    assert set(said) == {f"{files[0].path}: another quantkit is writing it; wait for it"}
    assert sorted(p.name for p in out.iterdir()) == [f.path.name for f in files]


_AT_RENAME = """
import os, sys
from quantkit.base.folders import Folder
from quantkit.cli import main

left = int(sys.argv.pop(1))
rename = Folder.rename

def stop(self, name, to, new, replace=True):
    global left
    left -= not name.startswith(".")  # not the journal's
    if left == 0:
        os.kill(os.getpid(), 9)
    rename(self, name, to, new, replace)

Folder.rename = stop
main()
"""


@pytest.mark.parametrize(
    ("at", "same"), [(1, True), (2, False), (3, True), (4, False), (5, True), (5, False), (6, True), (6, False)]
)
def test_killed_while_the_files_get_their_names(quantkit: Run, tmp_path: Path, at: int, same: bool) -> None:
    """Killed at every rename: two old files set aside, three new ones named, the end. The next run undoes what was
    begun, so a run that then fails leaves the original files, and one that succeeds makes the right ones."""
    whole = sized_gguf(tmp_path / "whole.gguf", [1000, 2000, 3000])
    (out := tmp_path / "out").mkdir()
    names = [f"n-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    old = {name: b"old " + name.encode() for name in names[:2]}
    for name, data in old.items():
        (out / name).write_bytes(data)
    args = ("split", whole, out / "n", "--max-tensors=1", "--force", "-q")
    done = subprocess.run(
        [sys.executable, "-c", _AT_RENAME, str(at), *map(str, args)], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    (hidden,) = [p for p in out.iterdir() if p.is_dir()]
    if not same:
        other = open_set(sized_gguf(tmp_path / "other.gguf", [1000, 2000, 3001]))

        def stop(_: int) -> None:
            raise Stop

        with pytest.raises(Stop):
            write(other, plan_split(other, out / "n", Limits(1)), stop, force=True)
        assert contents(out) == old
    again = quantkit(*args)
    assert (again.returncode, again.stderr) == (0, "")
    assert not hidden.exists()
    (right := tmp_path / "right").mkdir()
    assert quantkit("split", whole, right / "n", "--max-tensors=1", "-q").returncode == 0
    assert contents(out) == contents(right)


def test_killed_while_what_was_replaced_is_removed(quantkit: Run, tmp_path: Path) -> None:
    """The files have their names; the next run finds that the old ones were set aside for good."""
    whole = sized_gguf(tmp_path / "whole.gguf", [1000, 2000])
    (out := tmp_path / "out").mkdir()
    (out / "n-00001-of-00002.gguf").write_bytes(b"old")
    args = ("split", whole, out / "n", "--max-tensors=1", "--force", "-q")
    killer = _AT_RENAME.replace(
        "os.kill(os.getpid(), 9)", "rename(self, name, to, new, replace); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killer, "4", *map(str, args)], cwd=tmp_path, check=False)
    (hidden,) = [p for p in out.iterdir() if p.is_dir()]
    assert sorted(p.name for p in hidden.iterdir()) == ["done", "journal"]
    right = {name: data for name, data in contents(out).items() if "/" not in name}
    assert len(right) == 2
    for _ in range(2):
        done = quantkit(*args)
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(out) == right


def test_old_files_whose_names_are_taken_are_not_lost(quantkit: Run, tmp_path: Path) -> None:
    whole = sized_gguf(tmp_path / "whole.gguf", [1000, 2000])
    (out := tmp_path / "out").mkdir()
    first = out / "n-00001-of-00002.gguf"
    first.write_bytes(b"old")
    args = ("split", whole, out / "n", "--max-tensors=1", "--force", "-q")
    subprocess.run([sys.executable, "-c", _AT_RENAME, "2", *map(str, args)], cwd=tmp_path, check=False)
    (hidden,) = out.iterdir()
    first.write_bytes(b"a third")
    for _ in range(2):
        done = quantkit(*args)
        assert (done.returncode, done.stderr) == (
            7,
            f"error: {hidden / 'replaced'}: holds {first.name}, which an earlier run was about to replace, and another "
            "file has its name; move one of the two away\n",
        )
        assert (first.read_bytes(), (hidden / "replaced" / first.name).read_bytes()) == (b"a third", b"old")
    first.unlink()
    done = quantkit(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in sorted(out.iterdir())] == [first.name, "n-00002-of-00002.gguf"]


# ---------------------------------------------------------------- memory, and the command line


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """One tensor of 300 MB, far above the memory that a process needs otherwise."""
    whole, header = tmp_path / "whole.gguf", header_bytes(KVS, [("t", (300_000_000,), "I8", 0)])
    with whole.open("wb") as f:
        f.write(header)
        f.truncate(len(header) + 300_000_000)
    code = (
        "import sys; from quantkit.cli import cli; cli.main(sys.argv[1:], standalone_mode=False)\n"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
    )
    for args in (["split", whole, tmp_path / "m"], ["merge", tmp_path / "m-00001-of-00001.gguf", tmp_path / "x.gguf"]):
        command = [sys.executable, "-c", code, *map(str, args), "-q"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert int(done.stdout) < 64 * 1024


def test_what_is_said(quantkit: Run, tmp_path: Path) -> None:
    sized_gguf(tmp_path / "w.gguf", [3000, 1000, 2000])
    shards = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    dry = quantkit("split", "w.gguf", "m", "--max-size", "3.04K", "--dry-run", cwd=tmp_path)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.gguf"]
    done = quantkit("split", "w.gguf", "m", "--max-size", "3.04K", cwd=tmp_path)
    lines = [f"{p.name}  {p.stat().st_size:,} bytes, {len(read_header(p).tensors)} tensors" for p in shards]
    lines = [line.replace(" 1 tensors", " 1 tensor") for line in lines]
    assert dry.stdout.splitlines() == [*lines, "dry run: everything was checked, nothing was written"]
    assert done.stdout.splitlines()[:-1] == lines
    assert re.match(r"\d\.\d\d KiB in ", done.stdout.splitlines()[-1])
    done = quantkit("merge", shards[0].name, "back.gguf", "--json", "-q", cwd=tmp_path)
    found = json.loads(done.stdout)
    size = (tmp_path / "w.gguf").stat().st_size
    assert found["files"] == [{"path": "back.gguf", "bytes": size, "tensors": 3}]
    assert (found["bytes"], found["tensors"], found["notes"], found["written"]) == (size, 3, [], True)
    assert sum(found["copied"].values()) == 3000 + 1000 + 24 + 2000  # including the padding between the last two
    done = quantkit("merge", shards[0].name, "back.gguf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr == "error: back.gguf: exists; choose another name, or replace it with --force\n"
    assert quantkit("merge", shards[0].name, "back.gguf", "--force", "-q", cwd=tmp_path).returncode == 0


def test_a_damaged_shard_ends_with_its_own_code(quantkit: Run, tmp_path: Path) -> None:
    shards = split(sized_gguf(tmp_path / "w.gguf", [1000, 2000]), tmp_path / "m", Limits(1))
    os.truncate(shards[1], 500)
    done = quantkit("merge", shards[0], tmp_path / "x.gguf")
    assert done.returncode == 12
    assert done.stderr.startswith(f"error: {shards[1]}: shard 2 of 2 is truncated: ")


def test_a_note_before_splitting(quantkit: Run, tmp_path: Path) -> None:
    path = sized_gguf(tmp_path / "w.gguf", [64])
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + struct.pack("<I", 2) + raw[8:])
    done = quantkit("split", path, tmp_path / "m", "--dry-run")
    assert done.returncode == 0
    assert done.stderr == (
        f"note: merging these shards will not give {path} back byte for byte:\n"
        "  it is GGUF version 2, what is written is version 3\n"
    )


@pytest.mark.parametrize("prefix", ["out/", ".", ".."])
def test_a_prefix_that_is_no_name(quantkit: Run, tmp_path: Path, prefix: str) -> None:
    sized_gguf(tmp_path / "w.gguf", [64])
    done = quantkit("split", "w.gguf", prefix, cwd=tmp_path)
    assert done.returncode == 7
    assert "give a prefix for the names, such as " in done.stderr


def test_two_limits(quantkit: Run) -> None:
    done = quantkit("split", "w.gguf", "m", "--max-size", "1M", "--max-tensors", "2")
    assert done.returncode == 2
    assert done.stderr.endswith("Error: give --max-size or --max-tensors, not both\n")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("50G", 50 * 10**9), ("1.5M", 1_500_000), ("2t", 2 * 10**12), ("4000", 4000), ("0.001K", 1), ("1.0", 1),
     ("50GB", 50 * 10**9), ("50 GB", 50 * 10**9), ("50gb", 50 * 10**9), ("50g", 50 * 10**9), (" 50G ", 50 * 10**9),
     ("50GiB", 50 * 2**30), ("50 gib", 50 * 2**30), ("50Gi", 50 * 2**30), ("1.1GiB", 1_181_116_006), ("2KiB", 2048),
     ("3 MiB", 3 * 2**20), ("1.5T", 1_500_000_000_000), ("1.5TB", 1_500_000_000_000), ("1.5TiB", 3 * 2**39),
     ("1.000000000001T", 10**12 + 1), ("4000B", 4000), ("4000 b", 4000), ("7kB", 7000)],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    from quantkit.cli.options import Size

    assert Size().convert(text, None, None) == nbytes

"""Sound GGUFs that quantkit would not write: version 2, other alignments, types of ik_llama.cpp, names in capitals; and
shards joined by cat, which are not sound."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checking import check
from conftest import Run, Tools
from small_builds import OPTIONS, build, plan_of

from quantkit.authoring.clone import clone
from quantkit.base.errors import SourceError, UnsupportedError
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.gguf.header import KV, STRING, U32, header_bytes, kv, pad, read_header
from quantkit.gguf.types import IK_TYPES, STORED_TYPES
from quantkit.model.open import open_model
from quantkit.model.sources.gguf_file import open_gguf
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load

Stored = list[tuple[str, tuple[int, ...], str, bytes]]


def contents(path: Path) -> tuple[list[KV], Stored]:
    h, raw = read_header(path), path.read_bytes()
    return list(h.kvs), [(t.name, t.shape, t.type, raw[t.offset : t.offset + t.nbytes]) for t in h.tensors]


def write(path: Path, kvs: list[KV], tensors: Stored, alignment: int = 32, version: int = 3) -> Path:
    infos, blobs, at = [], [], 0
    for name, shape, type_, data in tensors:
        infos.append((name, shape, type_, at))
        blobs.append(data.ljust(pad(len(data), alignment), b"\0"))
        at += len(blobs[-1])
    header = bytearray(header_bytes(kvs, infos, alignment))
    struct.pack_into("<I", header, 4, version)
    path.write_bytes(bytes(header) + b"".join(blobs))
    return path


@pytest.fixture(scope="module")
def bf16(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(plan_of(tiny_v3, load("BF16"), None), tmp_path_factory.mktemp("bf16") / "bf16.gguf")


def quantized(source: Path, out: Path, tools: Tools | None = None, shards: int | None = None) -> bytes:
    """Make Q4_K_M of a GGUF, by quantkit's kernels or by llama-quantize."""
    plan = make_plan(open_model(str(source)), load("Q4_K_M"))
    return build(plan, out, None, shards, LlamaQuantizeEngine(tools.quantize) if tools else None).read_bytes()


def stock(tools: Tools, source: Path, out: Path) -> bytes:
    done = subprocess.run([str(tools.quantize), str(source), str(out), "Q4_K_M"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out.read_bytes()


# ---------------------------------------------------------------- version 2


@pytest.mark.tools
def test_version_2(tools: Tools, bf16: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "v2.gguf", *contents(bf16), version=2)
    verdict = check(path, sample=None)
    assert verdict.ok
    assert verdict.notes == ["v2.gguf is of GGUF version 2, as llama.cpp wrote it in 2023; it reads as version 3 does"]
    expected = stock(tools, path, tmp_path / "theirs.gguf")
    assert quantized(path, tmp_path / "ours.gguf") == expected
    assert struct.unpack_from("<I", expected, 4) == (3,)


# ---------------------------------------------------------------- alignment


@pytest.mark.tools
@pytest.mark.parametrize("alignment", [8, 64, 128, 4096])
def test_another_alignment(tools: Tools, bf16: Path, tmp_path: Path, alignment: int) -> None:
    """The build equals llama-quantize's file of the same tensors without that key."""
    kvs, tensors = contents(bf16)
    path = write(tmp_path / "a.gguf", [*kvs, kv("general.alignment", U32, alignment)], tensors, alignment)
    assert check(path, sample=None).ok
    model = open_model(str(path))
    assert model.notes == (
        f"general.alignment is {alignment}; what is built from this has the usual 32, without that key",
    )
    assert [t.name for t in model.tensors] == [t.name for t in open_model(str(bf16)).tensors]
    assert clone(model, "a.gguf", "a").proof.n_tensors == len(tensors)
    expected = stock(tools, bf16, tmp_path / "theirs.gguf")
    assert quantized(path, tmp_path / "ours.gguf") == expected
    assert quantized(path, tmp_path / "driven.gguf", tools) == expected
    assert check(tmp_path / "ours.gguf", make_plan(model, load("Q4_K_M")), sample=None).ok


# ---------------------------------------------------------------- types of ik_llama.cpp


def with_ik_types(bf16: Path, path: Path, names: list[str]) -> Path:
    """Replace some tensors by tensors of these types, with random bytes."""
    kvs, tensors = contents(bf16)
    rng, left = np.random.default_rng(5), list(names)
    for i, (name, shape, _, _) in enumerate(tensors):
        if left and len(shape) > 1 and shape[0] % 256 == 0:
            qt = IK_TYPES[left.pop()]
            n_rows = int(np.prod(shape[1:]))
            tensors[i] = (name, shape, qt.name, rng.bytes(qt.row_bytes(shape[0]) * n_rows))
    assert len(left) < len(names)
    return write(path, kvs, tensors)


@pytest.mark.parametrize("some", [list(IK_TYPES)[:24], list(IK_TYPES)[24:]])
def test_types_of_ik_llama_cpp(quantkit: Run, bf16: Path, tmp_path: Path, some: list[str]) -> None:
    path = with_ik_types(bf16, tmp_path / "ik.gguf", some)
    verdict = check(path, sample=None)
    assert verdict.ok, verdict.text(9)
    (note,) = verdict.notes
    assert note.endswith(", types that only ik_llama.cpp has, no more than place and size was checked")
    assert check(path, sample=None, hashing=True).ok
    shown = quantkit("inspect", path)
    assert shown.returncode == 0
    assert "types that only ik_llama.cpp has" in shown.stdout
    assert quantkit("split", path, tmp_path / "s", "--max-size", "1M", "-q").returncode == 0
    first = next(tmp_path.glob("s-00001-*"))
    assert quantkit("merge", first, tmp_path / "merged.gguf", "-q").returncode == 0
    assert (tmp_path / "merged.gguf").read_bytes() == path.read_bytes()


def test_nothing_is_built_from_types_of_ik_llama_cpp(quantkit: Run, bf16: Path, tmp_path: Path) -> None:
    kvs, tensors = contents(bf16)
    name, shape = "blk.1.ffn_up_exps.weight", (256, 256, 4)
    data = bytes(STORED_TYPES["IQ4_KS"].row_bytes(256) * 1024)
    path = write(
        tmp_path / "ik.gguf", kvs, [(n, s, "IQ4_KS", data) if n == name else (n, s, t, d) for n, s, t, d in tensors]
    )
    assert (tensors[[n for n, *_ in tensors].index(name)][1], len(data)) == (shape, 1024 * (136 + 4))
    refused = quantkit("build", path, "-o", tmp_path / "o.gguf", "--recipe", "Q4_K_M", "--allow-requantize")
    assert (refused.returncode, refused.stderr) == (
        5,
        f"error: Tiny V3: '{name}' is IQ4_KS, a type that only ik_llama.cpp can read; build from the original model\n",
    )
    cloned = quantkit("recipe", "from-gguf", path)
    assert (cloned.returncode, cloned.stderr) == (
        5,
        f"error: {path}: is quantized to types that only ik_llama.cpp has (IQ4_KS in 1 tensor), which no recipe can "
        "ask for; `quantkit inspect --all` lists them, to write a recipe with types of similar size by hand\n",
    )
    assert quantkit("fit", path, "--vram", "24").returncode == 0


def test_a_type_of_another_size_than_known(quantkit: Run, bf16: Path, tmp_path: Path) -> None:
    """IQ4_KT once had four more bytes per block. Such a file is not damaged, and a split does not truncate it."""
    kvs, tensors = contents(bf16)
    name = "blk.1.ffn_up_exps.weight"
    at = [n for n, *_ in tensors].index(name)
    path = tmp_path / "ik.gguf"
    write(path, kvs, tensors)
    blob = bytearray(path.read_bytes())
    entry = blob.index(name.encode()) + len(name) + 4 + 3 * 8
    assert struct.unpack_from("<I", blob, entry) == (STORED_TYPES["BF16"].id,)
    struct.pack_into("<I", blob, entry, IK_TYPES["IQ4_KT"].id)
    path.write_bytes(blob)
    assert check(path, sample=None).ok
    n = len(tensors[at][3]) - IK_TYPES["IQ4_KT"].row_bytes(256) * 1024
    said = quantkit("split", path, tmp_path / "s", "--max-size", "1M")
    assert (said.returncode, said.stderr) == (
        5,
        f"error: {path}: {n:,} bytes follow '{name}' (IQ4_KT), which may be its own: types of ik_llama.cpp have had "
        "other sizes over time; use ik_llama.cpp's own llama-gguf-split\n",
    )


# ---------------------------------------------------------------- shards


@pytest.fixture
def shards(quantkit: Run, bf16: Path, tmp_path: Path) -> list[Path]:
    assert quantkit("split", bf16, tmp_path / "m", "--max-size", "2500K", "-q").returncode == 0
    return sorted(tmp_path.glob("m-*.gguf"))


def test_shards_joined_by_cat(quantkit: Run, shards: list[Path], tmp_path: Path) -> None:
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(p.read_bytes() for p in shards))
    starts = [sum(p.stat().st_size for p in shards[:i]) for i in range(len(shards))]
    assert len(shards) == 3
    shown = ", ".join(f"{at:,}" for at in starts)
    sentence = (
        f"error: {joined}: is 3 of 3 shards one behind the other in one file, as `cat` joins them, which no program "
        f"can use; download the shards again, or cut the file where they begin (bytes {shown}) and name the pieces "
        "MODEL-00001-of-00003.gguf and so on; `quantkit merge` then makes one file of them\n"
    )
    for args in (
        ("inspect", joined),
        ("recipe", "from-gguf", joined),
        ("split", joined, tmp_path / "x"),
        ("merge", joined, tmp_path / "x.gguf"),
        ("build", joined, "-o", tmp_path / "x.gguf", "--recipe", "Q8_0"),
    ):
        said = quantkit(*args)
        assert (said.returncode, said.stderr) == (4, sentence), args
    # also under the first one's name
    joined.replace(shards[0])
    with pytest.raises(SourceError, match="as `cat` joins them"):
        open_gguf(shards[0])
    verified = quantkit("verify", shards[0], "-q")
    assert verified.returncode == 12
    assert (
        ": bytes behind the last tensor, where another GGUF begins: several files were joined into one, as by cat"
        in (verified.stdout)
    )


def test_cut_where_the_sentence_says_the_shards_are_whole_again(shards: list[Path]) -> None:
    raws = [p.read_bytes() for p in shards]
    joined = b"".join(raws)
    shards[0].write_bytes(joined)
    with pytest.raises(SourceError) as e:
        open_gguf(shards[0])
    numbers = str(e.value).partition("(bytes ")[2].partition(")")[0].split(", ")
    starts = [int(n.replace(",", "")) for n in numbers]
    assert [joined[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] == raws


@pytest.mark.parametrize("spelled", [str.upper, lambda name: name.replace(".gguf", ".GGUF")], ids=["all", "ending"])
def test_names_in_capitals(quantkit: Run, shards: list[Path], bf16: Path, tmp_path: Path, spelled: object) -> None:
    assert callable(spelled)
    renamed = [p.rename(p.with_name(spelled(p.name))) for p in shards]
    assert open_model(str(renamed[0])).tensors == open_model(str(bf16)).tensors
    assert quantkit("merge", renamed[0], tmp_path / "whole.gguf", "-q").returncode == 0
    assert (tmp_path / "whole.gguf").read_bytes() == bf16.read_bytes()
    verdict = check(renamed[1], sample=None)
    assert verdict.ok, verdict.text(9)
    assert verdict.notes == [
        f"{renamed[0].name}: llama.cpp finds the shards of a model only by names in small letters, …-of-00002.gguf; "
        "rename them, or make one file of them with `quantkit merge`"
    ]


@pytest.mark.tools
def test_a_build_from_shards_in_capitals(tools: Tools, shards: list[Path], bf16: Path, tmp_path: Path) -> None:
    renamed = [p.rename(p.with_name(p.name.upper())) for p in shards]
    expected = stock(tools, bf16, tmp_path / "theirs.gguf")
    assert quantized(renamed[0], tmp_path / "ours.gguf") == expected
    assert quantized(renamed[0], tmp_path / "driven.gguf", tools) == expected


def test_only_some_names_in_capitals(shards: list[Path], bf16: Path) -> None:
    shards[1].rename(shards[1].with_name(shards[1].name.upper()))
    assert open_model(str(shards[0])).tensors == open_model(str(bf16)).tensors


# ---------------------------------------------------------------- not read


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (b"\0\0\0\3", "is a big-endian GGUF, which is not read here; verify it after gguf_convert_endian.py of "
         "llama.cpp's gguf-py has made it little-endian"),
        (b"\1\0\0\0", "is a GGUF of version 1, of August 2023, which is not read here"),
    ],
)  # fmt: skip
def test_verify_does_not_call_damaged_what_it_does_not_read(
    bf16: Path, tmp_path: Path, version: bytes, says: str
) -> None:
    path = Path(shutil.copy(bf16, tmp_path / "x.gguf"))
    blob = bytearray(path.read_bytes())
    blob[4:8] = version
    path.write_bytes(blob)
    with pytest.raises(UnsupportedError) as e:
        check(path, sample=None)
    assert str(e.value) == f"{path}: {says}"
    with pytest.raises(UnsupportedError):
        open_model(str(path), OPTIONS)


def test_the_general_type_of_a_model_stays(bf16: Path) -> None:
    assert kv("general.type", STRING, "model") in read_header(bf16).kvs

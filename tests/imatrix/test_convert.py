"""Importance matrices converted between formats: llama-quantize makes identical files from both; lossless results equal
llama-imatrix's files; and losses are reported."""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Tools
from factory import gguf_file, legacy_imatrix
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrices import F32, llama_imatrix, values

from quantkit import imatrix
from quantkit.base.errors import ImatrixError
from quantkit.cli import cli
from quantkit.gguf.header import STRING, U32, kv, kv_array
from quantkit.imatrix.entries import Sums
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.imatrix.write import Facts, write_gguf

UNKNOWN = (
    "a .dat says neither how many tokens its chunks have nor how many each expert saw: 512 a chunk are taken "
    "(--chunk-size), and all experts of a tensor have one count"
)


def same_values(a: Imatrix, b: Imatrix) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        values(a, name).tobytes() == values(b, name).tobytes() for name in a.entries
    )


@pytest.mark.tools
@pytest.mark.parametrize("type_", ["IQ2_XXS", "Q2_K"])
def test_llama_quantize_makes_the_same_file_of_both(
    real_imatrices: dict[str, Path], imatrix_tool: Path, tools: Tools, tiny_bf16: Path, tmp_path: Path, type_: str
) -> None:
    def quantized(with_: Path) -> bytes:
        """Quantize with a matrix at a fixed path, since the path goes into the metadata."""
        shutil.copy(with_, tmp_path / "imatrix")
        out = tmp_path / "out.gguf"
        command = [str(tools.quantize), "--imatrix", "imatrix", "--output-tensor-type", "q6_K"]
        command += ["--token-embedding-type", "q4_K", str(tiny_bf16), str(out), type_, "2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        return out.read_bytes()

    for name in ("a", "short"):
        own = real_imatrices[name]
        wanted = quantized(own)
        imatrix.convert(own, tmp_path / "x.dat", force=True)
        assert quantized(tmp_path / "x.dat") == wanted
        imatrix.convert(tmp_path / "x.dat", tmp_path / "back.gguf", force=True)
        assert quantized(tmp_path / "back.gguf") == wanted
        imatrix.convert(own, tmp_path / "same.gguf", force=True)
        assert (tmp_path / "same.gguf").read_bytes() == own.read_bytes()
    # other values make another file, and the values of llama-imatrix's own .dat are different
    assert quantized(real_imatrices["b"]) != quantized(real_imatrices["a"])
    ctx = "64"
    theirs = llama_imatrix(
        imatrix_tool,
        tiny_bf16,
        tmp_path / "t.dat",
        "--in-file",
        real_imatrices["a"],
        "--output-format",
        "dat",
        "-c",
        ctx,
    )
    assert not same_values(open_imatrix(str(theirs)), open_imatrix(str(real_imatrices["a"])))


@pytest.mark.tools
def test_a_dat_of_llama_imatrix_becomes_the_gguf_that_it_makes_of_it(
    real_imatrices: dict[str, Path], imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path
) -> None:
    own: list[str | Path] = ["--in-file", real_imatrices["a"], "--output-format", "dat", "-c", "64"]
    dat = llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "a.dat", *own)
    theirs = llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "theirs.gguf", "--in-file", dat, "-c", "64")
    notes = imatrix.convert(dat, tmp_path / "ours.gguf", chunk_size=64)
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()
    assert notes == (
        "a .dat says neither how many tokens its chunks have nor how many each expert saw: 64 a chunk are taken, and "
        "all experts of a tensor have one count",
    )
    imatrix.convert(dat, tmp_path / "again.dat")
    assert (tmp_path / "again.dat").read_bytes() == dat.read_bytes()


@pytest.mark.tools
def test_a_dat_s_dense_entries_are_llama_imatrix_s(
    real_imatrices: dict[str, Path], imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path
) -> None:
    own: list[str | Path] = ["--in-file", real_imatrices["a"], "--output-format", "dat", "-c", "64"]
    theirs = open_imatrix(str(llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "a.dat", *own)))
    imatrix.convert(real_imatrices["a"], tmp_path / "ours.dat")
    ours = imatrix.read(tmp_path / "ours.dat")
    assert (ours.datasets, ours.n_chunks) == (theirs.datasets, theirs.n_chunks)
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in ours.entries.items():
        if "_exps" in name:
            assert entry.counts[0] in (4.0, 8.0), name  # a power of two beside 5 or 6
        else:
            assert entry.counts == theirs.entries[name].counts == (6.0,)
        np.testing.assert_array_max_ulp(values(ours, name), values(theirs, name), 1)


# ---------------------------------------------------------------- what is lost, and said


def full(path: Path) -> Path:
    """A GGUF with everything that a .dat cannot hold."""
    name, exps = "blk.0.w", "blk.0.ffn_up_exps.weight"
    f4 = (4,), "F32", np.ones(4, F32).tobytes()
    tensors = {
        # a quarter of the floats between 4/3 and 2 change when multiplied and divided by 3
        f"{exps}.in_sum2": ((40, 2), "F32", np.outer([1, 1536], np.linspace(1.4, 1.99, 40)).astype(F32).tobytes()),
        f"{exps}.counts": ((1, 2), "F32", np.array([1, 1536], F32).tobytes()),
        f"{name}.in_sum2": f4, f"{name}.counts": ((1,), "F32", np.array([1536], F32).tobytes()), f"{name}.in_sum": f4,
        f"{name}.stats": f4, "stranger": f4,
    }  # fmt: skip
    kvs = [
        kv("general.type", STRING, "imatrix"), kv_array("imatrix.datasets", STRING, ["a", "b", "c", "d", "e"]),
        kv("imatrix.chunk_count", U32, 3), kv("imatrix.chunk_size", U32, 512),
    ]  # fmt: skip
    return gguf_file(path, tensors, kvs)


def test_what_a_dat_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = full(tmp_path / "x.gguf"), tmp_path / "x.dat"
    cli.main(["imatrix", "convert", str(path), "-o", str(out)], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == f"{out}: {out.stat().st_size} bytes, 2 entries, 3 chunks\n"
    assert [line for line in said.err.splitlines() if line.startswith("note: ")] == [
        "note: a .dat has no counts of experts: those of 1 entry are lost",
        "note: a .dat has neither in_sum nor statistics: those of 1 entry are lost",
        "note: a .dat names one dataset: a, b, c and 1 more are lost, e is kept",
        "note: 1 entry got other calls than llama-imatrix would write, a power of two, for whose division gives the "
        "quantizer the same values as before",
        "note: left out, since no importance matrix has it: stranger",
    ]
    assert same_values(open_imatrix(str(path)), open_imatrix(str(out)))
    cli.main(["imatrix", "convert", str(path), "-o", str(out), "--force", "-q"], standalone_mode=False)
    assert capsys.readouterr() == ("", "")


def test_a_gguf_written_anew_loses_only_what_is_none_of_it(tmp_path: Path) -> None:
    path = full(tmp_path / "x.gguf")
    assert imatrix.convert(path, tmp_path / "y.gguf") == ("left out, since no importance matrix has it: stranger",)
    im = imatrix.read(tmp_path / "y.gguf")
    entry = im.sums("blk.0.w")
    assert entry.in_sum is not None
    assert entry.stats is not None
    assert im.datasets == ("a", "b", "c", "d", "e")
    assert imatrix.convert(tmp_path / "y.gguf", tmp_path / "z.gguf") == ()
    assert (tmp_path / "z.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_a_chunk_size_for_which_the_division_would_round(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = legacy_imatrix(tmp_path / "x.dat", {"w": (7, rng.lognormal(0, 1, 1000).astype(F32))})
    notes = imatrix.convert(path, tmp_path / "x.gguf", chunk_size=300)
    im = imatrix.read(tmp_path / "x.gguf")
    assert (im.chunk_size, im.entries["w"].counts) == (300, (7 * 256,))
    assert same_values(im, imatrix.read(path))
    assert notes[1] == (
        "1 entry got fewer tokens than 300 a chunk, for whose division gives the quantizer the same values as before"
    )


@pytest.mark.parametrize("calls", [0, -3, 1, 2**24 + 1, 2**31 - 1])
def test_odd_calls(tmp_path: Path, calls: int) -> None:
    path = legacy_imatrix(tmp_path / "x.dat", {"w": (calls, np.array([0, 1, 2.5, 1e30, 1e-30], F32))})
    imatrix.convert(path, tmp_path / "x.gguf")
    imatrix.convert(tmp_path / "x.gguf", tmp_path / "y.dat")
    one = imatrix.read(path)
    assert same_values(one, imatrix.read(tmp_path / "x.gguf"))
    assert same_values(one, imatrix.read(tmp_path / "y.dat"))


def test_an_entry_that_saw_nothing_stays(tmp_path: Path) -> None:
    """llama-imatrix leaves it out of a .dat; llama-quantize then has no weights, where a GGUF gives it ones."""
    write_gguf(tmp_path / "x.gguf", Facts((), 0, 512), [Sums("w", np.zeros((2, 3), F32), np.zeros(2))])
    imatrix.convert(tmp_path / "x.gguf", tmp_path / "x.dat")
    assert values(imatrix.read(tmp_path / "x.dat"), "w").tolist() == [1] * 6


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0, 1, 3, 511, 512, 1000, 1536, 68749, 1 << 24]), min_size=2, max_size=2),
            st.lists(st.floats(0, 2**100, width=32), min_size=6, max_size=6),
        ),
        min_size=1, max_size=4,
    ),
    st.sampled_from([1, 64, 300, 512]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, given_: list[tuple[list[int], list[float]]], chunk_size: int
) -> None:
    folder = tmp_path_factory.mktemp("x")
    entries = [Sums(f"w{i}", np.reshape(v, (2, 3)).astype(F32), np.array(c, float)) for i, (c, v) in enumerate(given_)]
    paths = [folder / name for name in ("a.gguf", "b.dat", "c.gguf", "d.dat", "e.dat")]
    write_gguf(paths[0], Facts(("t",), 5, chunk_size), entries)
    for source, target in pairwise(paths):
        size = chunk_size if target.suffix == ".gguf" else None
        imatrix.convert(source, target, chunk_size=size)
    opened = [imatrix.read(path) for path in paths]
    for other in opened[1:]:
        assert same_values(opened[0], other)
        assert (other.datasets, other.n_chunks) == (("t",), 5)
    assert paths[3].read_bytes() == paths[4].read_bytes()
    # no conversion but the first loses anything
    assert opened[2].chunk_size == chunk_size


# ---------------------------------------------------------------- what is refused


def refusal(path: Path, out: Path, chunk_size: int | None = None) -> str:
    before = sorted(os.listdir(out.parent))
    with pytest.raises(ImatrixError) as e:
        imatrix.convert(path, out, chunk_size=chunk_size)
    assert sorted(os.listdir(out.parent)) == before
    return str(e.value)


def test_a_chunk_size_for_what_has_one(tmp_path: Path) -> None:
    path, out = full(tmp_path / "x.gguf"), tmp_path / "y"
    says = f"{path}: --chunk-size 64 is for a GGUF made of a .dat, which does not say it; leave it out"
    assert refusal(path, out.with_suffix(".dat"), 64) == says
    assert refusal(path, out.with_suffix(".gguf"), 64) == says


def test_a_name_too_long_for_a_gguf(tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "x.dat", {"w" * 60: (1, np.ones(2))})
    assert refusal(path, tmp_path / "x.gguf") == (
        f"entry '{'w' * 60}': the name has 60 bytes, and a GGUF has at most 55 for it; write a .dat"
    )


def test_an_in_sum_of_another_size(tmp_path: Path) -> None:
    kvs = [
        kv("general.type", STRING, "imatrix"), kv_array("imatrix.datasets", STRING, []),
        kv("imatrix.chunk_count", U32, 1), kv("imatrix.chunk_size", U32, 512),
    ]  # fmt: skip
    four = (4,), "F32", bytes(16)
    path = gguf_file(
        tmp_path / "x.gguf",
        {"w.in_sum2": four, "w.counts": ((1,), "F32", bytes(4)), "w.in_sum": ((2,), "F32", bytes(8))},
        kvs,
    )
    assert refusal(path, tmp_path / "y.gguf") == (
        f"{path}: entry 'w' has 2 values in in_sum for 4 in in_sum2; compute the imatrix again"
    )


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_an_in_sum_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, Facts((), 1, 1), [Sums("w", np.ones((1, 2), F32), np.ones(1), -np.ones((1, 2), F32))])
    at = open_imatrix(str(path)).entries["w"].sum_offset
    raw = bytearray(path.read_bytes())
    assert at is not None
    raw[at + 4 : at + 8] = np.array([bad], F32).tobytes()
    path.write_bytes(raw)
    assert refusal(path, tmp_path / "y.gguf") == (
        f"{path}: entry 'w' holds {bad} at 1 of 2 in in_sum; sums must be finite: compute the imatrix again"
    )


def test_chunks_below_zero_say_nothing(tmp_path: Path) -> None:
    """llama-quantize does not write them into the metadata either."""
    path = legacy_imatrix(tmp_path / "x.dat", {"w": (1, np.ones(2))}, chunks=-5)
    for name in ("x.gguf", "y.dat"):
        imatrix.convert(path, tmp_path / name)
        assert imatrix.read(tmp_path / name).n_chunks == 0

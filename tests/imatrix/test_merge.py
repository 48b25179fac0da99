"""Importance matrices added up: the bytes of llama-imatrix's own merge, without a model; entries that cannot be added
are reported, and files that do not belong together are refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import legacy_imatrix
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrices import F32, llama_imatrix, values

from quantkit import imatrix
from quantkit.base.errors import ImatrixError, OutputError
from quantkit.gguf.header import STRING, U32, kv, kv_array
from quantkit.imatrix.entries import Sums
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.imatrix.write import Facts, write_gguf

FACTS = Facts(("t",), 1, 512)


def made(path: Path, entries: dict[str, tuple[Any, Any]], facts: Facts = FACTS, **more: Any) -> Path:
    """A GGUF: name -> (in_sum2 [n_mats, n_cols], counts); `more` are further arrays of every entry."""
    write_gguf(path, facts, [Sums(n, np.array(s, F32), np.array(c, float), **more) for n, (s, c) in entries.items()])
    return path


def refusal(folder: Path, paths: Sequence[Path], **more: Any) -> str:
    before = sorted(folder.iterdir())
    with pytest.raises(ImatrixError) as e:
        imatrix.merge(paths, folder / "out.gguf", **more)
    assert sorted(folder.iterdir()) == before
    return str(e.value)


# ---------------------------------------------------------------- as llama-imatrix


@pytest.mark.tools
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("a", "short"), ("short", "b")], ids="+".join)
def test_two_files_give_the_bytes_of_llama_imatrix(
    real_imatrices: dict[str, Path], imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    ctx = "32" if names[0] == "short" else "64"
    given_ = [real_imatrices[name] for name in names]
    ins = [word for path in given_ for word in ("--in-file", path)]
    theirs = llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "theirs.gguf", *ins, "-c", ctx)
    notes = imatrix.merge(given_, tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()
    sizes = "64, 32" if names[0] == "a" else "32, 64"
    assert notes == (
        (f"the files have chunks of {sizes} tokens; those of the result have {ctx} (--chunk-size)",)
        if "short" in names
        else ()
    )


@pytest.mark.tools
@pytest.mark.parametrize("dat_first", [False, True])
def test_a_dat_among_them_counts_as_for_llama_imatrix(
    real_imatrices: dict[str, Path], imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path, dat_first: bool
) -> None:
    dat = llama_imatrix(
        imatrix_tool,
        tiny_bf16,
        tmp_path / "b.dat",
        "--in-file",
        real_imatrices["b"],
        "--output-format",
        "dat",
        "-c",
        "64",
    )
    given_ = [dat, real_imatrices["a"]] if dat_first else [real_imatrices["a"], dat]
    ins = [word for path in given_ for word in ("--in-file", path)]
    theirs = llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "theirs.gguf", *ins, "-c", "64")
    notes = imatrix.merge(given_, tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()
    assert notes == (
        f"{dat} is a .dat, which says neither how many tokens its chunks have nor how many each expert saw: 64 a chunk "
        "are taken (--chunk-size), for every expert",
    )


@pytest.mark.tools
def test_three_files_are_those_of_llama_imatrix_but_for_last_bits(
    real_imatrices: dict[str, Path], imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path
) -> None:
    ins = [word for path in real_imatrices.values() for word in ("--in-file", path)]
    path = llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "theirs.gguf", *ins, "-c", "64")
    imatrix.merge(list(real_imatrices.values()), tmp_path / "ours.gguf")
    theirs, ours = open_imatrix(str(path)), open_imatrix(str(tmp_path / "ours.gguf"))
    assert ours.contents._replace(entries={}) == theirs.contents._replace(entries={})
    assert ours.n_chunks == 6 + 4 + 3 * 32 // 64
    assert len(ours.datasets) == 3
    for name in theirs.entries:
        a, b = ours.sums(name), theirs.sums(name)
        assert a.counts.tolist() == b.counts.tolist()
        # llama-imatrix rounds twice
        np.testing.assert_array_max_ulp(np.asarray(a.in_sum2, F32), np.asarray(b.in_sum2, F32), 1)


# ---------------------------------------------------------------- what is added


def test_sums_and_counts_add(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"w": ([[1, 2], [0, 0]], [3, 0]), "v": ([[5.0]], [2])}, Facts(("a.txt",), 2, 256))
    b = made(tmp_path / "b", {"w": ([[10, 20], [7, 9]], [1, 4]), "u": ([[6.0]], [1024])}, Facts(("b.txt",), 4, 256))
    notes = imatrix.merge([a, b], tmp_path / "c.gguf")
    im = imatrix.read(tmp_path / "c.gguf")
    got = {name: (im.sums(name).in_sum2.tolist(), im.sums(name).counts.tolist()) for name in im.entries}
    assert got == {
        "u": ([[6]], [1024]), "v": ([[5]], [2]), "w": ([[11, 22], [7, 9]], [4, 4])
    }  # fmt: skip
    # the chunks of the entry that saw most, not the sum of both
    assert (im.datasets, im.n_chunks, im.chunk_size) == (("a.txt", "b.txt"), 4, 256)
    assert notes == ("2 of 3 entries are not in all files",)
    assert im.weights("w", 1, 2).tolist() == [7 / 4, 9 / 4]


def test_in_sum_stays_where_all_files_have_it(tmp_path: Path) -> None:
    in_sum, stats = np.array([[-1.0, 4.0]], F32), np.zeros(12, F32)
    a = made(tmp_path / "a", {"w": ([[1, 2]], [1]), "v": ([[1, 2]], [1])}, in_sum=in_sum, stats=stats)
    b = made(tmp_path / "b", {"w": ([[1, 2]], [1])}, in_sum=in_sum)
    c = made(tmp_path / "c", {"w": ([[1, 2]], [1])})
    notes = imatrix.merge([a, b], tmp_path / "ab.gguf")
    im = imatrix.read(tmp_path / "ab.gguf")
    got = {name: None if im.sums(name).in_sum is None else im.sums(name).in_sum.tolist() for name in im.entries}  # type: ignore[union-attr]
    assert got == {"v": [[-1, 4]], "w": [[-2, 8]]}
    lost = "llama-imatrix's statistics are left out: they cannot be added up, and no quantizer reads them"
    assert notes == ("1 of 2 entries are not in all files", lost)
    notes = imatrix.merge([a, b, c], tmp_path / "abc.gguf")
    im = imatrix.read(tmp_path / "abc.gguf")
    assert {name: e.sum_offset is not None for name, e in im.entries.items()} == {"v": True, "w": False}
    assert notes[1] == "in_sum is left out of 1 entry, which not all files have it of"


def test_one_count_is_every_expert_s(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"w": ([[1, 2], [3, 4]], [5, 0])})
    b = made(tmp_path / "b", {"w": ([[10, 20, 30, 40]], [7])})
    for order in ([a, b], [b, a]):
        imatrix.merge(order, tmp_path / "c.gguf", force=True)
        got = imatrix.read(tmp_path / "c.gguf").sums("w")
        # an expert without a count has no sums
        assert (got.in_sum2.tolist(), got.counts.tolist()) == ([[11, 22], [30, 40]], [12, 7])


def test_keys_that_all_have_alike_stay(tmp_path: Path) -> None:
    layers = kv("imatrix.n_layer_nextn", U32, 1)
    schema = kv_array("imatrix.stats_schema", STRING, ["mean"])
    a = made(tmp_path / "a", {"w": ([[1]], [1])}, Facts((), 1, 512, (layers, schema, kv("x", U32, 1))))
    b = made(tmp_path / "b", {"w": ([[1]], [1])}, Facts((), 1, 512, (kv("x", U32, 2),)))
    imatrix.merge([a, b], tmp_path / "c.gguf")
    assert [item.key for item in imatrix.read(tmp_path / "c.gguf").contents.kvs][4:] == ["imatrix.n_layer_nextn"]


def test_only_dats(tmp_path: Path) -> None:
    a = legacy_imatrix(tmp_path / "a.dat", {"w": (3, np.array([1, 2], F32))})
    b = legacy_imatrix(tmp_path / "b.dat", {"w": (1, np.array([4, 4], F32))})
    for size, told in ((None, 512), (100, 100)):
        imatrix.merge([a, b], tmp_path / "c.gguf", chunk_size=size, force=True)
        im = imatrix.read(tmp_path / "c.gguf")
        got = im.sums("w")
        assert (got.in_sum2.tolist(), got.counts.tolist(), im.n_chunks, im.chunk_size) == (
            [[5 * told, 6 * told]], [4 * told], 4, told
        )  # fmt: skip


def test_a_dat_may_be_the_result(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"w": ([[1, 2], [3, 4]], [5, 9])}, Facts(("x",), 1, 512))
    b = made(tmp_path / "b", {"w": ([[1, 7], [3, 4]], [2, 9])}, Facts(("y",), 1, 512))
    imatrix.merge([a, b], tmp_path / "c.gguf")
    notes = imatrix.merge([a, b], tmp_path / "c.dat")
    one, other = imatrix.read(tmp_path / "c.gguf"), imatrix.read(tmp_path / "c.dat")
    assert values(one, "w").tobytes() == values(other, "w").tobytes()
    assert other.datasets == ("y",)
    assert notes == (
        "a .dat has no counts of experts: those of 1 entry are lost", "a .dat names one dataset: x is lost, y is kept"
    )  # fmt: skip


def test_what_was_never_counted_does_no_harm(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"w": ([[1, 2], [3, 4]], [5, 1])})
    raw = bytearray(a.read_bytes())
    im = open_imatrix(str(a))
    at = im.entries["w"].offset
    raw[at + 8 : at + 16] = np.array([np.nan, np.inf], F32).tobytes()
    counts = raw.index(np.array([5, 1], F32).tobytes())
    raw[counts + 4 : counts + 8] = bytes(4)
    (tmp_path / "b").write_bytes(raw)
    imatrix.merge([a, tmp_path / "b"], tmp_path / "c.gguf")
    got = imatrix.read(tmp_path / "c.gguf").sums("w")
    assert (got.in_sum2.tolist(), got.counts.tolist()) == ([[2, 4], [3, 4]], [10, 1])


# ---------------------------------------------------------------- laws

ENTRIES = st.dictionaries(
    st.sampled_from(["blk.0.a", "blk.1.a", "b"]),
    st.tuples(
        st.lists(st.integers(0, 100_000), min_size=2, max_size=2),
        st.lists(st.floats(0, 2**60, width=32, allow_subnormal=False), min_size=6, max_size=6),
    ),
    min_size=1,
)


def of(folder: Path, name: str, entries: dict[str, tuple[list[int], list[float]]]) -> Path:
    path = folder / name
    sums = {n: (np.reshape(v, (2, 3)) * (np.array(c) > 0)[:, None], c) for n, (c, v) in entries.items()}
    return made(path, sums, Facts((name,), 3, 64))


def whole(path: Path) -> dict[str, tuple[bytes, list[float]]]:
    im = open_imatrix(str(path))
    return {n: (im.sums(n).in_sum2.tobytes(), im.sums(n).counts.tolist()) for n in im.entries}


@given(st.lists(ENTRIES, min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_order_and_grouping(
    tmp_path_factory: pytest.TempPathFactory, given_: list[dict[str, tuple[list[int], list[float]]]]
) -> None:
    folder = tmp_path_factory.mktemp("laws")
    a, b, c = (of(folder, name, entries) for name, entries in zip("abc", given_, strict=True))

    def sum_of(*paths: Path) -> Path:
        out = folder / f"{'-'.join(p.stem for p in paths)}+.gguf"
        imatrix.merge(paths, out, force=True)
        return out

    ab, ba = sum_of(a, b), sum_of(b, a)
    assert whole(ab) == whole(ba)
    assert (open_imatrix(str(ab)).datasets, open_imatrix(str(ba)).datasets) == (("a", "b"), ("b", "a"))
    left, right, at_once = (open_imatrix(str(p)) for p in (sum_of(ab, c), sum_of(a, sum_of(b, c)), sum_of(a, b, c)))
    assert left.contents.datasets == right.contents.datasets == ("a", "b", "c")
    for name in at_once.entries:
        exact = sum(
            open_imatrix(str(p)).sums(name).in_sum2.astype(float) for p in (a, b, c) if name in open_imatrix(str(p))
        )
        one: Imatrix
        # merged at once: rounded once; in two steps: within half a unit in the last place of each
        assert np.array_equal(at_once.sums(name).in_sum2, np.asarray(exact).astype(F32))
        for one in (left, right):
            np.testing.assert_allclose(one.sums(name).in_sum2, exact, rtol=2**-23)
            assert one.sums(name).counts.tolist() == at_once.sums(name).counts.tolist()


# ---------------------------------------------------------------- what is refused


def test_files_of_different_models(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"v": ([[1.0]], [1]), "w": (np.ones((4, 2)), np.ones(4))})
    b = made(tmp_path / "b", {"w": (np.ones((2, 2)), np.ones(2))})
    c = made(tmp_path / "c", {"w": (np.ones((2, 4)), np.ones(2))})
    assert refusal(tmp_path, [a, b]) == (f"{b}: entry 'w' has 4 values, and 8 in {a}; merge only files of one model")
    assert refusal(tmp_path, [a, c]) == (
        f"{c}: entry 'w' counts 2 experts, and 4 in {a}; merge only files of one model"
    )


def test_a_file_twice_or_alone(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"w": ([[1.0]], [1])})
    (tmp_path / "link").symlink_to(a)
    assert refusal(tmp_path, [a, a]) == f"{a}: is given twice; its tokens would count twice: give it once"
    assert refusal(tmp_path, [a, tmp_path / "link"]) == (
        f"{tmp_path / 'link'}: is given twice, as {a} before; its tokens would count twice: give it once"
    )
    assert refusal(tmp_path, [a]) == ("two importance matrices or more can be merged; to rewrite one, convert it")


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-2.0, "-2.0")])
def test_a_value_that_is_no_sum_of_squares(tmp_path: Path, bad: float, shown: str) -> None:
    a = made(tmp_path / "a", {"w": ([[1, 2, 3]], [1])})
    raw = bytearray(a.read_bytes())
    at = open_imatrix(str(a)).entries["w"].offset
    raw[at + 4 : at + 8] = np.array([bad], F32).tobytes()
    (tmp_path / "b").write_bytes(raw)
    assert refusal(tmp_path, [a, tmp_path / "b"]) == (
        f"{tmp_path / 'b'}: entry 'w' holds {shown} at 1 of 3 in in_sum2; sums must be finite and not negative: "
        "compute the imatrix again"
    )


def test_a_sum_that_is_too_large(tmp_path: Path) -> None:
    a, b = (made(tmp_path / name, {"w": ([[3e38]], [1])}) for name in "ab")
    assert refusal(tmp_path, [a, b]) == (
        "entry 'w': a value of in_sum2 is inf, and all must be finite and not negative in float32; nothing was written"
    )


def test_a_truncated_file(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {"w": ([[1.0]], [1])})
    b = tmp_path / "b"
    shutil.copy(a, b)
    size = b.stat().st_size
    with b.open("r+b") as f:
        f.truncate(size - 33)
    assert refusal(tmp_path, [a, b]).startswith(f"importance matrix {b}: not a usable GGUF file: the data of 'w.")


def test_an_output_of_neither_format(tmp_path: Path) -> None:
    a, b = (made(tmp_path / name, {"w": ([[1.0]], [1])}) for name in "ab")
    out = tmp_path / "c.bin"
    with pytest.raises(OutputError) as e:
        imatrix.merge([a, b], out)
    assert str(e.value) == f"{out}: must end in .gguf or .dat; or give the format: --output-format gguf"
    imatrix.merge([a, b], out, output_format="dat")
    assert imatrix.read(out).is_dat


@pytest.mark.parametrize("size", [0, -1, (1 << 24) + 1])
def test_a_chunk_size_that_is_none(tmp_path: Path, size: int) -> None:
    a, b = (made(tmp_path / name, {"w": ([[1.0]], [1])}) for name in "ab")
    says = f"chunk_size {size:,}: is not a chunk size in tokens (1 to 16,777,216)"
    assert refusal(tmp_path, [a, b], chunk_size=size) == says
    with pytest.raises(ImatrixError) as e:
        imatrix.convert(a, tmp_path / "x.gguf", chunk_size=size)
    assert str(e.value) == says

"""Writing importance matrices: the data of llama-imatrix's own files give the same bytes again, in any order and
without knowing the shapes; the gguf package reads them; a .dat gives the quantizer identical values."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import gguf_file
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrices import F32, facts_of, shapes_of, values

from quantkit.base.errors import ImatrixError, OutputError
from quantkit.gguf.header import STRING, U32, kv, kv_array
from quantkit.imatrix.entries import Sums
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.write import Facts, Shape, shape_of, write_dat, write_gguf

FACTS = Facts(("calib.txt",), 3, 512)


def sums(name: str, n_mats: int = 1, n_cols: int = 8, **more: Any) -> Sums:
    rng = np.random.default_rng([*name.encode()])
    in_sum2 = rng.lognormal(0, 3, (n_mats, n_cols)).astype(F32)
    return Sums(name, in_sum2, np.floor(rng.lognormal(6, 1, n_mats)) + 1, **more)


def with_all(name: str, n_mats: int = 1, n_cols: int = 8) -> Sums:
    rng = np.random.default_rng([*name.encode(), 1])
    stats = rng.standard_normal(12).astype(F32)
    stats[3] = np.nan
    return sums(name, n_mats, n_cols, in_sum=rng.standard_normal((n_mats, n_cols)).astype(F32), stats=stats)


def newest_file(path: Path) -> Path:
    """A file as llama-imatrix has made it since 2026, written independently: with in_sum, stats and their key."""
    schema = kv_array("imatrix.stats_schema", STRING, ["sum_sq", "mean"])
    kvs = [
        kv("general.type", STRING, "imatrix"), kv_array("imatrix.datasets", STRING, ["a b.txt", ""]),
        kv("imatrix.chunk_count", U32, 7), kv("imatrix.chunk_size", U32, 64), kv("imatrix.n_layer_nextn", U32, 1),
        schema,
    ]  # fmt: skip
    tensors: dict[str, tuple[tuple[int, ...], str, bytes]] = {}
    for entry in [
        with_all("blk.0.attn_k_b.weight", 1, 6),
        with_all("blk.0.ffn_up_exps.weight", 3),
        with_all("blk.10.w"),
    ]:
        shape = (entry.in_sum2.shape[1], entry.in_sum2.shape[0])
        assert entry.in_sum is not None
        assert entry.stats is not None
        tensors[f"{entry.name}.in_sum2"] = (shape, "F32", entry.in_sum2.tobytes())
        tensors[f"{entry.name}.counts"] = ((1, shape[1]), "F32", entry.counts.astype(F32).tobytes())
        tensors[f"{entry.name}.in_sum"] = (shape, "F32", entry.in_sum.tobytes())
        tensors[f"{entry.name}.stats"] = ((12,), "F32", entry.stats.tobytes())
    return gguf_file(path, tensors, kvs)


@pytest.mark.parametrize("known", [True, False], ids=["shapes_known", "shapes_not_known"])
@pytest.mark.parametrize("order", [1, -1])
def test_what_was_read_is_written_to_the_byte(tmp_path: Path, known: bool, order: int) -> None:
    path = newest_file(tmp_path / "a.gguf")
    im = open_imatrix(str(path))
    assert (im.n_chunks, im.chunk_size, im.contents.others) == (7, 64, ())
    out = tmp_path / "b.gguf"
    write_gguf(out, facts_of(im), map(im.sums, list(im.entries)[::order]), shapes_of(im) if known else None)
    assert out.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf"]


@pytest.mark.tools
def test_a_file_of_llama_imatrix_is_written_to_the_byte(real_imatrices: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b", "short"):
        im = open_imatrix(str(real_imatrices[name]))
        write_gguf(tmp_path / name, facts_of(im), map(im.sums, im.entries), shapes_of(im))
        assert (tmp_path / name).read_bytes() == real_imatrices[name].read_bytes()


def test_another_reader_finds_what_was_written(tmp_path: Path) -> None:
    made = [with_all("blk.1.ffn_up_exps.weight", 3), sums("blk.0.w")]
    write_gguf(tmp_path / "x.gguf", Facts(("é.txt", "b"), 4, 256), iter(made))
    reader = GGUFReader(tmp_path / "x.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix", "imatrix.datasets": ["é.txt", "b"], "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 256,
    }  # fmt: skip
    got = {t.name: (t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
    assert list(got) == [
        "blk.0.w.in_sum2", "blk.0.w.counts",
        *(f"blk.1.ffn_up_exps.weight.{kind}" for kind in ("in_sum2", "counts", "in_sum", "stats")),
    ]  # fmt: skip
    assert got["blk.1.ffn_up_exps.weight.in_sum2"] == ([8, 3], made[0].in_sum2.tobytes())
    assert got["blk.1.ffn_up_exps.weight.counts"] == ([1, 3], made[0].counts.astype(F32).tobytes())
    assert got["blk.0.w.counts"] == ([1], made[1].counts.astype(F32).tobytes())


def test_double_sums_are_rounded_once(tmp_path: Path) -> None:
    exact = np.array([[1 + 2**-24 + 2**-40, 1 + 2**-24]])  # above the midpoint of two floats, and exactly on it
    write_gguf(tmp_path / "x", FACTS, [Sums("w", exact, np.array([2.0]))])
    assert open_imatrix(str(tmp_path / "x")).sums("w").in_sum2.tolist() == [[1 + 2**-23, 1.0]]


def test_names_are_ordered_as_bytes(tmp_path: Path) -> None:
    names = ["blk.10.w", "blk.2.w", "blk.1.w", "output.weight", "blk.1.é", "blk.1.z"]
    write_gguf(tmp_path / "x", FACTS, map(sums, names))
    order = [t.name.removesuffix(".counts") for t in GGUFReader(tmp_path / "x").tensors if t.name.endswith(".counts")]
    assert order == ["blk.1.w", "blk.1.z", "blk.1.é", "blk.10.w", "blk.2.w", "output.weight"]


# ---------------------------------------------------------------- .dat


COUNTS = st.sampled_from([0.0, 1.0, 2.0, 3.0, 511.0, 512.0, 1536.0, 68749.0, 92160.0, float(2**24), float(2**30)])


@given(
    st.integers(1, 4).flatmap(
        lambda mats: st.tuples(
            st.lists(COUNTS, min_size=mats, max_size=mats),
            st.lists(st.lists(st.floats(0, 2**100, width=32), min_size=5, max_size=5), min_size=mats, max_size=mats),
        )
    ),
    st.sampled_from([1, 64, 300, 512, 4096]),
)
@settings(max_examples=150, deadline=None)
def test_the_quantizer_gets_the_same_from_a_dat(
    tmp_path_factory: pytest.TempPathFactory, given_: tuple[list[float], list[list[float]]], chunk_size: int
) -> None:
    folder = tmp_path_factory.mktemp("im")
    made = Sums("w", np.array(given_[1], F32), np.array(given_[0]))
    write_gguf(folder / "x.gguf", Facts(("t",), 1, chunk_size), [made])
    write_dat(folder / "x.dat", Facts(("t",), 1, chunk_size), [made])
    one, other = (open_imatrix(str(folder / name)) for name in ("x.gguf", "x.dat"))
    assert values(one, "w").tobytes() == values(other, "w").tobytes()


def test_a_dat_has_llama_imatrix_s_calls_where_those_divide_out(tmp_path: Path) -> None:
    dense = Sums("dense", np.array([[3, 5, 7.5]], F32), np.array([1536.0]))
    expert = Sums("expert", np.array([[1.0], [1.0]], F32), np.array([1.0, 3 * 512.0]))
    # a quarter of the floats between 4/3 and 2 change when multiplied and divided by 3
    means = np.linspace(1.4, 1.99, 40)
    rounding = Sums("rounding", np.stack([means * 1536, means * 7]).astype(F32), np.array([1536.0, 7.0]))
    n = write_dat(tmp_path / "x.dat", FACTS, [dense, expert, rounding])
    im = open_imatrix(str(tmp_path / "x.dat"))
    assert {name: e.counts for name, e in im.entries.items()} == {"dense": (3,), "expert": (3,), "rounding": (4,)}
    assert n == 1
    assert im.sums("dense").in_sum2.tolist() == [[3 / 512, 5 / 512, 7.5 / 512]]
    assert (im.n_chunks, im.datasets, im.is_dat) == (3, ("calib.txt",), True)


def test_a_dat_s_end_is_the_last_dataset(tmp_path: Path) -> None:
    write_dat(tmp_path / "x", Facts(("a", "b\udcff"), 9, 1), [sums("w")])
    assert (tmp_path / "x").read_bytes().endswith(b"\x09\0\0\0\x02\0\0\0b\xff")
    write_dat(tmp_path / "y", Facts((), 9, 1), [sums("w")])
    assert (tmp_path / "y").read_bytes().endswith(b"\x09\0\0\0\0\0\0\0")


# ---------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize("known", [True, False], ids=["shapes_known", "shapes_not_known"])
@pytest.mark.parametrize("form", [write_gguf, write_dat])
@pytest.mark.parametrize(
    ("bad", "shown"),
    [(np.nan, "nan"), (np.inf, "inf"), (1e39, "inf"), (-1.0, "-1.0")],
    ids=["nan", "inf", "big", "neg"],
)
def test_a_value_that_is_no_sum_of_squares(tmp_path: Path, form: Any, known: bool, bad: float, shown: str) -> None:
    entry = Sums("w", np.array([[1.0, bad]]), np.array([1.0]))
    with pytest.raises(ImatrixError) as e:
        form(tmp_path / "x", FACTS, [sums("a"), entry], [shape_of(sums("a")), Shape("w", 1, 2)] if known else None)
    assert str(e.value) == (
        f"entry 'w': a value of in_sum2 is {shown}, and all must be finite and not negative in float32; nothing was "
        "written"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_sum_may_be_negative_but_not_infinite(tmp_path: Path) -> None:
    low = np.array([[-1.0]], F32)
    write_gguf(tmp_path / "x", FACTS, [Sums("w", -low, np.array([1.0]), low)])
    with pytest.raises(ImatrixError) as e:
        write_gguf(tmp_path / "y", FACTS, [Sums("w", -low, np.array([1.0]), low * F32(np.inf))])
    assert str(e.value) == (
        "entry 'w': a value of in_sum is -inf, and all must be finite in float32; nothing was written"
    )


def test_a_name_that_a_gguf_cannot_have(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x", FACTS, [sums("w" * 55)])
    name = "w" * 56
    with pytest.raises(ImatrixError) as e:
        write_gguf(tmp_path / "y", FACTS, [sums(name)])
    assert str(e.value) == f"entry '{name}': the name has 56 bytes, and a GGUF has at most 55 for it; write a .dat"
    write_dat(tmp_path / "y", FACTS, [sums(name)])
    assert list(open_imatrix(str(tmp_path / "y")).entries) == [name]


def test_chunks_that_a_dat_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    with pytest.raises(ImatrixError) as e:
        write_dat(path, Facts((), 1 << 31, 1), [sums("w")])
    assert str(e.value) == f"{path}: 2,147,483,648 chunks are more than a .dat can say (2,147,483,647); write a GGUF"


@pytest.mark.parametrize("form", [write_gguf, write_dat])
def test_a_file_that_is_there_stays(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(OutputError) as e:
        form(path, FACTS, [sums("w")])
    assert str(e.value) == f"{path}: exists; choose another name, or replace it with --force"
    assert path.read_text() == "mine"
    form(path, FACTS, [sums("w")], replace=True)
    assert list(open_imatrix(str(path)).entries) == ["w"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_iterator_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def some() -> Iterator[Sums]:
        yield sums("a")
        raise KeyboardInterrupt

    for shapes in (None, [shape_of(sums("a")), shape_of(sums("b"))]):
        with pytest.raises(KeyboardInterrupt):
            write_gguf(tmp_path / "x", FACTS, some(), shapes)
        assert list(tmp_path.iterdir()) == []


def test_entries_that_are_not_those_announced(tmp_path: Path) -> None:
    a, b = sums("a"), sums("b")
    for come, says in (
        ([a], "1 entries never came, such as 'b'"),
        ([a, a], "came twice"),
        ([a, sums("b", 2)], "Shape\\(name='b', n_mats=2, .* came for Shape\\(name='b', n_mats=1"),
        ([a, b, sums("c")], "came for None"),
    ):
        with pytest.raises(ValueError, match=says):
            write_gguf(tmp_path / "x", FACTS, come, [shape_of(a), shape_of(b)])
    with pytest.raises(ValueError, match=r"^w: in_sum2 \(1, 2\), but counts \(2,\), or in_sum$"):
        write_gguf(tmp_path / "x", FACTS, [Sums("w", np.ones((1, 2), F32), np.ones(2))])
    assert list(tmp_path.iterdir()) == []


SCRIPT = """\
import resource, sys
from pathlib import Path
import numpy as np
from quantkit.base.errors import OutputError
from quantkit.imatrix.entries import Sums
from quantkit.imatrix.write import Facts, Shape, write_dat, write_gguf
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
made = [Sums(n, np.ones((1, 20_000), np.float32), np.ones(1)) for n in "ab"]
for form in (write_gguf, write_dat):
    for shapes in (None, [Shape(n, 1, 20_000) for n in "ab"]):
        try:
            form(Path(sys.argv[1]), Facts((), 1, 1), made, shapes)
        except OutputError as e:
            print(e)
"""


def test_a_file_that_grows_too_large(tmp_path: Path) -> None:
    out = tmp_path / "x"
    done = subprocess.run([sys.executable, "-c", SCRIPT, out], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    assert all(line.startswith(f"{out}: cannot be written: File too large") for line in lines), lines
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000

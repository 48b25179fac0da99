"""Reading importance matrices: both formats give the values that llama-quantize computes from them, in float32, and
every fault of a file is reported in one sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import IMATRIX_KVS as KVS
from factory import gguf_file, gguf_imatrix, legacy_imatrix
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import ImatrixError
from quantkit.gguf.header import ARRAY, I32, KV, U64, kv, kv_array
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.model import demo

F32 = np.float32


def sentence(call: Callable[[], Any]) -> str:
    with pytest.raises(ImatrixError) as e:
        call()
    assert type(e.value) is ImatrixError
    assert e.value.exit_code == 6
    return str(e.value)


def one(path: Path, sums: list[float], counts: list[float]) -> Path:
    """Write an imatrix with the single entry 'w'."""
    return gguf_imatrix(path, {"w": (np.array(sums, F32), np.array(counts, F32))})


# ---------------------------------------------------------------- values


@given(
    st.integers(1, 4).flatmap(
        lambda mats: st.tuples(
            st.lists(st.sampled_from([0.0, 1.0, 3.0, 7.0, 1e6, 0.4999, 0.5, 2.5]), min_size=mats, max_size=mats),
            st.lists(st.lists(st.floats(0, 2**66, width=32), min_size=5, max_size=5), min_size=mats, max_size=mats),
        )
    )
)
@settings(max_examples=80, deadline=None)
def test_gguf_values_are_sums_over_counts_in_float32(
    tmp_path_factory: pytest.TempPathFactory, given_: tuple[list[float], list[list[float]]]
) -> None:
    counts, sums = np.array(given_[0], F32), np.array(given_[1], F32)
    path = gguf_imatrix(tmp_path_factory.mktemp("im") / "x.gguf", {"w": (sums, counts[:, None])})
    im = open_imatrix(str(path))
    im.check()
    for mat in range(len(counts)):
        n = int(np.floor(np.float64(counts[mat]) + 0.5))  # lround
        want = sums[mat] / F32(n) if n > 0 else np.ones(5, F32)
        got = im.weights("w", mat, 5)
        assert got.dtype == F32
        assert got.tobytes() == want.astype(F32).tobytes()


def test_float32_division_is_not_float64_division(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sums = rng.lognormal(0, 4, 1000).astype(F32)
    im = open_imatrix(str(one(tmp_path / "x.gguf", sums.tolist(), [7.0])))
    got = im.weights("w", 0, 1000)
    assert got.tobytes() == (sums / F32(7)).tobytes()
    # multiplying by the reciprocal, the usual shortcut, would give other bytes, so this data detects it
    assert got.tobytes() != (sums * (F32(1) / F32(7))).tobytes()


def test_an_expert_that_was_never_asked_gets_ones(tmp_path: Path) -> None:
    sums = np.array([[2, 4], [8, 6], [9, 9]], F32)
    path = gguf_imatrix(tmp_path / "x.gguf", {"e": (sums, np.array([[2], [0], [3]], F32))})
    im = open_imatrix(str(path))
    assert [im.weights("e", mat, 2).tolist() for mat in range(3)] == [[1, 2], [1, 1], [3, 3]]


def test_one_count_for_all_matrices(tmp_path: Path) -> None:
    """attn_k_b has as many matrices as heads, and one count."""
    path = gguf_imatrix(tmp_path / "x.gguf", {"k": (np.arange(6, dtype=F32), np.array([2], F32))})
    im = open_imatrix(str(path))
    assert [im.weights("k", mat, 3).tolist() for mat in range(2)] == [[0, 0.5, 1], [1.5, 2, 2.5]]


@pytest.mark.parametrize(("n_calls", "divisor"), [(4, 4.0), (1, 1.0), (0, 1.0), (-3, 1.0)])
def test_legacy_values_are_divided_by_their_calls_if_there_are_any(
    tmp_path: Path, n_calls: int, divisor: float
) -> None:
    values = np.array([1, 2, 3, 0.1], F32)
    im = open_imatrix(str(legacy_imatrix(tmp_path / "x.dat", {"w": (n_calls, values)})))
    im.check()
    assert im.weights("w", 0, 4).tobytes() == (values / F32(divisor)).tobytes()
    assert im.weights("w", 1, 2).tobytes() == (values[2:] / F32(divisor)).tobytes()


def test_both_formats_of_the_same_matrix_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    sums = {f"blk.{i}.w": rng.lognormal(0, 2, 40).astype(F32) for i in range(3)}
    new = open_imatrix(str(gguf_imatrix(tmp_path / "x", {n: (v, np.array([9], F32)) for n, v in sums.items()})))
    old = open_imatrix(str(legacy_imatrix(tmp_path / "y", {n: (9, v) for n, v in sums.items()})))
    assert new.entries.keys() == old.entries.keys() == sums.keys()
    for name in sums:
        assert new.weights(name, 0, 40).tobytes() == old.weights(name, 0, 40).tobytes()


# ---------------------------------------------------------------- facts


def test_the_facts_of_a_gguf_imatrix(tmp_path: Path) -> None:
    sums = np.ones((3, 8), F32)
    path = gguf_imatrix(tmp_path / "x", {"a": (sums, np.ones((3, 1))), "b": (sums[0], np.ones(1))})
    im = open_imatrix(str(path))
    assert (im.path_as_given, im.path, im.datasets, im.n_chunks) == (str(path), path, ("calib.txt", "more.txt"), 64)
    assert ("a" in im, "b" in im, "c" in im) == (True, True, False)
    assert (im.fits("a", 8, 3), im.fits("a", 8, 1), im.fits("b", 8, 1), im.fits("b", 7, 1)) == (
        True,
        False,
        True,
        False,
    )


def test_the_facts_of_a_legacy_imatrix(tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "x", {"a": (3, np.ones(8)), "b": (3, np.ones(24))}, chunks=5)
    im = open_imatrix(str(path))
    assert (im.path_as_given, im.datasets, im.n_chunks, sorted(im.entries)) == (
        str(path),
        ("calib.txt",),
        5,
        ["a", "b"],
    )
    assert (im.fits("a", 8, 1), im.fits("b", 8, 3), im.fits("b", 8, 1)) == (True, True, False)


@pytest.mark.parametrize(
    ("tail", "n_chunks", "datasets"),
    [
        (b"", 0, ()),
        (struct.pack("<i", 9), 9, ()),
        (struct.pack("<ii", 9, 0), 9, ()),
        (struct.pack("<ii", 9, -5), 9, ()),
        (struct.pack("<ii", 9, 100) + b"short", 9, ()),
        (struct.pack("<ii", 9, 4) + b"a\0bc", 9, ("a",)),
        (struct.pack("<ii", 9, 4) + b"a\xffbc and more", 9, ("a\ufffdbc",)),
    ],
    ids=["none", "chunks", "empty_name", "negative", "cut", "zero_ended", "not_utf8"],
)
def test_the_end_of_a_legacy_file_is_optional(
    tmp_path: Path, tail: bytes, n_chunks: int, datasets: tuple[str, ...]
) -> None:
    path = legacy_imatrix(tmp_path / "x", {"a": (3, np.ones(2))})
    end = path.stat().st_size - struct.calcsize("<ii9s")
    path.write_bytes(path.read_bytes()[:end] + tail)
    im = open_imatrix(str(path))
    assert (im.n_chunks, im.datasets) == (n_chunks, datasets)


def test_datasets_that_are_no_strings_are_none(tmp_path: Path) -> None:
    kvs = [kv_array("imatrix.datasets", I32, [1]) if item.key == "imatrix.datasets" else item for item in KVS]
    path = gguf_imatrix(tmp_path / "x", {"w": (np.ones(2), np.ones(1))}, kvs)
    assert open_imatrix(str(path)).datasets == ()


def test_the_demos_imatrix_is_good(tmp_path: Path) -> None:
    demo.make_imatrix(tmp_path / "x", {"blk.0.ffn_up_exps.weight": (8, 4, 3), "blk.0.attn_k_b.weight": (8, 4, 2)})
    im = open_imatrix(str(tmp_path / "x"))
    im.check()
    assert {n: len(e.counts) for n, e in im.entries.items()} == {
        "blk.0.ffn_up_exps.weight": 3,
        "blk.0.attn_k_b.weight": 1,
    }


def test_the_file_is_closed_in_the_end(tmp_path: Path) -> None:
    path = one(tmp_path / "x", [1], [1])
    before = len(os.listdir("/proc/self/fd"))
    im = open_imatrix(str(path))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del im
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- what is wrong with a GGUF


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (-1.0, "-0.5"), (-float("inf"), "-inf")]
)
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_value_that_is_no_weight(tmp_path: Path, value: float, shown: str, at: int) -> None:
    sums = [1.0] * 6
    sums[at] = value
    path = one(tmp_path / "x", sums, [2, 2, 2])
    im = open_imatrix(str(path))
    assert sentence(im.check) == (
        f"{path}: entry 'w' holds {shown} at {at} of 6; all must be finite and not negative: compute the imatrix again"
    )


def test_a_value_that_is_no_weight_far_into_an_entry(tmp_path: Path) -> None:
    sums = np.ones(3 << 20, F32)
    sums[2_500_000] = np.nan
    path = gguf_imatrix(tmp_path / "x", {"w": (sums, np.ones(1))})
    im = open_imatrix(str(path))
    assert sentence(im.check) == (
        f"{path}: entry 'w' holds nan at 2500000 of 3145728; all must be finite and not negative: compute the imatrix "
        "again"
    )


def test_nan_where_the_count_is_zero_is_never_used(tmp_path: Path) -> None:
    im = open_imatrix(str(one(tmp_path / "x", [1, 1, float("nan"), 1], [1, 0])))
    im.check()
    assert im.weights("w", 1, 2).tolist() == [1, 1]


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_count_that_is_none(tmp_path: Path, count: float) -> None:
    path = one(tmp_path / "x", [1, 1], [1, count])
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: entry 'w' has counts that are negative, NaN or Inf; compute the imatrix again"
    )


def test_counts_that_do_not_divide_the_values(tmp_path: Path) -> None:
    path = one(tmp_path / "x", [1] * 5, [1, 1])
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: entry 'w' has 5 values for 2 counts (as many for each, at most 65,536 counts); compute the "
        "imatrix again"
    )


def test_more_counts_than_experts_anywhere(tmp_path: Path) -> None:
    path = gguf_imatrix(tmp_path / "x", {"w": (np.ones(65537), np.ones(65537))})
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: entry 'w' has 65,537 values for 65,537 counts (as many for each, at most 65,536 counts); compute the "
        "imatrix again"
    )


@pytest.mark.parametrize(("kept", "lacks"), [("in_sum2", "counts"), ("counts", "in_sum2")])
def test_half_an_entry(tmp_path: Path, kept: str, lacks: str) -> None:
    whole = {f"v.{s}": ((4,), "F32", bytes(16)) for s in ("in_sum2", "counts")}
    path = gguf_file(tmp_path / "x", {**whole, f"w.{kept}": ((4,), "F32", bytes(16))}, KVS)
    assert sentence(lambda: open_imatrix(str(path))) == (f"{path}: entry 'w' has no {lacks}; compute the imatrix again")


@pytest.mark.parametrize(("sums", "counts"), [("F16", "F32"), ("F32", "F16"), ("F32", "I32")])
def test_an_entry_of_another_type(tmp_path: Path, sums: str, counts: str) -> None:
    path = gguf_file(tmp_path / "x", {"w.in_sum2": ((4,), sums, bytes(16)), "w.counts": ((1,), counts, bytes(4))}, KVS)
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: entry 'w' is {sums} with {counts} counts, not F32; compute the imatrix again"
    )


@pytest.mark.parametrize("key", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
@pytest.mark.parametrize("how", ["missing", "mistyped"])
def test_a_key_of_an_imatrix_missing_or_mistyped(tmp_path: Path, key: str, how: str) -> None:
    kvs = [item for item in KVS if item.key != key]
    if how == "mistyped":
        kvs.append(kv(key, U64, 1))
    path = gguf_imatrix(tmp_path / "x", {"w": (np.ones(1), np.ones(1))}, kvs)
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: not an importance matrix: the key {key} is missing or mistyped (general.type is 'imatrix'); give the "
        "file that llama-imatrix made"
    )


def test_a_model_for_an_imatrix(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x", {"token_embd.weight": ((4,), "F32", bytes(16))})
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: not an importance matrix: the key imatrix.datasets is missing or mistyped (no general.type); give "
        "the file that llama-imatrix made"
    )


def test_a_general_type_of_no_text(tmp_path: Path) -> None:
    item = KV("general.type", ARRAY, struct.pack("<IQ", I32, 1) + bytes(4))
    path = gguf_file(tmp_path / "x", {"t": ((4,), "F32", bytes(16))}, [item])
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: not an importance matrix: the key imatrix.datasets is missing or mistyped (general.type is [0]); "
        "give the file that llama-imatrix made"
    )


def test_an_imatrix_without_entries(tmp_path: Path) -> None:
    path = gguf_imatrix(tmp_path / "x", {})
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"{path}: the importance matrix has no entries; compute it again"
    )


def test_a_truncated_gguf(tmp_path: Path) -> None:
    path = one(tmp_path / "x", [1] * 64, [1])
    size = path.stat().st_size
    os.truncate(path, size - 32)
    assert sentence(lambda: open_imatrix(str(path))) == (
        f"importance matrix {path}: not a usable GGUF file: the data of 'w.counts' should end at {size - 28:,}, but "
        f"the file ends at {size - 32:,}; the file is truncated: get it again"
    )


def test_a_file_that_shrinks_under_our_hands(tmp_path: Path) -> None:
    path = one(tmp_path / "x", [1] * 64, [1])
    im = open_imatrix(str(path))
    at = im.entries["w"].offset
    os.truncate(path, at + 100)
    assert sentence(lambda: im.weights("w", 0, 64)) == (
        f"{path}: should have 256 bytes at {at:,}, but now has 100; it has changed since it was opened"
    )


# ---------------------------------------------------------------- what is wrong with a legacy file


def entry(name: bytes, n_calls: int, n_values: int, data: bytes) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", n_calls, n_values) + data


MADE = "; give the file that llama-imatrix made"
HALF = "neither a GGUF nor a whole legacy importance matrix: "

LEGACY: list[tuple[str, bytes, str]] = [
    ("empty", b"", HALF + "the entry count needs 4 bytes at 0 of 0; get it again"),
    ("no_entries", bytes(40), "not an importance matrix: 0 entries in 40 bytes" + MADE),
    ("negative", b"\xff" * 40, "not an importance matrix: -1 entries in 40 bytes" + MADE),
    (
        "text",
        b"The full model is stored in eight bits.",
        "not an importance matrix: 543,516,756 entries in 39 bytes" + MADE,
    ),
    ("too_many", struct.pack("<i", 4) + bytes(40), "not an importance matrix: 4 entries in 44 bytes" + MADE),
    (
        "cut_before_an_entry",
        struct.pack("<i", 2) + entry(b"w", 1, 3, bytes(12)),
        HALF + "the name length of entry 1 needs 4 bytes at 29 of 29; get it again",
    ),
    (
        "name_negative",
        struct.pack("<ii", 1, -5) + bytes(40),
        HALF + "the name of entry 0 needs -5 bytes at 8 of 48; get it again",
    ),
    (
        "name_beyond_the_file",
        struct.pack("<ii", 1, 100) + bytes(40),
        HALF + "the name of entry 0 needs 100 bytes at 8 of 48; get it again",
    ),
    (
        "name_huge",
        struct.pack("<ii", 1, 2**31 - 1) + bytes(40),
        "not an importance matrix: entry 0 has a name of 2,147,483,647 bytes, ''" + MADE,
    ),
    (
        "name_empty",
        struct.pack("<i", 1) + entry(b"", 1, 3, bytes(12)),
        "not an importance matrix: entry 0 has a name of 0 bytes, ''" + MADE,
    ),
    (
        "name_of_control_characters",
        struct.pack("<i", 1) + entry(b"a\n\x1b[2J", 1, 3, bytes(12)),
        "not an importance matrix: entry 0 has a name of 6 bytes, 'a\\n\\x1b[2J'" + MADE,
    ),
    (
        "no_values",
        struct.pack("<i", 1) + entry(b"w", 1, 0, bytes(12)),
        "entry 'w' has 0 values; compute the imatrix again",
    ),
    (
        "values_negative",
        struct.pack("<i", 1) + entry(b"w", 1, -1, bytes(12)),
        "entry 'w' has -1 values; compute the imatrix again",
    ),
    (
        "values_beyond_the_file",
        struct.pack("<i", 1) + entry(b"w", 1, 4, bytes(12)),
        HALF + "the values of 'w' needs 16 bytes at 17 of 29; get it again",
    ),
    (
        "values_2^31",
        struct.pack("<i", 1) + entry(b"w", 1, 2**31 - 1, bytes(12)),
        HALF + "the values of 'w' needs 8,589,934,588 bytes at 17 of 29; get it again",
    ),
    (
        "half_a_chunk_count",
        struct.pack("<i", 1) + entry(b"w", 1, 3, bytes(12)) + b"\0\0",
        HALF + "the chunk count needs 4 bytes at 29 of 31; get it again",
    ),
]


@pytest.mark.parametrize(("blob", "says"), [pytest.param(*case[1:], id=case[0]) for case in LEGACY])
def test_bad_legacy_file(tmp_path: Path, blob: bytes, says: str) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(blob)
    assert sentence(lambda: open_imatrix(str(path))) == f"{path}: {says}"


def test_a_legacy_value_that_is_no_weight(tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "x.dat", {"a": (1, np.ones(2)), "w": (2, np.array([1, np.nan]))})
    im = open_imatrix(str(path))
    assert sentence(im.check) == (
        f"{path}: entry 'w' holds nan at 1 of 2; all must be finite and not negative: compute the imatrix again"
    )


# ---------------------------------------------------------------- what is no file


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("directory", "not a regular file; give the file that llama-imatrix made"),
        ("pipe", "not a regular file; give the file that llama-imatrix made"),
    ],
)
def test_what_is_no_file(tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    assert sentence(lambda: open_imatrix(str(path))) == f"{path}: {says}"


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    typed = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.dat")
    legacy_imatrix(Path(typed), {"w": (1, np.ones(2))})
    assert sentence(lambda: open_imatrix(typed)) == (
        f"{typed!a}: the path goes into the metadata, but is not UTF-8; rename the file"
    )


# ---------------------------------------------------------------- any damage


def attempt(path: Path) -> tuple[Imatrix | None, str]:
    """An imatrix that passes its check, or why it is refused; any other exception fails the test."""
    try:
        im = open_imatrix(str(path))
        im.check()
    except ImatrixError as e:
        return None, str(e)
    return im, ""


@pytest.mark.parametrize("form", ["gguf", "legacy"])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 499),
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]).map(lambda n: struct.pack("<i", n)),
                st.sampled_from([0, 1, 2**32, 2**63 - 1, -1]).map(lambda n: struct.pack("<q", n)),
                st.sampled_from([float("nan"), float("inf"), -1.0, 1e38]).map(lambda x: struct.pack("<f", x)),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    st.one_of(st.none(), st.integers(0, 500)),
)
@settings(max_examples=200, deadline=None)
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, form: str, edits: list[tuple[int, bytes]], end: int | None
) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    if form == "gguf":
        gguf_imatrix(path, {"w": (np.ones((2, 4)), np.array([[2], [0]])), "v": (np.ones(3), np.ones(1))})
    else:
        legacy_imatrix(path, {"w": (3, np.ones(8)), "v": (0, np.ones(3))})
    blob = bytearray(path.read_bytes())
    for where, new in edits:
        at = where % len(blob)
        blob[at : at + len(new)] = new
    path.write_bytes(blob[:end])
    im, says = attempt(path)
    if im is None:
        assert says.startswith((f"{path}: ", f"importance matrix {path}: "))
        assert says.isprintable()
    else:
        for name, e in im.entries.items():
            values = im.weights(name, 0, e.n_values)
            assert np.isfinite(values).all()
            assert (values >= 0).all()

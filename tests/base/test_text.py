"""Tables, in text and in Markdown; sizes; lines that fit."""

from __future__ import annotations

import pytest

from quantkit.base.text import (
    columns,
    in_unit,
    markdown_row,
    markdown_table,
    short_size,
    size,
    table,
    table_width,
    unit_of,
    wrapped,
)

ROWS = [["a", "1,000", "x"], ["long name", "2", ""]]
HEAD = ["name", "n", "why"]


def test_a_table_is_aligned_and_no_line_ends_in_spaces() -> None:
    assert table(ROWS, HEAD, right=(1,)).split("\n") == [
        "name           n  why",
        "---------  -----  ---",
        "a          1,000  x",
        "long name      2",
    ]
    assert table([], HEAD) == "name  n  why\n----  -  ---"


def test_columns_are_as_wide_as_asked() -> None:
    assert columns(ROWS, right=(1,), least=(10, 6)) == ["a            1,000  x", "long name        2"]
    assert columns(ROWS, least=(3,)) == ["a          1,000  x", "long name  2"]
    assert columns([]) == []


def test_a_markdown_table() -> None:
    assert markdown_table(ROWS, HEAD, right=(1,)).split("\n") == [
        "| name | n | why |",
        "|---|--:|---|",
        "| a | 1,000 | x |",
        "| long name | 2 |  |",
    ]
    assert markdown_row(["a|b", "two\nlines"]) == "| a\\|b | two lines |"


def test_bars() -> None:
    from quantkit.base.text import bar

    shares = (0, 1e-9, 0.01, 0.05, 0.5, 0.92, 1, 1.5, -1)
    assert [bar(s) for s in shares] == ["", "▏", "▏", "▌", "█" * 5, "█" * 9 + "▎", "█" * 10, "█" * 10, ""]
    assert bar(0.5, 3) == "█▌"


def test_a_table_that_fits_wraps_its_first_column() -> None:
    rows = [["blk.{0-60}.attn_output.weight", "61"], ["output.weight", "1"]]
    assert table_width([["tensor", "n"], *rows]) == 33
    assert table(rows, ["tensor", "n"], right=(1,), width=33) == table(rows, ["tensor", "n"], right=(1,))
    assert table(rows, ["tensor", "n"], right=(1,), width=26).split("\n") == [
        "tensor             n",
        "----------------  --",
        "blk.{0-60}.attn_  61",
        "output.weight",
        "output.weight      1",
    ]
    narrow = table(rows, ["tensor", "n"], width=1).split("\n")
    assert max(map(len, narrow)) == 12 + 2 + 2
    assert "".join(line[:12].rstrip() for line in narrow[2:]) == "blk.{0-60}.attn_output.weightoutput.weight"


@pytest.mark.parametrize(
    ("nbytes", "short", "long"),
    [
        (0, "0 B", "0 bytes"),
        (1023, "1023 B", "1,023 bytes"),
        (1024, "1.00 KiB", "1,024 bytes = 1.00 KiB = 1.02 kB"),
        (59_392, "58.00 KiB", "59,392 bytes = 58.00 KiB = 59.39 kB"),
        (11_865_088, "11.32 MiB", "11,865,088 bytes = 11.32 MiB = 11.87 MB"),
        (140_350_064_128, "130.71 GiB", "140,350,064,128 bytes = 130.71 GiB = 140.35 GB"),
    ],
)
def test_sizes_have_the_unit_in_which_they_are_read(nbytes: int, short: str, long: str) -> None:
    assert (short_size(nbytes), size(nbytes)) == (short, long)


def test_nothing_is_zero_that_is_not() -> None:
    assert [unit_of(n) for n in (0, 1 << 20, 1 << 30, -(1 << 30))] == ["KiB", "MiB", "GiB", "GiB"]
    assert [in_unit(n, "GiB") for n in (0, 1, 1 << 30)] == ["0.000", "<0.001", "1.000"]
    assert [in_unit(n, "GiB", sign="+") for n in (1 << 30, 1, -1, -(1 << 30))] == [
        "+1.000",
        "<+0.001",
        ">-0.001",
        "-1.000",
    ]
    assert in_unit(1_500_000, "MB", 1) == "1.5"


def test_lines_are_wrapped_at_spaces() -> None:
    assert wrapped("one two three", 8, "  ") == "one two\n  three"
    assert wrapped("one two three", None) == "one two three"
    assert wrapped("a-very-long-word b", 5, "  ") == "a-very-long-word\n  b"

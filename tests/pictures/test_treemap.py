"""Treemaps: areas are bytes, whatever the sizes; and the limits of a ladder and a map with very many entries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.pictures.figure import MOST_ROWS, type_scale
from quantkit.pictures.ladder import Budget, Rung, ladder
from quantkit.pictures.layers import type_map
from quantkit.pictures.save import svg
from quantkit.pictures.theme import in_light
from quantkit.pictures.treemap import placed, treemap

SIZES = st.lists(st.integers(0, 2**60), max_size=60)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 2000), st.integers(1, 2000))
def test_areas_are_bytes_and_nothing_overlaps(sizes: list[int], width: int, height: int) -> None:
    sizes.sort(reverse=True)
    found = placed(sizes, (3.0, 5.0, float(width), float(height)))
    total = sum(sizes)
    there = {i for i, _ in found}
    assert {i for i, s in enumerate(sizes) if s and s >= 1e-7 * total} == there
    kept = sum(sizes[i] for i in there)
    for i, (x, y, dx, dy) in found:
        assert dx * dy == pytest.approx(width * height * sizes[i] / kept, rel=1e-4)
        # squarify adds up widths of boxes that differ in size by 10^7: the last may end a millionth outside
        assert -1e-4 <= x - 3 <= width - dx + 1e-4
        assert -1e-4 <= y - 5 <= height - dy + 1e-4
    boxes = [box for _, box in found]
    for i, (x, y, dx, dy) in enumerate(boxes):
        for u, v, du, dv in boxes[:i]:
            wide, high = min(x + dx, u + du) - max(x, u), min(y + dy, v + dv) - max(y, v)
            assert wide <= 1e-3 or high <= 1e-3


@pytest.mark.parametrize("sizes", [[1] * 1500, [10**18, *[1] * 900], [2**i for i in range(62, 0, -1)], [0, 0], []])
def test_sizes_that_are_all_alike_or_far_apart(sizes: list[int]) -> None:
    found = placed(sizes, (0.0, 0.0, 940.0, 420.0))
    assert all(dx > 0 and dy > 0 for _, (_, _, dx, dy) in found)


def tensor(name: str, nbytes: int = 100, type_: str = "Q4_K") -> dict[str, Any]:
    return {"name": name, "role": "other", "type": type_, "bytes": nbytes, "shape": [256, 1]}


def test_very_many_tensors_are_drawn_in_part_and_the_table_says_so() -> None:
    many = [tensor(f"blk.{i % 1000}.expert.{i}.w{i % 90}.weight", 1 + i) for i in range(MOST_ROWS + 1000)]
    scale = type_scale(many)
    for figure in (treemap(many, scale, "t"), type_map(many, scale, "t")):
        text = svg(figure.spec)
        assert text.startswith("<svg")
        assert len(text) < 12_000_000
    table = type_map(many, scale, "t").table
    assert len(table.rows) == MOST_ROWS
    assert table.note == "The first 5,000 of 6,000 rows; --json of the command has all."


def test_types_are_in_the_order_of_their_bits() -> None:
    tensors = [tensor("a", 144, "Q4_K"), tensor("b", 1024, "F32"), tensor("c", 50, "IQ1_S"), tensor("d", 144, "IQ4_XS")]
    assert type_scale(tensors).types == ("IQ1_S", "IQ4_XS", "Q4_K", "F32")


def test_what_is_far_above_a_budget_is_in_the_table_only() -> None:
    rungs = [Rung("a", 100 << 30, 1.5, True), Rung("b", 300 << 30, 4.5), Rung("c", 1300 << 30, 16.0)]
    found = ladder(rungs, "t", Budget("2x80 GiB of VRAM", 158 << 30, "about"))
    assert [r[0] for r in found.table.rows] == ["a", "b", "c"]
    bars = found.spec["layer"][0]["data"]["values"]
    assert [(v["name"], v["to"], v["what"]) for v in bars] == [("a", 100, "of this page"), ("b", 300, "other recipes")]
    assert found.spec["layer"][1]["data"]["values"] == [{"at": 158, "words": "2x80 GiB of VRAM: 158.00 GiB"}]
    assert "One far larger is in the table only." in found.about


def test_a_file_has_colours_and_text_that_looks_like_one_stays() -> None:
    figure = treemap([tensor("var(--fg)", 5, "var(--bg)")], type_scale([tensor("var(--fg)", 5, "var(--bg)")]), "t")
    text = svg(in_light(figure.spec))
    assert 'fill="var(' not in text
    assert 'stroke="var(' not in text
    assert "var(--fg)&#xA;var(--bg), 5 bytes, other" in text

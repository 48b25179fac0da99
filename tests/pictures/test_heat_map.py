"""Heat maps from plain data: every cell is drawn, zeros stand out, and the same data give the same file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantkit.base.errors import OutputError
from quantkit.pictures.heat_map import Panel, draw

NAMES = ("layer", "expert", "tokens")
CELL = r'aria-label="expert: (\d+); layer: (\d+)(?:; tokens: ([\d,.]+))?"[^>]*fill="([^"]+)"'


def cells(path: Path) -> dict[tuple[int, int], str]:
    """The colours by row and column."""
    return {(int(row), int(col)): fill for col, row, _, fill in re.findall(CELL, path.read_text())}


def test_every_cell_has_a_colour(tmp_path: Path) -> None:
    rows = (("3", (1, 0, 1000)), ("10", (1000, 30, 1)))
    draw(tmp_path / "x.svg", "A title", [Panel("a <panel>", rows)], NAMES)
    got = cells(tmp_path / "x.svg")
    assert set(got) == {(row, col) for row in (3, 10) for col in range(3)}
    assert got[3, 1] == "#d62728"
    assert got[3, 0] == got[10, 2] != got[3, 2] == got[10, 0]
    # logarithmic: 30 is half-way between 1 and 1000
    assert got[10, 1] not in (got[3, 0], got[3, 2], "#d62728")
    text = (tmp_path / "x.svg").read_text()
    assert "A title" in text
    assert "a &lt;panel&gt;" in text
    # rows keep their given order, and are not sorted as text
    assert text.index('layer: 3"') if 'layer: 3"' in text else text.index("layer: 3;") < text.index("layer: 10")


def test_the_same_data_give_the_same_file(tmp_path: Path) -> None:
    panels = [Panel("a", (("0", (1, 2)),)), Panel("b", (("0", (5, 0)),))]
    for name in ("1.svg", "2.svg", "1.png", "2.png"):
        draw(tmp_path / name, "t", panels, NAMES)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()


def test_only_zeros(tmp_path: Path) -> None:
    draw(tmp_path / "x.svg", "t", [Panel("a", (("0", (0, 0)),))], NAMES)
    assert set(cells(tmp_path / "x.svg").values()) == {"#d62728"}


def test_as_many_cells_as_r1_has(tmp_path: Path) -> None:
    rows = tuple((str(layer), tuple(range(layer, layer + 256))) for layer in range(3, 61))
    draw(tmp_path / "x.svg", "t", [Panel("a", rows)], NAMES)
    assert len(cells(tmp_path / "x.svg")) == 58 * 256


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    path.write_text("mine")
    panel = Panel("a", (("0", (1,)),))
    with pytest.raises(OutputError) as e:
        draw(path, "t", [panel], NAMES)
    assert str(e.value) == f"{path}: exists; choose another name, or replace it with --force"
    assert path.read_text() == "mine"
    draw(path, "t", [panel], NAMES, replace=True)
    assert path.read_text().startswith("<svg")
    assert list(tmp_path.iterdir()) == [path]

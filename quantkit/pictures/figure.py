"""The parts of every figure: a Vega-Lite spec, words, and a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..base.errors import showable
from .theme import config, steps, var

#: largest number of rows of a table on the page
MOST_ROWS = 5000
_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")
Row = Mapping[str, Any]
#: types that share one colour
_FLOATS = ("F32", "F16", "BF16", "F64")


class Table(NamedTuple):
    """A figure's data."""

    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: tuple[int, ...] = ()
    """columns of numbers"""
    note: str = ""


class Grid(NamedTuple):
    """Counts that are the cells of a map, row by row."""

    rows: Sequence[str]
    counts: Sequence[Sequence[int]]
    names: tuple[str, str, str]
    """what a row, a column and a count stand for"""


class Figure(NamedTuple):
    """A picture with its words and data."""

    kind: str
    """one word for its files, such as `layers`"""
    title: str
    about: str
    """what the picture shows, in a sentence or two"""
    spec: Mapping[str, Any]
    table: Table
    narrow: Mapping[str, Any] | None = None
    """the spec for a phone's width; None: the same spec, scrolled sideways"""
    grid: Grid | None = None
    """the data of the marks, if they are too many for the picture to carry their words"""


class Scale(NamedTuple):
    """The colours of types, the same on the whole page."""

    types: tuple[str, ...]

    @property
    def encoding(self) -> dict[str, Any]:
        shades = iter(steps(sum(t not in _FLOATS for t in self.types)))
        colours = [var("float") if t in _FLOATS else next(shades) for t in self.types]
        return {"domain": list(self.types), "range": colours}


def type_scale(tensors: Iterable[Row]) -> Scale:
    """The types of tensors, ordered by bits per weight."""
    most: dict[str, float] = {}
    for t in tensors:
        n = math.prod(t["shape"])
        if n:
            most[t["type"]] = max(most.get(t["type"], 0.0), t["bytes"] / n)
    return Scale(tuple(sorted(most, key=lambda t: (most[t], t))))


def spec(width: int, height: int, **more: Any) -> dict[str, Any]:
    """A Vega-Lite 5 spec with the page's look."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "config": config(), "width": width, "height": height, "padding": 4, **more,
    }  # fmt: skip


def place_of(name: str) -> tuple[int | None, str]:
    """Split a tensor's name into its layer and its name within the layer: `blk.3.ffn_down_exps.weight` becomes
    (3, 'ffn_down_exps'); other numbers in it become *."""
    found = _LAYER.fullmatch(name)
    layer, rest = (int(found[1]), found[2]) if found else (None, name)
    return layer, re.sub(r"(?<=\.)\d+(?=\.)", "*", rest).removesuffix(".weight")


def unit_of(largest: float) -> tuple[int, str]:
    """The unit for sizes up to `largest`: its bytes, and its name."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if largest >= 1 << power:
            return 1 << power, name
    return 1, "bytes"


def size(nbytes: float) -> str:
    """Format bytes in a suitable unit."""
    unit, name = unit_of(abs(nbytes))
    return f"{nbytes:,.0f} bytes" if unit == 1 else f"{nbytes / unit:,.2f} {name}"


def some(rows: Sequence[Sequence[str]]) -> tuple[Sequence[Sequence[str]], str]:
    """The rows that a table shows, and a note if they are not all."""
    if len(rows) <= MOST_ROWS:
        return rows, ""
    return rows[:MOST_ROWS], f"The first {MOST_ROWS:,} of {len(rows):,} rows; --json of the command has all."


def cleaned(value: Any) -> Any:
    """Plain data with its text made safe to show: characters that control a terminal or the direction of writing are
    escaped. Raises ValueError for a number that is not finite."""
    if isinstance(value, str):
        return showable(" ".join(value.split("\n")))
    if isinstance(value, Mapping):
        return {cleaned(str(k)): cleaned(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value

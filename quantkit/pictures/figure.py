"""What every figure is: a spec of Vega-Lite, words, and a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..base.errors import showable
from .theme import config, steps, var

#: rows of a table in the page at most
MOST_ROWS = 5000
_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")
Row = Mapping[str, Any]
#: bits a weight, to put types in order; others come last but floats
_FLOATS = ("F32", "F16", "BF16", "F64")


class Table(NamedTuple):
    """A figure's data."""

    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: tuple[int, ...] = ()
    """columns of numbers"""
    note: str = ""


class Grid(NamedTuple):
    """Counts whose marks are the cells of a map, row by row."""

    rows: Sequence[str]
    counts: Sequence[Sequence[int]]
    names: tuple[str, str, str]
    """of a row, of a column, of what is counted"""


class Figure(NamedTuple):
    """A picture with all that is said of it."""

    kind: str
    """one word for its files, such as `layers`"""
    title: str
    about: str
    """what is to be seen, in a sentence or two"""
    spec: Mapping[str, Any]
    table: Table
    narrow: Mapping[str, Any] | None = None
    """the spec for a screen of a phone's width; None: the same, which is moved sideways there"""
    grid: Grid | None = None
    """what the marks are, where there are so many that the picture itself does not have their words"""


class Scale(NamedTuple):
    """The colours of types, the same all over a page."""

    types: tuple[str, ...]

    @property
    def encoding(self) -> dict[str, Any]:
        shades = iter(steps(sum(t not in _FLOATS for t in self.types)))
        colours = [var("float") if t in _FLOATS else next(shades) for t in self.types]
        return {"domain": list(self.types), "range": colours}


def type_scale(tensors: Iterable[Row]) -> Scale:
    """The types of tensors, by the bits a weight that they have."""
    most: dict[str, float] = {}
    for t in tensors:
        n = math.prod(t["shape"])
        if n:
            most[t["type"]] = max(most.get(t["type"], 0.0), t["bytes"] / n)
    return Scale(tuple(sorted(most, key=lambda t: (most[t], t))))


def spec(width: int, height: int, **more: Any) -> dict[str, Any]:
    """A spec of Vega-Lite 5 with the page's look."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "config": config(), "width": width, "height": height, "padding": 4, **more,
    }  # fmt: skip


def place_of(name: str) -> tuple[int | None, str]:
    """A tensor's layer and what it is called in every layer: `blk.3.ffn_down_exps.weight` is (3, 'ffn_down_exps'), and
    numbers within are *."""
    found = _LAYER.fullmatch(name)
    layer, rest = (int(found[1]), found[2]) if found else (None, name)
    return layer, re.sub(r"(?<=\.)\d+(?=\.)", "*", rest).removesuffix(".weight")


def unit_of(largest: float) -> tuple[int, str]:
    """Bytes of a unit for sizes up to `largest`, and its name."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if largest >= 1 << power:
            return 1 << power, name
    return 1, "bytes"


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    unit, name = unit_of(abs(nbytes))
    return f"{nbytes:,.0f} bytes" if unit == 1 else f"{nbytes / unit:,.2f} {name}"


def some(rows: Sequence[Sequence[str]]) -> tuple[Sequence[Sequence[str]], str]:
    """Rows for a table, and what is said where they are not all."""
    if len(rows) <= MOST_ROWS:
        return rows, ""
    return rows[:MOST_ROWS], f"The first {MOST_ROWS:,} of {len(rows):,} rows; --json of the command has all."


def cleaned(value: Any) -> Any:
    """Plain data with its text fit to be shown: what steers a terminal or turns the direction of writing is written as
    an escape. Raises ValueError for a number that is not finite."""
    if isinstance(value, str):
        return showable(" ".join(value.split("\n")))
    if isinstance(value, Mapping):
        return {cleaned(str(k)): cleaned(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value

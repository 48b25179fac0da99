"""Draws two recipes on one model: bytes by role, and the tensors that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figure import Figure, Table, place_of, size, some, spec, unit_of
from .layers import Cell, layer_map, layer_text
from .theme import var


def side_by_side(found: Mapping[str, Any]) -> list[Figure]:
    """Draw the output of `quantkit recipe diff --json`."""
    a, b = found["before"]["recipe"], found["after"]["recipe"]
    return [_roles(found, a, b), *([_changes(found, a, b)] if found["changes"] else [])]


def _roles(found: Mapping[str, Any], a: str, b: str) -> Figure:
    rows = [
        [
            r["role"],
            f"{r['before']:,}",
            f"{r['after']:,}",
            f"{r['after'] - r['before']:+,}",
            _bits(r, "before"),
            _bits(r, "after"),
        ]
        for r in found["roles"]
    ]
    table = Table(
        ("role", f"{a}, bytes", f"{b}, bytes", "difference", f"{a}, bits", f"{b}, bits"), rows, (1, 2, 3, 4, 5)
    )
    first, second = found["before"], found["after"]
    about = (
        f"{a} is {size(first['tensor_bytes'])} with {first['bpw']:.2f} bits a weight, {b} is "
        f"{size(second['tensor_bytes'])} with {second['bpw']:.2f}: {found['bytes']:+,} bytes. "
        "The bars are bits a weight of each role."
    )
    wide, narrow = (_roles_spec(found, a, b, width) for width in (620, 220))
    return Figure("roles", f"{a} and {b} by role", about, wide, table, narrow)


def _bits(r: Mapping[str, Any], side: str) -> str:
    return f"{8 * r[side] / r['n_elements']:.2f}" if r["n_elements"] else ""


def _roles_spec(found: Mapping[str, Any], a: str, b: str, width: int) -> dict[str, Any]:
    values = []
    sides = [(f"1: {a}", "before"), (f"2: {b}", "after")]
    for r in found["roles"]:
        for name, side in sides:
            if r["n_elements"]:
                bits = 8 * r[side] / r["n_elements"]
                words = f"{r['role']}, {name[3:]}\n{bits:.2f} bits a weight\n{r[side]:,} bytes = {size(r[side])}"
                label = f"{bits:.2f}" + (f" · {size(r[side])}" if width > 400 else "")
                values.append({"role": r["role"], "bits": bits, "what": name, "words": words, "label": label})
    top = max([v["bits"] for v in values] or [1]) * (1.25 if width > 400 else 1.2)
    y = {"field": "role", "type": "ordinal", "title": None, "sort": None}
    offset = {"field": "what", "type": "nominal"}
    x = {
        "field": "bits",
        "type": "quantitative",
        "title": "bits a weight",
        "scale": {"domain": [0, top], "nice": False},
    }
    words_of = {"field": "words", "type": "nominal"}
    colour = {
        "field": "what", "type": "nominal", "title": None, "scale": {"range": [var("accent"), var("second")]},
        "legend": {"orient": "top", "direction": "horizontal" if width > 400 else "vertical"},
    }  # fmt: skip
    return spec(
        width, 40 * len({v["role"] for v in values}), data={"values": values},
        layer=[
            {
                "mark": {"type": "bar"},
                "encoding": {"x": x, "y": y, "yOffset": offset, "color": colour, "description": words_of},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10, "aria": False},
                "encoding": {"x": x, "y": y, "yOffset": offset, "text": {"field": "label"}},
            },
        ],
    )  # fmt: skip


def _changes(found: Mapping[str, Any], a: str, b: str) -> Figure:
    unit, name = unit_of(max(abs(c["bytes"]) for c in found["changes"]) or 1)
    cells, rows = [], []
    for c in found["changes"]:
        layer, kind = place_of(c["name"])
        words = (
            f"{c['name']}\n{a}: {c['before']}\n{b}: {c['after']}\n{c['bytes']:+,} bytes"
            f"\nrule before: {c['rule_before']}\nrule after: {c['rule_after']}"
        )
        cells.append(Cell(layer_text(layer), kind, c["role"], c["bytes"] / unit, words))
        rows.append(
            [c["name"], c["role"], c["before"], c["after"], f"{c['bytes']:+,}", c["rule_before"], c["rule_after"]]
        )
    most = max(abs(c.value) for c in cells) or 1
    colour = {
        "field": "value", "type": "quantitative", "title": f"{name} more or less",
        "scale": {"domain": [-most, 0, most], "range": ["#2a7fba", "#9aa4ae", "#d9573f"], "type": "linear"},
        "legend": {"orient": "top", "gradientLength": 240, "format": ",.2~r"},
    }  # fmt: skip
    about = (
        f"The tensors that {b} gives another type than {a} does: red with more bytes, blue with fewer. "
        "All others are alike."
    )
    shown, note = some(rows)
    table = Table(("tensor", "role", a, b, "bytes", "rule before", "rule after"), shown, (4,), note)
    return Figure("changes", f"What changes from {a} to {b}", about, layer_map(cells, colour, {}), table)

"""Draws how much groups of tensors matter: by layer, and damage beside bytes by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figure import Figure, Row, Table, place_of, some, spec
from .layers import Cell, layer_text, value_map
from .theme import var


def sensitivity(found: Mapping[str, Any]) -> list[Figure]:
    """Draw the output of `quantkit sensitivity show --json`."""
    out = []
    if found["alphas"]:
        out.append(_alphas(found))
    if found["shares"]:
        out.append(_shares(found["shares"]))
    return out


def _alphas(found: Mapping[str, Any]) -> Figure:
    groups = {g["name"]: g for g in found["groups"]}
    cells, rows = [], []
    for a in found["alphas"]:
        g = groups[a["group"]]
        said = f"α {a['value']:.4g}, 95 % from {a['low']:.4g} to {a['high']:.4g}\nβ {a['beta']:.4g}"
        floor = "" if a["above_floor"] else "\nbelow the noise floor"
        for name in g["tensors"]:
            layer, kind = place_of(name)
            cells.append(
                Cell(layer_text(layer), kind, g["role"], a["value"], f"{name}\ngroup {a['group']}\n{said}{floor}")
            )
        rows.append([
            a["group"], g["role"], f"{g['n_elements']:,}", f"{a['value']:.4g}", f"{a['low']:.4g} to {a['high']:.4g}",
            f"{a['beta']:.4g}", f"{a['beta_low']:.4g} to {a['beta_high']:.4g}",
            "" if a["above_floor"] else "below the floor",
        ])  # fmt: skip
    shown, note = some(rows)
    table = Table(("group", "role", "weights", "α", "95 %", "β", "95 %", ""), shown, (2, 3, 4, 5, 6), note)
    words = (
        f"Sensitivity of {found['model']}",
        "What an error of a tensor's group costs: α, in nats of KLD for a relative squared error of 1. Tensors of a "
        "group were changed together and have one colour.",
        "α, nats",
    )
    return value_map("sensitivity", words, cells, table)


def _shares(shares: Sequence[Row]) -> Figure:
    values = []
    for s in shares:
        for what, key in (("of the damage", "damage"), ("of the bytes", "nbytes")):
            words = f"{s['role']}\n{100 * s[key]:.1f} % {what}"
            values.append(
                {"role": s["role"], "what": what, "share": s[key], "words": words, "label": f"{100 * s[key]:.1f} %"}
            )
    rows = [
        [s["role"], f"{100 * s['damage']:.1f} %", f"{100 * s['nbytes']:.1f} %", f"{s['ratio']:.2f}"] for s in shares
    ]
    table = Table(("role", "of the damage", "of the bytes", "ratio"), rows, (1, 2, 3))
    wide, narrow = (_shares_spec(values, width) for width in (560, 210))
    about = (
        "With one type everywhere: where the damage comes from, beside where the bytes are. More bits pay where a role "
        "has more of the damage than of the bytes."
    )
    return Figure("shares", "Damage and bytes by role", about, wide, table, narrow)


def _shares_spec(values: Sequence[Mapping[str, Any]], width: int) -> dict[str, Any]:
    y = {"field": "role", "type": "ordinal", "title": None, "sort": None}
    offset = {"field": "what", "type": "nominal", "sort": ["of the damage", "of the bytes"]}
    x = {
        "field": "share", "type": "quantitative", "title": "share",
        "axis": {"format": "%", "tickCount": 4}, "scale": {"domain": [0, 1.15], "nice": False},
    }  # fmt: skip
    words = {"field": "words", "type": "nominal"}
    colour = {
        "field": "what", "type": "nominal", "title": None, "legend": {"orient": "top"},
        "scale": {"domain": ["of the damage", "of the bytes"], "range": [var("second"), var("accent")]},
    }  # fmt: skip
    return spec(
        width, 40 * len({v["role"] for v in values}), data={"values": list(values)},
        layer=[
            {
                "mark": {"type": "bar"},
                "encoding": {"x": x, "y": y, "yOffset": offset, "color": colour, "description": words},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10, "aria": False},
                "encoding": {"x": x, "y": y, "yOffset": offset, "text": {"field": "label"}},
            },
        ],
    )  # fmt: skip

"""Draws measurements: size against KLD, and predicted against measured KLD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .figure import Figure, Row, Table, size, spec, unit_of
from .theme import var

#: with more points than this, only those on the front have their names beside them
_NAMED = 24
#: labels, in pixels: font size, width of a letter, distance from the point
_FONT, _LETTER, _LABEL_DX = 10, 6.0, 7
#: places for a label, best first: whether it is right of its point, and pixels below the point
_LABEL_PLACES = tuple((right, dy) for up, down in ((-8, 9), (-20, 21), (-32, 33)) for right, dy in (
    (True, up), (True, down), (False, down), (False, up)
))  # fmt: skip
#: pixels between the data and the frame, above and below
_ABOVE = 16


def pareto(scores: Sequence[Row], front: Sequence[str], title: str, about: str) -> Figure | None:
    """Draw size against mean KLD with its standard error. `scores` are candidates of `quantkit eval --json` or of
    `quantkit ablate show --json`; `front` are the names that no other beats. None if there are no scores."""
    if not scores:
        return None
    best = set(front)
    points = sorted(scores, key=lambda s: (s["file_bytes"], s["mean_kld"]))
    rows = [
        [
            s["name"], f"{s['file_bytes']:,}", size(s["file_bytes"]), f"{s['bpw']:.3f}", f"{s['mean_kld']:.5f}",
            f"{s['mean_kld_se']:.5f}", f"{100 * s['same_top']:.2f} %", "yes" if s["name"] in best else "",
        ]
        for s in points
    ]  # fmt: skip
    table = Table(
        ("name", "bytes", "", "BPW", "mean KLD", "± standard error", "same top token", "on the front"),
        rows,
        (1, 2, 3, 4, 5, 6),
    )
    wide, narrow = (_front_spec(points, best, width) for width in (720, 270))
    says = (
        "Left is smaller, down is closer to the reference. The line joins what nothing else beats in both; bars are "
        f"one standard error each way. {about}"
    )
    return Figure("front", title, says, wide, table, narrow)


def _front_spec(points: Sequence[Row], best: set[str], width: int) -> dict[str, Any]:
    unit, name = unit_of(max(s["file_bytes"] for s in points))
    values = []
    for s in points:
        kld, se = s["mean_kld"], s["mean_kld_se"]
        words = (
            f"{s['name']}\n{s['file_bytes']:,} bytes = {size(s['file_bytes'])}, {s['bpw']:.3f} BPW"
            f"\nmean KLD {kld:.5f} ± {se:.5f}"
        )
        on = s["name"] in best
        values.append({
            "size": s["file_bytes"] / unit, "kld": kld, "low": kld - se, "high": kld + se, "words": words,
            "what": "front" if on else "beaten", "label": s["name"] if on or len(points) <= _NAMED else "",
        })  # fmt: skip
    lows, highs = [v["low"] for v in values], [v["high"] for v in values]
    log = min(lows) > 0 and max(highs) > 20 * min(lows)
    low, high = (min(lows) / 1.2, 1.2 * max(highs)) if log else (min(lows), max(highs))
    scale: dict[str, Any] = {"type": "log" if log else "linear", "zero": False, "nice": False, "domain": [low, high]}
    height, beside = (340, 50) if width > 400 else (280, 24)
    down = _places([v["kld"] for v in values], low, high, height - 2 * _ABOVE, log)
    sizes = [v["size"] for v in values]
    across = _places(sizes, min(sizes), max(sizes), width - 2 * beside, False)
    at = list(zip(across, (height - y for y in down), strict=True))
    for v, place in zip(values, _label_places([v["label"] for v in values], at), strict=True):
        v["place"] = place
    x = {
        "field": "size",
        "type": "quantitative",
        "title": name,
        "scale": {"zero": False, "nice": False, "padding": beside},
        "axis": {"tickCount": 3 if width < 400 else 6},
    }
    y: dict[str, Any] = {
        "field": "kld",
        "type": "quantitative",
        "title": "mean KLD, nats",
        "scale": {**scale, "padding": _ABOVE},
        "axis": {"tickCount": 5},
    }
    colour: dict[str, Any] = {
        "field": "what", "type": "nominal", "legend": None,
        "scale": {"domain": ["front", "beaten"], "range": [var("accent"), var("rest")]},
    }  # fmt: skip
    shape: dict[str, Any] = {**colour, "scale": {"domain": ["front", "beaten"], "range": ["circle", "diamond"]}}
    pointed = {"field": "words", "type": "nominal"}
    return spec(
        width, height,
        layer=[
            {
                "data": {"values": [v for v in values if v["what"] == "front"]},
                "mark": {"type": "line", "stroke": var("accent"), "strokeWidth": 1.2, "opacity": 0.7, "aria": False},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"values": values}, "mark": {"type": "rule", "strokeWidth": 1.4, "aria": False},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
            },
            {
                "data": {"values": values},
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "description": pointed},
            },
            *(
                {
                    "data": {"values": [v for v in values if v["place"] == (right, dy)]},
                    "mark": {
                        "type": "text", "align": "left" if right else "right", "dx": _LABEL_DX if right else -_LABEL_DX,
                        "dy": dy, "fontSize": _FONT,
                        "aria": False, "limit": 130 if width > 400 else 90,
                    },
                    "encoding": {"x": x, "y": y, "text": {"field": "label"}},
                }
                for right, dy in sorted({v["place"] for v in values})
            ),
        ],
    )  # fmt: skip


def _places(values: Sequence[float], low: float, high: float, length: int, log: bool) -> list[float]:
    """Map values to pixels from the start of a scale of `length` pixels."""
    if log:
        values, low, high = [math.log(v) for v in values], math.log(low), math.log(high)
    return [length * (v - low) / ((high - low) or 1.0) for v in values]


def _label_places(labels: Sequence[str], points: Sequence[tuple[float, float]]) -> list[tuple[bool, int]]:
    """Place labels: for each, whether it is right of its point, and how many pixels below. Takes the nearest place that
    covers no other label and no point."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    out = []
    for label, (x, y) in zip(labels, points, strict=True):
        length = _LETTER * len(label)
        boxes = {}
        for right, dy in _LABEL_PLACES:
            left = x + _LABEL_DX if right else x - _LABEL_DX - length
            boxes[right, dy] = (left, y + dy - _FONT / 2, left + length, y + dy + _FONT / 2)
        free = (p for p, box in boxes.items() if not any(_overlap(box, other) for other in taken))
        out.append(next(free, _LABEL_PLACES[0]))
        taken.append(boxes[out[-1]])
    return out


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def predicted(rows_of: Mapping[str, Sequence[Row]], title: str) -> Figure | None:
    """Draw predicted against measured KLD. `rows_of` are `fit`, `chosen_from` and `report` of `quantkit optimize
    --json`. None if nothing was measured."""
    names = {"fit": "fitted on", "chosen_from": "chosen from", "report": "reported"}
    values, rows = [], []
    for key, of in rows_of.items():
        for m in of:
            kld, se = m["mean_kld"], m["mean_kld_se"]
            what = f"{m['what']}: {m['name']}"
            words = f"{what} ({names[key]})\npredicted {m['predicted']:.5f}\nmeasured {kld:.5f} ± {se:.5f}"
            values.append({
                "predicted": m["predicted"], "kld": kld, "low": kld - se, "high": kld + se, "what": names[key],
                "words": words,
            })  # fmt: skip
            rows.append([
                names[key], m["what"], m["name"], f"{m['file_bytes']:,}", f"{m['predicted']:.5f}", f"{kld:.5f}",
                f"{se:.5f}", f"{100 * m['off']:+.0f} %",
            ])  # fmt: skip
    if not values:
        return None
    head = ("measured to be", "what", "name", "bytes", "predicted KLD", "measured KLD", "± standard error", "off")
    wide, narrow = (_predicted_spec(values, width) for width in (520, 270))
    about = (
        "On the line the prediction is right; above it the damage is larger than predicted. Bars are one standard "
        "error each way."
    )
    return Figure("predicted", title, about, wide, Table(head, rows, (3, 4, 5, 6, 7)), narrow)


def _predicted_spec(values: Sequence[Mapping[str, Any]], width: int) -> dict[str, Any]:
    every = [v[k] for v in values for k in ("predicted", "low", "high")]
    low, high = min(every), max(every)
    log = low > 0 and high > 20 * low
    ends = [low * 0.8, high * 1.2] if log else [min(0.0, low), high * 1.05 or 1.0]
    scale = {"type": "log" if log else "linear", "domain": ends, "nice": False}
    x = {"field": "predicted", "type": "quantitative", "title": "predicted KLD, nats", "scale": scale}
    y = {"field": "kld", "type": "quantitative", "title": "measured KLD, nats", "scale": scale}
    kinds = list(dict.fromkeys(v["what"] for v in values))
    colour = {
        "field": "what", "type": "nominal", "title": None, "legend": {"orient": "top", "columns": 3},
        "scale": {"domain": kinds, "range": [var("accent"), var("second"), var("good")][: len(kinds)]},
    }  # fmt: skip
    words = {"field": "words", "type": "nominal"}
    shape = {
        "field": "what", "type": "nominal", "title": None,
        "scale": {"domain": kinds, "range": ["circle", "square", "diamond"][: len(kinds)]},
    }  # fmt: skip
    return spec(
        width, 360 if width > 400 else 270,
        layer=[
            {
                "data": {"values": [{"predicted": e, "kld": e} for e in ends]},
                "mark": {"type": "line", "stroke": var("muted"), "strokeDash": [4, 3], "strokeWidth": 1, "aria": False},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"values": list(values)}, "mark": {"type": "rule", "aria": False},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
            },
            {
                "data": {"values": list(values)}, "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "description": words},
            },
        ],
    )  # fmt: skip

"""Draws bytes as areas: a rectangle per role, and in it one per tensor. squarify places them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figure import Figure, Row, Scale, Table, size, spec
from .theme import var

#: smallest share of the whole that gets a rectangle
_TINY = 1e-7
#: largest number of tensors of a role with their own rectangles
_TENSORS = 1500
#: pixels of a letter
_LETTER = 6.5


def treemap(tensors: Sequence[Row], scale: Scale, title: str) -> Figure:
    """Draw a model's bytes. Raises ToolError if squarify is not installed."""
    total = sum(t["bytes"] for t in tensors)
    by: dict[str, list[Row]] = {}
    for t in tensors:
        by.setdefault(t["role"], []).append(t)
    sums = {role: sum(t["bytes"] for t in of) for role, of in by.items()}
    roles = sorted(by, key=lambda r: -sums[r])
    rows = [
        [role, f"{len(by[role]):,}", f"{sums[role]:,}", size(sums[role]), f"{100 * sums[role] / max(1, total):.3f} %"]
        for role in roles
    ]
    table = Table(("role", "tensors", "bytes", "", "of all"), rows, (1, 2, 3, 4))
    about = (
        f"{size(total)} of tensors as areas: outlined by role, a rectangle for each tensor, coloured by its type. "
        "What is too small to be seen is in the table."
    )
    wide, narrow = (_spec(by, roles, scale, w, h) for w, h in ((940, 420), (330, 420)))
    return Figure("bytes", title, about, wide, table, narrow)


def _spec(by: dict[str, list[Row]], roles: Sequence[str], scale: Scale, width: int, height: int) -> dict[str, Any]:
    leaves: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    sums = [sum(t["bytes"] for t in by[role]) for role in roles]
    for i, box in placed(sums, (0.0, 0.0, float(width), float(height))):
        role = roles[i]
        label = role if len(role) * _LETTER < box[2] and box[3] > 14 else ""
        frames.append({**_corners(box), "label": label, "cx": box[0] + 5, "cy": box[1] + 11})
        of = sorted(by[role], key=lambda t: -t["bytes"])
        for j, inner in placed([t["bytes"] for t in of[:_TENSORS]], box):
            t = of[j]
            words = f"{t['name']}\n{t['type']}, {t['bytes']:,} bytes, {role}"
            leaves.append({**_corners(inner), "type": t["type"], "words": words})
    corners: dict[str, dict[str, Any]] = {
        "x": {"field": "x", "type": "quantitative", "scale": {"domain": [0, width], "nice": False}, "axis": None},
        "x2": {"field": "x2"},
        "y": {
            "field": "y", "type": "quantitative", "axis": None,
            "scale": {"domain": [0, height], "nice": False, "reverse": True},
        },
        "y2": {"field": "y2"},
    }  # fmt: skip
    colour = {
        "field": "type", "type": "nominal", "scale": scale.encoding,
        "legend": {"orient": "bottom", "columns": max(2, width // 85)},
    }  # fmt: skip
    text = {
        "x": {**corners["x"], "field": "cx"}, "y": {**corners["y"], "field": "cy"}, "text": {"field": "label"},
    }  # fmt: skip
    plain = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 11, "fontWeight": "bold", "aria": False}
    return spec(width, height, layer=[
        {
            "data": {"values": leaves},
            "mark": {"type": "rect", "stroke": var("bg"), "strokeWidth": 0.5, "strokeOpacity": 0.7},
            "encoding": {**corners, "color": colour, "description": {"field": "words", "type": "nominal"}},
        },
        {
            "data": {"values": frames},
            "mark": {"type": "rect", "fill": None, "stroke": var("fg"), "strokeWidth": 1.2, "aria": False},
            "encoding": corners,
        },
        # drawn twice: a rim in the page's colour keeps it legible on any colour
        {
            "data": {"values": frames},
            "mark": {**plain, "stroke": var("bg"), "strokeWidth": 3.5, "fill": var("bg")}, "encoding": text,
        },
        {"data": {"values": frames}, "mark": {**plain, "fill": var("fg")}, "encoding": text},
    ])  # fmt: skip


def placed(
    sizes: Sequence[float], box: tuple[float, float, float, float]
) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Lay out rectangles (x, y, width, height) in a box, each with the index of its size. Sizes must be in descending
    order; too small ones get none. Raises ToolError if squarify is not installed."""
    from .save import need

    squarify = need("squarify")
    x, y, dx, dy = box
    total = sum(s for s in sizes if s > 0)
    kept = [(i, float(s)) for i, s in enumerate(sizes) if s > 0 and s >= _TINY * total]
    if not kept or dx <= 0 or dy <= 0:
        return []
    areas = squarify.normalize_sizes([s for _, s in kept], dx, dy)
    made = squarify.squarify(areas, x, y, dx, dy)
    return [(i, (r["x"], r["y"], r["dx"], r["dy"])) for (i, _), r in zip(kept, made, strict=True)]


def _corners(box: tuple[float, float, float, float]) -> dict[str, float]:
    x, y, dx, dy = box
    return {"x": round(x, 2), "y": round(y, 2), "x2": round(x + dx, 2), "y2": round(y + dy, 2)}

"""Maps of layers by tensors: their types, errors and sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .figure import Figure, Row, Scale, Table, place_of, some, spec
from .theme import var

#: in pixels: approximate width of all cells; least and largest width of a cell; height of a row
_WIDTH, _LEAST, _MOST, _ROW = 800, 3, 22, 16
#: largest number of rows and columns of a map
_KINDS, _LAYERS = 80, 400
_NO_LAYER = "–"


class More(NamedTuple):
    """What other files know about the same tensors."""

    errors: Mapping[str, Mapping[str, float]] = {}
    """relative squared error by tensor and type"""
    tokens: Mapping[str, Sequence[int]] = {}
    """tokens seen by each matrix of a tensor"""


NO_MORE = More()


class Cell(NamedTuple):
    """A cell of the map. `value` is its type, or a number."""

    layer: str
    kind: str
    role: str
    value: Any
    words: str


def type_map(tensors: Sequence[Row], scale: Scale, title: str, more: More = NO_MORE) -> Figure:
    """The type of every tensor: layers across, tensors down by role."""
    cells, rows = [], []
    for t in tensors:
        layer, kind = place_of(t["name"])
        cells.append(Cell(layer_text(layer), kind, t["role"], t["type"], words_of(t, more)))
        rows.append(_row(t, more))
    head = ("tensor", "role", "type", "asked", "bytes", "rule", "why", "importance matrix", "error", "tokens seen")
    used = [i for i in range(len(head)) if i < 3 or i == 4 or any(r[i] for r in rows)]
    shown, note = some([[r[i] for i in used] for r in rows])
    table = Table(tuple(head[i] for i in used), shown, tuple(used.index(i) for i in (4, 8, 9) if i in used), note)
    colour = {
        "field": "value", "type": "nominal", "title": "type", "scale": scale.encoding,
        "legend": {"orient": "top", "columns": 12},
    }  # fmt: skip
    about = "Each square is a tensor, its colour the type: layers across, tensors by role down. " + (
        "Point at one for its rule, the reason and the bytes."
        if any(r[5] for r in rows)
        else "Point at one for its bytes."
    )
    return Figure("layers", title, about, layer_map(cells, colour, _of_bytes(tensors)), table)


def value_map(kind: str, words: tuple[str, str, str], cells: Sequence[Cell], table: Table) -> Figure:
    """A map of one number per tensor, coloured by its logarithm. `words`: title, description, the number's name."""
    title, about, what = words
    colour = {
        "field": "value", "type": "quantitative", "title": what, "scale": {"type": "log", "scheme": "viridis"},
        "legend": {"orient": "top", "format": ".2~r", "gradientLength": 240},
    }  # fmt: skip
    return Figure(kind, title, about, layer_map([c for c in cells if c.value > 0], colour, {}), table)


def error_map(tensors: Sequence[Row], errors: Mapping[str, Mapping[str, float]], title: str) -> Figure | None:
    """The error of every tensor at its type; None if no error is known."""
    cells, rows = [], []
    for t in tensors:
        error = errors.get(t["name"], {}).get(t["type"])
        if error is not None:
            layer, kind = place_of(t["name"])
            words = f"{t['name']}\n{t['type']}: relative squared error {error:.4g}"
            cells.append(Cell(layer_text(layer), kind, t["role"], error, words))
            rows.append([t["name"], t["role"], t["type"], f"{error:.6g}"])
    if not any(c.value > 0 for c in cells):
        return None
    shown, note = some(rows)
    table = Table(("tensor", "role", "type", "relative squared error"), shown, (3,), note)
    about = "How much of a tensor's weights its type loses: the squared error as a share of their squares, sampled."
    return value_map("errors", (title, about, "relative squared error"), cells, table)


def words_of(t: Row, more: More = NO_MORE) -> str:
    """The text shown for a tensor, one fact per line."""
    asked = f", asked for {t['requested']}" if t.get("requested") not in (None, t["type"]) else ""
    lines = [t["name"], f"{t['type']}{asked}, {t['bytes']:,} bytes, {t['role']}"]
    if t.get("rule"):
        lines.append(f"rule: {t['rule']}")
    if t.get("why"):
        lines.append(f"why: {t['why']}")
    if t.get("imatrix"):
        lines.append(f"importance matrix: {t['imatrix']}")
    if error := _error(t, more):
        lines.append(f"relative squared error: {error}")
    if tokens := _tokens(t, more):
        lines.append(f"tokens seen: {tokens}")
    return "\n".join(lines)


def _row(t: Row, more: More) -> list[str]:
    requested = t.get("requested", t["type"])
    return [
        t["name"], t["role"], t["type"], requested if requested != t["type"] else "", f"{t['bytes']:,}",
        t.get("rule", ""), t.get("why", ""), t.get("imatrix", ""), _error(t, more), _tokens(t, more),
    ]  # fmt: skip


def _error(t: Row, more: More) -> str:
    error = more.errors.get(t["name"], {}).get(t["type"])
    return "" if error is None else f"{error:.4g}"


def _tokens(t: Row, more: More) -> str:
    counts = more.tokens.get(t["name"])
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def layer_text(layer: int | None) -> str:
    return _NO_LAYER if layer is None else str(layer)


def _of_bytes(tensors: Sequence[Row]) -> dict[str, int]:
    of: dict[str, int] = {}
    for t in tensors:
        kind = place_of(t["name"])[1]
        of[kind] = of.get(kind, 0) + t["bytes"]
    return of


def layer_map(cells: Sequence[Cell], colour: Mapping[str, Any], weight: Mapping[str, int]) -> dict[str, Any]:
    """The spec of a map. If there are too many kinds, those with most bytes are drawn; of too many layers, the
    first."""
    kinds = list(dict.fromkeys(c.kind for c in cells))
    kept = set(sorted(kinds, key=lambda k: -weight.get(k, 0))[:_KINDS])
    role_of = {c.kind: c.role for c in reversed(cells)}
    of_role = {role: sum(weight.get(k, 0) for k in kinds if role_of[k] == role) for role in role_of.values()}
    roles = {role: i for i, role in enumerate(sorted(of_role, key=lambda r: -of_role[r]))}
    kinds = sorted((k for k in kinds if k in kept), key=lambda k: (roles[role_of[k]], kinds.index(k)))
    layers = sorted({c.layer for c in cells}, key=lambda x: -1 if x == _NO_LAYER else int(x))[:_LAYERS]
    there = {(layer, kind) for layer in layers for kind in kinds}
    once: dict[tuple[str, str], Cell] = {}
    for c in cells:
        key = (c.layer, c.kind)
        if key in there:
            was = once.get(key)
            words = c.words if was is None else f"{was.words}\n{c.words}" if len(was.words) < 1000 else was.words
            once[key] = c._replace(words=words)
    values = [{"layer": c.layer, "tensor": c.kind, "value": c.value, "words": c.words} for c in once.values()]
    wide = max(_LEAST, min(_MOST, _WIDTH // max(1, len(layers))))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * wide >= 22 or s == 100)
    ticks = [x for x in layers if x != _NO_LAYER and int(x) % step == 0]
    first = {role_of[k]: k for k in reversed(kinds)}
    width = wide * len(layers)
    y = {"field": "tensor", "type": "ordinal", "title": None, "scale": {"domain": kinds}}
    x = {"field": "layer", "type": "ordinal", "title": "layer", "scale": {"domain": layers}}
    x["axis"] = {"values": ticks, "labelAngle": 0, "orient": "bottom"}
    squares = {
        "data": {"values": values},
        "mark": {"type": "rect", "stroke": var("bg"), "strokeWidth": 0.6},
        "encoding": {"x": x, "y": y, "color": colour, "description": {"field": "words", "type": "nominal"}},
    }
    of_roles = {
        "data": {"values": [{"tensor": k, "role": role} for role, k in first.items()]},
        "mark": {"type": "text", "align": "left", "fill": var("muted"), "fontSize": 10, "aria": False},
        "encoding": {"y": y, "x": {"value": width + 8}, "text": {"field": "role"}},
    }
    # fonts differ: a label may be wider than measured
    room = {"left": 14, "right": 24, "top": 4, "bottom": 4}
    return {**spec(width, _ROW * len(kinds), layer=[squares, of_roles]), "padding": room}

"""The experts of an importance matrix by layers: how many tokens reached each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figure import Figure, Grid, Table, some, spec
from .layers import layer_text
from .theme import var

#: in pixels: approximate width of a row; least and largest width of a cell; height of a row
_WIDTH, _LEAST, _MOST, _ROW = 800, 2, 18, 9
#: largest number of cells in a page's picture
_CELLS = 40_000


def coverage(found: Mapping[str, Any]) -> list[Figure]:
    """Draw the expert counts of `quantkit imatrix info --json`: one figure per set of tensors that the same tokens
    reached. Empty if the file counts no experts."""
    if found["count_unit"] != "tokens":
        return []
    panels: dict[tuple[Any, ...], list[str]] = {}
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for t in found["tensors"]:
        if t["matrices"] > 1:
            by_kind.setdefault(t["kind"].removesuffix(".weight"), []).append(t)
    for kind, of in by_kind.items():
        panels.setdefault(tuple((t["layer"], tuple(t["counts"])) for t in of), []).append(kind)
    out: list[Figure] = []
    left = _CELLS
    for rows, kinds in panels.items():
        left -= sum(len(counts) for _, counts in rows)
        if left >= 0 or not out:
            out.append(_figure(rows, ", ".join(kinds), found["min_tokens"]))
    return out


def _figure(rows: Sequence[tuple[int | None, Sequence[int]]], kinds: str, fewest: int) -> Figure:
    n_cols = max(len(counts) for _, counts in rows)
    grid = Grid([layer_text(layer) for layer, _ in rows], [c for _, c in rows], ("layer", "expert", "tokens"))
    values = [
        {"layer": name, "expert": i, "tokens": n}
        for name, counts in zip(grid.rows, grid.counts, strict=True)
        for i, n in enumerate(counts)
    ]
    never = sum(n == 0 for _, counts in rows for n in counts)
    rarely = sum(0 < n < fewest for _, counts in rows for n in counts)
    wide = max(_LEAST, min(_MOST, _WIDTH // n_cols))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 20) if s * wide >= 26)
    every = max(1, len(rows) // 20)
    names = list(dict.fromkeys(v["layer"] for v in values))
    height = max(_ROW, wide) if len(rows) <= 64 else max(3, 600 // len(rows))
    seen = [n for counts in grid.counts for n in counts if n > 0]
    ends = [min(seen), max(seen)] if seen else [1, 2]
    scale = {"type": "log", "scheme": "viridis", "domain": ends if ends[0] < ends[1] else [ends[0], ends[0] * 2]}
    picture = spec(
        wide * n_cols, height * len(names),
        data={"values": values},
        mark={"type": "rect", "aria": False},
        encoding={
            "x": {
                "field": "expert", "type": "ordinal", "title": "expert",
                "axis": {"values": list(range(0, n_cols, step)), "labelAngle": 0},
            },
            "y": {
                "field": "layer", "type": "ordinal", "title": "layer", "sort": None,
                "axis": {"values": names[::every]},
            },
            "color": {
                "condition": {"test": "datum.tokens === 0", "value": var("bad")},
                "field": "tokens", "type": "quantitative", "title": "tokens", "scale": scale,
                "legend": {"orient": "top", "format": ",d", "gradientLength": 240},
            },
        },
    )  # fmt: skip
    about = (
        f"{kinds}: tokens that reached each expert, {len(rows):,} layers by {n_cols:,} experts, by the logarithm. "
        f"Red: never seen, {never:,} of {len(values):,}; seen by fewer than {fewest:,} tokens: {rarely:,}."
    )
    cells = [[name, *(f"{n:,}" for n in counts)] for name, counts in zip(grid.rows, grid.counts, strict=True)]
    shown, note = some(cells)
    table = Table(("layer", *map(str, range(n_cols))), shown, tuple(range(1, n_cols + 1)), note)
    return Figure("coverage", "Experts that the text reached", about, picture, table, grid=grid)

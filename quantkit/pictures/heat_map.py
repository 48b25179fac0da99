"""Draws counts as rows by columns, coloured by their logarithm; zeros have their own colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .save import check_suffix, drawing, save

_ZERO = "#d62728"
#: in pixels: approximate width without axes; largest and least width of a cell
_WIDTH, _MOST, _LEAST = 1000, 20, 2


class Panel(NamedTuple):
    """One map: its title, and its rows: each a label and the counts of its columns."""

    title: str
    rows: tuple[tuple[str, tuple[int, ...]], ...]


def draw(
    path: Path, title: str, panels: Sequence[Panel], names: tuple[str, str, str], *, replace: bool = False
) -> None:
    """Draw the panels one above the other, as SVG or PNG by the path's suffix. `names` are those of rows, columns and
    counts. Raises OutputError; ToolError if Altair or vl-convert is not installed."""
    check_suffix(path)
    alt = drawing()
    charts = [_map(alt, panel, names) for panel in panels]
    subtitle = f"{names[2]}, logarithmic; red: none"
    made = (
        alt.vconcat(*charts)
        .resolve_scale(color="shared")
        .properties(title={"text": title, "subtitle": subtitle, "anchor": "start"})
    )
    save(made, path, replace)


def _map(alt: Any, panel: Panel, names: tuple[str, str, str]) -> Any:
    down, across, what = names
    n_cols = max(len(counts) for _, counts in panel.rows)
    cells = [{down: label, across: i, what: n} for label, counts in panel.rows for i, n in enumerate(counts)]
    wide = max(_LEAST, min(_MOST, _WIDTH // n_cols))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 1 << 20) if s * wide >= 24)
    base = alt.Chart(alt.InlineData(values=cells), title=panel.title)
    place = {
        "x": alt.X(f"{across}:O", axis=alt.Axis(values=list(range(0, n_cols, step)), labelAngle=0)),
        "y": alt.Y(f"{down}:O", sort=None),
    }
    colour = alt.Color(f"{what}:Q", scale=alt.Scale(type="log", scheme="viridis"), legend=alt.Legend(format=",d"))
    seen = base.transform_filter(f"datum['{what}'] > 0").mark_rect().encode(color=colour, **place)
    none = base.transform_filter(f"datum['{what}'] == 0").mark_rect(color=_ZERO).encode(**place)
    size = {"width": wide * n_cols, "height": max(wide, 10) * len(panel.rows)}
    return alt.layer(seen, none).properties(**size)

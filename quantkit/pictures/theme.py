"""Colours, as CSS variables: a page has light and dark ones, a figure's own file has the light ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: name -> (light, dark)
COLOURS = {
    "bg": ("#ffffff", "#14171c"),
    "fg": ("#1b1f24", "#e6e9ee"),
    "muted": ("#57606a", "#a3acb8"),
    "line": ("#c9d1d9", "#3b434d"),
    "card": ("#f6f8fa", "#1d2229"),
    "accent": ("#0969da", "#58a6ff"),
    "second": ("#bc4c00", "#ffa657"),
    "rest": ("#8c959f", "#6e7781"),
    "bad": ("#cf222e", "#ff7b72"),
    "good": ("#1a7f37", "#56d364"),
    "float": ("#d0d7de", "#444c56"),
}
#: from few bits to many
_LIGHT = ("#4a1486", "#b12a90", "#e8525f", "#f8973f", "#f3d55b")
_DARK = ("#8e6bf0", "#d255b8", "#ff7782", "#ffad66", "#ffe791")
#: number of distinct colours of types; further types get the last one
N_STEPS = 12
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"


def var(name: str) -> str:
    """The named colour, as a reference for a spec."""
    return f"var(--{name})"


def _mixed(anchors: Sequence[str], share: float) -> str:
    at = share * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    a, b = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in anchors[i : i + 2])
    return "#" + "".join(f"{round(x + (y - x) * (at - i)):02x}" for x, y in zip(a, b, strict=True))


_STEPS = {f"t{i}": (_mixed(_LIGHT, i / (N_STEPS - 1)), _mixed(_DARK, i / (N_STEPS - 1))) for i in range(N_STEPS)}
_ALL = {**COLOURS, **_STEPS}


def steps(n: int) -> list[str]:
    """n colours, evenly spread from few bits to many."""
    return [var(f"t{round(i * (N_STEPS - 1) / max(1, n - 1))}") for i in range(n)]


def css() -> str:
    """The variables, for light screens and, where preferred, for dark ones."""
    light, dark = ("".join(f"--{name}:{both[i]};" for name, both in _ALL.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )


def in_light(spec: Any) -> Any:
    """Replace the variables in a spec by the light colours. Data stay as they are."""
    if isinstance(spec, dict):
        return {k: v if k in ("values", "domain") else in_light(v) for k, v in spec.items()}
    if isinstance(spec, list):
        return [in_light(v) for v in spec]
    if isinstance(spec, str) and spec.startswith("var(--"):
        return _ALL.get(spec[6:-1], (spec, ""))[0]
    return spec


def config() -> dict[str, Any]:
    """Vega-Lite's config: text and lines in the page's colours."""
    words = {"labelColor": var("fg"), "titleColor": var("muted"), "labelFont": FONT, "titleFont": FONT}
    return {
        "background": "transparent",
        "view": {"stroke": None},
        "font": FONT,
        "axis": {
            **words, "domainColor": var("line"), "tickColor": var("line"), "gridColor": var("line"),
            "titleFontWeight": "normal", "labelLimit": 240,
        },
        "legend": {**words, "titleFontWeight": "normal", "symbolStrokeColor": var("line"), "labelLimit": 200},
        "header": words,
        "title": {"color": var("fg"), "subtitleColor": var("muted"), "anchor": "start", "font": FONT},
        "text": {"fill": var("fg"), "font": FONT},
        "rule": {"stroke": var("fg")},
    }  # fmt: skip

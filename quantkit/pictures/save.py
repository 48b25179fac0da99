"""Renders with Vega, by vl-convert (an extra, as squarify is), and writes pictures to files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import OutputError, ToolError
from ..base.outputs import write_bytes

_SUFFIXES = (".svg", ".png")
#: pixels of a PNG per pixel of the chart
_SCALE = 2


def check_suffix(path: Path) -> None:
    """Raise OutputError for a file name without a picture's suffix."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: a picture is an .svg or a .png; give a name that ends so")


def need(*modules: str) -> Any:
    """Import modules of the extra `pictures`, and return the first. Raises ToolError if one is not installed."""
    found = []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ImportError as e:
            raise ToolError(
                f"{e.name or name}, which draws pictures, is not installed; run: pip install 'quantkit[pictures]'"
            ) from None
    return found[0]


def drawing() -> Any:
    """Altair. Raises ToolError if it or vl-convert is not installed."""
    return need("altair", "vl_convert")


def svg(spec: Mapping[str, Any], prefix: str = "") -> str:
    """Render a Vega-Lite spec as SVG, with ids that start with `prefix`. Raises ToolError if vl-convert is not
    installed."""
    return _renumbered(need("vl_convert").vegalite_to_svg(dict(spec)), prefix)


def png(spec: Mapping[str, Any]) -> bytes:
    """Render a Vega-Lite spec as PNG. Raises ToolError if vl-convert is not installed."""
    made: bytes = need("vl_convert").vegalite_to_png(dict(spec), scale=_SCALE)
    return made


def save(chart: Any, path: Path, replace: bool = False) -> None:
    """Write an Altair chart or a spec in the format of the path's suffix. Raises OutputError, ToolError."""
    check_suffix(path)
    spec = chart if isinstance(chart, Mapping) else chart.to_dict()
    data = svg(spec).encode() if path.suffix.lower() == ".svg" else png(spec)
    write_bytes(path, data, replace)


def _renumbered(text: str, prefix: str = "") -> str:
    """Renumber Vega's ids from 0: Vega counts through the process, and the same picture must give the same file. Also
    shorten colours to #rrggbb."""
    numbers: dict[str, int] = {}

    def renumber(m: re.Match[str]) -> str:
        return f"{m[1]}{prefix}{m[2]}{numbers.setdefault(m[2] + m[3], len(numbers))}"

    def in_hex(m: re.Match[str]) -> str:
        return '"#{:02x}{:02x}{:02x}"'.format(*(min(255, int(n)) for n in m.groups()))

    shorter = re.sub(r'"rgb\((\d+), (\d+), (\d+)\)"', in_hex, text)
    return re.sub(r'(id="|url\(#)(gradient_|clip)(\d+)', renumber, shorter)

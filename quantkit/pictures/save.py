"""Vega, by vl-convert, which is an extra with squarify, and the files that pictures become."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import OutputError, ToolError
from ..base.outputs import write_bytes

_SUFFIXES = (".svg", ".png")
#: pixels of a PNG for one of the chart's
_SCALE = 2


def check_suffix(path: Path) -> None:
    """Raises OutputError for a name that does not say what the picture is to be."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: a picture is an .svg or a .png; give a name that ends so")


def need(*modules: str) -> Any:
    """The first of some modules of the extra `pictures`. Raises ToolError where one is not installed."""
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
    """Altair. Raises ToolError where it, or vl-convert, is not installed."""
    return need("altair", "vl_convert")


def svg(spec: Mapping[str, Any], prefix: str = "") -> str:
    """A spec of Vega-Lite as SVG; ids start with `prefix`. Raises ToolError where vl-convert is not installed."""
    return _renumbered(need("vl_convert").vegalite_to_svg(dict(spec)), prefix)


def png(spec: Mapping[str, Any]) -> bytes:
    """A spec of Vega-Lite as PNG. Raises ToolError where vl-convert is not installed."""
    made: bytes = need("vl_convert").vegalite_to_png(dict(spec), scale=_SCALE)
    return made


def save(chart: Any, path: Path, replace: bool = False) -> None:
    """Write a chart of Altair, or a spec, as what the path's suffix says. Raises OutputError, ToolError."""
    check_suffix(path)
    spec = chart if isinstance(chart, Mapping) else chart.to_dict()
    data = svg(spec).encode() if path.suffix.lower() == ".svg" else png(spec)
    write_bytes(path, data, replace)


def _renumbered(text: str, prefix: str = "") -> str:
    """The same with Vega's ids counted from 0: it counts through a process, and a picture made twice is the same.
    Colours are written as #rrggbb, which is shorter."""
    numbers: dict[str, int] = {}

    def renumber(m: re.Match[str]) -> str:
        return f"{m[1]}{prefix}{m[2]}{numbers.setdefault(m[2] + m[3], len(numbers))}"

    def in_hex(m: re.Match[str]) -> str:
        return '"#{:02x}{:02x}{:02x}"'.format(*(min(255, int(n)) for n in m.groups()))

    shorter = re.sub(r'"rgb\((\d+), (\d+), (\d+)\)"', in_hex, text)
    return re.sub(r'(id="|url\(#)(gradient_|clip)(\d+)', renumber, shorter)

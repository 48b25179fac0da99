"""Recipes by size, as bars, with the line of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .figure import Figure, Table, size, spec, unit_of
from .theme import var

#: most bars; recipes larger than this many times the largest of the page's own or the budget are not drawn
_MOST, _FAR = 60, 2


class Rung(NamedTuple):
    """A recipe or a file."""

    name: str
    nbytes: int
    bpw: float | None
    is_given: bool = False
    """whether it is one of the page's own"""
    cache: int = 0
    """bytes of the KV cache"""
    fits: bool | None = None
    """whether it fits completely; None: not asked"""
    says: str = ""
    """how much of it fits, in words"""


class Budget(NamedTuple):
    """The memory there is."""

    text: str
    nbytes: int
    about: str
    """what bars include besides weights, and what is kept free"""


def ladder(rungs: Sequence[Rung], title: str, budget: Budget | None = None) -> Figure:
    """Draw bars from small to large. The table also has the recipes that are too large to draw beside the others."""
    rungs = sorted(rungs, key=lambda r: (r.nbytes, r.name))
    near = _FAR * max([r.nbytes for r in rungs if r.is_given] + ([budget.nbytes] if budget else []), default=0)
    drawn = [r for r in rungs if r.is_given or r.nbytes <= near or not near][:_MOST]
    largest = max([r.nbytes + r.cache for r in drawn] + ([budget.nbytes] if budget else []))
    unit, name = unit_of(largest)
    has_cache = any(r.cache for r in rungs)
    rows = []
    for r in rungs:
        row = [r.name, f"{r.nbytes:,}", size(r.nbytes), "" if r.bpw is None else f"{r.bpw:.2f}"]
        row += [size(r.cache)] if has_cache else []
        row += [r.says or ("" if r.fits is None else "fits" if r.fits else "does not fit")] if budget else []
        rows.append(row)
    head = (
        "recipe",
        "bytes of tensors",
        "",
        "BPW",
        *(("KV cache",) if has_cache else ()),
        *((budget.text,) if budget else ()),
    )
    about = "The recipes by size, those of this page in blue."
    if left := len(rungs) - len(drawn):
        about += " One far larger is in the table only." if left == 1 else f" {left} far larger are in the table only."
    if budget is not None:
        about += f" The line is {budget.text}, {size(budget.nbytes)}; {budget.about}."
    wide, narrow = (_spec(drawn, (unit, name), largest, budget, width) for width in (640, 190))
    return Figure("ladder", title, about, wide, Table(head, rows, (1, 2, 3)), narrow)


def _spec(
    rungs: Sequence[Rung], unit: tuple[int, str], largest: int, budget: Budget | None, width: int
) -> dict[str, Any]:
    values: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for r in rungs:
        said = f", {r.bpw:.2f} BPW" if r.bpw is not None else ""
        words = f"{r.name}\n{r.nbytes:,} bytes = {size(r.nbytes)}{said}" + (f"\n{r.says}" if r.says else "")
        about = {"name": r.name, "words": words}
        start = r.nbytes / unit[0]
        values.append({**about, "from": 0, "to": start, "what": _what(r)})
        if r.cache:
            words = f"{r.name}\nKV cache: {size(r.cache)}"
            values.append(
                {"name": r.name, "words": words, "from": start, "to": start + r.cache / unit[0], "what": "KV cache"}
            )
        text = size(r.nbytes) + (f" · {r.bpw:.2f} BPW" if r.bpw is not None and width > 400 else "")
        text += " · fits" if r.fits else ""
        ends.append({"name": r.name, "at": (r.nbytes + r.cache) / unit[0], "label": text})
    top = largest / unit[0] * (1.32 if width > 400 else 1.75)
    x = {
        "field": "from", "type": "quantitative", "title": unit[1], "scale": {"domain": [0, top], "nice": False},
        "axis": {"tickCount": 6 if width > 400 else 3},
    }  # fmt: skip
    y = {
        "field": "name", "type": "ordinal", "title": None, "sort": None,
        "axis": {"labelLimit": 220 if width > 400 else 110},
    }  # fmt: skip
    kinds = [k for k in ("of this page", "other recipes", "KV cache") if any(v["what"] == k for v in values)]
    colours = {"of this page": var("accent"), "other recipes": var("rest"), "KV cache": var("second")}
    line = [] if budget is None else [{"at": budget.nbytes / unit[0], "words": f"{budget.text}: {size(budget.nbytes)}"}]
    label = {"y": y, "x": {**x, "field": "at"}, "text": {"field": "label"}}
    plain = {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "aria": False}
    bars = {
        "y": y, "x": x, "x2": {"field": "to"}, "description": {"field": "words", "type": "nominal"},
        "color": {
            "field": "what", "type": "nominal", "title": None,
            "scale": {"domain": kinds, "range": [colours[k] for k in kinds]},
            "legend": {"orient": "top", "direction": "vertical" if width < 400 else "horizontal"},
        },
    }  # fmt: skip
    layers: list[dict[str, Any]] = [
        {"data": {"values": values}, "mark": {"type": "bar", "height": {"band": 0.7}}, "encoding": bars},
        {
            "data": {"values": line},
            "mark": {"type": "rule", "stroke": var("bad"), "strokeWidth": 2, "strokeDash": [5, 3]},
            "encoding": {"x": {**x, "field": "at"}, "description": {"field": "words", "type": "nominal"}},
        },
        # drawn twice: a rim in the page's colour keeps it legible on the line
        {
            "data": {"values": ends},
            "mark": {**plain, "stroke": var("bg"), "strokeWidth": 4, "fill": var("bg")}, "encoding": label,
        },
        {"data": {"values": ends}, "mark": {**plain, "fill": var("fg")}, "encoding": label},
    ]  # fmt: skip
    return spec(width, 22 * len(rungs), layer=layers)


def _what(r: Rung) -> str:
    return "of this page" if r.is_given else "other recipes"


def from_size_table(table: Mapping[str, Any], given: Sequence[str]) -> list[Rung]:
    """The rungs of `quantkit sizes table --format json`; those named in `given` count as the page's own."""
    return [Rung(r["recipe"], r["tensor_bytes"], r["bpw"], r["recipe"] in given) for r in table["recipes"]]


def with_fit(rung: Rung, fit: Mapping[str, Any]) -> Rung:
    """A rung with the result of `quantkit fit --json` for its first GPUs."""
    answer = fit["answers"][0]
    whole = answer["whole_layers"]
    fits = whole["output"] and whole["n_layers"] == fit["layers"]
    says = "all layers fit" if fits else f"{whole['n_layers']} of {fit['layers']} whole layers fit"
    split = answer["experts_in_ram"]
    if not fits and split is not None:
        says += f"; or all but the routed experts, with those of {split['n_layers']}"
    return rung._replace(cache=fit["cache_bytes"], fits=fits, says=says)

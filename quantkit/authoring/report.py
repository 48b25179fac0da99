"""Recipes as readable text: tables of recipes, explanations of a tensor's type, and differences of two recipes."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.text import fitting_columns, in_unit, shape_text, table, unit_of, wrapped
from ..model.catalogue import family_of, ranges
from ..recipe.load import Recipe
from .review import Change, Difference, Explanation

#: columns shown in the tables of a difference, for decreasing width
_TENSOR_COLUMNS = (range(7), (0, 1, 2, 3, 5, 6), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 5), (0, 2, 3, 5))
_ROLE_COLUMNS = (range(8), (0, 1, 2, 4, 5), (0, 4, 5, 6, 7))


def recipes_text(recipes: Sequence[Recipe]) -> str:
    """A table of recipes: first those with their own rules, then the mixtures."""
    rows = [[r.name, r.title, r.imatrix if r.imatrix == "required" else "", ", ".join(r.arch)] for r in recipes]
    return table(rows, ["recipe", "title", "imatrix", "for"])


def explanation_text(e: Explanation) -> str:
    """The rules that were tried on a tensor, and the result."""
    t = e.planned.tensor
    where = "" if t.layer is None else f", layer {t.layer}"
    parts = [f"{t.name}  {shape_text(t.shape)}, {t.role}{where}"]
    if e.steps:
        rows = [[s.place, s.match, s.layers or "", s.type, s.outcome] for s in e.steps]
        parts.append(table(rows, ["rule", "match", "layers", "type", "outcome"]))
    parts.append("\n".join([f"-> {e.planned.type}", *(f"   {line}" for line in e.verdict)]))
    return "\n\n".join(parts)


def difference_text(d: Difference, every_tensor: bool = False, width: int | None = None) -> str:
    """The difference of two recipes on a model, by tensor and by role, in lines of at most `width` characters."""
    a, b = d.before, d.after
    about = f"{a.catalogue.model} (layout {a.catalogue.layout}): {a.recipe.name} -> {b.recipe.name}"
    parts = [wrapped(about, width)]
    unit = unit_of(max(a.tensor_bytes, b.tensor_bytes))
    groups: dict[tuple[str, ...], list[Change]] = {}
    for c in d.changes:
        name = c.name if every_tensor else family_of(c.name)
        groups.setdefault((name, c.before.type, c.after.type), []).append(c)
    rows = []
    for (name, before, after), some in groups.items():
        layers = [c.before.tensor.layer for c in some if c.before.tensor.layer is not None]
        shown = name.replace("blk.*.", f"blk.{{{ranges(layers)}}}.") if len(some) > 1 else some[0].name
        nbytes = sum(c.nbytes for c in some)
        sizes = [f"{nbytes:+,}", in_unit(nbytes, unit, sign="+")]
        rows.append([shown, str(len(some)), before, after, *sizes, some[0].after.rule])
    if rows:
        head = ["tensor", "n", a.recipe.name, b.recipe.name, "bytes", unit, "by"]
        parts.append(fitting_columns(rows, head, _TENSOR_COLUMNS, (1, 4, 5), width))
    else:
        parts.append("the same type for every tensor")
    rounded = d.roundings()
    if rounded is not None:
        lines = [
            f"{p.recipe.name}: {', '.join(r) or 'all as ggml does it'}" for p, r in zip((a, b), rounded, strict=True)
        ]
        parts.append("\n".join(["rounded otherwise than by ggml", *(wrapped(f"  {line}", width) for line in lines)]))
    roles = [_role_row(r.role, r.n_elements, r.before, r.after, unit) for r in d.roles]
    roles.append(_role_row("all", a.n_elements, a.tensor_bytes, b.tensor_bytes, unit))
    head = ["role", f"{a.recipe.name}, bytes", f"{b.recipe.name}, bytes", "difference", unit, "%", "bits", "bits"]
    parts.append(fitting_columns(roles, head, _ROLE_COLUMNS, range(1, 8), width))
    return "\n\n".join(parts)


def _role_row(role: str, n: int, before: int, after: int, unit: str) -> list[str]:
    more = after - before
    difference = [f"{more:+,}", in_unit(more, unit, sign="+")] if more else ["=", "="]
    return [
        role, f"{before:,}", f"{after:,}", *difference,
        f"{100 * more / before:+.2f}" if more else "=", f"{8 * before / n:.2f}", f"{8 * after / n:.2f}",
    ]  # fmt: skip

"""Writes a choice of types as an ordinary recipe: few rules, each with the predicted cost of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ...base.errors import InternalCheckError
from ...gguf.types import FILE_TYPES, QTYPES
from ...model.catalogue import Catalogue, Tensor, family_of
from ...planning.mixtures import BASE_TYPES
from ...recipe.named import SCHEMA_LINE


class Cost(NamedTuple):
    """The cost of a tensor."""

    damage: float
    """its share of the predicted KLD, as a fraction of 1"""
    nbytes: int


class _Rule(NamedTuple):
    match: str
    layers: str
    type: str
    tensors: tuple[Tensor, ...]


def recipe_text(
    catalogue: Catalogue, asked: Mapping[str, str], costs: Mapping[str, Cost], head: Mapping[str, str],
    needs_imatrix: bool,
) -> str:  # fmt: skip
    """Return a recipe in YAML that gives each quantizable tensor the type in `asked`.

    `head`: name, title, description, and rounding as YAML, if any; `costs` are for what its rules say in `why`."""
    tensors = [t for t in catalogue.tensors if t.quantizable]
    total = max(1, sum(costs[t.name].nbytes for t in tensors))
    lines = [
        SCHEMA_LINE,
        "# Made by quantkit optimize: the types of least predicted damage within the bytes.",
        f"name: {quoted(head['name'])}",
        f"title: {quoted(head['title'])}",
        f"description: {quoted(head['description'])}",
        f"arch: [{catalogue.arch}]",
        f"file_type: {_file_type(tensors, asked)}",
        f"imatrix: {'required' if needs_imatrix else 'optional'}",
        *([f"rounding: {head['rounding']}"] if "rounding" in head else []),
        "rules:",
    ]
    for rule in _rules(catalogue, tensors, asked):
        damage = sum(costs[t.name].damage for t in rule.tensors)
        nbytes = sum(costs[t.name].nbytes for t in rule.tensors)
        ratio = damage / (nbytes / total) if nbytes else 0.0
        lines.append(f"  - match: {quoted(rule.match)}")
        if rule.layers:
            lines.append(f"    layers: {quoted(rule.layers)}")
        lines.append(f"    type: {rule.type}")
        parts = f"predicted {_percent(damage)} of the damage for {_percent(nbytes / total)} of the bytes"
        why = f"{parts}: {ratio:.2g} x its share"
        lines.append(f"    why: {quoted(why)}")
    return "\n".join(lines) + "\n"


def _rules(catalogue: Catalogue, tensors: Sequence[Tensor], asked: Mapping[str, str]) -> list[_Rule]:
    """Make the rules. Families with the same types in the same layers share them; the most common type of a family
    comes last and names no layers."""
    by_family: dict[str, list[Tensor]] = {}
    for t in tensors:
        by_family.setdefault(family_of(t.name), []).append(t)
    alike: dict[object, list[str]] = {}
    for family, members in by_family.items():
        alike.setdefault(tuple((t.layer, asked[t.name]) for t in members), []).append(family)
    out = []
    for families in alike.values():
        members = by_family[families[0]]
        match = braces(families)
        counts = Counter(asked[t.name] for t in members)
        common = counts.most_common(1)[0][0]
        for first, stop, type_ in _runs(catalogue, members, asked):
            if type_ != common:
                inside = [t for f in families for t in by_family[f] if first <= (t.layer or 0) < stop]
                layers = f"all[{first}]" if stop == first + 1 else f"all[{first}:{stop}]"
                out.append(_Rule(match, layers, type_, tuple(inside)))
        rest = [t for f in families for t in by_family[f] if asked[t.name] == common]
        out.append(_Rule(match, "", common, tuple(rest)))
    return out


def _runs(catalogue: Catalogue, members: Sequence[Tensor], asked: Mapping[str, str]) -> Iterable[tuple[int, int, str]]:
    """Runs of layers with one type: first, last + 1, type. Layers without the tensor do not end a run."""
    ordered = sorted((t for t in members if t.layer is not None), key=lambda t: t.layer or 0)
    runs: list[tuple[int, int, str]] = []
    for t in ordered:
        layer, type_ = t.layer or 0, asked[t.name]
        if runs and runs[-1][2] == type_:
            runs[-1] = (runs[-1][0], layer + 1, type_)
        else:
            runs.append((layer, layer + 1, type_))
    if any(stop > catalogue.n_layers for _, stop, _ in runs):
        raise InternalCheckError(f"{catalogue.model}: a tensor is in a layer beyond its {catalogue.n_layers}")
    return runs


def braces(families: Sequence[str]) -> str:
    """Join globs into one, such as blk.*.{ffn_gate,ffn_up}.weight."""
    if len(families) == 1:
        return families[0]
    prefix = "blk.*." if all(f.startswith("blk.*.") for f in families) else ""
    suffix = ".weight" if all(f.endswith(".weight") for f in families) else ""
    inner = [f.removeprefix(prefix).removesuffix(suffix) for f in families]
    return f"{prefix}{{{','.join(inner)}}}{suffix}"


def _file_type(tensors: Sequence[Tensor], asked: Mapping[str, str]) -> str:
    """The file type whose base type holds most weights."""
    counts: Counter[str] = Counter()
    for t in tensors:
        counts[asked[t.name]] += t.n_elements
    base = counts.most_common(1)[0][0]
    if base in FILE_TYPES and BASE_TYPES.get(base) == base:
        return base
    return next((name for name, of in BASE_TYPES.items() if of == base), "Q4_K_M")


def needs_imatrix(types: Iterable[str]) -> bool:
    """Whether any of these types requires importance."""
    return any(QTYPES[t].needs_imatrix for t in types)


def quoted(text: str) -> str:
    """A YAML string on one line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"

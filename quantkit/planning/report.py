"""Plans and files as text for people and as JSON for scripts. Returns text, never prints.

GiB is 2^30 bytes and GB 10^9, and every table says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.text import bar, fitting_table, in_unit, shape_text, short_size, size, table, table_width, unit_of, wrapped
from ..gguf.header import ARRAY, F32, KV, STRING, TYPE_NAMES, array_head, decode
from ..gguf.types import STORED_TYPES
from ..imatrix.policies import OWN
from ..model.catalogue import ROLES, Catalogue, family_of, ranges
from .gaps import gap_notes, gap_warnings
from .plan import Plan, Planned, missing_note
from .rounding import rounding_notes, rounding_warnings

#: how many characters of a value are shown; the second number is the least in a narrow table
_MAX_VALUE, _SHORTEST_VALUE = 60, 12


def plan_text(
    plan: Plan, files: Sequence[tuple[str, int]], every_tensor: bool = False, width: int | None = None
) -> str:
    """Return a plan as text for people: tensors (one row for the same tensor of several layers), totals by type and by
    role, exact sizes. `files`: (name, bytes) of the output. `width`: the most characters a line may have, None for no
    limit; narrow tables leave out what other parts of the text show."""
    c = plan.catalogue
    parts = [wrapped(headline(plan), width)]
    parts.append(_tensor_table(plan, every_tensor, width))
    parts.append("\n".join(wrapped(line, width) for line in _reasons(plan.tensors)))
    parts.append(_by_type(plan, width))
    parts.append(_by_role(plan, width))
    lines = [f"tensors      {len(plan.tensors)}, {plan.n_elements:,} elements"]
    lines.append(f"tensor data  {size(plan.tensor_bytes)}, {plan.bpw:.2f} BPW")
    if c.kvs_complete:
        total = sum(n for _, n in files)
        lines.append(f"file{'s' if len(files) > 1 else ' '}        {size(total)} in {len(files)}")
        if len(files) > 1:
            said = size if width is None else short_size
            lines += [f"             {name}: {said(n)}" for name, n in files]
    else:
        lines.append(
            "file         not known: the header holds the tokenizer, and it is not here (for R1 it adds 5.2 MB)"
        )
    parts.append("\n".join(wrapped(line, width, " " * 13) for line in lines))
    notes = [f"note: {n}" for n in plan_notes(plan)] + [f"warning: {w}" for w in plan_warnings(plan)]
    if notes:
        parts.append("\n".join(wrapped(line, width) for line in notes))
    return "\n\n".join(parts)


def headline(plan: Plan) -> str:
    """Return which model is built with which recipe."""
    c = plan.catalogue
    layers = f"{c.n_layers} layers: {len(c.dense_layers)} dense, {len(c.moe_layers)} MoE"
    title = f": {plan.recipe.title}" if plan.recipe.title else ""
    return f"{c.model} ({c.arch}, layout {c.layout}, {layers}) as {plan.recipe.name}{title}"


def plan_notes(plan: Plan) -> list[str]:
    """Return what is worth knowing about a plan but no reason to worry."""
    n, which = fallen(plan)
    notes = list(plan.catalogue.notes)
    if n:
        them = f"{n} tensors get" if n > 1 else "1 tensor gets"
        what = "another type than asked, since the rows do not divide into its blocks"
        notes.append(f"{them} {what}: {', '.join(which)}")
    return [*notes, *imatrix_notes(plan), *rounding_notes(plan)]


def fallen(plan: Plan) -> tuple[int, list[str]]:
    """Return how many tensors have another type than asked, and which: 'blk.*.attn_k_b.weight Q6_K -> Q8_0'."""
    fell = [t for t in plan.tensors if t.fell_back]
    return len(fell), sorted({f"{family_of(t.tensor.name)} {t.requested} -> {t.type}" for t in fell})


def imatrix_notes(plan: Plan) -> list[str]:
    """Return the gaps in the importance matrix that do no harm."""
    notes = [*missing_note(plan), *gap_notes(plan.gaps)]
    if plan.applied:
        notes.append(f"where the importance matrix lacks data, by the policy {plan.applied}")
    return notes


def plan_warnings(plan: Plan) -> list[str]:
    """Return what should not go unread: about the recipe's rules, and about gaps in the importance matrix and the
    covariance."""
    return [*plan.warnings, *gap_warnings(plan.gaps), *rounding_warnings(plan)]


def _tensor_table(plan: Plan, every: bool, width: int | None) -> str:
    groups: dict[tuple[Any, ...], list[Planned]] = {}
    for t in plan.tensors:
        about = (family_of(t.tensor.name), t.tensor.shape, t[1:3], t.rule, _weights_from(plan, t), _rounded(plan, t))
        key = (t.tensor.name,) if every else about
        groups.setdefault(key, []).append(t)
    rows = []
    for group in groups.values():
        t = group[0]
        layers = [p.tensor.layer for p in group if p.tensor.layer is not None]
        name = (
            t.tensor.name
            if len(group) == 1
            else t.tensor.name.replace(f"blk.{layers[0]}.", f"blk.{{{ranges(layers)}}}.")
        )
        nbytes = sum(p.nbytes for p in group)
        rule = re.sub(r"^\S+:(\d+) (rules\[\d+\])$", r"\2 :\1", t.rule) or "-"
        rows.append(
            {
                "tensor": name,
                "n": str(len(group)),
                "shape (ne)": shape_text(t.tensor.shape),
                "type": t.type,
                "asked": t.requested if t.fell_back else "",
                "bytes": f"{nbytes:,}",
                "size": short_size(nbytes),
                "imatrix": _weights_from(plan, t),
                "rounding": _rounded(plan, t),
                "rule :line": rule,
                "rule": _short_rule(rule),
            }
        )
    choices = _TENSOR_COLUMNS if plan.rounding is None else [(*c[:-1], "rounding", c[-1]) for c in _TENSOR_COLUMNS]
    enough = len(choices[-2]) if width is not None and width >= _USUAL_WIDTH else 0
    return fitting_table(rows, choices, ("n", "bytes", "size", "rule"), width, enough)


def _short_rule(rule: str) -> str:
    """Shorten a rule's place: 'rules[7] :36' to '7', '--type GLOB=TYPE' to '--type', a mixture's place to 'mix'."""
    number = re.fullmatch(r"rules\[(\d+)\] :\d+", rule)
    if number is not None:
        return number[1]
    return "mix" if rule.endswith(" otherwise") else re.split(r"[ \[]", rule)[0]


#: the tables' columns, the widest choice first; the narrowest may still have to wrap
_TENSOR_COLUMNS = (
    ("tensor", "n", "shape (ne)", "type", "asked", "bytes", "imatrix", "rule :line"),
    ("tensor", "n", "shape (ne)", "type", "asked", "size", "imatrix", "rule"),
    ("tensor", "n", "shape (ne)", "type", "size", "rule"),
    ("tensor", "n", "type", "size"),
)
#: from this width (characters) on, tables show the tensors' shapes and wrap names where they must
_USUAL_WIDTH = 72
_SHARE_COLUMNS = (
    ("tensors", "elements", "%", "bytes", "size", "% of file", "bits"),
    ("tensors", "elements", "%", "size", "% of file", "bits"),
    ("tensors", "size", "% of file", "bits"),
    ("size", "% of file"),
)


def _rounded(plan: Plan, t: Planned) -> str:
    return "" if plan.rounding is None else plan.rounding.shown(t.tensor.name)


def _weights_from(plan: Plan, t: Planned) -> str:
    """Describe how the importance matrix affects a tensor and what a policy gives: 'used, 1 sibling, 2 prior of 16'."""
    said = [str(t.imatrix_status)]
    origin = plan.origins.get(t.tensor.name)
    if origin is not None:
        counts = {source: n for source, n in origin.counts().items() if source != OWN}
        of = f" of {len(origin.sources)}" if len(origin.sources) > 1 else ""
        said += [f"{n} {source}{of}" for source, n in counts.items()]
    if t.tensor.name in plan.raised:
        said.append("raised")
    return ", ".join(said)


def _reasons(tensors: Sequence[Planned]) -> list[str]:
    reasons: dict[str, str] = {}
    for t in tensors:
        if t.rule and not t.fell_back:
            reasons.setdefault(t.rule, f"{t.type}: {t.why}")
    return [f"{rule}  {why}" for rule, why in reasons.items()]


def _by_type(plan: Plan, width: int | None) -> str:
    rows = []
    for name in plan.types():
        rows.append(_share_row("type", name, [t for t in plan.tensors if t.type == name], plan))
    return _share_table("type", rows, plan, width)


def _by_role(plan: Plan, width: int | None) -> str:
    rows = []
    for role in ROLES:
        of = [t for t in plan.tensors if t.tensor.role == role]
        if of:
            rows.append(_share_row("role", role, of, plan) | {"": bar(sum(t.nbytes for t in of) / plan.tensor_bytes)})
    return _share_table("role", rows, plan, width)


def _share_table(kind: str, rows: Sequence[Mapping[str, str]], plan: Plan, width: int | None) -> str:
    unit = unit_of(plan.tensor_bytes)
    named = [{unit if key == "size" else key: cell for key, cell in row.items()} for row in rows]
    bars = [""] if "" in rows[0] else []
    choices = [(kind, *(unit if name == "size" else name for name in names)) for names in _SHARE_COLUMNS]
    return fitting_table(named, [*((*c, *bars) for c in choices), choices[-1]], choices[0][1:], width)


def _share_row(kind: str, name: str, of: Sequence[Planned], plan: Plan) -> dict[str, str]:
    elements, nbytes = sum(t.tensor.n_elements for t in of), sum(t.nbytes for t in of)
    return {
        kind: name,
        "tensors": str(len(of)),
        "elements": f"{elements:,}",
        "%": f"{100 * elements / plan.n_elements:.2f}",
        "bytes": f"{nbytes:,}",
        "size": in_unit(nbytes, unit_of(plan.tensor_bytes)),
        "% of file": f"{100 * nbytes / plan.tensor_bytes:.2f}",
        "bits": f"{8 * nbytes / elements:.2f}",
    }


# ---------------------------------------------------------------- inspect


def value_text(item: KV) -> str:
    """Return a key's value as text, cut to one line."""
    if item.type == ARRAY:
        element, count = array_head(item)
        if count <= 8 and element != "arr":
            return f"{decode(item)}"
        return f"[{count:,} x {element}]"
    value = decode(item)
    text = repr(value) if item.type == STRING else f"{value:.7g}" if item.type == F32 else str(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def inspection(catalogue: Catalogue, stored: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return what a source holds, as plain values. `stored`: dtype -> (tensors, bytes) as stored in its files."""
    c = catalogue
    tensors = [
        {
            "name": t.name,
            "shape": list(t.shape),
            "type": t.source_type,
            "bytes": STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows,
            "role": t.role,
        }
        for t in c.tensors
    ]
    return {
        "model": c.model,
        "arch": c.arch,
        "layout": c.layout,
        "layers": c.n_layers,
        **({"commit": c.commit} if c.commit else {}),
        "files": list(paths),
        "stored": {k: {"tensors": n, "bytes": b} for k, (n, b) in stored.items()},
        "metadata": [{"key": i.key, "type": TYPE_NAMES[i.type], "value": value_text(i)} for i in c.kvs],
        "tensors": tensors,
        "elements": sum(t.n_elements for t in c.tensors),
        "notes": list(c.notes),
    }


def inspection_text(found: Mapping[str, Any], every_tensor: bool, width: int | None = None) -> str:
    """Return an inspection as text for people, in lines of at most `width` characters."""
    about = (
        f"{found['model']}: {found['arch']}, layout {found['layout']}, {found['layers']} layers, "
        f"{len(found['tensors'])} tensors, {found['elements']:,} elements"
    )
    parts = [wrapped(about, width)]
    stored = found["stored"]
    total = sum(v["bytes"] for v in stored.values())
    unit = unit_of(total)
    rows = [[k, str(v["tensors"]), f"{v['bytes']:,}", in_unit(v["bytes"], unit)] for k, v in stored.items()]
    rows.append(["all", str(sum(v["tensors"] for v in stored.values())), f"{total:,}", in_unit(total, unit)])
    files = found["files"]
    where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
    parts.append(wrapped(f"stored in {len(files)} file{'s' * (len(files) != 1)}: {where}", width))
    parts.append(table(rows, ["stored as", "tensors", "bytes", unit], (1, 2, 3), width))
    parts.append(_metadata(found["metadata"], width))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for t in found["tensors"]:
        key = (t["name"],) if every_tensor else (family_of(t["name"]), tuple(t["shape"]), t["type"])
        groups.setdefault(key, []).append(t)
    tensors = []
    for key, group in groups.items():
        layers = [int(m[1]) for t in group if (m := re.match(r"blk\.(\d+)\.", t["name"]))]
        name = key[0].replace("blk.*.", f"blk.{{{ranges(layers)}}}.") if len(group) > 1 else group[0]["name"]
        nbytes = sum(t["bytes"] for t in group)
        tensors.append(
            {
                "tensor": name, "n": str(len(group)), "shape (ne)": shape_text(group[0]["shape"]),
                "type": group[0]["type"], "bytes": f"{nbytes:,}", "size": short_size(nbytes), "role": group[0]["role"],
            }
        )  # fmt: skip
    enough = len(_INSPECTED[-2]) if width is not None and width >= _USUAL_WIDTH else 0
    parts.append(fitting_table(tensors, _INSPECTED, ("n", "bytes", "size"), width, enough))
    if found["notes"]:
        parts.append("\n".join(wrapped(f"note: {n}", width) for n in found["notes"]))
    return "\n\n".join(parts)


#: columns of the table of an inspection's tensors, the widest choice first
_INSPECTED = (
    ("tensor", "n", "shape (ne)", "type", "bytes", "role"),
    ("tensor", "n", "shape (ne)", "type", "size", "role"),
    ("tensor", "n", "shape (ne)", "type", "size"),
    ("tensor", "n", "type", "size"),
)


def _metadata(items: Sequence[Mapping[str, str]], width: int | None) -> str:
    """Return a table of keys, types and values; values are cut where space is short."""
    rows = [[m["key"], m["type"], m["value"]] for m in items]
    head = ["key", "type", "value"]
    over = 0 if width is None else table_width([head, *rows]) - width
    if over > 0:
        room = max(_SHORTEST_VALUE, max(len(row[2]) for row in rows) - over)
        rows = [[*row[:2], row[2] if len(row[2]) <= room else f"{row[2][: room - 1]}…"] for row in rows]
    return table(rows, head, (), width)

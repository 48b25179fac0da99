"""Plans and files as text for people and as JSON for scripts. Returns text, never prints.

GiB is 2^30 bytes and GB 10^9, and every table says which.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.text import GIB, gib, shape_text, size, table
from ..gguf.header import ARRAY, F32, KV, STRING, TYPE_NAMES, array_head, decode
from ..gguf.types import STORED_TYPES
from ..model.catalogue import ROLES, Catalogue, family_of, ranges
from .fit import Answer, Fit, PlacedBytes
from .gaps import gap_notes, gap_warnings
from .plan import ImatrixStatus, Plan, Planned

_MAX_VALUE = 60


def plan_text(plan: Plan, files: Sequence[tuple[str, int]], every_tensor: bool = False) -> str:
    """A plan for people: tensors (alike ones of several layers in one row), totals by type and by role,
    exact sizes. `files`: (name, bytes) of the output."""
    c = plan.catalogue
    head = (
        f"{c.model} ({c.arch}, layout {c.layout}, {c.n_layers} layers: {len(c.dense_layers)} dense, "
        f"{len(c.moe_layers)} MoE) as {plan.recipe.name}"
    )
    parts = [head + (f": {plan.recipe.title}" if plan.recipe.title else "")]
    parts.append(_tensor_table(plan.tensors, every_tensor))
    parts.append(_reasons(plan.tensors))
    parts.append(_by_type(plan))
    parts.append(_by_role(plan))
    lines = [f"tensors      {len(plan.tensors)}, {plan.n_elements:,} elements"]
    lines.append(f"tensor data  {size(plan.tensor_bytes)}, {plan.bpw:.2f} BPW")
    if c.kvs_complete:
        total = sum(n for _, n in files)
        lines.append(f"file{'s' if len(files) > 1 else ' '}        {size(total)} in {len(files)}")
        if len(files) > 1:
            lines += [f"             {name}: {size(n)}" for name, n in files]
    else:
        lines.append(
            "file         not known: the tokenizer is not, and its tokens are part of the header (R1's: 5.2 MB)"
        )
    parts.append("\n".join(lines))
    fell = [t for t in plan.tensors if t.fell_back]
    notes = [f"note: {n}" for n in c.notes]
    if fell:
        notes.append(
            f"note: {len(fell)} tensors got another type than asked, since their rows do not divide into its blocks: "
            + ", ".join(sorted({f"{family_of(t.tensor.name)} {t.requested} -> {t.type}" for t in fell}))
        )
    missing = [t for t in plan.tensors if t.imatrix == ImatrixStatus.MISSING]
    if missing:
        names = ", ".join(sorted({family_of(t.tensor.name) for t in missing}))
        notes.append(f"note: {len(missing)} tensors have no entry in the importance matrix, and do without: {names}")
    notes += [f"note: {n}" for n in gap_notes(plan.gaps)]
    notes += [f"warning: {w}" for w in (*plan.warnings, *gap_warnings(plan.gaps))]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _tensor_table(tensors: Sequence[Planned], every: bool) -> str:
    groups: dict[tuple[Any, ...], list[Planned]] = {}
    for t in tensors:
        key = (t.tensor.name,) if every else (family_of(t.tensor.name), t.tensor.shape, t[1:3], t.rule, t.imatrix)
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
        asked = t.requested if t.fell_back else ""
        nbytes = sum(p.nbytes for p in group)
        rule = re.sub(r"^\S+:(\d+) (rules\[\d+\])$", r"\2 :\1", t.rule) or "-"
        rows.append([name, str(len(group)), shape_text(t.tensor.shape), t.type, asked, f"{nbytes:,}", t.imatrix, rule])
    head = ["tensor", "n", "shape (ne)", "type", "asked", "bytes", "imatrix", "rule :line"]
    return table(rows, head, right=(1, 5))


def _reasons(tensors: Sequence[Planned]) -> str:
    reasons: dict[str, str] = {}
    for t in tensors:
        if t.rule and not t.fell_back:
            reasons.setdefault(t.rule, f"{t.type}: {t.why}")
    return "\n".join(f"{rule}  {why}" for rule, why in reasons.items())


def _by_type(plan: Plan) -> str:
    rows = []
    for name, n in plan.types().items():
        of = [t for t in plan.tensors if t.type == name]
        elements, nbytes = sum(t.tensor.n_elements for t in of), sum(t.nbytes for t in of)
        rows.append(_share_row(name, n, elements, nbytes, plan))
    return table(rows, ["type", "tensors", "elements", "%", "bytes", "GiB", "% of file", "bits"], right=range(1, 8))


def _by_role(plan: Plan) -> str:
    rows = []
    for role in ROLES:
        of = [t for t in plan.tensors if t.tensor.role == role]
        if of:
            elements, nbytes = sum(t.tensor.n_elements for t in of), sum(t.nbytes for t in of)
            rows.append(_share_row(role, len(of), elements, nbytes, plan))
    return table(rows, ["role", "tensors", "elements", "%", "bytes", "GiB", "% of file", "bits"], right=range(1, 8))


def _share_row(name: str, n: int, elements: int, nbytes: int, plan: Plan) -> list[str]:
    return [
        name, str(n), f"{elements:,}", f"{100 * elements / plan.n_elements:.2f}", f"{nbytes:,}", gib(nbytes),
        f"{100 * nbytes / plan.tensor_bytes:.2f}", f"{8 * nbytes / elements:.2f}",
    ]  # fmt: skip


# ---------------------------------------------------------------- inspect


def value_text(item: KV) -> str:
    """A key's value, cut to a line."""
    if item.type == ARRAY:
        element, count = array_head(item)
        if count <= 8 and element != "arr":
            return f"{decode(item)}"
        return f"[{count:,} x {element}]"
    value = decode(item)
    text = repr(value) if item.type == STRING else f"{value:.7g}" if item.type == F32 else str(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def inspection(catalogue: Catalogue, stored: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """What a source holds, as plain values. `stored`: dtype -> (tensors, bytes) as its files have them."""
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
        "files": list(paths),
        "stored": {k: {"tensors": n, "bytes": b} for k, (n, b) in stored.items()},
        "metadata": [{"key": i.key, "type": TYPE_NAMES[i.type], "value": value_text(i)} for i in c.kvs],
        "tensors": tensors,
        "elements": sum(t.n_elements for t in c.tensors),
        "notes": list(c.notes),
    }


def inspection_text(found: Mapping[str, Any], every_tensor: bool) -> str:
    """An inspection for people."""
    parts = [
        f"{found['model']}: {found['arch']}, layout {found['layout']}, {found['layers']} layers, "
        f"{len(found['tensors'])} tensors, {found['elements']:,} elements"
    ]
    stored = found["stored"]
    rows = [[k, str(v["tensors"]), f"{v['bytes']:,}", gib(v["bytes"])] for k, v in stored.items()]
    total = sum(v["bytes"] for v in stored.values())
    rows.append(["all", str(sum(v["tensors"] for v in stored.values())), f"{total:,}", gib(total)])
    files = found["files"]
    where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
    parts.append(f"stored in {len(files)} file{'s' * (len(files) != 1)}: {where}")
    parts.append(table(rows, ["stored as", "tensors", "bytes", "GiB"], right=(1, 2, 3)))
    parts.append(table([[m["key"], m["type"], m["value"]] for m in found["metadata"]], ["key", "type", "value"]))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for t in found["tensors"]:
        key = (t["name"],) if every_tensor else (family_of(t["name"]), tuple(t["shape"]), t["type"])
        groups.setdefault(key, []).append(t)
    rows = []
    for key, group in groups.items():
        layers = [int(m[1]) for t in group if (m := re.match(r"blk\.(\d+)\.", t["name"]))]
        name = key[0].replace("blk.*.", f"blk.{{{ranges(layers)}}}.") if len(group) > 1 else group[0]["name"]
        nbytes = sum(t["bytes"] for t in group)
        rows.append(
            [name, str(len(group)), shape_text(group[0]["shape"]), group[0]["type"], f"{nbytes:,}", group[0]["role"]]
        )
    parts.append(table(rows, ["tensor", "n", "shape (ne)", "type", "bytes", "role"], right=(1, 4)))
    if found["notes"]:
        parts.append("\n".join(f"note: {n}" for n in found["notes"]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- fit


def fit_text(w: PlacedBytes, answers: Sequence[Answer], about: str, ram: int | None) -> str:
    """What fits on GPUs, for people. `about`: the context and its cache in words. `ram`: bytes there are, or None."""
    n_moe = sum(1 for x in w.layers if x.experts)
    of = f" as {w.recipe}" if w.recipe else ""
    parts = [
        f"{w.model}{of}: {size(w.tensor_bytes)}, {w.n_layers} layers and the output head\n"
        f"{about}: {gib(sum(x.cache for x in w.layers))} GiB; each GPU of N GB taken as N GiB"
    ]
    rows = []
    for a in answers:
        row = [a.gpus.text, f"{a.rule} of {w.n_layers}", f"{a.whole.n_layers} of {w.n_layers}", *_fit_cells(a.whole)]
        if n_moe:
            row += ["no room", "", ""] if a.split is None else [f"{a.split.n_layers} of {n_moe}", *_fit_cells(a.split)]
        rows.append(row)
    head = ["VRAM", "published rule", "whole layers", "GPU GiB", "RAM GiB"]
    if n_moe:
        head += ["or experts of", "GPU GiB", "RAM GiB"]
    parts.append(table(rows, head, right=(0, 3, 4, 6, 7)[: 5 if n_moe else 3]))
    for a in answers:
        lines = [f"{a.gpus.text}: whole layers{_ram_text(a.whole, ram)}", f"  {shlex.join(a.whole.flags)}"]
        if a.split is None and n_moe:
            base = sum(x.rest + x.cache for x in w.layers)
            lines.append(
                f"{a.gpus.text}: no room for all but routed experts: with the KV cache that is {base / GIB:,.1f} GiB; "
                "take a shorter --ctx, or a smaller --cache-type or --reserve"
            )
        elif a.split is not None and not (a.whole.n_layers == w.n_layers and a.split.n_layers == n_moe):
            lines += [
                f"{a.gpus.text}: all but routed experts, and experts of {a.split.n_layers} of {n_moe} layers"
                + _ram_text(a.split, ram),
                f"  {shlex.join(a.split.flags)}",
            ]
        if a.note:
            lines.append(f"  note: {a.note}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _fit_cells(f: Fit) -> list[str]:
    used = [f"{n / GIB:,.1f}" for n in f.used]
    text = " + ".join(used) if len(used) < 3 else f"{len(used)} of {min(f.used) / GIB:,.1f} to {max(f.used) / GIB:,.1f}"
    return [text, f"{f.ram / GIB:,.1f}"]


def _ram_text(f: Fit, ram: int | None) -> str:
    if ram is None:
        return f"; {f.ram / GIB:,.1f} GiB stay in RAM"
    if f.ram <= ram:
        return f"; the other {f.ram / GIB:,.1f} GiB fit in RAM"
    over = (f.ram - ram) / GIB
    return f"; {f.ram / GIB:,.1f} GiB are left, {over:,.1f} more than RAM has: read from disk (mmap) as needed"

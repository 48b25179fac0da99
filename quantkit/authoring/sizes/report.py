"""Reports changes in sizes as text, JSON, Markdown, GitHub workflow commands and JUnit XML; formats the size table.

Returns text, never prints. GiB is 2^30 bytes and GB 10^9, and every table says which.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.text import DECIMAL, in_unit, markdown_table, size, table, unit_of
from ...model.catalogue import ROLES
from .compare import Change, ChangeStatus, Comparison, Move, SizeRow
from .lock import Key

FORMATS = ("text", "json", "markdown", "github", "junit")
#: GitHub shows no more annotations per step; the log and the summary have them all
_MAX_ANNOTATIONS = 10
_REDO = "if it was meant, run `quantkit sizes update` and commit the lock"


def render(comparison: Comparison, form: str, when: str) -> str:
    """Format a comparison in one of `FORMATS`. `when`: UTC as YYYY-MM-DDTHH:MM:SS, for JUnit."""
    if form == "json":
        return json.dumps(to_json(comparison), indent=1, ensure_ascii=False)
    if form == "junit":
        return junit(comparison, when)
    return {"markdown": markdown, "github": github}.get(form, text)(comparison)


def _count(n: int) -> str:
    return f"{n} size{'s' * (n != 1)}"


def _unread(c: Comparison) -> str:
    more = f" (and {len(c.broken) - 1} more)" if len(c.broken) > 1 else ""
    return f"{c.broken[0].what}{more} cannot be read"


def verdict(c: Comparison) -> str:
    """The comparison in one sentence."""
    if c.broken and not c.changes:
        return f"nothing compared: {_unread(c)}"
    tolerated = sum(x.status == ChangeStatus.TOLERATED for x in c.changes)
    within = f", {tolerated} within the tolerance of {float(100 * c.tolerance):g} %" if tolerated else ""
    unread = f"; {_count(c.n_skipped)} not compared: {_unread(c)}" if c.broken else ""
    if not c.drifted:
        return f"{_count(len(c.changes))} as in {c.file}{within}{unread}"
    return f"{len(c.drifted)} of {_count(len(c.changes))} drifted from {c.file}{within}{unread}; {_REDO}"


# ---------------------------------------------------------------- a change in words


def signed(n: int) -> str:
    return f"{n:+,}" if n else "0"


def _percent(change: Change) -> str:
    if change.before is None or change.after is None or not change.before.tensor_bytes:
        return ""
    share = 100 * change.delta / change.before.tensor_bytes
    return f"{share:+.3f} %" if abs(share) >= 0.001 or not share else f"{share:+.1g} %"


def _bytes(nbytes: int) -> str:
    return size(nbytes)


def headline(change: Change) -> str:
    """A change in one line: size before and now."""
    before, after = change.before, change.after
    if change.status == ChangeStatus.NEW and after is not None:
        return "new" if after.error else f"new: {_bytes(after.tensor_bytes)}"
    if change.status == ChangeStatus.VANISHED and before is not None:
        return "vanished" if before.error else f"vanished: {_bytes(before.tensor_bytes)} before"
    if change.status in (ChangeStatus.FAILED, ChangeStatus.PLANNED) or before is None or after is None:
        said = {ChangeStatus.FAILED: "cannot be planned", ChangeStatus.PLANNED: "can be planned now"}
        return said.get(change.status, change.status)
    if before.tensor_bytes == after.tensor_bytes:
        return f"{change.status}: {_bytes(after.tensor_bytes)} as before, otherwise made up"
    return (
        f"{change.status}: {before.tensor_bytes:,} -> {after.tensor_bytes:,} bytes "
        f"({signed(change.delta)}, {_percent(change)})"
    )


def move_text(move: Move) -> str:
    """blk.{3-8}.ffn_down_exps.weight: IQ2_XXS -> Q2_K, +1,234 bytes, by UD-IQ1_S.yaml:51 rules[9]"""
    if move.before is None:
        what = f"new, {move.after}"
    elif move.after is None:
        what = f"vanished, was {move.before}"
    else:
        what = f"{move.before} -> {move.after}"
    parts = [f"{move.tensors}: {what}"]
    if move.nbytes is not None:
        parts.append(f"{signed(move.nbytes)} bytes")
    if move.rule:
        parts.append(f"by {move.rule}")
    elif move.after is not None:
        parts.append("by no rule: never quantized")
    return ", ".join(parts)


def _role_lines(change: Change) -> list[str]:
    if change.before is None or change.after is None:
        return []
    was, now = change.before.roles, change.after.roles
    roles = [r for r in (*ROLES, *sorted((was.keys() | now.keys()) - set(ROLES))) if was.get(r, 0) != now.get(r, 0)]
    return [
        f"{r}: {was.get(r, 0):,} -> {now.get(r, 0):,} bytes ({signed(now.get(r, 0) - was.get(r, 0))})" for r in roles
    ]


def details(change: Change) -> list[str]:
    """The lines below a headline: reason, changes by role, changes by group of tensors."""
    own = change.detail.splitlines() if change.detail else []
    return [*own, *_role_lines(change), *map(move_text, change.moves)]


def text(c: Comparison) -> str:
    """A comparison as readable text; unchanged cells are only counted."""
    parts = [
        "\n".join([f"{b.what}: cannot be read", *(f"  {line}" for line in str(b.error).split("\n"))]) for b in c.broken
    ]
    for change in c.changes:
        if change.status != ChangeStatus.SAME:
            parts.append("\n".join([f"{change.key}: {headline(change)}", *(f"  {line}" for line in details(change))]))
    return "\n\n".join([*parts, verdict(c)])


def to_json(c: Comparison) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "lock": c.file,
        "tolerance_percent": float(100 * c.tolerance),
        "drifted": len(c.drifted),
        "not_compared": c.n_skipped,
        "broken": [{"what": b.what, "file": b.file or None, "error": str(b.error)} for b in c.broken],
        "cells": [
            {
                **x.key.model_dump(),
                "status": x.status,
                "before": x.before.model_dump(exclude={"cell", "tensors"}) if x.before else None,
                "after": x.after.model_dump(exclude={"cell", "tensors"}) if x.after else None,
                "delta_bytes": x.delta if x.before and x.after else None,
                "detail": x.detail,
                "moves": [m._asdict() for m in x.moves],
            }
            for x in c.changes
        ],
    }


# ---------------------------------------------------------------- Markdown, for a comment


def _code(line: str) -> str:
    """Format a line as Markdown code, whatever backticks it contains."""
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown(c: Comparison) -> str:
    """A comparison as a table, with the changes below."""
    changed = [x for x in c.changes if x.status != ChangeStatus.SAME]
    parts = ["### quantkit sizes", verdict(c)]
    for b in c.broken:
        lines = [f"- {_code(line)}" for line in str(b.error).split("\n")]
        parts.append("\n".join([f"**{_code(b.what)}** cannot be read", "", *lines]))
    if changed:
        head = ["recipe", "model", "layout", "", "bytes before", "bytes now", "difference", "%"]
        rows = [
            [
                *(x.key.recipe, x.key.model, x.key.layout, x.status),
                f"{x.before.tensor_bytes:,}" if x.before and not x.before.error else "",
                f"{x.after.tensor_bytes:,}" if x.after and not x.after.error else "",
                signed(x.delta) if x.before and x.after else "",
                _percent(x).removesuffix(" %"),
            ]
            for x in changed
        ]
        parts.append(markdown_table(rows, head, right=range(4, 8)))
    for x in changed:
        lines = details(x)
        if lines:
            parts.append("\n".join([f"**{_code(str(x.key))}**", "", *(f"- {_code(line)}" for line in lines)]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- GitHub workflow commands


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def command(kind: str, properties: Mapping[str, str], message: str) -> str:
    """::kind a=b,c=d::message, escaped as GitHub's workflow commands are."""
    given = ",".join(f"{k}={_property(v)}" for k, v in properties.items() if v)
    return f"::{kind}{' ' if given else ''}{given}::{_data(message)}"


_PLACE = re.compile(r"(.+?):(\d+)(?=[: ]|$)")


def _at(text: str, file: str) -> tuple[str, str]:
    """(file, line) of a text that begins with FILE:LINE, if FILE is `file` or next to it; else line 1 of `file`."""
    m = _PLACE.match(text)
    if m:
        named = Path(file).with_name(Path(m[1]).name)
        if named.is_file():
            return named.as_posix(), m[2]
    return file, "1"


def _annotated(change: Change, lock: str) -> tuple[str, str]:
    """(file, line) for a change's annotation: the rule of the largest move, else the lock."""
    ruled = [m for m in change.moves if m.rule]
    if ruled and change.file:
        return _at(max(ruled, key=lambda m: abs(m.nbytes or 0)).rule, change.file)
    if change.status != ChangeStatus.VANISHED and change.file:
        return _at(change.detail, change.file)
    return lock, ""


def in_repository(file: str) -> str:
    """Convert a path from the current directory to one from the repository's root, as GitHub's annotations need:
    $GITHUB_WORKSPACE, else the nearest folder with .git, else the current directory."""
    path = Path(os.path.realpath(file))
    workspace = os.environ.get("GITHUB_WORKSPACE")
    roots = [Path(os.path.realpath(workspace))] if workspace else []
    roots += [folder for folder in path.parents if (folder / ".git").exists()]
    return next((path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)), file)


def github(c: Comparison) -> str:
    """Workflow commands that annotate unreadable files and the rules that moved sizes, and the text for the log."""
    found: list[tuple[str, tuple[str, str], str, str]] = []
    for b in c.broken:
        for line in str(b.error).split("\n"):
            found.append(("error", _at(line, b.file) if b.file else (c.file, ""), b.what, line))
    kinds = [("error", x) for x in c.drifted] + [
        ("warning", x) for x in c.changes if x.status == ChangeStatus.TOLERATED
    ]
    for kind, x in kinds:
        found.append((kind, _annotated(x, c.file), str(x.key), "\n".join([headline(x), *details(x)])))
    out = [
        command(kind, {"file": in_repository(file), "line": line, "title": f"sizes: {what}"}, body)
        for kind, (file, line), what, body in found
    ]
    hidden = sum(kind == "error" for kind, *_ in found) - _MAX_ANNOTATIONS
    if hidden > 0:
        out.append(f"GitHub shows {_MAX_ANNOTATIONS} annotations a step: {hidden} more are in this log and the summary")
    return "\n".join([*out, verdict(c)])


# ---------------------------------------------------------------- JUnit


_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(c: Comparison, when: str) -> str:
    """One testcase per cell, in the format of Ant's JUnit task, which CI systems read."""
    from xml.etree import ElementTree as Xml

    def clean(value: str) -> str:
        return _NOT_XML.sub("\ufffd", value)

    root = Xml.Element("testsuites")
    facts = {"name": "quantkit sizes", "package": "quantkit", "id": "0", "timestamp": when, "hostname": "localhost"}
    n = len(c.changes) + len(c.broken)
    counts = {"tests": n, "failures": len(c.drifted), "errors": len(c.broken), "skipped": 0}
    suite = Xml.SubElement(root, "testsuite", facts | {k: str(n) for k, n in counts.items()} | {"time": "0"})
    properties = Xml.SubElement(suite, "properties")
    for name, value in (("lock", c.file), ("tolerance", f"{float(100 * c.tolerance):g} %")):
        Xml.SubElement(properties, "property", {"name": name, "value": clean(value)})
    for b in c.broken:
        named = {"name": "can be read", "classname": clean(f"sizes.{b.what}"), "time": "0"}
        message = clean(str(b.error))
        error = Xml.SubElement(Xml.SubElement(suite, "testcase", named), "error", {"type": type(b.error).__name__})
        error.set("message", message.partition("\n")[0])
        error.text = message
    for x in c.changes:
        name = f"{x.key.model} ({x.key.layout})"
        case = Xml.SubElement(
            suite, "testcase", {"name": clean(name), "classname": clean(f"sizes.{x.key.recipe}"), "time": "0"}
        )
        if x.drifted:
            failure = Xml.SubElement(case, "failure", {"type": x.status, "message": clean(headline(x))})
            failure.text = clean("\n".join(details(x)))
    Xml.SubElement(suite, "system-out").text = clean(text(c))
    Xml.SubElement(suite, "system-err")
    Xml.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(root, encoding="unicode")


# ---------------------------------------------------------------- the size table


def size_table(model: str, layout: str, found: Sequence[SizeRow], notes: Sequence[str], form: str) -> str:
    """The size table of a model as text, Markdown or JSON."""
    if form == "json":
        values = [{**r._asdict(), "bpw": round(r.bpw, 4), "bits": r.bits and round(r.bits, 4)} for r in found]
        return json.dumps({"model": model, "layout": layout, "recipes": values, "notes": list(notes)}, indent=1)
    roles = {r.role for r in found if r.role}
    bits = f"bits of {roles.pop()}s" if len(roles) == 1 else "bits"
    unit = unit_of(max((r.tensor_bytes for r in found), default=0))
    decimal = DECIMAL[unit]
    head = ["recipe", "title", "tensor data, bytes", unit, decimal, "BPW", bits.replace("dense ffns", "the ffn")]
    rows = [
        [
            *(r.recipe, r.title, f"{r.tensor_bytes:,}", in_unit(r.tensor_bytes, unit, 2)),
            *(in_unit(r.tensor_bytes, decimal, 2), f"{r.bpw:.2f}", "" if r.bits is None else f"{r.bits:.2f}"),
        ]
        for r in found
    ]
    lines = [f"note: {n}" for n in notes]
    if form == "markdown":
        grid = [markdown_table(rows, head, right=range(2, 7))]
    else:
        grid = [f"{model} ({layout})", "", table(rows, head, right=range(2, 7))]
    return "\n".join([*grid, *(["", *lines] if lines else [])])


def updated(path: Path, before: Mapping[Key, Any] | None, after: Mapping[Key, Any]) -> str:
    """The result of `sizes update` in one sentence."""
    if before is None:
        return f"{path}: {_count(len(after))} written"
    same = sum(before.get(k) == v for k, v in after.items())
    new = len(after.keys() - before.keys())
    gone = len(before.keys() - after.keys())
    return f"{path}: {_count(len(after))}: {same} as before, {len(after) - same - new} moved, {new} new, {gone} gone"

"""A self-contained HTML page of figures: it needs no other file, no host, no library.

The pictures are SVG, made with the page. A small script shows the words of a mark that is pointed at or reached with
the arrow keys. A content security policy in the page keeps browsers from contacting any host and from running any other
script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from ..base.version import __version__
from .figure import Figure, Table
from .save import svg
from .theme import css


class Section(NamedTuple):
    """A part of a page, about one file or recipe."""

    title: str
    facts: Sequence[tuple[str, str]]
    figures: Sequence[Figure]
    notes: Sequence[str] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """Make the page. Raises ToolError if vl-convert is not installed."""
    script = files(__package__).joinpath("page.js").read_text("utf-8")
    style = css() + files(__package__).joinpath("page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    body, links, n = [], [], 0
    for i, section in enumerate(sections):
        links.append(f'<li><a href="#s{i}">{escape(section.title)}</a></li>')
        body.append(f'<section aria-labelledby="s{i}"><h2 id="s{i}">{escape(section.title)}</h2>')
        if section.facts:
            body.append(f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in section.facts)}</dl>")
        body += [f"<p>{escape(note)}</p>" for note in section.notes]
        for figure in section.figures:
            body.append(_figure(figure, f"f{n}"))
            n += 1
        body.append("</section>")
    nav = f'<nav aria-label="Parts of this page"><ul>{"".join(links)}</ul></nav>' if len(sections) > 1 else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"<header><h1>{escape(title)}</h1>{nav}</header>\n<main>\n{''.join(body)}\n</main>\n"
        f"<footer>Made by quantkit {escape(__version__)}. GiB is 2^30 bytes.</footer>\n"
        '<div id="tip" hidden></div><div id="said" class="said" role="status"></div>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _figure(f: Figure, name: str) -> str:
    grid, data = "", ""
    if f.grid is not None:
        grid = f' data-grid="{name}-grid"'
        data = f'<script type="application/json" id="{name}-grid">{_json(f.grid._asdict())}</script>'
    pictures = f'<div class="{"wide" if f.narrow else "any"}">{svg(_described(f, f.spec), f"{name}w-")}</div>'
    if f.narrow:
        pictures += f'<div class="narrow">{svg(_described(f, f.narrow), f"{name}n-")}</div>'
    return (
        f'<figure id="{name}" aria-labelledby="{name}-t" aria-describedby="{name}-d">'
        f'<figcaption><h3 id="{name}-t">{escape(f.title)}</h3><p id="{name}-d">{escape(f.about)}</p></figcaption>'
        f'<div class="chart {f.kind}" tabindex="0" role="group" aria-label="{escape(f.title)}; arrow keys go from mark '
        f'to mark, and the table below has the same"{grid}>{pictures}</div>{data}{_table(f.table, name)}</figure>\n'
    )


def _described(f: Figure, spec: Any) -> dict[str, Any]:
    return {**spec, "description": f"{f.title}. {f.about}"}


def _table(table: Table, name: str) -> str:
    right = set(table.right)
    all_numbers = len(right) == len(table.head) - 1 and 0 not in right  # a class for the table, not for each cell
    of = [' class="n"' if i in right and not all_numbers else "" for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{c}>{escape(h)}</th>' for h, c in zip(table.head, of, strict=True))
    rows = "".join(
        f"<tr>{''.join(f'<td{c}>{escape(cell)}</td>' for cell, c in zip(row, of, strict=True))}</tr>\n"
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    kind = ' class="numbers"' if all_numbers else ""
    return (
        f"<details><summary>The data as a table, {len(table.rows):,} row{'s' * (len(table.rows) != 1)}</summary>{note}"
        f'<div class="rows" tabindex="0" role="region" aria-labelledby="{name}-t">'
        f'<table{kind} aria-labelledby="{name}-t"><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>'
        "</div></details>"
    )


def _json(value: Any) -> str:
    """JSON that is safe in a script element, whatever its strings contain."""
    return (
        json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )

"""Text of strangers in Markdown: what it says is shown, and nothing of it is markup, HTML, an address or a mention."""

from __future__ import annotations

import re

from ...base.errors import showable
from ...base.text import markdown_table

_MARKUP = re.compile(r"[!-/:-@\[-`{-~]")
_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_PLAIN = re.compile(r"[\w .,:;+=/@#%()-]+", re.ASCII)
#: characters of a text that are shown
_LONGEST = 300


def plain(text: str) -> str:
    """One line that shows the text."""
    line = showable(" ".join(text.split()))
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    return _MARKUP.sub(lambda m: _HTML.get(m[0]) or (m[0] if m[0] in ",-%'" else f"\\{m[0]}"), line)


def code(text: str) -> str:
    """A name in a code span where it can stand in one."""
    return f"`{text}`" if len(text) <= _LONGEST and _PLAIN.fullmatch(text) and text.strip() == text else plain(text)


def fenced(text: str, language: str = "") -> str:
    """Lines as they are, in a fence longer than any in them."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = "\n".join(showable(line) for line in text.rstrip("\n").split("\n"))
    return f"{fence}{language}\n{shown}\n{fence}"


def table(rows: list[list[str]], head: list[str], right: tuple[int, ...] = ()) -> str:
    """A table whose cells are escaped already."""
    return markdown_table([[c.replace("\\|", "&#124;") for c in row] for row in rows], head, right)

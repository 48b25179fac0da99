"""Text for people: tables and sizes. GiB is 2^30 bytes and GB 10^9, and every table says which."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

GIB = 1 << 30
#: units for bytes, largest first
_UNITS = {"GiB": GIB, "MiB": 1 << 20, "KiB": 1 << 10}
#: their counterparts in powers of ten
DECIMAL = {"GiB": "GB", "MiB": "MB", "KiB": "kB"}
_BYTES = {**_UNITS, "GB": 10**9, "MB": 10**6, "kB": 10**3}
#: fewest characters that a wrapped column keeps
_NARROWEST = 12


class TextEnum(str, Enum):
    """One of a few words. It equals its word in comparisons, messages and JSON."""

    def __str__(self) -> str:
        return str.__str__(self)

    def __format__(self, spec: str) -> str:
        return str.__format__(self, spec)


def table(
    rows: Iterable[Sequence[str]], head: Sequence[str], right: Iterable[int] = (), width: int | None = None
) -> str:
    """Return a table with aligned columns, those in `right` to the right. If lines exceed `width` characters,
    cells of the first column continue on further lines."""
    every = [head, *rows]
    over = 0 if width is None else table_width(every) - width
    if over > 0:
        room = max(_NARROWEST, max(len(row[0]) for row in every) - over)
        every = [line for row in every for line in _broken(row, room)]
    widths = _widths(every, ())
    lines = columns(every, right)
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def fitting_table(
    rows: Sequence[Mapping[str, str]], choices: Sequence[Sequence[str]], right: Iterable[str], width: int | None,
    enough: int = 0,
) -> str:  # fmt: skip
    """Return `fitting_columns` of rows whose cells are named; the names are also the headings."""
    names = list(dict.fromkeys(name for choice in choices for name in choice))
    ends = frozenset(right)
    return fitting_columns(
        [[row[name] for name in names] for row in rows],
        names,
        [[names.index(name) for name in choice] for choice in choices],
        [i for i, name in enumerate(names) if name in ends],
        width,
        enough,
    )


def fitting_columns(
    rows: Sequence[Sequence[str]], head: Sequence[str], choices: Sequence[Sequence[int]], right: Iterable[int],
    width: int | None, enough: int = 0,
) -> str:  # fmt: skip
    """Return a table with as many columns as fit the width. `choices`: sets of columns, the widest first; `right`:
    columns aligned to the right. The last choice, or one of at most `enough` columns, is taken even if it is too wide:
    its first column is then wrapped."""
    ends = frozenset(right)
    for choice in choices:
        every = [[row[i] for i in choice] for row in (head, *rows)]
        if width is None or table_width(every) <= width or len(choice) <= enough:
            break
    return table(every[1:], every[0], [at for at, i in enumerate(choice) if i in ends], width)


def command_lines(arguments: Sequence[str], width: int | None, indent: str = "  ") -> str:
    """Return shell arguments as lines of at most `width` characters if they can be broken: each but the last ends with
    a backslash. An option and its value stay together."""
    words: list[str] = []
    for argument in arguments:
        is_value = words and not argument.startswith("-") and words[-1].startswith("-") and " " not in words[-1]
        if is_value:
            words[-1] += " " + shlex.quote(argument)
        else:
            words.append(shlex.quote(argument))
    lines = [indent]
    for word in words:
        if width is not None and len(lines[-1]) > len(indent) and len(lines[-1]) + len(word) > width - 2:
            lines[-1] += "\\"
            lines.append(indent)
        lines[-1] += word + " "
    return "\n".join(line.rstrip() for line in lines)


def table_width(rows: Sequence[Sequence[str]]) -> int:
    """Return how many characters the lines of a table have; the heading is one of the rows."""
    widths = _widths(rows, ())
    return sum(widths) + 2 * (len(widths) - 1)


def _broken(row: Sequence[str], room: int) -> Iterator[Sequence[str]]:
    """Yield a row as several rows whose first cell has at most `room` characters: broken after a comma, dot, _ or
    space if there is one."""
    first, rest = row[0], tuple(row[1:])
    while len(first) > room:
        cut = max(first.rfind(ch, 0, room) for ch in ",._ ") + 1 or room
        yield (first[:cut].rstrip(), *rest)
        first, rest = first[cut:], ("",) * len(rest)
    yield (first, *rest)


def wrapped(text: str, width: int | None, indent: str = "    ") -> str:
    """Wrap a line to at most `width` characters, with further lines indented; words stay whole."""
    if width is None or len(text) <= width:
        return text
    return "\n".join(
        textwrap.wrap(
            text, max(width, 2 * len(indent) + 1), subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True,
        )
    )  # fmt: skip


def columns(rows: Iterable[Sequence[str]], right: Iterable[int] = (), least: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table without heading. `least`: the minimum widths of the first columns."""
    every = list(rows)
    widths, ends = _widths(every, least), frozenset(right)
    return [
        "  ".join(
            c.rjust(w) if i in ends else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in every
    ]


def _widths(rows: Sequence[Sequence[str]], least: Sequence[int]) -> list[int]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [max(w, least[i]) if i < len(least) else w for i, w in enumerate(widths)]


def markdown_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown_head(head: Sequence[str], right: Iterable[int] = ()) -> str:
    """Return the first two lines of a Markdown table whose columns in `right` are aligned to the right."""
    ends = frozenset(right)
    return f"{markdown_row(head)}\n|{'|'.join('--:' if i in ends else '---' for i in range(len(head)))}|"


def markdown_table(rows: Iterable[Sequence[str]], head: Sequence[str], right: Iterable[int] = ()) -> str:
    """Return a table in Markdown, like `table`."""
    return "\n".join([markdown_head(head, right), *map(markdown_row, rows)])


def unit_of(nbytes: int) -> str:
    """Return the most readable unit for this many bytes: GiB, MiB or KiB."""
    return next((unit for unit, n in _UNITS.items() if abs(nbytes) >= n), "KiB")


def in_unit(nbytes: int, unit: str, decimals: int = 3, sign: str = "") -> str:
    """Return bytes in a unit (GiB, GB and so on); `sign` is "+" for changes. A value too small for the decimals is
    "<0.001", never zero."""
    text = f"{nbytes / _BYTES[unit]:{sign},.{decimals}f}"
    if nbytes and not any(ch in "123456789" for ch in text):
        return f"{'>-' if nbytes < 0 else '<' + sign}{10**-decimals:.{decimals}f}"
    return text


def gib(nbytes: int) -> str:
    """Return bytes in GiB, with three decimals."""
    return in_unit(nbytes, "GiB")


def short_size(nbytes: int) -> str:
    """Return bytes for people: 130.71 GiB, 58.00 KiB, 512 B."""
    if abs(nbytes) < _UNITS["KiB"]:
        return f"{nbytes} B"
    unit = unit_of(nbytes)
    return f"{in_unit(nbytes, unit, 2)} {unit}"


def size(nbytes: int) -> str:
    """Return the exact bytes, followed by GiB and GB, or smaller units for fewer bytes."""
    if nbytes < _UNITS["KiB"]:
        return f"{nbytes:,} bytes"
    unit = unit_of(nbytes)
    decimal = DECIMAL[unit]
    return f"{nbytes:,} bytes = {in_unit(nbytes, unit, 2)} {unit} = {in_unit(nbytes, decimal, 2)} {decimal}"


def bar(share: float, width: int = 10) -> str:
    """Return a share (0 to 1) as a bar of at most `width` characters; any share above 0 is visible."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0)) or int(share > 0)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as 7168x2048x256."""
    return "x".join(str(n) for n in shape)

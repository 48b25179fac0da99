"""Writes a page and the files of its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..base.errors import OutputError
from ..base.outputs import Output, write_bytes, write_text
from ..pictures.page import Section, page
from ..pictures.save import need, png, svg
from ..pictures.theme import COLOURS, in_light


class Written(NamedTuple):
    """What was written."""

    n_figures: int
    nbytes: int
    """size of the page"""
    files: tuple[Path, ...]
    """files of the figures"""


def check_drawable() -> None:
    """Raise ToolError, before anything is read, if the drawing libraries are not installed."""
    need("vl_convert", "squarify")


def write(
    title: str, sections: Sequence[Section], path: Path, folder: Path | None, replace: bool,
    will_write: Callable[..., None] = lambda *_: None,
) -> Written:  # fmt: skip
    """Write the page, and with `folder` also each figure there as SVG and PNG, named by its kind and a number.
    Everything is drawn before the first file is written. `will_write` is called with all files of the folder first.
    Raises OutputError, ToolError."""
    text = page(title, sections)
    every = [f for s in sections for f in s.figures]
    made: list[tuple[Path, bytes]] = []
    counts: dict[str, int] = {}
    for f in every if folder is not None else ():
        assert folder is not None
        counts[f.kind] = n = counts.get(f.kind, 0) + 1
        name = f.kind if n == 1 else f"{f.kind}-{n}"
        spec = in_light(
            {**f.spec, "background": COLOURS["bg"][0], "title": f.title, "description": f"{f.title}. {f.about}"}
        )
        made += [(folder / f"{name}.svg", svg(spec).encode()), (folder / f"{name}.png", png(spec))]
    if folder is not None:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise OutputError(f"{folder}: is not a directory; give another name for the figures") from None
        except OSError as e:
            raise OutputError(f"{folder}: cannot be made: {e.strerror or e}") from None
        will_write(*(Output(file, "a figure", replace) for file, _ in made))
    for file, data in made:
        write_bytes(file, data, replace)
    write_text(path, text, replace)
    return Written(len(every), len(text.encode("utf-8", "backslashreplace")), tuple(file for file, _ in made))

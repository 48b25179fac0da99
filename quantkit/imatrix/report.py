"""The text that `quantkit imatrix info` prints, and the picture it draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from ..base.errors import ImatrixError
from ..base.text import table
from ..pictures.heat_map import Panel, draw
from ..pictures.save import check_suffix, drawing
from .converting import chunks_text, entries_text
from .coverage import Coverage, Covered
from .matrix import Imatrix
from .terminal_map import coverage_map

#: most lines that name experts, unless all are wanted; most experts in a line
_LINES, _EXPERTS = 20, 12
_UNITS = {False: "tokens", True: "chunks"}


def info_text(found: Coverage, every_tensor: bool = False) -> str:
    """Return the file's facts, a table with one row for the same tensor of all layers (or one per tensor), and the
    experts that were never or rarely seen."""
    unit = _UNITS[found.is_dat]
    size = f"{found.chunk_size:,} tokens" if found.chunk_size else "a size that a .dat does not say"
    datasets = ", ".join(found.datasets) or "none named"
    lines = [
        f"{found.path}: {entries_text(len(found.tensors))}, {chunks_text(found.n_chunks)} of {size}"
        f"{', with in_sum' if found.has_in_sum else ''}",
        f"datasets: {datasets}",
        "",
    ]
    groups = [[t] for t in found.tensors] if every_tensor else _alike(found.tensors)
    head = [
        "tensor",
        "entries",
        "experts",
        "columns",
        f"{unit}: min",
        "10 %",
        "median",
        "90 %",
        "max",
        "max/min",
        "top 1 %",
    ]
    if not found.is_dat:
        head += ["never", f"< {found.min_tokens:,}"]
    lines.append(table((_row(group, found) for group in groups), head, range(1, len(head))))
    lines += ["", "top 1 %: share of the sum of squares in the largest 1 % of the columns, median over experts"]
    if found.is_dat:
        lines.append("a .dat has one count for all experts of a tensor: which were hardly seen, it does not say")
    else:
        drawn = coverage_map(found)
        lines += ["", *([drawn, ""] if drawn else []), *_experts(found, every_tensor)]
    return "\n".join(lines)


def _alike(tensors: Sequence[Covered]) -> list[list[Covered]]:
    """Group tensors of one kind and shape across layers, in the order of each group's first tensor."""
    out: dict[tuple[str, int, int], list[Covered]] = {}
    for t in tensors:
        out.setdefault((t.kind, t.n_mats, t.n_cols), []).append(t)
    return list(out.values())


def _row(group: Sequence[Covered], found: Coverage) -> list[str]:
    first = group[0]
    counts = [n for t in group for n in t.counts]
    low, high = min(counts), max(counts)
    known = [t.concentration for t in group if t.concentration is not None]
    name = first.name if len(group) == 1 else f"blk.*.{first.kind}"
    row = [name, f"{len(group):,}", f"{first.n_mats:,}" if first.n_mats > 1 else "", f"{first.n_cols:,}", f"{low:,}"]
    row += [f"{value:,.0f}" for value in np.percentile(counts, (10, 50, 90))]
    row += [f"{high:,}", f"{high / low:,.1f}" if low else "∞" if high else ""]
    row.append(f"{100 * float(np.median(known)):.1f} %" if known else "")
    if not found.is_dat:
        never, rarely = (sum(map(len, each)) for each in _weak(group, found.min_tokens))
        row += [f"{never:,}", f"{rarely:,}"]
    return row


def _weak(group: Sequence[Covered], fewest: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [t.never() for t in group], [t.rarely(fewest) for t in group]


def _experts(found: Coverage, every: bool) -> Iterator[str]:
    """Yield lines on what was never or rarely seen. Tensors of a layer with the same counts, which the same tokens
    reach, share a line."""
    fewest = found.min_tokens
    weak = [t for t in found.tensors if t.never() or t.rarely(fewest)]
    if not weak:
        yield f"every entry, and every expert, saw {fewest:,} tokens or more"
        return
    lines = []
    for layer, of_layer in groupby(weak, key=lambda t: t.layer):
        alike: dict[tuple[int, ...], list[Covered]] = {}
        for t in of_layer:
            alike.setdefault(t.counts, []).append(t)
        lines += [_line(layer, group, fewest) for group in alike.values()]
    yield f"seen never, or by fewer than {fewest:,} tokens (--min-tokens):"
    shown = lines if every else lines[:_LINES]
    yield from shown
    if len(lines) > len(shown):
        yield f"  and {len(lines) - len(shown):,} more (--all)"


def _line(layer: int | None, group: Sequence[Covered], fewest: int) -> str:
    first = group[0]
    names = ", ".join(t.kind for t in group)
    where = names if layer is None else f"blk.{layer}: {names}"
    if first.n_mats == 1:
        return f"  {where}: {first.counts[0]:,} tokens"
    said = []
    if first.never():
        said.append(f"never {_some(map(str, first.never()))}")
    if rare := first.rarely(fewest):
        said.append(f"rarely {_some(f'{i} ({first.counts[i]:,})' for i in rare)}")
    return f"  {where}: {'; '.join(said)}"


def _some(words: Iterable[str]) -> str:
    every = list(words)
    more = f" and {len(every) - _EXPERTS:,} more" if len(every) > _EXPERTS else ""
    return ", ".join(every[:_EXPERTS]) + more


def check_drawable(matrix: Imatrix, path: Path) -> None:
    """Raise, before anything is read, what `draw_coverage` would raise: ImatrixError if no entry counts experts,
    OutputError for a path that is neither .svg nor .png, ToolError if the drawing library is not installed."""
    check_suffix(path)
    if all(e.n_mats == 1 for e in matrix.entries.values()):
        why = "a .dat has no counts of experts" if matrix.is_dat else "none of its entries counts experts"
        raise ImatrixError(f"{matrix.path}: {why}, so there is nothing to draw; leave out the figure")
    drawing()


def draw_coverage(found: Coverage, path: Path, replace: bool = False) -> None:
    """Draw tokens by layer and expert, with one panel for tensors that have the same counts, as gate, up and down
    mostly have. Raises OutputError, ToolError."""
    stacked = [t for t in found.tensors if t.n_mats > 1]
    kinds: dict[str, list[Covered]] = {}
    for t in stacked:
        kinds.setdefault(t.kind, []).append(t)
    panels: dict[tuple[tuple[int | None, tuple[int, ...]], ...], list[str]] = {}
    for kind, tensors in kinds.items():
        panels.setdefault(tuple((t.layer, t.counts) for t in tensors), []).append(kind.removesuffix(".weight"))
    made = [
        Panel(", ".join(names), tuple(("" if layer is None else str(layer), counts) for layer, counts in rows))
        for rows, names in panels.items()
    ]
    title = f"{found.path.name}: tokens that each expert saw"
    draw(path, title, made, ("layer", "expert", "tokens"), replace=replace)

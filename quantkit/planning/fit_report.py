"""What fits on GPUs, as text for people. Returns text, never prints."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.text import bar, columns, command_lines, in_unit, short_size, size, table, table_width, unit_of, wrapped
from .fit import Answer, Fit, PlacedBytes


def fit_text(w: PlacedBytes, answers: Sequence[Answer], about: str, ram: int | None, width: int | None = None) -> str:
    """Return the answers as text. `about`: the context and its cache in words. `ram`: bytes of RAM, or None. `width`:
    the most characters a line may have, None for no limit."""
    n_moe = sum(1 for x in w.layers if x.experts)
    of = f" as {w.recipe}" if w.recipe else ""
    cache = short_size(sum(x.cache for x in w.layers))
    parts = [
        wrapped(f"{w.model}{of}: {size(w.tensor_bytes)}, {w.n_layers} layers and the output head", width)
        + "\n"
        + wrapped(f"{about}: {cache}; each GPU of N GB taken as N GiB", width)
    ]
    unit = unit_of(max(w.tensor_bytes, sum(x.cache for x in w.layers)))
    parts += [_placed(w, unit), _answers(w, answers, unit, width)]
    for a in answers:
        lines = [wrapped(f"{a.gpus.text}: whole layers{_ram_text(a.whole, ram)}", width)]
        lines.append(command_lines(a.whole.flags, width))
        if a.split is None and n_moe:
            base = sum(x.rest + x.cache for x in w.layers)
            no_room = (
                f"{a.gpus.text}: no room for all but routed experts: with the KV cache that is {amount(base)}; "
                "take a shorter --ctx, or a smaller --cache-type or --reserve"
            )
            lines.append(wrapped(no_room, width))
        elif a.split is not None and not (a.whole.n_layers == w.n_layers and a.split.n_layers == n_moe):
            some = f"{a.gpus.text}: all but routed experts, and experts of {a.split.n_layers} of {n_moe} layers"
            lines += [wrapped(some + _ram_text(a.split, ram), width), command_lines(a.split.flags, width)]
        if a.note:
            lines.append(wrapped(f"  note: {a.note}", width))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _answers(w: PlacedBytes, answers: Sequence[Answer], unit: str, width: int | None) -> str:
    """Return the answers as one table; with shorter headings, or as two tables, where that would be too wide."""
    n_moe = sum(1 for x in w.layers if x.experts)
    first = [[a.gpus.text, f"{a.rule} of {w.n_layers}"] for a in answers]
    whole = [[f"{a.whole.n_layers} of {w.n_layers}", *fit_cells(a.whole, unit)] for a in answers]
    split = [
        ["no room", "", ""] if a.split is None else [f"{a.split.n_layers} of {n_moe}", *fit_cells(a.split, unit)]
        for a in answers
    ]
    sizes = [f"GPU {unit}", f"RAM {unit}"]
    more = [*sizes, "or experts of", *sizes] if n_moe else sizes
    rows = [a + b + c * bool(n_moe) for a, b, c in zip(first, whole, split, strict=True)]
    head = ["VRAM", "published rule", "whole layers", *more]
    right = (0, 3, 4, 6, 7)[: len(head) - 3]
    if width is None or table_width([head, *rows]) <= width:
        return table(rows, head, right)
    short = ["VRAM", "rule", "layers", *more]
    if not n_moe or table_width([short, *rows]) <= width:
        return table(rows, short, right, width)
    left = [a + b for a, b in zip(first, whole, strict=True)]
    beside = [[a[0], *c] for a, c in zip(first, split, strict=True)]
    return "\n\n".join(
        (
            table(left, ["VRAM", "rule", "layers", *sizes], (0, 3, 4), width),
            table(beside, ["VRAM", "or experts of", *sizes], (0, 2, 3), width),
        )
    )


def _placed(w: PlacedBytes, unit: str) -> str:
    """Return a table of the bytes by kind of tensor, with a bar for each."""
    of = {
        "routed experts": sum(x.experts for x in w.layers),
        "rest of layers": sum(x.rest for x in w.layers[:-1]),
        "output head": w.layers[-1].rest,
        "token_embd": w.input,
        "KV cache": sum(x.cache for x in w.layers),
    }
    most = max(of.values())
    rows = [[what, f"{in_unit(n, unit, 2)} {unit}", bar(n / most, 20)] for what, n in of.items() if n]
    return "\n".join(columns(rows, right=(1,)))


def fit_cells(f: Fit, unit: str) -> list[str]:
    """Return two cells: the bytes on each GPU, and the bytes left for RAM."""
    used = [in_unit(n, unit, 1) for n in f.used]
    if len(used) < 3:
        return [" + ".join(used), in_unit(f.ram, unit, 1)]
    few, most = (in_unit(n, unit, 1) for n in (min(f.used), max(f.used)))
    return [f"{len(used)} of {few} to {most}", in_unit(f.ram, unit, 1)]


def _ram_text(f: Fit, ram: int | None) -> str:
    if ram is None:
        return f"; {amount(f.ram)} stay in RAM"
    if f.ram <= ram:
        return f"; the other {amount(f.ram)} fit in RAM"
    over = f.ram - ram
    return f"; {amount(f.ram)} are left, {amount(over)} more than RAM has: read from disk (mmap) as needed"


def amount(nbytes: int) -> str:
    """Return bytes in a suitable unit, with one decimal."""
    unit = unit_of(nbytes)
    return f"{in_unit(nbytes, unit, 1)} {unit}"

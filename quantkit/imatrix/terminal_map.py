"""A map of an importance matrix as characters, experts by layers: a rough picture for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .coverage import Coverage, Covered

#: most characters in a line, and most lines
_WIDE, _HIGH = 64, 20
_SHADES = "░▒▓█"
_NEVER = "!"


def coverage_map(found: Coverage) -> str:
    """Draw layers downwards and experts across, darker with more tokens. A character that covers several experts or
    layers shows the least. '' if the file counts no experts. Tensors that saw the same tokens are drawn once."""
    by_kind: dict[str, list[Covered]] = {}
    for t in found.tensors:
        if t.n_mats > 1 and not found.is_dat:
            by_kind.setdefault(t.kind.removesuffix(".weight"), []).append(t)
    kinds: dict[tuple[tuple[int | None, tuple[int, ...]], ...], list[str]] = {}
    for kind, of in by_kind.items():
        kinds.setdefault(tuple((t.layer, t.counts) for t in of), []).append(kind)
    return "\n\n".join("\n".join(_map(rows, ", ".join(names))) for rows, names in kinds.items())


def _map(rows: Sequence[tuple[int | None, tuple[int, ...]]], names: str) -> Iterator[str]:
    n_cols = max(len(counts) for _, counts in rows)
    across, down = -(-n_cols // _WIDE), -(-len(rows) // _HIGH)
    seen = [n for _, counts in rows for n in counts if n]
    low, high = (math.log(min(seen)), math.log(max(seen))) if seen else (0.0, 0.0)
    labels = []
    lines = []
    for i in range(0, len(rows), down):
        some = rows[i : i + down]
        first, last = ("" if layer is None else str(layer) for layer in (some[0][0], some[-1][0]))
        labels.append(first if first == last else f"{first}-{last}")
        least = [min(n for _, counts in some for n in counts[j : j + across]) for j in range(0, n_cols, across)]
        lines.append("".join(_shade(n, low, high) for n in least))
    width = max(5, *map(len, labels))
    each = " x ".join(f"{n} {what}" for n, what in ((down, "layers"), (across, "experts")) if n > 1)
    yield f"{names}: tokens of experts" + (f", a character the least of {each}" if each else "")
    yield f"{'layer':>{width}}  expert 0 to {n_cols - 1}"
    yield from (f"{label:>{width}}  {line}" for label, line in zip(labels, lines, strict=True))
    if seen:
        marks = "  ".join(f"{s} {n:,}" for s, n in zip(_SHADES, _starts(low, high), strict=True))
        yield f"{'':>{width}}  from {marks} tokens" + (
            f"  {_NEVER} never" if len(seen) < sum(len(c) for _, c in rows) else ""
        )


def _starts(low: float, high: float) -> list[int]:
    """Return the number of tokens from which each shade is used."""
    step = (high - low) / len(_SHADES)
    return [round(math.exp(low + i * step)) for i in range(len(_SHADES))]


def _shade(n: int, low: float, high: float) -> str:
    if n == 0:
        return _NEVER
    if high <= low:
        return _SHADES[-1]
    return _SHADES[min(len(_SHADES) - 1, int((math.log(n) - low) / (high - low) * len(_SHADES)))]

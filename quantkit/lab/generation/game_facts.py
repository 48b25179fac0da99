"""Interprets a recorded game: which shape is the bird, where the pipes are, which texts are shown.

A recording is plain data (see `game_recorder`): `size` [w, h], and `frames`, each with `draws` (op, color [r, g, b],
box [x, y, w, h], text) and sometimes `pixels`, rows of colours sampled from the window. Nothing here imports pygame.
Boxes are in pixels from the top left.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Recording = Mapping[str, Any]
Frame = Mapping[str, Any]
Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
_SHAPES = {"rect": "square", "circle": "circle", "ellipse": "circle", "polygon": "triangle"}


class Track(NamedTuple):
    """A shape through the frames."""

    op: str
    color: Color
    boxes: dict[int, Box]
    """by frame number"""

    @property
    def shape(self) -> str:
        """square, circle or triangle"""
        return _SHAPES[self.op]

    def centre(self, frame: int) -> float:
        """The y coordinate of its middle, downwards."""
        _, y, _, h = self.boxes[frame]
        return y + h / 2


def bird(size: Sequence[int], frames: Sequence[Frame]) -> Track | None:
    """The largest shape that keeps its horizontal place while it rises and falls; None if there is none."""
    tracks: dict[tuple[str, Color], dict[int, Box]] = defaultdict(dict)
    n_drawn = sum(bool(f["draws"]) for f in frames)
    for f in frames:
        for op, color, box in _small(size, f):
            mine = tracks[op, color]
            if f["n"] not in mine or box[2] * box[3] > mine[f["n"]][2] * mine[f["n"]][3]:
                mine[f["n"]] = box
    best: tuple[float, Track] | None = None
    for (op, color), boxes in tracks.items():
        xs = sorted(x + w / 2 for x, _, w, _ in boxes.values())
        ys = [y + h / 2 for _, y, _, h in boxes.values()]
        if len(boxes) < 0.3 * n_drawn or max(ys) - min(ys) < 5:
            continue
        if xs[-1 - len(xs) // 20] - xs[len(xs) // 20] > 8:
            continue
        area = sum(w * h for _, _, w, h in boxes.values()) / len(boxes)
        if best is None or area > best[0]:
            best = area, Track(op, color, boxes)
    return None if best is None else best[1]


def track(size: Sequence[int], frames: Sequence[Frame], op: str, color: Color) -> Track | None:
    """Follow a shape of known kind and colour through some frames; None if it is in none."""
    boxes = {}
    for f in frames:
        mine = [box for o, c, box in _small(size, f) if (o, c) == (op, color)]
        if mine:
            boxes[f["n"]] = max(mine, key=lambda b: b[2] * b[3])
    return Track(op, color, boxes) if boxes else None


def _small(size: Sequence[int], frame: Frame) -> Iterator[tuple[str, Color, Box]]:
    """The shapes small enough to be a bird."""
    for op, color, box in _shapes(frame):
        _, _, w, h = box
        if 8 <= w <= 0.2 * size[0] and 8 <= h <= 0.2 * size[1] and w < 2.5 * h and h < 2.5 * w:
            yield op, color, box


class Way(NamedTuple):
    """The gap between a pair of pipes, in one frame."""

    left: float
    right: float
    upper: float
    lower: float
    color: Color
    """of the pipes"""


def ways(size: Sequence[int], frame: Frame) -> list[Way]:
    """The gaps from left to right: each between an upright box that hangs from the top and one of the same width and
    colour below it that stands on the ground."""
    boxes = [
        (color, box)
        for op, color, box in _shapes(frame)
        if op == "rect" and 0.03 * size[0] <= box[2] <= 0.4 * size[0] and box[3] >= 5
    ]
    out = set()
    for color, (x, y, w, h) in boxes:
        if y > 3:
            continue
        for other, (left, top, width, height) in boxes:
            same = other == color and abs(left - x) <= 3 and abs(width - w) <= 3
            if same and top > y + h and top + height >= 0.75 * size[1]:
                out.add(Way(x, x + w, y + h, top, color))
                break
    return sorted(out)


def texts(frame: Frame) -> Iterator[tuple[str, Box]]:
    """The texts shown in a frame, and where."""
    for d in frame["draws"]:
        if d["op"] == "text" and d["text"].strip():
            yield d["text"], tuple(d["box"])


def score(size: Sequence[int], frame: Frame) -> int | None:
    """The number shown in the upper right; None if there is none."""
    for text, (x, y, w, h) in texts(frame):
        numbers = re.findall(r"\d+", text)
        if numbers and x + w / 2 > size[0] / 2 and y + h / 2 < 0.25 * size[1] and x + w <= size[0] + 1:
            return int(numbers[-1])
    return None


def scores(recording: Recording) -> list[int]:
    """The scores in the order shown; an unchanged score counts once."""
    out: list[int] = []
    for f in recording["frames"]:
        value = score(recording["size"], f)
        if value is not None and (not out or out[-1] != value):
            out.append(value)
    return out


def background(frame: Frame) -> Color | None:
    """The most common colour in the upper part of the window; None if it was not sampled."""
    rows = frame.get("pixels")
    return _most(p for row in rows[: len(rows) * 6 // 10] for p in row) if rows else None


def land(frame: Frame) -> Color | None:
    """The most common colour in the lowest row of the window; None if it is the background's."""
    rows = frame.get("pixels")
    found = _most(rows[-1]) if rows else None
    return None if found == background(frame) else found


def sampled(recording: Recording) -> list[Frame]:
    """The frames whose pixels were sampled."""
    return [f for f in recording["frames"] if f.get("pixels")]


# ---------------------------------------------------------------- colours


def is_light(c: Sequence[int]) -> bool:
    """A light shade: bright, with no dark channel."""
    return luma(c) >= 150 and min(c) >= 90


def is_light_blue(c: Sequence[int]) -> bool:
    """Light, with blue the strongest channel."""
    return is_light(c) and c[2] >= c[0] + 10 and c[2] >= c[1]


def is_dark(c: Sequence[int]) -> bool:
    """Below medium brightness."""
    return luma(c) < 128


def is_dark_brown(c: Sequence[int]) -> bool:
    """More red than green, at least as much green as blue, and dark."""
    return c[0] > c[1] >= c[2] and c[0] - c[2] >= 20 and luma(c) < 128


def is_yellow(c: Sequence[int]) -> bool:
    """Much red and green, less blue."""
    return min(c[0], c[1]) >= 120 and c[2] <= 0.75 * min(c[0], c[1])


def is_dark_green(c: Sequence[int]) -> bool:
    """Green by far the strongest channel, and dark."""
    return c[1] >= c[0] + 20 and c[1] >= c[2] + 20 and luma(c) < 140


def is_light_brown(c: Sequence[int]) -> bool:
    """More red than green than blue, and not dark."""
    return c[0] > c[1] > c[2] and c[0] - c[2] >= 30 and luma(c) >= 90


def is_dark_gray(c: Sequence[int]) -> bool:
    """Nearly colourless, and dark."""
    return max(c) - min(c) <= 30 and luma(c) < 135


def luma(c: Sequence[int]) -> float:
    """Brightness of a colour from 0 to 255 (Rec. 601)."""
    return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]


def _most(colors: Iterable[Sequence[int]]) -> Color | None:
    counted = Counter(tuple(c) for c in colors)
    return counted.most_common(1)[0][0] if counted else None  # type: ignore[return-value]


def _shapes(frame: Frame) -> Iterator[tuple[str, Color, Box]]:
    for d in frame["draws"]:
        if d["op"] in _SHAPES and not d.get("outline"):
            yield d["op"], tuple(d["color"]), tuple(d["box"])

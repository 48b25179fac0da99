"""In which order the shards of a checkpoint are visited, so that each is needed once.

A shard is visited when the first tensor of the output that is not done needs it, and all that can be made of it is
made then, whatever tensor it belongs to: an expert tensor of DeepSeek-R1 is made from three or four shards, and each of
those has rows of three such tensors. Where a weight and its scales lie in two shards, what comes first is held in
memory until the other is there; weights only up to a limit, beyond which their shard is visited again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..model.catalogue import SourceTensor
from ..planning.plan import Planned

#: bytes of weights that are held in memory until their scales are there
MAX_HELD = 1 << 29


class Piece(NamedTuple):
    """A part of a tensor of the output, which is made from one source tensor; it begins at row `out_row`."""

    planned: Planned
    part: int
    out_row: int


@dataclass
class Visit:
    """What is done while a shard is there."""

    shard: str
    pieces: list[Piece] = field(default_factory=list)
    hold: list[SourceTensor] = field(default_factory=list)
    """tensors of it that are held in memory afterwards"""
    let_go: list[str] = field(default_factory=list)
    """held tensors that nothing needs after it"""


@dataclass
class _Weight:
    tensor: SourceTensor
    scale: SourceTensor | None
    pieces: list[Piece]
    number: int


def pieces_of(tensors: Iterable[Planned]) -> Iterable[Piece]:
    """All parts of the output's tensors, in order."""
    for planned in tensors:
        out_row = 0
        for i, part in enumerate(planned.tensor.parts):
            yield Piece(planned, i, out_row)
            out_row += part.out_rows


def visits(
    pieces: Iterable[Piece],
    tensor: Callable[[str], tuple[SourceTensor, SourceTensor | None]],
    shard: Callable[[SourceTensor], str],
    first: Collection[str] = (),
    max_held: int = MAX_HELD,
) -> list[Visit]:
    """The shards to visit, in order. `tensor` gives a source tensor and its scales by name, `shard` the shard it is in,
    "" where it needs none; `first` are the shards that are there already, which are visited before others."""
    weights: dict[str, _Weight] = {}
    for piece in pieces:
        name = piece.planned.tensor.parts[piece.part].source
        if name not in weights:
            weights[name] = _Weight(*tensor(name), [], len(weights))
        weights[name].pieces.append(piece)
    in_shard: dict[str, list[_Weight]] = {}
    scales_in: dict[str, list[_Weight]] = {}
    for w in weights.values():
        at = shard(w.tensor)
        in_shard.setdefault(at, []).append(w)
        if w.scale is not None and shard(w.scale) != at:
            scales_in.setdefault(shard(w.scale), []).append(w)
            in_shard.setdefault(shard(w.scale), [])
    order = sorted(in_shard, key=lambda s: s not in first)
    done: set[str] = set()
    held: dict[str, int] = {}
    """bytes of what is held, weights and scales, by name"""
    weight_bytes = 0
    out: list[Visit] = []
    while order:
        again = []
        for at in order:
            visit = Visit(at)
            made: list[_Weight] = []
            for w in in_shard[at]:
                if w.tensor.name in done:
                    continue
                if w.scale is None or shard(w.scale) == at or w.scale.name in held:
                    made.append(w)
                elif weight_bytes + w.tensor.nbytes <= max_held:
                    visit.hold.append(w.tensor)
                    held[w.tensor.name] = w.tensor.nbytes
                    weight_bytes += w.tensor.nbytes
                elif at not in again:
                    again.append(at)
            for w in scales_in.get(at, ()):
                if w.tensor.name in done or w.scale is None or w.scale.name in held:
                    continue
                if w.tensor.name in held:
                    made.append(w)
                else:
                    visit.hold.append(w.scale)
                    held[w.scale.name] = w.scale.nbytes
            for w in made:
                done.add(w.tensor.name)
                if w.tensor.name in held:
                    weight_bytes -= w.tensor.nbytes
                gone = [t.name for t in (w.tensor, w.scale) if t is not None and t.name in held]
                visit.let_go += gone
                for name in gone:
                    del held[name]
            visit.pieces = [p for w in sorted(made, key=lambda w: w.number) for p in w.pieces]
            if visit.pieces or visit.hold:
                out.append(visit)
        order = again
    return out


def most_held(order: Iterable[Visit], nbytes: Callable[[str], int]) -> int:
    """The most bytes that are held in memory at a time; `nbytes` gives a tensor's by its name."""
    most = held = 0
    for visit in order:
        held += sum(t.nbytes for t in visit.hold)
        most = max(most, held)
        held -= sum(nbytes(name) for name in visit.let_go)
    return most

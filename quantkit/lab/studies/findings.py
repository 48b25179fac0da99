"""Summarizes results of studies: the effects of levels, and the front of size against damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.scores import NATIVE, Point, Scored, finite, interval, unbeaten
from .results import Result


class Measured(NamedTuple):
    """Comparable results: of one study, on one model and text, by one engine."""

    study: str
    model: str
    texts: tuple[str, ...]
    n_chunks: int
    n_ctx: int
    engine: str
    results: list[Result]

    @property
    def about(self) -> str:
        """A description for a heading."""
        return (
            f"{self.study}: {self.model}, {self.n_chunks:,} chunk{'s' * (self.n_chunks != 1)} of {self.n_ctx:,} tokens "
            f"of {', '.join(self.texts)}" + (f", engine {self.engine}" if self.engine != NATIVE else "")
        )


def comparable(found: Sequence[Result]) -> list[Measured]:
    """Group results by study, model, text and engine. If a variant was measured more than once, with another recipe,
    importance matrix or kernels, the latest counts; a failure only if there is nothing else."""
    groups: dict[tuple[Any, ...], Measured] = {}
    latest: dict[tuple[Any, ...], dict[str, Result]] = {}
    for r in found:
        p = r.provenance
        engine = p.get("engine", NATIVE)
        key = (r.study, p.get("source"), p.get("text"), engine)
        about = (
            r.study,
            p.get("model", ""),
            tuple(p.get("texts", ())),
            p.get("n_chunks", 0),
            p.get("n_ctx", 0),
            engine,
        )
        groups.setdefault(key, Measured(*about, []))
        of = latest.setdefault(key, {})
        if r.scores is not None or r.variant not in of or of[r.variant].scores is None:
            of[r.variant] = r
    return [group._replace(results=list(latest[key].values())) for key, group in groups.items()]


class Effect(NamedTuple):
    """The effect of an axis' level on the mean KLD: against the base (one at a time), or on average (grid)."""

    axis: str
    level: str
    difference: float
    low: float
    high: float
    """95 % interval over chunks"""
    bytes_difference: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; ends of an interval are None if there is only one chunk."""
        return {**self._asdict(), "low": finite(self.low), "high": finite(self.high)}


def effects(found: Sequence[Result]) -> list[Effect]:
    """Main effects: averages over all pairs of variants that differ in this axis alone, one with the level and one
    without. All results must be of one text: those of a `Measured`."""
    by_levels = {tuple(sorted(r.levels.items())): r for r in found if r.scores is not None}
    out: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for levels, result in by_levels.items():
        for axis, level in levels:
            rest = tuple(item for item in levels if item[0] != axis)
            if rest in by_levels:
                out.setdefault((axis, level), []).append((by_levels[rest], result))
    return [_effect(axis, level, pairs) for (axis, level), pairs in out.items()]


def _effect(axis: str, level: str, pairs: Sequence[tuple[Result, Result]]) -> Effect:
    by_chunk = np.mean([np.frombuffer(b.kld_by_chunk) - np.frombuffer(a.kld_by_chunk) for a, b in pairs], 0)
    low, high = interval(by_chunk)
    more = np.mean([_scores(b).file_bytes - _scores(a).file_bytes for a, b in pairs])
    return Effect(axis, level, float(by_chunk.mean()), low, high, int(more))


def _scores(result: Result) -> Scored:
    assert result.scores is not None
    return result.scores


def front(found: Sequence[Result]) -> list[Point]:
    """The variants that no other beats in both size and mean KLD, smallest first."""
    return unbeaten((r.variant, r.scores.file_bytes, r.scores.mean_kld) for r in found if r.scores is not None)

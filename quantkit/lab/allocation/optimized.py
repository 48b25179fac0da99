"""What an optimization comes to: the recipe, and what of it was predicted and measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...planning.plan import Plan
from ..evaluation.scores import Compared, Scored
from ..frames import frame


@dataclass(frozen=True)
class Measured:
    """A whole model, predicted and measured."""

    what: str
    """solution | neighbour | UD | stock | uniform | fit"""
    scored: Scored
    predicted: float
    """mean KLD, from the sensitivity and the exponent"""

    @property
    def off(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.scored.mean_kld - 1 if self.scored.mean_kld > 0 else 0.0


@dataclass(frozen=True)
class Versus:
    """The recipe beside what it is compared with, at the same bytes."""

    kind: str
    how: str
    kld: float
    ratio: float
    """KLD of the recipe over that"""
    pair: Compared | None
    """with an interval, where it is one recipe and not interpolated"""
    larger: tuple[str, int, float] | None = None
    """the first recipe of this kind that is at least as large: name, bytes, KLD"""


@dataclass(frozen=True)
class Optimized:
    """A recipe and what is known of it."""

    text: str
    """the recipe, in YAML"""
    plan: Plan
    file_bytes: int
    budget: int
    """bytes of the file at most"""
    gap: float
    """of the solver: how far from the least predicted damage it can be, as a share"""
    gamma: float
    predicted: float
    fit: tuple[Measured, ...] = ()
    """what the exponent was fitted on"""
    chosen_from: tuple[Measured, ...] = ()
    """the solution and its neighbours, on the text to choose on"""
    report: tuple[Measured, ...] = ()
    """the recipe first, then what it is compared with, on the text to report"""
    versus: tuple[Versus, ...] = ()
    notes: tuple[str, ...] = ()

    def to_frame(self) -> Any:
        """What was reported on the last text, as a pandas DataFrame: a row for the recipe and for each that it is
        compared with. Raises ToolError where pandas is not installed."""
        return frame({"what": m.what, "predicted": m.predicted, **asdict(m.scored)} for m in self.report)

"""The result of an optimization: the recipe, with its predictions and measurements."""

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
        """predicted / measured - 1."""
        return self.predicted / self.scored.mean_kld - 1 if self.scored.mean_kld > 0 else 0.0


@dataclass(frozen=True)
class Versus:
    """The recipe compared with a baseline of the same size."""

    kind: str
    how: str
    kld: float
    ratio: float
    """KLD of the recipe / KLD of the baseline"""
    pair: Compared | None
    """with an interval; None if the baseline is interpolated"""
    larger: tuple[str, int, float] | None = None
    """the first recipe of this kind that is at least as large: name, bytes, KLD"""


@dataclass(frozen=True)
class Optimized:
    """A recipe with its predictions and measurements."""

    text: str
    """the recipe, in YAML"""
    plan: Plan
    file_bytes: int
    budget: int
    """upper limit for the file, in bytes"""
    gap: float
    """the solver's: largest possible distance from the least predicted damage, as a share"""
    gamma: float
    predicted: float
    fit: tuple[Measured, ...] = ()
    """the models the exponent was fitted on"""
    chosen_from: tuple[Measured, ...] = ()
    """the solution and its neighbours, on the text to choose on"""
    report: tuple[Measured, ...] = ()
    """first the recipe, then its baselines, on the text to report on"""
    versus: tuple[Versus, ...] = ()
    notes: tuple[str, ...] = ()

    def to_frame(self) -> Any:
        """The figures on the text to report on, as a pandas DataFrame: one row for the recipe and for each baseline.
        Raises ToolError if pandas is not installed."""
        return frame({"what": m.what, "predicted": m.predicted, **asdict(m.scored)} for m in self.report)

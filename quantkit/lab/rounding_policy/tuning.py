"""Probes of roundings: one group of tensors at a time at its recipe's type, by every method, many probes in each pass.

A probe is a model of which one group is quantized and all else is as it is. What is best of a group is chosen on one
text; then the recipes as a whole are measured on another, which nothing was chosen on.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...base.errors import RecipeError, SourceError
from ...forward.model import Model, Quantized
from ...forward.stream import Options
from ...model.catalogue import Catalogue
from ...planning.plan import Plan
from ...rounding.covariance import Covariances
from ...rounding.options import DAMP
from ...rounding.policy import GGML, Choice
from ..evaluation.evaluate import Scorable, of_plan, score_tokens
from ..evaluation.rounded import Blocks, Rounded
from ..evaluation.scores import F64, Scored, interval, ratio_interval, score
from .groups import METHODS, RoundedGroup, rounded_groups

Progress = Callable[[str, int, int], None]
"""Called with a stage, and how much of how much is done."""
#: what a whole file is measured with
STOCK, TUNED = "ggml", "tuned"


@dataclass(frozen=True)
class TuneOptions:
    """How a policy is found."""

    methods: tuple[str, ...] = METHODS
    """to choose from"""
    search: bool = True
    """whether feedback searches scales"""
    damp: float = DAMP
    """of the mean diagonal"""
    memory: int = 8 << 30
    """bytes of hidden states: so many probes a pass"""
    share: float = 0.95
    """of the intervals by which a method must be better than a simpler one"""
    whole: tuple[str, ...] = ("feedback",)
    """methods for everything, measured beside the policy"""
    forward: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Ratio:
    """A mean KLD over ggml's on the same chunks, with its 95 % interval by paired bootstrap."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(a: F64, b: F64) -> Ratio:
        """Of two by chunk."""
        return Ratio(float(a.mean() / b.mean()) if b.mean() > 0 else 1.0, *ratio_interval(a, b))


@dataclass(frozen=True)
class Probed:
    """A group and what each method costs."""

    group: RoundedGroup
    by_chunk: Mapping[str, F64]
    """mean KLD of each chunk, by method"""
    chosen: str

    def kld(self, method: str) -> float:
        return float(self.by_chunk[method].mean())

    def ratio(self, method: str) -> Ratio:
        """To ggml's."""
        return Ratio.of(self.by_chunk[method], self.by_chunk[GGML])


@dataclass(frozen=True)
class Whole:
    """A whole file by one way of rounding, on one text."""

    recipe: str
    how: str
    """ggml, a method for all, or tuned"""
    text: str
    """choose | report"""
    scored: Scored
    ratio: Ratio


@dataclass(frozen=True)
class Tuned:
    """What was probed and chosen, and what came of it."""

    model: str
    arch: str
    covariance: str
    n_tokens: int
    """of the text that the second moments are of"""
    texts: Mapping[str, str]
    """choose, report: what they are"""
    probed: tuple[Probed, ...]
    whole: tuple[Whole, ...]
    options: TuneOptions

    def policy(self, name: str, date: str = "") -> str:
        """A policy's file; `date` is the day that it says, today unless given."""
        from .policy_text import policy_text

        return policy_text(self, name, date or datetime.date.today().isoformat())

    def choice(self, name: str, qtype: str) -> str:
        """The method of a tensor at a type."""
        for p in self.probed:
            if p.group.type == qtype and name in p.group.tensors:
                return p.chosen
        return GGML


def tune(
    plans: Sequence[Plan], covariance: Covariances, texts: tuple[Scorable, Scorable | None],
    options: TuneOptions | None = None, progress: Progress = lambda stage, n_done, n_total: None,
) -> Tuned:  # fmt: skip
    """Probe every group of some recipes' plans of one model, choose, and measure the whole. `texts` are one to choose
    on, and one to report on.

    Raises SourceError for second moments of another model or none that can be used, RecipeError for an unknown method,
    WeightError, KernelError."""
    opts = options or TuneOptions()
    unknown = [m for m in opts.methods if m not in METHODS]
    if unknown:
        raise RecipeError(f"unknown rounding '{unknown[0]:.40}'; there are {', '.join(METHODS)}")
    catalogue = plans[0].catalogue
    groups = rounded_groups(plans, covariance, opts.methods)
    if not groups:
        raise SourceError(
            f"{covariance.name}: has second moments for none of the tensors that {_names(plans)} quantizes with a "
            "method other than ggml's"
        )
    run = Tuner(catalogue, plans, covariance, opts, progress)
    choose, report = texts
    probed = tuple(chosen(g, by, opts.share) for g, by in run.probes(groups, choose))
    made = Tuned(
        catalogue.model, catalogue.arch, covariance.name, covariance.n_tokens,
        {"choose": _about(choose), **({} if report is None else {"report": _about(report)})}, probed, (), opts,
    )  # fmt: skip
    whole = [w for name, text in (("choose", choose), ("report", report)) if text is not None
             for w in run.whole(made, text, name)]  # fmt: skip
    return Tuned(**{**made.__dict__, "whole": tuple(whole)})


def _names(plans: Sequence[Plan]) -> str:
    return ", ".join(dict.fromkeys(p.recipe.name for p in plans))


def _about(text: Scorable) -> str:
    n_chunks, n_ctx = text.tokens.shape
    names = ", ".join(name.rpartition("/")[2] for name in text.names)  # a policy names no folders of this machine
    return f"{n_chunks:,} chunks of {n_ctx:,} tokens of {names}"


def chosen(group: RoundedGroup, by_chunk: Mapping[str, F64], share: float) -> Probed:
    """The simplest method that none is measurably better than, going up from ggml's."""
    best = GGML
    for method in group.methods[1:]:
        _, high = interval(by_chunk[method] - by_chunk[best], share)
        if high < 0:
            best = method
    return Probed(group, by_chunk, best)


class Tuner:
    """A model, its plans and second moments: what is measured of them. Blocks that were made once are kept."""

    def __init__(
        self, catalogue: Catalogue, plans: Sequence[Plan], covariance: Covariances, opts: TuneOptions,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.plans, self.opts, self.progress = plans, opts, progress
        self.reference = Model(catalogue)
        self.blocks = Blocks(covariance)

    def probes(self, groups: Sequence[RoundedGroup], text: Scorable) -> list[tuple[RoundedGroup, dict[str, F64]]]:
        """KLD by chunk of every group by every method that it can have."""
        wanted = sorted(((g, m) for g in groups for m in g.methods), key=lambda w: w[0].first)
        size = max(1, self.opts.memory // (8 * text.tokens.size * self.reference.family.n_embd))
        n_passes = -(-len(wanted) // size)
        found: dict[tuple[str, str], F64] = {}
        for number, at in enumerate(range(0, len(wanted), size)):
            some = wanted[at : at + size]

            def show(what: str, n_done: int, n_total: int, number: int = number) -> None:
                share = 1000 * n_done // max(1, n_total)
                self.progress(f"pass {number + 1} of {n_passes}", 1000 * number + share, 1000 * n_passes)

            models = [self.reference.variant(f"{g.name} {m}", self.change(g, m)) for g, m in some]
            scored = score_tokens(self.reference, models, text, self.opts.forward, show)[1:]
            found.update({(g.name, m): s.kld.mean(-1) for (g, m), s in zip(some, scored, strict=True)})
        return [(g, {m: found[g.name, m] for m in g.methods}) for g in groups]

    def change(self, group: RoundedGroup, method: str) -> Quantized:
        """Of the reference, to the group alone; its importance is that of the first plan that gives the type."""
        plan = next(p for p in self.plans if any(p[name].type == group.type for name in group.tensors))
        importance = plan.weights if plan.weights is not None else None
        return Quantized(
            dict.fromkeys(group.tensors, group.type), importance, plan.policy.text,
            self._rounded(dict.fromkeys(group.tensors, method)),
        )  # fmt: skip

    def _rounded(self, methods: Mapping[str, str]) -> Rounded:
        opts = self.opts
        return Rounded(self.blocks, {n: Choice(m, "", opts.damp, opts.search) for n, m in methods.items()})

    def whole(self, made: Tuned, text: Scorable, name: str) -> list[Whole]:
        """Every recipe by ggml's rounding, by each method for all that can have it, and as it was tuned."""
        hows: dict[str, Callable[[str, str], str]] = {STOCK: lambda *_: GGML}
        able = {(n, p.group.type): p.group.methods for p in made.probed for n in p.group.tensors}
        for method in self.opts.whole:
            hows[method] = lambda n, t, m=method: m if m in able.get((n, t), ()) else GGML  # type: ignore[misc]
        hows[TUNED] = made.choice
        of: list[tuple[Plan, str]] = [(plan, how) for plan in self.plans for how in hows]
        candidates = [
            of_plan(
                self.reference, plan, f"{plan.recipe.name} {how}",
                self._rounded({t.tensor.name: hows[how](t.tensor.name, t.type) for t in plan.tensors}),
            )
            for plan, how in of
        ]  # fmt: skip

        def show(what: str, n_done: int, n_total: int) -> None:
            self.progress(f"whole files, text to {name}", n_done, n_total)

        base, *tokens = score_tokens(self.reference, [c.model for c in candidates], text, self.opts.forward, show)
        out, stock = [], {p.recipe.name: t for (p, how), t in zip(of, tokens, strict=True) if how == STOCK}
        for (plan, how), c, t in zip(of, candidates, tokens, strict=True):
            to_stock = Ratio.of(t.kld.mean(-1), stock[plan.recipe.name].kld.mean(-1))
            out.append(Whole(plan.recipe.name, how, name, score(c.name, (c.file_bytes, c.bpw), t, base.nll), to_stock))
        return out

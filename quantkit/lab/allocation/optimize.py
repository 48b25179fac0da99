"""Finds the best recipe for a size: solves it on a sensitivity, measures it, and compares it with others of that size.

Uses three texts: the sensitivity's, one to fit the exponent and choose on, and one to report on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...base.errors import InternalCheckError, SourceError, UnsupportedError
from ...base.files import file_sha256
from ...forward.model import Model
from ...forward.stream import Options
from ...imatrix.matrix import Imatrix
from ...model.catalogue import Catalogue, Tensor
from ...planning.plan import Plan, make_plan, with_values
from ...planning.rounding import check_covariance, with_covariance
from ...recipe.load import Rounding, parse
from ...rounding.covariance import CovarianceSource
from ...rounding.policy import GGML
from ..evaluation.evaluate import Scorable, of_plan, score_tokens
from ..evaluation.scores import F64, Scored, Tokens, compare, score
from ..identity import of_model
from .baselines import Baseline, baselines, file_bytes
from .damage import Sensitivity
from .knapsack import Item, Solution, solve
from .optimized import Measured, Optimized, Versus
from .problem import Constraints, Problem, make_problem, padded
from .recipe_text import Cost, needs_imatrix, quoted, recipe_text
from .sensitivity import Progress
from .supported import Corner, least
from .targets import Target
from .weight_errors import Usable, weight_errors

GAMMA = 0.5
"""the exponent before any measurement: independent flips"""
#: budgets around the target whose solutions are measured to fit the exponent
_AROUND = (0.75, 0.88, 1.15, 1.4)
_GAMMAS = np.linspace(0.2, 1.0, 161)
_MOST_FORCED = 60


@dataclass(frozen=True)
class OptimizeOptions:
    """How a recipe is searched for."""

    constraints: Constraints = field(default_factory=Constraints)
    refine: int = 0
    """neighbours that are measured beside the solution"""
    gamma: float | None = None
    """the exponent if known; None: fitted"""
    name: str = ""
    """of the recipe"""
    compare: bool = True
    """compare with the UD recipe, the stock mixture and uniform types of the same size"""
    time_limit: float = 50.0
    """approximate seconds for the solver; what it has not proven by then shows in the gap"""
    forward: Options = field(default_factory=Options)
    rounding: Rounding | None = None
    """what the recipe says of rounding; solutions are measured so, and what the header says of it is in the bytes"""
    covariance: CovarianceSource | None = None
    """what any rounding but ggml's needs"""


def optimize(
    catalogue: Catalogue, known: Sensitivity, target: Target, imatrix: Imatrix | None = None,
    texts: tuple[Scorable, Scorable] | None = None, options: OptimizeOptions | None = None,
    progress: Progress = lambda stage, n_done, n_total: None,
) -> Optimized:  # fmt: skip
    """Find the recipe of least predicted damage within a target. `texts` are one to choose on and one to report on;
    without them nothing is measured.

    Raises SourceError for a sensitivity or a covariance of another model, UnsupportedError for a target that no types
    reach, RecipeError for constraints that cannot be met."""
    opts = options or OptimizeOptions()
    _check_same(catalogue, known, imatrix)
    run = Optimizer(catalogue, known, target, imatrix, opts, progress)
    if texts is None:
        gamma = opts.gamma or GAMMA
        chosen, gap = run.best(gamma)
        return run.finish(chosen, gamma, gap)
    choose, report = texts
    for a, b in ((choose, report),):
        if a.tokens.shape == b.tokens.shape and bool((a.tokens == b.tokens).all()):
            run.notes.append("the text to report is the text that was chosen on: its figures flatter the recipe")
    gamma, fit = (opts.gamma, ()) if opts.gamma is not None else run.fit_gamma(choose)
    chosen, gap = run.best(gamma)
    tried: tuple[Measured, ...] = ()
    if opts.refine:
        chosen, tried = run.refine(chosen, gamma, choose)
    out = run.finish(chosen, gamma, gap)
    measured, versus = run.compare(out, report)
    return replace(out, fit=fit, chosen_from=tried, report=measured, versus=versus)


def _check_same(catalogue: Catalogue, known: Sensitivity, imatrix: Imatrix | None) -> None:
    if known.source != of_model(catalogue):
        raise SourceError(
            f"the sensitivity is of another model or other files ({known.model}) than {catalogue.model}; measure this "
            "one with quantkit sensitivity"
        )
    mine = "" if imatrix is None else file_sha256(imatrix.path)[:16]
    if known.imatrix != mine:
        which = "another" if known.imatrix and mine else "an" if known.imatrix else "no"
        raise SourceError(
            f"the sensitivity was measured with {which} importance matrix; give the same to both commands"
        )


class Optimizer:
    """A model, a sensitivity and a target: finds solutions, and makes and measures their recipes."""

    def __init__(
        self, catalogue: Catalogue, known: Sensitivity, target: Target, imatrix: Imatrix | None, opts: OptimizeOptions,
        progress: Progress = lambda stage, n_done, n_total: None,
    ) -> None:  # fmt: skip
        self.catalogue, self.target, self.imatrix, self.opts, self.progress = catalogue, target, imatrix, opts, progress
        self.reference = Model(catalogue)
        self.tensors = {t.name: t for t in catalogue.tensors if t.quantizable}
        self.problem: Problem = make_problem(catalogue, known, Usable(imatrix), opts.constraints)
        self.notes = list(self.problem.notes)
        if not catalogue.kvs_complete:
            self.notes.append("the tokenizer is not known, so the bytes of the file lack it")
        if self._rounds:
            self.notes.append(
                "predictions are for ggml's rounding, as the sensitivity was measured; measured figures are for the "
                "recipe's rounding, and mostly lower"
            )
        # bytes of a file beside its tensors' are the same for all types, unless it says how they were rounded
        some = self.problem.types_of(0 for _ in self.problem.choices)
        asked = self.problem.asked_of(0 for _ in self.problem.choices)
        plan = self.plan_of("any", asked, GAMMA)
        check_covariance(plan)
        self.overhead = file_bytes(plan, imatrix) - sum(padded(self.tensors[n], t) for n, t in some.items())
        self.errors_of(plan.tensors)

    # ------------------------------------------------------------ solutions

    def best(self, gamma: float, scale: float = 1.0) -> tuple[tuple[int, ...], float]:
        """Find the options of least damage within the target times `scale`, and the solver's gap. Raises
        UnsupportedError."""
        while True:
            chosen, gap = self._best(gamma, scale)
            header = self.nbytes(chosen) - self._tensor_bytes(chosen)
            if header <= self.overhead:
                return chosen, gap
            self.overhead = header  # what it says of rounding depends on the types: solved again with room for that

    def _best(self, gamma: float, scale: float) -> tuple[tuple[int, ...], float]:
        def at(smooth: float, flips: float) -> Corner | None:
            weights = (smooth, flips)
            found = self.target.search(self._solve_for(gamma, weights), self, scale)
            if found is None:
                return None
            sums = self.problem.sums(self.problem.types_of(found.chosen), gamma)
            return Corner(found.chosen, *sums, weights, found.gap)

        best = least(at, gamma, self.opts.time_limit)
        if best is None:
            items = self.problem.items(gamma, (1, 1), padded)
            smallest = sum(min(o.nbytes for o in item.options) for item in items) + self.overhead
            raise UnsupportedError(
                f"{self.target.text}: no types that are allowed make {self.catalogue.model} so small; the least is "
                f"{smallest:,} bytes: allow more --types, or lower a --minimum"
            )
        return best.corner.chosen, best.gap

    def _solve_for(
        self, gamma: float, weights: tuple[float, float]
    ) -> Callable[[int, Callable[[Tensor, str], int]], Solution | None]:
        def one(budget: int, nbytes_of: Callable[[Tensor, str], int]) -> Solution | None:
            items = self.problem.items(gamma, weights, nbytes_of)
            return solve(items, budget, self.problem.monotone(), self.opts.time_limit / 4)

        return one

    def nbytes(self, chosen: Sequence[int]) -> int:
        """Size of the file."""
        if self.opts.rounding is None:
            return self.overhead + self._tensor_bytes(chosen)
        return file_bytes(self.plan_of("any", self.problem.asked_of(chosen), GAMMA), self.imatrix)

    def _tensor_bytes(self, chosen: Sequence[int]) -> int:
        return sum(padded(self.tensors[n], t) for n, t in self.problem.types_of(chosen).items())

    def predicted(self, chosen: Sequence[int], gamma: float) -> float:
        return self.problem.predict(self.problem.types_of(chosen), gamma)

    def neighbours(self, chosen: tuple[int, ...], gamma: float, n: int) -> list[tuple[int, ...]]:
        """The n other solutions that are hardest to tell from the best. Each is the best with one item forced to the
        next smaller or larger type; they are ranked by their loss divided by its uncertainty."""
        _, flips = self.problem.sums(self.problem.types_of(chosen), gamma)
        weights = (1.0, gamma * max(flips, 1e-12) ** (gamma - 1))
        items, budget = self.problem.items(gamma, weights, padded), self.nbytes(chosen) - self.overhead
        budget = max(budget, self.target.file_limit(self) - self.overhead)
        doubts: dict[tuple[int, ...], float] = {}
        order = sorted(range(len(items)), key=lambda i: -items[i].options[chosen[i]].damage)[:_MOST_FORCED]
        for i in order:
            options = items[i].options
            sizes = sorted(range(len(options)), key=lambda j: options[j].nbytes)
            at = sizes.index(chosen[i])
            for j in sizes[max(0, at - 1) : at] + sizes[at + 1 : at + 2]:
                forced = list(items)
                forced[i] = Item(items[i].name, (options[j],))
                found = solve(forced, budget, (), self.opts.time_limit / 10)
                if found is None:
                    continue
                other = tuple(j if k == i else c for k, c in enumerate(found.chosen))
                if other != chosen and other not in doubts:
                    doubts[other] = self._doubt(chosen, other, gamma, weights)
        limit, out = self.target.file_limit(self), list[tuple[int, ...]]()
        for other in sorted(doubts, key=lambda other: doubts[other]):
            if len(out) < n and self.nbytes(other) <= limit:
                out.append(other)
        return out

    def _doubt(
        self, chosen: tuple[int, ...], other: tuple[int, ...], gamma: float, weights: tuple[float, float]
    ) -> float:
        lost: F64 = np.zeros(1)
        for c, a, b in zip(self.problem.choices, chosen, other, strict=True):
            if a != b:
                for w, x, y in zip(
                    weights,
                    self.problem.parts(c, c.given[a], gamma),
                    self.problem.parts(c, c.given[b], gamma),
                    strict=True,
                ):
                    lost = lost + w * (y - x)
        return float(lost[0] / max(float(lost[1:].std()), 1e-12))

    # ------------------------------------------------------------ plans

    @property
    def _rounds(self) -> bool:
        """Whether the recipe has tensors rounded otherwise than by ggml."""
        return self.opts.rounding is not None and self.opts.rounding.method != GGML

    def plan_of(
        self, name: str, asked: Mapping[str, str], gamma: float, chosen: Sequence[int] | None = None,
        by_ggml: bool = False,
    ) -> Plan:  # fmt: skip
        """Plan a recipe with exactly these types, with `by_ggml` as ggml rounds, whatever the recipe is to say."""
        recipe = parse(self.recipe(name, asked, gamma, chosen), f"{name}.yaml")
        if self.opts.rounding is not None:
            recipe = recipe.with_rounding(Rounding(GGML) if by_ggml else self.opts.rounding)
        made = with_values(make_plan(self.catalogue, recipe, self.imatrix), self.imatrix)
        return with_covariance(made, self.opts.covariance)

    def recipe(self, name: str, asked: Mapping[str, str], gamma: float, chosen: Sequence[int] | None = None) -> str:
        """The text of a recipe."""
        costs = {n: Cost(0.0, 0) for n in asked}
        description = "nothing is known of its cost"
        if chosen is not None:
            smooth, flips = self.problem.sums(self.problem.types_of(chosen), gamma)
            total = (smooth + flips**gamma) or 1.0
            for c, j in zip(self.problem.choices, chosen, strict=True):
                n = sum(t.n_elements for t in c.tensors)
                a, f = self.problem.parts(c, c.given[j], gamma)
                # its share of the flips' sum, times the cost of the flips together
                part = (float(a[0]) + (float(f[0]) / flips * flips**gamma if flips else 0.0)) / total
                for t, type_ in zip(c.tensors, c.given[j], strict=True):
                    costs[t.name] = Cost(part * t.n_elements / n, padded(t, type_))
            description = (
                f"{self.nbytes(chosen):,} bytes for {self.target.text}; predicted mean KLD "
                f"{self.predicted(chosen, gamma):.4f} (exponent {gamma:.2f})"
                + (", as ggml rounds." if self._rounds else ".")
            )
        head = {"name": name, "title": f"{self.catalogue.model}, optimized", "description": description}
        if (said := self.opts.rounding) is not None:
            head["rounding"] = said.method or f"{{policy: {quoted(said.policy)}}}"
        needs = needs_imatrix(asked.values()) and self.imatrix is not None
        return recipe_text(self.catalogue, asked, costs, head, needs)

    def errors_of(self, planned: Sequence[object]) -> None:
        """Sample errors that the sensitivity lacks for the types in these plans."""
        known = self.problem.known
        lacking: dict[str, list[str]] = {}
        for t in planned:
            name, type_ = t.tensor.name, t.type  # type: ignore[attr-defined]
            if name in known.sizes and type_ not in known.errors.get(name, {}) and type_ not in ("F32", "F16", "BF16"):
                lacking.setdefault(type_, []).append(name)
        for type_, names in lacking.items():
            some = [self.tensors[name] for name in names]
            found = weight_errors(self.reference, some, [type_], self.imatrix)
            errors = {n: {**known.errors.get(n, {}), **found.get(n, {})} for n in {**known.errors, **found}}
            known = replace(known, errors=errors)
        self.problem = replace(self.problem, known=known, _kept={})

    # ------------------------------------------------------------ measuring

    def measure(
        self, plans: Sequence[tuple[str, Plan]], text: Scorable, stage: str
    ) -> tuple[list[Scored], list[Tokens]]:
        """Measure plans in one pass over a text."""

        def show(what: str, n_done: int, n_total: int) -> None:
            self.progress(stage, n_done, n_total)

        candidates = [of_plan(self.reference, plan, plan.recipe.name) for _, plan in plans]
        tokens = score_tokens(self.reference, [c.model for c in candidates], text, self.opts.forward, show)
        scored = [
            score(c.name, (file_bytes(plan, self.imatrix), c.bpw), t, tokens[0].nll)
            for c, (_, plan), t in zip(candidates, plans, tokens[1:], strict=True)
        ]
        return scored, tokens[1:]

    def predict(self, plan: Plan, gamma: float) -> float:
        """Predicted mean KLD of any plan for the model."""
        self.errors_of(plan.tensors)
        return self.problem.predict({t.tensor.name: t.type for t in plan.tensors}, gamma)

    def fit_gamma(self, text: Scorable) -> tuple[float, tuple[Measured, ...]]:
        """Fit the exponent on solutions of sizes around the target; returns it and these solutions."""
        plans: dict[tuple[int, ...], Plan] = {}
        for scale in _AROUND:
            try:
                chosen, _ = self.best(GAMMA, scale)
            except UnsupportedError:
                continue
            name = f"{self.nbytes(chosen):,} bytes"
            # as the sensitivity was measured
            plans.setdefault(chosen, self.plan_of(name, self.problem.asked_of(chosen), GAMMA, by_ggml=True))
        if not plans:
            return GAMMA, ()
        scored, _ = self.measure([("fit", p) for p in plans.values()], text, "exponent")
        types = [{t.tensor.name: t.type for t in p.tensors} for p in plans.values()]
        measured = np.log([s.mean_kld for s in scored])

        def off(gamma: float) -> float:
            each = np.log([self.problem.predict(t, gamma) for t in types]) - measured
            return float((each**2).sum())

        gamma = float(min(_GAMMAS, key=off))
        fit = tuple(Measured("fit", s, self.problem.predict(t, gamma)) for s, t in zip(scored, types, strict=True))
        return gamma, fit

    def refine(
        self, chosen: tuple[int, ...], gamma: float, text: Scorable
    ) -> tuple[tuple[int, ...], tuple[Measured, ...]]:
        """Measure the solution and its hardest-to-tell neighbours on a text, and return the best and all of them."""
        every = [chosen, *self.neighbours(chosen, gamma, self.opts.refine)]
        plans = []
        for i, one in enumerate(every):
            what = "solution" if i == 0 else "neighbour"
            name = what if i == 0 else f"{what} {i}"
            plans.append((what, self.plan_of(name, self.problem.asked_of(one), gamma)))
        scored, _ = self.measure(plans, text, "refine")
        tried = tuple(
            Measured(what, s, self.predicted(one, gamma))
            for (what, _), s, one in zip(plans, scored, every, strict=True)
        )
        best = min(range(len(every)), key=lambda i: scored[i].mean_kld)
        return every[best], tried

    def compare(self, out: Optimized, text: Scorable) -> tuple[tuple[Measured, ...], tuple[Versus, ...]]:
        """Measure the recipe and its baselines on the text to report on."""
        others = baselines(self.catalogue, self.imatrix, out.file_bytes) if self.opts.compare else []
        plans = [("solution", out.plan), *((b.kind, p) for b in others for p in b.plans)]
        scored, tokens = self.measure(plans, text, "report")
        measured = tuple(
            Measured(what, s, self.predict(p, out.gamma)) for (what, p), s in zip(plans, scored, strict=True)
        )
        versus, at = [], 1
        for b in others:
            versus.append(self._versus(b, (scored[0], tokens[0]), scored[at : at + len(b.plans)], tokens[at:]))
            at += len(b.plans)
        return measured, tuple(versus)

    def _versus(
        self, b: Baseline, mine: tuple[Scored, Tokens], scored: Sequence[Scored], tokens: Sequence[Tokens]
    ) -> Versus:
        kld, how = b.at(mine[0].file_bytes, [s.mean_kld for s in scored])
        pair = compare(mine[0], scored[0], mine[1].kld, tokens[0].kld) if len(scored) == 1 else None
        larger = None
        if b.next_larger is not None:
            s = scored[b.next_larger]
            larger = (s.name, s.file_bytes, s.mean_kld)
        return Versus(b.kind, how, kld, mine[0].mean_kld / kld, pair, larger)

    # ------------------------------------------------------------ the end

    def finish(self, chosen: tuple[int, ...], gamma: float, gap: float) -> Optimized:
        """Make the recipe, and check that it gives the chosen types and is within the limit."""
        asked, types = self.problem.asked_of(chosen), self.problem.types_of(chosen)
        name = self.opts.name or f"{self.catalogue.model}-{self.nbytes(chosen)}"
        text = self.recipe(name, asked, gamma, chosen)
        plan = self.plan_of(name, asked, gamma, chosen)
        given = {t.tensor.name: t.type for t in plan.tensors if t.tensor.quantizable}
        nbytes = file_bytes(plan, self.imatrix)
        if given != types or nbytes != self.nbytes(chosen):
            wrong = next((n for n in types if given.get(n) != types[n]), "")
            raise InternalCheckError(
                f"the recipe gives '{wrong}' {given.get(wrong)} and {nbytes:,} bytes, not {types.get(wrong)} and "
                f"{self.nbytes(chosen):,}; please report this"
            )
        limit = self.target.file_limit(self)
        if nbytes > limit:
            raise InternalCheckError(f"the recipe has {nbytes:,} bytes, more than {limit:,}; please report this")
        return Optimized(
            text, plan, nbytes, limit, gap, gamma, self.predicted(chosen, gamma), notes=tuple(self.notes)
        )  # fmt: skip

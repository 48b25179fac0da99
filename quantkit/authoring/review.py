"""Answers a recipe author's questions: is it sound, why does a tensor get its type, how do two recipes differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..base.errors import RecipeError, UnsupportedError, did_you_mean
from ..gguf.types import QTYPES, VERSIONS
from ..model.catalogue import ROLES, Catalogue, Role
from ..planning.plan import ImatrixStatus, Plan, Planned, make_plan, mixture_choice
from ..planning.rules import match_rules
from ..recipe.load import Recipe, load

# ---------------------------------------------------------------- lint


class LintMessage(NamedTuple):
    """One message of lint."""

    severity: str
    """error: a plan would be refused; warning: a plan would be made, but perhaps not the one its author expects"""
    message: str
    """begins with file:line and the place in the recipe"""
    model: str
    """the model it was found on; '' if it holds for any"""


def lint(
    name: str, sets: Mapping[str, str], models: Callable[[Recipe], list[Catalogue]], version: str = VERSIONS[0]
) -> list[LintMessage]:
    """Find all problems of a recipe, by itself and on models; `models` returns those to try it on."""
    try:
        recipe = load(name, sets)
    except RecipeError as e:
        return [LintMessage("error", line, "") for line in str(e).split("\n")]
    found: list[LintMessage] = []
    try:
        catalogues = models(recipe)
    except UnsupportedError as e:
        return [LintMessage("error", str(e), "")]
    for catalogue in catalogues:
        try:
            warnings = make_plan(catalogue, recipe, None, version).warnings
        except (RecipeError, UnsupportedError) as e:
            found += [LintMessage("error", line, catalogue.model) for line in str(e).split("\n")]
        else:
            found += [LintMessage("warning", line, catalogue.model) for line in warnings]
    return found


# ---------------------------------------------------------------- explain


class Step(NamedTuple):
    """A rule, and its outcome for a tensor."""

    place: str
    match: str
    layers: str | None
    type: str
    outcome: str


@dataclass(frozen=True)
class Explanation:
    """Why a tensor has its type."""

    planned: Planned
    steps: tuple[Step, ...]
    verdict: tuple[str, ...]
    """the effect of its shape, and of the importance matrix"""

    def to_json(self) -> dict[str, Any]:
        t = self.planned
        return {
            "tensor": t.tensor.name,
            "shape": list(t.tensor.shape),
            "role": t.tensor.role,
            "layer": t.tensor.layer,
            "requested": t.requested,
            "type": t.type,
            "bytes": t.nbytes,
            "rule": t.rule,
            "why": t.why,
            "imatrix": t.imatrix_status,
            "steps": [s._asdict() for s in self.steps],
            "verdict": list(self.verdict),
        }


def explain(plan: Plan, name: str) -> Explanation:
    """Walk through the rules for one tensor. Raises RecipeError if the model has no tensor of that name."""
    by_name = {t.tensor.name: t for t in plan.tensors}
    if name not in by_name:
        raise RecipeError(
            f"{plan.catalogue.model} ({plan.catalogue.layout}) has no tensor '{name:.100}'{did_you_mean(name, by_name)}"
        )
    planned = by_name[name]
    t, recipe = planned.tensor, plan.recipe
    if not t.quantizable:
        return Explanation(planned, (), (f"stays {t.source_type}: {planned.why}; no rule is asked",))
    steps = []
    taken = False
    for i, m in enumerate(match_rules(plan.catalogue, recipe)):
        if not m.rule.matcher().match(name):
            outcome = "another name"
        elif m.layers is not None and t.layer not in m.layers:
            outcome = f"another layer: {m.rule.layers} is {_layers(m.layers)} here"
        elif taken:
            outcome = "matches too, but an earlier rule has taken it"
        else:
            outcome = f"takes it: {m.rule.why}"
            taken = True
        steps.append(Step(recipe.place("rules", i), m.rule.match, m.rule.layers, m.rule.type, outcome))
    if recipe.mixture is not None:
        choice = mixture_choice(
            plan.catalogue,
            recipe,
            planned.imatrix_status in (ImatrixStatus.USED, ImatrixStatus.MISSING),
            plan.mixture_version,
        )
        outcome = "not asked: a rule has taken it" if taken else "takes it: llama-quantize's own choice"
        steps.append(Step(recipe.place("otherwise"), f"mixture {recipe.mixture}", None, choice.get(name, ""), outcome))
    asked, given = QTYPES[planned.requested], QTYPES[planned.type]
    if planned.fell_back:
        shape = f"rows of {t.n_cols} do not divide into blocks of {asked.block}: {given.name} in place of {asked.name}"
    else:
        shape = f"rows of {t.n_cols} divide into blocks of {given.block}"
    size = f"{t.n_elements:,} weights x {given.bits:g} bits = {planned.nbytes:,} bytes"
    verdict = [shape, size, _IMATRIX[planned.imatrix_status]]
    by = None if plan.rounding is None else plan.rounding.choices.get(name)
    if by is not None:
        verdict.append(f"rounded by {by.rounding}, where the covariance of its inputs allows it: {by.why}")
    elif plan.rounding is not None:
        verdict.append("rounded as ggml does it")
    return Explanation(planned, tuple(steps), tuple(verdict))


_IMATRIX = {
    ImatrixStatus.USED: "the importance matrix has an entry for it",
    ImatrixStatus.MISSING: "the importance matrix has no entry for it: quantized without",
    ImatrixStatus.NEEDED: "the importance matrix has no entry for it, and the type must have one",
    ImatrixStatus.WRONG_SIZE: "the importance matrix's entry does not fit its shape",
    ImatrixStatus.NOT_USED: "the type has no use for an importance matrix",
    ImatrixStatus.REQUIRED: "needs an importance matrix",
    ImatrixStatus.OPTIONAL: "an importance matrix helps, and is not required",
}


def _layers(layers: frozenset[int]) -> str:
    some = sorted(layers)
    if not some:
        return "none"
    return f"{some[0]}-{some[-1]}" if some == list(range(some[0], some[-1] + 1)) else ", ".join(map(str, some))


# ---------------------------------------------------------------- diff


class Change(NamedTuple):
    """A tensor whose type differs between two plans."""

    name: str
    role: Role
    before: Planned
    after: Planned

    @property
    def nbytes(self) -> int:
        return self.after.nbytes - self.before.nbytes


class RoleShare(NamedTuple):
    """The bytes that two plans spend on a role."""

    role: Role
    n_elements: int
    before: int
    after: int


@dataclass(frozen=True)
class Difference:
    """The difference of two recipes on one model."""

    before: Plan
    after: Plan
    changes: tuple[Change, ...]
    roles: tuple[RoleShare, ...]

    def roundings(self) -> tuple[list[str], list[str]] | None:
        """The tensors that ggml does not round, one line each, of both plans; None if they are the same."""
        a, b = ([] if p.rounding is None else p.rounding.listed() for p in (self.before, self.after))
        return None if a == b else (a, b)

    def to_json(self) -> dict[str, Any]:
        rounded = self.roundings()

        def total(p: Plan) -> dict[str, Any]:
            return {"recipe": p.recipe.name, "tensor_bytes": p.tensor_bytes, "bpw": round(p.bpw, 4), "types": p.types()}

        return {
            "model": self.before.catalogue.model,
            "layout": self.before.catalogue.layout,
            "before": total(self.before),
            "after": total(self.after),
            "bytes": self.after.tensor_bytes - self.before.tensor_bytes,
            "roles": [r._asdict() for r in self.roles],
            **({} if rounded is None else {"rounding": {"before": rounded[0], "after": rounded[1]}}),
            "changes": [
                {
                    "name": c.name,
                    "role": c.role,
                    "before": c.before.type,
                    "after": c.after.type,
                    "bytes": c.nbytes,
                    "rule_before": c.before.rule,
                    "rule_after": c.after.rule,
                }
                for c in self.changes
            ],
        }


def diff(before: Plan, after: Plan) -> Difference:
    """Compare two plans of one model, tensor by tensor and by role."""
    pairs = list(zip(before.tensors, after.tensors, strict=True))
    changes = tuple(Change(a.tensor.name, a.tensor.role, a, b) for a, b in pairs if a.type != b.type)
    roles = []
    for role in ROLES:
        some = [(a, b) for a, b in pairs if a.tensor.role == role]
        if some:
            elements = sum(a.tensor.n_elements for a, _ in some)
            roles.append(RoleShare(role, elements, sum(a.nbytes for a, _ in some), sum(b.nbytes for _, b in some)))
    return Difference(before, after, changes, tuple(roles))

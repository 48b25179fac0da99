"""What rounds each tensor, and why: decided by the recipe, its policy, and the covariance at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..base.errors import RecipeError, SourceError
from ..base.text import size
from ..gguf.types import QTYPES
from ..model.catalogue import Tensor, family_of, ranges
from ..recipe.load import Recipe
from ..recipe.load import Rounding as Wanted
from ..rounding.covariance import HOW_TO_MAKE, CovarianceSource, Standing, is_by_layer, standing
from ..rounding.options import VERSION as ROUNDING_VERSION
from ..rounding.options import Device
from ..rounding.policy import Choice, Policy, feasible, load, parse

if TYPE_CHECKING:
    from .plan import Plan, Planned

_NAMED = 3


@dataclass(frozen=True)
class Rounding:
    """What rounds those tensors of a plan that ggml does not round, or not completely."""

    choices: Mapping[str, Choice]
    """by tensor, for each that should be rounded other than by ggml"""
    policy: Policy | None = None
    covariance: CovarianceSource | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)
    """for each of these tensors, whether the covariance suffices, once there is one"""
    recorded_policy: str = ""
    """the policy as a file records it, if all other settings are taken from that file, too"""
    in_pass: bool = False
    """the second moments come from a pass within the build, so the file does not record for which matrices they are
    too thin"""
    device: Device | None = None
    """where torch rounds rows; None for the CPU's own kernels"""

    @property
    def policy_text(self) -> str:
        """The policy as recorded in the file's metadata; '' for none."""
        return self.recorded_policy if self.policy is None else f"{self.policy.name} (sha256 {self.policy.digest})"

    def of(self, name: str) -> Choice | None:
        """Return what rounds a tensor; None for ggml, also if the covariance is too thin for the whole tensor."""
        choice = self.choices.get(name)
        return None if choice is None or (name in self.standings and self.standings[name].why) else choice

    def is_thin(self, name: str, mat: int) -> bool:
        """Whether ggml rounds this matrix of a tensor because the covariance is too thin for it."""
        found = self.standings.get(name)
        return found is not None and mat in found.thin

    def seen(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> Rounding:
        """Return the same with the standings of these tensors, once the covariance has their layer."""
        assert self.covariance is not None
        found = {name: standing(tensors[name], self.covariance) for name in names}
        return replace(self, standings={**self.standings, **found})

    def digest(self) -> tuple[str, str]:
        """Return the key under which the file's metadata names the covariance, and its digest; zeros without one."""
        if self.covariance is None:
            return "covariance", "0" * 64
        return ("pass", self.covariance.pass_digest) if self.in_pass else ("covariance", self.covariance.digest)

    @property
    def options(self) -> str:
        """The settings that hold for all tensors, as recorded in the file's metadata."""
        some = next(iter(self.choices.values()))
        return f"damp {some.damp}{', search' if some.search else ''}"

    def identity(self, name: str) -> str:
        """Return all that a tensor's bytes depend on here; '' if ggml rounds it."""
        choice, covariance = self.of(name), self.covariance
        if choice is None or covariance is None:
            return ""
        judge = None if covariance.held_out is None else covariance.held_out.digest
        thin = sorted(self.standings[name].thin)
        on = () if self.device is None else (self.device.text,)
        return repr((ROUNDING_VERSION, name, choice._replace(why=""), thin, covariance.digest, judge, *on))

    def listed(self) -> list[str]:
        """Describe in a few lines what rounds which tensors, as recorded in the file's metadata: 'feedback
        blk.{3-60}.ffn_down_exps.weight'; matrices left to ggml follow after 'but'."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name, choice in self.choices.items():
            if self._is_listed(name):
                thin = self.standings[name].thin if name in self.standings and not self.in_pass else frozenset()
                but = f" but {ranges(thin)}" if thin else ""
                groups.setdefault((choice.rounding, family_of(name), but), []).append(name)
        out = []
        for (rounding, family, but), names in groups.items():
            layers = [int(name.split(".")[1]) for name in names if family.startswith("blk.*.")]
            shown = family.replace("blk.*.", f"blk.{{{ranges(layers)}}}.") if layers else family
            out.append(f"{rounding} {shown}{but}")
        return out

    def _is_listed(self, name: str) -> bool:
        covariance = self.covariance
        if not self.in_pass or covariance is None:
            return self.of(name) is not None
        # only what was known before the pass
        return name in covariance and covariance.n_tokens >= covariance.n_cols(name)

    def shown(self, name: str) -> str:
        """Return what rounds a tensor, for a table cell."""
        choice = self.choices.get(name)
        if choice is None:
            return ""
        found = self.standings.get(name)
        if found is None or not found.thin:
            return choice.rounding
        if found.why:
            return "ggml"
        return f"{choice.rounding}, {len(found.thin)} of {found.n_mats} ggml"

    def to_json(self, name: str) -> dict[str, Any]:
        """Return what rounds a tensor, and why."""
        choice = self.choices.get(name)
        if choice is None:
            return {}
        found, by = self.standings.get(name), self.of(name)
        made: dict[str, Any] = {"by": "ggml" if by is None else by.rounding, "why": choice.why}
        if found is not None and found.thin:
            why = found.why or f"{len(found.thin)} saw fewer tokens than they have columns"
            made |= {"matrices": found.n_mats, "ggml_matrices": len(found.thin), "falls_back": why}
        return {"rounding": made}


def rounding_of(recipe: Recipe, tensors: list[Planned], by_rule: Mapping[str, tuple[str, str]]) -> Rounding | None:
    """Return the rounding a recipe asks for, by tensor; None if ggml rounds all. `by_rule`: the method and the rule's
    place, for tensors whose rule sets a method. Raises RecipeError for an invalid policy."""
    wanted = recipe.rounding
    policy = None
    if wanted is not None and wanted.policy:
        policy = _policy(wanted)
    choices = {}
    for t in tensors:
        name = t.tensor.name
        if not t.tensor.quantizable or t.type == t.tensor.source_type or QTYPES[t.type].is_float:
            continue
        if name in by_rule:
            choice = Choice(by_rule[name][0], by_rule[name][1])
            choice = choice if policy is None else choice._replace(**policy.options())
        elif policy is not None:
            choice = policy.choose(t.tensor, t.type)
        elif wanted is not None:
            choice = Choice(wanted.method, wanted.said_by)
        else:
            continue
        choice = feasible(choice, t.type)
        if not choice.is_ggml:
            choices[name] = choice
    return Rounding(choices, policy) if choices else None


def _policy(wanted: Wanted) -> Policy:
    try:
        if wanted.text is not None:
            return parse(wanted.text, wanted.policy)
        if wanted.folder is None:
            raise RecipeError(f"the policy {wanted.policy} cannot be read from here: give it with --rounding-policy")
        return load(wanted.policy, wanted.folder)
    except RecipeError as e:
        raise RecipeError(f"{wanted.said_by}: {e}") from None


def with_covariance(plan: Plan, covariance: CovarianceSource | None) -> Plan:
    """Return the plan with a covariance and the matrices that fall back to ggml's rounding, with the reasons. The plan
    is unchanged if it rounds nothing or there is no covariance. Raises SourceError for another model's covariance."""
    rounding = plan.rounding
    if rounding is None or covariance is None:
        return plan
    found = {name: standing(plan[name].tensor, covariance) for name in rounding.choices}
    if not any(name in covariance for name in rounding.choices):
        some = next(iter(rounding.choices))
        raise SourceError(
            f"{covariance.name}: has nothing for '{some}', nor for any other tensor that is to be rounded by it; it is "
            "of another model"
        )
    in_pass = is_by_layer(covariance)
    return replace(plan, rounding=replace(rounding, covariance=covariance, standings=found, in_pass=in_pass))


def with_device(plan: Plan, device: Device | None) -> Plan:
    """The plan with rows rounded on a device of torch. Raises RecipeError for a plan that rounds nothing."""
    if device is None:
        return plan
    if plan.rounding is None:
        raise RecipeError(
            "--rounding-device needs a rounding to use it: give --rounding feedback, --rounding-policy, or a recipe "
            "that says how to round"
        )
    return replace(plan, rounding=replace(plan.rounding, device=device))


def check_covariance(plan: Plan) -> None:
    """Raise SourceError if a build of the plan would lack a covariance that it must have."""
    if plan.rounding is None or plan.rounding.covariance is not None:
        return
    names = list(plan.rounding.choices)
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    choice = plan.rounding.choices[names[0]]
    raise SourceError(
        f"'{names[0]}'{more} are to be rounded by {choice.rounding} ({choice.why}), which needs a covariance of their "
        f"inputs: give --covariance DIR; {HOW_TO_MAKE}"
        if more
        else f"'{names[0]}' is to be rounded by {choice.rounding} ({choice.why}), which needs a covariance of its "
        f"inputs: give --covariance DIR; {HOW_TO_MAKE}"
    )


def rounding_notes(plan: Plan) -> Iterator[str]:
    """Yield notes for people on how many tensors each method rounds."""
    rounding = plan.rounding
    if rounding is None:
        return
    counts = Counter(rounding.choices[n].rounding for n in rounding.choices if rounding.of(n) is not None)
    by = f" by the policy {rounding.policy.name}" if rounding.policy is not None else ""
    said = ", ".join(f"{n} tensor{'s' * (n != 1)} by {method}" for method, n in sorted(counts.items())) or "nothing"
    yield f"rounded otherwise than by ggml{by}: {said} ({rounding.options})"
    if rounding.device is not None:
        n = counts["coarse"]
        but = f"; the {n} by coarse on the CPU, which alone has it" if n else ""
        yield (
            f"rows are rounded on {rounding.device.text}, so that some bytes are others than the CPU's, and about as "
            f"good{but}"
        )
    if rounding.covariance is None:
        yield (
            "no covariance was given, so what falls back to ggml's rounding is not known, and the header may have some "
            "bytes more: give --covariance DIR, or --text FILE"
        )
    elif is_by_layer(rounding.covariance):
        yield (
            f"their second moments {'and all importance ' * plan.weights_in_pass}are computed in the build, over "
            f"{rounding.covariance.n_tokens:,} tokens, a layer at a time: at most "
            f"{size(rounding.covariance.scratch_bytes)} beside the output; which experts see too few "
            "of them, and stay as ggml rounds them, is known when their layer is"
        )


def rounding_warnings(plan: Plan) -> Iterator[str]:
    """Yield what falls back to ggml's rounding, with reasons and counts."""
    rounding = plan.rounding
    if rounding is None or rounding.covariance is None:
        return
    whole: dict[str, list[str]] = {}
    some: dict[str, Standing] = {}
    for name, found in rounding.standings.items():
        if found.why:
            whole.setdefault(found.why, []).append(name)
        elif found.thin:
            some[name] = found
    for why, names in whole.items():
        n = len(names)
        shown = ", ".join(names[:_NAMED]) + (", …" if n > _NAMED else "")
        yield f"{n} tensor{'s stay' if n > 1 else ' stays'} as ggml rounds {'them' if n > 1 else 'it'}: {why}: {shown}"
    if some:
        n, of = sum(len(found.thin) for found in some.values()), sum(found.n_mats for found in some.values())
        unseen = sum(found.n_unseen for found in some.values())
        name, first = next(iter(some.items()))
        yield (
            f"{n:,} of {of:,} matrices of {len(some)} tensors stay as ggml rounds them: they saw fewer tokens than "
            f"they have columns ({unseen:,} of them none): '{name}' {ranges(first.thin)}"
            f"{' and others' * (len(some) > 1)}"
        )

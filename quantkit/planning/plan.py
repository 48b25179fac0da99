"""Catalogue x Recipe -> Plan: the type of every tensor, the rule that chose it, its bytes.

A plan is pure data. rules.py decides which rule takes which tensor, and checks the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from ..base.errors import ImatrixError, KernelError, RecipeError, UnsupportedError, did_you_mean
from ..base.text import TextEnum
from ..gguf.types import ABORT_WITHOUT_IMATRIX, QTYPES, STORED_TYPES, VERSIONS, fitting_type
from ..imatrix.matrix import Imatrix
from ..imatrix.policies import FAIL, OUTSIDE_LAYERS, UNSEEN, Completed, Origin, Policy, parse_policy
from ..model.catalogue import Catalogue, Role, Tensor, family_of
from ..recipe.load import Recipe
from ..rounding.covariance import CovarianceSource, is_by_layer
from .gaps import (
    Gap,
    about_kv_b,
    applied,
    completed,
    gap_notes,
    gap_of,
    gap_warnings,
    n_matrices,
    never_seen,
    raised_type,
)
from .mixtures import facts, mixture_types
from .rounding import Rounding, rounding_of, rounding_warnings, with_covariance
from .rules import assign_rules, taken_by_patterns

#: version of the JSON of `Plan.to_json`; raised when a reader of the old one would be misled
PLAN_VERSION = 1


class ImatrixEntries(Protocol):
    """What a plan needs to know about an importance matrix."""

    def __contains__(self, name: str) -> bool: ...
    def fits(self, name: str, n_cols: int, n_mats: int) -> bool: ...


class ImatrixStatus(TextEnum):
    """How an importance matrix affects a tensor of its planned type."""

    USED = "used"
    """the matrix has an entry of the right size"""
    MISSING = "missing"
    """the matrix has no entry, and the tensor is quantized without"""
    NEEDED = "needed"
    """the matrix has no entry, but the type must have one"""
    WRONG_SIZE = "wrong size"
    """the entry does not fit; an error for every type"""
    NOT_USED = "not used"
    """the type does not use weights"""
    REQUIRED = "required"
    """there is no matrix, but the type or the recipe must have one"""
    OPTIONAL = "optional"
    """there is no matrix, and the type works without"""


class Planned(NamedTuple):
    """A tensor and what the plan decided for it."""

    tensor: Tensor
    type: str
    """the type it gets"""
    requested: str
    """the type asked for; differs from `type` if the shape does not allow it"""
    nbytes: int
    rule: str
    """file:line rules[i], or '' for a tensor that is never quantized"""
    why: str
    imatrix_status: ImatrixStatus

    @property
    def fell_back(self) -> bool:
        return self.type != self.requested


@dataclass(frozen=True)
class Plan:
    """Every tensor of the output with its type, in the order of the file."""

    catalogue: Catalogue
    recipe: Recipe
    tensors: tuple[Planned, ...]
    warnings: tuple[str, ...]
    mixture_version: str = VERSIONS[0]
    """which llama-quantize sets the mixtures and fallbacks: current, or 2025 for files made until March 2026"""
    gaps: tuple[Gap, ...] = ()
    """what the importance matrix leaves out, once its values have been read (`with_values`)"""
    imatrix: ImatrixEntries | None = field(default=None, repr=False, compare=False)
    """the importance matrix it was made with"""
    policy: Policy = FAIL
    """what stands in for data that the importance matrix lacks"""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """where the weights of a tensor come from, for each tensor to which the policy gives some"""
    raised: frozenset[str] = frozenset()
    """the tensors to which the policy gives more bits than their rule does"""
    weights: Completed | None = field(default=None, repr=False, compare=False)
    """the importance matrix as completed by the policy, once its values have been read (`with_values`)"""
    rounding: Rounding | None = None
    """what rounds the tensors that ggml does not round; None if ggml rounds all"""

    def __getitem__(self, name: str) -> Planned:
        """Return a tensor by its name. Raises KeyError that suggests a similar name."""
        found = self._by_name.get(name)
        if found is None:
            raise KeyError(f"no tensor '{name}'{did_you_mean(name, self._by_name)}")
        return found

    @cached_property
    def _by_name(self) -> dict[str, Planned]:
        return {t.tensor.name: t for t in self.tensors}

    def with_types(self, types: Mapping[str, str]) -> Plan:
        """Return the plan with other types for the tensors that each glob matches, ahead of the recipe's rules.
        Sizes are computed again, with ggml's fallback where a row does not divide into blocks. Raises RecipeError if a
        glob matches nothing or only tensors that are never quantized, and ImatrixError."""
        recipe = self.recipe.with_types(types)
        made = make_plan(self.catalogue, recipe, self.imatrix, self.mixture_version, self.policy)
        if self.rounding is not None:
            made = with_covariance(made, self.rounding.covariance)
        return with_values(made, self.imatrix) if isinstance(self.imatrix, Imatrix) else made

    @property
    def applied(self) -> str:
        """What the policy changed, as recorded in the file's metadata; '' if nothing."""
        return applied(self.policy, self.origins, self.raised)

    @property
    def weights_in_pass(self) -> bool:
        """Whether the importance is computed while it is built, a layer at a time, with the second moments."""
        return hasattr(self.imatrix, "layers")

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def n_elements(self) -> int:
        return sum(t.tensor.n_elements for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight as llama.cpp prints them: all tensor bytes over all elements."""
        return 8 * self.tensor_bytes / self.n_elements

    def types(self) -> dict[str, int]:
        """Return how many tensors have each type, in the order of ggml's ids."""
        counts = Counter(t.type for t in self.tensors)
        return {name: counts[name] for name in sorted(counts, key=lambda n: STORED_TYPES[n].id)}

    def to_json(self, file_bytes: int | None) -> dict[str, Any]:
        """Return the plan as plain values; shapes in GGUF (ne) order. `file_bytes` comes from the layout."""
        c = self.catalogue
        return {
            "quantkit_plan": PLAN_VERSION,
            "model": c.model,
            "arch": c.arch,
            "layout": c.layout,
            **({"commit": c.commit} if c.commit else {}),
            "recipe": self.recipe.name,
            "mixture_version": self.mixture_version,
            "tensors": [
                {
                    "name": t.tensor.name,
                    "shape": list(t.tensor.shape),
                    "type": t.type,
                    "requested": t.requested,
                    "bytes": t.nbytes,
                    "rule": t.rule,
                    "why": t.why,
                    "role": t.tensor.role,
                    "imatrix": t.imatrix_status,
                    **self._origin_json(t.tensor.name),
                    **({} if self.rounding is None else self.rounding.to_json(t.tensor.name)),
                }
                for t in self.tensors
            ],
            "totals": {
                "tensors": len(self.tensors),
                "elements": self.n_elements,
                "tensor_bytes": self.tensor_bytes,
                "file_bytes": file_bytes,
                "bpw": round(self.bpw, 4),
                "types": self.types(),
            },
            "metadata_complete": c.kvs_complete,
            "warnings": [*self.warnings, *gap_warnings(self.gaps), *rounding_warnings(self)],
            "notes": [*c.notes, *gap_notes(self.gaps)],
            "imatrix_policy": self.policy.text,
            "imatrix_gaps": [g.to_json() for g in self.gaps],
        }

    def _origin_json(self, name: str) -> dict[str, Any]:
        """Return how many matrices of a tensor take their weights from which source, if the policy changed any."""
        origin, is_raised = self.origins.get(name), {"raised": True} if name in self.raised else {}
        return is_raised if origin is None else {"imatrix_values": origin.counts(), **is_raised}


def make_plan(
    catalogue: Catalogue,
    recipe: Recipe,
    imatrix: ImatrixEntries | None = None,
    mixture_version: str = VERSIONS[0],
    policy: Policy | None = None,
) -> Plan:
    """Decide the type of every tensor. Without `policy`, the recipe's policy for missing data applies, else `fail`.
    Raises RecipeError listing all rules that cannot work on this model, UnsupportedError if the recipe is not for
    this arch, and ImatrixError if a policy needs values that cannot be read or raises to a type that does not fit."""
    if not recipe.is_for(catalogue.arch):
        raise UnsupportedError(
            f"{recipe.place('arch')}: the recipe is for {', '.join(recipe.arch)}, but {catalogue.model} is a "
            f"{catalogue.arch}"
        )
    others = mixture_choice(catalogue, recipe, imatrix is not None, mixture_version)
    assigned, warnings = assign_rules(catalogue, recipe, others)
    places = [recipe.place("rules", i) for i in range(len(recipe.rules))]
    by_mixture = recipe.place("otherwise")
    policy = policy_of(recipe, policy)
    entries = completed(catalogue, imatrix, policy) if isinstance(imatrix, Imatrix) else imatrix
    planned, raised_names, rounded_by_rule = [], set(), {}
    for t, index in zip(catalogue.tensors, assigned, strict=True):
        if not t.quantizable:
            nbytes = STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows
            why = "never quantized: norms, router and biases are small and sensitive"
            planned.append(Planned(t, t.source_type, t.source_type, nbytes, "", why, ImatrixStatus.NOT_USED))
            continue
        if index is None:
            asked, place, why = QTYPES[others[t.name]], by_mixture, "llama-quantize's own choice"
        else:
            rule = recipe.rules[index]
            asked, place, why = QTYPES[rule.type], places[index], rule.why
            if rule.rounding is not None:
                rounded_by_rule[t.name] = (rule.rounding, place)
        try:
            given = fitting_type(asked, t.n_cols, mixture_version)
        except KernelError as e:
            at = place if index is None else recipe.place("rules", index, "type")
            raise RecipeError(f"{at}: '{t.name}': {e}; give it another type in a rule before") from None
        if given is not asked:
            why += f" ({asked.name} needs rows of {asked.block}s, these have {t.n_cols}: {given.name})"
        if isinstance(entries, Completed):
            raised = raised_type(t, given, entries, mixture_version)
            if raised is not None:
                asked, given = QTYPES[policy.value("raise")], raised
                raised_names.add(t.name)
                why += f"; {given.name} by the policy {policy.text}, since the importance matrix lacks data"
        status = imatrix_status(t, given.name, recipe, entries)
        nbytes = given.row_bytes(t.n_cols) * t.n_rows
        planned.append(Planned(t, given.name, asked.name, nbytes, place, why, status))
    if recipe.imatrix == "optional" and imatrix is None:
        needs = [t for t in planned if t.imatrix_status == ImatrixStatus.REQUIRED]
        if needs:
            more = f", as {'does' if len(needs) == 2 else 'do'} {len(needs) - 1} more" if len(needs) > 1 else ""
            warnings.append(
                f"{recipe.place('imatrix')}: {needs[0].type} for '{needs[0].tensor.name}' needs an importance matrix"
                f"{more}; say imatrix: required"
            )
    return Plan(
        catalogue, recipe, tuple(planned), tuple(warnings), mixture_version, imatrix=imatrix, policy=policy,
        raised=frozenset(raised_names), rounding=rounding_of(recipe, planned, rounded_by_rule),
    )  # fmt: skip


def with_moments(plan: Plan, covariance: CovarianceSource | None) -> Plan:
    """The plan with a covariance (quantkit.planning.rounding.with_covariance). One that is computed in the build gives
    the importance too, where the plan needs some and has none. Raises SourceError."""
    needs = plan.recipe.imatrix == "required" or any(t.imatrix_status == ImatrixStatus.REQUIRED for t in plan.tensors)
    if needs and plan.imatrix is None and plan.rounding is not None and plan.policy == FAIL and is_by_layer(covariance):
        plan = make_plan(plan.catalogue, plan.recipe, covariance, plan.mixture_version, plan.policy)
    return with_covariance(plan, covariance)


def policy_of(recipe: Recipe, given: Policy | None, default: Policy = FAIL) -> Policy:
    """Return the policy for missing data: the given one, else the recipe's, else the default."""
    if given is not None:
        return given
    return default if recipe.imatrix_policy is None else parse_policy(recipe.imatrix_policy)


def mixture_choice(catalogue: Catalogue, recipe: Recipe, has_imatrix: bool, version: str) -> dict[str, str]:
    """Return the type that `otherwise: mixture NAME` gives each quantizable tensor; {} without a mixture. The
    mixture sees the whole model, including tensors that rules take, so a rule changes only its own tensors' types.
    As in llama-quantize, only tensors named by --tensor-type are skipped."""
    if recipe.mixture is None:
        return {}
    numbers = facts(catalogue, has_imatrix or recipe.imatrix == "required", version)
    taken = taken_by_patterns(catalogue, recipe)
    seen = [t._replace(quantizable=False) if t.name in taken else t for t in catalogue.tensors]
    types = mixture_types(recipe.mixture, seen, numbers)
    return dict(zip((t.name for t in seen if t.quantizable), types, strict=True))


def imatrix_status(t: Tensor, given: str, recipe: Recipe, imatrix: ImatrixEntries | None) -> ImatrixStatus:
    """Return how an importance matrix affects a tensor of the given type."""
    if given == t.source_type:  # its blocks are copied
        return ImatrixStatus.NOT_USED
    n_mats = n_matrices(t)
    fits = imatrix is None or t.name not in imatrix or imatrix.fits(t.name, t.n_cols, n_mats)
    # llama-quantize treats a wrong size as an error except for token_embd, which does without
    if not fits and t.role != Role.EMBEDDING:
        return ImatrixStatus.WRONG_SIZE
    if not QTYPES[given].uses_imatrix:
        return ImatrixStatus.NOT_USED
    needs = must_have_weights(t.name, given, recipe.file_type)
    if imatrix is None:
        return ImatrixStatus.REQUIRED if needs or recipe.imatrix == "required" else ImatrixStatus.OPTIONAL
    if t.name not in imatrix or not fits:
        return ImatrixStatus.NEEDED if needs else ImatrixStatus.MISSING
    return ImatrixStatus.USED


def must_have_weights(name: str, given: str, file_type: str) -> bool:
    """Whether llama-quantize refuses this type without weights. token_embd and output are exempt,
    except for types that make it abort (src/llama-quant.cpp, tensor_requires_imatrix)."""
    if name in OUTSIDE_LAYERS:
        return given in ABORT_WITHOUT_IMATRIX
    return QTYPES[given].needs_imatrix or (given == "Q2_K" and file_type == "Q2_K_S")


def check_imatrix(plan: Plan, given: bool) -> None:
    """Raise ImatrixError if a build of the plan would lack weights that it must have."""
    if not given:
        if plan.recipe.imatrix == "required":
            raise ImatrixError(
                f"the recipe {plan.recipe.name} requires an importance matrix; give one with --imatrix FILE "
                "(llama-imatrix makes them, and published quantizations often come with theirs)"
            )
        needs = [t for t in plan.tensors if t.imatrix_status == ImatrixStatus.REQUIRED]
        if needs:
            more = len(needs) - 1
            others = f", as {'does' if more == 1 else 'do'} {more} more" if more else ""
            raise ImatrixError(
                f"'{needs[0].tensor.name}' as {needs[0].type} needs an importance matrix{others}; give one with "
                "--imatrix FILE"
            )
        return
    for status, what, which in (
        (ImatrixStatus.WRONG_SIZE, "an entry of the wrong size", ""),
        (ImatrixStatus.NEEDED, "no entry", " that must have one"),
    ):
        bad = [t for t in plan.tensors if t.imatrix_status == status]
        if bad:
            t = bad[0]
            raise ImatrixError(
                f"the importance matrix has {what} for {len(bad)} tensor{'s' * (len(bad) > 1)}{which}, the first "
                f"'{t.tensor.name}' as {t.type} ({n_matrices(t.tensor)} x {t.tensor.n_cols} values); "
                f"is it of this model and layout?{about_kv_b(plan.imatrix, plan.policy, [b.tensor.name for b in bad])}"
            )


def missing_note(plan: Plan) -> list[str]:
    """Return a note on tensors that have no entry and do without, or []."""
    missing = [t for t in plan.tensors if t.imatrix_status == ImatrixStatus.MISSING]
    if not missing:
        return []
    names = ", ".join(sorted({family_of(t.tensor.name) for t in missing}))
    says = f"{len(missing)} tensors have no entry in the importance matrix, and do without: {names}"
    return [says + about_kv_b(plan.imatrix, plan.policy, [t.tensor.name for t in missing])]


def types_asked(tensors: Iterable[Planned]) -> Iterator[tuple[str, str]]:
    """Yield name and type of every tensor passed to the quantizer: all but those that are never quantized."""
    return ((t.tensor.name, t.type) for t in tensors if t.tensor.quantizable)


def with_values(plan: Plan, imatrix: Imatrix | None) -> Plan:
    """Make all checks that a build makes of an importance matrix, reading every value, and return the completed plan.
    `weights` is the matrix as completed by the plan's policy, `origins` what the policy changed, and `gaps` what is
    still missing. Raises ImatrixError, including for experts never seen to which the policy gives no data."""
    check_imatrix(plan, imatrix is not None or plan.weights_in_pass)
    return plan if imatrix is None else _with_values(plan, imatrix, plan.tensors)


def values_of(plan: Plan, imatrix: Imatrix, tensors: Iterable[Planned]) -> Completed:
    """Return the weights of some tensors of a plan, checked as `with_values` does. Raises ImatrixError."""
    weights = _with_values(plan, imatrix, tensors).weights
    assert weights is not None
    return weights


def _with_values(plan: Plan, imatrix: Imatrix, tensors: Iterable[Planned]) -> Plan:
    found = imatrix.check()
    weights = completed(plan.catalogue, imatrix, plan.policy)
    used = [t for t in tensors if t.imatrix_status == ImatrixStatus.USED]
    every = {t.tensor.name: weights.origin(t.tensor.name) for t in used}
    gaps = [gap for t in used if (gap := gap_of(t.tensor, t.type, every[t.tensor.name], found.get(t.tensor.name)))]
    left = [gap for gap in gaps if UNSEEN in every[gap.tensor].sources]
    if left:
        raise ImatrixError(never_seen(left, plan.policy))
    origins = {name: origin for name, origin in every.items() if origin.is_filled}
    return replace(plan, gaps=tuple(gaps), origins=origins, weights=weights)

"""Catalogue x Recipe -> Plan: the type of every tensor, the rule that chose it, its bytes. And lint.

A plan is pure data. A rule that cannot do what its author meant is an error here, not a surprise in
the file: it matches nothing, earlier rules take all it matches, or it names tensors that are never
quantized. Where only the model's size is to blame (a small sibling has fewer layers than the rule's
slice), it is a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .catalogue import Catalogue, Tensor
from .errors import ImatrixError, KernelError, RecipeError, UnsupportedError, did_you_mean
from .mixtures import facts, mixture_types
from .qtypes import ABORT_WITHOUT_IMATRIX, QTYPES, fit, qtype
from .recipe import Recipe, Rule, expand_braces, glob_regex, pick_layers


class Weights(Protocol):
    """What a plan needs to know of an importance matrix."""

    def __contains__(self, name: str) -> bool: ...
    def fits(self, name: str, n_cols: int, n_mats: int) -> bool: ...


class Planned(NamedTuple):
    """A tensor with its decision."""

    tensor: Tensor
    type: str
    """the type it gets"""
    requested: str
    """the type asked for; another than `type` where the shape does not allow it"""
    nbytes: int
    rule: str
    """file:line rules[i], or '' for a tensor that is never quantized"""
    why: str
    imatrix: str
    """used | missing | needed | wrong size | not used | required | optional; see `imatrix_status`"""

    @property
    def fell_back(self) -> bool:
        return self.type != self.requested


@dataclass(frozen=True)
class Plan:
    """Every tensor of the output with its decision, in the order of the file."""

    catalogue: Catalogue
    recipe: Recipe
    tensors: tuple[Planned, ...]
    warnings: tuple[str, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def n_elements(self) -> int:
        return sum(t.tensor.n_elements for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits a weight as llama.cpp prints it: all tensor bytes over all elements."""
        return 8 * self.tensor_bytes / self.n_elements

    def types(self) -> dict[str, int]:
        """Tensors of each type, in the order of ggml's ids."""
        counts = Counter(t.type for t in self.tensors)
        return {name: counts[name] for name in sorted(counts, key=lambda n: QTYPES[n].id)}

    def to_json(self, file_bytes: int | None) -> dict[str, Any]:
        """The plan as plain values; shapes in GGUF (ne) order. `file_bytes` comes from the layout."""
        c = self.catalogue
        return {
            "model": c.model,
            "arch": c.arch,
            "layout": c.layout,
            "recipe": self.recipe.name,
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
                    "imatrix": t.imatrix,
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
            "warnings": list(self.warnings),
            "notes": list(c.notes),
        }


def make_plan(catalogue: Catalogue, recipe: Recipe, imatrix: Weights | None = None) -> Plan:
    """Decide every tensor. Raises RecipeError for rules that cannot work on this model, all of them
    at once, and UnsupportedError when the recipe is not for this arch."""
    if catalogue.arch not in recipe.arch:
        raise UnsupportedError(
            f"{recipe.place('arch')}: the recipe is for {', '.join(recipe.arch)}, but {catalogue.model} is a "
            f"{catalogue.arch}"
        )
    claims, warnings = _claim(catalogue, recipe)
    planned = []
    unruled = []
    others = _otherwise(catalogue, recipe, imatrix is not None)
    for t, index in zip(catalogue.tensors, claims, strict=True):
        if not t.quantizable:
            nbytes = qtype(t.source_type).row_bytes(t.n_cols) * t.n_rows
            why = "never quantized: norms, router and biases are small and sensitive"
            planned.append(Planned(t, t.source_type, t.source_type, nbytes, "", why, "not used"))
        elif index is None and t.name not in others:
            unruled.append(t.name)
        else:
            if index is None:
                asked, place, why = QTYPES[others[t.name]], recipe.place("otherwise"), "llama-quantize's own choice"
            else:
                rule = recipe.rules[index]
                asked, place, why = QTYPES[rule.type], recipe.place("rules", index), rule.why
            try:
                given = fit(asked, t.n_cols)
            except KernelError as e:
                at = place if index is None else recipe.place("rules", index, "type")
                raise RecipeError(f"{at}: '{t.name}': {e}; give it another type in a rule before") from None
            if given is not asked:
                why += f" ({asked.name} needs rows of {asked.block}s, these have {t.n_cols}: {given.name})"
            status = imatrix_status(t, given.name, recipe, imatrix)
            nbytes = given.row_bytes(t.n_cols) * t.n_rows
            planned.append(Planned(t, given.name, asked.name, nbytes, place, why, status))
    if unruled:
        more = f" (and {len(unruled) - 1} more)" if len(unruled) > 1 else ""
        raise RecipeError(
            f"{recipe.place('rules')}: no rule gives a type to '{unruled[0]}'{more}; add a rule that matches it, "
            'such as a last one with match: "*.weight"'
        )
    return Plan(catalogue, recipe, tuple(planned), tuple(warnings))


def _otherwise(catalogue: Catalogue, recipe: Recipe, has_imatrix: bool) -> dict[str, str]:
    """What `otherwise: mixture NAME` gives each quantizable tensor; nothing without it. The mixture sees
    the whole model, also the tensors that rules take, so a rule changes no type but its own tensors'."""
    if recipe.otherwise is None:
        return {}
    numbers = facts(catalogue, has_imatrix or recipe.imatrix == "required")
    types = mixture_types(recipe.otherwise.removeprefix("mixture "), catalogue.tensors, numbers)
    return dict(zip((t.name for t in catalogue.tensors if t.quantizable), types, strict=True))


def imatrix_status(t: Tensor, given: str, recipe: Recipe, imatrix: Weights | None) -> str:
    """How an importance matrix bears on a tensor of that type.

    used: it has an entry of the right size · missing: it has none, the tensor is quantized without ·
    needed: it has none, and the type must have one · wrong size: the entry does not fit ·
    not used: the type has no use for it · without an imatrix: required or optional.
    """
    qt = QTYPES[given]
    if not qt.uses_imatrix or given == t.source_type:  # of the same type already: its blocks are copied
        return "not used"
    needs = must_have_weights(t.name, given, recipe.file_type)
    if imatrix is None:
        return "required" if needs or recipe.imatrix == "required" else "optional"
    if t.name not in imatrix:
        return "needed" if needs else "missing"
    n_mats = t.shape[2] if len(t.shape) > 2 else 1
    if not imatrix.fits(t.name, t.n_cols, n_mats):
        # llama-quantize: an entry of the wrong size is an error, but for token_embd, which does without
        return ("needed" if needs else "missing") if t.role == "embedding" else "wrong size"
    return "used"


def must_have_weights(name: str, given: str, file_type: str) -> bool:
    """Whether llama-quantize refuses that type without weights. token_embd and output are excused,
    but for types that abort it (src/llama-quant.cpp, tensor_requires_imatrix)."""
    if name in ("token_embd.weight", "output.weight", "per_layer_token_embd.weight"):
        return given in ABORT_WITHOUT_IMATRIX
    return QTYPES[given].needs_imatrix or (given == "Q2_K" and file_type == "Q2_K_S")


def check_imatrix(plan: Plan, given: bool) -> None:
    """Raise ImatrixError when a build of the plan would lack weights it must have."""
    if not given:
        if plan.recipe.imatrix == "required":
            raise ImatrixError(
                f"the recipe {plan.recipe.name} requires an importance matrix; give one with --imatrix FILE "
                "(llama-imatrix makes them, and published quantizations often come with theirs)"
            )
        needs = [t for t in plan.tensors if t.imatrix == "required"]
        if needs:
            more = len(needs) - 1
            others = f", as {'does' if more == 1 else 'do'} {more} more" if more else ""
            raise ImatrixError(
                f"'{needs[0].tensor.name}' as {needs[0].type} needs an importance matrix{others}; give one with "
                "--imatrix FILE"
            )
        return
    for status, what in (("wrong size", "an entry of the wrong size"), ("needed", "no entry")):
        bad = [t for t in plan.tensors if t.imatrix == status]
        if bad:
            t = bad[0]
            n_mats = t.tensor.shape[2] if len(t.tensor.shape) > 2 else 1
            raise ImatrixError(
                f"the importance matrix has {what} for {len(bad)} tensor{'s' * (len(bad) > 1)} that must have one, the "
                f"first '{t.tensor.name}' as {t.type} ({n_mats} x {t.tensor.n_cols} values); is it of this model and "
                "layout?"
            )


# ---------------------------------------------------------------- which rule takes which tensor


class _Match(NamedTuple):
    rule: Rule
    layers: frozenset[int] | None
    names: frozenset[str]
    """quantizable tensors it matches, before earlier rules take theirs"""


def _claim(catalogue: Catalogue, recipe: Recipe) -> tuple[list[int | None], list[str]]:
    """For each tensor the index of the first rule that matches it; and warnings. Raises RecipeError."""
    groups = catalogue.layer_groups()
    errors: list[str] = []
    warnings: list[str] = []
    matches = [_match(rule, catalogue.tensors, groups) for rule in recipe.rules]
    owner: dict[str, int] = {}
    for i, m in enumerate(matches):
        for name in m.names:
            owner.setdefault(name, i)
    won = Counter(owner.values())
    for i, m in enumerate(matches):
        never = _never_quantized(m.rule, catalogue.tensors)
        place = recipe.place("rules", i, "match")
        if never is not None:
            errors.append(f"{place}: {never}")
        elif m.rule.optional:
            continue
        elif not m.names:
            if m.layers is not None and not m.layers and _matches_any(m.rule, catalogue.tensors):
                warnings.append(
                    f"{recipe.place('rules', i, 'layers')}: '{m.rule.layers}' takes no layer of this model's "
                    f"{catalogue.n_layers}; the rule is unused"
                )
            else:
                errors.append(f"{place}: '{m.rule.match}' matches no tensor{_nearest(m, catalogue.tensors)}")
        elif not won[i]:
            takers = sorted({owner[name] for name in m.names})
            by = ", ".join(recipe.place("rules", k) for k in takers)
            by_unsliced = set().union(*(matches[k].names for k in takers if matches[k].rule.layers is None))
            if m.names <= by_unsliced:
                n = len(m.names)
                them = f"all {n} tensors it matches are" if n > 1 else "the only tensor it matches is"
                errors.append(f"{place}: {them} already taken by {by}")
            else:
                leave = "leave" if len(takers) > 1 else "leaves"
                warnings.append(f"{place}: on a model of {catalogue.n_layers} layers, {by} {leave} it nothing")
    if errors:
        raise RecipeError("\n".join(errors))
    return [owner.get(t.name) for t in catalogue.tensors], warnings


def _match(rule: Rule, tensors: Sequence[Tensor], groups: Mapping[str, Sequence[int]]) -> _Match:
    layers = None if rule.layers is None else pick_layers(rule.layers, groups)
    pattern = rule.matcher()
    names = frozenset(
        t.name for t in tensors if t.quantizable and (layers is None or t.layer in layers) and pattern.match(t.name)
    )
    return _Match(rule, layers, names)


def _matches_any(rule: Rule, tensors: Sequence[Tensor]) -> bool:
    pattern = rule.matcher()
    return any(t.quantizable and pattern.match(t.name) for t in tensors)


def _never_quantized(rule: Rule, tensors: Sequence[Tensor]) -> str | None:
    """An error when one of the pattern's alternatives names only tensors that are never quantized."""
    for alternative in expand_braces(rule.match):
        pattern = re.compile(glob_regex(alternative))
        hits = [t for t in tensors if pattern.match(t.name)]
        if hits and not any(t.quantizable for t in hits):
            return (
                f"'{alternative}' names tensors that are never quantized, such as '{hits[0].name}' "
                f"({hits[0].role}, stays {hits[0].source_type})"
            )
    return None


def _nearest(m: _Match, tensors: Sequence[Tensor]) -> str:
    if m.layers is not None and _matches_any(m.rule, tensors):
        return f" in the layers {m.rule.layers} (it does in others)"
    shapes = {re.sub(r"^blk\.\d+\.", "blk.*.", t.name) for t in tensors if t.quantizable}
    return did_you_mean(expand_braces(m.rule.match)[0], shapes)

"""Which rule takes which tensor, and what is wrong with rules that cannot do what their author meant.

An error: a rule matches nothing, earlier rules take all it matches, or it names tensors that are
never quantized. A warning: only the model's size is to blame (a small sibling has fewer layers than
the rule's slice), or the rule changes nothing, since its tensors would get the same type without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..base.errors import RecipeError, did_you_mean, listed
from ..model.catalogue import Catalogue, Tensor
from ..recipe.load import Recipe
from ..recipe.schema import Rule
from ..recipe.selectors import expand_braces, glob_regex, pick_layers


class Match(NamedTuple):
    """A rule on a model."""

    rule: Rule
    layers: frozenset[int] | None
    """those its slice takes; None without one"""
    names: frozenset[str]
    """quantizable tensors it matches, before earlier rules take theirs"""


def assign_rules(catalogue: Catalogue, recipe: Recipe, others: Mapping[str, str]) -> tuple[list[int | None], list[str]]:
    """For each tensor the index of the first rule that matches it; and warnings. `others`: the types of
    the tensors that no rule needs to match. Raises RecipeError."""
    errors: list[str] = []
    warnings: list[str] = []
    matches = match_rules(catalogue, recipe)
    claimants: dict[str, list[int]] = {}
    for i, m in enumerate(matches):
        for name in m.names:
            claimants.setdefault(name, []).append(i)
    owner = {name: rules[0] for name, rules in claimants.items()}
    won = Counter(owner.values())
    for i, m in enumerate(matches):
        place = recipe.place("rules", i, "match")
        never = _never_quantized(m.rule, catalogue.tensors)
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
        elif i >= recipe.n_judged:
            continue  # what a base has is there to be overridden, or what with_types stands before
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
        else:
            idle = _changes_nothing(i, m, recipe, claimants, others)
            if idle is not None:
                warnings.append(f"{place}: changes nothing: {idle}")
    unruled = [t.name for t in catalogue.tensors if t.quantizable and t.name not in owner and t.name not in others]
    if unruled and not errors:
        more = f" (and {len(unruled) - 1} more)" if len(unruled) > 1 else ""
        errors.append(
            f"{recipe.place('rules')}: no rule gives a type to '{unruled[0]}'{more}; add a rule that matches it, "
            'such as a last one with match: "*.weight"'
        )
    if errors:
        raise RecipeError(listed(errors))
    return [owner.get(t.name) for t in catalogue.tensors], warnings


def match_rules(catalogue: Catalogue, recipe: Recipe) -> list[Match]:
    """Each rule with what it matches in a model."""
    groups = catalogue.layer_groups()
    return [_match(rule, catalogue.tensors, groups) for rule in recipe.rules]


def _match(rule: Rule, tensors: Sequence[Tensor], groups: Mapping[str, Sequence[int]]) -> Match:
    layers = None if rule.layers is None else pick_layers(rule.layers, groups)
    pattern = rule.matcher()
    names = frozenset(
        t.name for t in tensors if t.quantizable and (layers is None or t.layer in layers) and pattern.match(t.name)
    )
    return Match(rule, layers, names)


def _changes_nothing(
    i: int, m: Match, recipe: Recipe, claimants: Mapping[str, Sequence[int]], others: Mapping[str, str]
) -> str | None:
    """Who would give all the rule's tensors the same type, if they would."""
    heirs = set()
    for name in m.names:
        if claimants[name][0] == i:
            after = claimants[name][1:]
            if (recipe.rules[after[0]].type if after else others.get(name)) != m.rule.type:
                return None
            heirs.add(recipe.place("rules", after[0]) if after else recipe.place("otherwise"))
    return f"{' and '.join(sorted(heirs))} would give its tensors {m.rule.type} too"


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


def _nearest(m: Match, tensors: Sequence[Tensor]) -> str:
    if m.layers is not None and _matches_any(m.rule, tensors):
        return f" in the layers {m.rule.layers} (it does in others)"
    shapes = {re.sub(r"^blk\.\d+\.", "blk.*.", t.name) for t in tensors if t.quantizable}
    return did_you_mean(expand_braces(m.rule.match)[0], shapes)

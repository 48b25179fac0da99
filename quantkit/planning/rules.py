"""Which rule takes which tensor, and which rules cannot do what their author meant.

Errors: a rule matches nothing, earlier rules take all it matches, or it names tensors that are
never quantized. Warnings: the rule fails only because of the model's size (a small sibling has fewer layers
than the rule's slice), or it changes nothing, since its tensors would get the same type without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..base.errors import RecipeError, did_you_mean, listed
from ..model.catalogue import Catalogue, Tensor, family_of
from ..recipe.changes import ToolRule
from ..recipe.foreign import as_glob
from ..recipe.load import Recipe
from ..recipe.schema import Rule
from ..recipe.selectors import expand_braces, glob_regex, matcher, pick_layers

#: parts of tensor names in checkpoints that names in GGUFs do not have
_CHECKPOINT_NAME = re.compile(r"layers\.|_proj\b|self_attn|\bmlp\b|lm_head|embed_tokens|layernorm")
#: how many names a message shows
_MOST_NAMES = 3


class Match(NamedTuple):
    """What a rule matches in a model."""

    rule: Rule
    layers: frozenset[int] | None
    """the layers its slice takes; None without a slice"""
    names: frozenset[str]
    """quantizable tensors that it matches, including those that earlier rules take"""


def assign_rules(catalogue: Catalogue, recipe: Recipe, others: Mapping[str, str]) -> tuple[list[int | None], list[str]]:
    """Return the index of the first rule that matches each tensor, or None, and warnings. `others`: the types of
    tensors that need no rule. Raises RecipeError."""
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
        if isinstance(m.rule, ToolRule):
            warnings += _tool_warnings(place, m, catalogue.tensors)
            continue
        never = _never_quantized(m.rule, catalogue.tensors)
        if never is not None:
            errors.append(f"{place}: {never}")
        elif m.rule.optional:
            continue
        elif not m.names:
            if m.layers is not None and not m.layers and _matches_any(m.rule, catalogue.tensors):
                warnings.append(
                    f"{recipe.place('rules', i, 'layers')}: '{m.rule.layers}' selects none of this model's "
                    f"{catalogue.n_layers} layers; the rule is unused"
                )
            else:
                errors.append(f"{place}: '{m.rule.match}' matches no tensor{_nearest(m, catalogue)}")
        elif i >= recipe.n_judged:
            continue  # rules of a base, and rules behind those of with_types, are there to be overridden
        elif not won[i]:
            takers = sorted({owner[name] for name in m.names})
            by = ", ".join(recipe.place("rules", k) for k in takers)
            by_unsliced = set().union(*(matches[k].names for k in takers if matches[k].rule.layers is None))
            if m.names <= by_unsliced:
                n = len(m.names)
                them = f"all {n} tensors it matches are" if n > 1 else "the only tensor it matches is"
                errors.append(f"{place}: {them} already taken by {by}")
            else:
                take = "take" if len(takers) > 1 else "takes"
                warnings.append(f"{place}: on a model of {catalogue.n_layers} layers, {by} {take} all it matches")
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
    """Return what each rule matches in a model."""
    groups = catalogue.layer_groups()
    return [_match(rule, catalogue.tensors, groups) for rule in recipe.rules]


def _match(rule: Rule, tensors: Sequence[Tensor], groups: Mapping[str, Sequence[int]]) -> Match:
    layers = None if rule.layers is None else pick_layers(rule.layers, groups)
    pattern = rule.matcher()
    if isinstance(rule, ToolRule) and rule.if_tied and any(t.name == "output.weight" for t in tensors):
        return Match(rule, layers, frozenset())
    names = frozenset(
        t.name for t in tensors if t.quantizable and (layers is None or t.layer in layers) and pattern.match(t.name)
    )
    return Match(rule, layers, names)


def taken_by_patterns(catalogue: Catalogue, recipe: Recipe) -> frozenset[str]:
    """Return the tensors named by patterns of llama-quantize's command line: its mixtures skip them."""
    patterns = [rule for rule in recipe.rules if isinstance(rule, ToolRule) and rule.is_pattern]
    return frozenset(t.name for rule in patterns for t in catalogue.tensors if rule.matcher().match(t.name))


def _tool_warnings(place: str, m: Match, tensors: Sequence[Tensor]) -> list[str]:
    """Return warnings about llama-quantize's own options that llama-quantize itself does not give."""
    if m.names or not (isinstance(m.rule, ToolRule) and m.rule.is_pattern):
        return []
    pattern = m.rule.matcher()
    never = [t for t in tensors if pattern.match(t.name)]
    if never:
        return [f"{place}: does nothing: it names only tensors that are never quantized, such as '{never[0].name}'"]
    return [f"{place}: does nothing: no tensor's name has it"]


def _changes_nothing(
    i: int, m: Match, recipe: Recipe, claimants: Mapping[str, Sequence[int]], others: Mapping[str, str]
) -> str | None:
    """Return which later rules would give all the rule's tensors the same type, or None if the rule matters."""
    heirs = set()
    for name in m.names:
        if claimants[name][0] == i:
            after = claimants[name][1:]
            heir = recipe.rules[after[0]] if after else None
            if (others.get(name) if heir is None else heir.type) != m.rule.type:
                return None
            if (None if heir is None else heir.rounding) != m.rule.rounding:
                return None
            heirs.add(recipe.place("rules", after[0]) if after else recipe.place("otherwise"))
    return f"{' and '.join(sorted(heirs))} would give its tensors {m.rule.type} too"


def _matches_any(rule: Rule, tensors: Sequence[Tensor]) -> bool:
    pattern = rule.matcher()
    return any(t.quantizable and pattern.match(t.name) for t in tensors)


def _never_quantized(rule: Rule, tensors: Sequence[Tensor]) -> str | None:
    """Return an error if one of the pattern's alternatives names only tensors that are never quantized, else None."""
    for alternative in expand_braces(rule.match):
        pattern = re.compile(glob_regex(alternative))
        hits = [t for t in tensors if pattern.match(t.name)]
        if hits and not any(t.quantizable for t in hits):
            return (
                f"'{alternative}' names tensors that are never quantized, such as '{hits[0].name}' "
                f"({hits[0].role}, stays {hits[0].source_type})"
            )
    return None


def _nearest(m: Match, catalogue: Catalogue) -> str:
    """Suggest what a glob that matches nothing may have meant; the text continues a message, or is ''."""
    tensors, glob = catalogue.tensors, m.rule.match
    if m.layers is not None and _matches_any(m.rule, tensors):
        return f" in the layers {m.rule.layers} (it does in others)"
    names = [t.name for t in tensors if t.quantizable]
    of_checkpoint = _as_in_ggufs(glob, catalogue)
    if of_checkpoint:
        return f": it is a name of the checkpoint, and a rule takes a GGUF's: {_quoted(of_checkpoint)}"
    families = {family_of(name) for name in names}
    if f"blk.*.{glob}" in families:
        return f" (did you mean blk.*.{glob}?)"
    # a glob that matches every name cannot be what the author meant
    for meant in (re.sub(r"\*+", "*", f"*{glob}*"), as_glob(glob)):
        hits = [] if meant is None else [n for n in names if matcher(meant).match(n)]
        if hits and len(hits) < len(names):
            return f", since a glob is for the whole name: write {_quoted([meant or glob])}"
    return did_you_mean(expand_braces(glob)[0], families)


def _quoted(names: Sequence[str]) -> str:
    some = " or ".join(f'"{name}"' for name in names[:_MOST_NAMES])
    return some + (" …" if len(names) > _MOST_NAMES else "")


def _as_in_ggufs(glob: str, catalogue: Catalogue) -> list[str]:
    """Return the GGUF names that a glob over checkpoint names matches; layers of one kind are given as blk.*."""
    if _CHECKPOINT_NAME.search(glob) is None:
        return []
    if all(t.parts[:1] and t.parts[0].source == t.name for t in catalogue.tensors):  # a GGUF
        from ..model.families.known import REFERENCES
        from ..model.open import open_model

        known = REFERENCES.get(catalogue.arch)
        if known is None:
            return []
        catalogue = open_model(known)
    for pattern in (matcher(glob), matcher(f"*{glob}*")):
        hits = [t.name for t in catalogue.tensors if any(pattern.match(part.source) for part in t.parts)]
        families = dict.fromkeys(family_of(name) for name in hits)
        if len(families) < len(hits):
            return list(families)
        if hits:
            return hits
    return []

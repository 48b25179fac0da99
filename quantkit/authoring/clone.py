"""Writes the types of a model's tensors as a compact recipe, and proves that the recipe reproduces them.

Tensors are grouped by family (`blk.*.NAME`). A family's most common type is a rule over all its layers. Each of its
other types is a rule before that one: on a slice of a list of layers if one fits (`moe[:6]`, `all[-1]`, `more_bits`),
else on the layers' numbers (`blk.{3,[7-9]}.NAME`). Families of one role that share type and layers share a rule
(`ffn_{gate,up}_exps`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, takewhile
from math import prod
from typing import NamedTuple

from ..base.errors import RecipeError, UnsupportedError
from ..gguf.header import INTEGERS, decode
from ..gguf.types import FILE_TYPES, IK_TYPES, INTEGER_TYPES, QTYPES, fitting_type
from ..model.catalogue import ROLES, Catalogue, Tensor
from ..planning.mixtures import BASE_TYPES, facts, mixture_types
from ..planning.plan import make_plan, must_have_weights
from ..recipe.load import parse
from ..recipe.selectors import LAYER_GROUPS, expand_braces, glob_regex, pick_layers
from ..recipe.yaml_lines import scalar

Types = Mapping[str, str]
"""the type of each quantizable tensor, by its name"""

_BLOCK = re.compile(r"^blk\.(0|[1-9]\d*)\.(?=.)")
_LONGEST_MATCH = 400
_MOST_ALTERNATIVES = 200


class Head(NamedTuple):
    """The part of a recipe before its rules."""

    name: str
    file_type: str
    imatrix: bool
    title: str = ""
    description: str = ""
    comment: str = ""
    """the first line of the file, which says where the recipe comes from"""
    verb: str = "cloned"
    """the first word of every rule's `why`"""


class RoundTrip(NamedTuple):
    """The extent of a comparison in which everything was equal."""

    n_tensors: int
    nbytes: int

    def __str__(self) -> str:
        return f"round trip: {count(self.n_tensors)}, {self.nbytes:,} bytes, all equal"


class Cloned(NamedTuple):
    """A recipe, with its proof and notes."""

    text: str
    proof: RoundTrip
    notes: tuple[str, ...]


def clone(catalogue: Catalogue, source: str, stem: str, name: str | None = None) -> Cloned:
    """Make the recipe of a GGUF's own types. `source` is the file as the user gave it, `stem` its name without .gguf.
    Raises RecipeError for types that a recipe cannot ask for; UnsupportedError for types of ik_llama.cpp."""
    types = {t.name: t.source_type for t in catalogue.tensors if t.quantizable}
    if not types:
        raise RecipeError(f"{source}: of its {count(len(catalogue.tensors))} none can be quantized")
    foreign = Counter(t.source_type for t in catalogue.tensors if t.source_type in IK_TYPES)
    if foreign:
        kinds = ", ".join(f"{name} in {count(n)}" for name, n in foreign.most_common())
        raise UnsupportedError(
            f"{source}: is quantized to types that only ik_llama.cpp has ({kinds}), which no recipe can ask for; "
            "`quantkit inspect --all` lists them, to write a recipe with types of similar size by hand"
        )
    notes = [*([catalogue.partial] if catalogue.partial else []), *_never_quantized_notes(catalogue)]
    file_type, note = _file_type(catalogue, types)
    notes += note
    keys = {item.key for item in catalogue.kvs}
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    imatrix = any(k.startswith("quantize.imatrix.") for k in keys)
    same = _mixture(catalogue, types, file_type, imatrix)
    head = Head(
        name or slug(stem),
        file_type,
        imatrix or needs_imatrix(types, file_type),
        catalogue.model,
        f"The types of {stem}" + (f"; they are those of {same}." if same else "."),
        f"cloned from {source if source.isprintable() else stem} by quantkit recipe from-gguf",
    )
    text = write(catalogue, types, head)
    return Cloned(text, prove(text, catalogue, types), tuple(notes))


def count(n: int) -> str:
    """1 tensor, 1,086 tensors."""
    return f"{n:,} tensor{'s' * (n != 1)}"


def slug(text: str) -> str:
    """Make a recipe's name that is safe in file names."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "cloned"


def needs_imatrix(types: Types, file_type: str) -> bool:
    """Whether llama-quantize refuses any of these types without an importance matrix."""
    return any(must_have_weights(name, given, file_type) for name, given in types.items())


def common_file_type(catalogue: Catalogue, types: Types) -> str:
    """The file type of the most common quantized type, by elements; Q8_0 if there is none."""
    counts: Counter[str] = Counter()
    for t in catalogue.tensors:
        if t.name in types and not QTYPES[types[t.name]].is_float:
            counts[types[t.name]] += t.n_elements
    first = next(iter(counts.most_common(1)), ("Q8_0", 0))[0]
    by_base = [name for name, base in BASE_TYPES.items() if base == first]
    return next((n for n in by_base if n == first or n.endswith("_M")), by_base[0] if by_base else "Q8_0")


def _file_type(catalogue: Catalogue, types: Types) -> tuple[str, list[str]]:
    """Return general.file_type by name. Return another one, with a note, if it has no name or its recipe could not have
    these types."""
    number = next((int(decode(i)) for i in catalogue.kvs if i.key == "general.file_type" and i.type in INTEGERS), None)
    stated = next((name for name, n in FILE_TYPES.items() if n == number), None)
    if stated is not None and not (QTYPES.get(stated, QTYPES["Q8_0"]).is_float and set(types.values()) != {stated}):
        return stated, []
    found = common_file_type(catalogue, types)
    says = "is missing" if number is None else f"is {number}" + (f" ({stated})" if stated else ", which has no name")
    why = ", with which llama-quantize ignores every rule" if stated else ""
    return found, [f"general.file_type {says}{why}; the recipe says {found}, after its commonest type"]


def _never_quantized_notes(catalogue: Catalogue) -> Iterator[str]:
    odd = [
        t for t in catalogue.tensors
        if not t.quantizable and t.source_type != "F32" and t.source_type not in INTEGER_TYPES
    ]  # fmt: skip
    if odd:
        kinds = ", ".join(sorted({f"{_family(t)} {t.source_type}" for t in odd}))
        yield (
            f"not F32, though llama-quantize never quantizes the like: {count(len(odd))} ({kinds}); a recipe cannot "
            "ask for that, and a build from a checkpoint gives what its conversion gives"
        )


def _mixture(catalogue: Catalogue, types: Types, file_type: str, imatrix: bool) -> str | None:
    """The mixture of llama.cpp that gives exactly these types; the file's own is tried first. None if there is none."""
    quantizable = [t for t in catalogue.tensors if t.quantizable]
    wanted = [types[t.name] for t in quantizable]
    for name in sorted(BASE_TYPES, key=lambda n: n != file_type):
        for version in ("current", "2025"):
            for given in (imatrix, not imatrix):
                asked = mixture_types(name, catalogue.tensors, facts(catalogue, given, version))
                gets = (fitting_type(QTYPES[a], t.n_cols).name for a, t in zip(asked, quantizable, strict=True))
                if all(got == want for got, want in zip(gets, wanted, strict=True)):
                    when = "" if version == "current" else " of 2025"
                    how = "" if given == imatrix else f", {'with' if given else 'without'} an importance matrix"
                    return f"llama.cpp's mixture {name}{when}{how}"
    return None


# ---------------------------------------------------------------- rules


class _Rule(NamedTuple):
    names: tuple[str, ...]
    """of the families: the part after blk.N., or whole names"""
    layered: bool
    layers: tuple[int, ...] | None
    """None: all layers of the family"""
    selector: str | None
    type: str
    role: str


def write(catalogue: Catalogue, types: Types, head: Head) -> str:
    """Write a recipe that gives each tensor its type in `types`. Raises RecipeError for a type that cannot be quantized
    to."""
    for name, given in types.items():
        if given in INTEGER_TYPES:
            raise RecipeError(f"'{name}' is {given}, which is not a type to quantize to; a recipe cannot ask for it")
    lines = [f"# {head.comment}"] if head.comment else []
    lines += [f"name: {scalar(head.name)}"]
    lines += [f"{key}: {scalar(value)}" for key, value in (("title", head.title),) if value]
    if head.description:
        lines += [f"description: {scalar(head.description)}"]
    lines += [f"arch: [{scalar(catalogue.arch)}]", f"file_type: {head.file_type}"]
    lines += [f"imatrix: {'required' if head.imatrix else 'optional'}", "rules:"]
    groups = catalogue.layer_groups()
    left = [t for t in catalogue.tensors if t.quantizable]
    others = [t.name for t in left]
    for rule in _merge(_rules(catalogue, types)):
        for match in _globs(rule, others):
            lines.append(f'  - match: "{match}"')
            lines += [f'    layers: "{rule.selector}"'] if rule.selector else []
            glob = re.compile("|".join(glob_regex(g) for g in expand_braces(match)))
            within = pick_layers(rule.selector, groups) if rule.selector else None
            rest = [t for t in left if not (glob.match(t.name) and (within is None or t.layer in within))]
            n, left = len(left) - len(rest), rest
            lines += [f"    type: {rule.type}", f'    why: "{head.verb}: {rule.role}, {count(n)}"']
    return "\n".join(lines) + "\n"


def families(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Group tensors by `blk.*.NAME`, or by their whole name, in order of first occurrence."""
    found: dict[str, list[Tensor]] = {}
    for t in tensors:
        found.setdefault(_family(t), []).append(t)
    return found


def _family(t: Tensor) -> str:
    return _BLOCK.sub("blk.*.", t.name)


def _rules(catalogue: Catalogue, types: Types) -> Iterator[_Rule]:
    """Yield each family's exceptions, then its most common type."""
    groups = catalogue.layer_groups()
    for family, tensors in families(t for t in catalogue.tensors if t.quantizable).items():
        layered, name = family.startswith("blk.*."), family.removeprefix("blk.*.")
        role = tensors[0].role
        by_type: dict[str, list[int]] = {}
        for t in tensors:
            by_type.setdefault(types[t.name], []).append(t.layer if t.layer is not None else -1)
        *others, base = sorted(by_type, key=lambda k: (len(by_type[k]), -QTYPES[k].id))
        every = [t.layer for t in tensors if t.layer is not None]
        for given in reversed(others):
            layers = tuple(by_type[given])
            yield _Rule((name,), layered, layers, _selector(layers, every, groups), given, role)
        yield _Rule((name,), layered, None, None, base, role)


def _selector(wanted: Sequence[int], every: Sequence[int], groups: Mapping[str, Sequence[int]]) -> str | None:
    """The simplest `layers` that selects exactly the wanted ones of a family's layers `every`; None if there is
    none."""
    mine, want = frozenset(every), frozenset(wanted)

    def takes(text: str) -> bool:
        return pick_layers(text, groups) & mine == want

    usable = [g for g in LAYER_GROUPS if want <= frozenset(groups[g])]
    # prefer the list closest to the family's own layers: `moe` for routed experts
    usable.sort(key=lambda g: (len(frozenset(groups[g]) ^ mine), g != "all"))
    for group in sorted(usable, key=lambda g: g == "all"):
        if takes(group):
            return group
    for group in usable:
        layers = groups[group]
        at = sorted(layers.index(n) for n in want)
        first, last, size = at[0], at[-1], len(layers)
        ends = {f"{group}[{first}]": first in (0, 1, 2), f"{group}[-1]": last == size - 1}
        steps = {b - a for a, b in pairwise(at)}
        ends |= {f"{group}[:{last + 1}]": True, f"{group}[{first}:]": True, f"{group}[{first}:{last + 1}]": True}
        if len(at) > 2 and len(steps) == 1:
            ends[f"{group}[{first}:{last + 1}:{min(steps)}]"] = True
        for text, sensible in ends.items():
            if sensible and (len(want) > 1 or ":" not in text) and takes(text):
                return text
    return None


def _merge(rules: Iterable[_Rule]) -> Iterator[_Rule]:
    """Merge rules for families of one role with the same type and layers; order them by role, exceptions first."""

    def key(r: _Rule) -> tuple[object, ...]:
        where = r.selector or ",".join(map(str, r.layers or ()))
        return ROLES.index(r.role), r.layers is None, r.layered, r.selector is None, where, QTYPES[r.type].id

    for _, same in groupby(sorted(rules, key=key), key=key):
        group = list(same)
        yield group[0]._replace(names=tuple(sorted(n for r in group for n in r.names)))


def _globs(rule: _Rule, others: Sequence[str]) -> Iterator[str]:
    """Write the rule's families as globs that match no other tensor; several if one would be too long."""
    layers = None if rule.selector or rule.layers is None else rule.layers
    parts = [alternatives(layers)] if layers is not None else [["*"]]
    if rule.layered and layers is None:
        own = re.compile("|".join(_BLOCK.pattern + re.escape(n) + r"\Z" for n in rule.names))
        glob = re.compile("|".join(glob_regex(f"blk.*.{_escape(n)}") for n in rule.names))
        if any(glob.match(n) and not own.match(n) for n in others):
            # the star in blk.*.NAME also matches dots, and other names here end the same
            digits = max(len(_BLOCK.match(n)[1]) for n in others if own.match(n))  # type: ignore[index]
            parts = [["[0-9]" * k for k in range(1, digits + 1)]]
    for piece in _pieces(parts[0]) if rule.layered else [None]:
        before = "" if piece is None else f"blk.{_braces(piece)}."
        room = _MOST_ALTERNATIVES // len(piece or "1")
        names: list[str] = []
        for name in map(_escape, rule.names):
            if names and (len(names) == room or len(before + _factored([*names, name])) > _LONGEST_MATCH):
                yield before + _factored(names)
                names = []
            names.append(name)
        yield before + _factored(names)


def _pieces(layers: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split the alternatives into lists short enough for a pattern."""
    for i in range(0, len(layers), 60):
        yield layers[i : i + 60]


def alternatives(numbers: Iterable[int]) -> list[str]:
    """Write numbers as patterns of digits and sets, valid in globs and in regular expressions: 3-12, 60 as [3-9],
    1[0-2], 60."""
    return _digits({str(n) for n in numbers})


def _digits(words: set[str]) -> list[str]:
    out: list[str] = []
    for length in sorted({len(w) for w in words}):
        ends: dict[str, set[str]] = {}
        for word in words:
            if len(word) == length:
                ends.setdefault(word[:-1], set()).add(word[-1])
        by_end: dict[str, set[str]] = {}
        for before, last in ends.items():
            by_end.setdefault(_set(last), set()).add(before)
        for last_set, befores in sorted(by_end.items(), key=lambda item: min(item[1])):
            out += [before + last_set for before in (_digits(befores) if length > 1 else [""])]
    return out


def _set(digits: set[str]) -> str:
    """Write digits as a set: 3, [37], [3-9], [0-24]."""
    runs: list[str] = []
    for digit in sorted(digits):
        if runs and int(runs[-1][-1]) == int(digit) - 1:
            runs[-1] = runs[-1][0] + digit
        else:
            runs.append(digit)
    text = "".join(r if len(r) == 1 else r if int(r[1]) == int(r[0]) + 1 else f"{r[0]}-{r[1]}" for r in runs)
    return text if len(text) == 1 else f"[{text}]"


def _braces(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def _factored(names: Sequence[str]) -> str:
    """Factor names: ffn_gate_exps, ffn_up_exps as ffn_{gate,up}_exps; cut at dots and underscores only."""
    if len(names) == 1:
        return names[0]
    before = re.sub(r"[^._]*$", "", _common(names))
    rest = [n[len(before) :] for n in names]
    after = re.sub(r"^[^._]*", "", _common([n[::-1] for n in rest])[::-1])
    middle = [n.removesuffix(after) for n in rest]
    if "" in middle:  # ffn_down and ffn_down_exps: an empty alternative would be hard to read
        after = ".weight" if all(n.endswith(".weight") for n in rest) else ""
        middle = [n.removesuffix(after) for n in rest]
    return f"{before}{_braces(middle)}{after}"


def _common(words: Sequence[str]) -> str:
    """The longest common prefix."""
    return "".join(same[0] for same in takewhile(lambda c: len(set(c)) == 1, zip(*words, strict=False)))


def _escape(name: str) -> str:
    """Escape a name for a glob in double quotes: special characters become ?."""
    return re.sub(r'[*?\[\]{},"\\]', "?", name)


# ---------------------------------------------------------------- proof


def prove(text: str, catalogue: Catalogue, types: Types) -> RoundTrip:
    """Plan the model with the written recipe, as if none of its weights were quantized yet, and compare every tensor's
    type and bytes. Raises RecipeError for the first difference."""
    plain = replace(
        catalogue, tensors=tuple(t._replace(source_type="BF16") if t.quantizable else t for t in catalogue.tensors)
    )
    try:
        plan = make_plan(plain, parse(text, "the recipe"))
    except RecipeError as e:
        raise RecipeError(f"the round trip fails, since a recipe cannot tell some of these names apart: {e}") from None
    nbytes = 0
    for t, planned in zip(catalogue.tensors, plan.tensors, strict=True):
        want = QTYPES[types.get(t.name, t.source_type)]
        wanted_bytes = want.row_bytes(t.n_cols) * prod(t.shape[1:])
        if (planned.type, planned.nbytes) != (want.name, wanted_bytes):
            raise RecipeError(
                f"the round trip fails: '{t.name}' is {want.name} of {wanted_bytes:,} bytes, but the recipe gives "
                f"{planned.type} of {planned.nbytes:,} ({planned.rule}); a recipe cannot tell this tensor from others"
            )
        nbytes += wanted_bytes
    return RoundTrip(len(plan.tensors), nbytes)

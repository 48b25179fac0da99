"""Recipes in the formats of other tools: exported from a plan, and imported as a recipe.

    tensor-types   llama-quantize --tensor-type-file: pattern=type, separated by white space, no comments;
                   patterns are lower-cased; any type name, in any case
    custom-q       ik_llama.cpp's llama-quantize --custom-q: pattern=type, separated by commas; types in ggml's
                   case (q4_K)
    thireus        .recipe of Thireus' GGUF Tool Suite: one pattern=type per line, comments with #

In all three, the first `=` ends the pattern, a pattern is a regular expression (ECMAScript) searched anywhere in the
name, and the first match wins. None of them can state reasons, which layers of another model are meant, or that an
importance matrix is required. All three are also read as model cards print them: with # comments, blank lines, trailing
commas, in shell quotes, on lines continued by a backslash.
Sources: tools/quantize/quantize.cpp and src/llama-quant.cpp of llama.cpp b11434; pull request 244 and
src/llama-quantize.cpp of ikawrakow/ik_llama.cpp; quant_downloader.sh and published recipes of Thireus/GGUF-Tool-Suite.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..base.errors import KernelError, RecipeError, did_you_mean
from ..gguf.types import FILE_TYPES, INTEGER_TYPES, QTYPES, fitting_type
from ..llama_cpp.tensor_types import escape, ggml_name, tensor_type_file
from ..model.catalogue import Catalogue, Tensor
from ..planning.mixtures import facts, mixture_types
from ..planning.plan import Plan, Planned, types_asked
from ..recipe.foreign import tool_regex
from .clone import Head, RoundTrip, alternatives, common_file_type, count, families, needs_imatrix, prove, write

FORMATS = ("tensor-types", "custom-q", "thireus")
_TOOLS = {
    "tensor-types": "llama-quantize --tensor-type-file",
    "custom-q": "ik_llama.cpp's --custom-q",
    "thireus": "a Thireus .recipe",
}

#: ggml's types that ik_llama.cpp also has
_IN_IK = frozenset(QTYPES) - INTEGER_TYPES - {"TQ1_0", "TQ2_0", "NVFP4", "Q1_0", "Q2_0"}
#: types that only ik_llama.cpp has, besides the row-interleaved ones (…_R4)
_IK_ONLY = re.compile(
    r"IQ1_BN|IQ1_KT|IQ2_BN|IQ2_KT|IQ2_KS|IQ2_K|IQ2_KL|IQ3_KT|IQ3_KS|IQ3_K|IQ4_KSS|IQ4_KT|IQ4_KS|IQ4_K|IQ5_KS|IQ5_K"
    r"|IQ6_K|Q6_0|Q8_KV|Q8_K|Q8_1|\w+_R(4|8|16)|Q4_0_\d_\d"
)


class Exported(NamedTuple):
    """A file's text, and notes on what it cannot say."""

    text: str
    notes: tuple[str, ...]


class Imported(NamedTuple):
    """A recipe's text, and what to report about the file it came from."""

    text: str
    proof: RoundTrip
    warnings: tuple[str, ...]
    """lines without effect"""
    notes: tuple[str, ...]


class _Line(NamedTuple):
    place: str
    written: str
    pattern: re.Pattern[str]
    type: str


# ---------------------------------------------------------------- export


def export(plan: Plan, form: str) -> Exported:
    """Write a plan's types in another tool's format: complete, with anchored patterns. Raises RecipeError for names and
    types that the format cannot express."""
    said = [t for t in plan.tensors if t.tensor.quantizable or form == "thireus"]
    forbidden = {"tensor-types": r"[A-Z\s=]", "custom-q": r"[\s=,'\"]", "thireus": r"[\s=]"}[form]
    for t in said:
        bad = re.search(forbidden, t.tensor.name)
        if bad:
            raise RecipeError(f"'{t.tensor.name}': {_TOOLS[form]} has no way to write a name with {bad[0]!r}")
        if form != "tensor-types" and t.type not in _IN_IK:
            raise RecipeError(
                f"'{t.tensor.name}' is {t.type}, which is not among the types of ik_llama.cpp; give it another type, "
                "or export as tensor-types"
            )
    notes = list(_unsaid(plan, form))
    if form == "tensor-types":
        return Exported(tensor_type_file(types_asked(plan.tensors)), tuple(notes))
    rules = list(_compact(said))
    if form == "custom-q":
        return Exported(",".join(f"{pattern}={ggml_name(t.type)}" for pattern, t in rules) + "\n", tuple(notes))
    return Exported(_thireus(plan, rules), tuple(notes))


def _compact(tensors: Sequence[Planned]) -> Iterator[tuple[str, Planned]]:
    """One anchored pattern per family and type, over its layers; no two patterns match the same name."""
    by_name = {t.tensor.name: t for t in tensors}
    for family, members in families(t.tensor for t in tensors).items():
        by_type: dict[str, list[Tensor]] = {}
        for m in members:
            by_type.setdefault(by_name[m.name].type, []).append(m)
        for same in by_type.values():
            first = by_name[same[0].name]
            if not family.startswith("blk.*.") or same[0].layer is None:
                yield f"^{escape(same[0].name)}$", first
                continue
            numbers = alternatives(t.layer for t in same if t.layer is not None)
            layers = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
            yield rf"^blk\.{layers}\.{escape(family.removeprefix('blk.*.'))}$", first


def _thireus(plan: Plan, rules: Sequence[tuple[str, Planned]]) -> str:
    lines = [
        f"## {plan.recipe.name}" + (f": {_one_line(plan.recipe.title)}" if plan.recipe.title else ""),
        f"# Model: {_one_line(plan.catalogue.model)} ({plan.catalogue.arch}, layout {plan.catalogue.layout})",
        f"# {plan.tensor_bytes:,} bytes of tensors, {plan.bpw:.4f} BPW; imatrix {plan.recipe.imatrix}",
        "# Written by quantkit recipe export: every tensor, each by one line",
    ]
    role = ""
    for pattern, t in sorted(rules, key=lambda r: not r[1].tensor.quantizable):
        if (now := t.tensor.role if t.tensor.quantizable else "never quantized") != role:
            lines += ["", f"## {now}"]
            role = now
        lines.append(f"{pattern}={ggml_name(t.type)}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _unsaid(plan: Plan, form: str) -> Iterator[str]:
    """Notes on what the recipe says and the file cannot."""
    c, recipe = plan.catalogue, plan.recipe
    yield f"the file is for {c.model} (layout {c.layout}) only: its layers are written out"
    yield f"the reasons of the recipe's {len(recipe.rules)} rules are left out"
    fell = [t for t in plan.tensors if t.fell_back]
    if fell:
        yield (
            f"the type that the rows allow, not the one the recipe asks for, is given to {count(len(fell))}, the first "
            f"{fell[0].tensor.name} {fell[0].requested} -> {fell[0].type}"
        )
    if plan.rounding is not None:
        yield f"how {count(len(plan.rounding.choices))} are rounded is left out: other tools round as ggml does"
    if recipe.imatrix == "required":
        yield "the recipe requires an importance matrix: give llama-quantize --imatrix FILE"
    base = recipe.file_type
    if form != "thireus" and QTYPES.get(base, QTYPES["Q8_0"]).is_float:
        yield (
            f"with {base} as its type llama-quantize ignores every rule: give it Q8_0, and --override-kv "
            f"general.file_type=int:{FILE_TYPES[base]}"
        )
    elif form != "thireus":
        yield f"general.file_type is no part of the file: give llama-quantize {base} as its type"


# ---------------------------------------------------------------- import


def import_rules(
    text: str,
    form: str,
    catalogue: Catalogue,
    name: str,
    source: str,
    file_type: str | None = None,
    has_imatrix: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> Imported:
    """Make a recipe that gives the tensors of a model the types of a file's rules.

    Tensors that no rule matches get llama-quantize's choice for `file_type`: its mixture, whose counters skip tensors
    that rules match. `renamed`: types of the file -> types of ggml. Raises RecipeError with the line that cannot be
    read, and for unmatched tensors without a file type."""
    lines = [_line(place, token, form, renamed or {}) for place, token in _tokens(text, form, source)]
    if not lines:
        raise RecipeError(f"{source}: has no rule pattern=type")
    if file_type is not None and QTYPES.get(file_type, QTYPES["Q8_0"]).is_float:
        raise RecipeError(f"with {file_type} as its type llama-quantize ignores every rule; give a quantized one")
    hits = [[t for t in catalogue.tensors if line.pattern.search(t.name)] for line in lines]
    owner: dict[str, _Line] = {}
    for line, matched in zip(lines, hits, strict=True):
        for t in matched:
            owner.setdefault(t.name, line)
    quantizable = [t for t in catalogue.tensors if t.quantizable]
    asked = {t.name: owner[t.name].type for t in quantizable if t.name in owner}
    unmatched = [t for t in quantizable if t.name not in owner]
    warnings = list(_dead_lines(lines, hits))
    notes = list(_line_notes(lines, hits, owner))
    if form == "tensor-types" and re.search(r"(?:^|\s)#", text):
        notes.append("the comments are passed over; llama-quantize itself refuses a file that has them")
    if unmatched:
        asked |= _from_mixture(catalogue, unmatched, file_type, has_imatrix, source)
        notes.append(f"no line matches {count(len(unmatched))}: llama-quantize's choice for {file_type}")
        if form != "tensor-types":
            notes.append(f"that is llama.cpp's choice; ik_llama.cpp may have another for {file_type}")
    types = {}
    fell = set()
    for t in quantizable:
        try:
            types[t.name] = fitting_type(QTYPES[asked[t.name]], t.n_cols).name
        except KernelError as e:
            raise RecipeError(f"{owner[t.name].place if t.name in owner else source}: '{t.name}': {e}") from None
        if types[t.name] != asked[t.name]:
            fell.add(f"{t.name} {asked[t.name]} -> {types[t.name]}")
    if fell:
        notes.append(
            f"another type than asked, since rows do not divide into its blocks: {count(len(fell))}, the first "
            f"{min(fell)}"
        )
    base = file_type or common_file_type(catalogue, types)
    head = Head(
        name, base, has_imatrix or needs_imatrix(types, base), catalogue.model, "",
        f"imported from {source if source.isprintable() else form} ({form}) by quantkit recipe import",
        "imported",
    )  # fmt: skip
    written = write(catalogue, types, head)
    return Imported(written, prove(written, catalogue, types), tuple(warnings), tuple(notes))


def _from_mixture(
    catalogue: Catalogue, unmatched: Sequence[Tensor], file_type: str | None, has_imatrix: bool, source: str
) -> dict[str, str]:
    if file_type is None:
        more = f" (and {len(unmatched) - 1} more)" if len(unmatched) > 1 else ""
        raise RecipeError(
            f"{source}: no line matches '{unmatched[0].name}'{more}; say with --file-type what llama-quantize was "
            "given as its type, such as Q4_K_M"
        )
    names = {t.name for t in unmatched}
    seen = [t if t.name in names else t._replace(quantizable=False) for t in catalogue.tensors]
    chosen = mixture_types(file_type, seen, facts(catalogue, has_imatrix))
    return dict(zip((t.name for t in unmatched), chosen, strict=True))


#: quoted rules in a script: --custom-q "…", or custom="…" for a later --custom-q "$custom"
_QUOTED = re.compile(
    r"""(?:--custom-q[ =]\s*|^[ \t]*(?:export[ \t]+)?\w+=)(["'])(?P<rules>(?:(?!\1)[\s\S])*)\1""", re.M
)
#: quotes around a rule that are not part of it: of a shell, a word processor or Markdown
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"


def _script_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without what model cards put around rules: comments, shell quotes, continuations by \\."""
    quoted = next((m for m in _QUOTED.finditer(text) if "=" in m["rules"]), None)
    if quoted is not None:
        text = "\n" * text.count("\n", 0, quoted.start("rules")) + quoted["rules"]
    held, begun = "", 0
    for n, raw in enumerate(text.split("\n"), 1):
        line = re.sub(r"(?:^|\s)#.*", "", raw.strip("\ufeff \t"))
        if line.startswith("```"):
            continue
        if re.search(r"(?<!\\)(?:\\\\)*\\$", line):
            held, begun = held + line[:-1], begun or n
            continue
        yield begun or n, held + line
        held, begun = "", 0
    if held:
        yield begun, held


def _tokens(text: str, form: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield the place and text of each rule."""
    for n, line in _script_lines(text):
        if form == "custom-q":  # which splits at every comma
            words = re.sub(r"^--custom-q[ =]", "", line).split(",")
        else:
            apart = re.sub(r"(=\w+)\s*,", r"\1\n", line)
            words = apart.split("\n") if form == "thireus" else re.sub(r"(?:^|\s)--tensor-type[ =]", " ", apart).split()
        rules = [rule for word in words if (rule := word.strip().strip(_QUOTES).strip())]
        for i, rule in enumerate(rules, 1):
            yield f"{source}:{n}" + (f" rule {i}" if form == "custom-q" and len(rules) > 1 else ""), rule


def _line(place: str, token: str, form: str, renamed: Mapping[str, str]) -> _Line:
    written, equals, type_ = token.partition("=")
    if not (written and equals and type_):
        raise RecipeError(f"{place}: '{token:.60}' is not pattern=type")
    odd = next((ch for ch in token if not ch.isprintable()), None)
    if odd is not None:
        raise RecipeError(f"{place}: '{token:.60}' has the invisible character U+{ord(odd):04X}; take it out")
    return _Line(place, written, _regex(place, written, form), _type(place, type_, renamed))


def _type(place: str, type_: str, renamed: Mapping[str, str]) -> str:
    name = {k.upper(): v.upper() for k, v in renamed.items()}.get(type_.upper(), type_.upper())
    if name in QTYPES and name not in INTEGER_TYPES:
        return name
    if _IK_ONLY.fullmatch(name):
        raise RecipeError(
            f"{place}: {type_:.60} is a type of ik_llama.cpp that ggml does not have; say what to take for it with "
            f"--map {type_}=TYPE, such as one of similar size"
        )
    raise RecipeError(f"{place}: unknown type '{type_:.60}'{did_you_mean(name, set(QTYPES) - INTEGER_TYPES)}")


def _regex(place: str, written: str, form: str) -> re.Pattern[str]:
    """Compile a pattern with the tool's own meaning."""
    try:
        return tool_regex(written, in_lower_case=form == "tensor-types")
    except ValueError as e:
        raise RecipeError(f"{place}: {e}") from None


def _dead_lines(lines: Sequence[_Line], hits: Sequence[Sequence[Tensor]]) -> Iterator[str]:
    """Warn about lines without effect."""
    for line, matched in zip(lines, hits, strict=True):
        said = f"{line.place}: '{line.written:.80}'"
        if not matched:
            yield f"{said} matches no tensor of this model"
        elif not any(t.quantizable for t in matched) and any(t.source_type != line.type for t in matched):
            kinds = _list(sorted({t.source_type for t in matched}))
            n = count(len(matched))
            yield f"{said} is ignored: llama-quantize never quantizes what it matches ({n}, {kinds})"


def _line_notes(lines: Sequence[_Line], hits: Sequence[Sequence[Tensor]], owner: Mapping[str, _Line]) -> Iterator[str]:
    """Note lines that are not read as written, or match less than they seem to."""
    for line, matched in zip(lines, hits, strict=True):
        said = f"{line.place}: '{line.written:.80}'"
        if line.pattern.pattern != line.written:
            yield f"{said} is read as llama-quantize does, in lower case: '{line.pattern.pattern:.80}'"
        quantizable = [t for t in matched if t.quantizable]
        lost = [t for t in quantizable if owner[t.name] is not line and owner[t.name].type != line.type]
        if lost:
            takers = _list(dict.fromkeys(owner[t.name].place for t in lost))
            yield f"{said}: {len(lost)} of the {len(quantizable)} it matches are taken before, by {takers}"


def _list(words: Iterable[str]) -> str:
    every = list(words)
    return ", ".join(every[:3]) + (", …" if len(every) > 3 else "")

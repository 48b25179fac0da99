"""Recipes: YAML files of ordered rules, first match wins, each with its reason. Read, checked, resolved.

    name: UD-IQ1_S
    title: DeepSeek-R1 dynamic 1.58-bit
    arch: [deepseek2]
    file_type: IQ1_S            # general.file_type, and the base type given to llama-quantize
    imatrix: required           # required | optional
    rules:
      - {match: "blk.*.ffn_down_exps.weight", layers: "moe[:6]", type: IQ2_XXS, why: "…"}

`RecipeFile` (schema.py) is what a file may hold; `Recipe` is what it comes to: its base's rules
behind its own, variables replaced by types. Errors end in their place: file:line rules[i].key: what,
and what was perhaps meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ..base.errors import RecipeError, did_you_mean, listed
from ..gguf.types import QTYPES
from .named import ANY_ARCH, is_file, looks_like_path, read_text, shipped_name
from .schema import Override, RecipeFile, Rule, known_type, messages, parse_override
from .yaml_lines import Marked, read


class Rounding(NamedTuple):
    """How a recipe, or the command line, wants tensors rounded: by a method, or by a policy."""

    method: str
    """one of ROUNDINGS; '' with a policy"""
    policy: str = ""
    """a shipped one's name, or its path from `folder`"""
    folder: Path | None = None
    text: str | None = None
    """the policy's, where it is at hand"""
    said_by: str = ""
    """'file:line rounding' or the option, for messages and readers of the plan"""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, its base and variables resolved."""

    name: str
    title: str
    description: str
    arch: tuple[str, ...]
    file_type: str
    imatrix: str
    """required | optional"""
    imatrix_policy: str | None
    """what stands in for data that the importance matrix lacks (quantkit.imatrix.policies)"""
    mixture: str | None
    """the llama.cpp mixture that decides for tensors no rule matches"""
    rules: tuple[Rule, ...]
    """those given to `with_types`, its own, then its base's; every type a ggml type"""
    n_own: int
    """how many of the rules are its own"""
    variables: Mapping[str, str]
    metadata: tuple[Override, ...]
    base: str | None
    text: str = field(repr=False, compare=False)
    """as it was read"""
    base_text: tuple[str, str] | None = field(repr=False, compare=False)
    """its base's, and the name of its file"""
    _own: Marked = field(repr=False, compare=False)
    _base: Marked | None = field(repr=False, compare=False)
    given: tuple[str, ...] = ()
    """where each rule was given that `with_types` put in front of those of the file"""
    n_given_last: int = 0
    """how many of them the last call gave"""
    rounding: Rounding | None = None
    """how tensors are rounded of which their rule says nothing else; None as ggml does it"""

    @property
    def n_judged(self) -> int:
        """How many rules, from the first, must change something; those behind are there to be overridden."""
        return self.n_given_last or self.n_own

    def with_types(self, types: Mapping[str, str]) -> Recipe:
        """The recipe with a rule in front for each glob over whole tensor names: its type. Of several that match a
        tensor the first counts, of several calls the last. Raises RecipeError."""
        if not types:
            return self
        rules = []
        for glob, type_ in types.items():
            place = f"with_types[{glob!r}]"
            try:
                rules.append((place, Rule(match=glob, type=known_type(type_), why="given to with_types")))
            except ValidationError as e:
                raise RecipeError(f"{place}: {e.errors()[0]['ctx']['error']}") from None
            except ValueError as e:
                raise RecipeError(f"{place}: {e}") from None
        return self.with_rules(rules)

    def with_rules(self, rules: Sequence[tuple[str, Rule]]) -> Recipe:
        """The recipe with other rules in front, each with its place for messages. Raises RecipeError for types that its
        file_type excludes."""
        if not rules:
            return self
        wrong = [f"{place}: {said}" for place, rule in rules if (said := _excluded(rule.type, self.file_type))]
        if wrong:
            raise RecipeError(listed(wrong))
        given = (*(place for place, _ in rules), *self.given)
        return replace(self, rules=(*(rule for _, rule in rules), *self.rules), given=given, n_given_last=len(rules))

    def renamed(self, name: str, metadata: tuple[Override, ...]) -> Recipe:
        """The recipe with another name and other metadata."""
        return replace(self, name=name, metadata=metadata)

    def with_rounding(self, rounding: Rounding) -> Recipe:
        """The recipe with that for all of its tensors, whatever its rules say."""
        rules = tuple(rule.model_copy(update={"rounding": None}) for rule in self.rules)
        return replace(self, rules=rules, rounding=rounding)

    def is_for(self, arch: str) -> bool:
        """Whether it is for models of that arch."""
        return arch in self.arch or ANY_ARCH in self.arch

    def place(self, *path: str | int) -> str:
        """'file:line rules[i].key' of something in this recipe or in its base."""
        if path and path[0] == "rules" and len(path) > 1 and isinstance(path[1], int):
            if path[1] < len(self.given):
                return self.given[path[1]]
            path = ("rules", path[1] - len(self.given), *path[2:])
        if self._base is not None and path:
            if path[0] == "rules" and len(path) > 1 and isinstance(path[1], int) and path[1] >= self.n_own:
                return self._base.place("rules", path[1] - self.n_own, *path[2:])
            if path[0] not in self._own.value and path[0] in self._base.value:
                return self._base.place(*path)
        return self._own.place(*path)


def parse(
    text: str,
    file: str,
    sets: Mapping[str, str] | None = None,
    folder: Path | None = None,
    base_text: tuple[str, str] | None = None,
) -> Recipe:
    """A recipe from its text; `file` is for messages, `sets` are --set's, a base is looked for in
    `folder` unless its text and name are given. Raises RecipeError with file, line, place and suggestion."""
    own, given = _read(text, file)
    if given.base is None:
        base_text = None
    elif base_text is None:
        base_text = _base_text(own, given.base, folder)
    if base_text is None:
        made = _resolve(own, given, None, None, sets or {}, text, None)
        return replace(made, rounding=_rounding(made, given.rounding, folder))
    base, below = _read(*base_text)
    if below.base is not None:
        raise RecipeError(
            f"{own.place('base')}: {given.base} has a base itself, {below.base}; one level is allowed: copy its rules"
        )
    made = _resolve(own, given, base, below, sets or {}, text, base_text)
    if given.rounding is not None or folder is None:
        return replace(made, rounding=_rounding(made, given.rounding or below.rounding, folder))
    return replace(made, rounding=_rounding(made, below.rounding, folder / Path(given.base or "").parent))


def _rounding(recipe: Recipe, said: Any, folder: Path | None) -> Rounding | None:
    """What a recipe's `rounding` comes to. A policy's path is from the recipe's folder."""
    if said is None:
        return None
    place = recipe.place("rounding")
    return (
        Rounding("", said["policy"], folder, None, place) if isinstance(said, dict) else Rounding(said, said_by=place)
    )


def _read(text: str, file: str) -> tuple[Marked, RecipeFile]:
    marked = read(text, file)
    if not isinstance(marked.value, dict):
        raise RecipeError(f"{file}:1 a recipe is a mapping with name, arch, file_type and rules")
    given, wrong = None, []
    try:
        given = RecipeFile.model_validate(marked.value)
    except ValidationError as e:
        wrong = list(messages(e, marked))
    if "base" not in marked.value:
        wrong += [f"{marked.place(key)}: is missing" for key in ("arch", "file_type") if key not in marked.value]
        if not marked.value.get("rules", []) and marked.value.get("otherwise") is None:
            wrong.append(f"{marked.place('rules')}: {'is empty' if 'rules' in marked.value else 'is missing'}")
    if given is None or wrong:
        raise RecipeError(listed(wrong))
    return marked, given


def _base_text(own: Marked, name: str, folder: Path | None) -> tuple[str, str]:
    """The text of a recipe's base, and the name of its file."""
    try:
        return read_text(name, folder)
    except RecipeError as e:
        raise RecipeError(f"{own.place('base')}: {e}") from None


def _resolve(
    own: Marked,
    given: RecipeFile,
    base: Marked | None,
    below: RecipeFile | None,
    sets: Mapping[str, str],
    text: str,
    base_text: tuple[str, str] | None,
) -> Recipe:
    layers = (given,) if below is None else (given, below)
    variables = {k: v for one in reversed(layers) for k, v in one.vars.items()}
    for name, value in sets.items():
        if name not in variables:
            have = f"; it has {', '.join(variables)}" if variables else "; it has none"
            raise RecipeError(
                f"--set {name}: {given.name} has no variable '{name}'{did_you_mean(name, variables)}{have}"
            )
        try:
            variables[name] = known_type(value)
        except ValueError as e:
            raise RecipeError(f"--set {name}: {e}") from None
    metadata = {k: parse_override(k, v) for one in reversed(layers) for k, v in one.metadata.items()}
    otherwise = next((one.otherwise for one in layers if one.otherwise), None)
    recipe = Recipe(
        name=given.name,
        title=given.title,
        description=given.description,
        arch=tuple(next((one.arch for one in layers if one.arch), ())),
        file_type=next((one.file_type for one in layers if one.file_type), ""),
        imatrix=next((one.imatrix for one in layers if one.imatrix), "optional"),
        imatrix_policy=next((one.imatrix_policy for one in layers if one.imatrix_policy), None),
        mixture=otherwise.removeprefix("mixture ") if otherwise else None,
        rules=tuple(rule for one in layers for rule in one.rules),
        n_own=len(given.rules),
        variables=variables,
        metadata=tuple(metadata.values()),
        base=given.base,
        text=text,
        base_text=base_text,
        _own=own,
        _base=base,
    )
    wrong, rules, used = [], [], set()
    for i, written in enumerate(recipe.rules):
        rule = written
        if rule.type.startswith("$"):
            name = rule.type[1:]
            used.add(name)
            if name not in variables:
                wrong.append(
                    f"{recipe.place('rules', i, 'type')}: no variable '{name}'{did_you_mean(name, variables)}; "
                    "define it under vars"
                )
                continue
            rule = rule.model_copy(update={"type": variables[name]})
        if said := _excluded(rule.type, recipe.file_type):
            wrong.append(f"{recipe.place('rules', i, 'type')}: {said}")
        rules.append(rule)
    if not wrong:
        unused = [name for name in variables if name not in used]
        wrong = [f"{recipe.place('vars', name)}: no rule uses the variable '{name}'" for name in unused]
    if wrong:
        raise RecipeError(listed(wrong))
    return Recipe(**{**recipe.__dict__, "rules": tuple(rules)})


def _excluded(type_: str, file_type: str) -> str:
    """Why a rule's type cannot be had with a file type; '' where it can."""
    if not QTYPES.get(file_type, QTYPES["Q8_0"]).is_float or type_ == file_type:
        return ""
    return (
        f"{type_} cannot be had with file_type {file_type}: llama-quantize then ignores all rules; give a quantized "
        "file_type"
    )


def load(name: str, sets: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by the name of a shipped one, or by the path of a YAML file. Raises RecipeError."""
    text, file = read_text(name, Path())
    return parse(text, file, sets, Path(name).parent)


def files_of(name: str) -> tuple[Path, ...]:
    """The files that a recipe consists of: its own, its base's, its policy of rounding; none of quantkit's own."""
    path = Path(name)
    if not looks_like_path(path) and shipped_name(name) is not None:
        return ()
    found = [path]
    with suppress(RecipeError):
        recipe = load(name)
        base, rounding = recipe.base, recipe.rounding
        if base is not None and (looks_like_path(Path(base)) or is_file(path.parent / base)):
            found.append(path.parent / base)
        if rounding is not None and rounding.folder is not None and is_file(rounding.folder / rounding.policy):
            found.append(rounding.folder / rounding.policy)
    return tuple(found)


def parse_sets(values: Sequence[str]) -> dict[str, str]:
    """--set NAME=TYPE, each, as a mapping. Raises RecipeError."""
    out = {}
    for value in values:
        name, equals, given = value.partition("=")
        if not equals or not name or not given:
            raise RecipeError(f"--set {value:.60}: is not NAME=TYPE, such as down=Q2_K")
        out[name] = given
    return out

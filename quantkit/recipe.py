"""Recipes: YAML files of ordered rules, first match wins, each with its reason. Read, checked, resolved.

    name: UD-IQ1_S
    title: DeepSeek-R1 dynamic 1.58-bit
    arch: [deepseek2]
    file_type: IQ1_S            # general.file_type, and the base type given to llama-quantize
    imatrix: required           # required | optional
    rules:
      - {match: "blk.*.ffn_down_exps.weight", layers: "moe[:6]", type: IQ2_XXS, why: "…"}

`match` is a glob over whole GGUF names: `*` any run of characters, `?` one, `[ab]`, `[a-z]` and `[!a]`
one of a set, `{a,b}` alternatives, which are written out before all else. `layers` is a Python slice
or index over a named list of layers: all, dense, moe, more_bits. A rule with `optional: true` may
match nothing. Errors end in their place: file:line rules[i].key: what, and what was perhaps meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from .errors import KernelError, RecipeError, did_you_mean
from .qtypes import FILE_TYPES, INTEGER_TYPES, QTYPES, qtype

LAYER_GROUPS = ("all", "dense", "moe", "more_bits")
_MAX_BYTES = 1 << 20
_MAX_ALTERNATIVES = 256
_MAX_PATTERN = 1000


def _known_type(value: str) -> str:
    try:
        name = qtype(value).name
    except KernelError as e:
        raise ValueError(str(e)) from None
    if name in INTEGER_TYPES:
        raise ValueError(f"{name} is not a type to quantize to")
    return name


def _known_file_type(value: str) -> str:
    if value not in FILE_TYPES:
        raise ValueError(f"unknown file type '{value}'{did_you_mean(value, FILE_TYPES)}")
    return value


def _good_otherwise(value: str) -> str:
    word, _, name = value.partition(" ")
    if word != "mixture" or not name:
        raise ValueError(f"'{value:.60}' is not 'mixture NAME', such as mixture Q2_K")
    if name not in FILE_TYPES:
        raise ValueError(f"unknown mixture '{name:.60}'{did_you_mean(name, FILE_TYPES)}")
    return value


def _good_pattern(value: str) -> str:
    for alternative in expand_braces(value):
        glob_regex(alternative)
    return value


def _good_layers(value: str) -> str:
    parse_layers(value)
    return value


class Rule(BaseModel):
    """One rule of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: Annotated[str, Field(min_length=1), AfterValidator(_good_pattern)]
    """a glob with braces over whole GGUF tensor names"""
    layers: Annotated[str, AfterValidator(_good_layers)] | None = None
    """only in these layers: all, dense, moe or more_bits, with an optional Python slice or index"""
    type: Annotated[str, AfterValidator(_known_type)]
    """the ggml type"""
    why: Annotated[str, Field(min_length=1)]
    """the reason, for whoever reads the plan"""
    optional: bool = False
    """no error when it matches nothing"""

    def matcher(self) -> re.Pattern[str]:
        return _matcher(self.match)


class Recipe(BaseModel):
    """A checked recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]
    title: str = ""
    description: str = ""
    arch: Annotated[list[str], Field(min_length=1)]
    file_type: Annotated[str, AfterValidator(_known_file_type)]
    imatrix: Literal["required", "optional"] = "optional"
    otherwise: Annotated[str, AfterValidator(_good_otherwise)] | None = None
    """mixture NAME: what llama-quantize itself would choose, for tensors that no rule matches"""
    rules: list[Rule]

    @field_validator("rules")
    @classmethod
    def _some_decision(cls, value: list[Rule], info: ValidationInfo) -> list[Rule]:
        if not value and info.data.get("otherwise", "wrong") is None:
            raise ValueError("is empty")
        return value

    _file: str = ""
    _lines: dict[tuple[str | int, ...], int] = {}

    def place(self, *path: str | int) -> str:
        """'file:line rules[i].key' of something in this recipe."""
        return _place(self._file, self._lines, path)


# ---------------------------------------------------------------- patterns


def expand_braces(pattern: str) -> list[str]:
    """A glob with {a,b} alternatives as the list of globs without; braces may nest. Raises ValueError."""
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"'{pattern:.60}…' is longer than {_MAX_PATTERN:,} characters")
    # for every open brace, the alternatives before the last comma, and those that are being written
    open_: list[tuple[list[str], list[str]]] = [([], [""])]
    for token in re.split("([{},])", pattern):
        done, now = open_[-1]
        if token == "{":
            open_.append(([], [""]))
        elif token == "," and len(open_) > 1:
            open_[-1] = (done + now, [""])
        elif token == "}":
            open_.pop()
            if not open_:
                break
            choices, (done, now) = done + now, open_[-1]
            if len(done) + len(now) * len(choices) > _MAX_ALTERNATIVES:
                raise ValueError(f"'{pattern:.60}' has more than {_MAX_ALTERNATIVES} alternatives")
            open_[-1] = (done, [a + b for a in now for b in choices])
        else:
            open_[-1] = (done, [a + token for a in now])
    if len(open_) != 1:
        raise ValueError(f"'{pattern:.60}' has a brace without its partner")
    return open_[0][1]


_group = count()


def glob_regex(pattern: str) -> str:
    """A brace-free glob as a regular expression for the whole name. Raises ValueError.

    What stands between two stars is taken where it first occurs, and no second place is tried (it
    could not match more), so that no pattern takes long: as in the standard library's fnmatch.
    """
    pieces = [""]
    i = 0
    while i < len(pattern):
        ch = pattern[i]
        i += 1
        if ch == "*":
            if pieces[-1] or len(pieces) == 1:
                pieces.append("")
        elif ch == "?":
            pieces[-1] += "."
        elif ch == "[":
            negated = pattern[i : i + 1] in ("!", "^")
            end = pattern.find("]", i + negated + 1)
            if end < 0:
                raise ValueError(f"'{pattern:.60}' has a '[' without its ']'")
            pieces[-1] += f"[{'^' * negated}{_set_regex(pattern[i + negated : end], pattern)}]"
            i = end + 1
        else:
            pieces[-1] += re.escape(ch)
    first, middle, last = pieces[0], pieces[1:-1], pieces[-1] if len(pieces) > 1 else ""
    names = [f"g{next(_group)}" for _ in middle]
    once = "".join(f"(?=(?P<{name}>.*?{piece}))(?P={name})" for name, piece in zip(names, middle, strict=True))
    return f"(?s:{first}{once}{'.*' if len(pieces) > 1 else ''}{last})\\Z"


def _set_regex(body: str, pattern: str) -> str:
    """What stands in the brackets of a set: characters, and ranges such as a-z."""
    out = ""
    while body:
        if len(body) > 2 and body[1] == "-":
            if body[0] > body[2]:
                raise ValueError(f"'{pattern:.60}' has a set with the empty range {body[:3]}")
            out += f"{re.escape(body[0])}-{re.escape(body[2])}"
            body = body[3:]
        else:
            out += re.escape(body[0])
            body = body[1:]
    return out


@lru_cache(maxsize=1024)
def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(glob_regex(p) for p in expand_braces(pattern)))


_LAYERS = re.compile(r"(?P<group>\w+)\s*(?:\[\s*(?P<index>[^\]]*?)\s*\])?")
_NUMBER = re.compile(r"[+-]?\d{1,6}")


def parse_layers(text: str) -> tuple[str, int | slice | None]:
    """'moe[:6]' as ('moe', slice(None, 6)), 'all[-1]' as ('all', -1), 'dense' as ('dense', None). Raises ValueError."""
    m = _LAYERS.fullmatch(text.strip())
    if m is None:
        raise ValueError(f"'{text:.60}' is not a layer list with a slice, such as moe, moe[:6] or all[-1]")
    if m["group"] not in LAYER_GROUPS:
        raise ValueError(
            f"unknown layer list '{m['group']:.60}'{did_you_mean(m['group'], LAYER_GROUPS)}; "
            f"there are {', '.join(LAYER_GROUPS)}"
        )
    if m["index"] is None:
        return m["group"], None
    numbers = [n.strip() for n in m["index"].split(":")]
    if not all(_NUMBER.fullmatch(n) or (n == "" and len(numbers) > 1) for n in numbers) or len(numbers) > 3:
        raise ValueError(f"'[{m['index']:.60}]' is not a Python slice or index, such as [:6], [6:] or [-1]")
    if len(numbers) == 1:
        return m["group"], int(numbers[0])
    if len(numbers) == 3 and numbers[2] != "" and int(numbers[2]) == 0:
        raise ValueError(f"'[{m['index']:.60}]' has a step of 0")
    return m["group"], slice(*(int(n) if n else None for n in numbers))


def pick_layers(text: str, groups: Mapping[str, Sequence[int]]) -> frozenset[int]:
    """The layer numbers a selector takes from a model's layer lists; an index beyond the list takes none."""
    group, index = parse_layers(text)
    layers = groups[group]
    if index is None:
        return frozenset(layers)
    if isinstance(index, slice):
        return frozenset(layers[index])
    return frozenset(layers[index : index + 1 or None])


# ---------------------------------------------------------------- reading


def shipped() -> dict[str, str]:
    """Names of the recipes that come with quantkit, and the texts of their files."""
    folder = files("quantkit.recipes")
    found = {}
    for item in folder.iterdir():
        if item.name.endswith(".yaml"):
            found[item.name.removesuffix(".yaml")] = item.read_text("utf-8")
    return dict(sorted(found.items()))


def load(name: str) -> Recipe:
    """A recipe by the name of a shipped one, or by the path of a YAML file. Raises RecipeError."""
    path = Path(name)
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_path:
        known = shipped()
        by_lower = {k.lower(): k for k in known}
        if name.lower() in by_lower:
            key = by_lower[name.lower()]
            return parse(known[key], f"{key}.yaml")
        if not path.is_file():
            raise RecipeError(
                f"no shipped recipe is called '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}; "
                "a recipe of your own is given as a path ending in .yaml"
            )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(
                f"{name}: {path.stat().st_size:,} bytes are too many for a recipe (at most {_MAX_BYTES:,})"
            )
        text = path.read_text("utf-8")
    except OSError as e:
        raise RecipeError(f"{name}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise RecipeError(f"{name}: is not UTF-8 text: {e.reason} at byte {e.start}") from None
    return parse(text, path.name)


Lines = dict[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a recipe has no use for them, and they are how a small file becomes a large one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            what = f"'*{event.anchor}' is an alias, which recipes do without"
            raise yaml.composer.ComposerError("while scanning an alias", event.start_mark, what, event.start_mark)
        return super().compose_node(parent, index)


def parse(text: str, file: str) -> Recipe:
    """A recipe from its text; `file` is for messages. Raises RecipeError with file, line, place and suggestion."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise RecipeError(f"{file}:1 the recipe is empty")
        lines: Lines = {}
        value = _plain(node, (), lines, file)
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise RecipeError(f"{file}:{line} not valid YAML: the character {chr(e.character)!r} is not allowed") from None
    except yaml.MarkedYAMLError as e:
        where = f"{file}:{e.problem_mark.line + 1}" if e.problem_mark is not None else file
        hint = "; a pattern that begins with * needs quotes" if e.context == "while scanning an alias" else ""
        raise RecipeError(f"{where} not valid YAML: {e.problem}{hint}") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested too deeply for a recipe") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{file}:1 a recipe is a mapping with name, arch, file_type and rules")
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as e:
        raise RecipeError("\n".join(_messages(e, file, lines))) from None
    recipe._file, recipe._lines = file, lines
    if QTYPES.get(recipe.file_type, QTYPES["Q8_0"]).is_float:
        for i, rule in enumerate(recipe.rules):
            if rule.type != recipe.file_type:
                raise RecipeError(
                    f"{recipe.place('rules', i, 'type')}: {rule.type} cannot be had with file_type {recipe.file_type}: "
                    "llama-quantize then ignores all rules; give a quantized file_type"
                )
    return recipe


_TAG = "tag:yaml.org,2002:"
_RESOLVER = yaml.SafeLoader("")


def _plain(node: yaml.Node, path: tuple[str | int, ...], lines: Lines, file: str) -> Any:
    """A YAML node as plain values, remembering the line of each. Scalars are text as written, but for
    true, false and null. No tags, no duplicate keys."""
    lines[path] = node.start_mark.line + 1
    here = f"{file}:{lines[path]} {_dotted(path)}".rstrip()
    plain_tag = _RESOLVER.resolve(type(node), node.value, (True, False))  # type: ignore[no-untyped-call]
    if node.tag not in (_TAG + "str", plain_tag):
        raise RecipeError(f"{here}: has the tag {node.tag.replace(_TAG, '!!')}, which recipes do without")
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _TAG + "bool":
            return yaml.SafeLoader.bool_values[node.value.lower()]
        return None if node.tag == _TAG + "null" else node.value
    if len(path) > 6:
        raise RecipeError(f"{here}: nested too deeply for a recipe")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), lines, file) for i, child in enumerate(node.value)]
    out: dict[str, Any] = {}
    assert isinstance(node, yaml.MappingNode)
    for key_node, child in node.value:
        line, key = key_node.start_mark.line + 1, key_node.value
        if not isinstance(key, str):
            raise RecipeError(f"{file}:{line} {_dotted(path)}".rstrip() + ": a key must be text")
        at = (*path, key)
        if key in out:
            raise RecipeError(f"{file}:{line} {_dotted(at)}: occurs twice")
        out[key] = _plain(child, at, lines, file)
        lines[at] = line
    return out


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _place(file: str, lines: Lines, path: Sequence[str | int]) -> str:
    at = tuple(path)
    while at and at not in lines:
        at = at[:-1]
    return f"{file}:{lines.get(at, 1)} {_dotted(path)}".rstrip()


#: what pydantic calls a mistake, in a recipe's words
_WANTED = {
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "list_type": "should be a list",
    "model_type": "should be a mapping",
}


def _messages(error: ValidationError, file: str, lines: Lines) -> Iterator[str]:
    for e in error.errors():
        path = tuple(e["loc"])
        here = _place(file, lines, path)
        fields: Mapping[str, Any] = Rule.model_fields if path[:1] == ("rules",) else Recipe.model_fields
        kind, last = e["type"], str(path[-1]) if path else ""
        if kind == "extra_forbidden":
            yield f"{here}: unknown key '{last}'{did_you_mean(last, fields)}; known are {', '.join(fields)}"
        elif kind == "missing":
            yield f"{here}: is missing"
        elif kind == "value_error":
            yield f"{here}: {e['ctx']['error']}"
        elif kind in ("string_too_short", "too_short"):
            yield f"{here}: is empty"
        elif kind == "literal_error":
            yield f"{here}: should be {e['ctx']['expected']}, not {e['input']!r:.60}"
        else:
            yield f"{here}: {_WANTED.get(kind, e['msg'])}, not {e['input']!r:.60}"

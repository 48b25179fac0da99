"""Recipes: YAML files of ordered rules, first match wins, each with its reason. Read, checked, resolved.

    name: UD-IQ1_S
    title: DeepSeek-R1 dynamic 1.58-bit
    arch: [deepseek2]
    file_type: IQ1_S            # general.file_type, and the base type given to llama-quantize
    imatrix: required           # required | optional
    rules:
      - {match: "blk.*.ffn_down_exps.weight", layers: "moe[:6]", type: IQ2_XXS, why: "…"}

`match` is a glob over whole GGUF names: `*` any run of characters, `?` one, `[ab]` one of a set,
`{a,b}` alternatives. `layers` is a Python slice or index over a named list of layers: all, dense,
moe, more_bits. A rule with `optional: true` may match nothing. Errors end in their place:
file:line rules[i].key: what, and what was perhaps meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import KernelError, RecipeError, did_you_mean
from .qtypes import FILE_TYPES, INTEGER_TYPES, QTYPES, qtype

LAYER_GROUPS = ("all", "dense", "moe", "more_bits")
_MAX_BYTES = 1 << 20
_MAX_ALTERNATIVES = 256
_MAX_DEPTH = 20


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


def _good_pattern(value: str) -> str:
    for alternative in expand_braces(value):
        glob_regex(alternative)
    return value


def _good_layers(value: str) -> str:
    parse_layers(value)
    return value


class Rule(BaseModel):
    """One rule of a recipe. `line` is where it stands in its file (1 = first)."""

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
    rules: Annotated[list[Rule], Field(min_length=1)]

    _file: str = ""
    _lines: dict[tuple[str | int, ...], int] = {}

    def place(self, *path: str | int) -> str:
        """'file:line rules[i].key' of something in this recipe."""
        return _place(self._file, self._lines, path)


# ---------------------------------------------------------------- patterns


def expand_braces(pattern: str) -> list[str]:
    """A glob with {a,b} alternatives as the list of globs without; braces may nest. Raises ValueError."""
    done: list[str] = []
    todo = [pattern]
    while todo:
        text = todo.pop()
        if text.count("{") > _MAX_DEPTH or len(done) + len(todo) > _MAX_ALTERNATIVES:
            raise ValueError(f"'{pattern:.60}' has more than {_MAX_ALTERNATIVES} alternatives")
        close = text.find("}")
        open_ = text.rfind("{", 0, close if close >= 0 else None)
        if close < 0 and open_ < 0:
            done.append(text)
        elif close < 0 or open_ < 0:
            raise ValueError(f"'{pattern:.60}' has a brace without its partner")
        else:
            todo += [text[:open_] + a + text[close + 1 :] for a in reversed(text[open_ + 1 : close].split(","))]
    return done


def glob_regex(pattern: str) -> str:
    """A brace-free glob as a regular expression for the whole name. Raises ValueError."""
    out: list[str] = []
    i = 0
    while i < len(pattern):
        ch = pattern[i]
        i += 1
        if ch == "*":
            if out[-1:] != [".*"]:
                out.append(".*")
        elif ch == "?":
            out.append(".")
        elif ch == "[":
            end = pattern.find("]", i + 1)
            if end < 0:
                raise ValueError(f"'{pattern:.60}' has a '[' without its ']'")
            body = pattern[i:end]
            negated = body[0] in "!^"
            escaped = re.sub(r"([\\^\[&~|])", r"\\\1", body[negated:])
            out.append(f"[{'^' if negated else ''}{escaped}]")
            i = end + 1
        else:
            out.append(re.escape(ch))
    try:
        re.compile("".join(out))
    except re.error as e:
        raise ValueError(f"'{pattern:.60}' is not a usable pattern: {e}") from None
    return "".join(out)


@lru_cache(maxsize=1024)
def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile("(?:" + "|".join(glob_regex(p) for p in expand_braces(pattern)) + r")\Z")


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


def parse(text: str, file: str) -> Recipe:
    """A recipe from its text; `file` is for messages. Raises RecipeError with file, line, place and suggestion."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise RecipeError(f"{file}:1 the recipe is empty")
        lines: Lines = {}
        value = _plain(node, (), lines, file)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark is not None else file
        raise RecipeError(f"{where} not valid YAML: {getattr(e, 'problem', None) or str(e)[:200]}") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested too deeply for a recipe") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{file}:1 a recipe is a mapping with name, arch, file_type and rules")
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as e:
        raise RecipeError("\n".join(_messages(e, file, lines))) from None
    recipe._file, recipe._lines = file, lines
    return recipe


def _plain(node: yaml.Node, path: tuple[str | int, ...], lines: Lines, file: str) -> Any:
    """A YAML node as plain values, remembering the line of each. No aliases (a recipe has no use for
    them, and they are how a small file becomes a large one), no tags, no duplicate keys."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return yaml.SafeLoader("").construct_object(node) if node.tag.startswith("tag:yaml.org") else node.value
    if len(path) > 6:
        raise RecipeError(f"{file}:{lines[path]} {_dotted(path)}: nested too deeply for a recipe")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), lines, file) for i, child in enumerate(node.value)]
    out: dict[Any, Any] = {}
    assert isinstance(node, yaml.MappingNode)
    for key_node, child in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in out:
            raise RecipeError(f"{file}:{key_node.start_mark.line + 1} {_dotted((*path, key))}: occurs twice")
        here = (*path, key)
        out[key] = _plain(child, here, lines, file)
        lines[here] = key_node.start_mark.line + 1
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
        else:
            yield f"{here}: {e['msg']}, not {e['input']!r:.60}"


def type_names() -> list[str]:
    """The types a rule may name."""
    return [name for name in QTYPES if name not in INTEGER_TYPES]

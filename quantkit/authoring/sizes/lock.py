"""The sizes lock: a YAML (or JSON) file with the sizes of recipes x models, in short lines that read well in a diff.

    version: 1
    matrix:                      # as given; names and globs are expanded again at every check
      recipes: [all]
      models: [deepseek-r1]
      layouts: [k_b+v_b, kv_b]
    cells:

    - cell: {recipe: UD-IQ1_S, model: deepseek-r1, layout: kv_b}
      elements: 671026419200
      tensor_bytes: 140226135552
      file_bytes: null           # where the metadata is not complete; else of one file, made without an imatrix
      roles: {embedding: 521256960, …}
      types: {F32: 361, …}
      tensors:
        blk.{3-8}.ffn_down_exps.weight: IQ2_XXS

A cell that cannot be planned has `error` instead of its sizes. The file is written atomically, and contains no time and
no version except its own format's. Errors name file and line.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...base.errors import SourceError, did_you_mean
from ...base.files import text_within
from ...base.outputs import write_text
from ...gguf.types import QTYPES
from ...model.catalogue import ranges
from ...model.families.options import LAYOUTS
from ...recipe.yaml_lines import dotted

DEFAULT_NAMES = ("quantkit-sizes.yaml", "tests/data/quantkit-sizes.yaml")
VERSION = 1
_MAX_BYTES = 64 << 20
_MAX_TENSORS = 1 << 20
_MAX_DEPTH = 8
_REDO = "restore it, or write it again with `quantkit sizes update -r RECIPE -m MODEL`"

Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Matrix(_Model):
    """The inputs: every recipe is planned on every model it is for."""

    recipes: Annotated[list[str], Field(min_length=1)]
    """names of shipped recipes, globs over these, `all`, or paths (and globs) relative to the lock file"""
    models: Annotated[list[str], Field(min_length=1)]
    """names of known models, `all`, paths relative to the lock file, or ids of downloaded repositories"""
    layouts: Annotated[list[str], Field(min_length=1)] = list(LAYOUTS)
    """layouts of the MLA tensors, for models that have them"""


class Key(_Model):
    """The identity of a cell of the matrix."""

    recipe: str
    model: str
    layout: str

    def __str__(self) -> str:
        return f"{self.recipe} on {self.model} ({self.layout})"


class Cell(_Model):
    """The sizes of one recipe on one model, in bytes."""

    cell: Key
    error: str | None = None
    """why it cannot be planned; everything else is then empty"""
    elements: Count = 0
    tensor_bytes: Count = 0
    file_bytes: Count | None = None
    roles: dict[str, Count] = {}
    """bytes by role"""
    types: dict[str, Count] = {}
    """tensors by type"""
    tensors: dict[str, str] = {}
    """type by group of tensors: see `groups`"""


class Lock(_Model):
    version: Literal[1] = 1
    matrix: Matrix
    cells: list[Cell]


# ---------------------------------------------------------------- groups of tensors

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([^{},]+)")
_GROUP = re.compile(r"blk\.(?:\{([\d,-]+)\}|(0|[1-9]\d{0,5}))\.(?:\{([^{}]+)\}|([^{},.]+))((?:\.[^{},]+)?)")


def layer_and_rest(name: str) -> tuple[int | None, str]:
    """Split blk.3.ffn_up.weight into (3, 'ffn_up.weight'), token_embd.weight into (None, 'token_embd.weight')."""
    m = _LAYER.fullmatch(name)
    return (int(m[1]), m[2]) if m else (None, name)


def group_name(layers: Iterable[int], rest: str) -> str:
    """Name the tensors `rest` of these layers in one word: blk.{3-8}.ffn_down_exps.weight."""
    text = ranges(layers)
    return f"blk.{text}.{rest}" if text.isdigit() else f"blk.{{{text}}}.{rest}"


def groups(types: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Group (name, type) of all tensors into {group: type}. Tensors of the same type in the same layers share a group,
    blk.{0-60}.{attn_norm,ffn_norm}.weight. Tensors outside of layers come first."""
    out: dict[str, str] = {}
    by_rest: dict[tuple[str, str], list[int]] = {}
    for name, type_ in types:
        layer, rest = layer_and_rest(name)
        if layer is None:
            out[name] = type_
        else:
            by_rest.setdefault((type_, rest), []).append(layer)
    by_layers: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for (type_, rest), layers in by_rest.items():
        stem, dot, ending = rest.partition(".")
        by_layers.setdefault((type_, tuple(sorted(layers)), dot + ending), []).append(stem)
    found = []
    for (type_, at, ending), stems in by_layers.items():
        stem = stems[0] if len(stems) == 1 else f"{{{','.join(sorted(stems))}}}"
        found.append((at[0], group_name(at, stem + ending), type_))
    return out | {name: type_ for _, name, type_ in sorted(found)}


def _spans(text: str) -> Iterator[range]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not dash):
            yield range(int(first), int(last if dash else first) + 1)


def count_of(group: str) -> int:
    """The number of tensors in a group."""
    m = _GROUP.fullmatch(group)
    if m is None:
        return 1
    return (sum(map(len, _spans(m[1]))) if m[1] else 1) * (m[3].count(",") + 1 if m[3] else 1)


def ungroup(tensors: Mapping[str, str]) -> dict[str, str]:
    """The inverse of `groups`: {name: type} of every tensor."""
    out: dict[str, str] = {}
    for group, type_ in tensors.items():
        m = _GROUP.fullmatch(group)
        if m is None:
            out[group] = type_
        else:
            layers = [i for span in _spans(m[1]) for i in span] if m[1] else [int(m[2])]
            stems = m[3].split(",") if m[3] else [m[4]]
            out |= {f"blk.{i}.{stem}{m[5]}": type_ for i in layers for stem in stems}
    return out


# ---------------------------------------------------------------- reading

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_RESOLVER = yaml.SafeLoader("")
_CONFLICT = re.compile(r"^(<<<<<<<|=======|>>>>>>>)", re.M)
_Lines = dict[tuple[str | int, ...], int]


def is_lock(path: Path) -> bool:
    """Whether a file looks like a sizes lock, even a damaged one: it has a lock's keys, which no other file has."""
    try:
        text = text_within(path, _MAX_BYTES)
    except (OSError, UnicodeDecodeError):
        return False
    return text is not None and re.search(r'^\s*"?(matrix|cells)"?\s*:', text, re.M) is not None


def read_lock(path: Path) -> Lock:
    """Read a lock. Raises SourceError, with the line, if it is missing, damaged or inconsistent."""
    try:
        text = text_within(path, _MAX_BYTES)
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such sizes lock; make it with `quantkit sizes update {path}`") from None
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise SourceError(f"{path}: is not UTF-8 text: {e.reason} at byte {e.start}; {_REDO}") from None
    if text is None:
        raise SourceError(f"{path}: has more bytes than a sizes lock may have ({_MAX_BYTES:,}); {_REDO}")
    return parse(text, str(path))


def parse(text: str, file: str) -> Lock:
    """Parse a lock from YAML or JSON text. `file` is for messages. Raises SourceError."""
    conflict = _CONFLICT.search(text)
    if conflict:
        line = text.count("\n", 0, conflict.start()) + 1
        raise SourceError(f"{file}:{line}: holds an unresolved merge conflict; settle the recipes, then {_REDO}")
    lines: _Lines = {}
    try:
        _check_depth(text, file)  # before compose, which recurses in C
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _plain(node, (), lines, file, set())
    except yaml.reader.ReaderError as e:
        raise SourceError(f"{file}: not valid YAML: {e.reason}; {_REDO}") from None
    except yaml.MarkedYAMLError as e:
        where = f"{file}:{e.problem_mark.line + 1}" if e.problem_mark is not None else file
        raise SourceError(f"{where}: not valid YAML: {e.problem}; {_REDO}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{file}:1: a sizes lock is a mapping with version, matrix and cells; {_REDO}")
    try:
        lock = Lock.model_validate(value)
    except ValidationError as e:
        first = e.errors()[0]
        at = tuple(first["loc"])
        what = f"{dotted(at) or 'the file'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise SourceError(f"{_line(file, lines, at)}: {what}; {_REDO}") from None
    seen: dict[Key, int] = {}
    for i, cell in enumerate(lock.cells):
        if cell.cell in seen:
            raise SourceError(f"{_line(file, lines, ('cells', i))}: {cell.cell} occurs twice; {_REDO}")
        seen[cell.cell] = i
        for path, problem in _problems(cell):
            raise SourceError(f"{_line(file, lines, ('cells', i, *path))}: {cell.cell}: {problem}; {_REDO}")
    for i, layout in enumerate(lock.matrix.layouts):
        if layout not in LAYOUTS:
            where = _line(file, lines, ("matrix", "layouts", i))
            raise SourceError(f"{where}: unknown layout '{layout}'{did_you_mean(layout, LAYOUTS)}")
    return lock


def _check_depth(text: str, file: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise SourceError(f"{file}:{line}: nested too deeply for a sizes lock; {_REDO}")


def _problems(cell: Cell) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield inconsistencies in a cell: (where, what)."""
    for group, type_ in cell.tensors.items():
        if type_ not in QTYPES:
            yield ("tensors", group), f"unknown type '{type_}'{did_you_mean(type_, QTYPES)}"
    if cell.error is not None:
        return
    total = sum(cell.roles.values())
    if total != cell.tensor_bytes:
        yield ("roles",), f"the roles add up to {total:,} bytes, not to the tensor_bytes of {cell.tensor_bytes:,}"
    counted: Counter[str] = Counter()
    for group, type_ in cell.tensors.items():
        counted[type_] += count_of(group)
    for type_ in sorted(counted.keys() | cell.types.keys()):
        if counted[type_] != cell.types.get(type_, 0):
            listed = f"{counted[type_]:,} tensors of {type_} are listed"
            yield ("types",), f"{listed}, but {cell.types.get(type_, 0):,} counted"
    if sum(counted.values()) > _MAX_TENSORS:
        yield ("tensors",), f"{sum(counted.values()):,} tensors are more than any model has"


def _plain(node: yaml.Node, path: tuple[str | int, ...], lines: _Lines, file: str, seen: set[int]) -> Any:
    """Convert a YAML node to plain values: text, whole numbers and null. Aliases and duplicate keys are errors."""
    lines[path] = node.start_mark.line + 1
    if id(node) in seen:
        raise SourceError(f"{file}:{lines[path]}: has a YAML alias, which a sizes lock does without; {_REDO}")
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _TAG + "null":
            return None
        return int(node.value) if node.tag == _TAG + "int" and re.fullmatch(r"\d{1,20}", node.value) else node.value
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), lines, file, seen) for i, child in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    out: dict[str, Any] = {}
    for key_node, child in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        at = (*path, key)
        if not isinstance(key, str):
            raise SourceError(f"{file}:{line}: a key must be text; {_REDO}")
        if key in out:
            raise SourceError(f"{file}:{line}: '{key}' occurs twice; {_REDO}")
        out[key] = _plain(child, at, lines, file, seen)
        lines[at] = line
    return out


def _line(file: str, lines: _Lines, path: tuple[str | int, ...]) -> str:
    while path and path not in lines:
        path = path[:-1]
    return f"{file}:{lines.get(path, 1)}"


# ---------------------------------------------------------------- writing

#: characters that JSON strings may contain, but YAML, which reads them back, may not
_NOT_IN_YAML = re.compile("[^\n -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def dump(lock: Lock, as_json: bool) -> str:
    """Format a lock; equal locks give equal text."""
    if as_json:
        text = json.dumps(_values(lock), indent=1, ensure_ascii=False)
        return _NOT_IN_YAML.sub(lambda m: f"\\u{ord(m[0]):04x}", text) + "\n"
    out = [
        "# Sizes of recipes x models: `quantkit sizes update` writes this file, `quantkit sizes check` compares.",
        f"version: {lock.version}",
        "matrix:",
        *(f"  {key}: {_flow(value)}" for key, value in lock.matrix.model_dump().items()),
        "cells:" if lock.cells else "cells: []",
    ]
    for cell in _values(lock)["cells"]:
        tensors = cell.pop("tensors", {})
        lines = [f"{key}: {_flow(value)}" for key, value in cell.items()]
        out += ["", f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]
        if tensors:
            out.append("  tensors:")
            out += [f"    {_scalar(group, _IN_BLOCK)}: {_scalar(type_)}" for group, type_ in tensors.items()]
    return "\n".join(out) + "\n"


def _values(lock: Lock) -> dict[str, Any]:
    cells = [c.model_dump(include={"cell", "error"} if c.error else None, exclude=_exclude(c)) for c in lock.cells]
    return {"version": lock.version, "matrix": lock.matrix.model_dump(), "cells": cells}


def _exclude(cell: Cell) -> set[str]:
    return set() if cell.error else {"error"}


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "null" if value is None else str(value) if isinstance(value, int) else _scalar(value)


_IN_FLOW = re.compile(r"[A-Za-z_](?:[\w.+/ -]*[\w.+/-])?", re.ASCII)
_IN_BLOCK = re.compile(r"[A-Za-z_][\w.+/{},-]*", re.ASCII)


def _scalar(text: str, plain: re.Pattern[str] = _IN_FLOW) -> str:
    """Format text as YAML: plain if it reads back as the same text, else in double quotes."""
    resolved = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if plain.fullmatch(text) and resolved == _TAG + "str":
        return text
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf"))).rstrip("\n")


def write(lock: Lock, path: Path) -> None:
    """Write a lock, replacing any file; JSON if the name ends in .json. Raises OutputError."""
    write_text(path, dump(lock, path.suffix == ".json"), replace=True)

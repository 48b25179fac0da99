"""YAML as plain text values, each with its line, so that every error can name its place.

Scalars stay text as written, except true, false and null. Aliases (with which a small file can become
a large one), tags, duplicate keys and deep nesting are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from ..base.errors import RecipeError

Path = Sequence[str | int]
Lines = dict[tuple[str | int, ...], int]
_MAX_DEPTH = 6
#: keys and values of a recipe; a rule has about seven, and no model has more than a few thousand tensors
_MAX_NODES = 20_000


class Marked(NamedTuple):
    """A YAML file's values and their lines."""

    file: str
    value: Any
    lines: Lines

    def place(self, *path: str | int) -> str:
        """Return 'file:line rules[i].key'; for something not in the file, the line of its nearest parent."""
        at = tuple(path)
        while at and at not in self.lines:
            at = at[:-1]
        return f"{self.file}:{self.lines.get(at, 1)} {dotted(path)}".rstrip()


def dotted(path: Path) -> str:
    """Return ('rules', 3, 'type') as 'rules[3].type'."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def read(text: str, file: str) -> Marked:
    """Read a recipe's values from its text; messages name `file`. Raises RecipeError with file and line."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise RecipeError(f"{file}:1 the recipe is empty")
        lines: Lines = {}
        return Marked(file, _plain(node, (), lines, file), lines)
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise RecipeError(f"{file}:{line} not valid YAML: the character {chr(e.character)!r} is not allowed") from None
    except yaml.MarkedYAMLError as e:
        where = f"{file}:{e.problem_mark.line + 1}" if e.problem_mark is not None else file
        hint = "; a pattern that begins with * needs quotes" if e.context == "while scanning an alias" else ""
        raise RecipeError(f"{where} not valid YAML: {e.problem}{hint}") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested too deeply for a recipe") from None


class _Loader(yaml.SafeLoader):
    """Loads YAML without aliases and with a limited number of nodes."""

    _n_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            what = f"'*{event.anchor}' is an alias, which recipes do without"
            raise yaml.composer.ComposerError("while scanning an alias", event.start_mark, what, event.start_mark)
        self._n_nodes += 1
        if self._n_nodes > _MAX_NODES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            what = f"more than {_MAX_NODES:,} keys and values are too many for a recipe"
            raise yaml.composer.ComposerError(None, None, what, mark)
        return super().compose_node(parent, index)


_TAG = "tag:yaml.org,2002:"
_RESOLVER = yaml.SafeLoader("")


def _plain(node: yaml.Node, path: tuple[str | int, ...], lines: Lines, file: str) -> Any:
    lines[path] = node.start_mark.line + 1
    here = f"{file}:{lines[path]} {dotted(path)}".rstrip()
    plain_tag = _RESOLVER.resolve(type(node), node.value, (True, False))  # type: ignore[no-untyped-call]
    if node.tag not in (_TAG + "str", plain_tag):
        raise RecipeError(f"{here}: has the tag {node.tag.replace(_TAG, '!!')}, which recipes do without")
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _TAG + "bool":
            return yaml.SafeLoader.bool_values[node.value.lower()]
        return None if node.tag == _TAG + "null" else node.value
    if len(path) > _MAX_DEPTH:
        raise RecipeError(f"{here}: nested too deeply for a recipe")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), lines, file) for i, child in enumerate(node.value)]
    out: dict[str, Any] = {}
    assert isinstance(node, yaml.MappingNode)
    for key_node, child in node.value:
        line, key = key_node.start_mark.line + 1, key_node.value
        if not isinstance(key, str):
            raise RecipeError(f"{file}:{line} {dotted(path)}".rstrip() + ": a key must be text")
        at = (*path, key)
        if key in out:
            raise RecipeError(f"{file}:{line} {dotted(at)}: occurs twice")
        out[key] = _plain(child, at, lines, file)
        lines[at] = line
    return out


def scalar(text: str) -> str:
    """Return text as YAML on one line, quoted if needed."""
    dumped: str = yaml.safe_dump(text, allow_unicode=True, width=10**6)
    return dumped.removesuffix("...\n").rstrip("\n")

"""Changes to a recipe made on the command line, without a file: types of tensors, metadata, the name.

    --type 'blk.*.ffn_down_exps.weight@moe[:6]=IQ2_XXS'   a rule before the recipe's; @LAYERS may be left out
    --override-kv general.author=str:me                    metadata, as in llama-quantize
    --tensor-type, --output-tensor-type, --token-embedding-type    as in llama-quantize

llama-quantize's options mean what they mean in src/llama-quant.cpp, llama_tensor_get_type: a pattern is a lower-case
regular expression, searched anywhere in the name; the first one found decides. The types of output and token_embd come
before the patterns. A tied token_embd, which is the output too, has the output's type. A mixture counts only the
tensors that no pattern takes. One difference: where rows do not divide into blocks, ggml's fallback also replaces the
types of output and token_embd, which llama-quantize does not do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pydantic import ConfigDict, ValidationError

from ..base.errors import RecipeError, listed
from .foreign import tool_regex
from .load import Recipe
from .schema import Override, Rule, checked_override, known_type

_OUTPUT, _EMBEDDING, _LAYER_EMBEDDING = "output.weight", "token_embd.weight", "per_layer_token_embd.weight"


class ToolRule(Rule):
    """A rule from llama-quantize's command line. It may match nothing, or only tensors that are never quantized:
    llama-quantize ignores that silently, quantkit warns."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: str
    """the regular expression, or the tensor's name, as messages show it"""
    is_pattern: bool = False
    """whether `match` is searched anywhere in a name; otherwise it is the whole name"""
    if_tied: bool = False
    """apply only if there is no output.weight"""

    def matcher(self) -> re.Pattern[str]:
        body = self.match if self.is_pattern else re.escape(self.match)
        # callers use `match`, which anchors at the start
        return re.compile(rf"(?=.*?(?:{body}))" if self.is_pattern else rf"{body}\Z", re.ASCII)


@dataclass(frozen=True)
class Changes:
    """The changes asked for, as typed."""

    types: tuple[str, ...] = ()
    """--type GLOB[@LAYERS]=TYPE"""
    tensor_types: tuple[str, ...] = ()
    """--tensor-type PATTERN=TYPE"""
    output_type: str | None = None
    embedding_type: str | None = None
    metadata: tuple[str, ...] = ()
    """--override-kv KEY=TYPE:VALUE"""
    name: str | None = None

    def __bool__(self) -> bool:
        return self != Changes()

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without what was not asked for."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items() if v}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Changes:
        """Read what `to_json` returns. Raises ValueError, TypeError."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        made = cls(**known)
        for key, v in asdict(made).items():
            each = v if isinstance(v, tuple) else () if v is None else (v,)
            if isinstance(v, tuple) != isinstance(getattr(cls, key), tuple) or not all(
                isinstance(e, str) for e in each
            ):
                raise TypeError(key)
        return made

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the changes. Raises RecipeError that lists every faulty option and what is wrong."""
        if not self:
            return recipe
        rules: list[tuple[str, Rule]] = []
        overrides: dict[str, Override] = {o.key: o for o in recipe.metadata}
        wrong: list[str] = []
        for place, make in self._rules():
            try:
                rules.append((place, make()))
            except ValueError as e:
                wrong.append(f"{place}: {_said(e)}")
        for text in self.metadata:
            try:
                override = _override(text)
                overrides.pop(override.key, None)  # a key that is set again goes last, as in llama-quantize
                overrides[override.key] = override
            except ValueError as e:
                wrong.append(f"--override-kv {text:.80}: {e}")
        if self.name is not None and not self.name.strip():
            wrong.append("--name: is empty; give a name")
        if wrong:
            raise RecipeError(listed(dict.fromkeys(wrong)))
        name = self.name or f"{recipe.name}-changed"
        return recipe.with_rules(rules).renamed(name, tuple(overrides.values()))

    def _rules(self) -> Iterator[tuple[str, Callable[[], Rule]]]:
        """Yield places and functions that make the rules, in the order in which the rules apply."""
        for text in self.types:
            yield f"--type {text:.80}", partial(_type_rule, text)
        embedding, output = self.embedding_type, self.output_type
        if embedding is not None:
            yield f"--token-embedding-type {embedding:.80}", partial(_named, _EMBEDDING, embedding)
        if output is not None:
            yield f"--output-tensor-type {output:.80}", partial(_named, _OUTPUT, output)
        for text in self.tensor_types:
            yield f"--tensor-type {text:.80}", partial(_pattern_rule, text)
        if embedding is not None:
            yield f"--token-embedding-type {embedding:.80}", partial(_named, _LAYER_EMBEDDING, embedding)
        if output is not None:
            yield f"--output-tensor-type {output:.80}", partial(_named, _EMBEDDING, output, if_tied=True)


def _said(error: ValueError) -> str:
    """Return the first mistake in a rule, in a recipe's words."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]


def _type_rule(text: str) -> Rule:
    """Parse GLOB[@LAYERS]=TYPE into a rule. Raises ValueError."""
    selector, equals, type_ = text.rpartition("=")
    if not equals or not selector or not type_:
        raise ValueError("is not GLOB=TYPE or GLOB@LAYERS=TYPE, such as 'blk.*.ffn_down_exps.weight@moe[:6]=IQ2_XXS'")
    glob, at, layers = selector.partition("@")
    return Rule(match=glob, layers=layers.strip() if at else None, type=known_type(type_), why="given with --type")


def _pattern_rule(text: str) -> Rule:
    """Parse PATTERN=TYPE as llama-quantize does. Raises ValueError."""
    pattern, equals, type_ = text.partition("=")
    if not equals or not pattern or not type_:
        raise ValueError(r"is not PATTERN=TYPE, such as '\.ffn_down_exps=q4_k'")
    pattern = tool_regex(pattern, in_lower_case=True).pattern
    return ToolRule(
        match=pattern, type=known_type(type_), why="given with --tensor-type", optional=True, is_pattern=True
    )


def _named(name: str, type_: str, if_tied: bool = False) -> Rule:
    option = "--token-embedding-type" if name != _OUTPUT and not if_tied else "--output-tensor-type"
    return ToolRule(match=name, type=known_type(type_), why=f"given with {option}", optional=True, if_tied=if_tied)


def _override(text: str) -> Override:
    """Parse KEY=TYPE:VALUE. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError("is not KEY=TYPE:VALUE, such as general.author=str:me")
    return checked_override(key, value)

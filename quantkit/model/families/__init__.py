"""Model families: names, shapes, expert stacking, metadata and tokenizer, from config.json and headers.

`build(config, …)` picks the family by config.json's architectures and returns its Catalogue.
To add a family, write a module like dense.py and add a row to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from ...base.errors import UnsupportedError
from ..catalogue import Catalogue, Source, SourceTensor
from . import deepseek2, dense
from .options import Options


class Family(Protocol):
    """What a family's module provides."""

    def build(
        self,
        model: str,
        config: Mapping[str, Any],
        options: Options,
        source: Source | None,
        stored: Mapping[str, SourceTensor] | None,
    ) -> Catalogue: ...


#: config.json's architectures[0] -> family
FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": deepseek2,
    "DeepseekV3ForCausalLM": deepseek2,
    "LlamaForCausalLM": dense,
    "Qwen2ForCausalLM": dense,
}


def build(
    model: str,
    config: Mapping[str, Any],
    options: Options,
    source: Source | None = None,
    stored: Mapping[str, SourceTensor] | None = None,
) -> Catalogue:
    """Build the catalogue of a checkpoint, or, without `source` and `stored`, of a config alone.

    Raises UnsupportedError for an architecture of no known family, SourceError if config and headers
    contradict each other or themselves.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in FAMILIES:
        raise UnsupportedError(
            f"{model}: config.json names the architecture {name or names!r:.80}; quantkit knows {', '.join(FAMILIES)}"
        )
    made = FAMILIES[name].build(model, config, options, source, stored)
    named = [o for o, v in (("--pre", options.pre), ("--pad-token", options.pad_token)) if v is not None]
    if source is None and named and not options.recognize:
        note = f"{' and '.join(named)} will count with the checkpoint: config.json alone has no tokenizer"
        made = replace(made, notes=(*made.notes, note))
    return made

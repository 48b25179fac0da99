"""User options for converting a checkpoint."""

from __future__ import annotations

from typing import NamedTuple

from ..catalogue import MlaLayout

#: the layouts to which a checkpoint can be converted
LAYOUTS = (MlaLayout.K_B_V_B, MlaLayout.KV_B)


class Options(NamedTuple):
    layout: str = MlaLayout.K_B_V_B
    """one of LAYOUTS, as the user wrote it"""
    pre: str | None = None
    """tokenizer.ggml.pre, for tokenizers that are not recognized"""
    recognize: bool = False
    """use `pre` only if the tokenizer is not recognized"""
    pad_token: str | None = None
    """text or id of the padding token, instead of the tokenizer's own"""
    any_kind: bool = False
    """for inspection only: accept a GGUF that is not a model, too (a LoRA adapter, a projector)"""
    layout_given: bool = False
    """the user asked for `layout`, it is not just the default: an error if it is not available"""

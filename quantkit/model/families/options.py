"""What a user may choose about the conversion of a checkpoint."""

from __future__ import annotations

from typing import NamedTuple

from ..catalogue import MlaLayout

#: those that a checkpoint can be converted to
LAYOUTS = (MlaLayout.K_B_V_B, MlaLayout.KV_B)


class Options(NamedTuple):
    layout: str = MlaLayout.K_B_V_B
    """one of LAYOUTS, as the user says it"""
    pre: str | None = None
    """tokenizer.ggml.pre, for tokenizers that are not recognized"""
    recognize: bool = False
    """take `pre` only when the tokenizer is not recognized"""
    pad_token: str | None = None
    """the text or id of the padding token, in place of the tokenizer's own"""
    any_kind: bool = False
    """only to look: a GGUF that is no model (a LoRA adapter, a projector) is shown all the same"""
    layout_given: bool = False
    """`layout` was asked for, and is not the usual one for want of a word: where it cannot be had, that is an error"""

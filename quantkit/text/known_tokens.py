"""The special tokens of DeepSeek-R1 and its distills: their ids, and the token for padding.

Sources: R1's tokenizer; Distill-Qwen's tokenizer_config.json, with its padding token (151654); BOS and EOS of
Distill-Llama from its config.json, its other ids and its padding token (128004; R1's is 2) from the table in Unsloth's
guide of January 2025. The tokenizer_config.json of all these models names the end-of-text token as the padding token;
the guide corrects this fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
THINK, END_THINK = "<think>", "</think>"
#: tokens meant only for padding; if the family is unknown, the first one present is used
PADS = (
    "<\uff5c\u2581pad\u2581\uff5c>", "<|PAD_TOKEN|>", "<\uff5cPAD\u2581TOKEN\uff5c>", "<|finetune_right_pad_id|>",
    "<|vision_pad|>", "<pad>", "<|pad|>",
)  # fmt: skip


class Family(NamedTuple):
    """A known vocabulary."""

    name: str
    pre: str
    """its tokenizer.ggml.pre"""
    ids: Mapping[str, int]
    pad: str
    """the token for padding"""


FAMILIES = (
    Family(
        "DeepSeek-V3 and R1", "deepseek-v3",
        {BOS: 0, EOS: 1, THINK: 128798, END_THINK: 128799, USER: 128803, ASSISTANT: 128804}, PADS[0],
    ),
    Family(
        "R1-Distill-Qwen", "deepseek-r1-qwen",
        {BOS: 151646, EOS: 151643, THINK: 151648, END_THINK: 151649, USER: 151644, ASSISTANT: 151645}, "<|vision_pad|>",
    ),
    Family(
        "R1-Distill-Llama", "llama-bpe",
        {BOS: 128000, EOS: 128001, THINK: 128013, END_THINK: 128014, USER: 128011, ASSISTANT: 128012},
        "<|finetune_right_pad_id|>",
    ),
)  # fmt: skip


def family_of(tokens: Sequence[str]) -> Family | None:
    """Recognize the family of a vocabulary by the positions of its beginning- and end-of-text and User tokens; None if
    it is unknown."""
    for family in FAMILIES:
        marks = [(family.ids[text], text) for text in (BOS, EOS, USER)]
        if all(i < len(tokens) and tokens[i] == text for i, text in marks):
            return family
    return None


def pad_for(tokens: Sequence[str], family: Family | None) -> int | None:
    """The id of the token that should pad: the family's, or the first of PADS that exists."""
    wanted = (*((family.pad,) if family is not None else ()), *PADS)
    there = set(tokens)
    return next((tokens.index(text) for text in wanted if text in there), None)

"""The keys that a converter writes for archs of all families, in its order, from config.json.

Source: llama.cpp's conversion/base.py, TextModel.set_gguf_parameters.
"""

from __future__ import annotations

from typing import NamedTuple

from ...base.errors import UnsupportedError
from ...gguf.header import BOOL, F32, KV, U32, kv
from .config import Config
from .rope import Rope
from .tensors import FILE_TYPE_BF16

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
_LAYER_NORM = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
_SCORING = (
    "score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func",
    "expert_selection_fn",
)  # fmt: skip
_GATING = {"softmax": 1, "sigmoid": 2}


class Common(NamedTuple):
    """Numbers for these keys that a family has checked or computed."""

    n_layers: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    n_experts: int | None
    """None: the key is not written"""
    lengths: tuple[int, int] | None
    """lengths of a key and of a value in attention; None: the keys are not written here"""


def common_kvs(c: Config, arch: str, s: Common, rope: Rope) -> list[KV]:
    """Return the keys from block_count to general.file_type. Raises SourceError, UnsupportedError."""
    out: list[KV] = []

    def u32(key: str, value: int | None) -> None:
        if value is not None:
            out.append(kv(f"{arch}.{key}", U32, value))

    u32("block_count", s.n_layers)
    u32("context_length", c.int_("max_position_embeddings"))
    u32("embedding_length", s.hidden)
    u32("feed_forward_length", s.ffn)
    u32("attention.head_count", s.n_heads)
    u32("attention.head_count_kv", s.n_kv_heads)
    if c.values.get("is_causal") is False:  # text embedding models
        out.append(kv(f"{arch}.attention.causal", BOOL, False))
    out += rope.kvs(arch)
    out.append(kv(f"{arch}.attention.layer_norm_rms_epsilon", F32, c.float_("rms_norm_eps", 1e-6)))
    layer_norm = c.first(_LAYER_NORM)
    if layer_norm is not None:
        out.append(kv(f"{arch}.attention.layer_norm_epsilon", F32, c.float_(layer_norm)))
    u32("expert_count", s.n_experts)
    u32("expert_used_count", c.first_int(_EXPERTS_USED, least=1 if s.n_experts else 0))
    u32("expert_group_count", c.optional_int("n_group"))
    u32("expert_group_used_count", c.optional_int("topk_group"))
    u32("expert_gating_func", _gating(c))
    if s.lengths is not None:
        u32("attention.key_length", s.lengths[0])
        u32("attention.value_length", s.lengths[1])
    out.append(kv("general.file_type", U32, FILE_TYPE_BF16))
    return out


def _gating(c: Config) -> int | None:
    """Return llama.cpp's number of the function that turns router scores into weights; None if there is no key."""
    key = c.first(_SCORING)
    if key is None:
        return None
    scoring = c.values[key]
    if not isinstance(scoring, str) or scoring not in _GATING:
        raise UnsupportedError(f"{c.model}: config.json: {key} is {scoring!r:.60}, not one of {list(_GATING)}")
    return _GATING[scoring]

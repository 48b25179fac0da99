"""Defaults for keys that config.json leaves out: those of the model's class in transformers, with which the converter
reads it.

Listed are only keys whose absence has a meaning. Keys without which no model can be described
(hidden_size, …) stay required, since a class's defaults for them describe just one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Config

DEFAULT_THETA = 10000.0
#: config.json's model_type -> keys that may be left out, with defaults (transformers 4.57, configuration_*.py)
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "first_k_dense_replace": 3,
        "max_position_embeddings": 4096,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "q_lora_rank": 1536,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "topk_method": "noaux_tc",  # from the model's code: the class knows no other
    },
    "deepseek_v2": {
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 1.0,
    },
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
}


def has_class(c: Config) -> bool:
    """Whether transformers has a class for the config's model_type; if not, the converter adds no defaults."""
    kind = c.values.get("model_type")
    return isinstance(kind, str) and kind in DEFAULTS


def with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config on top of its class's defaults, with the keys of text_config on top. A null stays null."""
    kind, inner = config.get("model_type"), config.get("text_config")
    defaults = DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
    return {**defaults, **config, **(inner if isinstance(inner, dict) else {})}


def default_theta(c: Config) -> float | None:
    """Return the rope's base for a config.json without one."""
    return DEFAULT_THETA if has_class(c) else None

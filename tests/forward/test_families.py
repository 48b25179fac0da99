"""The graphs: small random models against transformers, which computes from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factory
import passing
import pytest
import torch
from passing import difference, logits_of, model_of, random_tokens


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def yarn(factor: float, mscale: float | None = None) -> dict[str, Any]:
    """From a context so short that its stretch shows within the tests' tokens."""
    scaling = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    return scaling if mscale is None else scaling | {"mscale": mscale, "mscale_all_dim": mscale}


LLAMA = factory.SMALL_LLAMA | {"num_hidden_layers": 2}
LLAMA3 = factory.SMALL_LLAMA["rope_scaling"] | {"original_max_position_embeddings": 16}
QWEN2 = factory.SMALL_QWEN2 | {"num_hidden_layers": 2}
MOE = {"n_routed_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 3}
V3 = without(factory.SMALL_V3, "num_nextn_predict_layers") | MOE | {"n_group": 4, "topk_group": 2}
V2 = factory.SMALL_V2 | MOE

DENSE = {
    "llama": without(LLAMA, "rope_scaling") | {"num_key_value_heads": 4},
    "llama-grouped": without(LLAMA, "rope_scaling"),
    "llama-llama3": LLAMA | {"rope_scaling": LLAMA3},
    "llama-linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-yarn": LLAMA | {"rope_scaling": yarn(4.0)},
    "llama-tied": without(LLAMA, "rope_scaling") | {"tie_word_embeddings": True},
    "llama-wide-heads": without(LLAMA, "rope_scaling") | {"head_dim": 24},
    "qwen2": QWEN2 | {"tie_word_embeddings": False},
    "qwen2-tied": QWEN2,
    "qwen2-yarn": QWEN2 | {"rope_scaling": yarn(4.0)},
}
#: top-2 sums, by which llama.cpp chooses groups, are V3's own rule; for V2 with groups see test_llama_cpp.py
DEEPSEEK = {
    "v2-lite": V2 | {"rope_scaling": yarn(40, 0.707)},
    "v2": V2 | {"q_lora_rank": 32, "routed_scaling_factor": 16.0, "rope_scaling": yarn(40, 1.0)},
    "v3": V3,
    "v3-yarn": V3 | {"rope_scaling": yarn(40, 1.0)},
    "v3-mscale": V3 | {"rope_scaling": yarn(40, 0.707)},
    "v3-plain-rope": without(V3, "rope_scaling"),
    "v3-not-normalized": V3 | {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
}


def transformers_logits(folder: Path, tokens: passing.Tokens) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        out: torch.Tensor = model(torch.from_numpy(tokens)).logits
    return out


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, tmp_path: Path) -> None:
    folder = factory.dense_checkpoint(tmp_path / name, DENSE[name])
    tokens = random_tokens(384)
    assert difference(logits_of(model_of(folder), tokens), transformers_logits(folder, tokens)) < 3e-6


@pytest.mark.parametrize("name", DEEPSEEK)
def test_deepseek(name: str, tmp_path: Path) -> None:
    folder = factory.checkpoint(tmp_path / name, DEEPSEEK[name])
    tokens = random_tokens(384)
    theirs = transformers_logits(folder, tokens)
    for layout in ("k_b+v_b", "kv_b"):
        assert difference(logits_of(model_of(folder, layout), tokens), theirs) < 5e-6

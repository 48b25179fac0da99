"""config.json in every spelling, whole files compared with what the real converter makes of them: as transformers 5
saves it, with keys left out, with keys that nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import factory
import pytest
from conftest import Tools
from factory import SMALL_LLAMA as LLAMA
from factory import SMALL_QWEN2 as QWEN2
from factory import SMALL_V2 as V2
from factory import SMALL_V3 as V3
from factory import TINY_LLAMA
from small_builds import NAMED, build_named, data, fields, uniform

from quantkit.base.errors import SourceError, UnsupportedError
from quantkit.gguf.header import decode
from quantkit.model import families
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options
from quantkit.model.open import open_model

YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 0.707}
LLAMA3 = TINY_LLAMA["rope_scaling"]


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


def new(config: Mapping[str, Any], **rope: Any) -> dict[str, Any]:
    """As transformers 5 writes it: the rope in rope_parameters alone, `dtype`, and its version."""
    rest = without(config, "rope_scaling", "rope_theta", "torch_dtype")
    return {**rest, "dtype": "bfloat16", "transformers_version": "5.24.0", "rope_parameters": rope}


SPELLINGS: dict[str, dict[str, Any]] = {
    "v3-yarn": new(V3, **YARN, **MSCALE, rope_type="yarn", rope_theta=50000.0),
    "v3-yarn-by-its-old-name": new(V3, **YARN, **MSCALE, type="yarn", rope_theta=50000.0),
    "v3-both-names": new(V3, **YARN, type="yarn", rope_type="default", rope_theta=50000.0),
    "v3-default": new(V3, rope_type="default", rope_theta=50000.0),
    "v3-default-with-mscale": new(V3, rope_type="default", rope_theta=50000, **MSCALE),
    "v3-linear": new(V3, rope_type="linear", factor=4.0, rope_theta=50000.0),
    "v3-theta-alone": new(V3, rope_theta=50000.0),
    "v3-no-theta": new(V3, **YARN, rope_type="yarn"),
    "v3-empty": new(V3),
    "v3-null": {**new(V3), "rope_parameters": None},
    "v3-theta-outside": {**new(V3, **YARN, rope_type="yarn"), "rope_theta": 50000.0},
    "v3-beside-the-old-keys": {**V3, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 50000.0}},
    "v3-null-beside-the-old-keys": {**V3, "rope_parameters": None},
    "v3-default-beside-the-old-keys": {**V3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "v3-old-default": {**V3, "rope_scaling": {"type": "default"}},
    "v3-old-both-names": {**V3, "rope_scaling": {**YARN, "type": "yarn", "rope_type": "default"}},
    "v3-context-outside": {
        **new(V3, rope_type="yarn", factor=4.0, rope_theta=50000.0), "original_max_position_embeddings": 2048,
    },
    "v3-nested": new(V3, full_attention={**YARN, **MSCALE, "rope_type": "yarn", "rope_theta": 50000.0}),
    "v3-attention-factor": new(V3, **YARN, rope_type="yarn", attention_factor=1.5, extrapolation_factor=0.5),
    "v3-attn-factor": new(V3, **YARN, rope_type="yarn", attn_factor=1.5),
    "v3-with-a-head-dim": {**new(V3, rope_type="default", rope_theta=5.0), "head_dim": 32, "qk_head_dim": 64},
    "kimi-with-a-head-dim": {**V3, "model_type": "kimi_k2", "head_dim": 32},
    "kimi-without-theta": without({**V3, "model_type": "kimi_k2"}, "rope_theta", "rope_scaling"),
    "v2-yarn": new(V2, **YARN, **MSCALE, rope_type="yarn", rope_theta=10000),
    "v2-default": new(V2, rope_type="default", rope_theta=50000.0),
    "llama-llama3": new(LLAMA, **without(LLAMA3, "rope_type"), rope_type="llama3", rope_theta=500000.0),
    "llama-llama3-by-its-old-name": new(LLAMA, **without(LLAMA3, "rope_type"), type="llama3", rope_theta=500000.0),
    "llama-llama3-defaults": new(LLAMA, rope_type="llama3"),
    "llama-linear": new(LLAMA, rope_type="linear", factor=4.0, rope_theta=500000.0),
    "llama-yarn": new(LLAMA, **YARN, rope_type="yarn", rope_theta=500000.0),
    "llama-default": new(LLAMA, rope_type="default", rope_theta=500000.0),
    "llama-beside-the-old-keys": {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "llama-nested": new(
        LLAMA, full_attention={**LLAMA3, "rope_theta": 9.0},
        sliding_attention={"rope_type": "default", "rope_theta": 5.0},
    ),
    "llama-local-theta": {**LLAMA, "rope_local_base_freq": 12345.0},
    "llama-old-default": {**LLAMA, "rope_scaling": {"type": "default"}},
    "llama-whole-heads": new(LLAMA, rope_type="default", rope_theta=500000.0, partial_rotary_factor=1.0),
    "qwen2-yarn": new(QWEN2, **YARN, rope_type="yarn", rope_theta=1000000.0),
    "qwen2-linear": new(QWEN2, rope_type="linear", factor=2, rope_theta=1000000.0),
    "qwen2-default": new(QWEN2, rope_type="default", rope_theta=1000000.0),
    "qwen2-mrope": new(QWEN2, rope_type="default", rope_theta=1000000.0, mrope_section=[16, 24, 24]),
    "qwen2-head-dim": {**new(QWEN2, rope_type="default"), "head_dim": 16, "layer_types": ["full_attention"]},
    # keys left out
    "v3-trimmed": without(
        V3, "max_position_embeddings", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
        "n_shared_experts", "routed_scaling_factor", "rms_norm_eps", "rope_theta", "rope_scaling", "topk_method",
    ),
    "v2-trimmed": without(
        V2, "max_position_embeddings", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
        "n_shared_experts", "routed_scaling_factor", "rms_norm_eps", "rope_theta", "rope_scaling",
        "first_k_dense_replace", "scoring_func",
    ) | {"n_shared_experts": 2, "first_k_dense_replace": 1},
    "kimi-trimmed": without(
        {**V3, "model_type": "kimi_k2"}, "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
        "routed_scaling_factor",
    ),
    "v3-nulls": {**V3, "num_experts_per_tok": None, "n_group": None, "routed_scaling_factor": None},
    "v3-says-no": {**V3, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "llama-trimmed": without(LLAMA, "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    "qwen2-trimmed": without(QWEN2, "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    "v3-null-theta": {**V3, "rope_theta": None, "rope_scaling": None},
    "v3-null-theta-inside": new(V3, rope_type="default", rope_theta=None),
    "qwen2-null-theta": {**QWEN2, "rope_theta": None},
    "llama-global-theta": {**LLAMA, "global_rope_theta": 5.0},
    "qwen2-null-global-theta": {**QWEN2, "rope_theta_global": None},
    # keys of other kinds of models
    "qwen2-not-causal": {**QWEN2, "is_causal": False},
    "qwen2-causal": {**QWEN2, "is_causal": True},
    "llama-layer-norm": {**LLAMA, "layer_norm_eps": 1e-3},
    "llama-says-experts": {**LLAMA, "num_experts": 0, "num_experts_per_tok": 0, "n_group": 1, "topk_group": 1},
    "llama-says-scoring": {**LLAMA, "n_routed_experts": 0, "top_k_experts": 2, "score_func": "sigmoid"},
    "v3-two-scorings": {**V3, "score_function": "softmax", "num_experts": 7, "norm_epsilon": 0.5},
    "qwen2-text-config": {**QWEN2, "text_config": {"rope_theta": 7.0, "max_position_embeddings": 77}},
    # layers that the config does not announce: `checkpoint` makes one of MTP for all of V3's
    "v3-mtp-zero": {**V3, "num_nextn_predict_layers": 0},
    "v3-mtp-null": {**V3, "num_nextn_predict_layers": None},
    "v3-mtp-absent": without(V3, "num_nextn_predict_layers"),
    "v3-fewer-layers": {**V3, "num_hidden_layers": 1},
    # keys that nobody asked for
    "v3-unknown-keys": {**V3, "my_key": {"a": [1]}, "_name_or_path": "x/y", "auto_map": {}, "index_topk": 5},
}  # fmt: skip

#: what `save_pretrained` of transformers 5.24 made of V3, V2, LLAMA and QWEN2 (with yarn): whole files, as they were
SAVED = json.loads((Path(__file__).parent.parent / "data" / "transformers5_configs.json").read_text("utf-8"))
SPELLINGS |= {f"saved-{name}": config for name, config in SAVED.items()}


def checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    # the weights a trimmed config stands for are those of the whole one
    whole = {
        **{"DeepseekV3ForCausalLM": V3, "DeepseekV2ForCausalLM": V2}.get(config["architectures"][0], {}),
        **config,
    }
    if whole["architectures"][0].startswith("Deepseek"):
        if whole["model_type"] == "deepseek_v3":
            whole |= {key: V3[key] for key in ("num_hidden_layers", "num_nextn_predict_layers")}
        factory.checkpoint(folder, whole, n_shards=1)
        factory.edit_json(folder / "config.json", lambda c: (c.clear(), c.update(config)))
        return folder
    return factory.dense_checkpoint(folder, config)


@pytest.fixture(scope="module")
def converted(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint NAME/Tiny and the converter's NAME.gguf for every spelling."""
    folder = tmp_path_factory.mktemp("spellings")
    models = [checkpoint(folder / name / "Tiny", config) for name, config in SPELLINGS.items()]
    tools.convert_all([(model, folder / f"{model.parent.name}.gguf") for model in models], NAMED.pre)
    return folder


@pytest.mark.tools
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_converter_makes_the_same_file(converted: Path, tmp_path: Path, name: str) -> None:
    theirs = converted / f"{name}.gguf"
    out = build_named(converted / name / "Tiny", tmp_path / "ours.gguf", uniform("BF16", "BF16"))
    assert fields(out) == fields(theirs)
    assert [item.key for item in open_model(str(converted / name / "Tiny"), NAMED).kvs] == list(fields(theirs))
    assert data(out) == data(theirs)


def plan_only(config: Mapping[str, Any]) -> Catalogue:
    return families.build("m", config, Options())


@pytest.mark.parametrize(("name", "old"), [("v3", V3), ("v2", V2), ("llama", LLAMA)])
def test_what_transformers_5_saves_means_the_same(name: str, old: dict[str, Any]) -> None:
    new, before = plan_only(SAVED[name]), plan_only(old)
    assert (new.kvs, new.tensors, new.notes) == (before.kvs, before.tensors, before.notes)


def values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {item.key: decode(item) for item in plan_only(config).kvs}


def test_the_keys_of_a_v3_that_transformers_5_saved() -> None:
    got = {
        k: v for k, v in values(new(V3, **YARN, **MSCALE, rope_type="yarn", rope_theta=50000.0)).items() if "rope" in k
    }
    assert got == {
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.factor": 40.0,
        "deepseek2.rope.scaling.original_context_length": 4096,
        "deepseek2.rope.scaling.yarn_beta_fast": 32.0,
        "deepseek2.rope.scaling.yarn_beta_slow": 1.0,
        "deepseek2.rope.freq_base": 50000.0,
        "deepseek2.rope.dimension_count": 32,
        "deepseek2.rope.scaling.yarn_log_multiplier": pytest.approx(0.0707, rel=1e-6),
    }


def test_what_a_trimmed_config_leaves_to_its_class() -> None:
    got = values(SPELLINGS["v3-trimmed"])
    assert {k.removeprefix("deepseek2."): v for k, v in got.items() if "expert" in k or "context" in k} == {
        "context_length": 4096,
        "expert_count": 4,
        "expert_used_count": 8,
        "expert_group_count": 8,
        "expert_group_used_count": 4,
        "expert_gating_func": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
    }


BOTH = (
    "config.json has rope_parameters (transformers 5) and rope_scaling (before), and they differ: rope_parameters was "
    "taken, as llama.cpp does"
)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({**V3["rope_scaling"], "rope_theta": 7.0}, False),
        ({**YARN, "rope_type": "yarn"}, False),
        ({**YARN, "rope_type": "yarn", "factor": 4.0}, True),
        ({"rope_type": "default"}, True),
        (None, True),
    ],
)
def test_two_spellings_that_differ_are_said(parameters: dict[str, Any] | None, says: bool) -> None:
    notes = plan_only({**V3, "rope_parameters": parameters}).notes
    assert (BOTH in notes) is says


def test_a_v3_that_does_not_say_how_it_routes() -> None:
    """transformers' class has no such key; without it llama.cpp takes V2's."""
    assert plan_only(without(V3, "scoring_func")).notes[0] == (
        "config.json has no scoring_func, so llama.cpp routes by softmax; models with a router bias are trained with "
        'sigmoid: add "scoring_func": "sigmoid"'
    )
    assert len(plan_only(V3).notes) == 1


ODD: list[tuple[dict[str, Any], dict[str, Any], type[SourceError], str]] = [
    (
        V3,
        {"rope_parameters": {**LLAMA3, "rope_theta": 1.0}},
        UnsupportedError,
        "the rope scaling has the type 'llama3'; quantkit knows linear and yarn for deepseek2",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        UnsupportedError,
        "the rope scaling has the type 'dynamic'; quantkit knows linear, yarn and llama3 for llama",
    ),
    (
        V3,
        {"rope_parameters": {"rope_type": "yarn"}},
        SourceError,
        "rope_parameters.factor is missing; get the model's own config.json",
    ),
    (
        V3,
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": "x"}}},
        SourceError,
        "rope_parameters.full_attention.factor is 'x', not a number that float32 holds; get the model's own "
        "config.json",
    ),
    (
        QWEN2,
        {"rope_parameters": {"rope_theta": -5.0}},
        SourceError,
        "rope_parameters.rope_theta is -5, not above 0; get the model's own config.json",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
        UnsupportedError,
        "rope_parameters.partial_rotary_factor is 0.5: heads of llama are rotated whole in llama.cpp",
    ),
    (
        LLAMA,
        {"partial_rotary_factor": 0.25},
        UnsupportedError,
        "partial_rotary_factor is 0.25: heads of llama are rotated whole in llama.cpp",
    ),
    (
        QWEN2,
        {"rope_parameters": {"mrope_section": "16"}},
        SourceError,
        "rope_parameters.mrope_section is '16', not a list of integers; get the model's own config.json",
    ),
    (
        QWEN2,
        {"rope_parameters": "yarn"},
        SourceError,
        "rope_parameters is 'yarn', not an object; get the model's own config.json",
    ),
]


@pytest.mark.parametrize(("config", "changes", "error", "says"), ODD)
def test_a_rope_that_cannot_be(
    config: dict[str, Any], changes: dict[str, Any], error: type[SourceError], says: str
) -> None:
    with pytest.raises(error) as e:
        plan_only({**config, **changes})
    assert (type(e.value), str(e.value)) == (error, f"m: config.json: {says}")

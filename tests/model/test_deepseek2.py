"""The deepseek2 family: what it makes of a config and of a checkpoint's headers, and what it refuses, whole sentences
asserted; then the tokenizer and the model card beside them."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from factory import TINY_V2, TINY_V3, checkpoint, edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from quantkit.base.errors import QuantkitError, SourceError, UnsupportedError
from quantkit.gguf.header import STRING, TYPE_NAMES, decode
from quantkit.model import demo, families
from quantkit.model.catalogue import Catalogue, Part, SourceTensor
from quantkit.model.families.known import MODELS
from quantkit.model.families.known import config as known_config
from quantkit.model.families.options import Options
from quantkit.model.families.tokenizer import tokenizer_kvs
from quantkit.model.open import open_model
from quantkit.model.sources.safetensors_dir import open_checkpoint

GET_CONFIG = "; get the model's own config.json"
IS_IT = "; is this config.json the one of the checkpoint?"


def sentence(call: Callable[[], Any], error: type[QuantkitError] = SourceError) -> str:
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error
    return str(e.value)


def changed(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A config with keys set; `None` removes one."""
    out = {**copy.deepcopy(dict(config)), **changes}
    return {k: v for k, v in out.items() if v is not None}


def plan_only(config: Mapping[str, Any], layout: str = "k_b+v_b") -> Catalogue:
    return families.build("m", config, Options(layout))


# ---------------------------------------------------------------- known models


@pytest.mark.parametrize(
    ("model", "layout", "n_tensors", "n_elements"),
    [
        ("deepseek-r1", "k_b+v_b", 1086, 671_026_419_200),
        ("deepseek-r1", "kv_b", 1025, 671_026_419_200),
        ("deepseek-v2", "kv_b", 959, 235_741_434_880),
        ("deepseek-v2", "k_b+v_b", 959 + 60, 235_741_434_880),
        ("deepseek-v2-lite", "kv_b", 377, 15_706_484_224),
        ("deepseek-v2-lite", "k_b+v_b", 377 + 27, 15_706_484_224),
    ],
)
def test_the_tensors_and_weights_of_known_models(model: str, layout: str, n_tensors: int, n_elements: int) -> None:
    c = open_model(model, Options(layout))
    assert (len(c.tensors), sum(t.n_elements for t in c.tensors)) == (n_tensors, n_elements)
    assert (c.model, c.arch, c.layout, c.source, c.kvs_complete) == (model, "deepseek2", layout, None, False)


def test_every_known_name_opens_in_any_case() -> None:
    assert {name: open_model(name.upper()).n_layers for name in MODELS} == {
        name: known_config(name)["num_hidden_layers"] for name in MODELS
    }


def test_the_layers_of_r1() -> None:
    c = open_model("deepseek-r1")
    assert (c.dense_layers, c.moe_layers) == ((0, 1, 2), tuple(range(3, 61)))
    assert c.notes == ("left out: 1 multi-token-prediction layer (MTP), as llama.cpp does",)
    roles = Counter(t.role for t in c.tensors)
    assert roles == {
        "embedding": 1, "output": 1, "attention": 61 * 6, "norm": 61 * 4 + 1, "dense ffn": 9, "router": 58 * 2,
        "routed expert": 58 * 3, "shared expert": 58 * 3,
    }  # fmt: skip


# ---------------------------------------------------------------- what the output is made of


def test_experts_are_stacked_and_kv_b_is_split_by_head() -> None:
    by_name = {t.name: t for t in plan_only(TINY_V3).tensors}
    experts = by_name["blk.1.ffn_down_exps.weight"]
    assert experts.shape == (256, 256, 4)
    assert experts.parts == tuple(
        Part(f"model.layers.1.mlp.experts.{e}.down_proj.weight", (256, 256), 0, 256) for e in range(4)
    )
    kv_b = "model.layers.0.self_attn.kv_b_proj.weight"
    k, v = by_name["blk.0.attn_k_b.weight"], by_name["blk.0.attn_v_b.weight"]
    # of each head's 64 + 64 rows of kv_b the first are k, transposed, the others v
    assert (k.shape, v.shape) == ((64, 256, 2), (256, 64, 2))
    assert k.parts == tuple(Part(kv_b, (256, 256), row, 64, transposed=True) for row in (0, 128))
    assert v.parts == tuple(Part(kv_b, (256, 256), row, 64) for row in (64, 192))
    whole = {t.name: t for t in plan_only(TINY_V3, "kv_b").tensors}["blk.0.attn_kv_b.weight"]
    assert (whole.shape, whole.parts) == ((256, 256), (Part(kv_b, (256, 256), 0, 256),))


@pytest.mark.parametrize("config", [TINY_V3, TINY_V2], ids=["v3", "v2"])
@pytest.mark.parametrize("layout", ["k_b+v_b", "kv_b"])
def test_parts_fill_their_tensor_and_use_every_source_once(config: Mapping[str, Any], layout: str) -> None:
    used: Counter[str] = Counter()
    for t in plan_only(config, layout).tensors:
        assert sum(p.out_rows for p in t.parts) == t.n_rows
        for p in t.parts:
            used[p.source] += p.n_rows * p.shape[-1]
    n_layers = config["num_hidden_layers"]
    sizes = {n: math.prod(shape) for n, shape, _ in demo.checkpoint_tensors(config)}
    assert used == {n: size for n, size in sizes.items() if f"model.layers.{n_layers}." not in n}


def test_norms_router_and_biases_stay_f32() -> None:
    kept = {re.sub(r"^blk\.\d+\.", "", t.name) for t in plan_only(TINY_V3).tensors if not t.quantizable}
    assert kept == {
        "output_norm.weight", "attn_norm.weight", "ffn_norm.weight", "attn_q_a_norm.weight", "attn_kv_a_norm.weight",
        "ffn_gate_inp.weight", "exp_probs_b.bias",
    }  # fmt: skip
    assert {t.source_type for t in plan_only(TINY_V3).tensors if not t.quantizable} == {"F32"}
    assert {t.source_type for t in plan_only(TINY_V3).tensors if t.quantizable} == {"BF16"}


def test_v2_lite_has_one_q_and_no_router_bias() -> None:
    names = {t.name for t in plan_only(TINY_V2).tensors if t.layer == 1}
    assert "blk.1.attn_q.weight" in names
    assert not names & {"blk.1.attn_q_a.weight", "blk.1.attn_q_b.weight", "blk.1.exp_probs_b.bias"}


def test_tied_embeddings_have_no_output_tensor() -> None:
    names = {t.name for t in plan_only(changed(TINY_V3, tie_word_embeddings=True)).tensors}
    assert {"token_embd.weight", "output.weight"} & names == {"token_embd.weight"}


def test_a_moe_layer_frequency() -> None:
    c = plan_only(changed(TINY_V3, num_hidden_layers=6, moe_layer_freq=2))
    assert (c.dense_layers, c.moe_layers) == ((0, 1, 3, 5), (2, 4))


def test_a_model_without_experts() -> None:
    c = plan_only(changed(TINY_V3, n_routed_experts=0))
    assert (c.dense_layers, c.moe_layers) == ((0, 1, 2), ())


def test_the_keys_of_a_v3() -> None:
    kvs = [(item.key, TYPE_NAMES[item.type], decode(item)) for item in plan_only(TINY_V3).kvs]
    assert kvs == [
        ("general.architecture", "str", "deepseek2"),
        ("general.type", "str", "model"),
        ("general.name", "str", "m"),
        ("deepseek2.block_count", "u32", 3),
        ("deepseek2.context_length", "u32", 4096),
        ("deepseek2.embedding_length", "u32", 256),
        ("deepseek2.feed_forward_length", "u32", 512),
        ("deepseek2.attention.head_count", "u32", 2),
        ("deepseek2.attention.head_count_kv", "u32", 1),
        ("deepseek2.rope.scaling.type", "str", "yarn"),
        ("deepseek2.rope.scaling.factor", "f32", 40.0),
        ("deepseek2.rope.scaling.original_context_length", "u32", 4096),
        ("deepseek2.rope.scaling.yarn_beta_fast", "f32", 32.0),
        ("deepseek2.rope.scaling.yarn_beta_slow", "f32", 1.0),
        ("deepseek2.rope.freq_base", "f32", 10000.0),
        ("deepseek2.attention.layer_norm_rms_epsilon", "f32", pytest.approx(1e-6)),
        ("deepseek2.expert_count", "u32", 4),
        ("deepseek2.expert_used_count", "u32", 2),
        ("deepseek2.expert_group_count", "u32", 1),
        ("deepseek2.expert_group_used_count", "u32", 1),
        ("deepseek2.expert_gating_func", "u32", 2),
        ("deepseek2.attention.key_length", "u32", 256 + 32),
        ("deepseek2.attention.value_length", "u32", 256),
        ("general.file_type", "u32", 32),
        ("deepseek2.leading_dense_block_count", "u32", 1),
        ("deepseek2.vocab_size", "u32", 384),
        ("deepseek2.attention.q_lora_rank", "u32", 256),
        ("deepseek2.attention.kv_lora_rank", "u32", 256),
        ("deepseek2.attention.key_length_mla", "u32", 64 + 32),
        ("deepseek2.attention.value_length_mla", "u32", 64),
        ("deepseek2.expert_feed_forward_length", "u32", 256),
        ("deepseek2.expert_shared_count", "u32", 1),
        ("deepseek2.expert_weights_scale", "f32", 2.5),
        ("deepseek2.expert_weights_norm", "bool", True),
        ("deepseek2.rope.dimension_count", "u32", 32),
        ("deepseek2.rope.scaling.yarn_log_multiplier", "f32", pytest.approx(0.1)),
        ("general.quantization_version", "u32", 2),
    ]


def test_the_keys_that_the_old_layout_has_otherwise() -> None:
    new = {item.key: decode(item) for item in plan_only(TINY_V3).kvs}
    old = {item.key: decode(item) for item in plan_only(TINY_V3, "kv_b").kvs}
    p = "deepseek2.attention."
    assert {k: v for k, v in old.items() if new.get(k) != v} == {
        p + "head_count_kv": 2,
        p + "key_length": 64 + 32,
        p + "value_length": 64,
    }
    assert new.keys() - old.keys() == {p + "key_length_mla", p + "value_length_mla"}


# ---------------------------------------------------------------- configs that cannot be


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["GPT2LMHeadModel"], "'GPT2LMHeadModel'"),
        (None, "None"),
        ([], "[]"),
        ([7], "[7]"),
        ("DeepseekV3ForCausalLM", "'DeepseekV3ForCausalLM'"),
    ],
)
def test_an_unknown_architecture(names: Any, shown: str) -> None:
    assert sentence(lambda: plan_only(changed(TINY_V3, architectures=names)), UnsupportedError) == (
        f"m: config.json names the architecture {shown}; quantkit knows DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, "
        "LlamaForCausalLM, Qwen2ForCausalLM"
    )


def test_an_unknown_layout() -> None:
    assert sentence(lambda: plan_only(TINY_V3, "new"), UnsupportedError) == (
        "layout 'new' is unknown; deepseek2 has k_b+v_b and kv_b"
    )


REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_number(key: str) -> None:
    assert (
        sentence(lambda: plan_only(changed(TINY_V3, **{key: None}))) == f"m: config.json: {key} is missing{GET_CONFIG}"
    )


@pytest.mark.parametrize("key", [*REQUIRED, "q_lora_rank", "num_experts_per_tok", "n_group", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 1 << 24, 10**30, 1.0, True, "64", [64], {}, math.nan])
def test_a_number_that_is_none(key: str, value: Any) -> None:
    assert sentence(lambda: plan_only(changed(TINY_V3, **{key: value}))) == (
        f"m: config.json: {key} is {value!r}, not an integer from 1 to 16777215{GET_CONFIG}"
    )


@pytest.mark.parametrize(
    "key", ["first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"]
)
def test_a_negative_number(key: str) -> None:
    assert sentence(lambda: plan_only(changed(TINY_V3, **{key: -1}))) == (
        f"m: config.json: {key} is -1, not an integer from 0 to 16777215{GET_CONFIG}"
    )


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "routed_scaling_factor"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, -(10**400), "1", True, [1.0]])
def test_a_real_number_that_is_none(key: str, value: Any) -> None:
    assert sentence(lambda: plan_only(changed(TINY_V3, **{key: value}))) == (
        f"m: config.json: {key} is {value!r:.60}, not a number that float32 holds{GET_CONFIG}"
    )


@pytest.mark.parametrize("key", ["attention_bias", "tie_word_embeddings", "norm_topk_prob"])
def test_a_flag_that_is_none(key: str) -> None:
    assert sentence(lambda: plan_only(changed(TINY_V3, **{key: 1}))) == (
        f"m: config.json: {key} is 1, not true or false{GET_CONFIG}"
    )


SCALING = TINY_V3["rope_scaling"]
ODD: list[tuple[str, dict[str, Any], type[QuantkitError], str]] = [
    (
        "biases",
        {"attention_bias": True},
        UnsupportedError,
        "attention_bias is true; no released DeepSeek has biases there",
    ),
    (
        "layers",
        {"num_hidden_layers": 1025},
        SourceError,
        "num_hidden_layers is 1,025; more than 1,024 is no DeepSeek",
    ),
    (
        "experts",
        {"n_routed_experts": 4097},
        SourceError,
        "n_routed_experts is 4,097; more than 4,096 is no DeepSeek",
    ),
    (
        "heads",
        {"num_attention_heads": 4097},
        SourceError,
        "num_attention_heads is 4,097; more than 4,096 is no DeepSeek",
    ),
    (
        "layers_of_experts",
        {"num_hidden_layers": 1024, "n_routed_experts": 4096},
        SourceError,
        "1,024 layers of 4,096 experts and 2 heads are more than any DeepSeek has",
    ),
    (
        "weights",
        {"num_hidden_layers": 61, "hidden_size": 16777215, "moe_intermediate_size": 16777215},
        SourceError,
        "its sizes make 253,328,181,324,059,625 weights, more than any model has",
    ),
    (
        "scoring",
        {"scoring_func": "relu"},
        UnsupportedError,
        "scoring_func is 'relu', not one of ['softmax', 'sigmoid']",
    ),
    (
        "scoring_list",
        {"scoring_func": ["sigmoid"]},
        UnsupportedError,
        "scoring_func is ['sigmoid'], not one of ['softmax', 'sigmoid']",
    ),
    ("scaling_text", {"rope_scaling": "yarn"}, SourceError, f"rope_scaling is 'yarn', not an object{GET_CONFIG}"),
    (
        "scaling_type",
        {"rope_scaling": {**SCALING, "type": "llama3"}},
        UnsupportedError,
        "the rope scaling has the type 'llama3'; quantkit knows linear and yarn for deepseek2",
    ),
    (
        "scaling_factor",
        {"rope_scaling": changed(SCALING, factor=None)},
        SourceError,
        f"rope_scaling.factor is missing{GET_CONFIG}",
    ),
    (
        "scaling_beta",
        {"rope_scaling": {**SCALING, "beta_fast": "32"}},
        SourceError,
        f"rope_scaling.beta_fast is '32', not a number that float32 holds{GET_CONFIG}",
    ),
    (
        "scaling_mscale",
        {"rope_scaling": {**SCALING, "mscale_all_dim": math.nan}},
        SourceError,
        f"rope_scaling.mscale_all_dim is nan, not a number that float32 holds{GET_CONFIG}",
    ),
    (
        "scaling_context",
        {"rope_scaling": {**SCALING, "original_max_position_embeddings": 0}},
        SourceError,
        "rope_scaling.original_max_position_embeddings is 0, not an integer from 1 to 16777215" + GET_CONFIG,
    ),
]


@pytest.mark.parametrize(("changes", "error", "says"), [pytest.param(*case[1:], id=case[0]) for case in ODD])
def test_a_config_of_no_deepseek(changes: dict[str, Any], error: type[QuantkitError], says: str) -> None:
    assert sentence(lambda: plan_only(changed(TINY_V3, **changes)), error) == f"m: config.json: {says}"


def test_a_config_json_for_a_source(tmp_path: Path) -> None:
    path = tmp_path / "My-Model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(known_config("deepseek-v2-lite")))
    c = open_model(str(path))
    assert (c.model, len(c.tensors), c.source) == ("My-Model", 404, None)


ABSURD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 255, 256, 1 << 20, (1 << 24) - 1, 1 << 24, 1 << 31, 1 << 62, 10**40, -1]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["type", "factor", "rope_type"]), st.none() | st.floats(), max_size=2),
)


@given(st.dictionaries(st.sampled_from(sorted(TINY_V3)), ABSURD, min_size=1, max_size=3), st.booleans())
@settings(max_examples=300, deadline=20_000)
def test_any_values_in_a_config_make_a_catalogue_or_a_sentence(changes: dict[str, Any], mla: bool) -> None:
    made, says = attempt({**TINY_V3, **changes}, "k_b+v_b" if mla else "kv_b")
    if made is None:
        assert says.startswith("m: config.json")
        assert says.isprintable()
    else:
        assert sum(t.n_elements for t in made.tensors) <= 1 << 50
        assert all(0 < n < 1 << 40 for t in made.tensors for n in t.shape)


def attempt(config: Mapping[str, Any], layout: str) -> tuple[Catalogue | None, str]:
    """A catalogue, or why there is none; any other exception fails the test."""
    try:
        return plan_only(config, layout), ""
    except SourceError as e:
        return None, str(e)


# ---------------------------------------------------------------- checkpoint against config


def stored(config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """The headers of a checkpoint of that config."""
    kinds = {"fp8": "F8_E4M3", "bf16": "BF16", "norm": "BF16", "bias": "F32"}
    return {
        name: SourceTensor(name, kinds[kind], shape, Path("shard"), 0, 0)
        for name, shape, kind in demo.checkpoint_tensors(config)
    }


def with_headers(tensors: Mapping[str, SourceTensor], config: Mapping[str, Any] = TINY_V3) -> Catalogue:
    return families.build("m", config, Options(), None, tensors)


def test_a_checkpoint_of_its_config() -> None:
    assert with_headers(stored(TINY_V3)).tensors == plan_only(TINY_V3).tensors
    assert with_headers(stored(TINY_V2), TINY_V2).tensors == plan_only(TINY_V2).tensors


def test_the_mtp_layer_is_left_out_and_said() -> None:
    c = with_headers(stored(TINY_V3))
    n = sum(name.startswith("model.layers.3.") for name in stored(TINY_V3))
    assert n == 32
    assert c.notes == ("left out: 32 tensors of the multi-token-prediction layer (MTP), as llama.cpp does",)
    assert max(t.layer for t in c.tensors if t.layer is not None) == 2


def test_a_checkpoint_without_its_mtp_layer() -> None:
    """Some copies lack it; nothing of it is needed."""
    kept = {n: t for n, t in stored(TINY_V3).items() if not n.startswith("model.layers.3.")}
    assert with_headers(kept).notes == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_hidden_layers": 1},
            "84 tensors of layers 1-3, as llama.cpp does: config.json has num_hidden_layers 1 and ",
        ),
        (
            {"num_nextn_predict_layers": 0},
            "32 tensors of layer 3, as llama.cpp does: config.json has num_hidden_layers 3 and ",
        ),
        (
            {"num_nextn_predict_layers": None},
            "32 tensors of layer 3, as llama.cpp does: config.json has num_hidden_layers 3 and ",
        ),
    ],
)
def test_layers_that_the_config_does_not_announce(changes: dict[str, Any], says: str) -> None:
    """The converter drops every layer from num_hidden_layers on."""
    c = with_headers(stored(TINY_V3), changed(TINY_V3, **changes))
    n_mtp = changes.get("num_nextn_predict_layers", 1) or 0
    assert c.notes == (f"left out: {says}num_nextn_predict_layers {n_mtp}",)
    assert c.tensors == plan_only(changed(TINY_V3, **changes)).tensors
    assert max(t.layer for t in c.tensors if t.layer is not None) == c.n_layers - 1


def test_fewer_layers_than_the_config_has() -> None:
    fewer = stored(changed(TINY_V3, num_hidden_layers=1))
    assert sentence(lambda: with_headers(fewer)) == (
        "m: tensor 'model.layers.2.self_attn.kv_b_proj.weight' [256, 256] is in no shard, though config.json "
        "calls for it" + IS_IT
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", [384, 256]),
        ("lm_head.weight", [384, 256]),
        ("model.layers.1.mlp.experts.3.up_proj.weight", [256, 256]),
        ("model.layers.0.self_attn.kv_b_proj.weight", [256, 256]),
        ("model.layers.2.mlp.gate.e_score_correction_bias", [4]),
    ],
)
def test_a_missing_tensor(name: str, shape: list[int]) -> None:
    tensors = stored(TINY_V3)
    del tensors[name]
    assert sentence(lambda: with_headers(tensors)) == (
        f"m: tensor '{name}' {shape} is in no shard, though config.json calls for it{IS_IT}"
    )


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.4.up_proj.weight", "visual.patch.weight", "model.layers.x"]
)
def test_a_tensor_too_many(name: str) -> None:
    tensors = stored(TINY_V3)
    tensors[name] = SourceTensor(name, "BF16", (7, 5), Path("shard"), 0, 0)
    assert sentence(lambda: with_headers(tensors)) == (
        f"shard: tensor '{name}' [7, 5] has no place in a deepseek2 model of 3 layers{IS_IT}"
    )


def test_buffers_of_old_checkpoints_are_dropped() -> None:
    tensors = stored(TINY_V3)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attention.masked_bias"):
        tensors[name] = SourceTensor(name, "F32", (16,), Path("shard"), 0, 0)
    assert with_headers(tensors).tensors == plan_only(TINY_V3).tensors


def test_a_tied_output_that_is_stored_all_the_same_is_dropped() -> None:
    config = changed(TINY_V3, tie_word_embeddings=True)
    tensors = {**stored(config), "lm_head.weight": stored(TINY_V3)["lm_head.weight"]}
    assert with_headers(tensors, config).tensors == plan_only(config).tensors


@pytest.mark.parametrize("shape", [(256, 384), (384, 255), (384,), (384, 256, 1)])
def test_a_wrong_shape(shape: tuple[int, ...]) -> None:
    tensors = stored(TINY_V3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"]._replace(shape=shape)
    assert sentence(lambda: with_headers(tensors)) == (
        f"shard: 'lm_head.weight' has the shape {list(shape)}, but config.json calls for [384, 256]{IS_IT}"
    )


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E5M2", "BOOL"])
def test_a_dtype_that_is_no_weight(dtype: str) -> None:
    tensors = stored(TINY_V3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"]._replace(dtype=dtype)
    assert sentence(lambda: with_headers(tensors), UnsupportedError) == (
        f"shard: 'lm_head.weight' is {dtype}; weights are read as F8_E4M3, BF16, F16 or F32"
    )


def test_a_router_bias_that_the_config_does_not_promise_is_believed() -> None:
    config = changed(TINY_V3, topk_method=None)
    c = with_headers(stored(TINY_V3), config)
    assert c.tensors == plan_only(TINY_V3).tensors


# ---------------------------------------------------------------- a checkpoint on disk


def test_a_checkpoint_opens_with_its_tokenizer(tiny_v3: Path) -> None:
    c = open_model(str(tiny_v3), Options(pre="deepseek-v3"))
    assert (c.model, c.kvs_complete, len(c.tensors)) == ("Tiny-V3", True, len(plan_only(TINY_V3).tensors))
    values = {item.key: decode(item) for item in c.kvs}
    assert len(values["tokenizer.ggml.tokens"]) == len(values["tokenizer.ggml.token_type"]) == 384
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "deepseek-v3")
    assert (values["general.name"], values["general.sampling.temp"]) == ("Tiny V3", pytest.approx(0.6))


def test_fp8_without_quantization_config_is_read_all_the_same(v3: Path) -> None:
    edit_json(v3 / "config.json", lambda c: c.pop("quantization_config"))
    assert open_model(str(v3), Options(pre="deepseek-v3")).source is not None


def test_the_v2_family_from_disk(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "V2", TINY_V2)
    c = open_model(str(folder), Options(pre="deepseek-v3"))
    assert c.tensors == plan_only(TINY_V2).tensors
    assert not open_checkpoint(folder).scales


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        (
            "README.md",
            "---\nlicense: [mit\n---\n",
            'while parsing a flow sequence in "<unicode string>", line 1, column 10:',
        ),
        ("README.md", "---\ntags: [a, 1]\n---\n", "general.tags is ['a', 1], no arr; mend or remove it"),
        (
            "generation_config.json",
            '{"temperature": "hot"}',
            "general.sampling.temp is 'hot', no f32; mend or remove it",
        ),
        ("generation_config.json", '{"top_k": 1e99}', "general.sampling.top_k is 1e+99, no i32; mend or remove it"),
        ("generation_config.json", "[1]", "'list' object has no attribute 'get'; mend or remove it"),
        ("README.md", "---\nlicense: \ud800\n---\n", "'utf-8' codec can't decode byte 0xed in position 13: invalid"),
    ],
    ids=["card_yaml", "card_numbers", "temperature", "top_k", "no_object", "not_utf8"],
)
def test_metadata_files_that_cannot_be_used(v3: Path, file: str, text: str, why: str) -> None:
    (v3 / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    says = sentence(lambda: open_model(str(v3), Options(pre="deepseek-v3")))
    start = f"{v3}: README.md or generation_config.json cannot be taken into the metadata: {why}"
    # a foreign message may go on
    assert says.startswith(start)
    assert says.isprintable()
    assert says.endswith("; mend or remove it")


# ---------------------------------------------------------------- tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A directory with the tokenizer's files and a config, to damage."""
    demo.make_tokenizer(tmp_path, 384)
    (tmp_path / "config.json").write_text(json.dumps(TINY_V3))
    return tmp_path


NAMED = Options(pre="deepseek-v3")


def test_the_tokens_and_their_types(tokenizer: Path) -> None:
    kvs, notes = tokenizer_kvs(tokenizer, 400, NAMED)
    values = {item.key.removeprefix("tokenizer."): decode(item) for item in kvs}
    tokens, types = values["ggml.tokens"], values["ggml.token_type"]
    n = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    assert (len(tokens), tokens[n:]) == (400, [f"[PAD{i}]" for i in range(n, 400)])
    assert Counter(types) == {3: 5, 4: 2, 5: 400 - n, 1: n - 7}  # control, user defined, unused, normal
    assert [tokens[i] for i, t in enumerate(types) if t == 4] == ["<think>", "</think>"]
    assert (values["ggml.bos_token_id"], values["ggml.eos_token_id"], values["ggml.padding_token_id"]) == (0, 1, 1)
    assert (values["ggml.add_bos_token"], values["ggml.add_eos_token"]) == (True, False)
    assert values["chat_template"].startswith("{{ bos_token }}")
    assert notes == [
        "the padding token is the end-of-text token ('<｜end▁of▁sentence｜>', id 1), a fault of R1's tokenizer that "
        "harms fine-tuning; --pad-token '<｜▁pad▁｜>' mends it"
    ]


@pytest.mark.parametrize(("asked", "pad"), [("<｜▁pad▁｜>", 2), ("2", 2), ("383", 383), ("<think>", None)])
def test_another_padding_token(tokenizer: Path, asked: str, pad: int | None) -> None:
    kvs, notes = tokenizer_kvs(tokenizer, 384, NAMED._replace(pad_token=asked))
    values = {item.key: decode(item) for item in kvs}
    want = values["tokenizer.ggml.tokens"].index(asked) if pad is None else pad
    assert (values["tokenizer.ggml.padding_token_id"], notes) == (want, [])


def test_a_padding_token_where_there_was_none(tokenizer: Path) -> None:
    edit_json(tokenizer / "tokenizer_config.json", lambda c: c.pop("pad_token"))
    without, _ = tokenizer_kvs(tokenizer, 384, NAMED)
    with_, _ = tokenizer_kvs(tokenizer, 384, NAMED._replace(pad_token="2"))
    assert with_[:-1] == without
    assert (with_[-1].key, decode(with_[-1])) == ("tokenizer.ggml.padding_token_id", 2)


@pytest.mark.parametrize("asked", ["384", "-1", "<pad>", "", "9" * 5000, "٣"])
def test_a_padding_token_that_is_none(tokenizer: Path, asked: str) -> None:
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED._replace(pad_token=asked))) == (
        f"{tokenizer / 'tokenizer.json'}: --pad-token {asked!r:.60} is neither a token nor an id below 384"
    )


def test_no_tokenizer(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").unlink()
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED)) == (
        f"{tokenizer}: tokenizer.json is missing; download it from the model's repository"
    )


def test_an_unknown_pre_tokenizer(tokenizer: Path) -> None:
    says = sentence(lambda: tokenizer_kvs(tokenizer, 384, Options()))
    hash_ = says.split("(hash ")[1][:16]
    assert len(bytes.fromhex(hash_)) == 8
    assert says == (
        f"{tokenizer / 'tokenizer.json'}: the pre-tokenizer is not one quantkit recognizes (hash {hash_}…); name it "
        "with --pre, for a DeepSeek-V3 or R1: --pre deepseek-v3 (known: deepseek-coder, deepseek-llm, "
        "deepseek-r1-qwen, deepseek-v3, kimi-k2, llama-bpe, qwen2)"
    )


def test_a_name_to_fall_back_on_for_an_unknown_pre_tokenizer(tokenizer: Path) -> None:
    kvs, _ = tokenizer_kvs(tokenizer, 384, Options(pre="mine", recognize=True))
    assert ("tokenizer.ggml.pre", STRING, "mine") in [(i.key, i.type, decode(i)) for i in kvs if i.type == STRING]


def test_a_token_beyond_the_vocabulary(tokenizer: Path) -> None:
    assert sentence(lambda: tokenizer_kvs(tokenizer, 300, NAMED)) == (
        f"{tokenizer / 'tokenizer.json'}: the token '</think>' has the id 383, but config.json's vocab_size is 300; do "
        "the two belong together?"
    )


@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
def test_a_special_token_beyond_the_vocabulary(tokenizer: Path, kind: str) -> None:
    edit_json(tokenizer / "tokenizer_config.json", lambda c: c.pop(f"{kind}_token"))
    edit_json(tokenizer / "config.json", lambda c: c.update({f"{kind}_token_id": 1_000_000}))
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED)) == (
        f"{tokenizer}: the {kind} token has the id 1,000,000, but config.json's vocab_size is 384; do config.json and "
        "tokenizer belong together?"
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (models.WordLevel({"a": 0}, unk_token="a"), "WordLevel"),
        (models.WordPiece({"a": 0}, unk_token="a"), "WordPiece"),
        (models.Unigram([("a", 0.0)]), "Unigram"),
    ],
)
def test_a_tokenizer_of_another_kind(tokenizer: Path, model: Any, name: str) -> None:
    Tokenizer(model).save(str(tokenizer / "tokenizer.json"))
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED), UnsupportedError) == (
        f"{tokenizer / 'tokenizer.json'}: is a {name} tokenizer; quantkit reads BPE ones"
    )


def test_a_tokenizer_without_merges(tokenizer: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tokenizer / "tokenizer.json"))
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED)) == (
        f"{tokenizer / 'tokenizer.json'}: has no merges; quantkit reads byte-level BPE tokenizers, which have them"
    )


def test_a_tokenizer_that_cannot_encode(tokenizer: Path) -> None:
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], unk_token="gone")
    Tokenizer(model).save(str(tokenizer / "tokenizer.json"))
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, Options())) == (
        f"{tokenizer / 'tokenizer.json'}: not a usable tokenizer: Unk token `gone` not found in the vocabulary; "
        "download it again"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}', '"\\ud800"'])
def test_a_tokenizer_that_is_none(tokenizer: Path, text: str) -> None:
    (tokenizer / "tokenizer.json").write_text(text)
    says = sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED))
    # between the two is what the tokenizers package says, which changes with its version
    assert says.startswith(f"{tokenizer / 'tokenizer.json'}: not a usable tokenizer: ")
    assert says.endswith("; download it again")
    assert says.isprintable()


@pytest.mark.parametrize("text", ['{"chat_template": [1]}', '{"chat_template": "\\ud800"}'])
def test_a_chat_template_that_is_none(tokenizer: Path, text: str) -> None:
    edit_json(tokenizer / "tokenizer_config.json", lambda c: c.update(json.loads(text)))
    says = sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED))
    # between the two is what the gguf package says
    assert says.startswith(
        f"{tokenizer}: the special tokens or chat template in tokenizer_config.json cannot be read: "
    )
    assert says.isprintable()
    assert says.endswith("; download it again")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "is [1], not an object"),
        ("[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
    ],
    ids=["brace", "list", "deep"],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_tokenizer_config_that_is_none(tokenizer: Path, name: str, text: str, says: str) -> None:
    (tokenizer / name).write_text(text)
    got = sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED))
    # what json says may go on, in some releases of Python
    assert got.startswith(f"{tokenizer / name}: {says}")
    assert got.endswith("; download it again")


def test_a_token_of_the_class_beyond_the_vocabulary(tokenizer: Path) -> None:
    """Without a word on it, transformers adds the tokens of its class."""
    edit_json(tokenizer / "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizerFast"))
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED)) == (
        f"{tokenizer / 'tokenizer_config.json'}: says no unk_token, so transformers' LlamaTokenizer adds '<unk>' with "
        "the id 384, but config.json's vocab_size is 384; download the model's own tokenizer_config.json"
    )
    edit_json(tokenizer / "tokenizer_config.json", lambda c: c.update(unk_token=None))
    assert tokenizer_kvs(tokenizer, 384, NAMED)


def test_a_negative_special_token(tokenizer: Path) -> None:
    edit_json(tokenizer / "tokenizer_config.json", lambda c: c.pop("bos_token"))
    edit_json(tokenizer / "config.json", lambda c: c.update(bos_token_id=-1))
    assert sentence(lambda: tokenizer_kvs(tokenizer, 384, NAMED)) == (
        f"{tokenizer}: the special tokens or chat template in tokenizer_config.json cannot be read: invalid value for "
        "special token type bos: -1; download it again"
    )


TOKENIZER_JUNK = st.sampled_from([None, True, 0, -1, 384, 1 << 40, 1.5, "", "x", "a\nb", [], [1], {}, {"content": [1]}])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_values_in_the_tokenizers_files_make_keys_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-tokenizer"
    if not folder.exists():
        folder.mkdir()
        demo.make_tokenizer(folder, 384)
        (folder / "config.json").write_text(json.dumps(TINY_V3))
        shutil.copytree(folder, folder / "good")
    for path in (folder / "good").iterdir():
        values = json.loads(path.read_text("utf-8"))
        places = list(inner_places(values))
        for container, key in data.draw(st.lists(st.sampled_from(places), max_size=1), label=path.name):
            container[key] = data.draw(TOKENIZER_JUNK)
        (folder / path.name).write_text(json.dumps(values), "utf-8")
    says = ""
    try:
        kvs, _ = tokenizer_kvs(folder, 384, NAMED)
        assert len(kvs) > 4
    except SourceError as e:
        says = str(e)
    assert says.startswith(str(folder) if says else "")
    assert says.isprintable()


def inner_places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, but the vocabulary and the merges."""
    out = []
    items = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
    for key, inner in items:
        out.append((value, key))
        if key not in ("vocab", "merges"):
            out += inner_places(inner)
    return out

"""llama.cpp's arch `deepseek2`: DeepSeek-V2, V2-Lite, V2.5, V3, R1 and their later releases.

This module describes what a converter does: routed experts are stacked into one 3-D tensor per
projection; kv_b_proj [heads*(nope+v), kv_lora] is split by heads into attn_k_b (transposed) and
attn_v_b, or kept whole as attn_kv_b in the layout of early 2025; router, its bias and norms are F32;
the multi-token-prediction layers after the last main layer are left out. Source: llama.cpp's
conversion/deepseek.py, and conversion/base.py for the order of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...base.errors import SourceError, UnsupportedError
from ...gguf.header import BOOL, F32, KV, U32, kv
from ..catalogue import Catalogue, MlaLayout, Part, Source, SourceTensor, Tensor, ranges
from .common import Common, common_kvs
from .config import Config
from .defaults import default_theta, has_class, with_defaults
from .general import general_kvs
from .options import LAYOUTS, Options
from .rope import Rope, read_rope
from .tensors import MAX_HEADS, MAX_LAYERS, MAX_PARTS, assembled, check_stored, in_order, whole
from .tokenizer import tokenizer_kvs

ARCH = "deepseek2"
_MOST = {"num_hidden_layers": MAX_LAYERS, "n_routed_experts": 4096, "num_attention_heads": MAX_HEADS}


class Shape(NamedTuple):
    """The numbers of config.json that determine tensor shapes."""

    n_layers: int
    first_dense: int
    moe_freq: int
    hidden: int
    ffn: int
    moe_ffn: int
    n_experts: int
    n_shared: int
    n_heads: int
    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    v_head: int
    vocab: int
    router_bias: bool
    tied: bool
    n_mtp: int

    def is_moe(self, layer: int) -> bool:
        return self.n_experts > 0 and layer >= self.first_dense and layer % self.moe_freq == 0


def read_shape(c: Config) -> Shape:
    """Read the shape from config.json and check it. Raises SourceError, UnsupportedError."""
    if c.flag("attention_bias"):
        raise UnsupportedError(f"{c.model}: config.json: attention_bias is true; no released DeepSeek has biases there")
    n_layers, n_experts = c.int_("num_hidden_layers"), c.int_("n_routed_experts", 0, least=0)
    n_heads = c.int_("num_attention_heads")
    for n, (key, most) in zip((n_layers, n_experts, n_heads), _MOST.items(), strict=True):
        if n > most:
            raise SourceError(f"{c.model}: config.json: {key} is {n:,}; more than {most:,} is no DeepSeek")
    if n_layers * max(n_experts, n_heads) > MAX_PARTS:
        raise SourceError(
            f"{c.model}: config.json: {n_layers:,} layers of {n_experts:,} experts and {n_heads:,} heads are more "
            "than any DeepSeek has"
        )
    return Shape(
        n_layers=n_layers,
        first_dense=c.int_("first_k_dense_replace", 0, least=0),
        moe_freq=c.int_("moe_layer_freq", 1),
        hidden=c.int_("hidden_size"),
        ffn=c.int_("intermediate_size"),
        moe_ffn=c.int_("moe_intermediate_size") if n_experts else c.int_("intermediate_size"),
        n_experts=n_experts,
        n_shared=c.int_("n_shared_experts", 0, least=0),
        n_heads=n_heads,
        q_lora=c.optional_int("q_lora_rank"),
        kv_lora=c.int_("kv_lora_rank"),
        nope=c.int_("qk_nope_head_dim"),
        rope=c.int_("qk_rope_head_dim"),
        v_head=c.int_("v_head_dim"),
        vocab=c.int_("vocab_size"),
        router_bias=c.values.get("topk_method") == "noaux_tc",
        tied=c.flag("tie_word_embeddings"),
        n_mtp=c.int_("num_nextn_predict_layers", 0, least=0),
    )


def tensors(s: Shape, layout: MlaLayout) -> Iterator[Tensor]:
    """Yield the tensors of the output, in no particular order, with the parts they are made from."""
    yield whole("token_embd.weight", "model.embed_tokens.weight", s.vocab, s.hidden)
    yield whole("output_norm.weight", "model.norm.weight", s.hidden)
    if not s.tied:
        yield whole("output.weight", "lm_head.weight", s.vocab, s.hidden)
    for i in range(s.n_layers):
        hf, blk = f"model.layers.{i}.", f"blk.{i}."
        att = hf + "self_attn."
        yield whole(blk + "attn_norm.weight", hf + "input_layernorm.weight", s.hidden)
        yield whole(blk + "ffn_norm.weight", hf + "post_attention_layernorm.weight", s.hidden)
        if s.q_lora is None:
            yield whole(blk + "attn_q.weight", att + "q_proj.weight", s.n_heads * (s.nope + s.rope), s.hidden)
        else:
            q_rows = s.n_heads * (s.nope + s.rope)
            yield whole(blk + "attn_q_a.weight", att + "q_a_proj.weight", s.q_lora, s.hidden)
            yield whole(blk + "attn_q_a_norm.weight", att + "q_a_layernorm.weight", s.q_lora)
            yield whole(blk + "attn_q_b.weight", att + "q_b_proj.weight", q_rows, s.q_lora)
        yield whole(blk + "attn_kv_a_mqa.weight", att + "kv_a_proj_with_mqa.weight", s.kv_lora + s.rope, s.hidden)
        yield whole(blk + "attn_kv_a_norm.weight", att + "kv_a_layernorm.weight", s.kv_lora)
        yield from _kv_b(s, blk, att + "kv_b_proj.weight", layout)
        yield whole(blk + "attn_output.weight", att + "o_proj.weight", s.hidden, s.n_heads * s.v_head)
        if not s.is_moe(i):
            yield whole(blk + "ffn_gate.weight", hf + "mlp.gate_proj.weight", s.ffn, s.hidden)
            yield whole(blk + "ffn_up.weight", hf + "mlp.up_proj.weight", s.ffn, s.hidden)
            yield whole(blk + "ffn_down.weight", hf + "mlp.down_proj.weight", s.hidden, s.ffn)
            continue
        yield whole(blk + "ffn_gate_inp.weight", hf + "mlp.gate.weight", s.n_experts, s.hidden)
        if s.router_bias:
            yield whole(blk + "exp_probs_b.bias", hf + "mlp.gate.e_score_correction_bias", s.n_experts)
        for kind, rows, cols in (
            ("gate", s.moe_ffn, s.hidden),
            ("up", s.moe_ffn, s.hidden),
            ("down", s.hidden, s.moe_ffn),
        ):
            parts = tuple(
                Part(f"{hf}mlp.experts.{e}.{kind}_proj.weight", (rows, cols), 0, rows) for e in range(s.n_experts)
            )
            yield assembled(f"{blk}ffn_{kind}_exps.weight", (cols, rows, s.n_experts), parts)
        if s.n_shared:
            n = s.n_shared * s.moe_ffn
            yield whole(blk + "ffn_gate_shexp.weight", hf + "mlp.shared_experts.gate_proj.weight", n, s.hidden)
            yield whole(blk + "ffn_up_shexp.weight", hf + "mlp.shared_experts.up_proj.weight", n, s.hidden)
            yield whole(blk + "ffn_down_shexp.weight", hf + "mlp.shared_experts.down_proj.weight", s.hidden, n)


def _kv_b(s: Shape, blk: str, source: str, layout: MlaLayout) -> Iterator[Tensor]:
    per_head = s.nope + s.v_head
    shape = (s.n_heads * per_head, s.kv_lora)
    if layout is MlaLayout.KV_B:
        yield assembled(blk + "attn_kv_b.weight", (s.kv_lora, shape[0]), (Part(source, shape, 0, shape[0]),))
        return
    heads = range(s.n_heads)
    k_parts = tuple(Part(source, shape, h * per_head, s.nope, transposed=True) for h in heads)
    v_parts = tuple(Part(source, shape, h * per_head + s.nope, s.v_head) for h in heads)
    yield assembled(blk + "attn_k_b.weight", (s.nope, s.kv_lora, s.n_heads), k_parts)
    yield assembled(blk + "attn_v_b.weight", (s.kv_lora, s.v_head, s.n_heads), v_parts)


def arch_kvs(c: Config, s: Shape, rope: Rope, layout: MlaLayout) -> list[KV]:
    """Return the deepseek2.* keys in the converter's order."""

    def u32(key: str, value: int | None) -> None:
        if value is not None:
            out.append(kv(f"{ARCH}.{key}", U32, value))

    def f32(key: str, value: float) -> None:
        out.append(kv(f"{ARCH}.{key}", F32, value))

    mla = layout is not MlaLayout.KV_B
    # MLA runs as attention with one key/value head of the compressed width
    n_kv_heads = 1 if mla else c.int_("num_key_value_heads", s.n_heads)
    lengths = (s.kv_lora + s.rope, s.kv_lora) if mla else (s.nope + s.rope, s.v_head)
    # configs with a class in transformers get a head_dim, which makes the converter write
    # these two early, among the common keys; Kimi-K2's has no head_dim
    early = has_class(c) or c.values.get("head_dim") is not None
    common = Common(s.n_layers, s.hidden, s.ffn, s.n_heads, n_kv_heads, s.n_experts or None, lengths if early else None)
    out = common_kvs(c, ARCH, common, rope)
    u32("leading_dense_block_count", s.first_dense if s.n_experts else s.n_layers)
    u32("vocab_size", s.vocab)
    u32("attention.q_lora_rank", s.q_lora)
    u32("attention.kv_lora_rank", s.kv_lora)
    if not early:
        u32("attention.key_length", lengths[0])
        u32("attention.value_length", lengths[1])
    if mla:
        u32("attention.key_length_mla", s.nope + s.rope)
        u32("attention.value_length_mla", s.v_head)
    u32("expert_feed_forward_length", s.moe_ffn)
    u32("expert_shared_count", s.n_shared)
    if c.values.get("routed_scaling_factor") is not None:
        f32("expert_weights_scale", c.float_("routed_scaling_factor"))
    if c.flag("norm_topk_prob"):
        out.append(kv(f"{ARCH}.expert_weights_norm", BOOL, True))
    u32("rope.dimension_count", s.rope)
    if rope.mscale_all_dim is not None:
        # for this arch the key is 0.1 * mscale_all_dim (llama.cpp pull request 17945)
        f32("rope.scaling.yarn_log_multiplier", 0.1 * rope.mscale_all_dim)
    return out


def build(
    model: str,
    config: Mapping[str, Any],
    options: Options,
    source: Source | None,
    stored: Mapping[str, SourceTensor] | None,
) -> Catalogue:
    """See quantkit.model.families.build."""
    if options.layout not in LAYOUTS:
        raise UnsupportedError(f"layout '{options.layout}' is unknown; deepseek2 has {' and '.join(LAYOUTS)}")
    layout = MlaLayout(options.layout)
    c = Config(model, with_defaults(config))
    s = read_shape(c)
    if stored is not None and not s.router_bias:
        # topk_method tells that V3 has the bias; if a checkpoint has it anyway, it is used
        s = s._replace(router_bias=any(n.endswith(".mlp.gate.e_score_correction_bias") for n in stored))
    out = in_order(model, tensors(s, layout))
    rope = read_rope(c, ARCH, ("linear", "yarn"), default_theta(c))
    notes = [*rope.notes]
    if s.n_experts and s.router_bias and c.values.get("scoring_func") is None:
        notes.append(
            "config.json has no scoring_func, so llama.cpp routes by softmax; models with a router bias are trained "
            'with sigmoid: add "scoring_func": "sigmoid"'
        )
    if stored is not None:
        what = f"a {ARCH} model of {s.n_layers} layers"
        left_out = check_stored(model, what, out, stored, ("lm_head.weight",) if s.tied else (), s.n_layers)
        if left_out:
            notes.append(_left_out(left_out, s))
    elif s.n_mtp:
        notes.append(f"left out: {s.n_mtp} multi-token-prediction layer (MTP), as llama.cpp does")
    kvs = general_kvs(ARCH, model, out, source)
    kvs += arch_kvs(c, s, rope, layout)
    kvs.append(kv("general.quantization_version", U32, 2))
    if source is not None:
        tokenizer, more = tokenizer_kvs(source.path, s.vocab, options)
        kvs += tokenizer
        notes += more
    moe = tuple(i for i in range(s.n_layers) if s.is_moe(i))
    dense = tuple(i for i in range(s.n_layers) if not s.is_moe(i))
    return Catalogue(
        model, ARCH, layout, s.n_layers, dense, moe, tuple(out), tuple(kvs), source is not None, source,
        tuple(notes),
    )  # fmt: skip


def _left_out(layers: list[int], s: Shape) -> str:
    """Return the note on tensors that are left out; `layers`: the layer of each."""
    n = len(layers)
    if max(layers) < s.n_layers + s.n_mtp:
        return f"left out: {n} tensors of the multi-token-prediction layer (MTP), as llama.cpp does"
    found = set(layers)
    where = f"layer{'s' if len(found) > 1 else ''} {ranges(found)}"
    return (
        f"left out: {n} tensors of {where}, as llama.cpp does: config.json has num_hidden_layers {s.n_layers} and "
        f"num_nextn_predict_layers {s.n_mtp}"
    )

"""llama.cpp's archs `llama` and `qwen2`: dense models with plain attention, R1's distills among them.

This module describes what a converter does: the rows of llama's q and k are reordered, since ggml
rotates neighbouring values where Hugging Face rotates the halves of a head; Llama 3's rope scaling
becomes a tensor, rope_freqs; qwen2's q, k and v have biases. Source: llama.cpp's conversion/llama.py
and conversion/qwen.py, and conversion/base.py for the order of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...base.errors import SourceError, UnsupportedError
from ...gguf.header import BOOL, KV, U32, kv
from ..catalogue import Catalogue, MlaLayout, Part, Source, SourceTensor, Tensor
from .common import EXPERTS, Common, common_kvs
from .config import Config
from .defaults import DEFAULT_THETA, default_theta, with_defaults
from .general import general_kvs
from .options import Options
from .rope import Llama3Scaling, Rope, llama3, read_rope
from .synthetic import SyntheticTensors
from .tensors import MAX_HEADS, MAX_LAYERS, MAX_PARTS, assembled, check_stored, in_order, whole
from .tokenizer import flag, refuse_sentencepiece, tokenizer_kvs

#: config.json's architectures[0] -> llama.cpp's arch
ARCHS = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
#: these archs have only one layout, so `Options.layout` does not matter
LAYOUT = MlaLayout.AS_IS
_ROPE_FREQS = "rope_freqs.weight"
#: vocabulary sizes by which the converter recognizes a family
_CODELLAMA_VOCAB, _GRANITE_VOCAB = 32016, 49152


class Shape(NamedTuple):
    """The numbers of config.json that determine tensor shapes."""

    arch: str
    n_layers: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head: int
    """values in a head"""
    vocab: int
    tied: bool
    rope: Rope
    llama3: Llama3Scaling | None


def read_shape(c: Config, arch: str) -> Shape:
    """Read the shape from config.json and check it. Raises SourceError, UnsupportedError."""
    n_layers, hidden, n_heads = c.int_("num_hidden_layers"), c.int_("hidden_size"), c.int_("num_attention_heads")
    # if missing, llama has one key/value head per head; Qwen2Config's default fits no small model
    n_kv_heads = c.int_("num_key_value_heads", n_heads if arch == "llama" else None)
    for key, n, most in (("num_hidden_layers", n_layers, MAX_LAYERS), ("num_attention_heads", n_heads, MAX_HEADS)):
        if n > most:
            raise SourceError(f"{c.model}: config.json: {key} is {n:,}; more than {most:,} is no {arch} model")
    if n_layers * n_heads > MAX_PARTS:
        raise SourceError(
            f"{c.model}: config.json: {n_layers:,} layers of {n_heads:,} heads are more than any {arch} model has"
        )
    if n_heads % n_kv_heads:
        raise c.fail("num_key_value_heads", f"is {n_kv_heads}, which does not divide num_attention_heads, {n_heads}")
    head = c.optional_int("head_dim")
    if head is None:
        if hidden % n_heads:
            raise c.fail("hidden_size", f"is {hidden}, not a multiple of num_attention_heads, {n_heads}")
        head = hidden // n_heads
    if head % 2:
        raise c.fail("head_dim", f"is {head}; rope needs an even number")
    for key in ("attention_bias", "mlp_bias") if arch == "llama" else ():
        if c.flag(key):
            raise UnsupportedError(
                f"{c.model}: config.json: {key} is true; quantkit converts llama models without biases: convert it "
                "with convert_hf_to_gguf.py --outtype bf16, and give the GGUF"
            )
    kinds = ("linear", "yarn", "llama3") if arch == "llama" else ("linear", "yarn")
    rope = read_rope(c, arch, kinds, default_theta(c))
    return Shape(
        arch=arch,
        n_layers=n_layers,
        hidden=hidden,
        ffn=c.int_("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head=head,
        vocab=c.int_("vocab_size"),
        tied=c.flag("tie_word_embeddings"),
        rope=rope,
        llama3=llama3(rope.scaling, rope.theta or DEFAULT_THETA, head) if rope.kind == "llama3" else None,
    )


def tensors(s: Shape) -> Iterator[Tensor]:
    """Yield the tensors of the output, in no particular order, with the parts they are made from."""
    yield whole("token_embd.weight", "model.embed_tokens.weight", s.vocab, s.hidden)
    yield whole("output_norm.weight", "model.norm.weight", s.hidden)
    if not s.tied:
        yield whole("output.weight", "lm_head.weight", s.vocab, s.hidden)
    if s.llama3 is not None:
        yield whole(_ROPE_FREQS, _ROPE_FREQS, s.head // 2)
    q, kv_ = s.n_heads * s.head, s.n_kv_heads * s.head
    for i in range(s.n_layers):
        hf, blk = f"model.layers.{i}.", f"blk.{i}."
        att, mlp = hf + "self_attn.", hf + "mlp."
        yield whole(blk + "attn_norm.weight", hf + "input_layernorm.weight", s.hidden)
        yield whole(blk + "ffn_norm.weight", hf + "post_attention_layernorm.weight", s.hidden)
        for name, rows in (("q", q), ("k", kv_), ("v", kv_)):
            ours, theirs = f"{blk}attn_{name}", f"{att}{name}_proj"
            if s.arch == "llama" and name != "v":
                yield _rotated(ours + ".weight", theirs + ".weight", (rows, s.hidden), s.head)
            else:
                yield whole(ours + ".weight", theirs + ".weight", rows, s.hidden)
            if s.arch == "qwen2":
                yield whole(ours + ".bias", theirs + ".bias", rows)
        yield whole(blk + "attn_output.weight", att + "o_proj.weight", s.hidden, q)
        yield whole(blk + "ffn_gate.weight", mlp + "gate_proj.weight", s.ffn, s.hidden)
        yield whole(blk + "ffn_up.weight", mlp + "up_proj.weight", s.ffn, s.hidden)
        yield whole(blk + "ffn_down.weight", mlp + "down_proj.weight", s.hidden, s.ffn)


def _rotated(name: str, source: str, shape: tuple[int, int], head: int) -> Tensor:
    """Return llama's q or k: in each head, rows of the second half are interleaved with those of the first."""
    parts = tuple(Part(source, shape, row, head, interleave=2) for row in range(0, shape[0], head))
    return assembled(name, (shape[1], shape[0]), parts)


def arch_kvs(c: Config, s: Shape) -> list[KV]:
    """Return the keys of the arch in the converter's order."""

    # LlamaConfig always has a head_dim, Qwen2Config only if config.json has one
    has_lengths = s.arch == "llama" or c.optional_int("head_dim") is not None
    lengths = (s.head, s.head) if has_lengths else None
    common = Common(s.n_layers, s.hidden, s.ffn, s.n_heads, s.n_kv_heads, c.first_int(EXPERTS, least=0), lengths)
    out = common_kvs(c, s.arch, common, s.rope)
    if s.arch == "llama":
        out.append(kv("llama.vocab_size", U32, s.vocab))
        out.append(kv("llama.rope.dimension_count", U32, s.head))
    return out


def build(
    model: str,
    config: Mapping[str, Any],
    options: Options,
    source: Source | None,
    stored: Mapping[str, SourceTensor] | None,
) -> Catalogue:
    """See quantkit.model.families.build."""
    arch = ARCHS[config["architectures"][0]]
    if options.layout_given:
        raise UnsupportedError(
            f"{model}: --layout {options.layout} is of models with MLA (DeepSeek); {arch} has one layout only: "
            "leave it out"
        )
    c = Config(model, with_defaults(config))
    s = read_shape(c, arch)
    if stored is not None and "lm_head.weight" in stored:
        s = s._replace(tied=False)  # the converter keeps a stored one even if config.json says tied
    out = in_order(model, tensors(s))
    if stored is not None:
        read = [t for t in out if t.name != _ROPE_FREQS]
        check_stored(model, f"a {arch} model of {s.n_layers} layers", read, stored)
    kvs = general_kvs(arch, model, out, source)
    kvs += arch_kvs(c, s)
    kvs.append(kv("general.quantization_version", U32, 2))
    notes = [*s.rope.notes]
    if source is not None:
        tokenizer, more = _tokenizer_kvs(source, s, options)
        kvs += tokenizer
        notes += more
        if s.llama3 is not None:
            source = SyntheticTensors(source, {_ROPE_FREQS: (s.head // 2, s.llama3.factors)})
    layers = tuple(range(s.n_layers))
    return Catalogue(
        model, arch, LAYOUT, s.n_layers, layers, (), tuple(out), tuple(kvs), source is not None, source, tuple(notes)
    )  # fmt: skip


def _tokenizer_kvs(source: Source, s: Shape, options: Options) -> tuple[list[KV], list[str]]:
    refuse_sentencepiece(source.path)
    if s.arch != "llama":
        return tokenizer_kvs(source.path, s.vocab, options)
    if s.vocab == _CODELLAMA_VOCAB:
        raise UnsupportedError(
            f"{source.path}: vocab_size {s.vocab:,} is CodeLlama's, whose tokenizer quantkit does not read; convert it "
            "with convert_hf_to_gguf.py --outtype bf16, and give the GGUF"
        )
    kvs, notes = tokenizer_kvs(source.path, s.vocab, options)
    if s.vocab == _GRANITE_VOCAB:
        no_bos = kv("tokenizer.ggml.add_bos_token", BOOL, False)
        there = any(item.key == no_bos.key for item in kvs)
        kvs = [no_bos if item.key == no_bos.key else item for item in kvs] if there else [*kvs, no_bos]
    prefix = flag(source.path, "add_prefix_space")
    return ([] if prefix is None else [kv("tokenizer.ggml.add_space_prefix", BOOL, prefix)]) + kvs, notes

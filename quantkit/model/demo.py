"""A small checkpoint in the exact layout and FP8 format of DeepSeek-V3, with a tokenizer and a matching imatrix.

The weights are seeded random numbers, so the model is useless, but it exercises every step of a real run: FP8 with
128x128 scales (partial blocks at an edge), stacked experts, a split kv_b, an MTP layer to leave out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import OutputError
from ..gguf.header import STRING, U32, header_bytes, is_utf8, kv, kv_array, pad

SEED = 20250127
#: marks a folder that the demo made, and may make again; any other is left alone
MARKER = ".quantkit-demo"
PRE = "deepseek-v3"
#: the checkpoint's folder, which gives the model its name
NAME = "DeepSeek-V3-Demo"

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 2,
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "kv_lora_rank": 256,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 256,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 64,
    "vocab_size": 512,
}

_TEXT = (
    "The full model is stored in eight bits. The bits go where they matter: routed experts take one and a half, "
    "attention and shared experts four to six, the router and the norms stay as they are. Every token passes "
    "through the dense layers and the shared expert, and through eight of two hundred and fifty six experts. "
    "Quantize everything alike to that size and it babbles; leave the few that see every token in peace and it thinks. "
)
_SPECIAL = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
)


def make_checkpoint(folder: Path, config: Mapping[str, Any] | None = None, seed: int = SEED, n_shards: int = 3) -> None:
    """Write a checkpoint to an existing empty folder: config.json, shards with index, tokenizer. Only one shard is in
    memory at a time. Raises OutputError."""
    from safetensors import SafetensorError

    try:
        _write_checkpoint(folder, config, seed, n_shards)
    except (OSError, SafetensorError) as e:  # SafetensorError's message includes the system's
        why = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise OutputError(f"{folder}: the checkpoint cannot be written: {why}") from None


def _write_checkpoint(folder: Path, config: Mapping[str, Any] | None, seed: int, n_shards: int) -> None:
    from safetensors.numpy import save_file

    cfg = dict(config or CONFIG)
    tensors: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    target = sum(math.prod(shape) for _, shape, _ in checkpoint_tensors(cfg)) / n_shards
    at = size = total = 0
    for name, shape, kind in checkpoint_tensors(cfg):
        if size > target and at + 1 < n_shards:
            save_file(tensors, folder / _shard(at, n_shards), {"format": "pt"})
            tensors, at, size = {}, at + 1, 0
        for key, tensor in _tensor(name, shape, kind, seed, cfg):
            tensors[key] = tensor
            weight_map[key] = _shard(at, n_shards)
            total += tensor.nbytes
        size += math.prod(shape)
    save_file(tensors, folder / _shard(at, n_shards), {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _json(folder / "model.safetensors.index.json", index)
    _json(folder / "config.json", cfg)
    _json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.95})
    make_tokenizer(folder, int(cfg["vocab_size"]))


def _shard(i: int, n_shards: int) -> str:
    return f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"


def checkpoint_tensors(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield names, row-major shapes and kinds (fp8, bf16, norm, bias) of a DeepSeek-V2/V3 checkpoint's tensors."""
    linear = "fp8" if "quantization_config" in c else "bf16"
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden), "bf16"
    n_layers = c["num_hidden_layers"]
    for i in range(n_layers + c.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,), "norm"
        yield p + "post_attention_layernorm.weight", (hidden,), "norm"
        q_rows = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        if c.get("q_lora_rank"):
            yield p + "self_attn.q_a_proj.weight", (c["q_lora_rank"], hidden), linear
            yield p + "self_attn.q_a_layernorm.weight", (c["q_lora_rank"],), "norm"
            yield p + "self_attn.q_b_proj.weight", (q_rows, c["q_lora_rank"]), linear
        else:
            yield p + "self_attn.q_proj.weight", (q_rows, hidden), linear
        kv_lora = c["kv_lora_rank"]
        yield p + "self_attn.kv_a_proj_with_mqa.weight", (kv_lora + c["qk_rope_head_dim"], hidden), linear
        yield p + "self_attn.kv_a_layernorm.weight", (kv_lora,), "norm"
        kv_rows = heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
        yield p + "self_attn.kv_b_proj.weight", (kv_rows, kv_lora), linear
        yield p + "self_attn.o_proj.weight", (hidden, heads * c["v_head_dim"]), linear
        if i < c["first_k_dense_replace"]:
            yield from _ffn(p + "mlp.", hidden, c["intermediate_size"], linear)
        else:
            yield p + "mlp.gate.weight", (c["n_routed_experts"], hidden), "bf16"
            if c.get("topk_method") == "noaux_tc":
                yield p + "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "bias"
            for e in range(c["n_routed_experts"]):
                yield from _ffn(f"{p}mlp.experts.{e}.", hidden, c["moe_intermediate_size"], linear)
            if c.get("n_shared_experts"):
                n = c["n_shared_experts"] * c["moe_intermediate_size"]
                yield from _ffn(p + "mlp.shared_experts.", hidden, n, linear)
        if i >= n_layers:
            yield p + "embed_tokens.weight", (c["vocab_size"], hidden), "bf16"
            yield p + "enorm.weight", (hidden,), "norm"
            yield p + "hnorm.weight", (hidden,), "norm"
            yield p + "eh_proj.weight", (hidden, 2 * hidden), "bf16"
            yield p + "shared_head.norm.weight", (hidden,), "norm"
            yield p + "shared_head.head.weight", (c["vocab_size"], hidden), "bf16"
    yield "model.norm.weight", (hidden,), "norm"
    if not c.get("tie_word_embeddings"):
        yield "lm_head.weight", (c["vocab_size"], hidden), "bf16"


def _ffn(prefix: str, hidden: int, ffn: int, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield prefix + "gate_proj.weight", (ffn, hidden), kind
    yield prefix + "up_proj.weight", (ffn, hidden), kind
    yield prefix + "down_proj.weight", (hidden, ffn), kind


def _tensor(name: str, shape: tuple[int, ...], kind: str, seed: int, c: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is stored of a weight, contiguous as save_file needs it: the tensor and, for FP8, its scales."""
    from ml_dtypes import bfloat16, float8_e4m3fn

    # each name has its own generator, so that a weight does not depend on the others
    rng = np.random.default_rng([seed, *name.encode()])
    if kind == "norm":
        yield name, (1 + 0.1 * rng.standard_normal(shape, np.float32)).astype(bfloat16)
    elif kind == "bias":
        yield name, 0.1 * rng.standard_normal(shape, np.float32)
    else:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.7 / math.sqrt(shape[-1]))
        # outliers in a few columns, as in real weights
        values[:, rng.integers(0, shape[1], max(1, shape[1] // 128))] *= 6
        if kind == "bf16":
            yield name, values.astype(bfloat16)
            return
        rows, cols = (int(b) for b in c["quantization_config"]["weight_block_size"])
        padded = np.pad(values, ((0, -shape[0] % rows), (0, -shape[1] % cols)))
        tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
        scale = np.abs(tiles).max((1, 3)).clip(np.float32(1e-12)) / np.float32(448)
        codes = (tiles / scale[:, None, :, None]).reshape(padded.shape)[: shape[0], : shape[1]]
        yield name, np.ascontiguousarray(codes.astype(float8_e4m3fn))
        yield name + "_scale_inv", np.ascontiguousarray(scale)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a small byte-level BPE tokenizer with DeepSeek-V3's special tokens and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 4,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in _SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    chat = [AddedToken(t, normalized=False, special=True) for t in ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")]
    tokenizer.add_special_tokens(chat)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>")])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    named = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1], "pad_token": _SPECIAL[1]}
    user, assistant = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        + user
        + "{% else %}"
        + assistant
        + "{% endif %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}"
        + assistant
        + "{% endif %}"
    )
    settings: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": 4096, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    _json(folder / "tokenizer_config.json", {**settings, **named})


def make_imatrix(path: Path, tensors: Mapping[str, tuple[int, ...]], seed: int = SEED) -> None:
    """Write an importance matrix as llama-imatrix does, for tensors of these (ne) shapes: lognormal activations,
    experts used unevenly. Stacked experts have one count each, other 3-D tensors a single one. Raises OutputError."""
    infos, blobs, at = [], [], 0
    for name in sorted(tensors):
        shape = tensors[name]
        n_mats = math.prod(shape[2:])
        counted = n_mats if "_exps." in name else 1
        rng = np.random.default_rng([seed, *name.encode(), 1])
        counts = np.floor(rng.lognormal(7, 1, (counted, 1))).astype(np.float32) + 1
        means = rng.lognormal(0, 1.5, (counted, shape[0] * n_mats // counted)).astype(np.float32)
        for suffix, values in ((".in_sum2", means * counts), (".counts", counts)):
            infos.append((name + suffix, tuple(reversed(values.shape)), "F32", at))
            blobs.append(values.tobytes().ljust(pad(values.nbytes), b"\0"))
            at += len(blobs[-1])
    kvs = [
        kv("general.type", STRING, "imatrix"),
        kv_array("imatrix.datasets", STRING, ["quantkit demo, seeded random"]),
        kv("imatrix.chunk_count", U32, 64),
        kv("imatrix.chunk_size", U32, 512),
    ]
    try:
        path.write_bytes(header_bytes(kvs, infos) + b"".join(blobs))
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror or e}") from None


def prepare_folder(folder: Path) -> None:
    """Make an empty folder for the demo. Raises OutputError if it holds anything that the demo did not make."""
    try:
        others = os.path.lexists(folder) and any(folder.iterdir()) and not os.path.exists(folder / MARKER)
    except NotADirectoryError:
        others = True
    except OSError as e:
        raise OutputError(f"{folder}: cannot be read: {e.strerror or e}; choose another place with --dir") from None
    if others:
        raise OutputError(f"{folder}: exists and was not made by quantkit demo; choose another place with --dir")
    if not is_utf8(str(folder)):
        raise OutputError(f"{str(folder)!a}: is not UTF-8, as a model's path must be; choose another place with --dir")
    try:
        (folder / NAME).mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    except OSError as e:
        raise OutputError(f"{folder}: cannot be made: {e.strerror or e}") from None


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")

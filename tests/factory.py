"""Small checkpoints, GGUFs and hostile headers for tests. Everything is seeded."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.gguf.header import F32 as FLOAT32
from quantkit.gguf.header import KV, STRING, U32, header_bytes, kv, kv_array, pad
from quantkit.model import demo

#: a V3 in the exact layout, as small as 256-value blocks allow: 3 layers (1 dense), 4 experts
TINY_V3: dict[str, Any] = {
    **demo.CONFIG,
    "first_k_dense_replace": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "kv_lora_rank": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}

#: V2-Lite's peculiarities: no q_lora, softmax gating without bias, BF16, two shared experts, no MTP,
#: and a moe_intermediate_size that no 256-block divides
TINY_V2: dict[str, Any] = {
    **{k: v for k, v in TINY_V3.items() if k not in ("quantization_config", "num_nextn_predict_layers")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}

#: Llama 3's peculiarities: grouped heads, its own kind of rope scaling, untied embeddings
TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 384,
}

#: Qwen2.5's peculiarities: biases, tied embeddings, no rope scaling
TINY_QWEN2: dict[str, Any] = {
    **{k: v for k, v in TINY_LLAMA.items() if k not in ("attention_bias", "mlp_bias", "rope_scaling")},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}

#: as small as a model can be: what counts here is its keys
_SMALLEST = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
_DEEPSEEK = {
    **_SMALLEST,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "qk_nope_head_dim": 32,
}
SMALL_V3 = {k: v for k, v in {**TINY_V3, **_DEEPSEEK, "q_lora_rank": 32}.items() if k != "quantization_config"}
SMALL_V2 = {**TINY_V2, **_DEEPSEEK}
SMALL_LLAMA, SMALL_QWEN2 = {**TINY_LLAMA, **_SMALLEST}, {**TINY_QWEN2, **_SMALLEST}


def checkpoint(folder: Path, config: Mapping[str, Any] = TINY_V3, seed: int = 7, n_shards: int = 2) -> Path:
    """A checkpoint directory with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    demo.make_checkpoint(folder, config, seed, n_shards)
    return folder


def dense_tensors(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and row-major shapes of a llama or qwen2 checkpoint's tensors."""
    hidden, ffn, n_heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head = c.get("head_dim") or hidden // n_heads
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        yield p + "post_attention_layernorm.weight", (hidden,)
        for name, n in (("q", n_heads), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
            yield f"{p}self_attn.{name}_proj.weight", (n * head, hidden)
            if c["model_type"] == "qwen2":
                yield f"{p}self_attn.{name}_proj.bias", (n * head,)
        yield p + "self_attn.o_proj.weight", (hidden, n_heads * head)
        yield p + "mlp.gate_proj.weight", (ffn, hidden)
        yield p + "mlp.up_proj.weight", (ffn, hidden)
        yield p + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def dense_checkpoint(
    folder: Path, config: Mapping[str, Any], dtypes: Sequence[str] = ("bfloat16",), seed: int = 7
) -> Path:
    """A llama or qwen2 checkpoint directory with random weights, a shard for each of torch's `dtypes`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{} for _ in dtypes]
    for i, (name, shape) in enumerate(dense_tensors(config)):
        rng = np.random.default_rng([seed, *name.encode()])
        values = rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5) + ("norm" in name)
        # so that each dtype has tensors of every kind
        at = i % len(dtypes)
        shards[at][name] = torch.from_numpy(values.astype(np.float32)).to(getattr(torch, dtypes[at]))
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    demo.make_tokenizer(folder, int(config["vocab_size"]))
    return folder


def imatrix_for(catalogue: Any, path: Path, seed: int = 11) -> Path:
    """An importance matrix for every quantizable tensor of the layers, as llama-imatrix would make."""
    shapes = {t.name: t.shape for t in catalogue.tensors if t.quantizable and t.layer is not None}
    demo.make_imatrix(path, shapes, seed)
    return path


def covariance_for(catalogue: Any, folder: Path, seed: int = 13, own_experts: bool = True, n_tokens: int = 600) -> Path:
    """A covariance's folder, as `quantkit imatrix make --covariance` writes it, of correlated random inputs. Expert 1
    of each layer saw 40 tokens for its ffn_down, and expert 2 none."""
    from quantkit.lab.calibration.inputs import planned

    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[str, list[dict[str, Any]]] = {}
    for p in planned(catalogue, own_experts):
        layer, kind = p.names[0].split(".")[1:3]
        rng = np.random.default_rng([seed, *p.names[0].encode()])
        counts = [n_tokens] * p.n_mats
        if own_experts and kind == "ffn_down_exps":
            counts[1:3] = [40, 0]
        packed = np.empty((p.n_mats, p.n_cols * (p.n_cols + 1) // 2), np.float32)
        mix = rng.standard_normal((p.n_cols // 4, p.n_cols))
        for mat, count in enumerate(counts):
            x = rng.standard_normal((count, p.n_cols // 4)) @ mix + 0.3 * rng.standard_normal((count, p.n_cols))
            packed[mat] = (x.T @ x).astype(np.float32)[np.triu_indices(p.n_cols)]
        file = f"layer-{int(layer):05d}-{kind}.npy"
        np.save(folder / file, packed)
        about = {"file": file, "tensors": list(p.names), "n_cols": p.n_cols, "counts": counts}
        layers.setdefault(layer, []).append(about)
    for layer, about_all in layers.items():
        (folder / f"layer-{int(layer):05d}.json").write_text(json.dumps(about_all))
    return folder


def legacy_imatrix(path: Path, entries: Mapping[str, tuple[int, np.ndarray]], chunks: int = 3) -> Path:
    """A .dat importance matrix: name -> (ncall, float32 values)."""
    out = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", n_calls, values.size)
        out += values.astype(np.float32).tobytes()
    data = b"calib.txt"
    path.write_bytes(out + struct.pack("<ii", chunks, len(data)) + data)
    return path


def edit_json(path: Path, change: Any) -> None:
    """Apply `change` to the object in a JSON file."""
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header, right or wrong: an object, or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def edit_safetensors(path: Path, change: Any) -> None:
    """Rewrite a shard's header in place; the data stays as it is."""
    blob = path.read_bytes()
    (n,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + n])
    change(header)
    write_safetensors(path, header, blob[8 + n :])


def shard_of(folder: Path, name: str) -> Path:
    """The shard of a checkpoint that holds a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    return folder / str(index["weight_map"][name])


def gguf_file(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str, bytes]], kvs: list[KV] | None = None
) -> Path:
    """A GGUF of these tensors: name -> (ne shape, type, data)."""
    infos, blobs, at = [], [], 0
    for name, (shape, type_, data) in tensors.items():
        infos.append((name, shape, type_, at))
        blobs.append(data.ljust(pad(len(data)), b"\0"))
        at += len(blobs[-1])
    head = (
        [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)] if kvs is None else kvs
    )
    path.write_bytes(header_bytes(head, infos) + b"".join(blobs))
    return path


LLAMA_KVS = [
    kv("general.architecture", STRING, "llama"),
    kv("llama.block_count", U32, 3),
    kv_array("tokenizer.ggml.tokens", STRING, ["a", "bc", ""]),
    kv_array("tokenizer.ggml.scores", FLOAT32, [0.5, -1.0, 2.0]),
    kv("general.file_type", U32, 7),
]


def sized_gguf(path: Path, sizes: Sequence[int], kvs: Sequence[KV] = LLAMA_KVS, seed: int = 1) -> Path:
    """A GGUF with a tensor of each of these sizes in bytes."""
    rng = np.random.default_rng(seed)
    return gguf_file(path, {f"blk.{i}.t": ((n,), "I8", rng.bytes(n)) for i, n in enumerate(sizes)}, list(kvs))


IMATRIX_KVS = [
    kv("general.type", STRING, "imatrix"),
    kv_array("imatrix.datasets", STRING, ["calib.txt", "more.txt"]),
    kv("imatrix.chunk_count", U32, 64),
    kv("imatrix.chunk_size", U32, 512),
]


def gguf_imatrix(path: Path, entries: Mapping[str, tuple[np.ndarray, np.ndarray]], kvs: list[KV] | None = None) -> Path:
    """name -> (in_sum2, counts), of any shape and dtype float32."""
    tensors = {}
    for name, arrays in entries.items():
        for suffix, values in zip((".in_sum2", ".counts"), arrays, strict=True):
            tensors[name + suffix] = (tuple(reversed(values.shape)), "F32", values.astype(np.float32).tobytes())
    return gguf_file(path, tensors, IMATRIX_KVS if kvs is None else kvs)


def poke(folder: Path, name: str, at: int, raw: bytes) -> None:
    """Overwrite bytes of a stored tensor of a checkpoint, from its byte `at` on."""
    path = shard_of(folder, name)
    blob = bytearray(path.read_bytes())
    (n,) = struct.unpack_from("<Q", blob)
    begin = 8 + n + json.loads(blob[8 : 8 + n])[name]["data_offsets"][0] + at
    blob[begin : begin + len(raw)] = raw
    path.write_bytes(blob)


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Change a bit of a file."""
    with open(path, "r+b") as f:
        f.seek(at)
        (value,) = f.read(1)
        f.seek(at)
        f.write(bytes([value ^ 1 << bit]))

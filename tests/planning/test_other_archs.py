"""Mixtures and builds for the archs that the pinned llama.cpp knows, from small GGUFs with their tensors' names.

The lists of archs and tensors come from the pinned gguf-py. llama-quantize reads a model's hyperparameters before it
quantizes, so each file has all the keys that any arch needs.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import Tools
from mixture_choices import dry_run, our_types

from quantkit.base.errors import RecipeError
from quantkit.building import run as builds
from quantkit.building.engines.native import NativeEngine
from quantkit.gguf.header import BOOL, F32, KV, STRING, U32, header_bytes, kv, kv_array, pad
from quantkit.gguf.types import QTYPES
from quantkit.imatrix.matrix import open_imatrix
from quantkit.llama_cpp import toolchain
from quantkit.model import demo
from quantkit.model.open import open_model
from quantkit.planning.mixtures import BASE_TYPES
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load

pytestmark = pytest.mark.tools

#: llama.cpp has no code for gptj; the others need keys that are not made up here
NOT_TRIED = {
    "gptj", "clip", "deepseek4", "dflash", "dots3note", "eagle3", "graniteswitch", "hrm_text", "hy_v4",
}  # fmt: skip
NUMBERS = {
    "vocab_size": 384, "context_length": 4096, "embedding_length": 512, "feed_forward_length": 1024,
    "attention.head_count": 8, "attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64,
    "rope.dimension_count": 64, "attention.q_lora_rank": 256, "attention.kv_lora_rank": 256,
    "attention.key_length_mla": 64, "attention.value_length_mla": 64, "attention.sliding_window": 128,
    "attention.group_norm_groups": 4, "attention.relative_buckets_count": 32, "attention.temperature_length": 8192,
    "attention.decay_lora_rank": 32, "attention.iclr_lora_rank": 32, "attention.value_residual_mix_lora_rank": 32,
    "attention.gate_lora_rank": 32, "attention.indexer.head_count": 4, "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64, "attention.shared_kv_layers": 0, "attention.block_count": 2,
    "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 32, "ssm.group_count": 1,
    "wkv.head_size": 64, "time_mix_extra_dim": 32, "time_decay_extra_dim": 64, "rescale_every_n_layers": 6,
    "token_shift_count": 2, "posnet.embedding_length": 512, "posnet.block_count": 2, "convnext.embedding_length": 512,
    "convnext.block_count": 2, "features_length": 512, "tokenizer.ggml.token_type_count": 2, "pooling_type": 1,
    "embedding_length_per_layer_input": 64, "shortconv.l_cache": 3, "kda.head_dim": 64, "experts_per_group": 2,
    "expert_chunk_feed_forward_length": 256, "mrope_section_count": 3, "attention.key_length_swa": 64,
    "attention.value_length_swa": 64, "attention.kv_lora_rank_swa": 256, "attention.q_lora_rank_swa": 256,
    "attention.indexer.kpool": 4, "attention.indexer.block_size": 64, "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2, "attn_res.block_size": 4,
    "hyper_connection.low_rank": 8, "attention.output_group_count": 2, "attention.key_length_mla_swa": 64,
    "attention.value_length_mla_swa": 64, "attention.indexer.local_blocks": 1, "attention.output_lora_rank": 32,
}  # fmt: skip
OF_EXPERTS = {
    "expert_used_count": 2, "expert_feed_forward_length": 256, "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 256, "leading_dense_block_count": 1, "expert_gating_func": 2,
    "interleave_moe_layer_step": 1, "moe_every_n_layers": 2, "expert_group_count": 1, "expert_group_used_count": 1,
}  # fmt: skip
FLOATS = {
    "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
    "attention.group_norm_epsilon": 1e-5, "attention.clamp_kqv": 1.0, "attention.max_alibi_bias": 1.0,
    "attention.scale": 1.0, "rope.freq_base": 1e4,
    "logit_scale": 1.0, "expert_weights_scale": 1.0, "expert_group_scale": 1.0, "residual_scale": 1.0,
    "embedding_scale": 1.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "rope.scaling.yarn_log_multiplier": 0.1, "kda.gate_lower_bound": -5.0, "swiglu_clamp_exp": 7.0,
    "hyper_connection.epsilon": 1e-5, "activation.situ_beta": 1.0, "activation.situ_linear_beta": 1.0,
    "rope.freq_base_swa": 1e4, "hyper_connection.magnitude": 1.0,
}  # fmt: skip
#: some archs want a pattern as a list of the layers, others as a number
AS_LIST = {"gemma4", "gemma4-assistant", "granite_swa", "maple", "mimo2", "spark2_5", "step35"}


@lru_cache
def gguf_py() -> ModuleType:
    """The pinned gguf-py's lists."""
    (_, script), _ = toolchain.converter_command()
    spec = importlib.util.spec_from_file_location("pinned", Path(script).parent / "gguf-py/gguf/constants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archs() -> dict[str, list[str]]:
    """Every arch with its tensors' names; names in layers as blk.{bid}.…"""
    lists = gguf_py()
    return {
        name: [lists.TENSOR_NAMES[t] for t in lists.MODEL_TENSORS[arch]]
        for arch, name in lists.MODEL_ARCH_NAMES.items()
        if name not in NOT_TRIED
    }


def keys(arch: str, n_layers: int, n_experts: int) -> list[KV]:
    numbers = {**NUMBERS, "block_count": n_layers, "decoder_block_count": n_layers}
    if n_experts:
        numbers |= {**OF_EXPERTS, "expert_count": n_experts}
    if arch not in AS_LIST:
        numbers["attention.sliding_window_pattern"] = 2
    out = [kv("general.architecture", STRING, arch), kv("general.file_type", U32, 32)]
    out += [kv(f"{arch}.{key}", U32, n) for key, n in numbers.items()]
    out += [kv(f"{arch}.{key}", F32, x) for key, x in FLOATS.items()]
    out += [
        kv(f"{arch}.{key}", BOOL, True) for key in ("expert_weights_norm", "attention.causal", "use_parallel_residual")
    ]
    out.append(kv_array(f"{arch}.rope.dimension_sections", U32, [16, 16, 16, 16]))
    if arch in AS_LIST:
        out.append(kv_array(f"{arch}.attention.sliding_window_pattern", BOOL, [i % 2 == 0 for i in range(n_layers)]))
    out += [kv_array(f"xielu.{x}", F32, [1.0] * n_layers) for x in ("alpha_n", "alpha_p", "beta", "eps")]
    return out


def tensors(names: list[str], n_layers: int, n_experts: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, ne shape, type) of each tensor; no 256-block divides the rows of `attn_k_b`."""
    seen = set()
    for name in names:
        for i in range(n_layers if "{bid}" in name else 1):
            full = name.format(bid=i) + ".weight"
            if full in seen:
                continue
            seen.add(full)
            if "norm" in name:
                yield full, (512,), "F32"
            elif "_exps" in name:
                yield full, (512, 16, n_experts), "BF16"
            else:
                shape = (384, 8, 2) if name.endswith("_k_b") else (512, 32)
                yield full, shape, "F32" if "gate_inp" in name else "BF16"


def write(path: Path, arch: str, names: list[str], n_layers: int, n_experts: int = 16, whole: bool = False) -> Path:
    """Write a GGUF of an arch; its data are random weights if `whole`, else a hole."""
    has_experts = any("_exps" in name for name in names)
    infos, at, rng = [], 0, np.random.default_rng(7)
    blobs = []
    for name, shape, type_ in tensors(names, n_layers, n_experts):
        infos.append((name, shape, type_, at))
        nbytes = QTYPES[type_].row_bytes(shape[0]) * prod(shape[1:])
        if whole:
            values = rng.standard_normal(prod(shape)).astype(np.float32)
            raw = values.tobytes() if type_ == "F32" else (values.view(np.uint32) >> 16).astype("<u2").tobytes()
            blobs.append(raw.ljust(pad(nbytes), b"\0"))
        at += pad(nbytes)
    header = header_bytes(keys(arch, n_layers, n_experts if has_experts else 0), infos)
    with open(path, "wb") as f:
        f.write(header + b"".join(blobs))
        f.truncate(len(header) + at)
    return path


#: archs whose rules depend on layers, on kinds of tensors, or on the arch itself
MIXTURES = [
    ("Q4_K_M", False), ("Q4_K_S", True), ("Q3_K_M", True), ("Q3_K_L", False), ("Q2_K", False), ("IQ3_XS", True),
    ("IQ2_M", True), ("MXFP4_MOE", False),
]  # fmt: skip


@pytest.mark.parametrize(("mixture", "with_imatrix"), MIXTURES)
def test_mixtures_of_every_arch(tools: Tools, tmp_path: Path, mixture: str, with_imatrix: bool) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    demo.make_imatrix(imatrix, {"blk.0.some.weight": (32,)})
    compared = []
    for arch, names in archs().items():
        file = write(tmp_path / "m.gguf", arch, names, n_layers=16)
        theirs = dry_run(tools, file, mixture, imatrix if with_imatrix else None)
        assert theirs, arch
        assert our_types(open_model(str(file)), mixture, with_imatrix) == theirs, arch
        compared.append(arch)
    assert len(compared) == 144
    assert {"qwen3moe", "gemma3", "phi3", "glm4moe", "gpt-oss", "falcon", "mamba", "t5", "bert"} <= set(compared)


@pytest.mark.parametrize("arch", ["falcon", "glm5-next", "bailingmoe3", "gpt-oss", "glm4", "qwen3", "phi3"])
def test_every_mixture_of_some_archs(tools: Tools, tmp_path: Path, arch: str) -> None:
    """glm5-next, bailingmoe3 and falcon are named in llama-quantize's rules."""
    file = write(tmp_path / "m.gguf", arch, archs()[arch], n_layers=16)
    model = open_model(str(file))
    for mixture in BASE_TYPES:
        assert our_types(model, mixture, False) == dry_run(tools, file, mixture, None), mixture


@pytest.mark.parametrize("arch", ["qwen3moe", "dbrx", "grok"])
def test_eight_experts_of_other_archs(tools: Tools, tmp_path: Path, arch: str) -> None:
    file = write(tmp_path / "m.gguf", arch, archs()[arch], n_layers=16, n_experts=8)
    model = open_model(str(file))
    for mixture in ("Q4_K_M", "Q2_K", "IQ3_M", "IQ2_M"):
        assert our_types(model, mixture, False) == dry_run(tools, file, mixture, None), mixture


@pytest.mark.parametrize(("arch", "n_layers"), [("deci", 80), ("olmo", 80), ("jais2", 68), ("qwen3", 80)])
def test_the_70b_rule_of_other_archs(tools: Tools, tmp_path: Path, arch: str, n_layers: int) -> None:
    file = write(tmp_path / "m.gguf", arch, archs()[arch], n_layers)
    model = open_model(str(file))
    ours = our_types(model, "Q2_K", False)
    assert ours == dry_run(tools, file, "Q2_K", None)
    value = "blk.9.attn_qkv.weight" if "blk.9.attn_v.weight" not in ours else "blk.9.attn_v.weight"
    assert ours[value] == ("Q4_K" if arch == "qwen3" else "Q5_K")


#: llama-imatrix has no entries for these, and llama-quantize quantizes them without
EXCUSED = ("token_embd.weight", "output.weight")
WHOLE = [
    ("qwen3", "Q4_K_M", False), ("qwen3moe", "Q3_K_M", False), ("gemma3", "Q5_K_M", False), ("phi3", "Q2_K", False),
    ("glm4", "IQ4_XS", False), ("glm4moe", "Q6_K", False), ("gpt-oss", "MXFP4_MOE", False), ("falcon", "Q3_K_L", False),
    ("mamba", "Q4_0", False), ("deepseek", "IQ3_M", True), ("llama4", "IQ2_XS", True), ("command-r", "Q8_0", False),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "mixture", "with_imatrix"), WHOLE)
def test_whole_files_of_other_archs(tools: Tools, tmp_path: Path, arch: str, mixture: str, with_imatrix: bool) -> None:
    """The same bytes as llama-quantize's, from the first to the last."""
    file = write(tmp_path / "m.gguf", arch, archs()[arch], n_layers=2, whole=True)
    model = open_model(str(file))
    imatrix = None
    if with_imatrix:
        imatrix = tmp_path / "imatrix.gguf"
        shapes = {t.name: t.shape for t in model.tensors if t.quantizable and t.name not in EXCUSED}
        demo.make_imatrix(imatrix, shapes, 3)
    theirs = tmp_path / "theirs.gguf"
    command = [str(tools.quantize), *(["--imatrix", str(imatrix)] if imatrix else []), str(file), str(theirs), mixture]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    weights = open_imatrix(str(imatrix)) if imatrix else None
    ready = builds.prepare(make_plan(model, load(mixture), weights), tmp_path / "ours.gguf", weights)
    builds.run(ready, NativeEngine(), 2, lambda _name, _n: None)
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()


def test_a_recipe_of_layers_and_an_arch_with_other_names(tmp_path: Path) -> None:
    """T5 has enc.blk.… and dec.blk.…, which the rules of Q2_K_XS do not name."""
    model = open_model(str(write(tmp_path / "t5.gguf", "t5", archs()["t5"], n_layers=1)))
    with pytest.raises(RecipeError) as e:
        make_plan(model, load("Q2_K_XS"))
    assert str(e.value).startswith("Q2_K_XS.yaml:")

"""The families llama and qwen2, and Kimi-K2's shape of deepseek2: against the real converter and llama-quantize by
bytes; then what they refuse, whole sentences asserted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import factory
import numpy as np
import pytest
from conftest import Tools
from factory import TINY_LLAMA, TINY_QWEN2, TINY_V3, dense_checkpoint, dense_tensors, edit_json
from test_differential import data, fields, llama_quantize

from quantkit import arch
from quantkit import build as builds
from quantkit.arch.options import Options
from quantkit.catalogue import Catalogue, Part, SourceTensor
from quantkit.engines import Engine
from quantkit.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.engines.native import NativeEngine
from quantkit.errors import QuantkitError, SourceError, UnsupportedError, WeightError
from quantkit.gguf_format import decode
from quantkit.imatrix import open_imatrix
from quantkit.models import open_model
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, parse

NAMED = Options(pre="llama-bpe")
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "attention_factor": 1.25,
    "beta_fast": 32,
    "beta_slow": 1,
}
#: the shape of Kimi-K2: the name makes transformers leave config.json alone, one group, one dense layer, no MTP
TINY_KIMI: dict[str, Any] = {
    **TINY_V3,
    "model_type": "kimi_k2",
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 8,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**TINY_V3["rope_scaling"], "beta_fast": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "llama-tied": {**TINY_LLAMA, "tie_word_embeddings": True, "rope_theta": 10000.0},
    # deepseek-coder's scaling; heads narrower than the model is wide
    "llama-linear": {**TINY_LLAMA, "head_dim": 32, "rope_scaling": LINEAR},
    "qwen2": TINY_QWEN2,
    "qwen2-yarn": {**TINY_QWEN2, "head_dim": 32, "rope_scaling": YARN, "tie_word_embeddings": False},
    "kimi-k2": TINY_KIMI,
}


class Converted(NamedTuple):
    checkpoint: Path
    bf16: Path
    """what the real converter makes of it"""


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest, tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    config, folder = MODELS[request.param], tmp_path_factory.mktemp(request.param)
    if config is TINY_KIMI:
        model = factory.checkpoint(folder / "Tiny-K2", config)
    else:
        model = dense_checkpoint(folder / "Tiny-Model-Chat", config, ("bfloat16", "float16", "float32"))
    if request.param == "llama-tied":
        edit_json(model / "tokenizer_config.json", lambda c: c.update(add_prefix_space=False))
    return Converted(model, tools.convert(model, folder / "bf16.gguf", NAMED.pre))


def uniform(type_: str, file_type: str) -> Recipe:
    head = f"name: all\narch: [llama, qwen2, deepseek2]\nfile_type: {file_type}\n"
    return parse(f'{head}rules:\n  - {{match: "*", type: {type_}, why: t}}\n', "all.yaml")


def mixture(name: str) -> Recipe:
    head = f"name: mix\narch: [llama, qwen2, deepseek2]\nfile_type: {name}\n"
    return parse(f"{head}otherwise: mixture {name}\nrules: []\n", "mix.yaml")


def build(source: Path, out: Path, recipe: Recipe, engine: Engine | None = None, imatrix: Path | None = None) -> Path:
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    plan = make_plan(open_model(str(source), NAMED), recipe, weights)
    builds.run(builds.prepare(plan, out, weights), engine or NativeEngine(), 2, lambda _name, _n: None)
    return out


@pytest.mark.tools
def test_bf16_equals_the_converter(converted: Converted, tmp_path: Path) -> None:
    out = build(converted.checkpoint, tmp_path / "ours.gguf", uniform("BF16", "BF16"))
    assert data(out) == data(converted.bf16)
    theirs = fields(converted.bf16)
    assert fields(out) == theirs
    assert [item.key for item in open_model(str(converted.checkpoint), NAMED).kvs] == list(theirs)


@pytest.mark.tools
def test_whole_files_equal_llama_quantize(tools: Tools, converted: Converted, tmp_path: Path) -> None:
    stock = llama_quantize(tools, converted.bf16, tmp_path / "stock.gguf", "", "Q4_K_M").read_bytes()
    for engine in (NativeEngine(), NativeEngine(3000), LlamaQuantizeEngine(tools.quantize)):
        out = tmp_path / "ours.gguf"
        assert build(converted.checkpoint, out, mixture("Q4_K_M"), engine).read_bytes() == stock
        out.unlink()


@pytest.mark.tools
def test_with_an_imatrix(tools: Tools, converted: Converted, tmp_path: Path) -> None:
    imatrix = factory.imatrix_for(open_model(str(converted.checkpoint), NAMED), tmp_path / "imatrix.gguf")
    stock = llama_quantize(tools, converted.bf16, tmp_path / "stock.gguf", "", "Q2_K", imatrix).read_bytes()
    out = tmp_path / "ours.gguf"
    assert build(converted.checkpoint, out, mixture("Q2_K"), imatrix=imatrix).read_bytes() == stock

"""The pass against llama.cpp itself: logits that llama-perplexity saves of the same file and text.

Three things part the two: llama.cpp rounds the inputs of products to the type of the weights (BF16; eight bits for
quantized ones), keeps keys and values as F16, and saves logits in 16 bits. Where a test takes the first two away, by a
file of F32 and the options `EXACT`, what is left is the third.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factory
import pytest
import small_builds
from conftest import Tools
from passing import EXACT, Saved, logits_of, model_of, perplexity
from smollm2 import smollm2
from test_families import LLAMA, LLAMA3, QWEN2, V2, V3, yarn

from quantkit.model.families.options import Options
from quantkit.text import chunks

pytestmark = pytest.mark.tools

#: llama.cpp takes a model without q_lora for one only if it has as many layers
V2_LITE = V2 | {"rope_scaling": yarn(40, 0.707), "num_hidden_layers": 27}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"rope_scaling": LLAMA3},
    "qwen2": QWEN2 | {"rope_scaling": yarn(4.0)},
    "v2-lite": V2_LITE,
    "v3": V3 | {"rope_scaling": yarn(40, 1.0)},
    # transformers differ from llama.cpp in these two, and quantkit follows llama.cpp. V2 chooses groups by their best
    # expert, llama.cpp by the sum of the two best
    "v2-groups": V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": 32},
    # without mscale_all_dim llama.cpp lets the magnitude of YaRN count for the part of keys that is not turned, too
    "v3-no-mscale": V3 | {"rope_scaling": yarn(40)},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand words that a model of the demo's tokenizer and SmolLM2 know."""
    words = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words[:6000], "utf-8")
    return path


def f32_of(source: Path, out: Path) -> Path:
    """A model as a GGUF whose tensors are all F32."""
    options = Options() if source.suffix == ".gguf" else small_builds.OPTIONS
    plan = small_builds.plan_of(source, small_builds.uniform("F32", "F32"), None, options)
    return small_builds.build(plan, out, allow_requantize=True)


def ours(path: Path, text: Path, saved: Saved) -> Any:
    """Our logits of what llama-perplexity saved."""
    model = model_of(path)
    cut = chunks(model.catalogue, [text], saved.tokens.shape[1], len(saved.tokens))
    assert (cut.text_tokens == saved.tokens).all()
    return logits_of(model, cut.tokens, first=saved.first)


@pytest.mark.parametrize("name", MODELS)
def test_in_full_precision(name: str, tools: Tools, text: Path, tmp_path: Path) -> None:
    config = MODELS[name]
    make = factory.checkpoint if config["model_type"].startswith("deepseek") else factory.dense_checkpoint
    file = f32_of(make(tmp_path / name, config), tmp_path / "f32.gguf")
    saved = perplexity(tools.perplexity, file, text, tmp_path / "logits", 64, *EXACT)
    found = saved.compared(ours(file, text, saved))
    assert abs(found.kld) < 1e-6
    assert found.same_top > 0.998
    assert found.ppl == pytest.approx(found.ppl_theirs, rel=1e-5)


def test_a_bf16_file_as_llama_perplexity_runs_it(tools: Tools, text: Path, tmp_path: Path) -> None:
    """Every expert is chosen: where the choice is near, as it often is with random weights, rounding makes it another.
    Random weights also have no favourite token; benchmarks/forward.py asserts 99.5 % of trained ones."""
    every = factory.TINY_V3 | {"num_experts_per_tok": factory.TINY_V3["n_routed_experts"]}
    folder = factory.checkpoint(tmp_path / "Tiny", every)
    plan = small_builds.plan_of(folder, small_builds.uniform("BF16", "BF16"), None)
    file = small_builds.build(plan, tmp_path / "bf16.gguf")
    saved = perplexity(tools.perplexity, file, text, tmp_path / "logits", 64)
    found = saved.compared(ours(file, text, saved))
    assert 0 < found.kld < 1e-4
    assert found.same_top > 0.975
    assert found.ppl == pytest.approx(found.ppl_theirs, rel=1e-3)


def test_smollm2(tools: Tools, text: Path, tmp_path: Path) -> None:
    """A real model, of Q4_1. What is left when the weights are F32 shows that the rest of the difference is llama.cpp's
    rounding of activations."""
    quantized = smollm2()
    plain = f32_of(quantized, tmp_path / "f32.gguf")
    saved = perplexity(tools.perplexity, quantized, text, tmp_path / "logits", 128, "--chunks", "2")
    logits = ours(quantized, text, saved)
    rounded = saved.compared(logits)
    assert 1e-3 < rounded.kld < 1e-2
    assert rounded.same_top > 0.9
    exact = perplexity(tools.perplexity, plain, text, tmp_path / "exact", 128, "--chunks", "2", *EXACT).compared(logits)
    assert abs(exact.kld) < 5e-6
    assert exact.same_top > 0.99
    assert exact.ppl == pytest.approx(exact.ppl_theirs, rel=1e-4)

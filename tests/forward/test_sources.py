"""The same model from whatever stores it, and variants of it that no file has: logits that are alike to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factory
import pytest
import small_builds
import torch
from dequantizing import dequant
from passing import difference, logits_of, model_of, random_tokens

from quantkit.base.errors import KernelError, SourceError, UnsupportedError
from quantkit.forward.model import Model, Quantized
from quantkit.forward.stream import Options
from quantkit.imatrix.matrix import open_imatrix
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options as ModelOptions
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan

TOKENS = random_tokens(384)


@pytest.fixture(scope="module")
def reference(tiny_v3: Path) -> torch.Tensor:
    """Logits of the FP8 checkpoint."""
    return logits_of(model_of(tiny_v3), TOKENS)


def types_of(plan: Plan) -> dict[str, str]:
    return {p.tensor.name: p.type for p in plan.tensors if p.tensor.quantizable}


def test_fp8_and_what_is_dequantized_from_it(tiny_v3: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    assert torch.equal(logits_of(model_of(dequant(tiny_v3, tmp_path / "bf16")), TOKENS), reference)


@pytest.mark.parametrize("type_", ["BF16", "F32"])
def test_a_gguf_of_floats(type_: str, tiny_v3: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    plan = small_builds.plan_of(tiny_v3, small_builds.uniform(type_, type_), None)
    made = small_builds.build(plan, tmp_path / f"{type_}.gguf")
    assert torch.equal(logits_of(model_of(made), TOKENS), reference)


def test_a_gguf_of_f16(tiny_v3: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    plan = small_builds.plan_of(tiny_v3, small_builds.uniform("F16", "F16"), None)
    made = small_builds.build(plan, tmp_path / "f16.gguf")
    ours = logits_of(model_of(made), TOKENS)
    assert torch.equal(ours, logits_of(model_of(tiny_v3).variant("f16", Quantized(types_of(plan))), TOKENS))
    # BF16 has fewer bits than F16, so only the smallest weights differ
    assert 0 < difference(ours, reference) < 1e-4


def test_a_quantized_gguf_is_its_variant(
    sound: Path, sound_plan: Plan, tiny_v3: Path, tiny_imatrix: Path, reference: torch.Tensor
) -> None:
    types = types_of(sound_plan)
    assert len(set(types.values())) > 6
    importance = open_imatrix(str(tiny_imatrix))
    variant = model_of(tiny_v3).variant("mix", Quantized(types, importance, "imatrix"))
    of_file = logits_of(model_of(sound), TOKENS)
    assert torch.equal(logits_of(variant, TOKENS), of_file)
    assert difference(of_file, reference) > 0.05


def test_a_type_that_needs_an_importance(sound_plan: Plan, tiny_v3: Path) -> None:
    with pytest.raises(KernelError) as caught:
        logits_of(model_of(tiny_v3).variant("mix", Quantized(types_of(sound_plan))), TOKENS)
    assert str(caught.value) == (
        "'blk.1.ffn_down_exps.weight': IQ2_XXS cannot be quantized without an importance matrix"
    )


def test_a_set_of_shards(sound: Path, sound_set: Path) -> None:
    first = min(sound_set.glob("*.gguf"))
    assert torch.equal(logits_of(model_of(first), TOKENS), logits_of(model_of(sound), TOKENS))


def test_both_layouts(tiny_v3: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    """attn_kv_b in a file, as those of early 2025 have it."""
    options = ModelOptions(pre="deepseek-v3", layout="kv_b")
    made = {}
    for type_ in ("BF16", "Q8_0"):
        plan = small_builds.plan_of(tiny_v3, small_builds.uniform(type_, type_), None, options)
        made[type_] = logits_of(model_of(small_builds.build(plan, tmp_path / f"{type_}.gguf")), TOKENS)
    assert 0 < difference(made["BF16"], reference) < 5e-6
    variant = model_of(tiny_v3, "kv_b").variant("eight bits", Quantized(types_of(plan)))
    assert torch.equal(logits_of(variant, TOKENS), made["Q8_0"])


@pytest.mark.parametrize("dtypes", [("float16",), ("float32", "bfloat16"), ("bfloat16", "float16", "float32")])
def test_checkpoints_of_other_floats(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    """Values of weights go through BF16 as in a converter's file; norms and biases stay as they are."""
    folder = factory.dense_checkpoint(tmp_path / "model", factory.SMALL_QWEN2, dtypes)
    plan = small_builds.plan_of(folder, small_builds.uniform("BF16", "BF16"), None, small_builds.NAMED)
    made = small_builds.build(plan, tmp_path / "bf16.gguf")
    assert torch.equal(logits_of(model_of(folder), TOKENS), logits_of(model_of(made), TOKENS))


def test_bf16_products_are_near(tiny_v3: Path, reference: torch.Tensor) -> None:
    rounded = logits_of(model_of(tiny_v3), TOKENS, Options(n_threads=1, dtype="bf16"))
    ours, theirs = (torch.log_softmax(x.double(), -1) for x in (rounded, reference))
    kld = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert 0 < kld < 5e-3


def test_a_config_has_no_weights() -> None:
    with pytest.raises(SourceError) as caught:
        Model(open_model("deepseek-r1"))
    assert str(caught.value) == ("deepseek-r1: there are no weights here, only a config; give the checkpoint or a GGUF")


def test_types_that_cannot_be_computed(tiny_v3: Path, sound: Path, tmp_path: Path) -> None:
    """One of a fork: named, not computed as something else."""
    catalogue = open_model(str(sound))
    tensors = tuple(t._replace(source_type="IQ4_K") if "attn_output" in t.name else t for t in catalogue.tensors)
    fields: dict[str, Any] = {**vars(catalogue), "tensors": tensors, "model": "m"}
    with pytest.raises(UnsupportedError) as caught:
        Model(Catalogue(**fields))
    assert str(caught.value) == "m: tensors of the types IQ4_K cannot be computed"

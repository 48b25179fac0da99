"""Models that cannot be computed, and tokens that are none of theirs: one sentence each, before anything is read."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
import small_builds
from passing import ONE_THREAD, logits_of, model_of, random_tokens

from quantkit.base.errors import KernelError, QuantkitError, SourceError, UnsupportedError, WeightError
from quantkit.forward import model
from quantkit.forward.model import Model
from quantkit.forward.stream import Options, Pass
from quantkit.gguf.header import BOOL, F32, KV, STRING, U32, kv, kv_array
from quantkit.model.catalogue import Catalogue
from quantkit.model.open import open_model

TOKENS = random_tokens(384, 2, 8)


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = factory.checkpoint(tmp_path_factory.mktemp("v3") / "V3", factory.SMALL_V3)
    return open_model(str(folder), small_builds.OPTIONS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = factory.dense_checkpoint(tmp_path_factory.mktemp("llama") / "Llama", factory.SMALL_LLAMA)
    return open_model(str(folder), small_builds.NAMED)


def changed(catalogue: Catalogue, *items: KV, without: str = "", **fields: Any) -> Catalogue:
    """With other metadata, or without the keys that end so."""
    gone = {item.key for item in items}
    kept = [k for k in catalogue.kvs if k.key not in gone and not (without and k.key.endswith(without))]
    return Catalogue(**{**vars(catalogue), "model": "m", "kvs": (*kept, *items), **fields})


def sentence(error: type[QuantkitError], make: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error
    return str(caught.value)


NO_SHAPE = "follows from the metadata; the file is not sound"
U = "deepseek2."
BAD_V3: dict[str, tuple[KV, str]] = {
    "no heads": (kv(U + "attention.head_count", U32, 0), "deepseek2.attention.head_count is 0; it must be at least 1"),
    "more heads": (
        kv(U + "attention.head_count", U32, 3),
        "'blk.0.attn_q_b.weight' has the shape 32 x 128, but 32 x 192 " + NO_SHAPE,
    ),
    "heads are text": (
        kv(U + "attention.head_count", STRING, "two"),
        "deepseek2.attention.head_count is 'two', which is not what this key holds",
    ),
    "heads are a flag": (
        kv(U + "attention.head_count", BOOL, True),
        "deepseek2.attention.head_count is True, which is not what this key holds",
    ),
    "heads differ": (
        kv_array(U + "attention.head_count", U32, [2, 4]),
        "deepseek2.attention.head_count is [2, 4], which is not what this key holds",
    ),
    "layers without end": (
        kv(U + "block_count", U32, 4_000_000_000),
        "deepseek2.block_count is 4,000,000,000 and nextn_predict_layers 0, but there are 34 tensors; that is no model",
    ),
    "only layers of prediction": (
        kv(U + "nextn_predict_layers", U32, 2),
        "deepseek2.block_count is 2 and nextn_predict_layers 2, but there are 34 tensors; that is no model",
    ),
    "more layers": (
        kv(U + "block_count", U32, 3),
        "the tensors blk.2.attn_k_b.weight, blk.2.attn_kv_a_mqa.weight, blk.2.attn_kv_a_norm.weight and 11 more are "
        "missing; computing the model needs them",
    ),
    "no number": (
        kv(U + "attention.layer_norm_rms_epsilon", F32, float("nan")),
        "deepseek2.attention.layer_norm_rms_epsilon is nan; it must be finite and above 0",
    ),
    "no base": (kv(U + "rope.freq_base", F32, 0.0), "deepseek2.rope.freq_base is 0; it must be finite and above 1"),
    "a negative factor": (
        kv(U + "rope.scaling.factor", F32, -1.0),
        "deepseek2.rope.scaling.factor is -1; it must be at least 0",
    ),
    "a wide rope": (kv(U + "rope.dimension_count", U32, 4096), "keys of 64 values cannot have 4096 rotated ones"),
    "an odd rope": (kv(U + "rope.dimension_count", U32, 31), "31 values of a head are rotated; they must be pairs"),
    "more experts used": (
        kv(U + "expert_used_count", U32, 9),
        "9 of 4 experts in 1 of 1 groups cannot be chosen for a token",
    ),
    "groups that do not divide": (
        kv(U + "expert_group_count", U32, 3),
        "2 of 4 experts in 1 of 3 groups cannot be chosen for a token",
    ),
    "groups too small": (
        kv(U + "expert_group_count", U32, 4),
        "2 of 4 experts in 1 of 4 groups cannot be chosen for a token",
    ),
}


@pytest.mark.parametrize("name", BAD_V3)
def test_numbers_that_make_no_model(name: str, v3: Catalogue) -> None:
    item, says = BAD_V3[name]
    assert sentence(SourceError, lambda: Model(changed(v3, item))) == f"m: {says}"


def test_a_number_that_is_missing(v3: Catalogue) -> None:
    assert sentence(SourceError, lambda: Model(changed(v3, without="kv_lora_rank"))) == (
        "m: the metadata has no deepseek2.attention.kv_lora_rank, which computing the model needs"
    )


UNSUPPORTED_V3: dict[str, tuple[KV, str]] = {
    "gating": (kv(U + "expert_gating_func", U32, 4), "expert_gating_func 4 cannot be computed; 1 and 2 can"),
    "rope": (
        kv(U + "rope.scaling.type", STRING, "longrope"),
        "rope scaling 'longrope' is not computed; there are none, linear, yarn",
    ),
    "temperature": (
        kv(U + "attention.temperature_scale", F32, 0.1),
        "attention.temperature_scale (of Mistral Large) cannot be computed",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED_V3)
def test_what_is_not_computed(name: str, v3: Catalogue) -> None:
    item, says = UNSUPPORTED_V3[name]
    assert sentence(UnsupportedError, lambda: Model(changed(v3, item))) == f"m: {says}"


def test_an_unknown_arch(v3: Catalogue) -> None:
    assert sentence(UnsupportedError, lambda: Model(changed(v3, arch="gemma4"))) == (
        "m: models of the arch 'gemma4' cannot be computed; there are deepseek2, llama, qwen2"
    )


def test_missing_tensors(v3: Catalogue, llama: Catalogue) -> None:
    for catalogue, name in (
        (v3, "token_embd.weight"), (v3, "blk.1.ffn_gate_inp.weight"), (llama, "output_norm.weight"),
        (llama, "token_embd.weight"), (llama, "blk.0.attn_q.weight"),
    ):  # fmt: skip
        less = changed(catalogue, tensors=tuple(t for t in catalogue.tensors if t.name != name))
        assert sentence(SourceError, partial(Model, less)) == (
            f"m: the tensor {name} is missing; computing the model needs them"
        )


def test_other_shapes_of_llama(llama: Catalogue) -> None:
    assert sentence(SourceError, lambda: Model(changed(llama, kv("llama.feed_forward_length", U32, 65)))) == (
        f"m: 'blk.0.ffn_gate.weight' has the shape 64 x 64, but 64 x 65 {NO_SHAPE}"
    )
    assert sentence(UnsupportedError, lambda: Model(changed(llama, kv("llama.attention.head_count", U32, 3)))) == (
        "m: 3 heads on 2 with keys of 16 values, of which 16 are rotated, and values of 16 cannot be computed"
    )
    assert sentence(UnsupportedError, lambda: Model(changed(llama, kv("llama.expert_count", U32, 8)))) == (
        "m: arch 'llama' with experts cannot be computed"
    )
    bias = llama.tensors[-1]._replace(name="blk.0.attn_output.bias", shape=(64,))
    assert sentence(UnsupportedError, lambda: Model(changed(llama, tensors=(*llama.tensors, bias)))) == (
        "m: 'blk.0.attn_output.bias': a bias there cannot be computed"
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_number_anywhere(seed: int, v3: Catalogue, llama: Catalogue) -> None:
    """A key of the metadata is something else: the model is computed, or there is a sentence."""
    rng = np.random.default_rng(seed)
    catalogue = (v3, llama)[seed % 2]
    keys = [k for k in catalogue.kvs if k.key.startswith(catalogue.arch)]
    key = keys[int(rng.integers(len(keys)))].key
    makers: list[Callable[[], KV]] = [
        lambda: kv(key, U32, int(rng.choice([0, 1, 2, 7, 2**31, 2**32 - 1]))),
        lambda: kv(key, F32, float(rng.choice([0, -1, 1e-30, 1e30, np.inf, np.nan]))),
        lambda: kv(key, STRING, "x"),
        lambda: kv_array(key, U32, []),
        lambda: kv_array(key, STRING, ["a", "a"]),
        lambda: KV(key, BOOL, b"\1"),
    ]
    said = []
    for make in makers:
        try:
            logits_of(Model(changed(catalogue, make())), TOKENS)
        except QuantkitError as e:
            said.append(str(e))
    assert all(line.startswith("m: ") and len(line) > 20 for line in said)


# ------------------------------------------------------------ what is given with the model


def test_tokens_of_another_model(v3: Catalogue) -> None:
    model = Model(changed(v3))
    for tokens, which in ((TOKENS + 380, "7"), (TOKENS - 1000, "-")):
        said = sentence(SourceError, partial(Pass, [model], tokens))
        assert re.fullmatch(
            rf"m: token {which}?[\d,-]+ is not one of its 384; was the text tokenized with another model's "
            r"tokenizer\?",
            said,
        )


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (np.zeros((0, 4), np.int32), r"int32 [0, 4]"),
        (np.zeros((4, 0), np.int64), r"int64 [4, 0]"),
        (np.zeros(4, np.int32), r"int32 [4]"),
        (np.zeros((2, 2), np.float32), r"float32 [2, 2]"),
    ],
)
def test_no_tokens(tokens: Any, shown: str, v3: Catalogue) -> None:
    assert sentence(SourceError, lambda: Pass([Model(v3)], tokens)) == (
        f"tokens must be integers [n_chunks, n_ctx], not {shown}"
    )


def test_models_that_are_not_the_same(v3: Catalogue, llama: Catalogue) -> None:
    models = [Model(changed(v3), "a"), Model(changed(llama), "b")]
    assert sentence(SourceError, lambda: Pass(models, TOKENS)) == (
        "b: has 1 layers, 64 values a token and 384 tokens, but a has 2, 64 and 384; they are not the same model"
    )
    assert sentence(SourceError, lambda: Pass([], TOKENS)) == "there is no model to compute"


def test_a_device_that_is_not_here(v3: Catalogue) -> None:
    import torch

    if not torch.cuda.is_available():
        lacks = "is built for CUDA" if torch.version.cuda else "has no CUDA"
        said = sentence(KernelError, lambda: Pass([Model(v3)], TOKENS, Options(device="cuda")))
        assert said.startswith(f"torch {torch.__version__} {lacks}")
        assert said.endswith("; leave out --device cuda")
    said = sentence(KernelError, lambda: Pass([Model(v3)], TOKENS, Options(device="abacus")))
    assert said == "device 'abacus' is not one that models are computed on: cpu, cuda, cuda:1, …"
    said = sentence(KernelError, lambda: Pass([Model(v3)], TOKENS, Options(dtype="f8")))
    assert said == "dtype 'f8' is not one that models are computed in: f32, bf16"


@pytest.mark.parametrize("at_once", [None, 300])
def test_weights_that_are_nan(at_once: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if at_once is not None:  # a row at a time
        monkeypatch.setattr(model, "_SLAB_BYTES", at_once)
    folder = factory.checkpoint(tmp_path / "V3", factory.SMALL_V3)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    factory.poke(folder, name, 2 * (3 * 32 + 5), struct.pack("<H", 0x7FC0))
    shard = factory.shard_of(folder, name).name
    # where no token chooses the expert, nobody reads the weight
    assert sentence(WeightError, lambda: logits_of(model_of(folder), random_tokens(384, 2, 64), ONE_THREAD)) == (
        f"'blk.1.ffn_down_exps.weight' (from {shard}: '{name}'), row 3, column 5 is nan; llama-quantize refuses such "
        "weights too: the checkpoint is damaged, download that shard again"
    )


def test_weights_without_bounds(tmp_path: Path) -> None:
    """Finite, but what they make of the hidden states is not."""
    folder = factory.checkpoint(tmp_path / "V3", factory.SMALL_V3)
    for kind in ("gate", "up", "down"):
        name = f"model.layers.0.mlp.{kind}_proj.weight"
        factory.poke(folder, name, 0, struct.pack("<H", 0x7F00) * (64 * 64))
    assert sentence(WeightError, lambda: logits_of(model_of(folder), TOKENS)) == (
        "V3: layer 0 gives values that are NaN or Inf; are its weights damaged?"
    )

"""llama.cpp's own mixtures, against llama-quantize --dry-run on header-only files of real model shapes."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
from conftest import Tools
from mixture_choices import dry_run, our_types

from quantkit.base.errors import RecipeError
from quantkit.gguf.header import F32, STRING, U32, header_bytes, kv, pad
from quantkit.gguf.types import FILE_TYPES, QTYPES
from quantkit.imatrix.matrix import open_imatrix
from quantkit.model import demo, families
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.known import config as known_config
from quantkit.model.families.options import Options
from quantkit.model.open import from_gguf, open_model
from quantkit.model.sources.gguf_file import open_gguf
from quantkit.planning.mixtures import BASE_TYPES, facts, mixture_types
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load, parse

MODELS = [("deepseek-r1", "k_b+v_b"), ("deepseek-r1", "kv_b"), ("deepseek-v2-lite", "k_b+v_b"), ("deepseek-v2", "kv_b")]
#: grouped heads, the 70B rule, rows that no 256-block divides
DENSE = [f"deepseek-r1-distill-{size}" for size in ("llama-8b", "llama-70b", "qwen-7b", "qwen-1.5b")]
#: without output.weight, and with rows of 896 values
QWEN_05B = known_config("deepseek-r1-distill-qwen-1.5b") | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "tie_word_embeddings": True,
}
#: 80 layers without grouped heads: the 70B rule must not apply
LLAMA_65B = known_config("deepseek-r1-distill-llama-70b") | {"num_key_value_heads": 64}


def header_only(c: Catalogue, path: Path) -> Path:
    """The model's BF16 GGUF with a hole for its data: terabytes nominally, kilobytes on disk."""
    infos, at = [], 0
    for t in c.tensors:
        infos.append((t.name, t.shape, t.source_type, at))
        at += pad(QTYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows)
    header = header_bytes(c.kvs, infos)
    with open(path, "wb") as f:
        f.write(header)
        f.truncate(len(header) + at)
    return path


def mixtral(path: Path) -> Catalogue:
    """Mixtral 8x7B's shape, for which the rules for eight experts were made."""
    n_layers, n_kv_heads = 32, 8
    numbers = {
        "block_count": n_layers,
        "context_length": 32768,
        "embedding_length": 4096,
        "feed_forward_length": 14336,
        "attention.head_count": 32,
        "attention.head_count_kv": n_kv_heads,
        "expert_count": 8,
        "expert_used_count": 2,
        "rope.dimension_count": 128,
        "vocab_size": 32000,
    }
    kvs = [kv("general.architecture", STRING, "llama"), *(kv(f"llama.{k}", U32, n) for k, n in numbers.items())]
    kvs += [kv("llama.attention.layer_norm_rms_epsilon", F32, 1e-5), kv("general.file_type", U32, 32)]
    shapes = {"token_embd": (4096, 32000), "output": (4096, 32000), "output_norm": (4096,)}
    layer = {
        "attn_q": (4096, 4096), "attn_k": (4096, 128 * n_kv_heads), "attn_v": (4096, 128 * n_kv_heads),
        "attn_output": (4096, 4096), "attn_norm": (4096,), "ffn_norm": (4096,), "ffn_gate_inp": (4096, 8),
        "ffn_gate_exps": (4096, 14336, 8), "ffn_up_exps": (4096, 14336, 8), "ffn_down_exps": (14336, 4096, 8),
    }  # fmt: skip
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    infos, at = [], 0
    for name, shape in shapes.items():
        type_ = "BF16" if len(shape) > 1 and "gate_inp" not in name else "F32"
        infos.append((f"{name}.weight", shape, type_, at))
        at += pad(QTYPES[type_].row_bytes(shape[0]) * prod(shape[1:]))
    header = header_bytes(kvs, infos)
    with open(path, "wb") as f:
        f.write(header)
        f.truncate(len(header) + at)
    return from_gguf(open_gguf(path))


def compare(tools: Tools, c: Catalogue, file: Path) -> None:
    """Compare every mixture, with and without an importance matrix."""
    imatrix = file.with_name("imatrix.gguf")
    demo.make_imatrix(imatrix, {"blk.0.some.weight": (32,)})
    for file_type in BASE_TYPES:
        for given in (None, imatrix):
            theirs = dry_run(tools, file, file_type, given)
            assert len(theirs) == len(c.tensors)
            assert our_types(c, file_type, given is not None) == theirs, (file_type, given)


@pytest.mark.tools
@pytest.mark.parametrize(("model", "layout"), MODELS)
def test_every_mixture_is_llama_quantizes_own(tools: Tools, tmp_path: Path, model: str, layout: str) -> None:
    c = open_model(model, Options(layout))
    compare(tools, c, header_only(c, tmp_path / "model.gguf"))


@pytest.mark.tools
@pytest.mark.parametrize("model", DENSE)
def test_every_mixture_of_dense_models(tools: Tools, tmp_path: Path, model: str) -> None:
    c = open_model(model)
    compare(tools, c, header_only(c, tmp_path / "model.gguf"))


@pytest.mark.tools
@pytest.mark.parametrize("config", [QWEN_05B, LLAMA_65B], ids=["tied", "65B"])
def test_every_mixture_of_other_shapes(tools: Tools, tmp_path: Path, config: dict[str, Any]) -> None:
    c = families.build("m", config, Options())
    compare(tools, c, header_only(c, tmp_path / "model.gguf"))


@pytest.mark.tools
def test_every_mixture_of_eight_experts(tools: Tools, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    compare(tools, mixtral(file), file)


@pytest.mark.tools
@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q5_K", "q4_k", "q4_k_m", "iq2_xxs", "15", "12", "7"])
def test_names_mean_what_they_mean_to_llama_quantize(tools: Tools, tmp_path: Path, name: str) -> None:
    """Its aliases, in any letter case, and the numbers of file types."""
    c = open_model("deepseek-v2-lite")
    imatrix = tmp_path / "imatrix.gguf"
    demo.make_imatrix(imatrix, {"blk.0.some.weight": (32,)})
    theirs = dry_run(tools, header_only(c, tmp_path / "model.gguf"), name, imatrix)
    text = f"name: r\narch: [any]\nfile_type: {name}\notherwise: mixture {name}\n"
    weights = open_imatrix(str(imatrix))
    for recipe in (load(name), parse(text, "r.yaml")):
        assert {t.tensor.name: t.type for t in make_plan(c, recipe, weights).tensors} == theirs
        assert FILE_TYPES[recipe.file_type] == FILE_TYPES[load(name).name]


def test_names_that_are_no_mixtures() -> None:
    for name, says in (
        ("COPY", "'COPY' is not a recipe: llama-quantize's COPY quantizes nothing; copy the file itself"),
        ("999", "no shipped recipe is called '999'; `quantkit recipe list` shows them; "),
        ("Q4_K_X", "no shipped recipe is called 'Q4_K_X' (did you mean Q4_K_S?); "),
    ):
        with pytest.raises(RecipeError) as e:
            load(name)
        assert str(e.value).startswith(says)


def test_every_file_type_is_a_mixture() -> None:
    assert BASE_TYPES.keys() == FILE_TYPES.keys()


#: types from the logs of published files, made from early 2025 to early 2026
PUBLISHED = [
    ("deepseek-r1", "kv_b", "BF16", {"F32": 361, "BF16": 664}),
    ("deepseek-r1", "kv_b", "Q8_0", {"F32": 361, "Q8_0": 664}),
    ("deepseek-r1", "kv_b", "Q4_K_M", {"F32": 361, "Q4_K": 606, "Q6_K": 58}),
    ("deepseek-v3", "kv_b", "Q3_K_M", {"F32": 361, "Q3_K": 483, "Q4_K": 177, "Q5_K": 3, "Q6_K": 1}),
    ("deepseek-r1", "k_b+v_b", "Q4_K_M", {"F32": 361, "Q5_0": 61, "Q4_K": 606, "Q6_K": 58}),
    ("deepseek-v2-lite", "kv_b", "Q4_K_M", {"F32": 108, "Q5_0": 14, "Q8_0": 13, "Q4_K": 229, "Q6_K": 13}),
]


@pytest.mark.parametrize(("model", "layout", "file_type", "types"), PUBLISHED)
def test_published_files_have_the_types_of_2025(model: str, layout: str, file_type: str, types: dict[str, int]) -> None:
    assert Counter(our_types(open_model(model, Options(layout)), file_type, False, "2025").values()) == types


@pytest.mark.parametrize(
    ("model", "file_type", "types", "nbytes"),
    [
        ("llama-8b", "Q4_K_M", {"F32": 66, "Q4_K": 193, "Q6_K": 33}, 4_912_898_304),
        ("qwen-7b", "F16", {"F32": 141, "F16": 198}, 15_231_899_648),
    ],
)
def test_published_distills(model: str, file_type: str, types: dict[str, int], nbytes: int) -> None:
    """Types, and bytes of tensor data."""
    c = open_model(f"deepseek-r1-distill-{model}")
    ours = our_types(c, file_type, False)
    assert Counter(ours.values()) == types
    assert sum(QTYPES[ours[t.name]].row_bytes(t.n_cols) * t.n_rows for t in c.tensors) == nbytes


def test_an_unknown_mixture() -> None:
    c = open_model("deepseek-v2-lite")
    with pytest.raises(RecipeError) as e:
        list(mixture_types("Q4_K_X", c.tensors, facts(c, False)))
    assert str(e.value).startswith("unknown mixture 'Q4_K_X' (did you mean Q4_K_S?); there are F32, F16, BF16, ")


def test_otherwise() -> None:
    """Rules take their tensors, and the mixture treats the rest as if there were no rules."""
    c = open_model("deepseek-r1")
    text = (
        "name: r\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: mixture Q4_K_M\n"
        'rules:\n  - {match: "*_exps.weight", type: Q2_K, why: small}\n'
    )
    plan = make_plan(c, parse(text, "r.yaml"))
    mixture = our_types(c, "Q4_K_M", False)
    for t in plan.tensors:
        assert t.type == ("Q2_K" if "_exps" in t.tensor.name else mixture[t.tensor.name])
    by = {t.tensor.name: t for t in plan.tensors}["output.weight"]
    assert (by.rule, by.why) == ("r.yaml:4 otherwise", "llama-quantize's own choice")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Q4_K", "r.yaml:4 otherwise: 'Q4_K' is not 'mixture NAME', such as mixture Q2_K"),
        ("mixture Q4_KM", "r.yaml:4 otherwise: unknown mixture 'Q4_KM' (did you mean Q4_K_M?)"),
    ],
)
def test_otherwise_that_is_wrong(value: str, message: str) -> None:
    with pytest.raises(RecipeError) as e:
        parse(f"name: r\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: {value}\nrules: []\n", "r.yaml")
    assert str(e.value) == message


#: tensor bytes of published files from early 2025 to early 2026, by recipe; logs and cards round them as noted
PUBLISHED_BYTES = [
    ("deepseek-r1", "kv_b", "BF16", 1_342_267_742_208),
    ("deepseek-r1", "kv_b", "Q8_0", 713_281_210_368),
    ("deepseek-r1", "kv_b", "Q4_K_M", 404_424_884_224),
    ("deepseek-v3", "kv_b", "Q3_K_M", 319_193_092_608),
    ("deepseek-v3", "kv_b", "Q2_K_XS", 221_248_384_000),  # by the card's "207 GB" (GiB, rounded up) and description
    ("deepseek-v3", "kv_b", "Q2_K_L", 244_240_231_424),  # by the card's "228 GB" and description
    ("deepseek-r1", "k_b+v_b", "Q4_K_M", 404_488_847_360),
    ("deepseek-v2-lite", "kv_b", "Q4_K_M", 10_360_420_352),
    ("deepseek-r1-distill-llama-8b", "k_b+v_b", "Q4_K_M", 4_912_898_304),
    ("deepseek-r1-distill-qwen-7b", "k_b+v_b", "F16", 15_231_899_648),
]


@pytest.mark.parametrize(("model", "layout", "recipe", "nbytes"), PUBLISHED_BYTES)
def test_published_files_have_the_bytes_of_2025(model: str, layout: str, recipe: str, nbytes: int) -> None:
    plan = make_plan(open_model(model, Options(layout)), load(recipe), None, "2025")
    assert plan.tensor_bytes == nbytes
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("recipe", "gib"),
    [("Q2_K_XS", 207), ("Q2_K_L", 228), ("Q3_K_M", 298), ("Q4_K_M", 377), ("Q5_K_M", 443), ("Q6_K", 513)],
)
def test_published_cards_round_up_to_gib(recipe: str, gib: int) -> None:
    plan = make_plan(open_model("deepseek-v3", Options("kv_b")), load(recipe), None, "2025")
    assert -(-plan.tensor_bytes // 2**30) == gib


def test_a_pure_set_of_one_type() -> None:
    """Every tensor Q4_K, attn_k_b by its fallback: 377,885,689,856 bytes as a published set of V3.1 sums to."""
    text = 'name: r\narch: [deepseek2]\nfile_type: Q4_K_S\nrules:\n  - {match: "*", type: Q4_K, why: pure}\n'
    plan = make_plan(open_model("deepseek-v3.1"), parse(text, "r.yaml"))
    assert plan.tensor_bytes == 377_885_689_856
    assert plan.types() == {"F32": 361, "Q5_0": 61, "Q4_K": 664}


def test_the_current_rules_differ_where_attn_kv_b_counts_as_a_value() -> None:
    c = open_model("deepseek-r1", Options("kv_b"))
    now, then = (make_plan(c, load("Q4_K_M"), None, version) for version in ("current", "2025"))
    moved = {a.tensor.name.split(".")[2] for a, b in zip(now.tensors, then.tensors, strict=True) if a.type != b.type}
    assert moved == {"attn_kv_b"}
    assert now.tensor_bytes > then.tensor_bytes

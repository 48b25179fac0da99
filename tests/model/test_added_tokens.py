"""Tokens that stand beside tokenizer.json, and their flags: whole files compared with the real converter's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tools
from factory import SMALL_LLAMA as LLAMA
from factory import SMALL_QWEN2 as QWEN2
from factory import SMALL_V3 as V3
from factory import checkpoint, dense_checkpoint, edit_json
from small_builds import NAMED, fields

from quantkit.gguf.header import decode
from quantkit.model import demo
from quantkit.model.open import open_model

#: ids 0 … 383 are in tokenizer.json, the rest of the vocabulary is not
N_TOKENS, N_VOCAB = 384, 512
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PLAIN = {**SPECIAL, "special": False}
THINK = "<think>"
Change = Callable[[Path], object]


def config(**keys: Any) -> Change:
    return lambda folder: edit_json(folder / "tokenizer_config.json", lambda c: c.update(keys))


def special_map(**keys: Any) -> Change:
    return lambda folder: (folder / "special_tokens_map.json").write_text(json.dumps(keys))


def added(**tokens: int) -> Change:
    return lambda folder: (folder / "added_tokens.json").write_text(json.dumps(tokens))


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def own_decoder(folder: Path, **more: Any) -> dict[str, Any]:
    tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    return {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens} | more


def flags(folder: Path, **changes: Any) -> None:
    """<think> as tokenizer_config.json has it, with other flags."""
    decoder = own_decoder(folder)
    for token in decoder.values():
        if token["content"] == THINK:
            token.update(changes)
    config(added_tokens_decoder=decoder)(folder)


CASES: dict[str, Change] = {
    "nothing": lambda folder: None,
    "pad": config(pad_token="<|PAD_TOKEN|>"),
    "pad-object": config(pad_token={"__type": "AddedToken", "content": "<|PAD_TOKEN|>", **SPECIAL}),
    "several": config(pad_token="<|PAD|>", unk_token="<|UNK|>", sep_token="<|SEP|>", mask_token="<|MASK|>"),
    "null": config(pad_token=None, bos_token=None),
    "decoder": config(added_tokens_decoder={"384": {"content": "<|tool|>", **SPECIAL}}),
    "decoder-out-of-order": config(
        added_tokens_decoder={"386": {"content": "<c>", **PLAIN}, "384": {"content": "<a>", **SPECIAL}}
    ),
    "decoder-and-own": lambda folder: config(
        added_tokens_decoder=own_decoder(folder, **{"384": {"content": "<tool>", **PLAIN}})
    )(folder),
    "decoder-makes-special": lambda folder: flags(folder, special=True),
    "decoder-makes-normalized": lambda folder: flags(folder, normalized=True),
    "decoder-strips": lambda folder: flags(folder, lstrip=True, rstrip=True),
    "added": added(**{"<|extra|>": 384}),
    "added-plain": added(extra=384, more=385),
    "added-known": added(**{THINK: 382}),
    "added-special": both(added(**{"<extra>": 384}), config(additional_special_tokens=["<extra>"])),
    "added-beside-a-decoder": both(
        added(**{"<lost>": 384}), config(added_tokens_decoder={"385": {"content": "<kept>", **SPECIAL}})
    ),
    "more": config(additional_special_tokens=["<|im_start|>", "<|im_end|>"]),
    "more-known": config(additional_special_tokens=[THINK]),
    "more-known-object": config(additional_special_tokens=[{"__type": "AddedToken", "content": THINK, **SPECIAL}]),
    "more-known-and-decoder": lambda folder: config(
        additional_special_tokens=[THINK], added_tokens_decoder=own_decoder(folder)
    )(folder),
    "extra": config(extra_special_tokens={"image_token": "<image>"}),
    "map-pad": special_map(pad_token="<|PAD|>"),
    "map-object": special_map(pad_token={"content": "<pad_me>", **PLAIN}),
    "map-more": special_map(additional_special_tokens=["<one>", {"content": "<two>", **PLAIN}]),
    "map-more-known": special_map(additional_special_tokens=[{"content": THINK, **PLAIN}]),
    "map-more-known-text": special_map(additional_special_tokens=[THINK]),
    "map-and-more": both(
        special_map(additional_special_tokens=["<two>"]), config(additional_special_tokens=["<one>", "<two>"])
    ),
    "map-goes-first": both(special_map(pad_token="<map>"), config(pad_token="<config>")),
    "map-beside-a-decoder": lambda folder: both(
        special_map(pad_token="<lost>"), config(added_tokens_decoder=own_decoder(folder))
    )(folder),
    "llama-class": config(tokenizer_class="LlamaTokenizerFast", unk_token=None),
    "llama-class-unk": config(tokenizer_class="LlamaTokenizerFast"),
    "qwen2-class": config(tokenizer_class="Qwen2Tokenizer"),
    "qwen2-class-null": config(tokenizer_class="Qwen2Tokenizer", unk_token=None),
    "no-class": config(tokenizer_class=None),
    "no-config": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "space": config(pad_token="a b", unk_token=" c"),
    "padding": lambda folder: edit_json(
        folder / "tokenizer.json",
        lambda t: t.update(
            padding={
                "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<|padding|>",
            }
        ),
    ),
}  # fmt: skip
KINDS = {"v3": V3, "qwen2": QWEN2, "llama": LLAMA}
#: the file of every case and kind that is converted; dense models for what their class adds
JOBS = [("v3", case) for case in CASES] + [
    (k, c) for k in ("qwen2", "llama") for c in ("no-class", "more", "no-config")
]


@pytest.fixture(scope="module")
def converted(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    jobs = []
    for kind, model in KINDS.items():
        plain = folder / kind / "Tiny"
        if kind == "v3":
            checkpoint(plain, {**model, "vocab_size": N_VOCAB}, n_shards=1)
        else:
            dense_checkpoint(plain, {**model, "vocab_size": N_VOCAB})
        demo.make_tokenizer(plain, N_TOKENS)
    for kind, case in JOBS:
        made = Path(shutil.copytree(folder / kind / "Tiny", folder / f"{kind}-{case}" / "Tiny"))
        CASES[case](made)
        jobs.append((made, folder / f"{kind}-{case}.gguf"))
    tools.convert_all(jobs, NAMED.pre)
    return folder


@pytest.mark.tools
@pytest.mark.parametrize(("kind", "case"), JOBS)
def test_the_converter_writes_the_same_tokens(converted: Path, kind: str, case: str) -> None:
    theirs = {key: value for key, (_, value) in fields(converted / f"{kind}-{case}.gguf").items()}
    ours = {item.key: decode(item) for item in open_model(str(converted / f"{kind}-{case}" / "Tiny"), NAMED).kvs}
    for key in sorted(k for k in ours.keys() | theirs.keys() if k.startswith("tokenizer.")):
        assert ours.get(key) == theirs.get(key), key
    assert list(ours) == list(theirs)

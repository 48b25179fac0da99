"""quantkit tokenize: the entire output, and its exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Run

from quantkit import text as qk_text
from quantkit.model.families.options import Options
from quantkit.model.open import open_model

TEXT = "The router and the norms stay as they are.\n" * 40


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(TEXT)
    return path


def test_counts(quantkit: Run, tiny_v3: Path, words: Path) -> None:
    tokenizer = qk_text.tokenizer(open_model(str(tiny_v3), Options(pre="deepseek-v3")))
    n = len(tokenizer.encode(TEXT[:-1]))
    done = quantkit("tokenize", tiny_v3, "--pre", "deepseek-v3", "--text", words, "--ctx", 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "tokenizer  gpt2, deepseek-v3, 384 tokens\n"
        f"text       1,720 bytes of {words}\n"
        f"tokens     {n:,}, {n / 1720:.3f} a byte\n"
        "BOS        0 '<｜begin▁of▁sentence｜>', first of the text and of every chunk\n"
        f"chunks     {n // 64} of 64 tokens; {n % 64} tokens are left over\n"
    )
    done = quantkit("tokenize", tiny_v3, "--pre", "deepseek-v3", "--text", words, "--ctx", 64, "--chunks", 2)
    assert done.stdout.splitlines()[2:] == [
        "tokens     128 (--chunks ends there)",
        "BOS        0 '<｜begin▁of▁sentence｜>', first of the text and of every chunk",
        "chunks     2 of 64 tokens; 0 tokens are left over",
    ]


def test_ids_and_json(quantkit: Run, sound: Path, words: Path) -> None:
    tokenizer = qk_text.tokenizer(sound)
    ids = tokenizer.encode(TEXT[:-1]).tolist()
    done = quantkit("tokenize", sound, "--text", words, "--ids")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ids}\n", "")
    done = quantkit("tokenize", sound, "--text", words, "--json", "--ids", "--chunks", 1, "--ctx", 100)
    assert json.loads(done.stdout) == {
        "tokenizer": "gpt2", "pre": "deepseek-v3", "vocabulary": 384,
        "fingerprint": tokenizer.vocabulary.fingerprint, "texts": [str(words)], "bytes": 1720, "tokens": 100,
        "whole_text": False, "ctx": 100, "chunks": 1, "bos": 0, "add_eos": False, "ids": ids[:100],
    }  # fmt: skip
    assert "ids" not in json.loads(quantkit("tokenize", sound, "--text", words, "--json").stdout)


def test_special_tokens_and_chats(quantkit: Run, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "<｜User｜>", "messages": [{"role": "user", "content": "a"}]}\n')
    user, a = qk_text.tokenize(sound, "<｜User｜>a", parse_special=True).tolist()[1:]
    for options, ids in (
        (["--parse-special"], [0, user]),
        (["--chat"], [0, user, a]),
        ([], qk_text.tokenize(sound, "<｜User｜>").tolist()),
    ):
        done = quantkit("tokenize", sound, "--text", path, "--ids", *options)
        assert (done.returncode, done.stdout) == (0, f"{ids}\n"), done.stderr


def test_what_is_refused(quantkit: Run, sound: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "images").mkdir()
    none = (
        "has no text files (.txt, .text, .md, .markdown, .rst, .raw, .jsonl, .ndjson); of other names it has 0, which "
        "can be given by name"
    )
    for name, says in (
        ("none.txt", "cannot be read: No such file or directory"),
        ("pipe", "is a FIFO, not a regular file; write it to a file first"),
        ("images", none),
        (
            "bad.txt",
            "is not UTF-8: byte 0xFF at 3 (invalid start byte); convert it, for example: iconv -f LATIN1 -t UTF-8",
        ),
    ):
        done = quantkit("tokenize", sound, "--text", tmp_path / name)
        assert (done.returncode, done.stdout, done.stderr) == (14, "", f"error: {tmp_path / name}: {says}\n")
    done = quantkit("tokenize", sound, "--text", "")
    assert (done.returncode, done.stderr) == (14, "error: --text: is empty; give a name\n")
    assert quantkit("tokenize", sound).returncode == 2
    done = quantkit("tokenize", sound, "--text", tmp_path / "bom.txt", "--ids")
    assert done.returncode == 0
    assert (
        done.stderr
        == f"note: {tmp_path / 'bom.txt'}: its byte-order mark is left out, which llama.cpp would take for text\n"
    )
    done = quantkit("tokenize", "deepseek-r1", "--text", tmp_path / "bom.txt")
    assert (done.returncode, done.stderr) == (
        4,
        "error: deepseek-r1: config.json alone has no tokenizer; give the checkpoint's folder or a GGUF of the model\n",
    )

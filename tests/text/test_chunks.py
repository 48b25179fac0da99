"""Chunks, held against what llama-perplexity keeps of a text, and what is refused."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import Tools
from vocabularies import changed, made

from quantkit import text as qk_text
from quantkit.base.errors import TextError, UnsupportedError
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.text.chunking import make_chunks
from quantkit.text.encoding import Tokenizer, _byte_letters
from quantkit.text.vocabulary import read_vocabulary

TEXT = "The router and the norms stay as they are.\n" * 40
#: a token for each byte, and two more
BYTES = made([*_byte_letters(), "<s>", "</s>"], [], token_type=[1] * 256 + [3, 3], bos_token_id=256, eos_token_id=257)


def by_bytes(**values: object) -> Tokenizer:
    return Tokenizer(read_vocabulary(changed(BYTES, **values), "bytes"))


def put(path: Path, data: str) -> Path:
    path.write_bytes(data.encode())
    return path


@pytest.mark.tools
@pytest.mark.parametrize("n_chunks", [None, 3])
def test_llama_perplexity_keeps_the_same_tokens(
    tools: Tools, tiny_v3: Path, tiny_bf16: Path, tmp_path: Path, n_chunks: int | None
) -> None:
    """Its file has the context, the vocabulary's size and the number of chunks, and then the text's tokens."""
    text = put(tmp_path / "text.txt", TEXT)
    kept = tmp_path / "logits"
    command = [str(tools.perplexity), "-m", str(tiny_bf16), "-f", str(text), "-c", "64", "-t", "1"]
    command += ["--kl-divergence-base", str(kept), "--chunks", str(-1 if n_chunks is None else n_chunks)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    raw = kept.read_bytes()
    magic, n_ctx, _n_vocab, found = struct.unpack_from("<8siii", raw)
    assert (magic, n_ctx) == (b"_logits_", 64)
    theirs = np.frombuffer(raw, np.int32, found * 64, 20).reshape(found, 64)
    for model in (open_model(str(tiny_v3), Options(pre="deepseek-v3")), str(tiny_bf16)):
        ours = qk_text.chunks(model, [text], 64, n_chunks)
        assert ours.text_tokens.tolist() == theirs.tolist()
        assert ours.bos == 0
        assert (ours.tokens[:, 0] == 0).all()
        assert ours.tokens[:, 1:].tolist() == theirs[:, 1:].tolist()
    assert found == 3 or n_chunks is None


def test_what_is_in_them(tmp_path: Path) -> None:
    f = put(tmp_path / "t.txt", "abcdefghijk\n")
    chunks = make_chunks(by_bytes(add_bos_token=True), [f], 4)
    letters = [256, *b"abcdefghijk"]
    assert chunks.text_tokens.tolist() == [letters[:4], letters[4:8], letters[8:12]]
    assert chunks.tokens.tolist() == [letters[:4], [256, *letters[5:8]], [256, *letters[9:12]]]
    assert chunks.tokens.dtype == chunks.text_tokens.dtype == np.dtype(np.int32)
    assert (chunks.n_chunks, chunks.n_ctx, chunks.n_tokens, chunks.nbytes, chunks.first) == (3, 4, 12, 12, 2)
    assert chunks.targets.tolist() == [[row[3]] for row in chunks.text_tokens.tolist()]
    assert (chunks.names, chunks.bos, chunks.notes) == ((str(f),), 256, ())
    # without the beginning-of-text token; what is left at the end is not used
    plain = make_chunks(by_bytes(), [f], 4)
    assert plain.tokens.tolist() == plain.text_tokens.tolist() == [letters[1:5], letters[5:9]]
    assert (plain.n_tokens, plain.bos) == (11, None)
    assert plain.fingerprint != chunks.fingerprint


def test_so_many_chunks(tmp_path: Path) -> None:
    f = put(tmp_path / "t.txt", "abcdefghijk")
    whole = make_chunks(by_bytes(), [f], 3)
    for n in (1, 2, 3):
        some = make_chunks(by_bytes(), [f], 3, n)
        assert some.text_tokens.tolist() == whole.text_tokens.tolist()[:n]
        assert some.notes == ()
    many = make_chunks(by_bytes(), [f], 3, 9)
    assert (many.n_chunks, many.notes) == (3, ("9 chunks were asked for, but the text has 3",))


def test_a_text_of_less_than_two_chunks(tmp_path: Path) -> None:
    chunks = make_chunks(by_bytes(), [put(tmp_path / "t.txt", "abcdefg")], 4)
    assert chunks.notes == ("7 tokens are less than two chunks (8), which llama-imatrix and llama-perplexity want",)
    assert make_chunks(by_bytes(), [put(tmp_path / "t.txt", "abcdefg")], 4, 1).notes == chunks.notes


def test_a_text_of_less_than_a_chunk(tmp_path: Path) -> None:
    f = put(tmp_path / "t.txt", "abc")
    with pytest.raises(TextError) as e:
        make_chunks(by_bytes(add_bos_token=True), [f], 512)
    assert str(e.value) == (
        f"{f}: 3 bytes make 4 tokens, and one chunk needs 512; give a longer text or a smaller --ctx"
    )


def test_a_model_that_ends_every_text(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as e:
        make_chunks(by_bytes(add_eos_token=True), [put(tmp_path / "t.txt", "abcdefg")], 2)
    assert str(e.value) == (
        "bytes: needs the end-of-text token after every text (tokenizer.ggml.add_eos_token), and llama-imatrix and "
        "llama-perplexity do not run with such a model"
    )


def test_special_tokens_are_text_unless_they_are_parsed(tmp_path: Path) -> None:
    f = put(tmp_path / "t.txt", "a<s>b")
    assert make_chunks(by_bytes(), [f], 2).n_tokens == 5
    assert make_chunks(by_bytes(), [f], 3, parse_special=True).tokens.tolist() == [[97, 256, 98]]


def test_chunks_that_are_none(tmp_path: Path) -> None:
    text = put(tmp_path / "text.txt", TEXT)
    for n_ctx, n_chunks, says in (
        (0, None, "chunks of 0 tokens are none; give at least 1, such as 512"),
        (-1, 3, "chunks of -1 tokens are none; give at least 1, such as 512"),
        (4, 0, "0 chunks were asked for; give at least 1, or None for the whole text"),
    ):
        with pytest.raises(TextError) as e:
            make_chunks(by_bytes(), [text], n_ctx, n_chunks)
        assert str(e.value) == says


def test_one_text_is_a_list_of_one(tiny_v3: Path, tmp_path: Path) -> None:
    """A text is not taken for the list of its letters."""
    model, text = open_model(str(tiny_v3), Options(pre="deepseek-v3")), put(tmp_path / "text.txt", TEXT)
    several = qk_text.chunks(model, [text], 64)
    for one in (text, str(text)):
        assert qk_text.chunks(model, one, 64).tokens.tolist() == several.tokens.tolist()


def test_half_of_a_surrogate_pair() -> None:
    with pytest.raises(TextError) as e:
        by_bytes().encode("ab\ud83dc")
    assert str(e.value) == (
        "the text has half of a surrogate pair, \\ud83d, at character 2, which no UTF-8 has; leave it out"
    )

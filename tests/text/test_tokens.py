"""Token ids: llama_tokenize's, of the real library, for real and for odd vocabularies, under every pre-tokenizer."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from conftest import Tools
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_tokens import LlamaTokens
from smollm2 import smollm2
from vocabularies import changed, gguf_of, made, random_text

from quantkit import text as qk_text
from quantkit.base.errors import SourceError, UnsupportedError
from quantkit.gguf.header import F32, KV, STRING, decode, kv, kv_array
from quantkit.gguf.pre_tokenizers import PRE_NAMES
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.text.categories import LETTER, MARK, NUMBER, OTHER, PUNCTUATION, SPACES, SYMBOL, categories
from quantkit.text.encoding import Tokenizer, _byte_letters
from quantkit.text.splits import PRES, Splitter
from quantkit.text.vocabulary import read_vocabulary, vocabulary_of

Oracle = Callable[[Path], LlamaTokens]
LETTERS = list(_byte_letters())


@pytest.fixture(scope="module")
def oracle(tools: Tools) -> Iterator[Oracle]:
    """llama.cpp's vocabulary of a GGUF."""
    running: dict[Path, LlamaTokens] = {}

    def of(path: Path) -> LlamaTokens:
        if path not in running:
            running[path] = LlamaTokens(tools.quantize, path)
        return running[path]

    yield of
    for each in running.values():
        each.close()


@pytest.fixture(scope="module")
def v3_kvs(tmp_path_factory: pytest.TempPathFactory) -> list[KV]:
    """The keys of DeepSeek-V3's vocabulary; the package says that no token goes in front."""
    return vocabularies.deepseek_v3_kvs(tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="module")
def part_of_v3(v3_kvs: list[KV]) -> list[KV]:
    """Its first 20,000 tokens, which many pre-tokenizers can be tried with soon."""
    values = {item.key: decode(item) for item in v3_kvs}
    tokens = values["tokenizer.ggml.tokens"][:20_000]
    known = set(tokens)
    merges = [m for m in values["tokenizer.ggml.merges"] if m.replace(" ", "") in known]
    more, types = ["<think>", "<|im_end|>", "<｜User｜>"], [3] * 3 + [1] * 19_997 + [4, 4, 3]
    return made([*tokens, *more], merges, token_type=types, bos_token_id=0, eos_token_id=1)


def differences(oracle: LlamaTokens, tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[str, bool, bool]]:
    """The texts and settings for which the tokens are not llama.cpp's."""
    return [
        (text, special, parse)
        for i, text in enumerate(texts)
        for special, parse in (((True, False), (False, True)) if i % 2 else ((True, True), (False, False)))
        if tokenizer.encode(text, add_special=special, parse_special=parse).tolist() != oracle(text, special, parse)
    ]


# ---------------------------------------------------------------- against the library


@pytest.mark.tools
@pytest.mark.parametrize("pre", sorted({min(n for n, p in PRES.items() if p == each) for each in PRES.values()}))
def test_every_pre_tokenizer(oracle: Oracle, part_of_v3: list[KV], tmp_path: Path, pre: str) -> None:
    kvs = changed(part_of_v3, pre=pre)
    theirs, ours = oracle(gguf_of(tmp_path / "v.gguf", kvs)), Tokenizer(read_vocabulary(kvs, pre))
    said = {"n_tokens": 20_003, "bos": ours.bos, "eos": ours.eos, "add_bos": ours.add_bos, "add_eos": ours.add_eos}
    assert theirs.says == said
    rng = random.Random(pre)
    assert differences(theirs, ours, [random_text(rng) for _ in range(150)]) == []


@pytest.mark.tools
def test_names_of_one_pre_tokenizer(oracle: Oracle, v3_kvs: list[KV], tmp_path: Path) -> None:
    """Names that stand for one: what they say of the beginning-of-text token, and a text that tells most apart."""
    text = "Don't 12345 \u3000x\r\n\n 中文カナ é e\u0301!?\n $<=> AbC 'S"
    small = ["<s>", *LETTERS, "中", *"on't", "Do", "12", "123"]
    rest = ["D o", "1 2", "12 3"]
    path = gguf_of(tmp_path / "v.gguf", made(["a"], []))
    theirs = oracle(path)
    for pre in sorted(PRES):
        kvs = made(list(dict.fromkeys(small)), rest, pre=pre)
        theirs.load(gguf_of(path, kvs))
        ours = Tokenizer(read_vocabulary(kvs, pre))
        assert (theirs.says["add_bos"], theirs.says["bos"]) == (ours.add_bos, -1 if ours.bos is None else ours.bos)
        assert differences(theirs, ours, [text, text]) == [], pre


@pytest.mark.tools
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(
    st.sampled_from(vocabularies.PIECES), max_size=30).map("".join))  # fmt: skip
def test_deepseek_v3(oracle: Oracle, v3_kvs: list[KV], tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "deepseek-v3.gguf"
    ours = _KEPT.get(path)
    if ours is None:
        ours = _KEPT[path] = Tokenizer(read_vocabulary(changed(v3_kvs, add_bos_token=True), "v3"))
        gguf_of(path, changed(v3_kvs, add_bos_token=True))
    assert differences(oracle(path), ours, [text, text]) == []


_KEPT: dict[Path, Tokenizer] = {}


@pytest.mark.tools
def test_smollm2(oracle: Oracle) -> None:
    path = smollm2()
    rng = random.Random(2)
    ours = qk_text.tokenizer(path)
    assert (ours.add_bos, ours.bos) == (False, 1)
    assert differences(oracle(path), ours, [random_text(rng) for _ in range(300)]) == []
    known = "<|im_start|>user\nHello world<|im_end|>"
    assert ours.encode(known, parse_special=True).tolist() == [1, 4093, 198, 19556, 905, 2]


@pytest.mark.tools
def test_a_checkpoint_has_the_tokens_of_its_gguf(oracle: Oracle, tiny_v3: Path, tiny_bf16: Path) -> None:
    """The converter's file, of the small tokenizer that the demo trains."""
    checkpoint = Tokenizer(vocabulary_of(open_model(str(tiny_v3), Options(pre="deepseek-v3"))))
    of_gguf = Tokenizer(vocabulary_of(open_model(str(tiny_bf16))))
    rng = random.Random(3)
    texts = [random_text(rng) for _ in range(200)]
    texts += ["The router and <think>the norms</think><｜Assistant｜> stay as they are." * 3]
    assert differences(oracle(tiny_bf16), checkpoint, texts) == []
    assert differences(oracle(tiny_bf16), of_gguf, texts) == []
    assert checkpoint.vocabulary.fingerprint == of_gguf.vocabulary.fingerprint
    assert checkpoint.add_bos


ODD = {
    "symbols that are no tokens": made([*LETTERS, "abc"], ["a b", "b c", "ab c", "d e", "de f"]),
    "bytes that are no tokens": made(["h", "e", "l", "o", "lo", "Ġ", "hel"], ["l o", "h e", "he l"]),
    "a pair twice, the later one first": made([*LETTERS, "ab", "bc"], ["a b", "b c", "a b"]),
    "merges that are no pairs": made([*LETTERS, "ab"], ["ab", "a b", " a", "x ", "a  b"]),
    "an empty token": made([*LETTERS, "", "ab"], ["a b"]),
    "control, user-defined and unknown tokens": made(
        [*LETTERS, "<a>", "<b>", "<c>", "<a><b>"], [], token_type=[1] * 256 + [3, 4, 2, 4]
    ),
    "control tokens by their names": made(
        [*LETTERS, "<|im_end|>", "<|fim_prefix|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"], [],
        token_type=[1] * 256 + [4, 4, 3, 4, 4, 4],
    ),
    "a key for filling in the middle": made(
        [*LETTERS, "<|fim_prefix|>", "<|fim_suffix|>"], [], token_type=[1] * 256 + [4, 4], fim_pre_token_id=3
    ),
    "ignored merges": made([*LETTERS, "ab", "abc", "Ġabc"], ["b c"], pre="llama-bpe", bos_token_id=1),
    "tokens at the end": made([*LETTERS, "ab"], ["a b"], add_eos_token=True, eos_token_id=2, add_bos_token=True),
    "no pre-tokenizer": changed(made([*LETTERS, "12"], ["1 2"]), pre=None),
    "Kimi without merges": changed(made([*LETTERS], []), pre="kimi-k2", merges=None),
}  # fmt: skip


@pytest.mark.tools
@pytest.mark.parametrize("name", ODD)
def test_odd_vocabularies(oracle: Oracle, tmp_path: Path, name: str) -> None:
    kvs = ODD[name]
    theirs, ours = oracle(gguf_of(tmp_path / "v.gguf", kvs)), Tokenizer(read_vocabulary(kvs, name))
    assert (theirs.says["add_bos"], theirs.says["add_eos"]) == (ours.add_bos, ours.add_eos)
    texts = ["abc abcabc", "def de", "hello hel lo", "<a><b><c><a> <b>", "ab  aab", "x a  b ", "123 中文 1", ""]
    texts += ["<|im_end|><|fim_prefix|>x<|channel|><|end|><|return|><|call|><|fim_suffix|>[EMPTY_256]"]
    assert differences(theirs, ours, [t for text in texts for t in (text, text)]) == []


def sentencepiece(seed: int, **values: Any) -> list[KV]:
    """A vocabulary of parts of words, with many equal scores, some that no two tokens make, and user-defined tokens."""
    rng = random.Random(seed)
    words = ["▁", "▁▁", "▁▁▁▁", *"abcdehlot中é", "▁the", "▁hello", "hello", "中文", "e\u0301", "aa", "aaa", "aaaa"]
    for _ in range(150):
        words.append("".join(rng.choice("▁abcdehlot中é") for _ in range(rng.choice((2, 2, 3, 4, 6)))))
    own = ["<think>", "<tool>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(words), *own]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 261), 4, 3]
    scores = [float(rng.randrange(12)) for _ in tokens]
    kvs = changed([], model="llama", tokens=tokens, token_type=types, bos_token_id=1, eos_token_id=2)
    return changed([*kvs, kv_array("tokenizer.ggml.scores", F32, scores)], **values)


@pytest.mark.tools
@pytest.mark.parametrize(
    ("seed", "values"),
    [(1, {}), (2, {"add_space_prefix": False}), (3, {"add_bos_token": False}), (4, {"add_eos_token": True})],
)
def test_sentencepiece(oracle: Oracle, tmp_path: Path, seed: int, values: dict[str, Any]) -> None:
    kvs = sentencepiece(seed, **values)
    theirs, ours = oracle(gguf_of(tmp_path / "v.gguf", kvs)), Tokenizer(read_vocabulary(kvs, "spm"))
    assert (theirs.says["add_bos"], theirs.says["add_eos"]) == (ours.add_bos, ours.add_eos)
    rng = random.Random(seed)
    letters = [*"abcdehlot中é ", "  ", "hello", " the", "<think>", "<tool>", "</s>", "<unk>", "🚀", "\n", "\u0301", "x"]
    texts = ["".join(rng.choice(letters) for _ in range(rng.choice((1, 3, 10, 50)))) for _ in range(200)]
    assert differences(theirs, ours, [*texts, "aaaaaaaaa", "", " ", *(random_text(rng) for _ in range(100))]) == []


def test_sentencepiece_without_bytes() -> None:
    kvs = changed(sentencepiece(1), tokens=["<unk>", "<s>", "</s>", "a"], token_type=None)
    with pytest.raises(UnsupportedError) as e:
        Tokenizer(read_vocabulary(kvs, "m"))
    assert str(e.value) == (
        "m: its SentencePiece vocabulary has no token for the byte 0x00, and llama.cpp would stop at a text that needs "
        "it"
    )


# ---------------------------------------------------------------- alone


def test_the_categories_are_unicode_s() -> None:
    """Of all code points that this Python's Unicode has, where it is no newer than 15.1."""
    table = categories()
    kinds = {"L": LETTER, "N": NUMBER, "P": PUNCTUATION, "M": MARK, "S": SYMBOL}
    wrong = []
    for point in range(0x110000):
        category = unicodedata.category(chr(point))
        if category != "Cn" and table[point] != kinds.get(category[0], OTHER):
            wrong.append(point)
    if unicodedata.unidata_version <= "15.1.0":
        assert wrong == []
    n = {kind: int((table == byte).sum()) for kind, byte in kinds.items()}
    assert n == {"L": 136_726, "N": 1_831, "P": 842, "M": 2_450, "S": 7_775}
    assert {p for p in range(0x80, 0x110000) if chr(p).isspace()} == set(SPACES)


@pytest.mark.parametrize("pre", sorted(PRES))
def test_words_are_the_text(pre: str) -> None:
    rng = random.Random(pre)
    for _ in range(20):
        text = random_text(rng)
        assert "".join(Splitter(PRES[pre]).words(text)) == text


def test_words_of_deepseek_v3() -> None:
    words = list(Splitter(PRES["deepseek-v3"]).words("In 2025, 中文カナ  it's\n\nx"))
    assert words == ["In", " ", "202", "5", ",", " ", "中文カナ", " ", " it", "'s", "\n\n", "x"]


def test_a_limit_gives_the_first_tokens(v3_kvs: list[KV]) -> None:
    tokenizer = Tokenizer(read_vocabulary(v3_kvs, "v3"))
    text = "The router <think>and the norms</think> stay as they are. " * 20
    whole = tokenizer.encode(text)
    for limit in (0, 1, 5, 6, 100, 10**6):
        assert tokenizer.encode(text, limit=limit).tolist() == whole[:limit].tolist()


def test_what_is_rebuilt_is_known_to_llama_cpp() -> None:
    assert set(PRES) <= PRE_NAMES


@pytest.mark.parametrize(
    ("kvs", "error", "says"),
    [
        ([], SourceError, "m: has no tokenizer; give a GGUF with one, or the checkpoint"),
        (
            changed([], model="bert", tokens=["a"]), UnsupportedError,
            "m: its tokenizer is of the kind 'bert' (tokenizer.ggml.model); quantkit tokenizes for 'gpt2' "
            "(byte-level BPE) and 'llama' (SentencePiece)",
        ),
        (
            made(["a", "b", "a"], []), SourceError,
            "m: tokenizer.ggml.tokens has 'a' twice, as 0 and 2; the file is damaged: get it again",
        ),
        (
            changed(made(["a"], []), merges=None), SourceError,
            "m: has no tokenizer.ggml.merges, which byte-level BPE needs; get the file again",
        ),
        (
            made(["a", "b"], [], token_type=[1]), SourceError,
            "m: tokenizer.ggml.token_type has 1 elements for 2 tokens; the file is damaged: get it again",
        ),
        (
            made(["a"], [], token_type=kv_array("tokenizer.ggml.token_type", F32, [1.0])), SourceError,
            "m: tokenizer.ggml.token_type is no array of i32; the file is damaged: get it again",
        ),
        (
            made(["a"], [], add_bos_token="yes"), SourceError,
            "m: tokenizer.ggml.add_bos_token is no true or false; the file is damaged: get it again",
        ),
        (
            made(["a"], [], add_bos_token=True), SourceError,
            "m: tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id names no token, and llama.cpp "
            "would stop at that; get the file again, or convert the model again",
        ),
        (
            made(["a"], [], pre="deepseek-v3.1"), SourceError,
            "m: tokenizer.ggml.pre is 'deepseek-v3.1': llama.cpp knows no pre-tokenizer called 'deepseek-v3.1' (did "
            "you mean deepseek-v3?) and would not load the file; --pre names another",
        ),
        (
            made(["a"], [], pre="superbpe"), UnsupportedError,
            "m: its pre-tokenizer, 'superbpe', is not one that quantkit can rebuild; it rebuilds "
            + ", ".join(sorted(PRES)),
        ),
        (
            [kv("general.name", STRING, "Phi-3 mini"), *made(["a"], [])], UnsupportedError,
            "m: is called 'phi-3 mini', for which llama.cpp strips white space beside special tokens; quantkit does "
            "not tokenize for such models",
        ),
    ],
)  # fmt: skip
def test_vocabularies_that_cannot_be(kvs: list[KV], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as e:
        Tokenizer(read_vocabulary(kvs, "m"))
    assert type(e.value) is error
    assert str(e.value) == says


def test_a_config_alone() -> None:
    with pytest.raises(SourceError) as e:
        qk_text.tokenize("deepseek-r1", "text")
    assert str(e.value) == (
        "deepseek-r1: config.json alone has no tokenizer; give the checkpoint's folder or a GGUF of the model"
    )


def test_the_fingerprint_tells_vocabularies_apart() -> None:
    one = made([*LETTERS, "ab"], ["a b"])
    prints = {
        read_vocabulary(kvs, "m").fingerprint
        for kvs in (one, changed(one, pre="qwen2"), made([*LETTERS, "ba"], ["b a"]), changed(one, bos_token_id=3))
    }
    assert len(prints) == 4
    assert read_vocabulary([*one, kv("general.name", STRING, "n")], "other").fingerprint in prints


def test_no_unicode_of_this_python_counts() -> None:
    """A letter of Unicode 15, which Python 3.11 does not know, is one."""
    assert sys.version_info >= (3, 10)
    assert list(Splitter(PRES["gpt-2"]).words("a\U00011f04b\u0378c")) == ["a\U00011f04b", "\u0378", "c"]

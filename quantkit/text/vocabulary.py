"""A model's vocabulary, read as llama.cpp does (src/llama-vocab.cpp, load) from the tokenizer.* keys of a GGUF, or from
the keys that a checkpoint's GGUF would have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ..base.errors import SourceError, UnsupportedError
from ..gguf.header import ARRAY, BOOL, INTEGERS, KV, STRING, array_head, decode
from ..model.catalogue import Catalogue

#: tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
_P = "tokenizer.ggml."
#: tokens that end a text; they count as control tokens, whatever their stated type
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
#: tokens for filling in the middle: the keys, and the texts that count as control tokens if none of these keys is set
_FILLS = (
    (("fim_pre_token_id", "prefix_token_id"), ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>",
        "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>")),
    (("fim_suf_token_id", "suffix_token_id"), ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>",
        "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>")),
    (("fim_mid_token_id", "middle_token_id"), ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>",
        "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>")),
    (("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    (("fim_rep_token_id",), ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    (("fim_sep_token_id",), ("<|file_sep|>",)),
)  # fmt: skip
#: always shown in output, so not control tokens
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
#: models whose special tokens strip adjacent white space
_STRIPPING = ("phi-3", "phi3", "modern-bert")


@dataclass(frozen=True)
class Special:
    """A token that is searched for in a text before the text is cut into words."""

    id: int
    text: str
    only_parsed: bool
    """a control or unknown token: plain text unless special tokens are parsed"""


@dataclass(frozen=True)
class Vocabulary:
    """The data of a tokenizer. `where` names the model in messages."""

    where: str
    model: str
    """tokenizer.ggml.model: 'gpt2' (byte-level BPE) or 'llama' (SentencePiece)"""
    pre: str
    """tokenizer.ggml.pre, or 'default' if it is missing; '' for 'llama'"""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    """for 'llama' only, else empty"""
    merges: tuple[str, ...]
    specials: tuple[Special, ...]
    """the longest first"""
    bos: int | None
    """as in the file; None if it is not stated"""
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    chat_template: str | None

    @property
    def fingerprint(self) -> str:
        """64 hex digits; equal for models that tokenize every text alike, as far as their files can tell."""
        parts = (self.model, self.pre, self.tokens, self.types, self.scores, self.merges, self.bos, self.add_bos)
        return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


class _Keys:
    """A file's tokenizer keys, checked for their types."""

    def __init__(self, kvs: Iterable[KV], where: str) -> None:
        self.of, self.where = {item.key: item for item in kvs}, where

    def fail(self, key: str, what: str) -> SourceError:
        return SourceError(f"{self.where}: {key} {what}; the file is damaged: get it again")

    def value(self, key: str, what: str, types: Iterable[int]) -> Any:
        """The value; None if the key is missing. Raises SourceError for a value of another type."""
        item = self.of.get(key)
        if item is None:
            return None
        if item.type not in types:
            raise self.fail(key, f"is no {what}")
        return decode(item)

    def text(self, key: str) -> str | None:
        value = self.value(key, "text", (STRING,))
        return None if value is None else str(value)

    def flag(self, key: str) -> bool | None:
        value = self.value(key, "true or false", (BOOL,))
        return None if value is None else bool(value)

    def token(self, kind: str, n: int) -> int | None:
        """A token's id; None if it is missing or beyond the vocabulary."""
        value = self.value(_P + kind, "number", INTEGERS)
        return int(value) if value is not None and 0 <= value < n else None

    def array(self, key: str, elements: Sequence[str], least: int) -> list[Any] | None:
        item = self.of.get(key)
        if item is None:
            return None
        if item.type != ARRAY or array_head(item)[0] not in elements:
            raise self.fail(key, f"is no array of {' or '.join(elements)}")
        if array_head(item)[1] < least:
            raise self.fail(key, f"has {array_head(item)[1]:,} elements for {least:,} tokens")
        return list(decode(item))


def vocabulary_of(model: Catalogue) -> Vocabulary:
    """Read the vocabulary of an open model. Raises SourceError; UnsupportedError for an unknown kind of tokenizer."""
    if model.source is None and not model.kvs_complete:
        raise SourceError(
            f"{model.model}: config.json alone has no tokenizer; give the checkpoint's folder or a GGUF of the model"
        )
    path = getattr(model.source, "path", None)
    return read_vocabulary(model.kvs, str(path or model.model))


def read_vocabulary(kvs: Iterable[KV], where: str) -> Vocabulary:
    """Read the vocabulary from these keys. Raises SourceError, UnsupportedError."""
    keys = _Keys(kvs, where)
    kind = keys.text(_P + "model")
    if kind is None or _P + "tokens" not in keys.of:
        raise SourceError(f"{where}: has no tokenizer; give a GGUF with one, or the checkpoint")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{where}: its tokenizer is of the kind {kind!r:.40} (tokenizer.ggml.model); quantkit tokenizes for "
            "'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
        )
    name = (keys.text("general.name") or "").lower()
    if any(part in name for part in _STRIPPING):
        raise UnsupportedError(
            f"{where}: is called {name!r:.60}, for which llama.cpp strips white space beside special tokens; "
            "quantkit does not tokenize for such models"
        )
    # llama.cpp gives an empty token its own name
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(keys.array(_P + "tokens", ("str",), 1) or [])]
    n = len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != n:
        i = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise keys.fail(_P + "tokens", f"has {tokens[i]!r:.60} twice, as {i:,} and {ids[tokens[i]]:,}")
    types = (keys.array(_P + "token_type", ("i32",), n) or [1] * n)[:n]
    merges = keys.array(_P + "merges", ("str",), 0)
    if kind == "gpt2" and merges is None and keys.text(_P + "pre") != "kimi-k2":
        raise SourceError(f"{where}: has no tokenizer.ggml.merges, which byte-level BPE needs; get the file again")
    scores = keys.array(_P + "scores", ("f32", "i32"), n) if kind == "llama" else None
    pre = (keys.text(_P + "pre") or "default") if kind == "gpt2" else ""
    return Vocabulary(
        where, kind, pre, tuple(tokens), tuple(types),
        tuple(map(float, scores[:n])) if scores else (), tuple(merges or ()) if kind == "gpt2" else (),
        _specials(keys, tokens, types, ids),
        keys.token("bos_token_id", n), keys.token("eos_token_id", n),
        keys.token("unknown_token_id", n), keys.token("padding_token_id", n),
        keys.flag(_P + "add_bos_token"), keys.flag(_P + "add_eos_token"), keys.flag(_P + "add_space_prefix"),
        keys.text("tokenizer.chat_template"),
    )  # fmt: skip


def _specials(keys: _Keys, tokens: Sequence[str], types: Sequence[int], ids: dict[str, int]) -> tuple[Special, ...]:
    """The tokens to search for in a text, with llama.cpp's corrections of their types."""
    control = {i for i, t in enumerate(types) if t in (CONTROL, UNKNOWN)}
    found = control | {i for i, t in enumerate(types) if t == USER_DEFINED}
    made = {ids[t] for t in ENDS if t in ids}
    for names, texts in _FILLS:
        if all(keys.token(key, len(tokens)) is None for key in names):
            made |= {ids[t] for t in texts if t in ids}
    control |= made
    found |= made
    shown = {ids[t] for t in _SHOWN if t in ids}
    if ids.keys() & {"<|return|>", "<|flush|>"} and ids.keys() & {"<|call|>", "<|calls|>"}:
        shown |= {ids[t] for t in ("<|end|>",) if t in ids}
    control -= shown
    found |= shown
    if "</s>" in ids and "<|tool_response>" in ids:
        control.discard(ids["</s>"])
        found.discard(ids["</s>"])
    out = [Special(i, tokens[i], i in control) for i in sorted(found)]
    return tuple(sorted(out, key=lambda s: -len(s.text.encode("utf-8", "replace"))))

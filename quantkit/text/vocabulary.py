"""A model's vocabulary, from the tokenizer.* keys of a GGUF or from those that a checkpoint's GGUF would have, as
llama.cpp reads them (src/llama-vocab.cpp, load)."""

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
#: tokens that end a text and so are control tokens, whatever their type is said to be
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
#: tokens for filling in the middle, control tokens too where no key names another: the keys, and the texts
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
#: always written out, so no control tokens
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
#: models whose special tokens swallow white space beside them
_STRIPPING = ("phi-3", "phi3", "modern-bert")


@dataclass(frozen=True)
class Special:
    """A token that is looked for in a text before it is cut into words."""

    id: int
    text: str
    only_parsed: bool
    """it is a control or unknown token, and plain text unless special tokens are parsed"""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made from. `where` names the model in messages."""

    where: str
    model: str
    """tokenizer.ggml.model: 'gpt2' (byte-level BPE) or 'llama' (SentencePiece)"""
    pre: str
    """tokenizer.ggml.pre, 'default' where there is none; '' for 'llama'"""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    """for 'llama' only, else empty"""
    merges: tuple[str, ...]
    specials: tuple[Special, ...]
    """the longest first"""
    bos: int | None
    """as the file says it; None where it does not"""
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    chat_template: str | None

    @property
    def fingerprint(self) -> str:
        """Alike for models in which every text is the same tokens, as far as a file can say it: 64 hex digits."""
        parts = (self.model, self.pre, self.tokens, self.types, self.scores, self.merges, self.bos, self.add_bos)
        return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


class _Keys:
    """The tokenizer's keys of a file, each of the type it must have."""

    def __init__(self, kvs: Iterable[KV], where: str) -> None:
        self.of, self.where = {item.key: item for item in kvs}, where

    def fail(self, key: str, what: str) -> SourceError:
        return SourceError(f"{self.where}: {key} {what}; the file is damaged: get it again")

    def value(self, key: str, what: str, types: Iterable[int]) -> Any:
        """The value, None where there is none. Raises SourceError for one of another type."""
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
        """A token's id; one that is beyond the vocabulary counts as not given."""
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
    """The vocabulary of a model that was opened. Raises SourceError, and UnsupportedError for a kind of tokenizer that
    is not known here."""
    if model.source is None and not model.kvs_complete:
        raise SourceError(
            f"{model.model}: config.json alone has no tokenizer; give the checkpoint's folder or a GGUF of the model"
        )
    path = getattr(model.source, "path", None)
    return read_vocabulary(model.kvs, str(path or model.model))


def read_vocabulary(kvs: Iterable[KV], where: str) -> Vocabulary:
    """The vocabulary that these keys describe. Raises SourceError, UnsupportedError."""
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
    # an empty one has a name of its own in llama.cpp
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
    """The tokens that a text is searched for, with llama.cpp's corrections of their types."""
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

"""Converts texts to token ids, the same ones that llama-tokenize prints."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError, TextError, UnsupportedError
from ..gguf.pre_tokenizers import unknown_pre
from .splits import PRES, Pre, Splitter, cannot_be_rebuilt
from .spm import SPACE, SpmWords
from .vocabulary import Special, Vocabulary

Ids = npt.NDArray[np.int32]
#: words whose tokens are cached at once
_MOST_WORDS = 1 << 19
_SPM = Pre((), adds_bos=True)


class Words(Protocol):
    """Cuts a text into words, and a word into tokens."""

    def words(self, text: str) -> Iterator[str]: ...

    def of(self, word: str) -> tuple[int, ...]: ...


class Tokenizer:
    """Converts texts to tokens of one vocabulary.

    Raises UnsupportedError for a pre-tokenizer or a vocabulary that cannot be rebuilt, SourceError for one that
    llama.cpp would not load.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = v = vocabulary
        spm = v.model == "llama"
        pre = _SPM if spm else _pre_of(v)
        self.add_bos = pre.adds_bos if v.add_bos is None else v.add_bos
        """whether a text begins with the beginning-of-text token"""
        self.add_eos = bool(v.add_eos)
        self.bos = _token(v, v.bos, 1 if spm else 11 if pre.has_bos else None)
        self.eos = _token(v, v.eos, 2 if spm else 11)
        for kind, wanted, token in (("bos", self.add_bos, self.bos), ("eos", self.add_eos, self.eos)):
            if wanted and token is None:
                raise SourceError(
                    f"{v.where}: tokenizer.ggml.add_{kind}_token is true, but tokenizer.ggml.{kind}_token_id names no "
                    "token, and llama.cpp would stop at that; get the file again, or convert the model again"
                )
        words: Words = SpmWords(v) if spm else ByteLevelWords(v, pre)
        self._words, self._is_spm, self._kept = words, spm, dict[str, tuple[int, ...]]()
        self._puts_space = spm and v.add_space_prefix is not False

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, limit: int | None = None
    ) -> Ids:
        """Return the tokens of a text: [n] i32, the first `limit` at most.

        With `add_special`, a beginning-of-text token comes first and an end-of-text token last, if the vocabulary wants
        them. With `parse_special`, the text of a control token (<|im_start|>) becomes that token; without, only
        user-defined tokens are recognized. Raises TextError for a text that cannot be UTF-8. Source:
        src/llama-vocab.cpp, tokenize.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise TextError(
                f"the text has half of a surrogate pair, \\u{ord(text[e.start]):04x}, at character {e.start:,}, which "
                "no UTF-8 has; leave it out"
            ) from None
        out = array("i")
        if add_special and self.add_bos and self.bos is not None:
            out.append(self.bos)
        after_special = True
        for piece in _partition(text, self.vocabulary.specials, parse_special):
            if isinstance(piece, int):
                out.append(piece)
            elif self._is_spm:
                prefix = SPACE if self._puts_space and after_special else ""
                self._encode_words(prefix + piece.replace(" ", SPACE), out, limit)
            else:
                self._encode_words(piece, out, limit)
            after_special = isinstance(piece, int)
            if limit is not None and len(out) >= limit:
                return np.array(out[:limit], np.int32)
        if add_special and self.add_eos and self.eos is not None:
            out.append(self.eos)
        return np.array(out, np.int32)

    def _encode_words(self, text: str, out: array[int], limit: int | None) -> None:
        """Append the tokens of a text without special tokens; stop at `limit` tokens."""
        kept, most = self._kept, limit if limit is not None else 1 << 62
        for word in self._words.words(text):
            ids = kept.get(word)
            if ids is None:
                if len(kept) >= _MOST_WORDS:
                    kept.clear()
                ids = kept[word] = self._words.of(word)
            out.extend(ids)
            if len(out) >= most:
                return


def _pre_of(v: Vocabulary) -> Pre:
    if v.pre in PRES:
        return PRES[v.pre]
    if says := unknown_pre(v.pre):
        raise SourceError(f"{v.where}: tokenizer.ggml.pre is {v.pre!r:.60}: {says}; --pre names another")
    raise UnsupportedError(f"{v.where}: {cannot_be_rebuilt(v.pre)}")


def _token(vocabulary: Vocabulary, said: int | None, default: int | None) -> int | None:
    """A special token's id: as the file says, or llama.cpp's default if that is a token."""
    if said is not None:
        return said
    return default if default is not None and default < len(vocabulary.tokens) else None


def _partition(text: str, specials: tuple[Special, ...], parse_special: bool) -> list[str | int]:
    """Cut a text at its special tokens, longer ones first, into pieces of text and ids."""
    pieces: list[str | int] = [text] if text else []
    starts: dict[str, bool] = {}  # hundreds of tokens begin alike
    for special in specials:
        if special.only_parsed and not parse_special:
            continue
        start = special.text[:2]
        if start not in starts:
            starts[start] = start in text
        if starts[start] and special.text in text:
            pieces = [part for piece in pieces for part in _cut(piece, special)]
    return pieces


def _cut(piece: str | int, special: Special) -> Iterator[str | int]:
    if isinstance(piece, int):
        yield piece
        return
    for i, part in enumerate(piece.split(special.text)):
        if i:
            yield special.id
        if part:
            yield part


def _byte_letters() -> str:
    """The letter for each byte in a byte-level vocabulary; printable bytes stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(0x100, 0x200))
    return "".join(chr(b) if b in plain else chr(next(rest)) for b in range(256))


class ByteLevelWords:
    """Words and their tokens by byte-level BPE; the `tokenizers` package does the merges. It does not allow symbols
    that are no tokens, so these get ids beyond the vocabulary here, and are replaced at the end as in llama.cpp."""

    def __init__(self, vocabulary: Vocabulary, pre: Pre) -> None:
        from tokenizers.models import BPE

        self._ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        self._n, self._ignores_merges = len(self._ids), pre.ignores_merges
        self.words = Splitter(pre).words
        known = dict(self._ids)
        merges: dict[tuple[str, str], None] = {}  # of a pair that is there twice, the first counts
        for merge in vocabulary.merges:
            at = merge.find(" ", 1)
            if at > 0:
                merges[merge[:at], merge[at + 1 :]] = None
        letters = _byte_letters()
        for symbol in (*letters, *(s for a, b in merges for s in (a, b, a + b))):
            known.setdefault(symbol, len(known))
        self._beyond = {i: self._of_unknown(symbol) for symbol, i in known.items() if i >= self._n}
        self._letters = {i: letter for i, letter in enumerate(letters)}
        # the package does not accept an empty half
        self._bpe = BPE(known, [pair for pair in merges if all(pair)], cache_capacity=0)

    def _of_unknown(self, symbol: str) -> tuple[int, ...]:
        """The tokens of a symbol that is no token: those of its single bytes. Only ASCII bytes can have any."""
        return tuple(self._ids[ch] for ch in symbol if ch in self._ids and ch.isascii())

    def of(self, word: str) -> tuple[int, ...]:
        """The tokens of a word."""
        symbols = word.encode().decode("latin-1").translate(self._letters)
        if self._ignores_merges:
            whole = self._ids.get(symbols)
            if whole is not None:
                return (whole,)
        ids = [token.id for token in self._bpe.tokenize(symbols)]
        if self._beyond and ids and max(ids) >= self._n:
            return tuple(i for each in ids for i in self._beyond.get(each, (each,)))
        return tuple(ids)

"""Cuts tokens into chunks of one context, with the beginning-of-text token where llama-imatrix and llama-perplexity put
it.

The whole text is tokenized once, with a beginning-of-text token in front if the model wants one, and cut into chunks of
n_ctx; a remainder at the end is dropped. If the model wants a beginning-of-text token, it then replaces the first token
of each chunk as input; that position is never predicted. Sources: tools/imatrix/imatrix.cpp, compute_imatrix;
tools/perplexity/perplexity.cpp, perplexity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..base.errors import TextError, UnsupportedError
from .encoding import Ids, Tokenizer
from .sources import Texts, read_texts

Name = str | os.PathLike[str]


@dataclass(frozen=True)
class Chunks:
    """The tokens of texts, as a model processes them."""

    tokens: Ids
    """[n_chunks, n_ctx] i32; each chunk begins with the beginning-of-text token if the model wants one"""
    text_tokens: Ids
    """[n_chunks, n_ctx] i32, as in the text: the tokens to predict, which llama-perplexity stores in its files"""
    names: tuple[str, ...]
    """of the texts, as the user gave them"""
    nbytes: int
    """of the texts"""
    n_tokens: int
    """number of tokens made; with a limit on chunks, not the whole text's"""
    bos: int | None
    """the beginning-of-text token if the model wants one, else None"""
    fingerprint: str
    """of the vocabulary"""
    notes: tuple[str, ...] = ()

    @property
    def n_chunks(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def first(self) -> int:
        """llama-perplexity scores the logits at positions first … n_ctx - 2 of each chunk: the second half."""
        return self.n_ctx // 2

    @property
    def targets(self) -> Ids:
        """[n_chunks, n_ctx - 1 - first] i32: the tokens after those positions, `text_tokens[:, first + 1:]`."""
        return self.text_tokens[:, self.first + 1 :]


def make_chunks(
    tokenizer: Tokenizer, sources: Iterable[Name], n_ctx: int = 512, n_chunks: int | None = None, *,
    chat: bool = False, parse_special: bool = False,
) -> Chunks:  # fmt: skip
    """Make chunks of texts, or with `chat` of conversations, at most `n_chunks`. Raises TextError for a text shorter
    than one chunk and for an invalid number or size of chunks; UnsupportedError for a model that wants an end-of-text
    token, which llama.cpp's tools do not support."""
    if n_ctx < 1:
        raise TextError(f"chunks of {n_ctx:,} tokens are none; give at least 1, such as 512")
    if n_chunks is not None and n_chunks < 1:
        raise TextError(f"{n_chunks:,} chunks were asked for; give at least 1, or None for the whole text")
    # one extra chunk shows whether there is more text
    limit = None if n_chunks is None else (n_chunks + 1) * n_ctx
    ids, texts = encode_sources(tokenizer, sources, chat=chat, parse_special=parse_special, limit=limit)
    return cut(tokenizer, ids, texts, n_ctx, n_chunks)


def encode_sources(
    tokenizer: Tokenizer, sources: Iterable[Name], *, chat: bool = False, parse_special: bool = False,
    limit: int | None = None,
) -> tuple[Ids, Texts]:  # fmt: skip
    """Return the tokens of texts (see `read_texts`), joined into one, or with `chat` of conversations (see
    `encode_chats`), at most `limit`; and the texts. Raises TextError."""
    if chat:
        from .chat import encode_chats

        return encode_chats(tokenizer, sources, limit)
    texts = read_texts(sources)
    return tokenizer.encode(texts.joined, parse_special=parse_special, limit=limit), texts


def cut(tokenizer: Tokenizer, ids: Ids, texts: Texts, n_ctx: int, n_chunks: int | None = None) -> Chunks:
    """Cut tokens into chunks. Raises what `make_chunks` raises."""
    if tokenizer.add_eos:
        raise UnsupportedError(
            f"{tokenizer.vocabulary.where}: needs the end-of-text token after every text "
            "(tokenizer.ggml.add_eos_token), and llama-imatrix and llama-perplexity do not run with such a model"
        )
    found = len(ids) // n_ctx
    if not found:
        raise TextError(
            f"{', '.join(texts.names)}: {texts.nbytes:,} bytes make {len(ids):,} tokens, and one chunk needs "
            f"{n_ctx:,}; give a longer text or a smaller --ctx"
        )
    n = found if n_chunks is None else min(found, n_chunks)
    notes = list(texts.notes)
    if len(ids) < 2 * n_ctx:
        notes.append(
            f"{len(ids):,} tokens are less than two chunks ({2 * n_ctx:,}), which llama-imatrix and llama-perplexity "
            "want"
        )
    if n_chunks is not None and n < n_chunks:
        notes.append(f"{n_chunks:,} chunks were asked for, but the text has {n:,}")
    kept = np.ascontiguousarray(ids[: n * n_ctx].reshape(n, n_ctx))
    bos = tokenizer.bos if tokenizer.add_bos else None
    tokens = kept
    if bos is not None:
        tokens = kept.copy()
        tokens[:, 0] = bos
    return Chunks(
        tokens, kept, texts.names, texts.nbytes, len(ids), bos, tokenizer.vocabulary.fingerprint, tuple(notes)
    )

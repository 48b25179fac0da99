"""Turns text into tokens and chunks, exactly as llama.cpp's tools do, for checkpoints and GGUFs. May import model and
what is below.

A checkpoint's tokenizer is read in the form of the GGUF converted from it, so its tokens equal llama-tokenize's too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.catalogue import Catalogue
    from .chunking import Chunks
    from .encoding import Ids, Tokenizer

__all__ = ["chunks", "tokenize", "tokenizer"]

Name = str | os.PathLike[str]


def tokenizer(model: Catalogue | Name) -> Tokenizer:
    """Return the tokenizer of a model; `encode(text)` gives the tokens of a text. `model` is an argument or result of
    `quantkit.open_model`, whose `pre` opens a checkpoint with an unrecognized tokenizer. Raises SourceError,
    UnsupportedError."""
    from ..model.open import open_model
    from .encoding import Tokenizer
    from .vocabulary import vocabulary_of

    return Tokenizer(vocabulary_of(open_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model))


def tokenize(
    model: Catalogue | Name, text: str, *, add_special: bool = True, parse_special: bool = False
) -> Ids:  # fmt: skip
    """Return the tokens of a text, as llama-tokenize prints them: [n] i32. `add_special` adds a beginning-of-text token
    if the model wants one. With `parse_special`, the text of a control token becomes that token. Raises SourceError,
    UnsupportedError."""
    return tokenizer(model).encode(text, add_special=add_special, parse_special=parse_special)


def chunks(
    model: Catalogue | Name, texts: Name | Sequence[Name], n_ctx: int = 512, n_chunks: int | None = None, *,
    chat: bool = False, parse_special: bool = False,
) -> Chunks:  # fmt: skip
    """Cut texts into chunks of `n_ctx` tokens, at most `n_chunks`, as llama-imatrix and llama-perplexity process them.
    `texts` is one or several of: files, folders, .jsonl files and '-'. With `chat` they hold conversations, which the
    model's own chat template renders. Raises TextError, SourceError, UnsupportedError."""
    from .chunking import make_chunks

    several = [texts] if isinstance(texts, str | os.PathLike) else texts
    return make_chunks(tokenizer(model), several, n_ctx, n_chunks, chat=chat, parse_special=parse_special)

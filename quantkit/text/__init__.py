"""Text made into tokens and chunks, as llama.cpp's tools make them, for checkpoints and GGUFs. May import model and
what is below.

A checkpoint's tokenizer is read as the GGUF that is converted from it has it, so its tokens are llama-tokenize's too.
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
    """The tokenizer of a model, for many texts: `encode(text)` gives their tokens. A model is what
    `quantkit.open_model` takes or returns; with its `pre` it opens a checkpoint whose tokenizer is not recognized.
    Raises SourceError, UnsupportedError."""
    from ..model.open import open_model
    from .encoding import Tokenizer
    from .vocabulary import vocabulary_of

    return Tokenizer(vocabulary_of(open_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model))


def tokenize(
    model: Catalogue | Name, text: str, *, add_special: bool = True, parse_special: bool = False
) -> Ids:  # fmt: skip
    """The tokens of a text, those that llama-tokenize prints: [n] i32. `add_special` puts a beginning-of-text token in
    front for a model that wants it; with `parse_special` the text of a control token is that token. Raises SourceError,
    UnsupportedError."""
    return tokenizer(model).encode(text, add_special=add_special, parse_special=parse_special)


def chunks(
    model: Catalogue | Name, texts: Name | Sequence[Name], n_ctx: int = 512, n_chunks: int | None = None, *,
    chat: bool = False, parse_special: bool = False,
) -> Chunks:  # fmt: skip
    """Texts as chunks of `n_ctx` tokens, at most `n_chunks`, as llama-imatrix and llama-perplexity process them.
    `texts` are files, folders, .jsonl files and '-', one or several. With `chat` they are conversations, to which the
    model's own chat template is applied. Raises TextError, SourceError, UnsupportedError."""
    from .chunking import make_chunks

    several = [texts] if isinstance(texts, str | os.PathLike) else texts
    return make_chunks(tokenizer(model), several, n_ctx, n_chunks, chat=chat, parse_special=parse_special)

"""Reads prompts from files, and renders them as the text that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...base.errors import TextError, UnsupportedError
from ...model.catalogue import Catalogue
from ...text.chat import render
from ...text.encoding import Tokenizer
from ...text.sources import JSONL, Chat, read_chats, read_texts
from ...text.vocabulary import vocabulary_of


@dataclass(frozen=True)
class Prompt:
    """A text for a model to continue."""

    where: str
    text: str


def tokenizer_of(catalogue: Catalogue) -> Tokenizer | None:
    """The model's tokenizer; None if it cannot be rebuilt."""
    try:
        return Tokenizer(vocabulary_of(catalogue))
    except UnsupportedError:
        return None


def read_prompts(file: str, catalogue: Catalogue, chat: bool = False) -> list[Prompt]:
    """Read the prompts of a file. Each line of a .jsonl file has `messages`, which the model's chat template renders,
    or a `text`; in any other file each non-blank line is a prompt. With `chat`, each plain prompt is a user's message.
    Raises TextError, SourceError, UnsupportedError."""
    if file.lower().endswith(JSONL) and _has_messages(file):
        return as_chats(read_chats([file])[1], catalogue)
    documents = read_texts([file]).documents
    if file.lower().endswith(JSONL):
        places = [(f"{file} ({i})", text) for i, text in enumerate(documents, 1)]
    else:
        lines = "".join(documents).split("\n")
        places = [(f"{file}:{i}", text.strip()) for i, text in enumerate(lines, 1)]
    found = [Prompt(where, text) for where, text in places if text.strip()]
    if not found:
        raise TextError(f"{file}: has no prompts; give a file with one on each line")
    return of_user(found, catalogue) if chat else found


def of_user(prompts: Sequence[Prompt], catalogue: Catalogue) -> list[Prompt]:
    """Render prompts as a user's messages by the model's chat template. Raises what `read_prompts` raises."""
    return as_chats([Chat(p.where, [{"role": "user", "content": p.text}], None) for p in prompts], catalogue)


def as_chats(chats: Sequence[Chat], catalogue: Catalogue) -> list[Prompt]:
    """Render conversations up to where the model's reply begins. llama.cpp itself prepends a beginning-of-text token,
    so the template's own is removed."""
    tokenizer = Tokenizer(vocabulary_of(catalogue))
    texts = render(tokenizer, chats, reply=True)
    bos = tokenizer.bos
    if tokenizer.add_bos and bos is not None:
        texts = [text.removeprefix(tokenizer.vocabulary.tokens[bos]) for text in texts]
    return [Prompt(c.where, text) for c, text in zip(chats, texts, strict=True)]


def _has_messages(file: str) -> bool:
    try:
        with Path(file).open("rb") as f:
            first = next((line for line in f if line.strip()), b"")
    except OSError as e:
        raise TextError(f"{file}: cannot be read: {e.strerror or e}") from None
    return b'"messages"' in first

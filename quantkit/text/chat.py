"""Turns conversations into tokens by the model's own chat template."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import numpy as np

from ..base.errors import TextError
from . import rendering
from .encoding import Ids, Tokenizer
from .sources import Chat, Texts, read_chats


def encode_chats(
    tokenizer: Tokenizer, sources: Iterable[str | os.PathLike[str]], limit: int | None = None
) -> tuple[Ids, Texts]:
    """Return the tokens of conversations (see `read_chats`), concatenated, at most `limit`, each conversation made by
    `chat_tokens`; and their texts. Raises TextError."""
    names, chats = read_chats(sources)
    found: list[Ids] = []
    texts: list[str] = []
    n = 0
    for text in render(tokenizer, chats):
        texts.append(text)
        found.append(chat_tokens(tokenizer, text))
        n += len(found[-1])
        if limit is not None and n >= limit:
            break
    notes: tuple[str, ...] = ()
    if "strftime_now" in (tokenizer.vocabulary.chat_template or ""):
        notes = ("the chat template may write today's date, so another day may give other tokens",)
    read = Texts(names, tuple(texts), sum(len(text.encode()) for text in texts), notes)
    return np.concatenate(found)[:limit], read


def chat_tokens(tokenizer: Tokenizer, text: str) -> Ids:
    """Return the tokens of a conversation that a template has rendered: [n] i32. Special tokens are parsed. The
    beginning-of-text token is added if the model wants one and the template has not written it."""
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    if tokenizer.add_bos and tokenizer.bos is not None and (not len(ids) or ids[0] != tokenizer.bos):
        return np.concatenate([np.array([tokenizer.bos], np.int32), ids])
    return ids


def render(tokenizer: Tokenizer, chats: Sequence[Chat], reply: bool = False) -> list[str]:
    """Render each conversation by the model's chat template; with `reply`, up to where the model's reply begins. Raises
    TextError if there is no template, or it fails, refuses a conversation, or does not terminate."""
    v = tokenizer.vocabulary
    if not v.chat_template:
        raise TextError(
            f"{v.where}: has no chat template (tokenizer.chat_template), which --chat applies; give plain text"
        )
    if find_spec("jinja2") is None:
        raise TextError("jinja2, which applies chat templates, is not installed; run: pip install 'quantkit[lab]'")
    tokens = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": v.unk, "pad": v.pad}
    asked = {
        "template": v.chat_template,
        "tokens": {f"{kind}_token": v.tokens[i] for kind, i in tokens.items() if i is not None},
        "chats": [{"messages": c.messages, "tools": c.tools} for c in chats],
        "reply": reply,
    }
    done = subprocess.run(
        rendering.command(), input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8", check=False
    )
    its = f"{v.where}: its chat template"
    if done.returncode:
        seconds = int(rendering.SECONDS + rendering.SECONDS_EACH * len(chats))
        if done.returncode < 0:
            raise TextError(
                f"{its} was stopped: it did not come to an end in {seconds} seconds of processor time; give plain text"
            )
        raise TextError(f"{its} cannot be applied: {(done.stderr.strip().splitlines() or ['no word'])[-1][:300]}")
    said = json.loads(done.stdout)
    if "unreadable" in said:
        raise TextError(f"{its} cannot be read: {said['unreadable']}; give plain text, or a model whose template works")
    texts: list[str] = said["texts"]
    if "error" in said:
        raise TextError(f"{chats[len(texts)].where}: the chat template of {v.where} refuses it: {said['error']}")
    return texts

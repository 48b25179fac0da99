"""What is wrong with a tokenizer: findings, each with what goes wrong for whoever uses the model, and how it is mended.

What llama.cpp does, and this goes by: common/chat.cpp takes one beginning-of-text token away where template and
vocabulary both put it; src/llama-vocab.cpp corrects some tokens' types when it loads a file (vocabulary.py); the rows
of token_embd must be as many as the tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..base.errors import SourceError, TextError, UnsupportedError
from ..base.text import TextEnum
from ..gguf.header import INTEGERS, KV, decode
from ..gguf.pre_tokenizers import unknown_pre
from .chat import render
from .encoding import Tokenizer
from .known_tokens import ASSISTANT, END_THINK, THINK, USER, Family, family_of, pad_for
from .sources import Chat
from .splits import PRES
from .vocabulary import CONTROL, ENDS, UNKNOWN, USER_DEFINED, Vocabulary, read_vocabulary

#: tokenizer.ggml.pre of a checkpoint that was opened all the same
NOT_RECOGNIZED = "(not recognized)"
PAD_KEY = "tokenizer.ggml.padding_token_id"
_TYPES = {1: "normal", UNKNOWN: "unknown", CONTROL: "control", USER_DEFINED: "user-defined", 5: "unused", 6: "byte"}
_SPECIAL = re.compile(r"<(?:\||\uff5c)[^<>|\uff5c\s]{1,48}(?:\||\uff5c)>")
_UNUSED = 5
#: tokens of a table, and what they are called there
_NAMES = {THINK: THINK, END_THINK: END_THINK, USER: "User", ASSISTANT: "Assistant"}
#: tokens that are named in a finding; the rest are counted
_MOST_NAMED = 3


class Severity(TextEnum):
    """How bad a finding is, the worst first."""

    ERROR = "error"
    """the model is not loaded, or its texts are wrong"""
    WARNING = "warning"
    """some uses go wrong"""
    NOTE = "note"
    """nothing is wrong, but it is worth knowing"""


class Finding(NamedTuple):
    """Something about a tokenizer."""

    severity: Severity
    id: str
    what: str
    harm: str
    mend: str


class Role(NamedTuple):
    """A token with a role. `id` is None where there is none; `expected` is what the family has, if it is known."""

    role: str
    id: int | None
    text: str
    type: str
    expected: int | None


class Subject(NamedTuple):
    """A tokenizer, with what a check needs to know of its model."""

    where: str
    kvs: Sequence[KV]
    n_rows: int | None
    """rows of token_embd; None where that is not known"""
    is_checkpoint: bool


class Checked(NamedTuple):
    """What was found."""

    vocabulary: Vocabulary
    family: Family | None
    roles: tuple[Role, ...]
    findings: tuple[Finding, ...]
    """the worst first"""
    n_rows: int | None

    @property
    def is_fine(self) -> bool:
        """Whether there is nothing worse than notes."""
        return all(f.severity == Severity.NOTE for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        v = self.vocabulary
        return {
            "quantkit_tokenizer": 1,
            "file": v.where,
            "model": v.model,
            "pre": v.pre,
            "family": None if self.family is None else self.family.name,
            "tokens": len(v.tokens),
            "embedding_rows": self.n_rows,
            "fine": self.is_fine,
            "special": [role._asdict() for role in self.roles],
            "findings": [{**f._asdict(), "severity": str(f.severity)} for f in self.findings],
        }


def check(subject: Subject) -> Checked:
    """Look at a tokenizer. Raises SourceError for one that cannot be read at all, UnsupportedError for a kind that is
    not known here."""
    v = read_vocabulary(subject.kvs, subject.where)
    family = family_of(v.tokens)
    found = [*_pre(v, family), *_rows(v, subject), *_pad(v, family, subject), *_types(v)]
    try:
        tokenizer: Tokenizer | None = Tokenizer(v)
    except UnsupportedError as e:
        tokenizer = None
        found.append(Finding(Severity.NOTE, "not-run", str(e), "the texts of templates were not cut into tokens", ""))
    except SourceError as e:
        tokenizer = None
        if not any(f.id == "pre-unknown" for f in found):
            found.append(Finding(Severity.ERROR, "unusable", str(e), "llama.cpp stops", "convert the model again"))
    found += [*_template(v, tokenizer), *_expected(v, family)]
    order = list(Severity)
    found.sort(key=lambda f: order.index(f.severity))
    return Checked(v, family, _roles(v, family), tuple(found), subject.n_rows)


# ---------------------------------------------------------------- tokens with a role


def _roles(v: Vocabulary, family: Family | None) -> tuple[Role, ...]:
    ids = {text: v.tokens.index(text) for text in _NAMES if text in v.tokens}
    named: list[tuple[str, int | None, int | None]] = [
        ("BOS", v.bos, None), ("EOS", v.eos, None), ("padding", v.pad, pad_for(v.tokens, family)),
    ]  # fmt: skip
    named += [(_NAMES[text], ids.get(text), None) for text in _NAMES]
    usual: dict[str, int] = {}
    if family is not None:
        bos, eos = list(family.ids.values())[:2]
        usual = {"BOS": bos, "EOS": eos, **{_NAMES[text]: i for text, i in family.ids.items() if text in _NAMES}}
    out = []
    for role, i, expected in named:
        text = "" if i is None else v.tokens[i]
        type_ = "" if i is None else _TYPES.get(v.types[i], str(v.types[i]))
        out.append(Role(role, i, text, type_, usual.get(role, expected)))
    return tuple(out)


def _expected(v: Vocabulary, family: Family | None) -> Iterator[Finding]:
    """Tokens that are elsewhere than the family has them."""
    if family is None:
        return
    bos, eos = list(family.ids.values())[:2]
    for kind, said, wanted in (("bos", v.bos, bos), ("eos", v.eos, eos)):
        if said != wanted:
            is_ = "names no token" if said is None else f"is {said:,} ({v.tokens[said]!r:.40})"
            yield Finding(
                Severity.WARNING, f"{kind}-moved",
                f"tokenizer.ggml.{kind}_token_id {is_}; {family.name} has {wanted:,} ({v.tokens[wanted]!r})",
                "texts begin with a token that the model was not trained on" if kind == "bos" else "replies do not end",
                "convert the model again from its own tokenizer",
            )  # fmt: skip


# ---------------------------------------------------------------- the checks


def _pre(v: Vocabulary, family: Family | None) -> Iterator[Finding]:
    if v.model != "gpt2":
        return
    harm = "numbers, spaces and punctuation are cut otherwise than in training, and answers get worse without a word"
    mend = "build or convert it again with --pre" + (f" {family.pre}" if family is not None else " and its real name")
    if v.pre == NOT_RECOGNIZED:
        what = "the pre-tokenizer is not one that quantkit recognizes"
        yield Finding(Severity.ERROR, "pre-unknown", what, "build stops", "build with --pre and its name")
    elif v.pre == "default":
        yield Finding(Severity.ERROR, "pre-missing", "tokenizer.ggml.pre is missing or 'default'", harm, mend)
    elif says := unknown_pre(v.pre):
        yield Finding(
            Severity.ERROR,
            "pre-unknown",
            f"tokenizer.ggml.pre is {v.pre!r:.60}: {says}",
            "the file is not loaded",
            mend,
        )
    elif family is not None and v.pre != family.pre:
        same = v.pre in PRES and PRES[v.pre] == PRES[family.pre]
        yield Finding(
            Severity.NOTE if same else Severity.ERROR, "pre-other",
            f"tokenizer.ggml.pre is {v.pre!r}; the vocabulary is that of {family.name}, whose name is {family.pre!r}",
            "none: llama.cpp cuts texts by the same expressions for both" if same else harm, "" if same else mend,
        )  # fmt: skip


def _rows(v: Vocabulary, subject: Subject) -> Iterator[Finding]:
    n, unused = len(v.tokens), sum(t == _UNUSED for t in v.types)
    if subject.n_rows is not None and subject.n_rows != n:
        yield Finding(
            Severity.ERROR, "rows", f"there are {n:,} tokens, but token_embd has {subject.n_rows:,} rows",
            "llama.cpp does not load the file: token_embd has the wrong shape",
            "convert the model again; the vocabulary is padded to config.json's vocab_size",
        )  # fmt: skip
    elif unused:
        yield Finding(
            Severity.NOTE, "padded", f"{unused:,} of {n:,} tokens are unused, to fill the rows of token_embd",
            "none", "",
        )  # fmt: skip


def _pad(v: Vocabulary, family: Family | None, subject: Subject) -> Iterator[Finding]:
    own = pad_for(v.tokens, family)
    with_token = "TOKEN" if own is None else f"'{v.tokens[own]}'"
    by_fix = f"`--fix pad` sets {with_token}" if own is not None else "`--fix pad --pad-token TOKEN` sets another"
    mend = f"`quantkit build` with --pad-token {with_token}" if subject.is_checkpoint else by_fix
    item = next((item for item in subject.kvs if item.key == PAD_KEY), None)
    if v.pad is None:
        if item is not None:
            said = decode(item) if item.type in INTEGERS else "no number"
            what = f"{PAD_KEY} is {said}, and there are {len(v.tokens):,} tokens"
            yield Finding(Severity.WARNING, "pad-beyond", what, "programs that pad batches read beyond the rows", mend)
        else:
            what = "there is no padding token"
            yield Finding(Severity.NOTE, "pad-missing", what, "none in llama.cpp; fine-tuning needs one", mend)
    elif v.pad in (v.eos, v.bos):
        which = "end" if v.pad == v.eos else "beginning"
        harm = (
            "fine-tuning masks padding, so the model never learns to end its replies and generates without end"
            if v.pad == v.eos else "fine-tuning masks the beginning of texts"
        )  # fmt: skip
        what = f"the padding token is the {which}-of-text token ({v.pad}, {v.tokens[v.pad]!r:.60})"
        yield Finding(Severity.WARNING, f"pad-is-{'eos' if v.pad == v.eos else 'bos'}", what, harm, mend)


def _types(v: Vocabulary) -> Iterator[Finding]:
    """Special tokens that are not control tokens, as llama.cpp has them when it has loaded the file."""
    control = {s.id for s in v.specials if s.only_parsed}
    by_role = [(k, i) for k, i in (("BOS", v.bos), ("EOS", v.eos), ("padding", v.pad)) if i is not None]
    wrong = [f"{k} {i:,} ({v.tokens[i]!r:.40})" for k, i in by_role if i not in control and v.types[i] != _UNUSED]
    roles = {i for _, i in by_role}
    normal = [
        i
        for i, text in enumerate(v.tokens)
        if v.types[i] == 1 and i not in control | roles and _SPECIAL.fullmatch(text)
    ]
    wrong += [f"{i:,} ({v.tokens[i]!r:.40})" for i in normal]
    if wrong:
        more = f" and {len(wrong) - _MOST_NAMED:,} more" if len(wrong) > _MOST_NAMED else ""
        yield Finding(
            Severity.WARNING, "not-control",
            f"special tokens are not of type control: {', '.join(wrong[:_MOST_NAMED])}{more}",
            "they are shown in replies, and as text in a prompt they are cut into pieces or taken for commands",
            "convert the model again, with the special tokens marked so in tokenizer.json",
        )  # fmt: skip


def _template(v: Vocabulary, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    template = v.chat_template
    if not template:
        yield Finding(
            Severity.WARNING, "no-template", "there is no chat template (tokenizer.chat_template)",
            "llama-server takes ChatML's, and a model that knows other marks answers badly",
            "give --chat-template-file, or convert the model again from a checkpoint that has one",
        )  # fmt: skip
        return
    there = set(v.tokens)
    split = [text for text, _ in Counter(_SPECIAL.findall(template)).most_common() if text not in there]
    split += [text for text in (THINK, END_THINK) if text in template and text not in there]
    if split:
        said = ", ".join(split[:_MOST_NAMED]) + (
            f" and {len(split) - _MOST_NAMED} more" if len(split) > _MOST_NAMED else ""
        )
        yield Finding(
            Severity.WARNING, "split",
            f"the chat template writes what is no single token: {said}",
            "it is cut into several tokens, which the model was not trained on: turns and thinking are not recognized",
            "template and vocabulary are of two models; take both from one",
        )  # fmt: skip
    if tokenizer is None:
        return
    for text in (THINK, END_THINK):
        ids = tokenizer.encode(text, add_special=False, parse_special=True) if text in there else [0]
        if len(ids) > 1:
            i = v.tokens.index(text)
            yield Finding(
                Severity.WARNING, "think-split",
                f"{text} is token {i:,}, of type {_TYPES.get(v.types[i], '?')}, but as text becomes {len(ids)} tokens",
                "the model does not see that thinking begins or ends, and programs do not hide it",
                "convert the model again; its type should be user-defined or control",
            )  # fmt: skip
    yield from _rendered(v, tokenizer)


_TALK = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def _rendered(v: Vocabulary, tokenizer: Tokenizer) -> Iterator[Finding]:
    """What the template makes of a question and a reply."""
    try:
        (text,) = render(tokenizer, [Chat("a question and a reply", _TALK, None)])
    except TextError as e:
        yield Finding(Severity.NOTE, "not-rendered", str(e), "how a text begins and ends was not looked at", "")
        return
    bos = None if tokenizer.bos is None else v.tokens[tokenizer.bos]
    if bos and tokenizer.add_bos and text.startswith(bos):
        twice = text.startswith(bos + bos)
        yield Finding(
            Severity.WARNING if twice else Severity.NOTE, "two-bos",
            f"the chat template writes {bos}{' twice' if twice else ''}, and tokenizer.ggml.add_bos_token is true",
            "a program that renders the template and then tokenizes as usual begins with two; llama-cli and "
            "llama-server take one away", "leave it out of prompts that are written by hand",
        )  # fmt: skip
    last = re.search(r"<[^<>\s]{1,50}>\s*$", text)
    ids = tokenizer.encode(text.rstrip(), add_special=False, parse_special=True)
    end = int(ids[-1]) if len(ids) else None
    if end is None or end == tokenizer.eos:
        return
    if last is not None and v.tokens[end] in ENDS:
        return
    eos = "no end-of-text token" if tokenizer.eos is None else f"{v.tokens[tokenizer.eos]!r} ({tokenizer.eos:,})"
    is_special = end in {s.id for s in v.specials}
    yield Finding(
        Severity.WARNING if is_special else Severity.NOTE, "eos-other",
        f"a reply ends with {v.tokens[end]!r:.40} ({end:,}) in the chat template, and the end-of-text token is {eos}",
        "a reply does not end where the template ends it: generation goes on" if is_special
        else "none, unless the model was trained on such replies: then it does not end them",
        "convert the model again with the token that ends replies, or give --reverse-prompt" if is_special else "",
    )  # fmt: skip

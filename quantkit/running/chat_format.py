"""Finds the fixed texts that a model's chat template puts around messages, by rendering conversations.

A template is a program, but those of DeepSeek-V3 and R1, its distills, ChatML, Qwen2 and Llama 3 write fixed texts
around each message. `find` extracts those texts from the template's own output, and returns them only if they reproduce
the rendered text of every one of `PROBES`. So a template that does anything else is not mistaken for one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..base.errors import TextError
from ..text.chat import render
from ..text.encoding import Tokenizer
from ..text.sources import Chat

_S, _U, _A, _V = "Qsys7", "Quser7", "Qreply7", "Qagain7"
Message = Mapping[str, str]


def _talk(*said: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(said))]


#: ten conversations, each ending with the user
PROBES: tuple[list[Message], ...] = (
    _talk("Hello"),
    _talk("Hello", system="You are brief."),
    _talk("What is 2+2?", "4", "And 3+3?"),
    _talk("What is 2+2?", "4", "And 3+3?", system="Answer with a number."),
    _talk("one", "two", "three", "four", "five"),
    _talk("Write {{ .System }} and {% if x %} {{ messages }}", 'It\'s `{}` "so"', "'''\"\"\"'''"),
    _talk("first line\n\nsecond line\n\tthird", "a\nb", "c", system="line\nline"),
    _talk("模型 é 😀 ✓", "ﬁ 中文", "نص", system="Ünïcödé"),
    _talk("Why?", "<think>\nsince it\nis\n</think>So.", "Sure?"),
    _talk("Why?", "<think>a</think>So.", "Sure?", "<think>\n\n</think>Yes.", "Then go.", system="Think."),
)
#: conversations whose texts are taken apart to find the format
_PARTS = (_talk(_U), _talk(_U, _A), _talk(_U, _A, _V), _talk(_U, system=_S))


@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts around messages."""

    bos: str
    """the beginning-of-text token if the template writes it; not part of the other texts"""
    no_system: str
    """at the start of a conversation without a system message"""
    system: tuple[str, str]
    user: tuple[str, str]
    reply: tuple[str, str]
    generation: str
    """before the model's reply"""
    drops_thinking: bool = False
    """earlier replies lose everything up to </think>"""

    def text(self, messages: Sequence[Message]) -> str:
        """Render a conversation for the model to continue, without the beginning-of-text token."""
        system = [m["content"] for m in messages if m["role"] == "system"]
        out = self.system[0] + system[0] + self.system[1] if system else self.no_system
        for m in messages:
            if m["role"] == "user":
                out += self.user[0] + m["content"] + self.user[1]
            elif m["role"] == "assistant":
                said = m["content"].rpartition("</think>")[2] if self.drops_thinking else m["content"]
                out += self.reply[0] + said + self.reply[1]
        return out + self.generation


def find(tokenizer: Tokenizer) -> ChatFormat | None:
    """Find the format of a model's chat template; None if it is not made of fixed texts around messages. Raises
    TextError if there is no template or no jinja2, or if the template fails."""
    template = tokenizer.vocabulary.chat_template or ""
    parts = _rendered(tokenizer, _PARTS)
    if "strftime_now" in template:  # today's date would be kept for good
        return None
    try:
        with_reply, *texts = _rendered(tokenizer, (_PARTS[0], *PROBES), reply=True)
    except TextError:  # the template refuses one of them
        return None
    try:
        found = _taken_apart(tokenizer, parts, with_reply)
    except ValueError:
        return None
    for drops in (False, True):
        candidate = replace(found, drops_thinking=drops)
        if all(text == found.bos + candidate.text(p) for text, p in zip(texts, PROBES, strict=True)):
            return candidate
    return None


def _rendered(tokenizer: Tokenizer, talks: Sequence[list[Message]], reply: bool = False) -> list[str]:
    return render(tokenizer, [Chat("a conversation", talk, None) for talk in talks], reply)


def _taken_apart(tokenizer: Tokenizer, texts: Sequence[str], with_reply: str) -> ChatFormat:
    """Extract the texts of the format from the texts of `_PARTS`. Raises ValueError if they are not found."""
    start, user_end = _parts(texts[0], _U)
    _, _, reply_end = _parts(texts[1], _U, _A)
    start_again, between, and_then, _ = _parts(texts[2], _U, _A, _V)
    before, after, _ = _parts(texts[3], _S, _U)
    bos = tokenizer.vocabulary.tokens[tokenizer.bos] if tokenizer.bos is not None else ""
    if not (start == start_again and bos and start.startswith(bos) and before.startswith(bos)):
        bos = ""
    user = _without_start(and_then, reply_end)
    return ChatFormat(
        bos, _without_end(start.removeprefix(bos), user), (before.removeprefix(bos), _without_end(after, user)),
        (user, user_end), (_without_start(between, user_end), reply_end),
        _without_start(with_reply, start + _U + user_end),
    )  # fmt: skip


def _parts(text: str, *marks: str) -> list[str]:
    """Split a text at marks, each of which must occur once. Raises ValueError."""
    out: list[str] = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError
        before, _, text = text.partition(mark)
        out.append(before)
    return [*out, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError
    return text[: len(text) - len(end)]

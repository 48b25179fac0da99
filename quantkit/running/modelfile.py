"""Writes a Modelfile for Ollama: the model's file, its chat template as a Go template, parameters and stop tokens.

Ollama (template/template.go, parser/parser.go; read, not run here) adds the beginning-of-text token itself, gives a
template all system messages as .System, and removes thinking from replies if the template names .Thinking. A value in
triple quotes ends at the next triple quotes, and cannot hold unprintable characters. So texts with quotes, braces or
control characters are written as Go strings inside {{ }}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..base.errors import OutputError
from ..text.encoding import Tokenizer
from .advice import Sampling
from .chat_format import ChatFormat

#: names that `ollama create` accepts: host/namespace/model:tag
_NAME = re.compile(r"(?:[A-Za-z0-9_][\w.:-]*/){0,2}[A-Za-z0-9_][\w.-]*(?::[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_MOST = 256


@dataclass(frozen=True)
class Modelfile:
    """The content of a Modelfile. `template` None: none is written, and Ollama looks among its own templates for one
    like the file's."""

    model: str
    template: str | None
    sampling: Sampling
    context: int
    stops: tuple[str, ...]
    license: str

    def text(self) -> str:
        """Format it for Ollama. Raises OutputError for a model's name that cannot be written there."""
        try:
            out = [f"FROM {_value(self.model)}"]
        except ValueError:
            raise OutputError(f"{self.model!a}: has characters that a Modelfile cannot hold; rename the file") from None
        if self.template is not None:
            out.append(f'TEMPLATE """{self.template}"""')
        if self.sampling.temp is not None:
            out.append(f"PARAMETER temperature {self.sampling.temp:g}")
        out += [f"PARAMETER min_p {self.sampling.min_p:g}", f"PARAMETER num_ctx {self.context}"]
        out += [f"PARAMETER stop {_value(stop)}" for stop in self.stops]
        if self.license:
            out.append(f"LICENSE {_value(self.license)}")
        return "\n".join(out) + "\n"


def check_model_name(name: str) -> None:
    """Raise OutputError for a name that `ollama create` would refuse."""
    if len(name) > _MOST or not _NAME.fullmatch(name):
        raise OutputError(f"{name!a:.100}: is no name of a model for Ollama; give one such as r1 or me/r1:iq1_s")


def _value(text: str) -> str:
    """Format a value of a Modelfile. Raises ValueError for one that it cannot hold."""
    if not is_holdable(text):
        raise ValueError
    bare = text.isprintable() and text == text.strip() and not text.startswith('"')
    return text if bare else f'"""{text}"""'


def is_holdable(text: str) -> bool:
    """Whether a Modelfile can hold this as a value."""
    return (
        bool(text) and '"""' not in text and not text.endswith('"') and all(c.isprintable() or c == "\n" for c in text)
    )


def stops(f: ChatFormat | None, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts that end a reply: the end-of-text token, and the control tokens that the template puts around messages."""
    tokens = tokenizer.vocabulary.tokens
    found = [] if tokenizer.eos is None else [tokens[tokenizer.eos]]
    if f is not None:
        around = "\n".join((f.no_system, *f.system, *f.user, *f.reply, f.generation))
        found += [s.text for s in tokenizer.vocabulary.specials if s.only_parsed and s.text in around]
    return tuple(text for text in dict.fromkeys(found) if is_holdable(text))


# ---------------------------------------------------------------- the template


def go_template(f: ChatFormat, add_bos: bool) -> str:
    """Write the format in Go's template language, for Ollama's variables. With `add_bos`, Ollama adds the
    beginning-of-text token."""
    reply = _go(f.reply[0])
    if f.drops_thinking:  # tells Ollama the tags; only a reply to be continued keeps its thinking
        reply += "{{ if and $last .Thinking }}<think>\n{{ .Thinking }}\n</think>\n{{ end }}"
    system = f"{_go(f.system[0])}{{{{ .System }}}}{_go(f.system[1])}"
    return "".join((
        "" if add_bos else _go(f.bos),
        f"{{{{ if .System }}}}{system}{{{{ else }}}}{_go(f.no_system)}{{{{ end }}}}",
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
        f'{{{{ if eq .Role "user" }}}}{_go(f.user[0])}{{{{ .Content }}}}{_go(f.user[1])}',
        f'{{{{ else if eq .Role "assistant" }}}}{reply}{{{{ .Content }}}}',
        f"{{{{ if not $last }}}}{_go(f.reply[1])}{{{{ end }}}}{{{{ end }}}}",
        f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(f.generation)}{{{{ end }}}}{{{{ end }}}}',
    ))  # fmt: skip


def _go(text: str) -> str:
    """Write a text so that Go's template language reproduces it."""
    if all((ch.isprintable() and ch not in '{}"`') or ch == "\n" for ch in text):
        return text
    return f'{{{{ "{"".join(map(_in_go_string, text))}" }}}}'


def _in_go_string(ch: str) -> str:
    if ch.isprintable() and ch not in '"\\{}':
        return ch
    return f"\\u{ord(ch):04x}" if ord(ch) < 1 << 16 else f"\\U{ord(ch):08x}"


def license_text(values: Iterable[str]) -> str:
    """general.license and its link on one line."""
    lines: Sequence[str] = [" ".join(v.split()) for v in values if v.strip()]
    text = " ".join(lines)
    return text if is_holdable(text) else ""

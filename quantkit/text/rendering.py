"""Applies chat templates to conversations, in its own process: a template is a program by the model's author.

It runs in jinja2's sandbox, with limits on time and memory. `main` runs in that process. It reads one JSON object from
standard input and writes one: `texts`, up to the first conversation that has an `error`. The environment is that of
transformers' apply_chat_template.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

#: limits: seconds of processor time for the template and per conversation; bytes of memory; characters per conversation
SECONDS, SECONDS_EACH, MEMORY, LONGEST = 3, 0.02, 2 << 30, 1 << 26
#: keys for a reply's reasoning that models' templates use
_REASONING = ("reasoning_content", "thinking", "reasoning")


def command() -> list[str]:
    """The command that starts it with this process's module path."""
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from quantkit.text.rendering import main; main()"
    return [sys.executable, "-c", code, json.dumps(sys.path)]


def main() -> None:
    """Render the request on standard input."""
    asked = json.load(sys.stdin)
    seconds = int(SECONDS + SECONDS_EACH * len(asked["chats"]))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.write(json.dumps(_render(asked)))


def _render(asked: Mapping[str, Any]) -> dict[str, Any]:
    texts: list[str] = []
    try:
        template = _environment().from_string(asked["template"])
    except Exception as e:  # somebody else's program may raise anything
        return {"texts": texts, "unreadable": _said(e)}
    for chat in asked["chats"]:
        try:
            parts, n = [], 0
            for part in template.generate(
                messages=[_message(m) for m in chat["messages"]], tools=chat["tools"], documents=None,
                add_generation_prompt=asked.get("reply", False), **asked["tokens"],
            ):  # fmt: skip
                parts.append(part)
                n += len(part)
                if n > LONGEST:
                    raise ValueError(f"the text has more than {LONGEST:,} characters")
            text = "".join(parts)
            text.encode()
        except Exception as e:
            return {"texts": texts, "error": _said(e)}
        texts.append(text)
    return {"texts": texts}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare a message for templates: drop null values, and give its reasoning under each usual key."""
    out = {key: value for key, value in message.items() if value is not None}
    reasoning = next((out[key] for key in _REASONING if key in out), None)
    return out if reasoning is None else {"thinking": reasoning, **out, "reasoning_content": reasoning}


def _said(e: Exception) -> str:
    line = getattr(e, "lineno", None)
    said = " ".join(str(e).split())[:300] or type(e).__name__
    if isinstance(e, MemoryError):
        said = f"it wants more than {MEMORY:,} bytes of memory"
    return said if line is None else f"line {line}: {said}"


def _environment() -> Any:
    """jinja2's sandbox with the extensions that chat templates use."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, which marks a reply and produces no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Sequence[str] | None = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        pair = None if separators is None else (separators[0], separators[1])
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)

    def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": make_dict,
    }
    return env

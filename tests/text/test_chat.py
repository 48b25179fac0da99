"""Chat templates: transformers' texts and tokens, and templates that fail, refuse, or do not end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import factory
import pytest
from transformers import AutoTokenizer
from vocabularies import changed, made

from quantkit.base.errors import TextError
from quantkit.gguf.header import STRING, kv
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.text.chat import chat_tokens, encode_chats, render
from quantkit.text.chunking import make_chunks
from quantkit.text.encoding import Tokenizer, _byte_letters
from quantkit.text.sources import Chat
from quantkit.text.vocabulary import read_vocabulary, vocabulary_of

CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": "Where do bits matter?"},
        {"role": "assistant", "content": "In <think>é</think> 中."},
    ],
    [{"role": "system", "content": "Be <｜User｜>\n brief "}, {"role": "user", "content": "'It''s' & <b>"}],
    [{"role": "assistant", "content": "x", "reasoning": "why", "name": None}],
]
#: as those of the models are: blocks with spaces around, loop controls, marks of replies, JSON, reasoning
TEMPLATE = """\
{{ bos_token }}{%- set ns = namespace(n=0) %}
  {% if tools %}
{{ tools | tojson(indent=2) }}
  {% endif %}
{% for m in messages %}
    {% if m.role == 'none' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
<｜User｜>{{ m['role'] | title }}: {% generation %}{{ m.content | trim }}{% endgeneration %}
{%- if m.reasoning_content is defined %}
({{ m.thinking }}, {{ m.reasoning_content }}){% endif %}{{ m | tojson }}
{% endfor %}{{ ns.n }}{{ dict(a=1) }}{{ eos_token }}{{ pad_token }}
{% if add_generation_prompt %}never{% endif %}
"""
WORKS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def with_template(folder: Path, template: str, name: str = "") -> Path:
    model = factory.checkpoint(folder / "m", factory.SMALL_V3)
    if name:
        (model / name).write_text(template, "utf-8")
        factory.edit_json(model / "tokenizer_config.json", lambda c: c.pop("chat_template"))
    else:
        factory.edit_json(model / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    return model


def of_checkpoint(model: Path) -> Tokenizer:
    """With the pre-tokenizer that the demo's tokenizer really has."""
    return Tokenizer(vocabulary_of(open_model(str(model), Options(pre="gpt-2"))))


def chats(messages: Sequence[Any], tools: list[Any] | None = None) -> list[Chat]:
    return [Chat(f"chats.jsonl:{i}", m, tools) for i, m in enumerate(messages, 1)]


def with_bytes(template: str | None, **values: Any) -> Tokenizer:
    """A token for each byte."""
    kvs = made(
        [*_byte_letters(), "<s>"], [], token_type=[1] * 256 + [3], bos_token_id=256, add_bos_token=True, **values
    )
    kvs = changed(kvs)
    if template is not None:
        kvs.append(kv("tokenizer.chat_template", STRING, template))
    return Tokenizer(read_vocabulary(kvs, "model"))


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize(("template", "file"), [(TEMPLATE, ""), (TEMPLATE, "chat_template.jinja"), ("", "")])
def test_texts_and_tokens_are_those_of_transformers(tmp_path: Path, template: str, file: str) -> None:
    """With each place of a template, and with the demo's own."""
    model = (
        with_template(tmp_path, template, file) if template else factory.checkpoint(tmp_path / "m", factory.SMALL_V3)
    )
    theirs: Any = AutoTokenizer.from_pretrained(str(model))
    tools = [{"type": "function", "function": {"name": "é<", "parameters": {}}}]
    tokenizer = of_checkpoint(model)
    texts = render(tokenizer, chats(CHATS, tools))
    assert texts == [theirs.apply_chat_template(c, tools=tools, tokenize=False) for c in CHATS]
    ids = [chat_tokens(tokenizer, text).tolist() for text in texts]
    assert ids == [list(theirs.apply_chat_template(c, tools=tools, tokenize=True)["input_ids"]) for c in CHATS]
    assert all(each[0] == 0 and each.count(0) == 1 for each in ids)


# ---------------------------------------------------------------- alone


def test_the_beginning_of_a_text_comes_once(tmp_path: Path) -> None:
    f = tmp_path / "c.jsonl"
    f.write_text("".join(json.dumps({"messages": [{"content": t}]}) + "\n" for t in ("ab", "c<s>d")))
    for template in (WORKS, WORKS.replace("{{ bos_token }}", "")):
        ids, texts = encode_chats(with_bytes(template), [f])
        assert ids.tolist() == [256, 97, 98, 256, 99, 256, 100]
    assert (texts.documents, texts.nbytes, texts.names) == (("ab", "c<s>d"), 7, (str(f),))
    chunked = make_chunks(with_bytes(WORKS), [f], 3, chat=True)
    assert chunked.text_tokens.tolist() == [[256, 97, 98], [256, 99, 256]]
    assert chunked.tokens.tolist() == [[256, 97, 98], [256, 99, 256]]
    assert encode_chats(with_bytes(WORKS), [f], 4)[0].tolist() == [256, 97, 98, 256]


def test_a_template_that_writes_the_date_is_remarked_on(tmp_path: Path) -> None:
    f = tmp_path / "c.jsonl"
    f.write_text('{"messages": [{"content": "a"}]}')
    _, texts = encode_chats(with_bytes("{{ strftime_now('%Y') }}"), [f])
    assert len(texts.documents[0]) == 4
    assert texts.notes == ("the chat template may write today's date, so another day may give other tokens",)


SURROGATE = "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed"
REFUSES = "chats.jsonl:1: the chat template of model refuses it: "


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "model: has no chat template (tokenizer.chat_template), which --chat applies; give plain text"),
        (
            "a\n{% for %}",
            "model: its chat template cannot be read: line 2: Expected an expression, got 'end of statement block'; "
            "give plain text, or a model whose template works",
        ),
        ("{{ raise_exception('roles must alternate') }}", REFUSES + "roles must alternate"),
        ("{{ messages[7].content }}", REFUSES + "list object has no element 7"),
        ("{{ messages[0].content + 1 }}", REFUSES + 'can only concatenate str (not "int") to str'),
        (
            "{{ ''.__class__.__mro__ }}",
            REFUSES + "access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ messages.append(1) }}", REFUSES + "access to attribute 'append' of 'list' object is unsafe."),
        ("{% include 'x' %}", REFUSES + "no loader for this environment specified"),
        ("{{ 'a' * 10000000000 }}", REFUSES + "it wants more than 2,147,483,648 bytes of memory"),
        ("{{ 'a' * 100000000 }}", REFUSES + "the text has more than 67,108,864 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", REFUSES + "maximum recursion depth exceeded"),
        ("{{ '\\ud800' }}", REFUSES + SURROGATE),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "model: its chat template was stopped: it did not come to an end in 3 seconds of processor time; give "
            "plain text",
        ),
    ],
)  # fmt: skip
def test_templates_that_fail(template: str | None, says: str) -> None:
    with pytest.raises(TextError) as e:
        render(with_bytes(template), chats([[{"role": "user", "content": "hi"}]]))
    assert str(e.value).startswith(says) if "recursion" in says else str(e.value) == says


def test_the_conversation_that_is_refused_is_named() -> None:
    template = "{% if messages[0].content == 'c' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(TextError) as e:
        render(with_bytes(template), chats([[{"content": c}] for c in "abcd"]))
    assert str(e.value) == "chats.jsonl:3: the chat template of model refuses it: no"

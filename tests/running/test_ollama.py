"""quantkit ollama: Modelfiles whose template makes the text that the model's own makes, and `ollama create`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import factory
import go_template
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from smollm2 import smollm2

from quantkit.base.errors import OutputError, TextError
from quantkit.gguf.header import BOOL, I32, STRING, U32, kv, kv_array
from quantkit.gguf.split import open_set
from quantkit.model.open import open_model
from quantkit.running.advice import Sampling
from quantkit.running.chat_format import PROBES, ChatFormat, find
from quantkit.running.modelfile import Modelfile, check_model_name, is_holdable
from quantkit.running.modelfile import go_template as translated
from quantkit.text.chat import render
from quantkit.text.encoding import Tokenizer
from quantkit.text.sources import Chat
from quantkit.text.vocabulary import vocabulary_of

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content KEEP }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>THINK{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}" + _ROLES
)
#: shaped as those of the families; R1's and its distills' drop earlier thinking
TEMPLATES = {
    "DeepSeek-V3": _DEEPSEEK.replace("KEEP", "").replace("THINK", ""),
    "DeepSeek-R1": _DEEPSEEK.replace("m.content KEEP", "m.content.split('</think>')[-1]").replace("THINK", "<think>\n"),
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Qwen2": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are {\"Qwen\"}."
    "`<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Llama-3": "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>"
    "assistant<|end_header_id|>\n\n{% endif %}",
}  # fmt: skip
#: each does something that is no fixed text around messages
OTHERS = {
    "today": "{{ strftime_now('%Y') }}" + TEMPLATES["ChatML"],
    "numbered": "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "shouted": "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
    "shortened": "{% for m in messages %}<{{ m.role }}>{{ m.content[:12] }}{% endfor %}",
    "refused": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    "{% endfor %}",
}  # fmt: skip


def gguf(path: Path, template: str | None, add_bos: bool = True, license_: str = "mit") -> Path:
    tokens = [BOS, EOS, "a", "b", "<｜User｜>", "<｜Assistant｜>", "<|im_start|>", "<|im_end|>"]
    kvs = [
        kv("general.architecture", STRING, "llama"), kv("general.name", STRING, "m"), kv("llama.block_count", U32, 1),
        kv("general.license", STRING, license_), kv("llama.embedding_length", U32, 256),
        kv("llama.attention.head_count", U32, 4), kv("tokenizer.ggml.model", STRING, "gpt2"),
        kv_array("tokenizer.ggml.tokens", STRING, tokens),
        kv_array("tokenizer.ggml.token_type", I32, [3, 3, 1, 1, 3, 3, 3, 3]),
        kv_array("tokenizer.ggml.merges", STRING, ["a b"]), kv("tokenizer.ggml.bos_token_id", U32, 0),
        kv("tokenizer.ggml.eos_token_id", U32, 1), kv("tokenizer.ggml.add_bos_token", BOOL, add_bos),
    ]  # fmt: skip
    kvs += [] if template is None else [kv("tokenizer.chat_template", STRING, template)]
    tensors = {name: ((256, 4), "F32", bytes(4096)) for name in ("token_embd.weight", "blk.0.attn_q.weight")}
    return factory.gguf_file(path, tensors, kvs)


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer(vocabulary_of(open_model(str(path))))


def as_ollama_reads(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile, by the rules of Ollama's parser for what quantkit writes: a value ends at the end of
    the line, or in triple quotes at the next three; what is not printable is lost."""
    out = []
    while text:
        command, _, text = text.partition(" ")
        if command == "PARAMETER":
            command, _, text = text.partition(" ")
        if text.startswith('"""'):
            value, _, text = text[3:].partition('"""')
            assert text.startswith("\n")
            text = text[1:]
        else:
            value, _, text = text.partition("\n")
        out.append((command, "".join(ch for ch in value if ch.isprintable() or ch == "\n")))
    return out


def check_against_own(path: Path, folder: Path) -> ChatFormat:
    """The translated template makes of all ten conversations what the model's own makes."""
    tokenizer = tokenizer_of(path)
    found = find(tokenizer)
    assert found is not None
    assert len(PROBES) == 10
    template = translated(found, tokenizer.add_bos)
    assert '"""' not in template
    text = Modelfile("m.gguf", template, Sampling(0.6, 0.05, 1, ""), 8192, (), "").text()
    (read,) = (value for command, value in as_ollama_reads(text) if command == "TEMPLATE")
    assert read == template
    own = render(tokenizer, [Chat("probe", p, None) for p in PROBES], reply=True)
    start = found.bos if tokenizer.add_bos else ""  # Ollama puts it in front
    data = [go_template.collated(p, ".Thinking" in template) for p in PROBES]
    assert [start + go_template.rendered(template, d) for d in data] == own
    by_go = go_template.by_go(template, data, folder)
    if by_go is not None:
        assert [start + t for t in by_go] == own
    return found


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("family", TEMPLATES)
def test_ten_conversations(tmp_path: Path, family: str, add_bos: bool) -> None:
    found = check_against_own(gguf(tmp_path / "m.gguf", TEMPLATES[family], add_bos), tmp_path)
    assert found.drops_thinking == (family == "DeepSeek-R1")


def test_ten_conversations_of_real_models(tmp_path: Path) -> None:
    assert check_against_own(smollm2(), tmp_path).no_system.endswith("trained by Hugging Face<|im_end|>\n")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_templates_are_not_translated(tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizer_of(gguf(tmp_path / "m.gguf", OTHERS[kind]))
    if kind == "refused":
        with pytest.raises(TextError, match="refuses it: no"):
            find(tokenizer)
    else:
        assert find(tokenizer) is None


texts = st.text(max_size=20)


@given(texts, texts, texts, texts, texts)
def test_any_texts_around_messages(a: str, b: str, c: str, d: str, e: str) -> None:
    """Braces, quotes and control characters of a template come out of the Modelfile's as they were."""
    found = ChatFormat("", a, (b, c), (d, e), (c, a), b)
    template = translated(found, False)
    assert '"""' not in template
    assert all(ch.isprintable() or ch == "\n" for ch in template)
    for probe in PROBES:
        assert go_template.rendered(template, go_template.collated(probe, False)) == found.text(probe)


# ---------------------------------------------------------------- Modelfiles


@given(st.text(min_size=1))
def test_values_come_back(value: str) -> None:
    if not is_holdable(value):
        with pytest.raises(OutputError, match="has characters that a Modelfile cannot hold; rename the file"):
            Modelfile(value, None, Sampling(None, 0.05, 1, ""), 8192, (), "").text()
        return
    text = Modelfile(value, None, Sampling(None, 0.05, 1, ""), 8192, (value,), value).text()
    assert as_ollama_reads(text) == [
        ("FROM", value), ("min_p", "0.05"), ("num_ctx", "8192"), ("stop", value), ("LICENSE", value),
    ]  # fmt: skip


def test_names_of_models() -> None:
    for name in ("r1", "me/r1:iq1_s", "host.example:8080/me/r1"):
        check_model_name(name)
    for name in ("-f", "", "a b", "../x", "a/b/c/d", "x\n", "é", "a" * 300):
        with pytest.raises(OutputError, match="is no name of a model for Ollama; give one such as r1"):
            check_model_name(name)


# ---------------------------------------------------------------- the command


def ollama(folder: Path, code: int = 0) -> dict[str, str]:
    """An `ollama` on PATH that writes down what it is given."""
    (folder / "bin").mkdir()
    fake = folder / "bin" / "ollama"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/told\nexit {code}\n')
    fake.chmod(0o755)
    return {"PATH": f"{folder}/bin:/usr/bin:/bin"}


def test_create(quantkit: Run, tmp_path: Path) -> None:
    gguf(tmp_path / "m.gguf", TEMPLATES["DeepSeek-R1"])
    env = ollama(tmp_path)
    done = quantkit("ollama", "m.gguf", "me/m:x", "--create", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told").read_text().splitlines() == ["create", "me/m:x", "-f", "Modelfile"]
    said = as_ollama_reads((tmp_path / "Modelfile").read_text("utf-8"))
    assert [each for each in said if each[0] != "TEMPLATE"] == [
        ("FROM", "./m.gguf"), ("temperature", "0.6"), ("min_p", "0.05"), ("num_ctx", "8192"), ("stop", EOS),
        ("stop", "<｜Assistant｜>"), ("stop", "<｜User｜>"), ("LICENSE", "mit"),
    ]  # fmt: skip
    done = quantkit("ollama", "m.gguf", "m", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        7, "error: Modelfile: exists; choose another name, or replace it with --force\n",
    )  # fmt: skip


def test_without_ollama_it_says_what_to_do(quantkit: Run, tmp_path: Path) -> None:
    gguf(tmp_path / "m.gguf", TEMPLATES["ChatML"])
    env = {"PATH": "/nowhere"}
    done = quantkit("ollama", "m.gguf", "m", "--create", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (
        10, "error: ollama is not on PATH; Modelfile is there. Install Ollama, then: ollama create m -f Modelfile\n",
    )  # fmt: skip
    done = quantkit("ollama", "m.gguf", "m", "--force", cwd=tmp_path, env=env)
    assert done.stdout.splitlines()[-1] == "next: ollama create m -f Modelfile && ollama run m"


def test_shards_are_merged(quantkit: Run, sound_set: Path, tmp_path: Path) -> None:
    done = quantkit("ollama", sound_set, "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (merged,) = tmp_path.glob("*.gguf")
    assert len(open_set(merged).inputs) == 1
    first = min(sound_set.iterdir())
    assert quantkit("merge", first, "theirs", cwd=tmp_path).returncode == 0
    assert merged.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert as_ollama_reads((tmp_path / "Modelfile").read_text("utf-8"))[0] == ("FROM", f"./{merged.name}")


@pytest.mark.parametrize("template", [OTHERS["numbered"], None])
def test_what_is_not_translated_is_said(quantkit: Run, tmp_path: Path, template: str | None) -> None:
    gguf(tmp_path / "m.gguf", template)
    done = quantkit("ollama", "m.gguf", "m", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch(r"warning: .* so the Modelfile has no TEMPLATE: .* add a TEMPLATE by hand\n", done.stderr)
    said: dict[str, Any] = dict(as_ollama_reads((tmp_path / "Modelfile").read_text("utf-8")))
    assert "TEMPLATE" not in said


def test_hostile_names_and_licences(quantkit: Run, tmp_path: Path) -> None:
    name = " \"x'; touch pwned.gguf"
    gguf(tmp_path / name, TEMPLATES["ChatML"], license_='a\nFROM /etc/passwd\n"""\nSYSTEM evil\x1b')
    done = quantkit("ollama", name, "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = as_ollama_reads((tmp_path / "Modelfile").read_text("utf-8"))
    assert [value for command, value in said if command == "FROM"] == [f"./{name}"]
    assert not any(command in ("SYSTEM", "LICENSE") for command, _ in said)
    bad = tmp_path / 'y"""\nFROM z.gguf'
    gguf(bad, TEMPLATES["ChatML"])
    done = quantkit("ollama", bad, "n", "-o", "other", cwd=tmp_path)
    assert done.returncode == 7
    assert "has characters that a Modelfile cannot hold; rename the file" in done.stderr
    assert not (tmp_path / "other").exists()

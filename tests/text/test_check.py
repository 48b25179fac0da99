"""What is wrong with a tokenizer: each finding on a vocabulary with that fault only, and the padding token mended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import factory
import pytest
import vocabularies
from click.testing import CliRunner
from conftest import Run
from hub_server import Hub
from vocabularies import changed

from quantkit.base.errors import OutputError, SourceError, UnsupportedError
from quantkit.cli import cli
from quantkit.gguf.header import KV, STRING, decode, kv, read_header
from quantkit.text.check import PAD_KEY, Severity, Subject, check
from quantkit.text.known_tokens import ASSISTANT, BOS, END_THINK, EOS, FAMILIES, PADS, THINK, USER, family_of, pad_for

#: as R1's: it begins with BOS, and a reply ends with EOS
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}" + USER + "{{ m['content'] }}{% else %}"
    + ASSISTANT + "{{ m['content'] }}" + EOS + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    + ASSISTANT + THINK + "\n{% endif %}"
)  # fmt: skip


def with_template(kvs: list[KV], template: str | None) -> list[KV]:
    kept = [k for k in kvs if k.key != "tokenizer.chat_template"]
    return kept if template is None else [*kept, kv("tokenizer.chat_template", STRING, template)]


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> list[KV]:
    """The real vocabulary of V3, with R1's template, and a padding token of its own."""
    kvs = vocabularies.deepseek_v3_kvs(tmp_path_factory.mktemp("v3"))
    return with_template(changed(kvs, padding_token_id=2, add_bos_token=False), TEMPLATE)


def found(kvs: list[KV], n_rows: int | None = None, is_checkpoint: bool = False) -> dict[str, Severity]:
    return {f.id: f.severity for f in check(Subject("m", kvs, n_rows, is_checkpoint)).findings}


def test_nothing_is_wrong(r1: list[KV]) -> None:
    made = check(Subject("m", r1, 129280, False))
    assert made.is_fine
    assert made.family is FAMILIES[0]
    assert [f.id for f in made.findings] == ["padded"]
    assert [(r.role, r.id, r.expected, r.type) for r in made.roles] == [
        ("BOS", 0, 0, "control"), ("EOS", 1, 1, "control"), ("padding", 2, 2, "control"),
        (THINK, 128798, 128798, "user-defined"), (END_THINK, 128799, 128799, "user-defined"),
        ("User", 128803, 128803, "control"), ("Assistant", 128804, 128804, "control"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "finding", "severity"),
    [
        ({"padding_token_id": 1}, "pad-is-eos", Severity.WARNING),
        ({"padding_token_id": 0}, "pad-is-bos", Severity.WARNING),
        ({"padding_token_id": 129280}, "pad-beyond", Severity.WARNING),
        ({"padding_token_id": None}, "pad-missing", Severity.NOTE),
        ({"pre": "deepseek-v4"}, "pre-unknown", Severity.ERROR),
        ({"pre": "default"}, "pre-missing", Severity.ERROR),
        ({"pre": None}, "pre-missing", Severity.ERROR),
        ({"pre": "qwen2"}, "pre-other", Severity.ERROR),
        ({"pre": "superbpe"}, "not-run", Severity.NOTE),
        ({"add_bos_token": True}, "two-bos", Severity.NOTE),
        ({"eos_token_id": 128803}, "eos-moved", Severity.WARNING),
        ({"bos_token_id": 5}, "bos-moved", Severity.WARNING),
    ],
)
def test_one_fault(r1: list[KV], change: dict[str, Any], finding: str, severity: Severity) -> None:
    assert found(changed(r1, **change))[finding] == severity
    # each says what goes wrong, and if it is wrong, how it is mended
    for f in check(Subject("m", changed(r1, **change), None, False)).findings:
        assert f.what
        assert f.harm
        assert f.mend or f.severity == Severity.NOTE


def test_templates(r1: list[KV]) -> None:
    assert found(with_template(r1, None))["no-template"] == Severity.WARNING
    twice = with_template(changed(r1, add_bos_token=True), "{{ bos_token }}" + TEMPLATE)
    assert found(twice)["two-bos"] == Severity.WARNING
    assert found(with_template(r1, TEMPLATE.replace(USER, "<|im_start|>")))["split"] == Severity.WARNING
    unfinished = found(with_template(r1, TEMPLATE.replace(EOS, "")))
    assert unfinished["eos-other"] == Severity.NOTE
    assert found(with_template(r1, TEMPLATE.replace(EOS, USER)))["eos-other"] == Severity.WARNING
    assert found(with_template(r1, "{{ raise_exception('no') }}"))["not-rendered"] == Severity.NOTE


def test_types(r1: list[KV]) -> None:
    types = list(decode(next(k for k in r1 if k.key.endswith("token_type"))))
    normal = types.copy()
    normal[128803] = normal[2] = 1
    made = check(Subject("m", changed(r1, token_type=normal), None, False))
    (f,) = (f for f in made.findings if f.id == "not-control")
    assert f.what.endswith(f"not of type control: padding 2 ({PADS[0]!r}), 128,803 ({USER!r})")
    normal = types.copy()
    normal[128798] = 1
    assert found(changed(r1, token_type=normal))["think-split"] == Severity.WARNING
    # what llama.cpp corrects when it loads a file is not wrong
    eos = types.copy()
    eos[1] = 1
    assert "not-control" not in found(changed(r1, token_type=eos))


def test_thinking_tokens_that_are_not_there(r1: list[KV]) -> None:
    tokens = list(decode(next(k for k in r1 if k.key.endswith("ggml.tokens"))))
    tokens[128798], tokens[128799] = "<a>", "<b>"
    assert found(changed(r1, tokens=tokens))["split"] == Severity.WARNING


def test_rows(r1: list[KV]) -> None:
    assert found(r1, 129281)["rows"] == Severity.ERROR
    assert "rows" not in found(r1, 129280)


def test_the_same_expressions_by_another_name_are_no_fault() -> None:
    """Distill-Qwen's pre-tokenizer is qwen2's."""
    family = FAMILIES[1]
    tokens = [f"t{i}" for i in range(151936)]
    for text, i in family.ids.items():
        tokens[i] = text
    tokens[151654] = family.pad
    kvs = vocabularies.made(
        tokens, ["t 1"], pre="qwen2", token_type=[1] * 151643 + [3] * 293, bos_token_id=151646, eos_token_id=151643,
        padding_token_id=151643, add_bos_token=False,
    )  # fmt: skip
    assert family_of(tokens) is family
    assert pad_for(tokens, family) == 151654
    said = found(kvs)
    assert said["pre-other"] == Severity.NOTE
    assert said["pad-is-eos"] == Severity.WARNING
    assert found(changed(kvs, pre="deepseek-v3"))["pre-other"] == Severity.ERROR


def test_a_family_pads_with_its_own_token() -> None:
    llama = FAMILIES[2]
    tokens = [f"t{i}" for i in range(128256)]
    for text, i in llama.ids.items():
        tokens[i] = text
    tokens[128004], tokens[128015] = llama.pad, PADS[0]
    assert family_of(tokens) is llama
    assert pad_for(tokens, llama) == 128004
    assert pad_for(tokens, None) == 128015
    assert pad_for(["a", "b"], None) is None


#: of R1-Distill-Qwen's tokenizer_config.json (added_tokens_decoder, from its end-of-text token on); config.json says
#: 151643 of BOS and EOS, as Qwen2.5's does
QWEN_FROM = 151643
QWEN = (EOS, USER, ASSISTANT, BOS, "<|EOT|>", THINK, END_THINK, "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
        "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
        "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
        "<|file_sep|>")  # fmt: skip
#: of R1-Distill-Llama: config.json has BOS and EOS, Llama 3.1 its padding token; the rest is Unsloth's table
LLAMA = {BOS: 128000, EOS: 128001, "<|finetune_right_pad_id|>": 128004, USER: 128011, ASSISTANT: 128012, THINK: 128013,
         END_THINK: 128014}  # fmt: skip


def distill(path: Path, kind: str) -> Path:
    """A GGUF with a distill's special tokens where its files have them, its pre-tokenizer, and no weights."""
    ids = {text: QWEN_FROM + i for i, text in enumerate(QWEN)} if kind == "qwen" else LLAMA
    tokens = [f"t{i}" for i in range(152064 if kind == "qwen" else 128256)]
    types = [1] * len(tokens)
    for text, i in ids.items():
        tokens[i], types[i] = text, 4 if text in (THINK, END_THINK) else 3
    plain = [b for b in range(256) if 0x21 <= b < 0x7F or 0xA1 <= b < 0xAD or b >= 0xAE]
    tokens[:256] = [*map(chr, plain), *(chr(0x100 + n) for n in range(256 - len(plain)))]  # a letter for each byte
    kvs = vocabularies.made(
        tokens, [], pre="deepseek-r1-qwen" if kind == "qwen" else "llama-bpe", token_type=types, bos_token_id=ids[BOS],
        eos_token_id=ids[EOS], padding_token_id=ids[EOS], add_bos_token=True,
    )  # fmt: skip
    return vocabularies.gguf_of(path, with_template(kvs, TEMPLATE))


@pytest.mark.parametrize(("kind", "family", "pad"), [("qwen", 1, 151654), ("llama", 2, 128004)])
def test_the_ids_of_the_distills(kind: str, family: int, pad: int, tmp_path: Path) -> None:
    """Each special token is where the table has it; the fault that these files come with is found and mended."""
    path = distill(tmp_path / "d.gguf", kind)
    code, said = run(path, "--json")
    made = json.loads(said)
    assert (code, made["family"]) == (1, FAMILIES[family].name)
    roles = {r["role"]: (r["id"], r["expected"]) for r in made["special"]}
    assert {role: i for role, (i, _) in roles.items()} == {
        "BOS": FAMILIES[family].ids[BOS], "EOS": FAMILIES[family].ids[EOS], "padding": FAMILIES[family].ids[EOS],
        THINK: FAMILIES[family].ids[THINK], END_THINK: FAMILIES[family].ids[END_THINK],
        "User": FAMILIES[family].ids[USER], "Assistant": FAMILIES[family].ids[ASSISTANT],
    }  # fmt: skip
    assert [role for role, (i, expected) in roles.items() if i != expected] == ["padding"]
    assert roles["padding"][1] == pad
    ids = {f["id"] for f in made["findings"] if f["severity"] != "note"}
    assert ids == {"pad-is-eos"}
    code, said = run(path, "--fix", "pad")
    assert code == 0, said
    key = next(k for k in read_header(path).kvs if k.key == PAD_KEY)
    assert decode(key) == pad
    moved = {"qwen": "deepseek-v3", "llama": "deepseek-r1-qwen"}[kind]
    assert found(changed(read_header(path).kvs, pre=moved))["pre-other"] == Severity.ERROR


# ---------------------------------------------------------------- the command


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["tokenizer", "check", *map(str, words)], env={"COLUMNS": ""})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_a_built_file_is_mended_and_back(copied: Path) -> None:
    before = copied.read_bytes()
    code, text = run(copied)
    assert code == 1
    assert "[pad-is-eos]" in text
    assert f"`--fix pad` sets '{PADS[0]}'" in text
    code, text = run(copied, "--fix", "pad")
    assert code == 0, text
    assert f"the padding token is 2 ({PADS[0]!r}) now; it was 1 ({EOS!r})" in text
    assert "manifest" in text
    after = copied.read_bytes()
    differ = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert len(differ) == 1
    back = next(line for line in text.splitlines() if line.startswith("back: "))
    code, _ = run(*back.removeprefix("back: quantkit tokenizer check ").split())
    assert code == 1
    assert copied.read_bytes() == before


def test_what_verify_says_of_a_mended_file(copied: Path, sound: Path, quantkit: Run, tmp_path: Path) -> None:
    """It is sound; an old manifest is not its own, and a new one is."""
    assert quantkit("verify", copied, "-q", "--write-manifest", tmp_path / "old.json").returncode == 0
    assert run(copied, "--fix", "pad")[0] == 0
    assert quantkit("verify", copied, "-q").returncode == 0
    done = quantkit("verify", copied, "--manifest", tmp_path / "old.json")
    assert done.returncode == 12
    assert "SHA-256" in done.stdout + done.stderr
    assert quantkit("verify", copied, "-q", "--write-manifest", tmp_path / "new.json").returncode == 0
    old, new = (json.loads((tmp_path / name).read_text()) for name in ("old.json", "new.json"))
    assert old["tensors"] == new["tensors"]
    assert quantkit("verify", copied, "-q", "--manifest", tmp_path / "new.json").returncode == 0


def test_a_copy(copied: Path, tmp_path: Path) -> None:
    before, out = copied.read_bytes(), tmp_path / "out.gguf"
    code, text = run(copied, "--fix", "pad", "-o", out)
    assert code == 0, text
    assert copied.read_bytes() == before
    assert [a != b for a, b in zip(before, out.read_bytes(), strict=True)].count(True) == 1
    with pytest.raises(OutputError, match="exists"):
        run(copied, "--fix", "pad", "-o", out)
    assert run(copied, "--fix", "pad", "--pad-token", EOS, "-o", out, "--force")[0] == 1


def test_a_header_without_a_padding_token_grows(r1: list[KV], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    kvs = changed(r1, padding_token_id=None)
    factory.gguf_file(path, {"output.weight": ((256, 2), "F32", bytes(range(256)) * 8)}, [vocabularies.ARCH, *kvs])
    before = path.read_bytes()
    with pytest.raises(UnsupportedError, match=r"has no tokenizer\.ggml\.padding_token_id of 32 bits.*with -o"):
        run(path, "--fix", "pad")
    assert path.read_bytes() == before
    code, text = run(path, "--fix", "pad", "-o", tmp_path / "o.gguf")
    assert code == 0, text
    made = read_header(tmp_path / "o.gguf")
    assert decode(next(k for k in made.kvs if k.key == PAD_KEY)) == 2
    (tensor,) = made.tensors
    assert (tmp_path / "o.gguf").read_bytes()[tensor.offset :][: tensor.nbytes] == bytes(range(256)) * 8


def test_shards(sound_set: Path, tmp_path: Path) -> None:
    """Any shard names the set; only the first has the tokenizer."""
    shutil.copytree(sound_set, tmp_path / "set")
    files = sorted((tmp_path / "set").iterdir())
    before = [f.read_bytes() for f in files]
    code, text = run(files[-1], "--fix", "pad")
    assert code == 0
    assert text.startswith(f"{files[0]}: the padding token is 2")
    after = [f.read_bytes() for f in files]
    assert [a != b for a, b in zip(before, after, strict=True)] == [True] + [False] * (len(files) - 1)


def test_a_checkpoint(tiny_v3: Path) -> None:
    code, text = run(tiny_v3)
    assert code == 1
    assert f"mend: `quantkit build` with --pad-token '{PADS[0]}'" in text
    code, said = run(tiny_v3, "--json")
    x = json.loads(said)
    assert (code, x["fine"], x["tokens"], x["embedding_rows"]) == (1, False, 384, 384)
    assert [f["id"] for f in x["findings"] if f["severity"] != "note"] == ["pre-unknown", "pad-is-eos"]
    assert x["findings"][0]["what"] == "the pre-tokenizer is not one that quantkit recognizes"
    code, text = run(tiny_v3, "--fix", "pad")
    assert code == 2
    assert "a checkpoint's files stay as they are" in text


def test_on_the_hub(hub: Hub, copied: Path, tiny_v3: Path, tmp_path: Path) -> None:
    """By headers; nothing there is mended."""
    (tmp_path / "files").mkdir()
    shutil.copy(copied, tmp_path / "files" / "m.gguf")
    hub.add("me/GGUF", tmp_path / "files")
    code, text = run("hf://me/GGUF/m.gguf")
    assert code == 1
    assert "[pad-is-eos]" in text
    assert run("hf://me/GGUF/m.gguf", "--fix", "pad")[0] == 2
    hub.add("me/Tiny-V3", tiny_v3)
    code, text = run("hf://me/Tiny-V3")
    assert code == 1
    assert f"mend: `quantkit build` with --pad-token '{PADS[0]}'" in text


def test_what_cannot_be(copied: Path, tmp_path: Path, tiny_v3: Path) -> None:
    assert run(copied, "-o", tmp_path / "o.gguf")[0] == 2
    with pytest.raises(SourceError, match="is neither a token nor an id below"):
        run(copied, "--fix", "pad", "--pad-token", "<no>")
    plain = factory.gguf_file(tmp_path / "plain.gguf", {"output.weight": ((256, 2), "F32", bytes(2048))})
    with pytest.raises(SourceError, match="has no tokenizer"):
        run(plain)
    with pytest.raises(SourceError):
        run(tiny_v3 / "config.json")
    assert run(copied, "--fix", "pad")[0] == 0
    code, text = run(copied, "--fix", "pad")
    assert code == 0
    assert f"the padding token, 2 ({PADS[0]!r}), is fine; nothing was changed" in text

"""run-card: command lines that llama.cpp's own tools take, the published table, memory, prompts, names of strangers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import factory
import pytest
from conftest import Run, Tools
from hypothesis import given
from hypothesis import strategies as st
from smollm2 import smollm2

from quantkit.base.errors import SourceError, UnsupportedError
from quantkit.base.text import GIB
from quantkit.gguf.header import BOOL, STRING, U32, kv, kv_array
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.fit import answer, weigh
from quantkit.planning.gpus import parse_gpus
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load
from quantkit.running.advice import cache_types
from quantkit.running.files import gguf_in
from quantkit.running.placement import in_unified_memory, on_gpus, without_gpus
from quantkit.running.programs import shell_word

#: the table of the R1 dynamic quants' guide, January 2025: layers on 24, 80 and 2x80 GB
PUBLISHED = {
    "UD-IQ1_S": (7, 33, 61), "UD-IQ1_M": (5, 26, 57), "UD-IQ2_XXS": (4, 22, 49), "UD-Q2_K_XL": (2, 19, 32),
}  # fmt: skip
#: options that only llama-server has, which is not among the toolchain's tools
SERVER_ONLY = ("--host", "--port")


@pytest.fixture(scope="module")
def model(tiny_v3: Path, quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 as a GGUF."""
    out = tmp_path_factory.mktemp("model") / "tiny.gguf"
    done = quantkit("build", tiny_v3, "-o", out, "-r", "Q8_0", "--pre", "deepseek-v3", "-q")
    assert done.returncode == 0, done.stderr
    return out


def card_of(quantkit: Run, *args: str | Path, cwd: Path | None = None) -> dict[str, Any]:
    done = quantkit("run-card", *args, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------- where layers go


@pytest.mark.parametrize("layout", ["kv_b", "k_b+v_b"])
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_published_table_and_the_answers_of_fit(recipe: str, layout: str) -> None:
    plan = make_plan(open_model("deepseek-r1", Options(layout)), load(recipe))
    w = weigh(plan.catalogue, plan, 8192, "q4_0", "f16")
    for text, published in zip(("24", "80", "2x80"), PUBLISHED[recipe], strict=True):
        gpus = parse_gpus(text)
        found, theirs = on_gpus(w, gpus, GIB), answer(w, gpus, GIB, ())
        if layout != "kv_b":
            pass  # the table is of files of January 2025
        elif (recipe, text) == ("UD-Q2_K_XL", "2x80"):
            # the one cell that does not follow the guide's own rule
            assert (found.rule, published, found.note) == (42, 32, theirs.note)
        else:
            assert found.rule == published
        everything = theirs.whole.n_layers == 61 and theirs.whole.output
        fit = theirs.whole if everything or theirs.split is None else theirs.split
        assert (found.used, found.ram) == (fit.used, fit.ram)
        given = dict(zip(fit.flags[::2], fit.flags[1::2], strict=True))
        ours = dict(zip(found.flags[::2], found.flags[1::2], strict=True))
        assert ours["-ngl"] == given["-ngl"]
        assert ours.get("-ts") == given.get("-ts")
        assert sum(found.used) + found.ram == sum(x.total for x in w.layers) + w.input
        if found.n_cpu_moe:  # the experts of the layers before it are what stays in RAM
            assert found.ram == w.input + sum(x.experts for x in w.layers[: found.n_cpu_moe])


def test_kinds_of_gpus_together() -> None:
    assert parse_gpus("24+2x80").gib == (24, 80, 80)
    assert parse_gpus("3090+4x24").gib == (24,) * 5
    for wrong, says in (("24+", r"'24\+' is not VRAM"), ("16x24+24", "17 GPUs, and 16 are the most")):
        with pytest.raises(ValueError, match=says):
            parse_gpus(wrong)


def test_no_gpu_and_unified_memory() -> None:
    plan = make_plan(open_model("deepseek-r1"), load("UD-IQ1_S"))
    w = weigh(plan.catalogue, plan, 8192, "q4_0")
    none = without_gpus(w)
    assert (none.flags, none.used) == (("-ngl", "0"), ())
    some = in_unified_memory(w, 128 * GIB, GIB)
    assert 0 < some.n_gpu_layers < 62
    assert sum(some.used) <= 95 * GIB
    assert "Metal gives the GPU about 3/4 of it, 96 GiB; `sudo sysctl iogpu.wired_limit_mb=122880`" in some.note
    assert in_unified_memory(w, 512 * GIB, GIB).n_gpu_layers == 62


# ---------------------------------------------------------------- the cache


def test_types_of_the_cache() -> None:
    mla, old = open_model("deepseek-r1"), open_model("deepseek-r1", Options("kv_b"))
    assert cache_types(mla, None, None)[0].flags == ("-ctk", "q4_0", "-ctv", "q4_0", "-fa", "on")
    # V stays f16 as published; quantized, it needs flash attention
    assert cache_types(old, None, None)[0].flags == ("-ctk", "q4_0")
    assert cache_types(old, "q8_0", "q8_0")[0].flags == ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")
    assert cache_types(old, "f16", None)[0].flags == ()
    with pytest.raises(UnsupportedError, match="refuses K of q8_0 with V of f16; leave --cache-type-v out"):
        cache_types(mla, "q8_0", "f16")


# ---------------------------------------------------------------- llama.cpp's own tools


@pytest.mark.tools
def test_every_option_is_one_of_llama_cpp(quantkit: Run, tools: Tools, model: Path) -> None:
    """By --help of the tools that are built; llama-server's own by the library of options that they share."""
    completion = tools.quantize.parent / "llama-completion"
    said = subprocess.run([completion, "--help"], capture_output=True, text=True, check=False)
    known = set(" ".join(line[:40] for line in said.stdout.splitlines()).replace(",", " ").split())
    library = b"".join(p.read_bytes() for p in completion.parent.glob("libllama-common.so"))
    card = card_of(quantkit, model, "--vram", "24,1+2", "--cache-type", "q8_0")
    for setup in card["setups"]:
        for line in setup["lines"][:2]:
            options = [word for word in line["argv"][1:] if word.startswith("-")]
            assert len(options) > 6
            for option in options:
                if option in SERVER_ONLY:
                    assert line["program"] == "llama-server"
                    assert b"\0" + option.encode() + b"\0" in library, option
                else:
                    assert option in known, option


@pytest.mark.tools
@pytest.mark.parametrize("hardware", [(), ("--vram", "24"), ("--unified", "8")])
def test_llama_cpp_runs_by_the_line(quantkit: Run, tools: Tools, model: Path, hardware: tuple[str, ...]) -> None:
    """llama-completion takes what llama-cli does; without a GPU it says so and goes on."""
    argv = card_of(quantkit, model, *hardware, "--ctx", "256")["setups"][0]["lines"][0]["argv"]
    more = ["--n-cpu-moe", "2", "-no-cnv", "-p", "hi", "-n", "2"]
    done = subprocess.run(
        [tools.quantize.parent / "llama-completion", *argv[1:], *more], capture_output=True, text=True,
        errors="replace", check=False, stdin=subprocess.DEVNULL, cwd=model.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.tools
def test_llama_cpp_refuses_what_the_card_avoids(tools: Tools, model: Path) -> None:
    """K of another type than V, under MLA: the published flag alone no longer works."""
    words = ["-m", str(model), "-c", "256", "-ctk", "q4_0", "-no-cnv", "-p", "hi", "-n", "1"]
    codes = [
        subprocess.run(
            [tools.quantize.parent / "llama-completion", *words, *more], capture_output=True, check=False,
            stdin=subprocess.DEVNULL, cwd=model.parent,
        ).returncode
        for more in ((), ("-ctv", "q4_0"))
    ]  # fmt: skip
    assert codes == [1, 0]


# ---------------------------------------------------------------- the prompt


def test_a_second_beginning_of_text_is_left_out(tmp_path: Path) -> None:
    from quantkit.running import card

    path = small(tmp_path / "m.gguf", "{{ bos_token }}<U>{{ messages[0].content }}<A>", add_bos=True)
    made = card.make_card(open_model(str(path)), "m", card.Wishes(256, None, None, None, 1, None), [without_gpus])
    assert made.prompt is not None
    assert (made.prompt.text, made.prompt.adds_bos) == ("<U>{prompt}<A>", True)
    assert any("the template writes <s>, and programs add it too" in note for note in made.notes)
    path = small(tmp_path / "n.gguf", "{{ bos_token }}<U>{{ messages[0].content }}<A>", add_bos=False)
    made = card.make_card(open_model(str(path)), "n", card.Wishes(256, None, None, 0.2, 1, None), [without_gpus])
    assert made.prompt is not None
    assert (made.prompt.text, made.sampling.temp) == ("<s><U>{prompt}<A>", 0.2)
    assert not any("programs add it too" in note for note in made.notes)


def test_without_a_template_the_card_says_so(quantkit: Run, tmp_path: Path) -> None:
    card = card_of(quantkit, small(tmp_path / "m.gguf", None))
    assert card["prompt"] is None
    assert any("has no chat template" in note for note in card["notes"])


def small(path: Path, template: str | None, add_bos: bool = False, name: str = "m") -> Path:
    """A GGUF of two tensors and four tokens."""
    tokens = ["<s>", "</s>", "a", "b"]
    kvs = [
        kv("general.architecture", STRING, "llama"), kv("general.name", STRING, name), kv("llama.block_count", U32, 1),
        kv("llama.embedding_length", U32, 256), kv("llama.attention.head_count", U32, 4),
        kv("tokenizer.ggml.model", STRING, "gpt2"), kv_array("tokenizer.ggml.tokens", STRING, tokens),
        kv_array("tokenizer.ggml.merges", STRING, ["a b"]), kv("tokenizer.ggml.bos_token_id", U32, 0),
        kv("tokenizer.ggml.eos_token_id", U32, 1), kv("tokenizer.ggml.add_bos_token", BOOL, add_bos),
    ]  # fmt: skip
    kvs += [] if template is None else [kv("tokenizer.chat_template", STRING, template)]
    tensors = {name: ((256, 4), "F32", bytes(4096)) for name in ("token_embd.weight", "blk.0.attn_q.weight")}
    return factory.gguf_file(path, tensors, kvs)


@pytest.mark.tools
def test_a_dense_model_gets_layers_only(quantkit: Run) -> None:
    card = card_of(quantkit, smollm2(), "--vram", "24")
    argv = card["setups"][0]["lines"][0]["argv"]
    assert argv[argv.index("-ngl") + 1] == "31"
    assert not {"-ot", "--n-cpu-moe", "-ctk", "-fa"} & set(argv)
    assert card["prompt"]["text"].endswith("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


# ---------------------------------------------------------------- files, folders, names


def test_folders_and_any_shard(quantkit: Run, sound_set: Path, tmp_path: Path) -> None:
    for path in sorted(sound_set.iterdir()):
        shutil.copy(path, tmp_path)
    first = min(p.name for p in tmp_path.iterdir())
    assert gguf_in(tmp_path).name == first
    last = max(p.name for p in tmp_path.iterdir())
    for given_ in (tmp_path, tmp_path / last):
        argv = card_of(quantkit, given_)["setups"][0]["lines"][0]["argv"]
        assert argv[argv.index("-m") + 1] == str(tmp_path / first)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"holds 2 GGUFs: .*; give one of them"):
        gguf_in(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="there is no GGUF in it"):
        gguf_in(tmp_path / "empty")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_shell_takes_every_word_for_itself(word: str) -> None:
    done = subprocess.run(["bash", "-c", f"printf %s {shell_word(word)}"], capture_output=True, check=True, cwd="/")
    assert done.stdout == word.encode()
    assert shell_word(word).isprintable()


def test_hostile_names_stay_one_word(quantkit: Run, tmp_path: Path) -> None:
    name = "-m'; touch pwned; '\x1b[31m\n$(touch pwned).gguf"
    small(tmp_path / name, None, name="evil\x1b[2J")
    done = quantkit("run-card", "--", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    for line in lines:
        told = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert f"./{name}" in told.stdout.split("\0")
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------- --exec


def test_exec_starts_the_first_program_there_is(quantkit: Run, tmp_path: Path) -> None:
    path = small(tmp_path / "m.gguf", None)
    (tmp_path / "bin").mkdir()
    env = {"PATH": str(tmp_path / "bin")}
    done = quantkit("run-card", path, "--exec", cwd=tmp_path, env=env)
    assert done.returncode == 10
    assert done.stderr == (
        "error: none of llama-cli, llama-server, koboldcpp is on PATH; install llama.cpp, or add its folder to PATH\n"
    )
    for program in ("koboldcpp", "llama-server"):
        fake = tmp_path / "bin" / program
        fake.write_text(f'#!/bin/sh\necho ran {program} "$@"\nexit 3\n')
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        done = quantkit("run-card", path, "--exec", cwd=tmp_path, env=env)
        first, ran = done.stdout.splitlines()
        assert done.returncode == 3
        assert ran == f"ran {' '.join(shlex.split(first))}"
        assert first.startswith(f"{program} ")
    done = quantkit("run-card", path, "--exec", "--vram", "24,80", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert os.listdir(tmp_path / "bin") != []


@pytest.mark.parametrize(
    "words", [("run-card",), ("ollama", "NAME"), ("tokenizer", "check"), ("which", "--vram", "24")]
)
def test_a_file_that_is_not_there(words: tuple[str, ...], quantkit: Run, tmp_path: Path) -> None:
    """The file is named, and one beside it whose name is near; not what else a SOURCE may be."""
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"")
    args = [*words[:1], "model-Q4KM.gguf", *words[1:]] if words[0] != "tokenizer" else [*words, "model-Q4KM.gguf"]
    done = quantkit(*args, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert done.stderr == "error: model-Q4KM.gguf: there is no such file (did you mean model-Q4_K_M.gguf?)\n"

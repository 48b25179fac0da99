"""Completion as the shell asks for it: click's protocol, with the words as bash breaks them, and bash itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.model.families.known import MODELS

UD = ["UD-IQ1_M", "UD-IQ1_S", "UD-IQ2_XXS", "UD-Q2_K_XL"]


def ask(*words: str, cwd: Path | str = "/", shell: str = "bash") -> list[str]:
    """What the shell is offered in the place of the last word."""
    env = os.environ | {
        "_QUANTKIT_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "\n".join(["quantkit", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "quantkit"], capture_output=True, text=True, env=env, cwd=cwd, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def plain(*words: str, cwd: Path | str = "/") -> list[str]:
    found = ask(*words, cwd=cwd)
    assert all(line.startswith("plain,") for line in found), found
    return [line.removeprefix("plain,") for line in found]


def test_commands_and_options() -> None:
    assert plain("to") == ["tokenize", "tokenizer", "toolchain"]
    assert plain("recipe", "ex") == ["explain", "export"]
    assert plain("build", "x", "--over") == ["--override-kv"]
    assert plain("build", "x", "--engine", "l") == ["llama-quantize"]


def test_recipes_models_and_types() -> None:
    assert plain("plan", "deepseek-r1", "-r", "ud-") == UD
    assert plain("recipe", "lint", "UD-Q") == ["UD-Q2_K_XL"]
    assert plain("plan", "DEEP") == [name for name in MODELS if name.startswith("deep")]
    assert plain("fit", "kimi") == ["kimi-k2"]
    assert plain("plan", "x", "--output-tensor-type", "iq1") == ["IQ1_S", "IQ1_M"]


@pytest.mark.parametrize(
    "words",
    [
        ["--type", "'blk.*.x=iq1"],
        ["--type", "blk.*.x=iq1"],
        ["--tensor-type", "x=iq1"],
    ],
)
def test_types_behind_an_equals_sign(words: list[str]) -> None:
    before = words[1].strip("'").removesuffix("iq1")
    assert plain("plan", "x", *words) == [f"{before}IQ1_S", f"{before}IQ1_M"]


@pytest.mark.parametrize(
    "words",
    [
        ["--type", "blk.*.x", "=", "iq1"],
        ["--type", "=", "blk", "=", "iq1"],
        ["--type", "x@moe[", ":", "6]", "=", "iq1"],
    ],
)
def test_bash_breaks_words(words: list[str]) -> None:
    """At = and :, and only what is behind the last of them is replaced."""
    assert plain("plan", "x", *words) == ["IQ1_S", "IQ1_M"]
    assert len(plain("plan", "x", "--type", "y", "=")) > 20
    assert plain("plan", "x", "--layout", "=", "kv") == ["kv_b"]


def test_variables_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "my own.yaml").write_text(
        'name: mine\nbase: UD-IQ1_S\nvars: {down: Q2_K}\nrules:\n  - {match: "output.weight", type: $down, why: x}\n'
    )
    assert plain("plan", "x", "-r", "'my own.yaml'", "--set", "d", cwd=tmp_path) == ["down="]
    assert plain("plan", "x", "-r", "nothing.yaml", "--set", "d", cwd=tmp_path) == []


def test_files_where_files_belong() -> None:
    for words in (["build", "./mo"], ["plan", "x", "--imatrix", "im"], ["plan", "x", "-r", "./mi"], ["verify", "R"]):
        assert ask(*words) == [f"file,{words[-1]}"]
    assert ask("build", "x", "--cache", "c") == ["dir,c"]


def test_other_shells() -> None:
    assert ask("plan", "deepseek-r1", "-r", "UD-Q", shell="zsh")[:2] == ["plain", "UD-Q2_K_XL"]
    env = os.environ | {"_QUANTKIT_COMPLETE": "fish_source"}
    done = subprocess.run(
        [sys.executable, "-m", "quantkit"], capture_output=True, text=True, env=env, cwd="/", check=False
    )
    assert "--command quantkit" in done.stdout


def test_bash_itself(tmp_path: Path) -> None:
    """The function that `bash_source` defines, called as readline calls it."""
    here = tmp_path / "bin"
    here.mkdir()
    (here / "quantkit").write_text(f'#!/bin/sh\nexec {sys.executable} -m quantkit "$@"\n')
    (here / "quantkit").chmod(0o755)
    script = (
        'eval "$(_QUANTKIT_COMPLETE=bash_source quantkit)"\n'
        "COMP_WORDS=(quantkit plan deepseek-r1 --type 'blk.*.attn_output.weight' = q5) COMP_CWORD=6\n"
        'compopt() { :; }\n_quantkit_completion quantkit\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
        "COMPREPLY=() COMP_WORDS=(quantkit plan deepseek-r1 -r UD-IQ1) COMP_CWORD=4\n"
        '_quantkit_completion quantkit\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    env = os.environ | {"PATH": f"{here}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert (done.stdout.split(), done.stderr) == (["Q5_0", "Q5_1", "Q5_K", "UD-IQ1_M", "UD-IQ1_S"], "")

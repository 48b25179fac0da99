"""What models write: prompts, llama.cpp's own runner, likelihood under a reference, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Run
from smollm2 import smollm2

from quantkit.base.errors import TextError, ToolError
from quantkit.cli import cli
from quantkit.forward.model import Model
from quantkit.forward.stream import Options
from quantkit.lab.evaluation.evaluate import score_tokens
from quantkit.lab.generation.generate import diagnose, writer_of
from quantkit.lab.generation.likelihood import log_probs_of
from quantkit.lab.generation.llama_completion import Output, Runner, Sampling
from quantkit.lab.generation.prompts import Prompt, read_prompts
from quantkit.llama_cpp import toolchain
from quantkit.model.catalogue import Catalogue
from quantkit.model.open import open_model

ONE = Options(n_threads=1)
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def file() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def model(file: Path) -> Catalogue:
    return open_model(str(file))


@pytest.fixture(scope="module")
def completion() -> Path:
    return toolchain.find("llama-completion")


# ---------------------------------------------------------------- prompts


def test_prompts_are_the_lines_of_a_text(model: Catalogue, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("Tell me a story.\n\n  Why?  \n")
    assert read_prompts(str(file), model) == [Prompt(f"{file}:1", "Tell me a story."), Prompt(f"{file}:3", "Why?")]
    assert [p.text for p in read_prompts(str(file), model, chat=True)] == [
        SYSTEM + USER.format("Tell me a story."),
        SYSTEM + USER.format("Why?"),
    ]


def test_prompts_of_jsonl(model: Catalogue, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two\nlines"}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert read_prompts(str(file), model) == [
        Prompt(f"{file}:1", "<|im_start|>system\nBe brief.<|im_end|>\n" + USER.format("Two\nlines"))
    ]
    file.write_text('{"text": "One\\ntwo"}\n{"text": "Three"}\n')
    assert [p.text for p in read_prompts(str(file), model)] == ["One\ntwo", "Three"]


def test_no_prompts(model: Catalogue, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text(" \n\n")
    with pytest.raises(TextError) as e:
        read_prompts(str(file), model)
    assert str(e.value) == f"{file}: has no prompts; give a file with one on each line"


# ---------------------------------------------------------------- the runner


def test_a_model_writes(file: Path, model: Catalogue, completion: Path) -> None:
    """The text alone, special tokens and white space as they are; the same for the same seed; and whether it ended."""
    writer = writer_of(model, "smol", 1, Runner(completion, file, Sampling(n_predict=12), 1))
    prompt = Prompt("p", SYSTEM + USER.format("Say \\n hello."))
    first, again, other = (writer.write(prompt, seed) for seed in (1, 1, 2))
    assert (first.text, first.ended) == (again.text, again.ended)
    assert first.text != other.text
    assert first.text
    tokens = writer.tokenizer
    assert tokens is not None
    assert len(tokens.encode(first.text, add_special=False, parse_special=True)) <= 12
    # nearly greedy, and it knows its own end
    sure = writer_of(model, "smol", 1, Runner(completion, file, Sampling(temp=0, n_predict=40), 1))
    said = sure.write(Prompt("p", SYSTEM + USER.format("Hello") + "Hi<|im_end|>\n" + USER.format("Bye")), 1)
    assert "<|im_end|>" not in said.text
    assert "end of text" not in said.text


def test_the_environment_changes_nothing(
    file: Path, model: Catalogue, completion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_of(model, "smol", 1, Runner(completion, file, Sampling(n_predict=8), 1))
    before = writer.write(Prompt("p", "Once"), 1)
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "2")
    monkeypatch.setenv("LLAMA_ARG_TOP_K", "1")
    assert writer.write(Prompt("p", "Once"), 1).text == before.text


def test_a_runner_that_fails(file: Path, completion: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ToolError) as e:
        Runner(completion, broken, Sampling(), 1)(Prompt("p", "Once"), 1)
    assert str(e.value).startswith(f"llama-completion ended with code 1 on {broken}:\n")
    with pytest.raises(ToolError) as e:
        Runner(tmp_path / "none", file, Sampling(), 1)(Prompt("p", "Once"), 1)
    assert str(e.value) == f"{tmp_path / 'none'}: cannot be run: No such file or directory"
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nprintf half")
    silent.chmod(0o755)
    with pytest.raises(ToolError) as e:
        Runner(silent, file, Sampling(), 1)(Prompt("p", "Once"), 1)
    assert str(e.value) == ("llama-completion's output is cut off: it does not end in an empty line; is the disk full?")


def test_a_diagnosis_counts_tokens(model: Catalogue) -> None:
    text = "A dog ran. " + "The sun is a star. " * 20
    tokenizer = writer_of(model, "m", 1, Runner(Path(), Path(), Sampling(), 1)).tokenizer
    found = diagnose(Output("p", 1, text, False, 1.0), "", tokenizer)
    assert found.repetition is not None
    assert (found.repetition.period, found.repetition.onset) == (19, 9)
    assert (found.period_tokens, found.onset_token) == (6, 3)
    assert found.faults == ("endless repetition",)
    assert found.repeated_4grams is not None
    assert found.repeated_4grams > 0.9
    without = diagnose(Output("p", 1, text, True, 1.0), "")
    assert (without.n_tokens, without.period_tokens, without.faults) == (None, None, ("repetition",))


# ---------------------------------------------------------------- likelihood


def test_likelihood_is_the_pass_of_each_text_alone(model: Catalogue) -> None:
    reference = Model(model)
    texts = [
        ("The capital of France is", " Paris, of course."),
        ("One, two,", " three"),
        ("Why", ""),
        ("A", " zxq" * 9),
    ]
    found = log_probs_of(reference, texts, ONE)
    assert not len(found[2])
    tokenizer = writer_of(model, "m", 1, Runner(Path(), Path(), Sampling(), 1)).tokenizer
    assert tokenizer is not None
    for (prompt, text), values in zip(texts, found, strict=True):
        if not text:
            continue
        before = tokenizer.encode(prompt, parse_special=True)
        ids = np.concatenate([before, tokenizer.encode(text, add_special=False, parse_special=True)])

        class Chunks:
            tokens = ids[None]
            first = len(before) - 1
            targets = ids[None, len(before) :]
            names = ("a text",)

        (alone,) = score_tokens(reference, [], Chunks(), ONE, lambda *_: None)
        assert values == pytest.approx(-alone.nll[0], abs=1e-4)
    assert found[0][0] > -0.5 > -8 > found[3][0]  # Paris, and zxq


# ---------------------------------------------------------------- the command line


def test_eval_generate(file: Path, completion: Path, quantkit: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n")
    out = tmp_path / "out"
    done = quantkit(
        "eval", "generate", file, "--prompts", prompts, "--seeds", "1,2", "--n-predict", "8", "--reference", file,
        "-t", "1", "-q", "--json", "-o", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == json.loads((out / "results.json").read_text())
    assert said["sampling"] == {"temp": 0.6, "min_p": 0.05, "n_predict": 8}
    assert (said["seeds"], said["reference"]) == ([1, 2], str(file))
    (m,) = said["models"]
    assert (m["n_outputs"], m["file_bytes"]) == (2, file.stat().st_size)
    for o in m["outputs"]:
        assert o["prompt"] == f"{prompts}:1"
        assert (out / f"{m['name']}-001-{o['seed']}.txt").read_text() == o["text"]
        assert -8 < o["likelihood"]["mean"] < 0
    again = quantkit("eval", "generate", file, "--prompts", prompts, "-o", out)
    assert again.returncode == 7
    assert again.stderr == f"error: {out}: has files in it; give a new folder\n"


def test_texts_so_far_are_kept(file: Path, quantkit: Run, tmp_path: Path) -> None:
    """A tool of the user's own writes one text and fails at the next."""
    tool = tmp_path / "bin" / "llama-completion"
    tool.parent.mkdir()
    tool.write_text(
        f"#!/bin/sh\nif [ -e {tmp_path}/once ]; then echo out of memory >&2; exit 3; fi\ntouch {tmp_path}/once\n"
        "printf '<think>Hm. [end of text]\\n\\n\\n'\n"
    )
    tool.chmod(0o755)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("One\nTwo\n")
    words = ("eval", "generate", file, "--prompts", prompts, "--seeds", "7", "--llama-bin", tool.parent, "-q")
    done = quantkit(*words, "-o", out)
    assert (done.returncode, done.stderr) == (
        10,
        f"error: llama-completion ended with code 3 on {file}:\nout of memory\nthe texts so far are in {out}\n",
    )
    assert [p.name for p in out.iterdir()] == [f"{file.stem}-001-7.txt"]
    assert (out / f"{file.stem}-001-7.txt").read_text() == "<think>Hm."
    done = quantkit(*words, "-o", tmp_path / "none")
    assert done.returncode == 10
    assert not (tmp_path / "none").exists()
    (tmp_path / "once").unlink()
    prompts.write_text("One\n")
    done = quantkit(*words)
    assert done.returncode == 0, done.stderr
    assert f"| {file.stem} | {prompts}:1 | 7 | unfinished thinking |  |" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give either --prompts or --rubric"),
        (["--prompts", "p", "--rubric", "flappy-bird"], "give either --prompts or --rubric"),
        (["--seeds", "1,x"], "'1,x' is not seeds such as 3407,3408,3409 (0 to 4294967294)"),
        (["--seeds", "4294967295"], "'4294967295' is not seeds such as 3407,3408,3409 (0 to 4294967294)"),
        (["--seeds", "1,01"], "'1,01' has a seed twice, which gives the same text twice"),
    ],
)
def test_wrong_usage(words: list[str], says: str) -> None:
    done = CliRunner().invoke(cli, ["eval", "generate", "m.gguf", *words])
    assert done.exit_code == 2
    assert says in done.output


def test_eval_without_a_command_compares() -> None:
    """As it did before there was another."""
    for words in (["a.gguf"], ["--chunks", "1", "a.gguf"], ["./generate"], ["--quiet"], ["compare", "a.gguf"]):
        done = CliRunner().invoke(cli, ["eval", *words])
        assert done.exit_code == 2
        assert done.output.startswith("Usage: cli eval compare "), done.output
    assert "generate" in CliRunner().invoke(cli, ["eval", "--help"]).output

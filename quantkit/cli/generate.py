"""quantkit eval generate."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar, whole_progress
from .files import FOLDER, GGUF, MADE_FOLDER, MODEL, RUBRIC, TEXT, Command
from .options import json_option, threads_option

if TYPE_CHECKING:
    from quantkit.lab.generation.generate import Generated, Writer
    from quantkit.lab.generation.llama_completion import Output, Sampling
    from quantkit.lab.generation.prompts import Prompt
    from quantkit.lab.generation.rubric import Rubric, Scores

if TYPE_CHECKING:
    _Ints = click.ParamType[tuple[int, ...]]
else:
    _Ints = click.ParamType


class Seeds(_Ints):
    """3407,3408,3409"""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = str(value).split(",")
        if not all(re.fullmatch(r"\s*[0-9]{1,10}\s*", w) for w in words) or any(int(w) >= 2**32 - 1 for w in words):
            self.fail(f"{value!r} is not seeds such as 3407,3408,3409 (0 to 4294967294)", param, ctx)
        seeds = tuple(map(int, words))
        if len(set(seeds)) < len(seeds):
            self.fail(f"{value!r} has a seed twice, which gives the same text twice", param, ctx)
        return seeds


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, type=GGUF, metavar="MODEL...")
@click.option(
    "--prompts", type=TEXT, metavar="FILE",
    help="A text file with a prompt on each line; or a .jsonl file with `messages` (the chat template is applied) or "
    "a `text` on each.",
)  # fmt: skip
@click.option("--chat", is_flag=True, help="Each prompt is a user's message: apply the model's chat template.")
@click.option("--rubric", type=RUBRIC, metavar="RUBRIC", help="A task with scripted checks: flappy-bird, or a file.")
@click.option(
    "--seeds",
    type=Seeds(),
    metavar="N,N…",
    help="Seeds; each gives a text.  [default: the rubric's, else 3407,3408,3409]",
)
@click.option("--temp", type=click.FloatRange(0), help="Temperature.  [default: the rubric's, else 0.6]")
@click.option("--min-p", type=click.FloatRange(0, 1), help="[default: the rubric's, else 0.05]")
@click.option(
    "--n-predict", type=click.IntRange(1), metavar="N", help="Most tokens per text.  [default: the rubric's, else 2048]"
)
@click.option("--reference", type=MODEL, help="Find gibberish: how likely this model finds each text.")
@click.option(
    "--llama-bin", type=FOLDER, metavar="DIR", help="Folder of llama-completion, such as your own CUDA build."
)
@click.option("--llama-args", default="", metavar="ARGS", help="More arguments for it, such as '-ngl 99'.")
@threads_option
@click.option(
    "-o", "--output", type=MADE_FOLDER, metavar="DIR", help="Save every text, and results.json, in a new folder."
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def generate(**given: Any) -> None:
    """Let models write, and find what breaks first: repetition, gibberish, unfinished thinking.

    Each MODEL is a GGUF, and llama.cpp's own llama-completion runs it, once for each prompt and seed. With --rubric the
    programs that the models write are run, confined, and checked.

    \b
    quantkit eval generate naive.gguf dynamic.gguf --prompts prompts.txt --chat --reference R1-Q8_0.gguf
    quantkit eval generate R1-UD-IQ1_S-00001-of-00003.gguf --rubric flappy-bird -o flappy/ --llama-args '-ngl 99'
    """
    from quantkit.lab.generation import generate as lab
    from quantkit.lab.generation import rubric as rubrics
    from quantkit.lab.generation.llama_completion import Sampling

    if (given["prompts"] is None) == (given["rubric"] is None):
        raise click.UsageError("give either --prompts or --rubric")
    rubric = None if given["rubric"] is None else rubrics.load_rubric(given["rubric"])
    if rubric is not None:
        rubrics.check_ready(rubric)
    usual = Sampling()
    sampling = Sampling(
        *(_first(given[k], rubric and getattr(rubric, k), getattr(usual, k)) for k in ("temp", "min_p", "n_predict"))
    )
    seeds = _first(given["seeds"], rubric and rubric.seeds, (3407, 3408, 3409))
    folder: Path | None = given["output"]
    writers, prompts = _ask(given, rubric, sampling)
    keep = _keeper(folder)
    with _saying_what_is_kept(folder), open_bar(0, "text", given["quiet"]) as bar:
        said = lab.write_all(writers, prompts, seeds, whole_progress(bar), keep)
    found = _diagnosed(given, writers, prompts, said, (sampling, seeds))
    scores = [] if rubric is None else _judged(given, rubric, writers, said)
    result = found.to_json()
    if rubric is not None:
        result["rubric"] = {"name": rubric.name, "models": [s.to_json() for s in scores]}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if folder is not None:
        from quantkit.base.outputs import write_text

        write_text(folder / "results.json", text + "\n")
    if given["as_json"]:
        click.echo(text)
        return
    click.echo(lab.markdown(found))
    if rubric is not None:
        click.echo("\n" + rubrics.markdown(rubric, scores))


@contextmanager
def _saying_what_is_kept(folder: Path | None) -> Iterator[None]:
    """Have an error, or an interrupt, tell of the texts that are there; without any, the folder goes."""
    try:
        yield
    except BaseException as e:
        if folder is not None:
            with suppress(OSError):
                folder.rmdir()
            if folder.exists():
                e.kept = f"the texts so far are in {folder}"  # type: ignore[attr-defined]
        raise


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _ask(given: dict[str, Any], rubric: Rubric | None, sampling: Sampling) -> tuple[list[Writer], list[list[Prompt]]]:
    """The models, and what each is asked."""
    from quantkit.base.errors import SourceError
    from quantkit.base.workers import default_threads
    from quantkit.lab.generation.generate import writer_of
    from quantkit.lab.generation.llama_completion import Runner
    from quantkit.lab.generation.prompts import Prompt, of_user, read_prompts
    from quantkit.llama_cpp import toolchain
    from quantkit.model.open import open_model
    from quantkit.text.vocabulary import vocabulary_of

    tool, bin_ = "llama-completion", given["llama_bin"]
    binary = toolchain.find(tool, None if bin_ is None else Path(bin_) / tool)
    try:
        more = tuple(shlex.split(given["llama_args"]))
    except ValueError as e:
        raise click.UsageError(f"--llama-args: {e}") from None
    threads = given["threads"] or default_threads()
    writers, prompts = [], []
    for path, name in zip(given["models"], _names(given["models"]), strict=True):
        catalogue = open_model(str(path))
        if catalogue.source is None or path.suffix != ".gguf":
            raise SourceError(f"{path}: llama.cpp runs GGUFs; make one with quantkit build")
        nbytes = sum(f.stat().st_size for f in catalogue.source.files)
        writers.append(writer_of(catalogue, name, nbytes, Runner(binary, path, sampling, threads, more)))
        if rubric is None:
            prompts.append(read_prompts(given["prompts"], catalogue, given["chat"]))
        else:
            asked = [Prompt(rubric.name, rubric.prompt)]
            template = vocabulary_of(catalogue).chat_template if rubric.chat else None
            prompts.append(of_user(asked, catalogue) if template else asked)
    return writers, prompts


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its own, with its folder's where two are alike."""
    stems = [p.stem for p in paths]
    out = [s if stems.count(s) == 1 else f"{p.absolute().parent.name}/{s}" for s, p in zip(stems, paths, strict=True)]
    twice = next((p for p, n in zip(paths, out, strict=True) if out.count(n) > 1), None)
    if twice is not None:
        raise click.UsageError(f"{twice}: is given twice, or another has the same name in a folder of the same name")
    return out


def _keeper(folder: Path | None) -> Any:
    """What keeps a text as soon as it is there, by the number of its prompt. Raises OutputError for a folder with
    something in it."""
    if folder is None:
        return lambda *_: None
    from quantkit.base.errors import OutputError
    from quantkit.base.outputs import write_text
    from quantkit.lab.generation.generate import file_name

    try:
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder}: has files in it; give a new folder")
    except OSError as e:
        raise OutputError(f"{folder}: cannot be made or looked into: {e.strerror or e}; give another folder") from None

    def keep(model: str, number: int, output: Output) -> None:
        write_text(folder / file_name(model, number, output.seed), output.text)

    return keep


def _diagnosed(
    given: dict[str, Any],
    writers: Sequence[Writer],
    prompts: Sequence[Sequence[Prompt]],
    said: Sequence[Sequence[Output]],
    asked: tuple[Sampling, tuple[int, ...]],
) -> Generated:
    """What is broken in the texts; with --reference, how likely they are."""
    from quantkit.lab.generation import generate as lab

    sampling, seeds = asked
    pairs = [
        [(prompt.text, output) for prompt, output in zip((p for p in mine for _ in seeds), some, strict=True)]
        for mine, some in zip(prompts, said, strict=True)
    ]
    likely = None
    if given["reference"] is not None:
        from quantkit.forward.model import Model
        from quantkit.forward.stream import Options
        from quantkit.lab.generation.likelihood import log_probs_of
        from quantkit.model.open import open_model

        model = Model(open_model(given["reference"]))
        with open_bar(0, "tok", given["quiet"]) as bar:
            likely = log_probs_of(
                model, [(p, o.text) for mine in pairs for p, o in mine],
                Options(n_threads=given["threads"] or 0), whole_progress(bar),
            )  # fmt: skip
    return lab.gathered(writers, pairs, likely, (sampling, seeds, given["reference"]))


def _judged(
    given: dict[str, Any], rubric: Rubric, writers: Sequence[Writer], said: Sequence[Sequence[Output]]
) -> list[Scores]:
    """The tries of each model, checked."""
    from quantkit.lab.generation.rubric import Scores, Tried, judge
    from quantkit.lab.generation.sandbox import has_landlock

    if not has_landlock():
        click.echo("note: this kernel has no Landlock, so the programs can read files of this user", err=True)
    out, n = [], sum(map(len, said))
    with open_bar(n, "program", given["quiet"]) as bar:
        for writer, some in zip(writers, said, strict=True):
            tries = []
            for output in some:
                tries.append(Tried(output.seed, judge(rubric, output.text)))
                bar.update(1)
            out.append(Scores(writer.name, tuple(tries)))
    return out

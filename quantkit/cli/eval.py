"""quantkit eval."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar, whole_progress
from .files import FOLDER, IMATRIX, MODEL, RECIPE, REPORT, Command, Group
from .generate import generate
from .hub_options import fetched, fetching, hub_options
from .options import (
    conversion,
    covariance_of,
    forward_options,
    imatrix_of,
    imatrix_policy_option,
    json_option,
    layout_option,
    recipe_of,
    rounded,
    rounding_options,
    set_option,
    tokenizer_options,
)
from .text_options import chunk_options, print_notes, read_chunks, text_options

if TYPE_CHECKING:
    from quantkit.lab.evaluation.scores import Evaluation
    from quantkit.model.catalogue import Catalogue
    from quantkit.recipe.load import Recipe


@click.group(name="eval", cls=Group.of("compare"))
def group() -> None:
    """Measure what quantizing costs, in figures and in what models write.

    `quantkit eval REFERENCE …` is short for `quantkit eval compare REFERENCE …`; give a file called compare or
    generate as ./generate.

    \b
    quantkit eval DeepSeek-R1/ R1-UD-IQ1_S-00001-of-00003.gguf --text wiki.txt --chunks 100
    quantkit eval generate R1-UD-IQ1_S-00001-of-00003.gguf --rubric flappy-bird
    """


@group.command(name="compare", cls=Command)
@click.argument("reference", type=MODEL)
@click.argument("candidates", nargs=-1, type=MODEL, metavar="[CANDIDATE]...")
@text_options
@chunk_options
@click.option(
    "-r", "--recipe", "recipes", multiple=True, type=RECIPE,
    help="A candidate that was never built: the reference, quantized in memory by this recipe. Can be repeated.",
)  # fmt: skip
@set_option
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix of the recipes.")
@imatrix_policy_option
@rounding_options
@click.option(
    "--engine", type=click.Choice(["native", "llama.cpp"]), default="native", show_default=True,
    help="llama.cpp: the same figures by the stock llama-perplexity, for GGUFs only.",
)  # fmt: skip
@click.option(
    "--llama-bin", type=FOLDER, metavar="DIR", help="Folder of llama-perplexity, such as your own CUDA build."
)
@click.option(
    "--tool-figures/--no-tool-figures", default=True,
    help="With --engine llama.cpp: also run its --kl-divergence on each candidate, and show its own figures.",
)  # fmt: skip
@click.option(
    "--prompts", type=click.IntRange(0), default=0, show_default=True,
    help="Continue the beginnings of N chunks greedily for 32 tokens, and compare them.",
)  # fmt: skip
@forward_options
@hub_options("that of temporary files")
@layout_option
@tokenizer_options
@click.option("--csv", "csv_file", type=REPORT, metavar="FILE", help="Write the candidates' figures to FILE as CSV.")
@click.option("-o", "--output", type=REPORT, metavar="FILE", help="Write the tables to FILE as Markdown.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def evaluate(**given: Any) -> None:
    """Compare candidates with their reference: perplexity, KL divergence, same top token.

    REFERENCE is a checkpoint or a GGUF, CANDIDATEs are GGUFs of the same model, or recipes. All advance together in one
    pass over the text, and the second half of each chunk is scored, as llama-perplexity does. With --rounding or
    --rounding-policy each recipe is measured twice: rounded by ggml, and rounded that way.

    \b
    quantkit eval DeepSeek-R1/ R1-UD-IQ1_S-00001-of-00003.gguf --text wiki.txt --chunks 100
    quantkit eval hf://deepseek-ai/DeepSeek-R1 R1-UD-IQ1_S-00001-of-00003.gguf --text wiki.txt --shards /data
    quantkit eval compare R1-BF16.gguf -r UD-IQ1_S -r Q2_K_XS --imatrix imatrix.gguf --text wiki.txt -o table.md
    """
    from quantkit.lab.evaluation import report as eval_report
    from quantkit.model.open import open_model

    options = conversion(given["layout"], given["pre"], given["pad_token"])
    catalogue = open_model(given["reference"], options)
    if not given["candidates"] and not given["recipes"]:
        raise click.UsageError("give a CANDIDATE, or --recipe")
    found = _stock(catalogue, given) if given["engine"] == "llama.cpp" else _native(catalogue, given)
    _write(given["csv_file"], eval_report.csv_text(found), given["force"])
    _write(given["output"], eval_report.markdown(found) + "\n", given["force"])
    if given["as_json"]:
        click.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(eval_report.markdown(found))


def _write(path: Path | None, text: str, replace: bool) -> None:
    if path is not None:
        from quantkit.base.outputs import write_text

        write_text(path, text, replace)


def _native(catalogue: Catalogue, given: dict[str, Any]) -> Evaluation:
    from quantkit.forward.model import Model
    from quantkit.forward.stream import Options
    from quantkit.lab.evaluation.evaluate import EvalOptions, about_reference, of_file, of_plan
    from quantkit.lab.evaluation.evaluate import evaluate as run
    from quantkit.model.hub import with_layers
    from quantkit.model.open import open_model
    from quantkit.planning.plan import make_plan, with_values
    from quantkit.planning.rounding import with_covariance

    chunks = read_chunks(
        catalogue, given["texts"], given["n_ctx"], given["n_chunks"], given["chat"], given["parse_special"]
    )
    catalogue = with_layers(catalogue)
    reference = Model(catalogue, _name(given["reference"]))
    if (says := about_reference(reference)) is not None:
        print_notes([says])
    weights = imatrix_of(given["imatrix"], given["policy"])
    recipes = [recipe_of(name, given["sets"]) for name in given["recipes"]]
    names = _names(given["candidates"], [(r.name, name) for r, name in zip(recipes, given["recipes"], strict=True)])
    candidates = []
    for path in given["candidates"]:
        options = conversion(given["layout"], given["pre"], given["pad_token"]) if Path(path).is_dir() else None
        candidates.append(of_file(open_model(path, options), names.pop(0)))
    covariance = covariance_of(given["covariance"])
    for rules in recipes:
        name = names.pop(0)
        for label, one in _roundings(rules, given):
            plan = with_values(make_plan(catalogue, one, weights, policy=given["policy"]), weights)
            candidates.append(of_plan(reference, with_covariance(plan, covariance), f"{name}{label}"))
    if covariance is not None and not any(c.is_rounded for c in candidates):
        raise click.UsageError(
            "--covariance needs a rounding to use it: give --rounding feedback, --rounding-policy, or a recipe that "
            "says how to round"
        )
    forward = Options(given["device"], given["dtype"], given["threads"] or 0, given["memory"])
    shards = fetched(catalogue, fetching(given["keep"], given["shards"], None, given["quiet"]), given["quiet"])
    with shards, open_bar(0, "tok", given["quiet"]) as bar:
        return run(reference, candidates, chunks, EvalOptions(given["prompts"], forward), whole_progress(bar))


def _roundings(rules: Recipe, given: dict[str, Any]) -> list[tuple[str, Recipe]]:
    """The recipe as it is; or as ggml rounds, and as it was asked, each with what is added to its name."""
    method, policy = given["rounding"], given["rounding_policy"]
    if method is None and policy is None:
        return [("", rules)]
    asked = rounded(rules, method, policy)
    return [("", rounded(rules, "ggml", None)), *([(f", {method or policy}", asked)] if method != "ggml" else [])]


def _stock(catalogue: Catalogue, given: dict[str, Any]) -> Evaluation:
    from quantkit.base.workers import default_threads
    from quantkit.lab.evaluation.llama_perplexity import Tool, evaluate_files, gguf_file
    from quantkit.llama_cpp import toolchain
    from quantkit.text.sources import read_texts

    if given["recipes"]:
        raise click.UsageError("--engine llama.cpp runs files: build the recipes first, with quantkit build")
    if given["chat"] or given["parse_special"]:
        raise click.UsageError("--engine llama.cpp reads plain text: leave out --chat and --parse-special")
    names = [_name(given["reference"]), *_names(given["candidates"], [])]
    files = [gguf_file(*each) for each in zip((given["reference"], *given["candidates"]), names, strict=True)]
    chunks = read_chunks(catalogue, given["texts"], given["n_ctx"], given["n_chunks"], False, False)
    bin_ = given["llama_bin"]
    binary = toolchain.find("llama-perplexity", None if bin_ is None else Path(bin_) / "llama-perplexity")
    n_vocab = next(t.shape[1] for t in catalogue.tensors if t.name == "token_embd.weight")
    threads = given["threads"] or default_threads()
    tool = Tool(binary, chunks.n_ctx, chunks.n_chunks, n_vocab, threads, figures=given["tool_figures"])
    texts = read_texts(given["texts"])
    with open_bar(0, "B", given["quiet"]) as bar:
        return evaluate_files(files[0], files[1:], (texts.joined, texts.names), tool, whole_progress(bar))


def _names(files: Sequence[str], recipes: Sequence[tuple[str, str]]) -> list[str]:
    """What candidates are called: files, and recipes by name and as they were given. As they were given where two
    would be called the same. Raises UsageError for what is given twice."""
    short, spelled = [*map(_name, files), *(name for name, _ in recipes)], [*files, *(given for _, given in recipes)]
    seen = set()
    for i, given in enumerate(spelled):
        what = (i < len(files), os.path.realpath(given) if os.path.exists(given) else given)
        if what in seen:
            raise click.UsageError(f"{given} is given twice; give each candidate once")
        seen.add(what)
    return [given if short.count(name) > 1 else name for name, given in zip(short, spelled, strict=True)]


def _name(given: str) -> str:
    path = Path(given)
    return path.stem if path.suffix == ".gguf" else path.name or given


group.add_command(generate)

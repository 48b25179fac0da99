"""quantkit sensitivity: measure, show, merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .bars import open_bar
from .files import IMATRIX, MODEL, SENSITIVITY, SENSITIVITY_OUT, Command, Group
from .hub_options import fetched, fetching, hub_options, open_weights
from .options import (
    conversion,
    device_option,
    imatrix_of,
    json_option,
    layout_option,
    probe_memory_option,
    threads_option,
    tokenizer_options,
)
from .text_options import read_chunks, text_options


@click.group(cls=Group.of("measure"))
def sensitivity() -> None:
    """Measure how much each group of a model's tensors matters, for `quantkit optimize`.

    `quantkit sensitivity SOURCE …` is short for `quantkit sensitivity measure SOURCE …`.

    \b
    quantkit sensitivity DeepSeek-R1/ --text wiki.txt --imatrix imatrix.gguf -o r1.json
    quantkit sensitivity show r1.json
    quantkit sensitivity merge r1.json r1-more-text.json -o both.json
    """


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


@sensitivity.command(cls=Command)
@click.argument("source", type=MODEL)
@click.option("-o", "--output", type=SENSITIVITY_OUT, required=True, metavar="FILE", help="The sensitivity, as JSON.")
@text_options
@click.option(
    "-c", "--ctx", "n_ctx", type=click.IntRange(2, 1 << 20), default=512, show_default=True, help="Tokens per chunk."
)
@click.option("--chunks", "n_chunks", type=click.IntRange(1), help="Chunks at most, evenly spread.  [default: all]")
@click.option(
    "--part", default="1/3", show_default=True, metavar="K/N",
    help="Part of the text to use; `optimize` chooses on the second third and reports on the last. 1/1: the whole "
    "text.",
)  # fmt: skip
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="The importance matrix to build with.")
@click.option(
    "--groups", "by", type=click.Choice(["role", "kind", "family", "tensor"]), default="kind", show_default=True,
    help="What is probed together: tensors of a role, gate and up apart from down (kind), alike names (family), or "
    "single tensors.",
)  # fmt: skip
@click.option("--bands", type=click.IntRange(1, 1000), default=3, show_default=True, help="Bands of depth for each.")
@click.option(
    "--probes", callback=_names, metavar="TYPES", help="Probe each group at these.  [default: IQ1_S,IQ2_XXS,Q3_K,Q5_K]"
)
@click.option(
    "--noise",
    callback=_names,
    metavar="ERRORS",
    help="Also probe with noise of these relative squared errors: 0.01,0.1.",
)
@click.option(
    "--types",
    callback=_names,
    metavar="TYPES",
    help="Sample the error of these types.  [default: 14 from IQ1_S to Q8_0]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for sampled rows and noise.")
@probe_memory_option
@hub_options("that of FILE")
@device_option
@layout_option
@tokenizer_options
@threads_option
@click.option("--force", is_flag=True, help="Start again, or replace FILE even if it is no sensitivity.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def measure(**given: Any) -> None:
    """Probe each group of tensors, all others as they are, many probes in one pass over the text.

    FILE is written after each pass; the same command goes on where it was. Further --probes or --types are added to it.

    \b
    quantkit sensitivity measure DeepSeek-R1/ --text wiki.txt --imatrix imatrix.gguf -o r1.json
    quantkit sensitivity measure hf://deepseek-ai/DeepSeek-R1 --text wiki.txt --imatrix imatrix.gguf -o r1.json
    quantkit sensitivity measure R1-BF16.gguf --text wiki.txt --groups family --bands 4 -o r1.json
    """
    from quantkit.lab import require_torch

    require_torch()
    from quantkit.forward.stream import Options
    from quantkit.lab.allocation import sensitivity as lab
    from quantkit.lab.allocation.damage_report import sensitivity_text
    from quantkit.lab.evaluation.parts import parse_part, part

    number, of = parse_part(given["part"])
    noise = _errors(given["noise"])
    catalogue = open_weights(given["source"], conversion(given["layout"], given["pre"], given["pad_token"]))
    chunks = read_chunks(catalogue, given["texts"], given["n_ctx"], None, given["chat"], given["parse_special"])
    opts = lab.ProbeOptions(
        given["by"], given["bands"], _types(given["probes"]) or lab.PROBES, noise,
        _types(given["types"]) or lab.TYPES, given["seed"], None, given["memory"],
        Options(given["device"], n_threads=given["threads"] or 0), given["force"],
    )  # fmt: skip
    chosen = part(chunks, number, of, given["n_chunks"])
    shards = fetched(
        catalogue, fetching(given["keep"], given["shards"], given["output"], given["quiet"]), given["quiet"]
    )
    with shards, open_bar(1000, "", given["quiet"]) as bar:
        made = lab.sensitivity(catalogue, chosen, imatrix_of(given["imatrix"]), given["output"], opts, stages(bar))
    click.echo(sensitivity_text(made))


@sensitivity.command(cls=Command)
@click.argument("file", type=SENSITIVITY)
@json_option
def show(file: Path, as_json: bool) -> None:
    """Print a sensitivity: α of each group, and damage against bytes of each role.

    \b
    quantkit sensitivity show r1.json
    """
    from quantkit.lab.allocation.damage import read_sensitivity
    from quantkit.lab.allocation.damage_report import sensitivity_json, sensitivity_text

    known = read_sensitivity(file)
    click.echo(
        json.dumps(sensitivity_json(known), indent=1, ensure_ascii=False) if as_json else sensitivity_text(known)
    )


@sensitivity.command(cls=Command)
@click.argument("files", type=SENSITIVITY, nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", type=SENSITIVITY_OUT, required=True, metavar="FILE", help="The merged file.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def merge(files: tuple[Path, ...], output: Path, force: bool) -> None:
    """Merge sensitivities of one model: probes of other groups, other types, or other texts.

    \b
    quantkit sensitivity merge early.json late.json -o r1.json
    """
    from quantkit.lab.allocation.damage import merge as merge_all
    from quantkit.lab.allocation.damage import read_sensitivity

    made = merge_all([(str(f), read_sensitivity(f)) for f in files])
    made.save(output, replace=True)
    click.echo(f"{output}: {len(made.groups)} groups, {len(made.probes)} probes on {len(made.texts)} texts")


def stages(bar: Any) -> Any:
    """Progress on a bar, for what says how much of how much is done: the bar begins again with each stage."""
    state: dict[str, Any] = {"stage": "", "done": 0}

    def progress(stage: str, n_done: int, n_total: int) -> None:
        name = stage.split(" ", maxsplit=1)[0]
        if name != state["stage"]:
            state.update(stage=name, done=0)
            bar.reset(total=n_total)
        bar.set_description_str(stage, refresh=False)
        bar.update(max(0, n_done - state["done"]))
        state["done"] = max(n_done, state["done"])

    return progress


def _types(names: tuple[str, ...] | None) -> tuple[str, ...]:
    from quantkit.base.errors import RecipeError
    from quantkit.recipe.schema import known_type

    try:
        return tuple(known_type(name) for name in names or ())
    except ValueError as e:
        raise RecipeError(str(e)) from None


def _errors(texts: tuple[str, ...] | None) -> tuple[float, ...]:
    out = []
    for text in texts or ():
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < 10:
            raise click.UsageError(f"--noise {text}: is not a relative squared error between 0 and 10, such as 0.01")
        out.append(value)
    return tuple(out)

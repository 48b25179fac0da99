"""quantkit optimize."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar
from .files import IMATRIX, MODEL, RECIPE_OUT, REPORT, SENSITIVITY, Command
from .hub_options import fetched, fetching, hub_options, open_weights
from .options import (
    Size,
    conversion,
    covariance_of,
    device_option,
    imatrix_of,
    json_option,
    layout_option,
    rounding_options,
    threads_option,
    tokenizer_options,
    wanted_rounding,
)
from .sensitivity import stages
from .text_options import choosing_options, read_chunks

if TYPE_CHECKING:
    from quantkit.lab.allocation.targets import Target
    from quantkit.model.catalogue import Catalogue
    from quantkit.recipe.load import Rounding
    from quantkit.text.chunking import Chunks


def _pairs(_ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    out = []
    for value in values:
        left, equals, right = value.rpartition("=")
        if not equals or not left or not right:
            raise click.BadParameter(f"{value!r} has no = with something on both sides, such as {param.metavar}")
        out.append((left, right))
    return tuple(out)


@click.command(cls=Command)
@click.argument("source", type=MODEL)
@click.option("--target", metavar="SIZE", help="Size of the file: 131GiB, 14517920B, or bits per weight: 1.67bpw.")
@click.option(
    "--fit", metavar="GPUS", help="Instead of --target: all layers and their KV cache on these GPUs, such as 2x80."
)
@click.option("--fit-ctx", type=click.IntRange(1, 1 << 24), default=8192, show_default=True, help="Context of --fit.")
@click.option(
    "--fit-reserve",
    type=Size(bare=2**30, least=0),
    default="1",
    show_default=True,
    metavar="GIB",
    help="Kept free on each GPU.",
)
@click.option(
    "-s",
    "--sensitivity",
    "known",
    type=SENSITIVITY,
    required=True,
    metavar="FILE",
    help="What `quantkit sensitivity` wrote.",
)
@click.option(
    "--imatrix", type=IMATRIX, metavar="FILE", help="The importance matrix that the sensitivity was made with."
)
@click.option("-o", "--output", type=RECIPE_OUT, metavar="FILE", help="The recipe.  [default: printed]")
@click.option("--name", help="Of the recipe.  [default: the model's, with the bytes]")
@choosing_options("The second third is used to choose, the last to report. Without text nothing is measured.")
@click.option(
    "--refine",
    type=click.IntRange(0, 1000),
    default=0,
    metavar="N",
    help="Also measure N doubtful neighbours, and keep the best.",
)
@click.option("--types", metavar="TYPES", help="Types to choose from.  [default: 14 from IQ1_S to Q8_0]")
@click.option(
    "--backend",
    type=click.Choice(["any", "cpu", "cuda"]),
    default="any",
    show_default=True,
    help="Only types that run fast on it.",
)
@click.option(
    "--lock", "locks", multiple=True, callback=_pairs, metavar="GLOB=TYPE", help="Fix the type of these tensors."
)
@click.option(
    "--minimum", "minimum", multiple=True, callback=_pairs, metavar="ROLE=TYPE",
    help="Least type of a role; `none` switches one off.  [default: embedding, output: Q3_K; attention, dense ffn, "
    "shared expert: IQ3_XXS]",
)  # fmt: skip
@click.option("--monotone", is_flag=True, help="Within a kind, earlier layers get at least the bits of later ones.")
@click.option("--per-tensor", is_flag=True, help="Let tensors of a group differ in type.")
@click.option(
    "--exponent", type=click.FloatRange(0.2, 1), help="Exponent of the prediction.  [default: fitted, without text 0.5]"
)
@click.option(
    "--compare/--no-compare", default=True, help="Compare with UD, stock and uniform recipes of the same bytes."
)
@rounding_options
@hub_options("that of temporary files")
@device_option
@layout_option
@tokenizer_options
@threads_option
@click.option("--report", type=REPORT, metavar="FILE", help="Also write what is printed to FILE, as Markdown.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def optimize(**given: Any) -> None:
    """Find the recipe that does the least damage within a number of bytes, and measure it against others.

    The recipe is an ordinary one, for `quantkit plan`, `build` and `verify`. Bytes are the whole file's, header and
    padding included. With --rounding the recipe says how to round, is measured so, and its bytes include what the
    file says of that.

    \b
    quantkit optimize DeepSeek-R1/ --target 131GiB -s r1.json --imatrix imatrix.gguf -o best.yaml
    quantkit optimize R1-BF16.gguf --fit 2x80 -s r1.json --text wiki.txt --refine 8 -o best.yaml
    quantkit optimize DeepSeek-R1/ --target 131GiB -s r1.json --rounding feedback --covariance moments/ -o best.yaml
    quantkit optimize DeepSeek-R1/ --target 1.67bpw -s r1.json --lock "output.weight=Q6_K" --minimum attention=none
    """
    from quantkit.lab import require_torch

    require_torch()
    from quantkit.base.outputs import write_text
    from quantkit.forward.stream import Options
    from quantkit.lab.allocation import optimize as lab
    from quantkit.lab.allocation.damage import read_sensitivity
    from quantkit.lab.allocation.optimize_report import optimized_json, optimized_text
    from quantkit.lab.allocation.problem import MINIMUM, Constraints
    from quantkit.lab.allocation.weight_errors import TYPES

    target = _target(given)
    minimum = {**MINIMUM, **dict(given["minimum"])}
    constraints = Constraints(
        tuple(t.strip() for t in given["types"].split(",")) if given["types"] else TYPES,
        given["locks"], {role: least for role, least in minimum.items() if least.lower() != "none"},
        given["monotone"], given["per_tensor"], given["backend"],
    )  # fmt: skip
    forward = Options(given["device"], n_threads=given["threads"] or 0)
    opts = lab.OptimizeOptions(
        constraints, given["refine"], given["exponent"], given["name"] or "", given["compare"], forward=forward,
        rounding=_rounding(given), covariance=covariance_of(given["covariance"]),
    )  # fmt: skip
    catalogue = open_weights(given["source"], conversion(given["layout"], given["pre"], given["pad_token"]))
    known = read_sensitivity(given["known"])
    texts = _texts(catalogue, given)
    if texts is None and given["refine"]:
        raise click.UsageError("--refine measures, so it needs --text, or --choose-text and --report-text")
    shards = (
        nullcontext()
        if texts is None
        else fetched(catalogue, fetching(given["keep"], given["shards"], None, given["quiet"]), given["quiet"])
    )
    with shards, open_bar(1, "", given["quiet"] or texts is None) as bar:
        made = lab.optimize(catalogue, known, target, imatrix_of(given["imatrix"]), texts, opts, stages(bar))
    if given["output"] is not None:
        write_text(given["output"], made.text, given["force"])
    if given["report"] is not None:
        write_text(given["report"], optimized_text(made) + "\n", given["force"])
    if given["as_json"]:
        click.echo(json.dumps(optimized_json(made), indent=1, ensure_ascii=False))
        return
    if given["output"] is None:
        click.echo(made.text)
    click.echo(optimized_text(made), err=given["output"] is None)


def _rounding(given: dict[str, Any]) -> Rounding | None:
    """A policy's path is from the recipe's folder."""
    wanted = wanted_rounding(given["rounding"], given["rounding_policy"])
    if given["covariance"] is not None and (wanted is None or wanted.method == "ggml"):
        raise click.UsageError(
            "--covariance needs a rounding to use it: give --rounding feedback, or --rounding-policy"
        )
    if wanted is None or wanted.method == "ggml":
        return wanted
    if given["covariance"] is None:
        raise click.UsageError(
            f"{wanted.said_by} needs --covariance DIR, since the bytes of the file depend on it; make one with: "
            "quantkit imatrix make MODEL --text F -o imatrix.gguf --covariance DIR"
        )
    if wanted.policy and given["output"] is not None and Path(wanted.policy).suffix in (".yaml", ".yml"):
        folder = Path(given["output"]).parent
        return wanted._replace(policy=os.path.relpath(wanted.policy, folder), folder=folder)
    return wanted


def _target(given: dict[str, Any]) -> Target:
    from quantkit.lab.allocation.targets import parse_fit, parse_target

    if (given["target"] is None) == (given["fit"] is None):
        raise click.UsageError("give one of --target and --fit")
    if given["target"] is not None:
        return parse_target(given["target"])
    return parse_fit(given["fit"], given["fit_reserve"], given["fit_ctx"])


def _texts(catalogue: Catalogue, given: dict[str, Any]) -> tuple[Chunks, Chunks] | None:
    """What to choose on and what to report; None without any text."""
    from quantkit.lab.evaluation.parts import part

    def read(names: tuple[str, ...]) -> Chunks:
        return read_chunks(catalogue, names, given["n_ctx"], None, False, False)

    choose, report, most = given["choose_texts"], given["report_texts"], given["n_chunks"]
    if not given["texts"]:
        if bool(choose) != bool(report):
            raise click.UsageError("--choose-text and --report-text go together, unless --text is given")
        return (part(read(choose), 1, 1, most), part(read(report), 1, 1, most)) if choose else None
    whole = read(given["texts"]) if not (choose and report) else None
    a = part(read(choose), 1, 1, most) if choose else part(whole, 2, 3, most)  # type: ignore[arg-type]
    b = part(read(report), 1, 1, most) if report else part(whole, 3, 3, most)  # type: ignore[arg-type]
    return a, b

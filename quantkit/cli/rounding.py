"""quantkit rounding: what rounds which tensors, decided by measurement."""

from __future__ import annotations

import json
from typing import Any

import click

from .bars import open_bar
from .files import COVARIANCE_IN, IMATRIX, MODEL, POLICY_OUT, RECIPE, Command, Group
from .hub_options import fetched, fetching, hub_options, open_weights
from .options import (
    conversion,
    device_option,
    imatrix_of,
    json_option,
    layout_option,
    probe_memory_option,
    recipe_of,
    threads_option,
    tokenizer_options,
)
from .sensitivity import stages
from .text_options import choosing_options, read_chunks

_METHODS = ("coarse", "feedback", "feedback+gain")


@click.group(cls=Group)
def rounding() -> None:
    """Choose a rounding method for each kind of tensor, for `quantkit build --rounding-policy`.

    \b
    quantkit rounding tune DeepSeek-R1/ -r UD-IQ1_S --imatrix imatrix.gguf --covariance DIR --text wiki.txt -o r1.yaml
    """


@rounding.command(cls=Command)
@click.argument("source", type=MODEL)
@click.option(
    "-r", "--recipe", "recipes", multiple=True, required=True, type=RECIPE,
    help="The recipe whose types are measured. Can be repeated: the policy covers all of them.",
)  # fmt: skip
@click.option(
    "--covariance",
    type=COVARIANCE_IN,
    required=True,
    metavar="DIR",
    help="What `quantkit imatrix make --covariance` wrote.",
)
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="The importance matrix to build with.")
@click.option("-o", "--output", type=POLICY_OUT, metavar="FILE", help="The policy.  [default: printed]")
@click.option("--name", help="Of the policy.  [default: that of FILE]")
@choosing_options("The first half is used to choose, the second to report. Must not be the text of the covariance.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(_METHODS), help="Probe these beside ggml.  [default: all]"
)
@click.option("--search/--no-search", default=True, show_default=True, help="Of scales, in feedback.")
@click.option(
    "--damp", type=click.FloatRange(0, 1, min_open=True), default=0.01, show_default=True,
    help="Of the mean diagonal of the second moments, added to it.",
)  # fmt: skip
@probe_memory_option
@hub_options("that of temporary files")
@device_option
@layout_option
@tokenizer_options
@threads_option
@click.option("--force", is_flag=True, help="Replace FILE.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def tune(**given: Any) -> None:
    """Measure every rounding method for each kind of tensor and type, and write the best as a policy.

    For each kind and type it takes the simplest method that no other beats measurably: ggml's, unless the 95 %
    interval of the difference in KLD says otherwise. Then it measures the recipes as a whole.

    \b
    quantkit rounding tune DeepSeek-R1/ -r UD-IQ1_S -r UD-Q2_K_XL --imatrix imatrix.gguf --covariance moments/ \\
        --text wiki.txt --chunks 40 -o r1.yaml
    quantkit build DeepSeek-R1/ -r UD-IQ1_S --imatrix imatrix.gguf --covariance moments/ \\
        --rounding-policy r1.yaml -o R1.gguf
    """
    from quantkit.lab import require_torch

    require_torch()
    import datetime

    from quantkit.base.outputs import write_text
    from quantkit.forward.stream import Options
    from quantkit.lab.rounding_policy import tuning as lab
    from quantkit.lab.rounding_policy.policy_text import policy_text
    from quantkit.lab.rounding_policy.report import tuned_json, tuned_text
    from quantkit.planning.plan import make_plan, with_values
    from quantkit.rounding.covariance import Covariances

    catalogue = open_weights(given["source"], conversion(given["layout"], given["pre"], given["pad_token"]))
    weights = imatrix_of(given["imatrix"])
    plans = [with_values(make_plan(catalogue, recipe_of(r, ()), weights), weights) for r in given["recipes"]]
    covariance = Covariances(given["covariance"])
    opts = lab.TuneOptions(
        given["methods"] or _METHODS, given["search"], given["damp"], given["memory"],
        forward=Options(given["device"], n_threads=given["threads"] or 0),
    )  # fmt: skip
    texts = _texts(catalogue, given)
    shards = fetched(catalogue, fetching(given["keep"], given["shards"], None, given["quiet"]), given["quiet"])
    with shards, open_bar(1, "", given["quiet"]) as bar:
        made = lab.tune(plans, covariance, texts, opts, stages(bar))
    output = given["output"]
    name = given["name"] or ("policy" if output is None else output.stem)
    text = policy_text(made, name, datetime.date.today().isoformat())
    if output is not None:
        write_text(output, text, given["force"])
    if given["as_json"]:
        click.echo(json.dumps(tuned_json(made, text), indent=1, ensure_ascii=False))
        return
    if output is None:
        click.echo(text)
    click.echo(tuned_text(made), err=output is None)


def _texts(catalogue: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """What to choose on and what to report on."""
    from quantkit.lab.evaluation.parts import part

    choose, report, most = given["choose_texts"], given["report_texts"], given["n_chunks"]
    if not given["texts"] and not (choose and report):
        raise click.UsageError("give --text, or --choose-text and --report-text")

    def read(names: tuple[str, ...]) -> Any:
        return read_chunks(catalogue, names, given["n_ctx"], None, False, False)

    whole = None if choose and report else read(given["texts"])
    a = part(read(choose), 1, 1, most) if choose else part(whole, 1, 2, most)  # type: ignore[arg-type]
    b = part(read(report), 1, 1, most) if report else part(whole, 2, 2, most)  # type: ignore[arg-type]
    return a, b

"""quantkit plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .files import Command
from .options import conversion, imatrix_of, recipe_of, rounded, rounding_options, source_options, with_covariance
from .rounding_estimate import check_rounding_estimate, print_rounding_estimate, rounding_estimate_options
from .terminal import width

if TYPE_CHECKING:
    from quantkit.imatrix.policies import Policy


@click.command(cls=Command)
@source_options
@rounding_options
@rounding_estimate_options
@click.option("--all", "every_tensor", is_flag=True, help="A line for each tensor instead of each kind.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON on standard output.")
def plan(
    source: str,
    recipe: str,
    sets: tuple[str, ...],
    mixture_version: str,
    layout: str,
    imatrix: str | None,
    policy: Policy | None,
    pre: str | None,
    pad_token: str | None,
    split_max_size: int | None,
    rounding: str | None,
    rounding_policy: str | None,
    covariance: Path | None,
    every_tensor: bool,
    as_json: bool,
    **of_estimate: Any,
) -> None:
    """Show the type of every tensor, why, and the exact bytes. Reads headers only.

    SOURCE is a checkpoint directory, a GGUF, a config.json, the name of a known model (deepseek-r1), a
    repository on the Hub (hf://org/repo[@revision]), or the id of one already downloaded with `hf download`.

    \b
    quantkit plan deepseek-r1 --recipe UD-IQ1_S
    quantkit plan deepseek-r1 --recipe UD-IQ1_S --layout kv_b --json | jq .totals
    quantkit plan deepseek-r1 --recipe UD-IQ1_S --rounding feedback --estimate --text-tokens 1M --gpu-tflops 400
    """
    check_rounding_estimate(of_estimate)
    from quantkit.model.open import open_model
    from quantkit.planning import file_layout, report
    from quantkit.planning.plan import make_plan, with_values

    rules = rounded(recipe_of(recipe, sets), rounding, rounding_policy)
    weights = imatrix_of(imatrix, policy)
    made = make_plan(open_model(source, conversion(layout, pre, pad_token)), rules, weights, mixture_version, policy)
    made = with_covariance(made, covariance)
    if of_estimate["estimate"]:
        print_rounding_estimate(source, made, {**of_estimate, "as_json": as_json})
        return
    if weights is not None:  # without one a plan still tells what would be made
        made = with_values(made, weights)
    files = file_layout.lay_out(made, file_layout.output_kvs(made, weights), split_max_size)
    names = file_layout.file_names(
        Path(f"{made.catalogue.model}-{rules.name}.gguf"), len(files), split_max_size is not None
    )
    sizes = [(name.name, f.nbytes) for name, f in zip(names, files, strict=True)]
    if as_json:
        click.echo(json.dumps(made.to_json(sum(n for _, n in sizes)), indent=1, ensure_ascii=False))
    else:
        click.echo(report.plan_text(made, sizes, every_tensor, width()))

"""quantkit plan --estimate: what a plan's rounding would take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar
from .imatrix_estimate import DISK_RATE, Count
from .options import threads_option, together

if TYPE_CHECKING:
    from quantkit.planning.plan import Plan

_ONLY_HERE = {
    "gpu_tflops": "--gpu-tflops", "text_tokens": "--text-tokens", "n_ctx": "--ctx", "disk": "--disk",
    "threads": "--threads",
}  # fmt: skip

#: --estimate, --text-tokens, --ctx, --gpu-tflops, --disk, --threads
rounding_estimate_options = together(
    click.option(
        "--estimate",
        is_flag=True,
        help="Only say what a rounding other than ggml's would take: processor hours, memory and disk, from rates "
        "measured here. The name of a known model or a config.json is enough.",
    ),
    click.option(
        "--text-tokens",
        type=Count(),
        metavar="N",
        help="With --estimate: tokens of the text that second moments are of.  [default: 1M]",
    ),
    click.option(
        "-c", "--ctx", "n_ctx", type=click.IntRange(2, 1 << 20), default=512, show_default=True,
        help="With --estimate: tokens in a chunk.",
    ),
    click.option(
        "--gpu-tflops",
        type=click.FloatRange(0, min_open=True),
        metavar="X",
        help="With --estimate: 10^12 operations a second, for the second moments.  [default: measured here, on the "
        "CPU]",
    ),
    click.option("--disk", type=DISK_RATE, metavar="RATE", help="With --estimate: what the disk reads, as 5GB/s."),
    threads_option,
)  # fmt: skip


def check_rounding_estimate(given: Mapping[str, Any]) -> None:
    """Raise UsageError for options that only an estimate has."""
    ctx = click.get_current_context()
    for name, option in _ONLY_HERE.items():
        said = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if said and not given["estimate"]:
            raise click.UsageError(f"{option} needs --estimate")


def print_rounding_estimate(source: str, plan: Plan, given: Mapping[str, Any]) -> None:
    """Measure rates, and print."""
    if plan.rounding is None:
        raise click.UsageError(
            "--estimate is of a rounding other than ggml's: give --rounding feedback, --rounding-policy, or a recipe "
            "that says how to round"
        )
    from quantkit.base.errors import RecipeError
    from quantkit.base.workers import default_threads
    from quantkit.lab.calibration.estimate import Rates, is_fp8, measured_decode, measured_flop, times_of, work_of
    from quantkit.lab.calibration.estimate_report import read_rate
    from quantkit.lab.rounding_policy.cost import cost_of, measured_factor, measured_rows, rounding_work
    from quantkit.lab.rounding_policy.cost_report import Estimate, cost_json, cost_text

    work = rounding_work(plan)
    if not work.rows:
        raise RecipeError(
            f"{plan.recipe.name}: rounds no tensor of a layer otherwise than ggml; there is nothing to say"
        )
    n_ctx = given["n_ctx"]
    n_tokens = max(n_ctx, (given["text_tokens"] or 1_000_000) // n_ctx * n_ctx)
    model, fp8 = plan.catalogue, is_fp8(source, plan.catalogue)
    rates = {}
    with open_bar(len(work.kinds) + 2, " rates", given["as_json"], "measuring") as bar:
        for (type_, rounding), choice in work.kinds.items():
            bar.set_description_str(f"measuring {type_}", refresh=True)
            rates[type_, rounding] = measured_rows(type_, choice)
            bar.update(1)
        factor_rate = measured_factor()
        bar.update(1)
        n_threads = given["threads"] or default_threads()
        disk = float(given["disk"].nbytes) if given["disk"] is not None else read_rate(model)[0]
        tflops = given["gpu_tflops"]
        of_pass = Rates(tflops * 1e12 if tflops else measured_flop(n_threads), disk, n_threads * measured_decode(fp8))
        bar.update(1)
    the_pass = work_of(model, n_tokens, n_ctx, fp8=fp8, covariance=True)
    found = Estimate(
        work, rates, factor_rate, cost_of(work, rates, factor_rate), the_pass, of_pass, times_of(the_pass, of_pass),
        n_threads, bool(tflops),
    )  # fmt: skip
    click.echo(json.dumps(cost_json(found), indent=1) if given["as_json"] else cost_text(found))

"""quantkit imatrix make --estimate: what it would take, without doing it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .options import Size, together

if TYPE_CHECKING:
    from quantkit.model.catalogue import Catalogue

    _DiskType = click.ParamType[Any]
else:
    _DiskType = click.ParamType  # generic in newer releases only


class Rate(NamedTuple):
    """Bytes a second."""

    nbytes: int


class Disk(_DiskType):
    """A size, or with /s a rate."""

    name = "size or rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Rate:
        if isinstance(value, int | Rate):
            return value
        text = str(value).strip()
        if re.search(r"/\s*s$", text):
            return Rate(Size().convert(text[: text.rindex("/")], param, ctx))
        return Size().convert(text, param, ctx)


class Count(_DiskType):
    """1M, 250K, 1.5M or 1000000."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?[KMG]?", str(value).strip(), re.IGNORECASE):
            self.fail(f"{value!r} is not a number such as 1M, 250K or 1000000", param, ctx)
        return Size().convert(value, param, ctx)


class DiskRate(Disk):
    """5GB/s: what a disk reads."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rate:
        made = super().convert(value, param, ctx)
        if not isinstance(made, Rate):
            self.fail(f"{value!r} is no rate such as 5GB/s", param, ctx)
        return made


DISK, DISK_RATE = Disk(), DiskRate()
#: --estimate, --gpu-tflops, --text-tokens
estimate_options = together(
    click.option(
        "--estimate",
        is_flag=True,
        help="Only print what it would take: operations, bytes, hours, memory, disk. A known model's name or a "
        "config.json is enough.",
    ),
    click.option(
        "--gpu-tflops",
        type=click.FloatRange(0, min_open=True),
        metavar="X",
        help="With --estimate: speed of the GPU in 10^12 operations per second.  [default: measured here, on the CPU]",
    ),
    click.option(
        "--text-tokens",
        type=Count(),
        metavar="N",
        help="With --estimate: number of tokens instead of --text, such as 1M.",
    ),
)


def check_estimate(ctx: click.Context, estimate: bool) -> None:
    """Raise UsageError for options that only an estimate has."""
    rate = next((d for d in ctx.params["disks"] if isinstance(d, Rate)), None)
    for option, value in (
        ("--gpu-tflops", ctx.params["gpu_tflops"]),
        ("--text-tokens", ctx.params["text_tokens"]),
        ("--disk RATE", rate),
    ):
        if value is not None and not estimate:
            raise click.UsageError(f"{option} needs --estimate")


def print_estimate(source: str, model: Catalogue, n_tokens: int, given: Mapping[str, Any]) -> None:
    from dataclasses import asdict

    from quantkit.base.workers import default_threads
    from quantkit.lab.calibration.estimate import Rates, is_fp8, measured_decode, measured_flop, times_of, work_of
    from quantkit.lab.calibration.estimate_report import estimate_text, read_rate
    from quantkit.lab.calibration.inputs import covariance_bytes

    covariance = None
    if given["covariance"] is not None:
        room = next((d for d in given["disks"] if isinstance(d, int)), None)
        covariance = not given["pooled_experts"] and (room is None or covariance_bytes(model) <= room)
    n_ctx = given["n_ctx"]
    n_tokens = max(n_ctx, n_tokens // n_ctx * n_ctx)
    if given["n_chunks"] is not None:
        n_tokens = min(n_tokens, given["n_chunks"] * n_ctx)
    fp8 = is_fp8(source, model)
    work = work_of(model, n_tokens, n_ctx, fp8=fp8, covariance=covariance, fisher=given["fisher"])
    tflops, rate = given["gpu_tflops"], next((d for d in given["disks"] if isinstance(d, Rate)), None)
    disk, how = (float(rate.nbytes), "given") if rate is not None else read_rate(model)
    n_threads = given["threads"] or default_threads()
    rates = Rates(tflops * 1e12 if tflops else measured_flop(n_threads), disk, n_threads * measured_decode(fp8))
    times = times_of(work, rates)
    if given["as_json"]:
        values = {**asdict(work), "flop": work.flop, "rates": asdict(rates), "seconds": asdict(times)}
        values["seconds"]["total"] = times.total
        click.echo(json.dumps(values, indent=1))
    else:
        decode = "measured here on one thread" + (f", times {n_threads:,}" if n_threads > 1 else "")
        sources = ("given" if tflops else "measured here", how, decode)
        click.echo(estimate_text(work, rates, times, sources))

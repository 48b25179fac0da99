"""quantkit build."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import Bars, by_name, open_bar
from .changes import changes
from .files import ATTESTATION, BUILT, CACHE, TOOL, Command, will_write
from .options import (
    Size,
    conversion,
    imatrix_of,
    plan_first_options,
    ready_kernels,
    recipe_of,
    rounded,
    rounding_options,
    source_options,
    threads_option,
    with_covariance,
)
from .rounding_device import a_device, device_called
from .second_moments import pass_asked, pass_options, with_pass
from .terminal import width

if TYPE_CHECKING:
    from quantkit.building.cache import Cache
    from quantkit.building.engines import Engine
    from quantkit.building.run import Build
    from quantkit.imatrix.policies import Policy
    from quantkit.model.sources.shard_store import Limits
    from quantkit.planning.plan import Plan
    from quantkit.verifying.attestation import Asked, AskedRounding
    from quantkit.verifying.evidence import Evidence


@click.command(cls=Command)
@source_options
@rounding_options
@pass_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=BUILT,
    help="The GGUF to make. A symbolic link is neither followed nor replaced.",
)
@click.option(
    "--engine",
    type=click.Choice(["native", "llama-quantize"]),
    default="native",
    show_default=True,
    help="native: one pass, no intermediate file; llama-quantize: drive the stock binary. The same bytes.",
)
@click.option(
    "--llama-quantize",
    "binary",
    type=TOOL,
    metavar="PATH",
    help="The binary to drive (else PATH, else the toolchain's).",
)
@click.option(
    "--rounding-device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    callback=a_device,
    help="Where --rounding's rows are rounded: cpu, whose bytes are the reference, cuda, cuda:1, auto (cuda if there "
    "is one), or torch (by torch on the CPU, to try it).",
)
@threads_option
@click.option("--allow-requantize", is_flag=True, help="Allow a source that is already quantized.")
@click.option(
    "--attest",
    type=ATTESTATION,
    metavar="FILE",
    help="Write an in-toto statement of what was built from what; `quantkit verify --attestation` reads it.",
)
@click.option("--hash-source", is_flag=True, help="With --attest: hash all of the source, not only its headers.")
@click.option("--force", is_flag=True, help="Replace the output, and --attest's FILE, if they exist.")
@click.option(
    "--resume/--restart",
    "resume",
    default=None,
    help="Continue an unfinished build of this output, or discard what it made and start over.  [default: continue if "
    "there is one]",
)
@click.option(
    "--cache",
    "cache_dir",
    type=CACHE,
    metavar="DIR",
    help="Keep finished tensors in DIR, and reuse those that an earlier build made from the same weights.",
)
@click.option(
    "--cache-size",
    type=Size(),
    default="200G",
    show_default=True,
    help="The most DIR may hold; what was used least recently is removed first.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="With hf://…: the most shards of the source on the disk at a time, those on their way included.",
)
@click.option("--disk", type=Size(), metavar="SIZE", help="With hf://…: the most bytes of them, such as 60GB.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Print the whole plan, as `quantkit plan` does, instead of a summary."
)
@plan_first_options
def build(
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
    output: Path,
    engine: str,
    binary: str | None,
    rounding_device: str,
    threads: int | None,
    allow_requantize: bool,
    attest: Path | None,
    hash_source: bool,
    force: bool,
    resume: bool | None,
    cache_dir: Path | None,
    cache_size: int,
    keep: int,
    disk: int | None,
    verbose: bool,
    dry_run: bool,
    quiet: bool,
    **of_pass: Any,
) -> None:
    """Build the GGUF that a recipe describes, in one pass from an FP8 checkpoint or a GGUF.

    \b
    quantkit build DeepSeek-R1/ -o R1-UD-IQ1_S.gguf --recipe UD-IQ1_S --imatrix imatrix.gguf
    quantkit build R1-BF16-00001-of-00030.gguf -o R1.gguf --recipe UD-IQ2_XXS --imatrix imatrix.dat \\
        --split-max-size 50G
    quantkit build hf://deepseek-ai/DeepSeek-R1 -o R1-UD-IQ1_S.gguf --recipe UD-IQ1_S --imatrix imatrix.gguf --keep 2
    quantkit build DeepSeek-R1/ -o R1.gguf --recipe UD-IQ1_S --imatrix imatrix.gguf --rounding feedback \\
        --text calibration.txt
    """
    if hash_source and attest is None:
        raise click.UsageError("--hash-source needs --attest")
    if binary is not None and engine != "llama-quantize":
        raise click.UsageError("--llama-quantize needs --engine llama-quantize")
    asked_pass = pass_asked(of_pass, covariance)
    from quantkit.base.errors import OutputError
    from quantkit.base.outputs import Output
    from quantkit.base.workers import default_threads
    from quantkit.building.cache import Cache
    from quantkit.building.leftovers import finished_shards
    from quantkit.building.run import prepare
    from quantkit.model.hub import with_weights
    from quantkit.model.open import open_model
    from quantkit.model.sources.shard_store import Limits
    from quantkit.planning.plan import make_plan
    from quantkit.planning.rounding import with_device

    ready_kernels()
    rules = rounded(recipe_of(recipe, sets), rounding, rounding_policy)
    weights = imatrix_of(imatrix, policy)
    model = with_weights(open_model(source, conversion(layout, pre, pad_token)))
    made = make_plan(model, rules, weights, mixture_version, policy)
    made = with_device(made, device_called(rounding_device))
    made = with_covariance(made, covariance) if asked_pass is None else with_pass(made, asked_pass, threads)
    chosen = make_engine(engine, binary, Limits(keep, disk))
    if attest is not None and made.weights_in_pass:
        raise click.UsageError("--attest needs --imatrix FILE here: the statement names the importance matrix")
    ready = prepare(made, output, weights, split_max_size, force, allow_requantize, chosen, resume)
    _check_hub_options(ready, attest, cache_dir)
    will_write(*(Output(name, "--output", is_later=True) for name, _ in ready.files))
    show_plan(ready, verbose, quiet)
    if ready.begun is not None and not quiet:
        click.echo(f"continuing the build of {output} begun {ready.begun.head.started}; what it made is checked first")
    if ready.restart and not quiet:
        gone = finished_shards(output, [name for name, _ in ready.files])
        if gone:
            click.echo(
                f"{len(gone)} finished shard{'s' * (len(gone) != 1)} of the build that starts over will be removed, "
                f"first {gone[0]}"
            )
    if dry_run:
        click.echo("dry run: everything was checked, nothing was written")
        return
    evidence = None if attest is None else gather_evidence(ready, quiet)
    cache = None
    if cache_dir is not None:
        try:
            cache = Cache(cache_dir, cache_size)
        except OutputError as e:
            click.echo(f"warning: {e}; the build goes on without a cache", err=True)
    run_with_progress(ready, chosen, threads or default_threads(), quiet, cache)
    if attest is not None and evidence is not None:
        from quantkit.recipe.load import parse_sets
        from quantkit.verifying.attestation import Asked

        asked = Asked(
            recipe, rules.text, parse_sets(sets), mixture_version, layout, pre, pad_token, split_max_size,
            allow_requantize, engine, rules.base_text, None if policy is None else policy.text,
            changes().to_json(),
            _asked_rounding(ready.plan, rounding, rounding_policy), _device_text(ready.plan),
        )  # fmt: skip
        write_attestation(attest, ready, asked, evidence, hash_source, force, quiet)


def show_plan(ready: Build, verbose: bool, quiet: bool) -> None:
    """Print the plan: in ten lines, or all of it, or only its warnings, on standard error. And what is fetched for
    it."""
    from quantkit.base.text import wrapped
    from quantkit.planning import brief, report

    files = [(path.name, f.nbytes) for path, f in ready.files]
    if quiet:
        for warning in report.plan_warnings(ready.plan):
            click.echo(f"warning: {warning}", err=True)
    elif verbose:
        click.echo(report.plan_text(ready.plan, files, width=width()) + "\n")
    else:
        click.echo(brief.brief_text(ready.plan, files, width()) + "\n")
    if ready.supply is not None and not quiet:
        click.echo(wrapped(f"{'download':10}{ready.supply.text(ready.file_bytes)}", width(), " " * 10) + "\n")


def _check_hub_options(ready: Build, attest: Path | None, cache: Path | None) -> None:
    """Raises UnsupportedError for what needs all of a source at hand, where it comes from the Hub by shards."""
    from quantkit.base.errors import UnsupportedError

    given = "--attest" if attest is not None else "--cache" if cache is not None else ""
    if ready.supply is not None and given:
        raise UnsupportedError(
            f"{ready.supply.where}: {given} needs all of the source at hand, and it is fetched shard by shard; leave "
            "it out, or download the repository first and give its folder"
        )


def _asked_rounding(plan: Plan, method: str | None, policy: str | None) -> AskedRounding | None:
    """What an attestation says of how to round: what the command line said, and the text of a policy."""
    from quantkit.verifying.attestation import AskedRounding

    used = None if plan.rounding is None else plan.rounding.policy
    if method is None and used is None:
        return None
    text = None if used is None else (used.text, used.name)
    return AskedRounding(method or "", text, method is not None or policy is not None)


def _device_text(plan: Plan) -> str | None:
    """What a file says of the device that rounded its rows."""
    return None if plan.rounding is None or plan.rounding.device is None else plan.rounding.device.text


def gather_evidence(ready: Build, quiet: bool) -> Evidence:
    """What the build is made from, as it is now: its small files and headers hashed."""
    from quantkit.verifying.evidence import gather

    assert ready.plan.catalogue.source is not None
    bars = Bars(quiet)
    try:
        rounding = ready.plan.rounding
        return gather(
            ready.plan.catalogue.source, ready.imatrix, bars, None if rounding is None else rounding.covariance
        )
    finally:
        bars.close()


def write_attestation(
    path: Path, ready: Build, asked: Asked, evidence: Evidence, whole: bool, force: bool, quiet: bool
) -> None:
    """Hash what was made, and with `whole` all of the source, and write the statement."""
    from quantkit.llama_cpp.toolchain import GGML_VERSION
    from quantkit.verifying.attestation import statement
    from quantkit.verifying.manifest import write_json

    bars = Bars(quiet)
    try:
        files = [name for name, _ in ready.files]
        made = statement(ready.plan, evidence, asked, files, {"ggml": GGML_VERSION}, bars, whole)
    finally:
        bars.close()
    write_json(path, made, force)
    if not quiet:
        click.echo(f"{path}  attestation of {len(files)} file{'s' * (len(files) != 1)}")


def make_engine(name: str, binary: str | None, limits: Limits | None = None) -> Engine:
    """The engine by name, with the tools it needs found."""
    from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
    from quantkit.building.engines.native import NativeEngine
    from quantkit.llama_cpp import toolchain

    if name == "native":
        return NativeEngine(limits=limits)
    return LlamaQuantizeEngine(toolchain.find_quantize(binary))


def run_with_progress(ready: Build, engine: Engine, n_threads: int, quiet: bool, cache: Cache | None = None) -> None:
    """Run a build with one progress bar, in weights, and say what was made."""
    from quantkit.base.text import short_size
    from quantkit.building import run as builds

    start = time.monotonic()
    n = ready.plan.n_elements
    with open_bar(n, "w", quiet) as bar:
        kept = builds.run(ready, engine, n_threads, by_name(bar), cache)
        bar.set_description_str("done", refresh=True)
    seconds = time.monotonic() - start
    if cache is not None and cache.n_corrupt:
        click.echo(
            f"warning: {cache.n_corrupt} damaged entries of {cache.folder} were removed and made again", err=True
        )
    if cache is not None and cache.failure:
        click.echo(f"warning: not all of the cache {cache.folder} could be used: {cache.failure}", err=True)
    if not quiet:
        for path, file_layout in ready.files:
            click.echo(f"{path}  {file_layout.nbytes:,} bytes")
        if cache is not None:
            n_all = len(ready.plan.tensors)
            click.echo(
                f"cache: {cache.n_found} of {n_all} tensors, {cache.bytes_found:,} bytes, came from {cache.folder}; "
                f"{cache.n_kept} were added"
            )
        if kept:
            click.echo(f"{kept:,} of {n:,} weights were kept from before, {n - kept:,} quantized now")
        click.echo(
            f"{short_size(ready.file_bytes)} in {seconds:.1f} s, {(n - kept) / seconds / 1e6:.1f} M weights/s, "
            f"{ready.plan.bpw:.2f} BPW, engine {engine.name}, {n_threads} thread{'s' * (n_threads != 1)}"
        )

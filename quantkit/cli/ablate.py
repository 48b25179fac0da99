"""quantkit ablate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar, whole_progress
from .files import CACHE, FOLDER, IMATRIX, MODEL, PATH, RESULTS, RULES, STUDY_FILES, Command, Group, will_write
from .hub_options import fetched, fetching, hub_options
from .imatrix_estimate import DISK_RATE, estimate_options
from .options import (
    Size,
    conversion,
    covariance_of,
    device_option,
    dtype_option,
    imatrix_policy_option,
    json_option,
    layout_option,
    rounded,
    rounding_options,
    threads_option,
    together,
    tokenizer_options,
)
from .text_options import check_countable, chunk_options, optional_text_options, print_notes, read_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantkit.forward.model import Model
    from quantkit.lab.studies.ablate import AblateOptions
    from quantkit.lab.studies.study import Study, Variant
    from quantkit.model.catalogue import Catalogue


@click.group(cls=Group.of("run"))
def ablate() -> None:
    """Run studies: many variants of a recipe, measured side by side.

    `quantkit ablate STUDY SOURCE` is short for `quantkit ablate run STUDY SOURCE`.

    \b
    quantkit ablate study.yaml DeepSeek-R1/ --imatrix imatrix.gguf --text wiki.txt -o study.db
    quantkit ablate show study.db
    """


#: --cache, --cache-size, --files, --force, --engine, --llama-bin
_made_options = together(
    click.option(
        "--cache", "cache_dir", type=CACHE, metavar="DIR",
        help="Keep quantized tensors in DIR, as quantkit build does: for other passes, runs, studies and builds.",
    ),
    click.option("--cache-size", type=Size(), default="200G", show_default=True, help="The most DIR may hold."),
    click.option(
        "--files", "files_folder", type=STUDY_FILES, metavar="DIR",
        help="Also build a GGUF of every variant in DIR; those that are there and still right are kept.",
    ),
    click.option("--force", is_flag=True, help="Replace files in DIR that are something else."),
    click.option(
        "--engine", type=click.Choice(["native", "llama.cpp"]), default="native", show_default=True,
        help="llama.cpp: the stock llama-perplexity measures those files.",
    ),
    click.option(
        "--llama-bin", type=FOLDER, metavar="DIR", help="Folder of llama-perplexity, such as your own CUDA build."
    ),
)  # fmt: skip


@ablate.command(cls=Command)
@click.argument("study_file", metavar="STUDY", type=RULES)
@click.argument("source", type=MODEL)
@optional_text_options
@chunk_options
@click.option("-o", "--output", "results_file", type=RESULTS, metavar="FILE", help="Results: SQLite.")
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix, where the study names none.")
@imatrix_policy_option
@_made_options
@rounding_options
@click.option("--at-a-time", type=click.IntRange(1), help="Variants in a pass.  [default: as memory allows]")
@device_option
@dtype_option
@click.option("--memory", type=Size(), metavar="SIZE", help="Memory for the hidden states of a pass.  [default: 2 GiB]")
@hub_options("that of RESULTS")
@layout_option
@tokenizer_options
@threads_option
@estimate_options
@click.option(
    "--disk", type=DISK_RATE, metavar="RATE", help="With --estimate: reading speed of the disk, such as 5GB/s."
)
@click.option("-n", "--dry-run", is_flag=True, help="Show the variants with their exact sizes; measure nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No plan and no progress; errors only.")
@json_option
def run(**given: Any) -> None:
    """Measure every variant of a study against SOURCE's own weights.

    Variants are quantized in memory and advance together; a tensor that several share is quantized once. What is
    measured is kept in the results file at once, so that the same command goes on after an interrupt; a variant that
    fails does not stop the others, but the command then exits with 1.

    \b
    quantkit ablate run study.yaml DeepSeek-R1/ --imatrix imatrix.gguf --text wiki.txt --chunks 100 -o study.db
    quantkit ablate study.yaml DeepSeek-R1/ --imatrix imatrix.gguf --text wiki.txt -o study.db --dry-run
    quantkit ablate study.yaml R1-BF16.gguf --text wiki.txt -o study.db --files built/ --engine llama.cpp
    quantkit ablate study.yaml deepseek-r1 --estimate --gpu-tflops 400 --disk 5GB/s --text-tokens 51200
    """
    _check_usage(given)
    from quantkit.lab.studies import report as ablate_report
    from quantkit.lab.studies.study import load_study, require_one, variants
    from quantkit.model.hub import with_layers
    from quantkit.model.open import open_model

    study = load_study(given["study_file"])
    catalogue = open_model(given["source"], conversion(given["layout"], given["pre"], given["pad_token"]))
    if not given["estimate"]:
        catalogue = with_layers(catalogue)
        _check_hub_options(catalogue, given)
    estimate, method, rounding_policy = given["estimate"], given["rounding"], given["rounding_policy"]
    every = list(
        variants(
            study, catalogue, given["imatrix"], given["policy"], covariance_of(given["covariance"]),
            lambda recipe: rounded(recipe, method, rounding_policy), values=not estimate,
        )
    )  # fmt: skip
    require_one(every)
    if estimate:
        _print_estimate(study, every, catalogue, given)
        return
    from quantkit.forward.model import Model
    from quantkit.lab.evaluation.evaluate import about_reference
    from quantkit.lab.studies import ablate as lab
    from quantkit.lab.studies.results import Results

    chunks = read_chunks(
        catalogue, given["texts"], given["n_ctx"], given["n_chunks"], given["chat"], given["parse_special"]
    )
    reference = Model(catalogue)
    if (says := about_reference(reference)) is not None:
        print_notes([says])
    size = given["at_a_time"] or lab.at_a_time(reference, chunks, given["memory"])
    by_tool = given["engine"] == "llama.cpp"
    n_passes = 0 if by_tool else -(-len(every) // size)
    if not given["quiet"] and not given["as_json"]:
        click.echo(ablate_report.plan_text(study, every, n_passes))
    options = _options(study, every, reference, size, given)
    if given["dry_run"]:
        if given["as_json"]:
            click.echo(json.dumps(ablate_report.plan_json(study, every, n_passes), indent=1, ensure_ascii=False))
        else:
            click.echo("dry run: everything was checked, nothing was measured")
        return
    quiet = given["quiet"] or given["as_json"]
    shards = fetched(catalogue, fetching(given["keep"], given["shards"], given["results_file"], quiet), quiet)
    with Results(given["results_file"]) as results:
        try:
            with shards, open_bar(0, "", given["quiet"]) as bar:

                def warn(line: str) -> None:
                    bar.clear()
                    click.echo(f"warning: {line}", err=True)

                found = lab.ablate(study, every, reference, chunks, results, options, whole_progress(bar), warn)
                bar.leave = bar.n > 0
        except BaseException as e:
            n = sum(r.scores is not None for r in results.of(study.name))
            if n:
                words = f"the results of {n:,} variant{'s' * (n != 1)}; run the same command again to continue"
                e.kept = f"{given['results_file']} keeps {words}"  # type: ignore[attr-defined]
            raise
    cache = None if options.cached is None else options.cached.cache
    if cache is not None and cache.failure:
        click.echo(f"warning: not all of the cache {cache.folder} could be used: {cache.failure}", err=True)
    if given["as_json"]:
        click.echo(json.dumps(ablate_report.show_json(found), indent=1, ensure_ascii=False))
    elif not given["quiet"]:
        click.echo("")
        click.echo(ablate_report.results_text(found))
    if any(r.trouble for r in found):
        click.get_current_context().exit(1)


def _check_hub_options(catalogue: Catalogue, given: dict[str, Any]) -> None:
    """Raises UnsupportedError for what needs all of a source at hand, where it comes from the Hub by shards."""
    from quantkit.base.errors import UnsupportedError
    from quantkit.lab.fetched import origin

    option = "--cache" if given["cache_dir"] is not None else "--files" if given["files_folder"] is not None else ""
    if option and (where := origin(catalogue)):
        raise UnsupportedError(
            f"{where}: {option} needs all of the source at hand, and it is fetched shard by shard; leave it out, or "
            "download the repository first and give its folder"
        )


def _check_usage(given: dict[str, Any]) -> None:
    """Raise UsageError for options that do not go together."""
    by_tool = given["engine"] == "llama.cpp"
    if by_tool and given["files_folder"] is None:
        raise click.UsageError("--engine llama.cpp measures files: give --files DIR, where they are built")
    if by_tool and (given["chat"] or given["parse_special"]):
        raise click.UsageError("--engine llama.cpp reads plain text: leave out --chat and --parse-special")
    if given["llama_bin"] is not None and not by_tool:
        raise click.UsageError("--llama-bin needs --engine llama.cpp")
    if given["force"] and given["files_folder"] is None:
        raise click.UsageError("--force needs --files: it is for what is there")
    if given["estimate"]:
        if not given["texts"] and given["text_tokens"] is None:
            raise click.UsageError("--estimate needs --text-tokens, or a --text to count")
        return
    for option, value in (("--gpu-tflops", "gpu_tflops"), ("--text-tokens", "text_tokens"), ("--disk", "disk")):
        if given[value] is not None:
            raise click.UsageError(f"{option} needs --estimate")
    if not given["texts"]:
        raise click.UsageError("Missing option '--text'.")
    if given["results_file"] is None and not given["dry_run"]:
        raise click.UsageError("Missing option '-o'.")


def _options(
    study: Study, every: Sequence[Variant], reference: Model, size: int, given: dict[str, Any]
) -> AblateOptions:
    """How the study is carried out; the names of files are checked."""
    from quantkit.base.errors import OutputError
    from quantkit.base.outputs import Output
    from quantkit.base.workers import default_threads
    from quantkit.building.cache import Cache
    from quantkit.building.cached_tensors import CachedTensors
    from quantkit.forward.stream import Options
    from quantkit.lab.evaluation.llama_perplexity import Tool
    from quantkit.lab.studies.ablate import AblateOptions, ByTool
    from quantkit.lab.studies.files import StudyFiles
    from quantkit.llama_cpp import toolchain
    from quantkit.text.sources import read_texts

    threads = given["threads"] or default_threads()
    cache = None
    if given["cache_dir"] is not None and not given["dry_run"]:
        try:
            cache = Cache(given["cache_dir"], given["cache_size"])
        except OutputError as e:
            click.echo(f"warning: {e}; the study goes on without a cache", err=True)
    files = None
    if given["files_folder"] is not None:
        files = StudyFiles(given["files_folder"], study.name, threads, cache, given["force"])
        will_write(*(Output(files.path_of(v.name), "--files", only_compared=True) for v in every))
    by_tool = None
    if given["engine"] == "llama.cpp":
        bin_ = given["llama_bin"]
        binary = toolchain.find("llama-perplexity", None if bin_ is None else Path(bin_) / "llama-perplexity")
        texts = read_texts(given["texts"])
        chunks = read_chunks(reference.catalogue, given["texts"], given["n_ctx"], given["n_chunks"], False, False)
        tool = Tool(binary, chunks.n_ctx, chunks.n_chunks, reference.family.n_vocab, threads, figures=False)
        by_tool = ByTool(tool, texts.joined)
    forward = Options(given["device"], given["dtype"], given["threads"] or 0, given["memory"])
    cached = None if cache is None else CachedTensors(cache, threads)
    return AblateOptions(size, forward, cached, files, by_tool)


def _print_estimate(study: Study, every: Sequence[Variant], catalogue: Catalogue, given: dict[str, Any]) -> None:
    from dataclasses import asdict

    from quantkit.base.workers import default_threads
    from quantkit.lab.calibration.estimate import Rates, is_fp8, measured_decode, measured_flop
    from quantkit.lab.calibration.estimate_report import read_rate
    from quantkit.lab.studies import estimate as lab

    n_ctx, n_chunks = given["n_ctx"], given["n_chunks"]
    n_tokens = given["text_tokens"]
    if n_tokens is None:
        check_countable(catalogue)
        n_tokens = read_chunks(
            catalogue, given["texts"], n_ctx, n_chunks, given["chat"], given["parse_special"]
        ).tokens.size  # fmt: skip
    n_tokens = max(n_ctx, n_tokens // n_ctx * n_ctx)
    n_tokens = n_tokens if n_chunks is None else min(n_tokens, n_chunks * n_ctx)
    fp8 = is_fp8(given["source"], catalogue)
    text = lab.Text(n_tokens, n_ctx, fp8)
    work = lab.study_work(study, every, catalogue, text, given["memory"], given["at_a_time"] or 0)
    tflops, rate = given["gpu_tflops"], given["disk"]
    disk, how = (float(rate.nbytes), "given") if rate is not None else read_rate(catalogue)
    threads = given["threads"] or default_threads()
    rates = Rates(tflops * 1e12 if tflops else measured_flop(threads), disk, measured_decode(fp8))
    quantize = lab.measured_quantize(sorted(work.quantized))
    times = lab.study_times(work, rates, quantize, threads)
    if given["as_json"]:
        seconds = {**asdict(times), "total": times.total, "total_with_cache": times.total_with_cache}
        values = {"quantkit_ablate_estimate": 1, **asdict(work), "rates": asdict(rates), "quantize": quantize}
        click.echo(json.dumps({**values, "seconds": seconds}, indent=1))
        return
    sources = ("given" if tflops else "measured here", how)
    click.echo(lab.study_estimate_text(work, rates, times, sources, threads))


@ablate.command(cls=Command)
@click.argument("results_file", metavar="RESULTS", type=PATH)
@click.option("--study", help="Show this study only.")
@json_option
def show(results_file: Path, study: str | None, as_json: bool) -> None:
    """Show results: a table, what each level changes, and the front of size against KLD.

    \b
    quantkit ablate show study.db
    quantkit ablate show study.db --json | jq '.results[] | .scores.mean_kld'
    """
    from quantkit.lab.studies import report as ablate_report
    from quantkit.lab.studies.results import Results

    with Results(results_file, read_only=True) as results:
        found = list(results.of(study))
        if study is not None and not found:
            there = ", ".join(sorted({r.study for r in results.of()})) or "none"
            raise click.UsageError(f"{results_file} has no study '{study}'; it has {there}")
    if as_json:
        click.echo(json.dumps(ablate_report.show_json(found), indent=1, ensure_ascii=False))
    else:
        click.echo(ablate_report.show_text(found))

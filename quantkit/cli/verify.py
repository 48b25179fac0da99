"""quantkit verify."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from .bars import Bars
from .changes import change_options, changes
from .files import GGUF, IMATRIX, MANIFEST, MODEL, PATH, RECIPE, Command
from .ggufs import as_built
from .options import (
    conversion,
    covariance_of,
    imatrix_of,
    imatrix_policy_option,
    layout_option,
    mixture_version_option,
    recipe_of,
    rounded,
    rounding_options,
    set_option,
    threads_option,
)

if TYPE_CHECKING:
    from quantkit.imatrix.matrix import Imatrix
    from quantkit.imatrix.policies import Policy
    from quantkit.model.catalogue import Catalogue
    from quantkit.planning.plan import Plan
    from quantkit.recipe.load import Recipe
    from quantkit.verifying.attestation import Asked, Attested
    from quantkit.verifying.rederive import RowCheck


@click.command(cls=Command)
@click.argument("output", metavar="OUT", type=GGUF)
@click.option(
    "-r", "--recipe", type=RECIPE, help="The recipe it should be: a shipped one's name, or a YAML file. Needs --source."
)
@click.option("--plan", "plan_file", type=PATH, metavar="FILE", help="Or the plan, from `quantkit plan --json`.")
@click.option(
    "-s", "--source", type=MODEL, metavar="SOURCE",
    help="What it was made from: a checkpoint directory or a GGUF, to derive rows again; or a config.json, or the "
    "name of a known model, for the plan only.",
)  # fmt: skip
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="The importance matrix it was made with.")
@imatrix_policy_option
@rounding_options
@click.option(
    "--sample", metavar="1%|N|all|none",
    help="Rows to derive again: a share, a number, all, or none; at least one of each matrix and expert.  "
    "[default: 1%]",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Chooses the rows.")
@set_option
@change_options
@mixture_version_option
@layout_option
@click.option("--pre", metavar="NAME", help="tokenizer.ggml.pre, as for build.")
@click.option("--pad-token", metavar="TOKEN", help="Padding token, as for build.")
@click.option("--ignore-key", "ignored", multiple=True, metavar="KEY", help="Do not compare this metadata key.")
@click.option("--manifest", type=PATH, metavar="FILE", help="Compare with the hashes in FILE.")
@click.option(
    "--write-manifest", type=MANIFEST, metavar="FILE",
    help="Write SHA-256 of each file and tensor to FILE, if nothing is found wrong.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace --write-manifest's FILE if it exists.")
@click.option("--attestation", "attestation_file", type=PATH, metavar="FILE", help="Check what build --attest wrote.")
@click.option("--hash-source", is_flag=True, help="With --attestation: hash all of the source, not only its headers.")
@threads_option
@click.option(
    "--findings",
    "most",
    type=click.IntRange(1, 10_000),
    default=40,
    show_default=True,
    help="The most findings to print.",
)
@click.option("--json", "as_json", is_flag=True, help="The verdict as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def verify(
    ctx: click.Context,
    output: Path,
    recipe: str | None,
    plan_file: Path | None,
    source: str | None,
    imatrix: str | None,
    policy: Policy | None,
    rounding: str | None,
    rounding_policy: str | None,
    covariance: Path | None,
    sample: str | None,
    seed: int,
    sets: tuple[str, ...],
    mixture_version: str,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    ignored: tuple[str, ...],
    manifest: Path | None,
    write_manifest: Path | None,
    force: bool,
    attestation_file: Path | None,
    hash_source: bool,
    threads: int | None,
    most: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a finished GGUF, with code that shares nothing with what wrote it.

    OUT is a file, any shard, or the name that a split file was built under. Alone: its structure, padding, lengths,
    shards, and every block's scales. With a plan (--recipe and --source, or --plan): types, shapes, bytes, and the
    metadata. With --source and --imatrix: rows quantized again from the source by ggml itself, compared bit for bit;
    rows that quantkit rounded itself are made again, with --covariance.

    The last line is the verdict. Exit code 0 if all is well, 1 if the file is sound but not what was asked for, 12 if
    anything else was found.

    \b
    quantkit verify R1-UD-IQ1_S.gguf
    quantkit verify R1-UD-IQ1_S.gguf --recipe UD-IQ1_S --source DeepSeek-R1/ --imatrix imatrix.gguf --sample 1%
    quantkit verify R1-UD-IQ1_S.gguf --write-manifest R1.json
    """
    from quantkit.base.workers import default_threads
    from quantkit.planning.rounding import with_covariance
    from quantkit.rounding.rounder import Rounder
    from quantkit.verifying import against_plan, attestation
    from quantkit.verifying import manifest as manifests
    from quantkit.verifying.on_device import counted
    from quantkit.verifying.rounding import headers, recorded, settled
    from quantkit.verifying.run import Request
    from quantkit.verifying.run import verify as run

    attested = None if attestation_file is None else attestation.read(attestation_file)
    output = as_built(output)
    _check_usage(recipe, plan_file, source, sample, hash_source, sets, attested)
    given = None if manifest is None else manifests.read(manifest)
    weights = imatrix_of(imatrix, policy)
    if attested is not None:  # what it was built with, unless said otherwise here
        asked = attested.asked
        _check_agrees(ctx, asked)
        layout, mixture_version, pre, pad_token = asked.layout, asked.mixture_version, asked.pre, asked.pad_token
        policy = _attested_policy(asked, policy) if weights is not None else policy
    rules = recipe_of(recipe, sets) if recipe else _attested_recipe(attested) if attested and source else None
    if rules is not None:
        rules = rounded(rules, rounding, rounding_policy)
        if attested is not None:
            rules = _attested_rounding(attested.asked, rules, recipe is not None)
    model = None
    if source is not None:
        from quantkit.model.hub import with_weights
        from quantkit.model.open import open_model

        model = open_model(source, conversion(layout, pre, pad_token))
        if sample not in (None, "none"):  # of the Hub only what is asked for: a row is a request
            model = with_weights(model, by_range=True)
    chosen = None if weights is None else _policy(output, rules, policy)
    made = _plan(model, rules, weights, mixture_version, None if chosen is None else chosen.policy)
    said, moments = recorded(headers(output)), covariance_of(covariance)
    if made is not None:
        made = with_covariance(made, moments)
    made, how, notes = settled(made, said, moments)
    expected = against_plan.read_plan(plan_file) if plan_file else against_plan.expected_of(made) if made else None
    rows = _rows(model, weights, sample, seed, None if chosen is None else chosen.policy)
    if rows is not None and how is not None:
        rows = replace(
            rows, rounding=how, rounder=None if moments is None else Rounder(moments), on_device=counted(how)
        )
    request = Request(
        output, expected, made, weights, ignored, rows, given, attested, hash_source, write_manifest is not None,
        threads or default_threads(), said,
    )  # fmt: skip
    bars = Bars(quiet)
    try:
        outcome = run(request, bars)
    finally:
        bars.close()
    verdict = outcome.verdict
    verdict.notes += notes
    if model is not None and model.commit:
        verdict.notes.append(f"the source was read on the Hub at commit {model.commit}")
    if chosen is not None and chosen.note and (rows is not None or made is not None):
        verdict.notes.append(chosen.note)
    if rows is None and model is not None and sample is None:
        verdict.notes.append("no rows were derived again: of the source only headers are known")
    if write_manifest is not None and verdict.ok:
        manifests.write_json(write_manifest, manifests.make(outcome.files.files, outcome.digests), force)
        verdict.notes.append(f"wrote the manifest {write_manifest}")
    elif write_manifest is not None:
        verdict.notes.append(f"{write_manifest} was not written, since the file is damaged")
    at = {"source_commit": model.commit} if model is not None and model.commit else {}
    click.echo(json.dumps(verdict.to_json() | at, indent=1, ensure_ascii=False) if as_json else verdict.text(most))
    ctx.exit(verdict.exit_code)


def _check_usage(
    recipe: str | None, plan: Path | None, source: str | None, sample: str | None, hash_source: bool,
    sets: Sequence[str], attested: Attested | None,
) -> None:  # fmt: skip
    if recipe and plan:
        raise click.UsageError("--recipe and --plan both say what the file should be; give one")
    if recipe and not source:
        raise click.UsageError(
            "--recipe needs --source: a checkpoint, a GGUF, a config.json, or the name of a known model"
        )
    if sets and not recipe:
        raise click.UsageError("--set needs --recipe")
    if changes() and not recipe:
        raise click.UsageError("--type and the other changes of a recipe need --recipe")
    if sample and sample != "none" and not source:
        raise click.UsageError("--sample needs --source: rows are derived again from the weights")
    if hash_source and attested is None:
        raise click.UsageError("--hash-source needs --attestation")


def _check_agrees(ctx: click.Context, asked: Asked) -> None:
    """Raises UsageError for an option of the build that is given here with another value than was attested."""
    for name in ("layout", "mixture_version", "pre", "pad_token"):
        given, was = ctx.params[name], getattr(asked, name)
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT and given != was:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"{option} {given} contradicts the attestation, which records "
                f"{'none' if was is None else f'{option} {was}'}; leave it out, or verify without --attestation"
            )


def _attested_recipe(attested: Attested) -> Recipe:
    """The recipe whose text an attestation has."""
    from quantkit.base.errors import RecipeError
    from quantkit.recipe.changes import Changes
    from quantkit.recipe.load import parse

    asked = attested.asked
    try:
        recipe = parse(asked.recipe_text, asked.recipe_name, asked.sets, None, asked.base_text)
        return Changes.from_json(asked.changes).apply(recipe)
    except RecipeError as e:  # of an older statement, without the text of a base that was a file of its own
        raise RecipeError(f"{e}; the attested recipe cannot be read alone: give it with --recipe") from None


def _attested_rounding(asked: Asked, rules: Recipe, is_given: bool) -> Recipe:
    """A recipe with the rounding that an attested build was given, unless something else is given here. Raises
    UsageError where another is."""
    from quantkit.recipe.load import Rounding

    was, now = asked.rounding, rules.rounding
    by_option = now is not None and now.said_by in ("--rounding", "--rounding-policy")
    if by_option and now is not None:
        same = (
            was is not None and was.by_option and (now.method == was.method if now.method else was.policy is not None)
        )
        if not same:
            had = "none" if was is None or not was.by_option else f"--rounding {was.method or 'by a policy'}"
            raise click.UsageError(
                f"{now.said_by} {now.method or now.policy} contradicts the attestation, which records {had}; "
                "leave it out, or verify without --attestation"
            )
        return rules
    if was is None or (was.policy is None and not was.by_option):
        return rules
    text, name = was.policy or (None, "")
    wanted = Rounding(was.method if was.policy is None else "", name, None, text, "the attestation")
    if was.by_option:
        return rules.with_rounding(wanted)
    return rules if is_given else replace(rules, rounding=wanted)  # its rules' own words stay


class _Chosen(NamedTuple):
    policy: Policy
    note: str


def _policy(output: Path, rules: Recipe | None, given: Policy | None) -> _Chosen:
    """What stood in for what the importance matrix lacks: what is given here, else the recipe's, else what the file
    says of itself, else what llama-quantize does. Raises SourceError."""
    from quantkit.imatrix.policies import AS_LLAMA_QUANTIZE, parse_policy
    from quantkit.verifying.against_plan import recorded_policy
    from quantkit.verifying.rounding import headers

    if given is not None:
        return _Chosen(given, "")
    if rules is not None and rules.imatrix_policy is not None:
        return _Chosen(parse_policy(rules.imatrix_policy), "")
    recorded = recorded_policy(headers(output))
    if recorded is None:
        return _Chosen(AS_LLAMA_QUANTIZE, "")
    note = f"the policy for what the importance matrix lacks, {recorded.text}, was taken from the file itself"
    return _Chosen(recorded, f"{note}: give --imatrix-policy to check it too")


def _attested_policy(asked: Asked, given: Policy | None) -> Policy | None:
    """The policy that was given to an attested build. Raises UsageError where another is given here, SourceError."""
    from quantkit.base.errors import SourceError
    from quantkit.imatrix.policies import parse_policy

    said = asked.imatrix_policy
    try:
        was = None if said is None else parse_policy(said)
    except ValueError as e:
        raise SourceError(f"the attestation's imatrixPolicy: {e}") from None
    if given is not None and given != was:
        had = "none" if was is None else f"--imatrix-policy {was.text}"
        raise click.UsageError(
            f"--imatrix-policy {given.text} contradicts the attestation, which records {had}; leave it out, "
            "or verify without --attestation"
        )
    return was


def _plan(
    model: Catalogue | None, rules: Recipe | None, weights: Any, mixture_version: str, policy: Policy | None
) -> Plan | None:
    from quantkit.planning.plan import make_plan, with_values

    if model is None or rules is None:
        return None
    made = make_plan(model, rules, weights, mixture_version, policy)
    return made if weights is None else with_values(made, weights)


def _rows(
    model: Catalogue | None, weights: Imatrix | None, sample: str | None, seed: int, policy: Policy | None
) -> RowCheck | None:
    """What rows to derive again; None for none. Raises UsageError, SourceError, ImatrixError, KernelError."""
    if model is None or sample == "none" or (sample is None and model.source is None):
        return None
    from quantkit.llama_cpp import toolchain
    from quantkit.planning.gaps import completed
    from quantkit.verifying.ggml import Ggml
    from quantkit.verifying.rederive import RowCheck, check_source, parse_sample

    try:
        chosen = parse_sample(sample or "1%")
    except ValueError as e:
        raise click.UsageError(f"--sample: {e}") from None
    source = check_source(model)
    values = None
    if weights is not None and policy is not None:
        weights.check()
        values = completed(model, weights, policy)
    return RowCheck(model, source, values, Ggml(toolchain.ggml_library()), chosen, seed)

"""What `import quantkit` offers a script: a model, a recipe, their plan, and what can be done with it.

Each function is the command of its name without the command line: nothing is printed, and what is wrong is raised as a
QuantkitError. Heavy modules are imported when a function that needs them is called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .imatrix.matrix import Imatrix
    from .imatrix.policies import Completed
    from .lab.allocation.damage import Sensitivity
    from .lab.allocation.optimize import OptimizeOptions
    from .lab.allocation.optimized import Optimized
    from .lab.allocation.sensitivity import ProbeOptions
    from .model.catalogue import Catalogue
    from .planning.imatrix_check import Check
    from .planning.plan import Plan
    from .recipe.load import Recipe
    from .rounding.covariance import CovarianceSource
    from .text.chunking import Chunks
    from .verifying.verdict import Verdict

#: called with a tensor's name and how many of its values are done since the last call, from any thread
Progress = Callable[[str, int], None]
#: called with a stage, and how much of how much of it is done
Stages = Callable[[str, int, int], None]
Name = str | os.PathLike[str]


@dataclass(frozen=True)
class BuildResult:
    """What a build has made."""

    files: tuple[Path, ...]
    """the GGUF, or its shards in order"""
    nbytes: int
    """of all files"""
    seconds: float
    n_values: int
    """weights of the model"""
    n_kept: int
    """of them, those that an unfinished build had made before"""
    warning: str
    """why the cache could not be used or could not keep a tensor; empty if all is well"""


@dataclass(frozen=True)
class BuildOptions:
    """What few builds need to say."""

    split_max_size: int | None = None
    """bytes of tensor data in a shard at most; one file without it"""
    allow_requantize: bool = False
    """quantize tensors again that the source has quantized already, at a loss"""
    cache: Name | None = None
    """a folder for finished tensors, which later builds take from there"""
    cache_size: int = 200 * 10**9
    """bytes of it at most"""
    keep: int = 3
    """shards of a source on the Hub that are on the disk at a time, at most"""
    disk: int | None = None
    """bytes of them at most"""


def open_model(
    source: Name, *, layout: str | None = None, pre: str | None = None, pad_token: str | None = None
) -> Catalogue:
    """The tensors and the metadata of a model: a known model's name, a config.json, a checkpoint directory or a GGUF
    (here or, by their headers only, at hf://org/repo, hf://… or https://…), or the id of a repository in Hugging Face's
    cache. No weight is read.

    `layout` is "k_b+v_b" (the default) or "kv_b"; `pre` a tokenizer.ggml.pre; `pad_token` a token's text or number.
    Raises SourceError, UnsupportedError.

    >>> import quantkit as qk
    >>> model = qk.open_model("deepseek-r1")
    >>> model.arch, model.n_layers, len(model.tensors)
    ('deepseek2', 61, 1086)
    """
    from .model.families.options import Options
    from .model.open import open_model as open_it

    return open_it(
        os.fspath(source), Options(layout or "k_b+v_b", pre, pad_token=pad_token, layout_given=layout is not None)
    )


def load_recipe(recipe: Name, sets: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by a shipped one's name, by the path of a YAML file, or from its text, which has more than one line.
    `sets` gives values to its `vars`. Raises RecipeError with file, line, place and suggestion.

    >>> import quantkit as qk
    >>> text = '''name: mine
    ... base: UD-IQ1_S
    ... vars: {head: Q6_K}
    ... rules: [{match: output.weight, type: $head, why: to see}]
    ... '''
    >>> qk.load_recipe(text, sets={"head": "Q8_0"}).rules[0].type
    'Q8_0'
    """
    from .recipe.load import load, parse

    text = os.fspath(recipe)
    return parse(text, "recipe", sets, Path()) if "\n" in text else load(text, sets)


def open_imatrix(path: Name) -> Imatrix:
    """An importance matrix of llama-imatrix, GGUF or .dat. Its values stay in the file until they are asked for. Raises
    ImatrixError."""
    from .imatrix.matrix import open_imatrix as open_it

    return open_it(os.fspath(path))


def plan(
    model: Catalogue | Name, recipe: Recipe | Name, imatrix: Imatrix | Name | None = None, *,
    imatrix_policy: str | None = None, mixture_version: str = "current", rounding: str | None = None,
    covariance: Name | CovarianceSource | None = None,
) -> Plan:  # fmt: skip
    """The type of every tensor, with its rule, its reason and its exact bytes. With `imatrix` all its values are read
    and checked, as a build does it. `imatrix_policy` says what stands in for data that it lacks, such as
    "sibling,prior"; without it the recipe's counts, else an expert that was never seen is an error. `mixture_version`
    "2025" means the mixtures of files made until March 2026.

    `rounding` says how to round, whatever the recipe says: "ggml", "coarse", "feedback", "feedback+gain", or the name
    or the path (ending in .yaml) of a policy. All but ggml's needs the `covariance` of the inputs, a folder of
    `quantkit imatrix make --covariance` or what `second_moments` gives, to be built; that gives the importance too,
    where some is needed and there is no `imatrix`. Raises RecipeError, ImatrixError, SourceError, UnsupportedError, and
    ValueError for a policy of the importance matrix that is none.

    >>> import quantkit as qk
    >>> made = qk.plan("deepseek-r1", "UD-IQ1_S")
    >>> made.tensor_bytes, round(made.bpw, 2), made["blk.3.ffn_down_exps.weight"].type
    (140350064128, 1.67, 'IQ2_XXS')
    """
    from .imatrix.matrix import Imatrix
    from .imatrix.policies import parse_policy
    from .model.catalogue import Catalogue
    from .planning.plan import make_plan, with_moments, with_values
    from .recipe.load import Recipe
    from .rounding.covariance import Covariances

    tensors = model if isinstance(model, Catalogue) else open_model(model)
    rules = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    weights = imatrix if isinstance(imatrix, Imatrix) or imatrix is None else open_imatrix(imatrix)
    policy = None if imatrix_policy is None else parse_policy(imatrix_policy)
    if rounding is not None:
        rules = _rounded(rules, rounding)
    made = make_plan(tensors, rules, weights, mixture_version, policy)
    if covariance is not None:
        source = Covariances(Path(covariance)) if isinstance(covariance, str | os.PathLike) else covariance
        made = with_moments(made, source)
    return made if weights is None else with_values(made, weights)


def _rounded(recipe: Recipe, rounding: str) -> Recipe:
    from .recipe.load import Rounding
    from .recipe.schema import ROUNDINGS

    if rounding in ROUNDINGS:
        return recipe.with_rounding(Rounding(rounding, said_by="rounding"))
    return recipe.with_rounding(Rounding("", rounding, Path(), said_by="rounding"))


def check_imatrix(
    imatrix: Imatrix | Name, recipe: Recipe | Name, model: Catalogue | Name, *,
    imatrix_policy: str | None = None, min_tokens: int = 100, mixture_version: str = "current",
) -> Check:  # fmt: skip
    """What an importance matrix lacks for a recipe on a model: entries, sizes, values, experts never or rarely seen.

    Each of `lacks` says whether it `matters`: whether the type that the recipe gives needs weights or uses them, and
    `imatrix_policy` (or the recipe's) gives no others; `ok` is True where none does. Raises ImatrixError for a file
    that is no importance matrix, RecipeError, SourceError, UnsupportedError, and ValueError for a policy that is none.
    """
    from .imatrix.matrix import Imatrix
    from .imatrix.policies import parse_policy
    from .model.catalogue import Catalogue
    from .planning.imatrix_check import check
    from .recipe.load import Recipe

    tensors = model if isinstance(model, Catalogue) else open_model(model)
    rules = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    matrix = imatrix if isinstance(imatrix, Imatrix) else open_imatrix(imatrix)
    policy = None if imatrix_policy is None else parse_policy(imatrix_policy)
    return check(tensors, rules, matrix, policy, min_tokens, mixture_version)


def build(
    plan: Plan, out: Name, *, threads: int | None = None, force: bool = False, resume: bool | None = None,
    options: BuildOptions = BuildOptions(), progress: Progress = lambda _name, _n: None,
) -> BuildResult:  # fmt: skip
    """Build the GGUF that a plan describes, with the importance matrix and the covariance that it was made with.

    `threads`: all processors unless given. `force` replaces files that are there. An unfinished build of the same is
    continued: `resume` True insists on one, False starts again. Whatever is wrong is raised before the first byte,
    or leaves an unfinished build behind: ImatrixError, SourceError, OutputError, ResumeError, UnsupportedError,
    WeightError, KernelError.
    """
    from .base.errors import OutputError, UnsupportedError
    from .base.workers import default_threads
    from .building import run as building
    from .building.cache import Cache
    from .building.engines.native import NativeEngine
    from .model.hub import with_weights
    from .model.sources.shard_store import Limits

    limits = Limits(options.keep, options.disk)
    start, engine, warning, kept_in = time.monotonic(), NativeEngine(limits=limits), "", None
    weights = _imatrix_of(plan)
    plan = replace(plan, catalogue=with_weights(plan.catalogue))
    ready = building.prepare(
        plan, Path(out), weights, options.split_max_size, force, options.allow_requantize, engine, resume
    )
    if options.cache is not None and ready.supply is not None:
        raise UnsupportedError(
            f"{ready.supply.where}: a cache needs all of the source at hand, and it is fetched shard by shard; leave "
            "it out, or download the repository first"
        )
    if options.cache is not None:
        try:
            kept_in = Cache(Path(options.cache), options.cache_size)
        except OutputError as e:
            warning = str(e)
    n_kept = building.run(ready, engine, threads or default_threads(), progress, kept_in)
    if kept_in is not None:
        warning = kept_in.failure
    files = tuple(path for path, _ in ready.files)
    return BuildResult(files, ready.file_bytes, time.monotonic() - start, plan.n_elements, n_kept, warning)


def verify(
    out: Name, *, plan: Plan | None = None, sample: str | None = None, seed: int = 0, threads: int | None = None
) -> Verdict:
    """Check a finished GGUF, or a set of shards by any of them, with code apart from what wrote it.

    Alone: structure, padding, lengths, every block's scales. With `plan`: types, shapes, bytes and metadata too, and
    where its model has weights, rows are derived from them again by ggml and compared bit for bit: `sample` is "1%"
    unless given, a number, "all" or "none", and `seed` chooses them. What is wrong is in the verdict (`ok`,
    `findings`); raised is what keeps it from being checked: SourceError, ImatrixError, KernelError. Rows that ggml did
    not round are compared where the plan has the covariance.
    """
    from .base.workers import default_threads
    from .llama_cpp import toolchain
    from .rounding.rounder import Rounder
    from .verifying import against_plan
    from .verifying.ggml import Ggml
    from .verifying.on_device import counted
    from .verifying.rederive import RowCheck, check_source, parse_sample
    from .verifying.rounding import headers, recorded, settled
    from .verifying.run import Request
    from .verifying.run import verify as run

    said = recorded(headers(Path(out)))
    covariance = None if plan is None or plan.rounding is None else plan.rounding.covariance
    plan, rounding, notes = settled(plan, said, covariance)
    rows = None
    if plan is not None and sample != "none" and (sample is not None or plan.catalogue.source is not None):
        source = check_source(plan.catalogue)
        rows = RowCheck(
            plan.catalogue,
            source,
            _weights_of(plan),
            Ggml(toolchain.ggml_library()),
            parse_sample(sample or "1%"),
            seed,
            rounding,
            None if covariance is None else Rounder(covariance),
            counted(rounding),
        )
    expected = None if plan is None else against_plan.expected_of(plan)
    weights = None if plan is None else _imatrix_of(plan)
    request = Request(
        Path(out), expected, plan, weights, rows=rows, n_threads=threads or default_threads(), recorded=said
    )
    verdict = run(request, _Silent()).verdict
    verdict.notes += notes
    return verdict


def sensitivity(
    model: Catalogue | Name, texts: Chunks, imatrix: Imatrix | Name | None = None, *, out: Name | None = None,
    options: ProbeOptions | None = None, progress: Stages = lambda _stage, _done, _total: None,
) -> Sensitivity:  # fmt: skip
    """How much each group of a model's tensors matters, measured over chunks of text (`quantkit.text.chunks`).

    With `out` the file is written after every pass, and what is in it already is not done again. `options`
    (`quantkit.lab.allocation.sensitivity.ProbeOptions`) say what is probed. Raises SourceError, UnsupportedError,
    ResumeError, WeightError, OutputError.
    """
    from .imatrix.matrix import Imatrix
    from .lab import require_torch
    from .model.catalogue import Catalogue

    require_torch()
    from .lab.allocation.sensitivity import sensitivity as run

    tensors = model if isinstance(model, Catalogue) else open_model(model)
    weights = imatrix if isinstance(imatrix, Imatrix) or imatrix is None else open_imatrix(imatrix)
    return run(tensors, texts, weights, None if out is None else Path(out), options, progress)


def optimize(
    model: Catalogue | Name, known: Sensitivity | Name, target: str, imatrix: Imatrix | Name | None = None, *,
    texts: tuple[Chunks, Chunks] | None = None, options: OptimizeOptions | None = None,
    progress: Stages = lambda _stage, _done, _total: None,
) -> Optimized:  # fmt: skip
    """The recipe of least damage for a file of `target`: "131GiB", "14517920B", "1.67bpw", or "fit 2x80".

    `known` is a sensitivity or its file; `texts` are one to choose on and one to report, without which nothing is
    measured. `options` (`quantkit.lab.allocation.optimize.OptimizeOptions`) hold the constraints, and how the recipe
    rounds. The result has the recipe's `text`, its `plan`, and what was predicted and measured. Raises SourceError,
    UnsupportedError, RecipeError.
    """
    from .imatrix.matrix import Imatrix
    from .lab import require_torch
    from .model.catalogue import Catalogue

    require_torch()
    from .lab.allocation.damage import Sensitivity, read_sensitivity
    from .lab.allocation.optimize import optimize as run
    from .lab.allocation.targets import parse_fit, parse_target

    tensors = model if isinstance(model, Catalogue) else open_model(model)
    weights = imatrix if isinstance(imatrix, Imatrix) or imatrix is None else open_imatrix(imatrix)
    measured = known if isinstance(known, Sensitivity) else read_sensitivity(Path(known))
    wanted = parse_fit(target[4:]) if target.startswith("fit ") else parse_target(target)
    return run(tensors, measured, wanted, weights, texts, options, progress)


def _imatrix_of(plan: Plan) -> Imatrix | None:
    from .imatrix.matrix import Imatrix

    return plan.imatrix if isinstance(plan.imatrix, Imatrix) else None


def _weights_of(plan: Plan) -> Completed | None:
    """The importance matrix of a plan, completed by its policy."""
    from .planning.gaps import completed

    imatrix = _imatrix_of(plan)
    return None if imatrix is None else completed(plan.catalogue, imatrix, plan.policy)


class _Silent:
    """Progress that nobody looks at."""

    def start(self, stage: str, total: int, unit: str) -> None: ...
    def advance(self, n: int) -> None: ...


def quantize(
    rows: npt.NDArray[np.float32], type: str, importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Rows to a type's blocks, as ggml makes them.

    rows: float32 [n_rows, n_cols]; importance: float32 [n_cols], one weight a column for all rows; the result: uint8
    [n_rows, bytes of a row]. Raises KernelError for an unknown type, columns that do not fill its blocks, values that
    are not finite, and a type that needs importance without it.

    >>> import numpy as np, quantkit as qk
    >>> rows = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    >>> qk.quantize(rows, "Q4_K").shape
    (2, 144)
    """
    from . import kernels
    from .gguf.types import qtype

    return kernels.quantize(rows, qtype(type).name, importance)


def dequantize(blocks: npt.NDArray[np.uint8], type: str, n_cols: int) -> npt.NDArray[np.float32]:
    """A type's blocks to rows: uint8 [n_rows, bytes of a row] to float32 [n_rows, n_cols]. Raises KernelError.

    >>> import numpy as np, quantkit as qk
    >>> rows = np.ones((1, 32), np.float32)
    >>> bool(np.allclose(qk.dequantize(qk.quantize(rows, "Q8_0"), "Q8_0", 32), rows, atol=1e-3))
    True
    """
    from . import kernels
    from .gguf.types import qtype

    return kernels.dequantize(blocks, qtype(type).name, n_cols)

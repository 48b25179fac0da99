"""What `import quantkit` offers a script: a model, a recipe, their plan, and what can be done with it.

Each function is the command of its name without the command line: nothing is printed, and what is wrong is raised as a
QuantkitError. Heavy modules are imported when a function that needs them is called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .model.catalogue import Catalogue
    from .model.imatrix import Imatrix
    from .planning.plan import Plan
    from .recipe.load import Recipe
    from .verifying.verdict import Verdict

#: called with a tensor's name and how many of its values are done since the last call, from any thread
Progress = Callable[[str, int], None]
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


def open_model(
    source: Name, *, layout: str | None = None, pre: str | None = None, pad_token: str | None = None
) -> Catalogue:
    """The tensors and the metadata of a model: a known model's name, a config.json, a checkpoint directory, a GGUF
    (here or, its headers only, at hf:// or https://), or the id of a repository in Hugging Face's cache. No weight is
    read.

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
    from .model.imatrix import open_imatrix as open_it

    return open_it(os.fspath(path))


def plan(
    model: Catalogue | Name, recipe: Recipe | Name, imatrix: Imatrix | Name | None = None, *,
    mixture_version: str = "current",
) -> Plan:  # fmt: skip
    """The type of every tensor, with its rule, its reason and its exact bytes. With `imatrix` all its values are read
    and checked, as a build does it. `mixture_version` "2025" means the mixtures of files made until March 2026.
    Raises RecipeError, ImatrixError, SourceError, UnsupportedError.

    >>> import quantkit as qk
    >>> made = qk.plan("deepseek-r1", "UD-IQ1_S")
    >>> made.tensor_bytes, round(made.bpw, 2), made["blk.3.ffn_down_exps.weight"].type
    (140350064128, 1.67, 'IQ2_XXS')
    """
    from .model.catalogue import Catalogue
    from .model.imatrix import Imatrix
    from .planning.plan import make_plan, with_values
    from .recipe.load import Recipe

    tensors = model if isinstance(model, Catalogue) else open_model(model)
    rules = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    weights = imatrix if isinstance(imatrix, Imatrix) or imatrix is None else open_imatrix(imatrix)
    made = make_plan(tensors, rules, weights, mixture_version)
    return made if weights is None else with_values(made, weights)


def build(
    plan: Plan, out: Name, *, threads: int | None = None, force: bool = False, resume: bool | None = None,
    options: BuildOptions = BuildOptions(), progress: Progress = lambda _name, _n: None,
) -> BuildResult:  # fmt: skip
    """Build the GGUF that a plan describes, with the importance matrix that it was made with.

    `threads`: all processors unless given. `force` replaces files that are there. An unfinished build of the same is
    gone on with: `resume` True insists on one, False starts again. Whatever is wrong is raised before the first byte,
    or leaves an unfinished build behind: ImatrixError, SourceError, OutputError, ResumeError, UnsupportedError,
    WeightError, KernelError.
    """
    from . import kernels
    from .base.errors import OutputError
    from .base.workers import default_threads
    from .building import run as building
    from .building.cache import Cache
    from .building.engines.native import NativeEngine
    from .llama_cpp import toolchain

    kernels.use_pinned_library(toolchain.ggml_library())
    start, engine, warning, kept_in = time.monotonic(), NativeEngine(), "", None
    weights = _imatrix_of(plan)
    ready = building.prepare(
        plan, Path(out), weights, options.split_max_size, force, options.allow_requantize, engine, resume
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
    `findings`); raised is what keeps it from being checked: SourceError, ImatrixError, KernelError.
    """
    from .base.workers import default_threads
    from .llama_cpp import toolchain
    from .verifying import against_plan
    from .verifying.ggml import Ggml
    from .verifying.rederive import RowCheck, check_source, parse_sample
    from .verifying.run import Request
    from .verifying.run import verify as run

    rows = None
    if plan is not None and sample != "none" and (sample is not None or plan.catalogue.source is not None):
        source = check_source(plan.catalogue)
        rows = RowCheck(
            plan.catalogue,
            source,
            _imatrix_of(plan),
            Ggml(toolchain.ggml_library()),
            parse_sample(sample or "1%"),
            seed,
        )
    expected = None if plan is None else against_plan.expected_of(plan)
    weights = None if plan is None else _imatrix_of(plan)
    request = Request(Path(out), expected, plan, weights, rows=rows, n_threads=threads or default_threads())
    return run(request, _Silent()).verdict


def _imatrix_of(plan: Plan) -> Imatrix | None:
    from .model.imatrix import Imatrix

    return plan.imatrix if isinstance(plan.imatrix, Imatrix) else None


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
    from .llama_cpp import toolchain

    kernels.use_pinned_library(toolchain.ggml_library())
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

"""The lab for scripts: the same functions as its commands, with models, plans and texts as arguments."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..base.errors import did_you_mean
from ..base.workers import default_threads
from ..building.cache import Cache
from ..building.cached_tensors import CachedTensors
from ..forward.model import Model
from ..forward.stream import Options, Progress
from ..imatrix.matrix import Imatrix
from ..model.catalogue import Catalogue
from ..model.hub import with_layers
from ..model.open import open_model
from ..model.sources.shard_store import Limits
from ..planning.plan import Plan, with_values
from ..rounding.covariance import Covariances
from . import require_torch
from .calibration.streamed import Streamed
from .evaluation.evaluate import Candidate, EvalOptions, of_file, of_plan
from .evaluation.evaluate import evaluate as run
from .evaluation.parts import part
from .evaluation.scores import Evaluation, Point
from .fetched import Fetching, fetched
from .frames import frame
from .rounding_policy.tuning import Tuned, TuneOptions, tune
from .studies.ablate import AblateOptions, ablate
from .studies.files import StudyFiles
from .studies.findings import Effect, comparable, effects, front
from .studies.results import Result, Results
from .studies.study import Variant, load_study, parse_study, require_one, variants

Name = str | os.PathLike[str]


@contextmanager
def fetched_weights(
    model: Catalogue | Name, *, keep: int = 3, disk: int | None = None, folder: Name | None = None
) -> Iterator[Catalogue]:
    """In a `with`, a model on the Hub whose weights `qk.imatrix.make`, `evaluate`, `sensitivity` and the like can read.
    Shards are fetched when a layer needs them, each checked by the repository's SHA-256; at most `keep` of them, or
    `disk` bytes, are in `folder` (that of temporary files) at a time. A model that is here stays as it is.

    Raises SourceError, and OutputError for a folder that cannot be used or has too little room."""
    place = Path(tempfile.gettempdir() if folder is None else folder)
    how = Fetching(place, Limits(keep, disk), tell=lambda shard, n_done, n_total: None)
    catalogue = with_layers(_catalogue(model))
    with fetched(catalogue, how):
        yield catalogue


def evaluate(
    reference: Catalogue | Name, candidates: Plan | Catalogue | Name | Sequence[Plan | Catalogue | Name],
    texts: Name | Sequence[Name], *,
    n_ctx: int = 512, n_chunks: int | None = None, options: EvalOptions | None = None,
    progress: Progress = lambda what, n_done, n_total: None,
) -> Evaluation:  # fmt: skip
    """Measure candidates against their reference over chunks of texts: perplexity, KL divergence, same top token.

    A candidate is a GGUF (a path, or the result of `open_model`), or a plan for the reference model itself, which is
    quantized in memory. `candidates` and `texts` may be one or several. Raises SourceError for a model of another shape
    or vocabulary, TextError, WeightError, ImatrixError."""
    require_torch()
    from .. import text

    catalogue = _catalogue(reference)
    chunks = text.chunks(catalogue, texts, n_ctx, n_chunks)
    model = Model(catalogue)
    several = [candidates] if isinstance(candidates, Plan | Catalogue | str | os.PathLike) else candidates
    made = [_candidate(model, one) for one in several]
    names = [c.name for c in made]
    for i, one in enumerate(made):  # reports tell candidates apart by name
        if names.count(one.name) > 1:
            made[i] = replace(one, model=replace(one.model, name=f"{one.name} ({i + 1})"))
    return run(model, made, chunks, options, progress)


def second_moments(
    model: Catalogue | Name, texts: Name | Sequence[Name], n_ctx: int = 512, n_chunks: int | None = None, *,
    chat: bool = False, options: Options | None = None,
) -> Streamed:  # fmt: skip
    """Return second moments that `quantkit.plan` accepts as `covariance` when there are none on disk. Nothing is
    computed yet: `quantkit.build` runs the model over these texts as it builds, and holds one layer's second moments
    at a time. Raises TextError, SourceError, KernelError (torch is not installed)."""
    require_torch()
    from .. import text

    catalogue = _catalogue(model)
    chunks = text.chunks(catalogue, texts, n_ctx, n_chunks, chat=chat)
    several = [texts] if isinstance(texts, str | os.PathLike) else texts
    files = [path for name in several if (path := Path(name)).is_file()]
    return Streamed(catalogue, chunks.tokens, files, options)


def tune_rounding(
    plans: Plan | Sequence[Plan], covariance: Name, choose: Name | Sequence[Name],
    report: Name | Sequence[Name] | None = None, *, n_ctx: int = 512, n_chunks: int | None = None,
    options: TuneOptions | None = None, progress: Progress = lambda what, n_done, n_total: None,
) -> Tuned:  # fmt: skip
    """Do what `quantkit rounding tune` does: try every rounding on the kinds of tensors in one model's plans, and
    choose one for each kind. `policy` of the result is the file for `quantkit.plan(…, rounding=)`. Texts must not be
    calibration texts: choose on one and report on another, or on halves of the first; at most `n_chunks` of each.
    Raises TextError, SourceError, RecipeError, WeightError, KernelError."""
    require_torch()
    from .. import text

    several = [plans] if isinstance(plans, Plan) else list(plans)
    catalogue = several[0].catalogue
    first = text.chunks(catalogue, choose, n_ctx)
    if report is None:
        parts = part(first, 1, 2, n_chunks), part(first, 2, 2, n_chunks)
    else:
        parts = part(first, 1, 1, n_chunks), part(text.chunks(catalogue, report, n_ctx), 1, 1, n_chunks)
    ready = [with_values(p, p.imatrix) if isinstance(p.imatrix, Imatrix) else p for p in several]
    return tune(ready, Covariances(Path(covariance)), parts, options, progress)


@dataclass(frozen=True)
class StudyOptions:
    """How a study is measured."""

    threads: int = 0
    """0: all processors"""
    memory: int | None = None
    """bytes for the hidden states of a pass; None: 2 GiB"""
    device: str = "cpu"
    at_a_time: int = 0
    """variants per pass; 0: as many as memory allows"""
    cache: Name | None = None
    """folder of quantized tensors, shared with other passes, runs and builds"""
    cache_size: int = 200 * 10**9
    """largest size of the cache in bytes"""
    files: Name | None = None
    """folder where a GGUF of every variant is built as well"""


@dataclass(frozen=True)
class StudyResults:
    """The results of a study on one model and text."""

    results: tuple[Result, ...]
    """all variants, in order; one that failed has a `trouble` and no `scores`"""

    @property
    def effects(self) -> list[Effect]:
        """The effect of each level, all else being equal."""
        return effects(self.results)

    @property
    def front(self) -> list[Point]:
        """The variants that no other beats in both size and mean KLD."""
        return front(self.results)

    def __getitem__(self, variant: str) -> Result:
        """The result of a variant. Raises KeyError with a suggestion."""
        names = [r.variant for r in self.results]
        if variant not in names:
            raise KeyError(f"no variant '{variant}'{did_you_mean(variant, names)}")
        return self.results[names.index(variant)]

    def to_frame(self) -> Any:
        """One row per variant: its levels, then its figures. Raises ToolError if pandas is not installed."""
        return frame(
            {**dict(r.levels), "variant": r.variant, **(asdict(r.scores) if r.scores else {}), "trouble": r.trouble}
            for r in self.results
        )


class Study:
    """A study: variants of a recipe, to be priced and measured side by side.

    `given` is a YAML file, YAML text (more than one line), or a mapping with the same keys. Its paths are relative to
    `folder`; by default to the file's folder, or else the current one. Raises RecipeError with file, line and place."""

    def __init__(self, given: Name | Mapping[str, Any], *, name: str = "study", folder: Name | None = None) -> None:
        if isinstance(given, Mapping):
            text = yaml.safe_dump(dict(given), sort_keys=False)
            self._read = parse_study(text, name, Path(folder or "."), name)
        elif "\n" in os.fspath(given):
            self._read = parse_study(os.fspath(given), name, Path(folder or "."), name)
        else:
            self._read = load_study(Path(given))
            self._read = self._read if folder is None else replace(self._read, folder=Path(folder))

    @property
    def name(self) -> str:
        return self._read.name

    def resolve(self, model: Catalogue | Name, imatrix: Name | None = None) -> list[Variant]:
        """Plan every variant: exact bytes, or `trouble`. A known model's name or a config.json is enough; sizes need
        no importance matrix."""
        of = None if imatrix is None else os.fspath(imatrix)
        return list(variants(self._read, _catalogue(model), of, values=imatrix is not None))

    def run(
        self, model: Catalogue | Name, texts: Name | Sequence[Name], results: Name, *, imatrix: Name | None = None,
        n_ctx: int = 512, n_chunks: int | None = None, options: StudyOptions = StudyOptions(),
    ) -> StudyResults:  # fmt: skip
        """Measure every variant that `results`, an SQLite file, does not hold yet. Raises SourceError, TextError,
        OutputError; if no variant can be measured, the first variant's error."""
        require_torch()
        from .. import text

        catalogue = _catalogue(model)
        every = list(variants(self._read, catalogue, None if imatrix is None else os.fspath(imatrix)))
        require_one(every)
        chunks = text.chunks(catalogue, texts, n_ctx, n_chunks)
        forward = Options(options.device, n_threads=options.threads, memory=options.memory)
        threads = options.threads or default_threads()
        cache = None if options.cache is None else Cache(Path(options.cache), options.cache_size)
        cached = None if cache is None else CachedTensors(cache, threads)
        files = None if options.files is None else StudyFiles(Path(options.files), self.name, threads, cache)
        how = AblateOptions(options.at_a_time, forward, cached, files)
        with Results(Path(results)) as kept:
            return StudyResults(tuple(ablate(self._read, every, Model(catalogue), chunks, kept, how)))

    def results(self, file: Name) -> list[StudyResults]:
        """Return this study's results in a file, one for each model, text and engine. Raises SourceError."""
        with Results(Path(file), read_only=True) as kept:
            return [StudyResults(tuple(of.results)) for of in comparable(list(kept.of(self.name)))]


def run_study(
    study: Name, source: Catalogue | Name, texts: Name | Sequence[Name], results: Name, *, imatrix: Name | None = None,
    n_ctx: int = 512, n_chunks: int | None = None, threads: int = 0,
) -> list[Result]:  # fmt: skip
    """Measure every variant of a study file that `results`, an SQLite file, does not hold yet, and return the results
    of all its variants, in order. `Study` offers more. Raises RecipeError, SourceError, TextError, OutputError; if no
    variant can be measured, the first variant's error."""
    options = StudyOptions(threads=threads)
    of = Study(study).run(source, texts, results, imatrix=imatrix, n_ctx=n_ctx, n_chunks=n_chunks, options=options)
    return list(of.results)


def _catalogue(model: Catalogue | Name) -> Catalogue:
    return model if isinstance(model, Catalogue) else open_model(os.fspath(model))


def _candidate(reference: Model, one: Plan | Catalogue | Name) -> Candidate:
    if isinstance(one, Plan):
        return of_plan(reference, one, one.recipe.name or "plan")
    catalogue = _catalogue(one)
    return of_file(catalogue, catalogue.model if isinstance(one, Catalogue) else Path(os.fspath(one)).stem)

"""Runs a study: variants advance together in passes, as many at a time as memory allows; or each is built as a file,
and llama-perplexity measures the files one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...base.errors import KernelError, OutputError, QuantkitError, SourceError, UnsupportedError, WeightError
from ...building.cached_tensors import CachedTensors
from ...forward.model import Model
from ...forward.stream import Options, Progress
from ...kernels import version
from ..evaluation.evaluate import Scorable, of_plan, score_tokens
from ..evaluation.llama_perplexity import Stock, Tool, gguf_file
from ..evaluation.scores import NATIVE, STOCK, Scored, score
from ..fetched import origin
from ..identity import of_model, of_tokens
from .files import StudyFiles
from .results import Result, Results
from .study import Study, Variant, rounding_digest

#: default bytes for the hidden states of all variants in a pass
_MEMORY = 2 << 30
#: errors that concern only one variant when files are built
_ITS_OWN = (WeightError, KernelError, UnsupportedError)


@dataclass(frozen=True)
class ByTool:
    """Measuring by llama-perplexity: how it is run, and the text."""

    tool: Tool
    text: str


@dataclass(frozen=True)
class AblateOptions:
    """How a study is run."""

    at_a_time: int = 0
    """variants in a pass; 0: as many as memory allows"""
    forward: Options = field(default_factory=Options)
    cached: CachedTensors | None = None
    """quantized tensors, shared by all variants, passes and runs"""
    files: StudyFiles | None = None
    """where a GGUF of each variant is built"""
    by_tool: ByTool | None = None
    """measure those files instead of running passes"""


def ablate(
    study: Study,
    every: Sequence[Variant],
    reference: Model,
    chunks: Scorable,
    results: Results,
    options: AblateOptions | None = None,
    progress: Progress = lambda what, n_done, n_total: None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Measure the variants that have no result yet, and store each as soon as its pass ends. A variant that fails is
    stored with the reason, and the others go on. Returns the results of `every` variant, in order. Raises what the
    reference raises if it cannot itself be computed, OutputError, SourceError, ToolError."""
    opts = options or AblateOptions()
    shared = _shared(reference, chunks, opts)
    of = {v.name: {**shared, **_own(v)} for v in every}
    identities = {v.name: _identity(study, v, of[v.name]) for v in every}
    out: dict[str, Result] = {}

    def keep(variant: Variant, scores: Scored | None, klds: bytes, trouble: str) -> None:
        made = Result(study.name, variant.name, variant.levels, scores, klds, trouble, of[variant.name])
        results.put(identities[variant.name], made)
        out[variant.name] = made
        if trouble:
            report(f"{variant.name}: {trouble}")

    files: dict[str, Path] = {}
    todo: list[Variant] = []
    for variant in every:
        there = None
        if variant.plan is None:
            keep(variant, None, b"", variant.trouble)
            continue
        if opts.files is not None:
            try:
                files[variant.name] = opts.files.build(variant, progress)
            except _ITS_OWN as e:
                keep(variant, None, b"", str(e))
                continue
        if (there := results.get(identities[variant.name])) is not None:
            out[variant.name] = there
        else:
            todo.append(variant)
    for variant, measured in _measured_all(todo, reference, chunks, files, opts, progress):
        if isinstance(measured, QuantkitError):
            keep(variant, None, b"", str(measured))
        else:
            keep(variant, *measured, "")
    return [out[v.name] for v in every]


_Measured = tuple[Variant, tuple[Scored, bytes] | QuantkitError]


def _measured_all(
    todo: Sequence[Variant], reference: Model, chunks: Scorable, files: Mapping[str, Path], opts: AblateOptions,
    progress: Progress,
) -> Iterator[_Measured]:  # fmt: skip
    """Yield each variant with its figures and the mean KLD of each chunk, or with its error."""
    if opts.by_tool is not None:
        if todo:
            yield from _by_tool(todo, reference, files, opts, progress)
        return
    size = opts.at_a_time or at_a_time(reference, chunks, opts.forward.memory)
    n_passes = -(-len(todo) // size)
    for number, at in enumerate(range(0, len(todo), size)):

        def say(what: str, n_done: int, n_total: int, number: int = number) -> None:
            progress(f"pass {number + 1} of {n_passes}, {what}", n_done + number * n_total, n_total * n_passes)

        yield from _measured(todo[at : at + size], reference, chunks, opts, say)


def _measured(
    some: Sequence[Variant], reference: Model, chunks: Scorable, opts: AblateOptions, progress: Progress
) -> Iterator[_Measured]:
    """Measure variants in one pass; if it fails, each in its own pass."""
    forward = replace(opts.forward, folder=None)
    try:
        candidates = [of_plan(reference, v.plan, v.name, cached=opts.cached) for v in some if v.plan is not None]
        base, *tokens = score_tokens(reference, [c.model for c in candidates], chunks, forward, progress)
    except QuantkitError as e:
        if isinstance(e, SourceError | OutputError) and origin(reference.catalogue):
            raise  # what the network did not bring is no variant's fault
        if len(some) == 1:
            yield some[0], e
            return
        score_tokens(reference, [], chunks, forward, progress)  # raises here if the fault is the reference's
        for one in some:
            yield from _measured([one], reference, chunks, opts, progress)
        return
    for v, c, t in zip(some, candidates, tokens, strict=True):
        yield v, (score(v.name, (c.file_bytes, c.bpw), t, base.nll), t.kld.mean(-1).tobytes())


def _by_tool(
    todo: Sequence[Variant], reference: Model, files: Mapping[str, Path], opts: AblateOptions, progress: Progress
) -> Iterator[_Measured]:
    """Measure built files by llama-perplexity."""
    assert opts.by_tool is not None
    assert opts.files is not None
    base = gguf_file(str(opts.files.reference(reference.catalogue, progress)), reference.name)
    tool = replace(opts.by_tool.tool, figures=False)
    with Stock(base, opts.by_tool.text, tool, len(todo), progress) as stock:
        for v in todo:
            try:
                scored, tokens = stock.measure(gguf_file(str(files[v.name]), v.name))
            except QuantkitError as e:
                yield v, e
                continue
            yield v, (scored, tokens.kld.mean(-1).tobytes())


def at_a_time(reference: Model, chunks: Scorable, memory: int | None) -> int:
    """The number of variants whose hidden states fit in memory."""
    return fitting(chunks.tokens.size, reference.family.n_embd, memory)


def fitting(n_tokens: int, n_embd: int, memory: int | None) -> int:
    """The number of variants whose hidden states, float32 [n_tokens, n_embd] each, fit beside the reference's."""
    return max(1, (memory or _MEMORY) // (4 * n_tokens * n_embd) - 1)


def _shared(reference: Model, chunks: Scorable, opts: AblateOptions) -> dict[str, Any]:
    """The provenance that all results share."""
    by_tool = {} if opts.by_tool is None else {"engine": STOCK, "tool": str(opts.by_tool.tool.binary)}
    return {
        "model": reference.name,
        "source": of_model(reference.catalogue),
        "texts": list(chunks.names),
        "n_chunks": len(chunks.tokens),
        "n_ctx": chunks.tokens.shape[1],
        "text": of_tokens(chunks.tokens, chunks.targets),
        "kernels": version(),
        "dtype": opts.forward.dtype,
        "engine": NATIVE,
        **by_tool,
    }


def _own(variant: Variant) -> dict[str, Any]:
    """The provenance of one variant's result."""
    plan = variant.plan
    return {
        "types": "" if plan is None else _digest(repr([(t.tensor.name, t.type) for t in plan.tensors])),
        "imatrix": variant.imatrix or "",
        "imatrix_sha256": variant.imatrix_sha256,
        "imatrix_policy": "" if plan is None else plan.policy.text,
        "recipe": variant.recipe_text,
        "rounding": "" if plan is None else rounding_digest(plan),
    }


def _identity(study: Study, variant: Variant, of: Mapping[str, Any]) -> str:
    """A digest of everything a result depends on; the same digest is not computed again. File locations and what rules
    say about themselves do not count."""
    said = {k: v for k, v in of.items() if k not in ("model", "texts", "imatrix", "recipe")}
    return _digest(repr((study.name, sorted(variant.levels.items()), variant.trouble, sorted(said.items()))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

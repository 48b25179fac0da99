"""Estimates the work of a study from its variants' plans alone: passes, bytes read, operations, quantizing, hours.

The counts follow the passes: the source is read once per pass, a layer is computed once for variants that are identical
up to its end, and a tensor is quantized once for variants that share it, per pass, or once in all with a cache. Times
are counts divided by rates; reading, quantizing and computing overlap, so the longest of them counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ... import kernels
from ...base.text import table
from ...forward.hparams import Hparams
from ...gguf.types import QTYPES
from ...model.catalogue import Catalogue, Tensor
from ..calibration.estimate import Rates, attention_flop, is_routed, work_of
from ..calibration.estimate_report import bytes_text, duration, flop_text
from .ablate import fitting
from .study import Study, Variant

_ROWS, _COLUMNS = 16, 2048


@dataclass(frozen=True)
class Text:
    """The amount of text, how it is computed, and how the weights are stored."""

    n_tokens: int
    n_ctx: int
    fp8: bool = False
    """for a catalogue without weights: whether the checkpoint is FP8"""


@dataclass(frozen=True)
class StudyWork:
    """The amount of work in a study."""

    study: str
    model: str
    n_variants: int
    n_tokens: int
    n_ctx: int
    at_a_time: int
    """variants per pass, besides the reference"""
    n_passes: int
    bytes_read: int
    """stored bytes of weights, over all passes"""
    flop: int
    flop_apart: int
    """the same if the reference and every variant were computed separately, with nothing shared"""
    quantized: Mapping[str, int]
    """weights to be quantized by type, over all passes"""
    quantized_once: Mapping[str, int]
    """the same with a cache"""
    hidden_bytes: int
    """hidden states of one pass"""
    one_pass_bytes: int
    """hidden states if all variants were in one pass"""
    cache_bytes: int
    """size of a cache of all tensors that are quantized"""
    file_bytes: int
    """size of all files together"""


@dataclass(frozen=True)
class StudyTimes:
    """The duration of a study, in seconds."""

    computing: float
    reading: float
    """reading from disk, or converting to float32 if that takes longer"""
    quantizing: float
    quantizing_once: float
    """with a cache"""

    @property
    def total(self) -> float:
        return max(self.computing, self.reading, self.quantizing)

    @property
    def total_with_cache(self) -> float:
        return max(self.computing, self.reading, self.quantizing_once)


class _Costs:
    """The cost of a model's tensors and layers."""

    def __init__(self, catalogue: Catalogue, text: Text) -> None:
        hp = Hparams(catalogue)
        self.catalogue, self.text = catalogue, text
        n_experts = hp.int_("expert_count", 0, least=0)
        self.used = hp.int_("expert_used_count", 0, least=0) / n_experts if n_experts else 0.0
        self.seen = 1 - (1 - self.used) ** text.n_tokens if n_experts else 0.0
        """the share of routed experts that any token chooses, if tokens choose evenly"""
        self.attention = attention_flop(hp, text.n_ctx)
        names = {t.name for t in catalogue.tensors}
        self.output = "output.weight" if "output.weight" in names else "token_embd.weight"

    @cached_property
    def by_layer(self) -> dict[int, list[Tensor]]:
        out: dict[int, list[Tensor]] = {}
        for t in self.catalogue.tensors:
            if t.layer is not None:
                out.setdefault(t.layer, []).append(t)
        return dict(sorted(out.items()))

    def layer_flop(self, layer: int) -> float:
        active = sum(
            t.n_elements * (self.used if is_routed(t) else 1) for t in self.by_layer[layer] if len(t.shape) > 1
        )
        return (2 * active + self.attention) * self.text.n_tokens

    @property
    def head_flop(self) -> float:
        """Operations of the output for the scored half of the tokens."""
        n = next(t.n_elements for t in self.catalogue.tensors if t.name == self.output)
        return 2 * n * self.text.n_tokens / 2


def study_work(
    study: Study, every: Sequence[Variant], catalogue: Catalogue, text: Text, memory: int | None = None,
    at_a_time: int = 0,
) -> StudyWork:  # fmt: skip
    """Count the work of a study over chunks of text. Raises SourceError if the catalogue lacks hyperparameters."""
    costs = _Costs(catalogue, text)
    n_embd = Hparams(catalogue).int_("embedding_length")
    able = [v for v in every if v.plan is not None]
    size = min(at_a_time or fitting(text.n_tokens, n_embd, memory), max(1, len(able)))
    passes = [able[at : at + size] for at in range(0, len(able), size)]
    once = work_of(catalogue, text.n_tokens, text.n_ctx, fp8=text.fp8, head=True)
    flop, quantized, all_made = 0.0, dict[str, int](), set[tuple[str, str, str]]()
    of_each = sum(costs.layer_flop(layer) for layer in costs.by_layer) + costs.head_flop
    for some in passes:
        paths: list[object] = [None, *(None for _ in some)]
        made = {change for v in some for change in _changes(v)}
        by_layer = [dict(_by_layer(costs, v)) for v in some]
        for i, of in enumerate(by_layer):
            paths[i + 1] = of.get(None, ())
        for layer in costs.by_layer:
            here: list[object] = [(), *(of.get(layer, ()) for of in by_layer)]
            paths = [hash(pair) for pair in zip(paths, here, strict=True)]
            flop += len(set(paths)) * costs.layer_flop(layer)
        flop += costs.head_flop * (1 + len(some))
        _count(made, costs, quantized)
        all_made |= made
    made_once = _count(all_made, costs, {})
    cache = sum(_nbytes(catalogue, name, type_) for name, type_, _ in all_made)
    hidden = 4 * text.n_tokens * n_embd
    return StudyWork(
        study=study.name,
        model=catalogue.model,
        n_variants=len(able),
        n_tokens=text.n_tokens,
        n_ctx=text.n_ctx,
        at_a_time=size,
        n_passes=len(passes),
        bytes_read=once.bytes_read * len(passes),
        flop=round(flop),
        flop_apart=round(of_each * (1 + len(able))),
        quantized=quantized,
        quantized_once=made_once,
        hidden_bytes=hidden * (1 + size),
        one_pass_bytes=hidden * (1 + len(able)),
        cache_bytes=cache,
        file_bytes=sum(v.file_bytes for v in able),
    )


def _changes(v: Variant) -> set[tuple[str, str, str]]:
    """What a variant quantizes: (tensor, type, importance)."""
    assert v.plan is not None
    return {
        (t.tensor.name, t.type, f"{v.imatrix_sha256} {v.plan.policy.text}")
        for t in v.plan.tensors
        if t.tensor.quantizable and t.type != t.tensor.source_type
    }


def _by_layer(costs: _Costs, v: Variant) -> Mapping[int | None, tuple[object, ...]]:
    layer_of = {t.name: t.layer for t in costs.catalogue.tensors}
    out: dict[int | None, list[object]] = {}
    for change in sorted(_changes(v)):
        if change[0] != "output.weight":
            out.setdefault(layer_of[change[0]], []).append(change)
    return {layer: tuple(of) for layer, of in out.items()}


def _count(made: set[tuple[str, str, str]], costs: _Costs, into: dict[str, int]) -> dict[str, int]:
    """Count weights by type: rows of the embedding that the text uses, and experts that any token chooses."""
    tensors = {t.name: t for t in costs.catalogue.tensors}
    for name, type_, _ in made:
        t = tensors[name]
        share = costs.seen if is_routed(t) else 1.0
        if name == "token_embd.weight" != costs.output:
            share = min(1.0, costs.text.n_tokens / t.n_rows)
        into[type_] = into.get(type_, 0) + round(t.n_elements * share)
    return into


def _nbytes(catalogue: Catalogue, name: str, type_: str) -> int:
    t = next(t for t in catalogue.tensors if t.name == name)
    return QTYPES[type_].row_bytes(t.n_cols) * t.n_rows


def study_times(work: StudyWork, rates: Rates, quantize: Mapping[str, float], n_threads: int) -> StudyTimes:
    """Seconds at these rates. `quantize` is weights per second on one thread, by type."""
    reading = max(work.bytes_read / rates.disk, work.bytes_read / rates.decode)
    both = [sum(n / quantize[t] for t, n in of.items()) / n_threads for of in (work.quantized, work.quantized_once)]
    return StudyTimes(work.flop / rates.flop, reading, *both)


def measured_quantize(types: Sequence[str], seconds: float = 0.1) -> dict[str, float]:
    """Measure how many weights one thread of this machine quantizes per second, by type."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((_ROWS, _COLUMNS), np.float32)
    weights = random.random(_COLUMNS, np.float32)
    out = {}
    for name in types:
        kernels.quantize(rows, name, weights)  # the first call may build tables
        start, n = time.thread_time(), 0
        while n == 0 or time.thread_time() - start < seconds:
            kernels.quantize(rows, name, weights)
            n += rows.size
        out[name] = n / (time.thread_time() - start)
    return out


def study_estimate_text(work: StudyWork, rates: Rates, times: StudyTimes, sources: tuple[str, str], n: int) -> str:
    """A study's estimate as readable text. `sources` say where the rates of computing and of the disk come from; n is
    the number of threads that quantize."""
    flop, disk = sources
    n_weights, n_once = sum(work.quantized.values()), sum(work.quantized_once.values())
    how = f"measured here, {n} thread{'s' * (n != 1)}"
    rows = [
        ["computing", flop_text(work.flop), f"{flop_text(rates.flop)}/s, {flop}", duration(times.computing)],
        ["reading", bytes_text(work.bytes_read), f"{bytes_text(rates.disk)}/s, {disk}",
         duration(work.bytes_read / rates.disk)],
        ["to float32", bytes_text(work.bytes_read), f"{bytes_text(rates.decode)}/s, measured here, one thread",
         duration(work.bytes_read / rates.decode)],
        ["quantizing", f"{n_weights / 1e9:,.1f} G weights", how, duration(times.quantizing)],
        ["… with --cache", f"{n_once / 1e9:,.1f} G weights", how, duration(times.quantizing_once)],
    ]  # fmt: skip
    passes = f"{work.n_passes:,} pass{'es' * (work.n_passes != 1)} of up to {work.at_a_time:,} beside the reference"
    return "\n".join(
        [
            f"{work.study} on {work.model}: {work.n_variants:,} variants, {work.n_tokens:,} tokens in chunks of "
            f"{work.n_ctx:,}, {passes}",
            "",
            table(rows, ["", "amount", "rate", "time"], (1, 3)),
            "",
            f"together {duration(times.total)}, with --cache {duration(times.total_with_cache)}: reading, quantizing "
            "and computing overlap, the longest counts",
            f"the reference and every variant once each, with nothing shared, are {flop_text(work.flop_apart)}",
            f"memory: hidden states {bytes_text(work.hidden_bytes)} in each pass"
            + (f"; --memory {work.one_pass_bytes / 1e9:.1f}GB takes one pass" if work.n_passes > 1 else ""),
            f"disk: a cache of all tensors {bytes_text(work.cache_bytes)}, all files {bytes_text(work.file_bytes)}",
        ]
    )

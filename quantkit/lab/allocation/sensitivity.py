"""Measures how much each group of tensors matters: probes change one group at a time, many probes per pass.

Results are saved to one file after every pass; the same command then does only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...base.errors import ResumeError
from ...base.files import file_sha256
from ...forward.model import Change, Importance, Model, Quantized
from ...forward.stream import Options
from ...imatrix.matrix import Imatrix
from ...model.catalogue import Catalogue, Tensor
from ..evaluation.evaluate import Scorable, score_tokens
from ..identity import of_model, of_tokens
from .damage import FLOOR, Probe, Sensitivity, read_sensitivity
from .groups import Group, groups_of
from .weight_errors import FLOOR_ERROR, TYPES, Noise, Usable, weight_errors

#: types of about 1.6, 2, 3.4 and 5.5 bits
PROBES = ("IQ1_S", "IQ2_XXS", "Q3_K", "Q5_K")
#: replaces a type that a tensor without importance cannot have
_WITHOUT = "Q2_K"

Progress = Callable[[str, int, int], None]
"""Called with a stage, and the amounts done and in total."""


@dataclass(frozen=True)
class ProbeOptions:
    """How a sensitivity is measured."""

    by: str = "kind"
    n_bands: int = 3
    probes: tuple[str, ...] = PROBES
    """types to probe each group at"""
    noise: tuple[float, ...] = ()
    """relative squared errors of seeded noise to probe each group with"""
    types: tuple[str, ...] = TYPES
    """types whose error is sampled"""
    seed: int = 0
    per_pass: int | None = None
    """probes per pass; None: as many as `memory` allows"""
    memory: int = 8 << 30
    """bytes of hidden states"""
    forward: Options = field(default_factory=Options)
    restart: bool = False
    """ignore an existing file"""


@dataclass(frozen=True)
class _Wanted:
    """A probe to be made."""

    group: str
    change: str
    error: float
    how: Change
    first: int
    """the first layer that it changes"""


def sensitivity(
    catalogue: Catalogue,
    chunks: Scorable,
    imatrix: Imatrix | None = None,
    out: Path | None = None,
    options: ProbeOptions | None = None,
    progress: Progress = lambda stage, n_done, n_total: None,
) -> Sensitivity:
    """Measure how much each group of a model's tensors matters. With `out`, the file is written after every pass, and
    results already in it are not measured again.

    Raises SourceError, UnsupportedError, WeightError, OutputError; ResumeError for an `out` of another model,
    importance matrix or grouping."""
    opts = options or ProbeOptions()
    reference = Model(catalogue)
    groups = groups_of(catalogue, opts.by, opts.n_bands)
    tensors = {t.name: t for t in catalogue.tensors}
    mine = [tensors[name] for g in groups for name in g.tensors]
    settings = f"errors of sampled rows, seed {opts.seed}"
    made = Sensitivity(
        catalogue.model, catalogue.arch, of_model(catalogue),
        "" if imatrix is None else file_sha256(imatrix.path)[:16],
        groups, {}, (), {}, settings, {t.name: t.n_elements for t in mine},
    )  # fmt: skip
    if out is not None and out.exists() and not opts.restart:
        made = _go_on(out, made)
    made = _with_errors(made, reference, mine, imatrix, opts, progress)
    if out is not None:
        made.save(out)
    text = of_tokens(chunks.tokens)
    n_chunks, n_ctx = chunks.tokens.shape
    about = f"{', '.join(chunks.names)}: {n_chunks} chunks of {n_ctx} tokens"
    made = replace(made, texts={**made.texts, text: about})
    have = {(p.group, p.change) for p in made.probes if p.text == text}
    wanted = [w for w in _wanted(made, tensors, groups, imatrix, opts) if (w.group, w.change) not in have]
    wanted.sort(key=lambda w: w.first)
    per_pass = opts.per_pass or max(1, opts.memory // (8 * n_chunks * n_ctx * reference.family.n_embd))
    passes = [wanted[at : at + per_pass] for at in range(0, len(wanted), per_pass)]
    for i, some in enumerate(passes):

        def show(what: str, n_done: int, n_total: int, i: int = i) -> None:
            progress(f"pass {i + 1} of {len(passes)}", 1000 * i + 1000 * n_done // max(1, n_total), 1000 * len(passes))

        models = [reference.variant(f"{w.group} {w.change}", w.how) for w in some]
        scored = score_tokens(reference, models, chunks, opts.forward, show)[1:]
        probes = [
            Probe(w.group, w.change, w.error, text, tuple(s.kld.mean(-1).tolist()))
            for w, s in zip(some, scored, strict=True)
        ]
        made = replace(made, probes=(*made.probes, *probes))
        if out is not None:
            made.save(out)
    return made


def _go_on(out: Path, new: Sensitivity) -> Sensitivity:
    was = read_sensitivity(out)
    for what, a, b in (
        ("model", was.source, new.source), ("importance matrix", was.imatrix, new.imatrix),
        ("settings", was.settings, new.settings),
    ):  # fmt: skip
        if a != b:
            raise ResumeError(f"{out}: is of another {what} ('{a}', not '{b}'); give another output, or remove it")
    known = {g.name: g for g in was.groups}
    clash = next((g for g in new.groups if g.name in known and known[g.name].tensors != g.tensors), None)
    if clash is not None or {g.name for g in was.groups} != {g.name for g in new.groups}:
        raise ResumeError(
            f"{out}: has other groups than those asked for; give the same --groups and --bands, another output, or "
            "remove it"
        )
    return replace(was, sizes={**was.sizes, **new.sizes})


def _with_errors(
    made: Sensitivity, reference: Model, tensors: Sequence[Tensor], imatrix: Imatrix | None, opts: ProbeOptions,
    progress: Progress,
) -> Sensitivity:  # fmt: skip
    """Add the errors that are missing, for all tensors at all types."""
    usable = Usable(imatrix)
    types = dict.fromkeys((*opts.types, *opts.probes, _WITHOUT))
    lacking: list[Tensor] = []
    for t in tensors:
        given = {usable.type_of(t, name) for name in types} - {None}
        if not given <= set(made.errors.get(t.name, {})):
            lacking.append(t)
    done = [0, sum(t.n_elements for t in lacking)]

    def show(name: str, n_rows: int) -> None:
        done[0] += by_name[name].n_elements
        progress("errors", done[0], done[1])

    by_name = {t.name: t for t in lacking}
    threads = opts.forward.n_threads or 1
    found = weight_errors(reference, lacking, types, imatrix, opts.seed, threads, show)
    return replace(made, errors={**made.errors, **{n: {**made.errors.get(n, {}), **of} for n, of in found.items()}})


def _wanted(
    made: Sensitivity, tensors: dict[str, Tensor], groups: Sequence[Group], imatrix: Importance | None,
    opts: ProbeOptions,
) -> Iterator[_Wanted]:  # fmt: skip
    """All probes: the floor, then the types and noises of each group."""
    every = frozenset(name for g in groups for name in g.tensors)
    yield _Wanted(
        FLOOR, f"noise {FLOOR_ERROR:.3g} seed {opts.seed}", FLOOR_ERROR, Noise(every, FLOOR_ERROR, opts.seed), -1
    )
    usable = Usable(imatrix)
    for g in groups:
        layers = [layer for name in g.tensors if (layer := tensors[name].layer) is not None]
        first = min(layers, default=-1 if g.role == "embedding" else 1 << 30)
        seen: set[tuple[str, ...]] = set()
        for asked in opts.probes:
            given: dict[str, str] = {}
            for name in g.tensors:
                t = tensors[name]
                given[name] = usable.type_of(t, asked) or usable.type_of(t, _WITHOUT) or "Q8_0"
            if tuple(given.values()) in seen:
                continue
            seen.add(tuple(given.values()))
            change = Quantized(given, imatrix, "probe")
            label = asked if usable.type_of(tensors[g.tensors[0]], asked) else _WITHOUT
            yield _Wanted(g.name, label, made.error_of(g, given), change, first)
        for error in opts.noise:
            label = f"noise {error:.3g} seed {opts.seed}"
            yield _Wanted(g.name, label, error, Noise(frozenset(g.tensors), error, opts.seed), first)


__all__ = ["PROBES", "TYPES", "ProbeOptions", "Sensitivity", "sensitivity"]

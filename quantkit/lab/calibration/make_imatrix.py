"""Importance matrices made by the forward pass, in llama-imatrix's own format.

What is unfinished lies in OUT.partial beside the output: what the pass keeps between layers, and the sums of finished
layers. The same command goes on there. With a coverage to reach, the text is taken in rounds, each as long as all
before it together, until enough experts have seen enough tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...base import outputs
from ...base.errors import ImatrixError
from ...base.outputs import Output
from ...base.version import __version__
from ...forward.model import Model
from ...forward.stream import Options, Pass, Progress, threads_of
from ...imatrix.write import Facts, check_name, write_gguf
from ...model.catalogue import Catalogue
from ...rounding.covariance import FISHER, PLAIN
from ..fetched import check_same_origin, files_here, origin
from ..identity import of_pass, of_run, said
from .covariance import Covariance
from .covariance_folder import CovarianceFolder
from .estimate import KEEP_SECONDS, LARGE_STATE
from .fisher import Experts, HiddenFile, choose, make_fisher
from .sums import InputSums, Observers, Saved
from .unfinished import give, make_folder, unfinished

_DONE, _ORIGIN = "done", "origin"
#: the file before it has its name
MADE = "made.gguf"


class Chunked(Protocol):
    """Tokens in chunks, as quantkit.text makes them."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def names(self) -> tuple[str, ...]: ...


class Target(NamedTuple):
    """That share of experts has seen that many tokens."""

    share: float
    """of 1"""
    n_tokens: int


@dataclass(frozen=True)
class MakeOptions:
    """How an importance matrix is made."""

    process_output: bool = False
    """output.weight too"""
    target: Target | None = None
    covariance: Path | None = None
    """a folder for second moments of the inputs"""
    own_experts: bool = True
    """with covariance: a matrix for each expert's ffn_down, else one a layer"""
    fisher: bool = False
    """with covariance: tokens count by the gradients of the model's predictions, computed backwards"""
    replace: bool = False
    forward: Options = field(default_factory=Options)


class Made(NamedTuple):
    """What was made."""

    path: Path
    n_entries: int
    n_chunks: int
    """that were processed"""
    coverage: float | None
    """share of experts with the target's tokens"""
    n_experts: int
    """routed, of all layers"""
    n_unseen: int
    """of them, those that no token chose"""
    bytes_read: int
    """stored bytes of weights, in this run"""
    experts_share: bool = False
    """of second moments weighted by gradients: the experts of a layer share those of gate and those of up"""


def make_imatrix(
    catalogue: Catalogue,
    chunks: Chunked,
    out: Path,
    options: MakeOptions | None = None,
    progress: Progress = lambda what, n_done, n_total: None,
) -> Made:
    """Make the importance matrix of a model over chunks of tokens, and write it.

    Raises SourceError, WeightError, OutputError, ResumeError, KernelError; ImatrixError for a coverage of a model
    without experts, and with a covariance. An exception's `kept` says where the unfinished work is, if it is kept."""
    opts = options or MakeOptions()
    check_target(catalogue, opts)
    model = Model(catalogue)
    read = files_here(model.weights.source)
    check_name(out)
    outputs.check(read, [Output(out, replace=opts.replace, suffix=".partial")])
    with ExitStack() as stack:
        folder = stack.enter_context(unfinished(out, _is_kept, bool(origin(catalogue))))
        _check_origin(catalogue, folder)
        covariance, experts = None, Experts(True, True)
        if opts.covariance is not None:
            identity = _identity(model, chunks.tokens, opts)
            is_made = said(folder / "round-0" / _DONE) == identity
            covariance = stack.enter_context(CovarianceFolder(opts.covariance, read, identity, is_made))
            covariance.require_space(catalogue, opts.own_experts)
            if opts.fisher:
                experts = choose(catalogue, chunks.tokens.size, chunks.tokens.shape[1], folder, identity)
        rounds: list[Path] = []
        coverage: float | None = None
        n_done = 0
        for at, stop in _rounds(len(chunks.tokens), opts.target):
            rounds.append(make_folder(folder / f"round-{len(rounds)}"))
            _round(model, chunks.tokens[at:stop], rounds[-1], opts, progress, covariance)
            n_done = stop
            if opts.target is not None:
                coverage = covered(Saved(rounds), opts.target.n_tokens)
                if coverage >= opts.target.share:
                    break
        saved = Saved(rounds)
        counts = np.concatenate([np.zeros(0), *(c for _, c in saved_counts(saved))])
        facts = Facts(chunks.names, n_done, chunks.tokens.shape[1])
        write_gguf(folder / MADE, facts, saved.entries(), saved.shapes, replace=True)
        if covariance is not None:
            if opts.fisher and not covariance.is_given:
                _backwards(model, chunks.tokens, rounds[0], opts, progress, covariance, experts)
            covariance.give(_of_covariance(catalogue, chunks.tokens, opts))
        give(folder / MADE, out, opts.replace)
    return Made(
        out, len(saved.shapes), n_done, coverage, len(counts), int((counts == 0).sum()), model.weights.bytes_read,
        bool(catalogue.moe_layers) and not experts.own_inputs,
    )  # fmt: skip


def check_target(catalogue: Catalogue, options: MakeOptions) -> None:
    """Raise ImatrixError for a coverage to reach where there can be none."""
    if options.target is not None and options.covariance is not None:
        raise ImatrixError(
            "--target-coverage and --covariance do not go together: make the importance matrix first, then "
            "give --covariance with the --chunks that it took"
        )
    if options.target is not None and not catalogue.moe_layers:
        raise ImatrixError(f"{catalogue.model}: has no experts, so there is no coverage to reach; leave it out")


def _check_origin(catalogue: Catalogue, folder: Path) -> None:
    """Raises ResumeError where what is unfinished is of another commit of a repository on the Hub."""
    if _is_kept(folder):
        check_same_origin(catalogue, said(folder / _ORIGIN) or "", folder)
    if here := origin(catalogue):
        outputs.write_text(folder / _ORIGIN, here, replace=True)


def _is_kept(folder: Path) -> bool:
    return any(folder.glob("round-*/state")) or any(folder.glob(f"round-*/{_DONE}"))


def _rounds(n_chunks: int, target: Target | None) -> Iterator[tuple[int, int]]:
    """First and last chunk of each round: doubling, where a coverage is to be reached."""
    if target is None:
        yield 0, n_chunks
        return
    at, n = 0, max(1, n_chunks // 16)
    while at < n_chunks:
        stop = min(n_chunks, at + n)
        yield at, stop
        at, n = stop, stop


def _round(
    model: Model, tokens: npt.NDArray[np.int32], folder: Path, opts: MakeOptions, progress: Progress,
    covariance: CovarianceFolder | None,
) -> None:  # fmt: skip
    """Sums of these chunks, in files of `folder`."""
    identity, done = _identity(model, tokens, opts), folder / _DONE
    if said(done) == identity:
        return
    sums = InputSums(folder, opts.process_output)
    observers = Observers(sums)
    if covariance is not None:
        observers = Observers(sums, Covariance(model.catalogue, covariance.inside, opts.own_experts))
    large = 4 * tokens.size * model.family.n_embd > LARGE_STATE
    forward = replace(opts.forward, folder=folder, identity=identity, keep_seconds=KEEP_SECONDS if large else 0.0)
    keep = None
    if opts.fisher:
        keep = HiddenFile(folder, (model.family.n_layers, *tokens.shape, model.family.n_embd)).keep
    Pass([model], tokens, forward, [observers], on_hidden=keep, progress=progress).run()
    sums.end()
    outputs.write_text(done, identity, replace=True)
    (folder / "state").unlink(missing_ok=True)


def _backwards(
    model: Model, tokens: npt.NDArray[np.int32], state: Path, opts: MakeOptions, progress: Progress,
    covariance: CovarianceFolder, experts: Experts,
) -> None:  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(opts.forward.n_threads or before)
    try:
        make_fisher(model, tokens, state, covariance.inside, experts, progress)
    finally:
        torch.set_num_threads(before)


def _identity(model: Model, tokens: npt.NDArray[np.int32], opts: MakeOptions) -> str:
    """What a run that goes on must be of."""
    where = None if opts.covariance is None else os.path.realpath(opts.covariance)
    settings = (__version__, opts.forward.dtype, opts.process_output, where, opts.own_experts, opts.fisher)
    return of_run(model.weights.source, tokens, settings)


def _of_covariance(catalogue: Catalogue, tokens: npt.NDArray[np.int32], opts: MakeOptions) -> str:
    return of_pass(
        catalogue, tokens, opts.forward, threads_of(opts.forward), opts.own_experts, FISHER if opts.fisher else PLAIN
    )


def saved_counts(saved: Saved) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """Tokens that each routed expert saw, by layer."""
    for name, counts in saved.counts():
        if name.endswith(".ffn_gate_exps.weight"):
            yield name, counts


def covered(saved: Saved, n_tokens: int) -> float:
    """The share of experts, over all layers, that have seen that many tokens."""
    counts = [c for _, c in saved_counts(saved)]
    every = np.concatenate(counts) if counts else np.zeros(1)
    return float((every >= n_tokens).mean())

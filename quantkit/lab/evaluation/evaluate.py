"""Measures candidates against their reference: all of them advance together in one pass over a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...base.errors import SourceError, TextError
from ...base.text import shape_text
from ...building.cached_tensors import CachedTensor, CachedTensors
from ...forward.model import Importance, Model, Quantized, Rounding, dequantized
from ...forward.stream import Options, Pass, Progress
from ...gguf.header import ARRAY, decode
from ...gguf.types import STORED_TYPES
from ...imatrix.matrix import Imatrix
from ...model.catalogue import Catalogue, Tensor
from ...planning.file_layout import lay_out, output_kvs
from ...planning.plan import ImatrixStatus, Plan, with_values
from .rounded import rounded_by
from .scores import LEAST, Agreement, Evaluation, Scored, Tokens, check_ctx, pairs_of, score

I32 = npt.NDArray[np.int32]
GREEDY_TOKENS = 32


class Scorable(Protocol):
    """Tokens in chunks, as quantkit.text makes them."""

    @property
    def tokens(self) -> I32: ...
    @property
    def targets(self) -> I32: ...
    @property
    def first(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Candidate:
    """A model to compare with the reference, and the size of its file."""

    model: Model
    file_bytes: int
    bpw: float

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def is_rounded(self) -> bool:
        """Whether any of its tensors is rounded by something other than ggml."""
        return isinstance(self.model.change, Quantized) and self.model.change.rounding is not None


@dataclass(frozen=True)
class EvalOptions:
    """How candidates are compared."""

    n_prompts: int = 0
    """prompts for the greedy agreement, taken from the beginnings of chunks; 0: none"""
    forward: Options = field(default_factory=Options)


def of_plan(
    reference: Model, plan: Plan, name: str, rounding: Rounding | None = None, cached: CachedTensors | None = None
) -> Candidate:
    """Return a candidate that is never built: the reference, quantized on the fly as the plan says, with the importance
    weights that the plan's policy derives from its matrix, and rounded by `rounding`, or as the plan says. Its file
    size is that of `quantkit build`, exact to the byte if the catalogue knows all metadata. With `cached`, tensors are
    quantized now unless the cache has them, and then read from the cache. Raises SourceError for a plan of another
    model or one without a covariance that it needs, ImatrixError if it lacks importance weights it must have."""
    _check_is_of(reference, plan, name)
    matrix = plan.imatrix if isinstance(plan.imatrix, Imatrix) else None
    if matrix is None or plan.weights is None:
        plan = with_values(plan, matrix)
    types = {t.tensor.name: t.type for t in plan.tensors if t.tensor.quantizable and t.type != t.tensor.source_type}
    used = {t.tensor.name for t in plan.tensors if t.imatrix_status is ImatrixStatus.USED}
    importance = _Used(plan.weights, used) if plan.weights is not None and used else None
    label, rounding = (id(matrix), plan.policy.text), rounding or rounded_by(plan, reference.weights)
    change = Quantized(types, importance, label, rounding)
    if cached is not None:
        there = cached.of(plan, (n for n in types if not _few_rows(reference, n)))
        change = FromCache(types, importance, label, rounding, there)
    (layout,) = lay_out(plan, output_kvs(plan, matrix))
    return Candidate(reference.variant(name, change), layout.nbytes, plan.bpw)


def _few_rows(reference: Model, name: str) -> bool:
    """Whether a pass needs only some rows of a tensor: those of its tokens."""
    return name == "token_embd.weight" != reference.family.output


@dataclass(frozen=True)
class FromCache(Quantized):
    """Quantized tensors, read from a cache where it has them."""

    cached: Mapping[str, CachedTensor] = field(default_factory=dict)

    def is_ready(self, name: str) -> bool:
        return name in self.cached

    def rows(self, tensor: Tensor, first: int, n_rows: int) -> npt.NDArray[np.float32] | None:
        """float32 [n_rows, n_cols], rows of a tensor from `first` on; None if the cache no longer has them."""
        found = self.cached.get(tensor.name)
        blocks = None if found is None else found.rows(first, n_rows)
        if found is None or blocks is None:
            return None
        out = np.empty((n_rows, tensor.n_cols), np.float32)
        dequantized(blocks, found.type, out)
        return out


def _check_is_of(reference: Model, plan: Plan, name: str) -> None:
    """Raise SourceError if the plan's tensors are not the reference's."""
    theirs, mine = ({t.name: t.shape for t in c.tensors} for c in (reference.catalogue, plan.catalogue))
    if theirs != mine:
        other = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
        in_plan, there = (shape_text(of[other]) if other in of else "absent" for of in (mine, theirs))
        raise SourceError(
            f"{name}: is a plan of {plan.catalogue.model}, not of {reference.name}: '{other}' is {in_plan} in the plan "
            f"and {there} in the model; make the plan with that model, in the same layout"
        )


def about_reference(reference: Model) -> str | None:
    """Return a note for a reference that is itself quantized, else None."""
    types = sorted(
        {
            t.source_type
            for t in reference.catalogue.tensors
            if t.quantizable and not STORED_TYPES[t.source_type].is_float
        }
    )
    if not types:
        return None
    return (
        f"the reference {reference.name} is quantized itself ({', '.join(types)}): figures are beside it, not beside "
        "the model that it was made of, and recipes quantize it a second time"
    )


class _Used:
    """The part of an importance matrix that a plan uses."""

    def __init__(self, matrix: Importance, used: set[str]) -> None:
        self._matrix, self._used = matrix, used

    def __contains__(self, name: str) -> bool:
        return name in self._used

    def weights(self, name: str, mat: int, n_cols: int) -> npt.NDArray[np.float32]:
        return self._matrix.weights(name, mat, n_cols)


def of_file(catalogue: Catalogue, name: str) -> Candidate:
    """Return a candidate for a GGUF, single or split."""
    source = catalogue.source
    if source is None:
        raise SourceError(catalogue.lacks or f"{name}: has no weights here; give a local GGUF, or a recipe")
    nbytes = sum(file.stat().st_size for file in source.files)
    bits = sum(8 * STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows for t in catalogue.tensors)
    return Candidate(Model(catalogue, name), nbytes, bits / sum(t.n_elements for t in catalogue.tensors))


def evaluate(
    reference: Model,
    candidates: Sequence[Candidate],
    chunks: Scorable,
    options: EvalOptions | None = None,
    progress: Progress = lambda what, n_done, n_total: None,
) -> Evaluation:
    """Compare candidates with a reference over chunks of tokens.

    Raises SourceError for models of another shape or vocabulary, TextError for chunks that are too short, and what
    the pass raises."""
    opts = options or EvalOptions()
    n_ctx = chunks.tokens.shape[1]
    if opts.n_prompts and n_ctx - chunks.first < GREEDY_TOKENS:
        raise TextError(
            f"a prompt, half of a chunk, is continued for {GREEDY_TOKENS} tokens, and half of {n_ctx} are fewer: give "
            f"--ctx {2 * GREEDY_TOKENS} or more, or leave out --prompts"
        )
    tokens = score_tokens(reference, [c.model for c in candidates], chunks, opts.forward, progress)
    base = tokens[0].nll
    scored = [
        score(c.name, (c.file_bytes, c.bpw), t, base) for c, t in zip(candidates, tokens[1:], strict=True)
    ]  # fmt: skip
    if opts.n_prompts and candidates:
        agreed = agreement(reference, [c.model for c in candidates], chunks, opts, progress)
        scored = [
            replace(s, agree_32=a.identical, first_difference_32=a.mean_first_difference)
            for s, a in zip(scored, agreed, strict=True)
        ]
    return Evaluation(
        reference.name, float(np.exp(base.mean())), len(chunks.tokens), chunks.tokens.shape[1], chunks.names,
        tuple(scored), pairs_of(scored, [t.kld for t in tokens[1:]]),
    )  # fmt: skip


def score_tokens(
    reference: Model, models: Sequence[Model], chunks: Scorable, forward: Options, progress: Progress
) -> list[Tokens]:
    """Score the reference (whose KLD is 0) and each model, token by token. Raises TextError for chunks without any
    scored token, SourceError for a model of another shape or vocabulary, and whatever the pass raises."""
    n_chunks, n_ctx = chunks.tokens.shape
    check_ctx(n_ctx)
    _check_vocabularies(reference, models, chunks)
    shape = (n_chunks, n_ctx - 1 - chunks.first)
    out = [Tokens(*(np.zeros(shape) for _ in range(4))) for _ in range(len(models) + 1)]
    base: dict[str, torch.Tensor] = {}

    def on_logits(chunk: int, number: int, logits: torch.Tensor) -> None:
        targets = torch.from_numpy(chunks.targets[chunk].astype(np.int64)).to(logits.device)[:, None]
        logp = torch.log_softmax(logits[:-1].double(), -1)
        nll = -logp.gather(1, targets)[:, 0]
        mine = out[number]
        mine.nll[chunk] = nll.cpu().numpy()
        if number == 0:
            base.update(logp=logp, nll=nll, top=logp.argmax(-1), p=logp.exp() * (logp > LEAST))
            mine.same_top[chunk] = 1
            return
        mine.kld[chunk] = (base["p"] * (base["logp"] - logp)).sum(-1).cpu().numpy()
        mine.dp[chunk] = (torch.exp(-nll) - torch.exp(-base["nll"])).cpu().numpy()
        mine.same_top[chunk] = (logp.argmax(-1) == base["top"]).double().cpu().numpy()

    Pass(
        [reference, *models], chunks.tokens, forward, on_logits=on_logits, logits_from=chunks.first, progress=progress
    ).run()
    return out


def _check_vocabularies(reference: Model, models: Sequence[Model], chunks: Scorable) -> None:
    """Raise SourceError if a token in the text stands for a different string in a model than in the reference. Models
    without a tokenizer are not checked."""
    theirs = _texts_of_tokens(reference.catalogue)
    if theirs is None:
        return
    used = [int(i) for i in np.unique(np.concatenate([chunks.tokens.reshape(-1), chunks.targets.reshape(-1)]))]
    checked = {id(reference.catalogue)}
    for model in models:
        if id(model.catalogue) in checked:
            continue
        checked.add(id(model.catalogue))
        mine = _texts_of_tokens(model.catalogue)
        if mine is None or len(mine) != len(theirs):  # the pass reports a vocabulary of another size
            continue
        other = [i for i in used if i < len(mine) and mine[i] != theirs[i]]
        if other:
            i = other[0]
            raise SourceError(
                f"{model.name}: has another vocabulary than {reference.name}: token {i:,} is {_shown(mine[i])}, not "
                f"{_shown(theirs[i])}, and {len(other):,} of the text's {len(used):,} tokens differ; compare models of "
                "one vocabulary"
            )


def _texts_of_tokens(catalogue: Catalogue) -> list[Any] | None:
    """The tokens of a model's tokenizer by id; None if it has none."""
    item = next((item for item in catalogue.kvs if item.key == "tokenizer.ggml.tokens"), None)
    return None if item is None or item.type != ARRAY else list(decode(item))


def _shown(token: Any) -> str:
    return repr(token.decode("utf-8", "replace") if isinstance(token, bytes) else token)


def agreement(
    reference: Model, models: Sequence[Model], chunks: Scorable, options: EvalOptions, progress: Progress
) -> list[Agreement]:
    """Measure how long the models' greedy continuations agree with the reference's, over the beginnings of some chunks.

    Passes over all prompts at once find the reference's continuation; each settles at least one more token. One more
    pass, of the models, then shows where each would first have continued differently."""
    n = min(options.n_prompts, len(chunks.tokens))
    prompt = chunks.first
    n_more = min(GREEDY_TOKENS, chunks.tokens.shape[1] - prompt)
    prompts = chunks.tokens[:n, : prompt + n_more].copy()
    forward = replace(options.forward, folder=None)
    for _ in range(n_more):
        said = _greedy([reference], prompts, prompt, forward, progress)[0]
        settled = bool((prompts[:, prompt:] == said).all())
        prompts[:, prompt:] = said
        if settled:
            break
    out = []
    for said in _greedy(models, prompts, prompt, forward, progress):
        same = said == prompts[:, prompt:]
        first = np.where(same.all(1), n_more, same.argmin(1))
        out.append(Agreement(n, n_more, float(same.all(1).mean()), float(first.mean())))
    return out


def _greedy(models: Sequence[Model], tokens: I32, prompt: int, forward: Options, progress: Progress) -> list[I32]:
    """The token each model finds most likely at each position after the prompt, given `tokens`."""
    out = [np.zeros((len(tokens), tokens.shape[1] - prompt), np.int32) for _ in models]

    def on_logits(chunk: int, number: int, logits: torch.Tensor) -> None:
        out[number][chunk] = logits[:-1].argmax(-1).cpu().numpy()

    Pass(models, tokens, forward, on_logits=on_logits, logits_from=prompt - 1, progress=progress).run()
    return out


__all__ = ["Candidate", "EvalOptions", "Scored", "evaluate", "of_file", "of_plan", "score_tokens"]

"""The routed experts of a layer: what each makes of the tokens that chose it. On a GPU many small products keep it
waiting, so several experts with few tokens are computed in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional

from .layer import Key, Need, State, Tensor
from .ops import linear, rms_norm, swiglu

#: rows of inputs that are computed at a time
_ROWS_AT_ONCE = 1 << 14
#: an expert of more tokens keeps a GPU busy by itself
_FEW = 1 << 10
#: experts whose matrices may be read ahead
_AHEAD = 8


class Choice(NamedTuple):
    """Which experts the tokens of a run chose."""

    which: Tensor
    """int32 [n_tokens, n_used]"""
    how_much: Tensor
    """float32 [n_tokens, n_used]"""


class _Waiting(NamedTuple):
    """An expert whose matrices are here, and which is computed with others."""

    expert: int
    places: Tensor
    matrices: Sequence[Tensor]


@dataclass
class Experts:
    """Adds what experts make of tokens to `total`, float32 [n_tokens, n_embd]."""

    names: tuple[str, str, str]
    """the tensors of gate, up and down"""
    n_experts: int
    choice: Choice
    state: State
    norm: Tensor
    eps: float
    total: Tensor
    _waiting: list[_Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        which = self.choice.which.flatten()
        # tokens by expert, in order: places of [n_tokens * n_used], sorted by expert
        self._order = torch.argsort(which, stable=True)
        self._counts = torch.bincount(which, minlength=self.n_experts).tolist()
        self._starts = [0] * self.n_experts
        for e in range(1, self.n_experts):
            self._starts[e] = self._starts[e - 1] + self._counts[e - 1]

    def needs(self) -> list[Need]:
        """What is to be sent to `add`, expert after expert."""
        keys = [tuple(Key(n, e) for n in self.names) for e, count in enumerate(self._counts) if count]
        return [
            Need(each, tuple(keys[i + 1 : i + 1 + _AHEAD]), (len(keys) - i, len(keys) + 2))
            for i, each in enumerate(keys)
        ]

    def add(self, expert: int, matrices: Sequence[Tensor]) -> None:
        """Compute an expert, now or together with the next ones."""
        at, n = self._starts[expert], self._counts[expert]
        if self.state.experts_together > 1 and n <= _FEW:
            if sum(len(one.places) for one in self._waiting) + n > _ROWS_AT_ONCE:
                self.finish()
            self._waiting.append(_Waiting(expert, self._order[at : at + n], matrices))
            if len(self._waiting) == self.state.experts_together:
                self.finish()
            return
        self.finish()  # each token's experts are added in order
        for start in range(at, at + n, _ROWS_AT_ONCE):
            self._compute([_Waiting(expert, self._order[start : min(at + n, start + _ROWS_AT_ONCE)], matrices)])

    def finish(self) -> None:
        """Compute those that wait for others."""
        if self._waiting:
            self._compute(self._waiting)
            self._waiting = []

    def _compute(self, several: list[_Waiting]) -> None:
        places = torch.cat([one.places for one in several])
        sizes = [len(one.places) for one in several]
        gate, up, down = ([one.matrices[i] for one in several] for i in range(3))
        rows = torch.div(places, self.choice.which.shape[1], rounding_mode="floor")
        hidden = self.state.hidden.view(-1, self.state.hidden.shape[-1])
        x = rms_norm(hidden[rows], self.norm, self.eps)
        self._look(self.names[:2], x, several, sizes)
        a = swiglu(grouped(x, gate, sizes), grouped(x, up, sizes))
        self._look(self.names[2:], a, several, sizes)
        made = grouped(a, down, sizes).float() * self.choice.how_much.flatten()[places][:, None]
        self.total.index_add_(0, rows, made)

    def _look(self, names: tuple[str, ...], x: Tensor, several: list[_Waiting], sizes: list[int]) -> None:
        for one, part in zip(several, torch.split(x, sizes), strict=True):
            self.state.look(names, part, one.expert, self.n_experts)


def grouped(x: Tensor, weights: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """The first sizes[0] rows of x [n, n_cols] by the first of the matrices [n_out, n_cols], the next sizes[1] by the
    next, and so on: [n, n_out], in the precision of the weights."""
    if len(weights) == 1:
        return linear(x, weights[0])
    n_out, n_cols = weights[0].shape
    fits = weights[0].dtype == torch.bfloat16 and n_out % 8 == n_cols % 8 == 0
    if x.device.type == "cuda" and fits and hasattr(functional, "grouped_mm"):
        return by_offsets(x, weights, sizes)
    return by_padding(x, weights, sizes)


def by_offsets(x: Tensor, weights: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """`grouped` with torch's kernel for it, which torch has since 2.10."""
    ends = torch.tensor(sizes).cumsum(0).to(x.device, torch.int32)
    stacked = torch.stack(list(weights))
    return functional.grouped_mm(x.to(stacked.dtype), stacked.transpose(1, 2), offs=ends)


def by_padding(x: Tensor, weights: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """`grouped` with rows of zeros, so that all have as many as the largest."""
    stacked = torch.stack(list(weights))
    padded = x.new_zeros((len(sizes), max(sizes), x.shape[1]), dtype=stacked.dtype)
    for one, part in zip(padded, torch.split(x, sizes), strict=True):
        one[: len(part)] = part
    made = torch.bmm(padded, stacked.transpose(1, 2))
    return torch.cat([one[:n] for one, n in zip(made, sizes, strict=True)])

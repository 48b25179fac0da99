"""What the IQ types share: blocks of 256 columns, made sub-block by sub-block; see native/feedback_iq.h.

What is known of a row at a sub-block's start is a path; each is continued with several scales of the sub-block, and the
best of all continuations are the paths from there on. Paths, and the block's scales that are tried from the same start,
are done side by side. The axes are [columns, paths, rows], or [paths, rows].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels import U8
from . import starts
from .block import Block, Made
from .halves import MOST_HALF, half

COLUMNS, GROUP = 256, 8
NpArray = npt.NDArray[np.generic]
#: of ggml's scale of the block
_FACTORS = (0.93, 1.07, 0.87, 1.14)
#: paths that are kept
_MOST_PATHS = 8
#: above it, sums of squares may overflow
_MOST_VALUE = 1e9


class Start(NamedTuple):
    """What ggml chose; float32, but for `down`."""

    d: Tensor
    """[n_rows]: the block's scale"""
    level: Tensor
    """[n_subs, n_rows]: of the sub-blocks' scales"""
    down: Tensor
    """[n_subs, n_rows], bool: the sub-block's shift; all False where there is none"""


class Coded(NamedTuple):
    """Groups of eight columns of some lanes."""

    code: Tensor
    """int64 [n]"""
    value: Tensor
    """[8, n]"""


class Groups(NamedTuple):
    """Of a block's groups of eight columns."""

    inverse: Tensor
    """[n_groups, 8, 8]: U_GG^-1"""
    metric: Tensor
    """[n_groups, 8, 8]: U_GG^-1 U_GG^-T"""


class Coder(Protocol):
    """Codes of groups under one block's metric."""

    def code(self, group: int, x: Tensor, scale: Tensor, down: Tensor) -> Coded:
        """The best found for columns x [8, n], the sub-block's scale [n] and shift [n]."""


class Kind(Protocol):
    """A type of the kind."""

    @property
    def name(self) -> str: ...
    @property
    def sub(self) -> int:
        """columns of a sub-block"""

    @property
    def n_levels(self) -> int: ...
    @property
    def window(self) -> int:
        """levels to either side of the one nearest to ggml's that are tried"""

    @property
    def n_shifts(self) -> int:
        """2 where a sub-block has a shift of its own"""

    def read(self, blocks: U8) -> tuple[NpArray, NpArray, NpArray]:
        """d, level and down of a Start, NumPy arrays."""

    @property
    def scale(self) -> Callable[[Tensor, Tensor], Tensor]:
        """of d and a level"""

    @property
    def level_at(self) -> Callable[[Tensor, Tensor], Tensor]:
        """the level nearest to a scale, under d"""

    def coder(self, groups: Groups) -> Coder: ...

    def pack(self, found: Paths) -> Tensor:
        """uint8 [n_rows, block_bytes]; `found` has one path."""


class Paths(NamedTuple):
    """Ways that rows went."""

    x: Tensor
    """[256, n_paths, n_rows]: current weights, of use from the next sub-block on"""
    e: Tensor
    """[256, n_paths, n_rows]: errors to pass on, of the sub-blocks before it"""
    code: Tensor
    """int64 [32, n_paths, n_rows]: codes of groups"""
    level: Tensor
    """[n_subs, n_paths, n_rows]"""
    down: Tensor
    cost: Tensor
    """[n_paths, n_rows]: sum of e^2"""
    d: Tensor
    """[n_paths, n_rows]"""

    def where(self, better: Tensor, other: Paths) -> Paths:
        """These where `better` [n_rows], else the others."""
        return Paths(*(torch.where(better, a, b) for a, b in zip(self, other, strict=True)))

    def lanes(self, at: slice) -> Paths:
        return Paths(*(v[..., at] for v in self))

    def path(self, which: Tensor) -> Paths:
        """Of each row the paths [n, n_rows]."""
        return Paths(*(v.gather(-2, which.expand(*v.shape[:-2], *which.shape)) for v in self))


class Beam:
    """A type's blocks."""

    columns = COLUMNS

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def quantize(self, x: Tensor, block: Block, search: bool) -> Made:
        """Blocks of columns x [256, n_rows]."""
        fits = x.abs() < _MOST_VALUE
        refused = ~fits.all(0)
        x = torch.where(fits, x, 0.0)
        found = starts.stock(x, self.kind.name, block.importance)
        refused |= found.refused
        read = self.kind.read(found.blocks)
        start = Start(*(torch.from_numpy(v).to(x.device) for v in read))
        refused |= ~start.d.isfinite()
        start = start._replace(d=torch.nan_to_num(start.d).clamp(max=MOST_HALF))
        run = _Run(self.kind, block)
        best = run.along(x, start)
        if search:
            best = self._search(x, start, run, best)
        best = _refitted(x, block, run.groups.inverse, best)
        best.e[0, 0] = torch.where(refused, torch.nan, best.e[0, 0])  # which the driver refuses
        return Made(self.kind.pack(best), best.e[:, 0])

    @staticmethod
    def _search(x: Tensor, start: Start, run: _Run, best: Paths) -> Paths:
        n = x.shape[1]
        factors = torch.tensor((1.0, *_FACTORS), dtype=x.dtype, device=x.device)
        tried = half(start.d * factors[:, None]).clamp_(max=MOST_HALF)
        many = Start(start.d.repeat(len(tried)), start.level.repeat(1, len(tried)), start.down.repeat(1, len(tried)))
        found = run.widely(x.repeat(1, len(tried)), many, tried.reshape(-1), 1)
        factor = torch.ones_like(start.d)
        for i, f in enumerate(factors):
            other = found.lanes(slice(i * n, (i + 1) * n))
            better = other.cost[0] < best.cost[0]
            best = other.where(better, best)
            factor = torch.where(better, f, factor)
        many_paths = run.widely(x, start, half(start.d * factor).clamp_(max=MOST_HALF), _MOST_PATHS)
        other = many_paths.path(torch.zeros_like(start.d, dtype=torch.int64)[None])
        return other.where(other.cost[0] < best.cost[0], best)


class _Run:
    """Goes through a block."""

    def __init__(self, kind: Kind, block: Block) -> None:
        self.kind, self.u = kind, block.u
        self.subs = COLUMNS // kind.sub
        self.groups = groups_of(block.u)
        self.coder = kind.coder(self.groups)

    def along(self, x: Tensor, start: Start) -> Paths:
        """With ggml's scales of sub-blocks."""
        paths = self._begin(x, half(start.d))
        for sub in range(self.subs):
            paths = self._continue(paths, sub, start.level[sub][None, None], start.down[sub][None, None], 1)
        return paths

    def widely(self, x: Tensor, start: Start, d: Tensor, most: int) -> Paths:
        """With scales of sub-blocks around ggml's, and the block's scale d [n_rows]; `most` paths, the best first."""
        kind = self.kind
        offsets = [0]
        for i in range(1, kind.window + 1):
            offsets += [i, -i]
        around = torch.tensor(offsets, dtype=x.dtype, device=x.device)[:, None, None]
        shifts = torch.arange(kind.n_shifts, device=x.device) > 0
        paths = self._begin(x, d)
        for sub in range(self.subs):
            scale = kind.scale(start.d, start.level[sub])
            level = kind.level_at(scale, paths.d)[None] + around
            # [offsets, paths, shifts, rows]
            level = level[:, :, None].expand(-1, -1, kind.n_shifts, -1)
            down = shifts[:, None].expand(level.shape)
            n_paths = level.shape[1]
            merged = (-1, n_paths, x.shape[1])
            paths = self._continue(
                paths, sub, level.transpose(1, 2).reshape(merged), down.transpose(1, 2).reshape(merged), most
            )
        return paths

    def _begin(self, x: Tensor, d: Tensor) -> Paths:
        n = x.shape[1]
        none = torch.zeros((self.subs, 1, n), dtype=x.dtype, device=x.device)
        code = torch.zeros((COLUMNS // GROUP, 1, n), dtype=torch.int64, device=x.device)
        at = x[:, None]
        return Paths(at, torch.zeros_like(at), code, none, none.to(torch.bool), torch.zeros_like(d)[None], d[None])

    def _continue(self, paths: Paths, sub: int, level: Tensor, down: Tensor, most: int) -> Paths:
        """The `most` best of paths continued with levels and shifts [n_ways, n_paths, n_rows]."""
        kind, n = self.kind, self.kind.sub
        n_ways, (n_paths, n_rows) = len(level), paths.cost.shape
        level, down = (v.expand(n_ways, n_paths, n_rows) for v in (level, down))
        inside = level.clamp(0, kind.n_levels - 1)
        here, later = slice(sub * n, (sub + 1) * n), slice((sub + 1) * n, COLUMNS)
        x = paths.x[here, None].repeat(1, n_ways, 1, 1).view(n, -1)  # a copy: it is used up
        scale = kind.scale(paths.d, inside).reshape(-1)
        e = torch.empty_like(x)
        codes = []
        cost = paths.cost.expand(n_ways, -1, -1).reshape(-1)
        for g in range(n // GROUP):
            group = sub * (n // GROUP) + g
            columns = slice(g * GROUP, (g + 1) * GROUP)
            rest = slice((g + 1) * GROUP, n)
            made = self.coder.code(group, x[columns], scale, down.reshape(-1))
            codes.append(made.code)
            e[columns] = self.groups.inverse[group].T @ (x[columns] - made.value)
            cost = cost + (e[columns] * e[columns]).sum(0)
            if rest.start < n:
                u = self.u[here, here][columns, rest]
                x[rest] = x[rest].addmm(u.T, e[columns], alpha=-1)
        cost = torch.where((inside == level).reshape(-1) & ~cost.isnan(), cost, torch.inf).view(-1, n_rows)
        which = torch.topk(cost, min(most, len(cost)), 0, largest=False).indices
        kept = paths.path(which % n_paths)
        kept.e[here] = _picked(e.view(n, -1, n_rows), which)
        for g, code in enumerate(codes):
            kept.code[sub * (n // GROUP) + g] = _picked(code.view(-1, n_rows), which)
        kept.level[sub] = _picked(inside.reshape(-1, n_rows), which)
        kept.down[sub] = _picked(down.reshape(-1, n_rows), which)
        if later.start < COLUMNS:
            flat = kept.x[later].view(COLUMNS - later.start, -1)
            flat.addmm_(self.u[here, later].T, kept.e[here].reshape(n, -1), alpha=-1)
        return kept._replace(cost=_picked(cost, which))


def _picked(values: Tensor, which: Tensor) -> Tensor:
    """Of values [..., n, n_rows] the numbers `which` [k, n_rows]."""
    return values.gather(-2, which.expand(*values.shape[:-2], *which.shape))


def groups_of(u: Tensor) -> Groups:
    """Of U [256, 256] of a block."""
    diagonal = torch.stack([u[c : c + GROUP, c : c + GROUP] for c in range(0, COLUMNS, GROUP)]).to(torch.float64)
    one = torch.eye(GROUP, dtype=torch.float64, device=u.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal, one, upper=True)
    return Groups(inverse.to(torch.float32), (inverse @ inverse.mT).to(torch.float32))


def _refitted(x: Tensor, block: Block, inverse: Tensor, best: Paths) -> Paths:
    """With the block's scale that is best for the codes found. Errors are linear in the values: e = e(x) - e(v), and
    e(v) goes with d."""
    x, whole = x.clone(), torch.empty_like(x)
    for g, c in enumerate(range(0, COLUMNS, GROUP)):
        here, later = slice(c, c + GROUP), slice(c + GROUP, COLUMNS)
        whole[here] = inverse[g].T @ x[here]
        x[later].addmm_(block.u[here, later].T, whole[here], alpha=-1)
    e, d = best.e[:, 0], best.d[0]
    of_values = whole - e
    along, square = (of_values * whole).sum(0), (of_values * of_values).sum(0)
    other = half(d * (along / square)).clamp(max=MOST_HALF)
    tried = whole - other / d * of_values
    cost = (tried * tried).sum(0)
    better = (along > 0) & (cost < best.cost[0])
    return best._replace(e=torch.where(better, tried, e)[:, None], d=torch.where(better, other, d)[None])

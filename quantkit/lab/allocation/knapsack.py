"""Chooses one option per item for the least damage within a budget of bytes: a multiple-choice knapsack, solved by
scipy's HiGHS to proven optimality. Bytes are counted exactly, whatever the floating-point solver makes of them.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from ...base.errors import InternalCheckError, UnsupportedError

#: relative distance from the least damage at which an optimum counts as proven, with more than `_MANY` options
GAP, _MANY = 1e-6, 2000
_TRIES = 20
_ROOM = 1e5
_OUT_OF_TIME = 1
"""scipy's status"""


class Option(NamedTuple):
    """One possible state of an item."""

    label: str
    nbytes: int
    damage: float
    level: float = 0.0
    """what `monotone` compares, such as bits"""


@dataclass(frozen=True)
class Item:
    """A choice: exactly one of its options is taken."""

    name: str
    options: tuple[Option, ...]


class Solution(NamedTuple):
    """The chosen options."""

    chosen: tuple[int, ...]
    """index of the chosen option of each item"""
    nbytes: int
    damage: float
    gap: float
    """largest possible distance above the least damage, as a share of `damage`; 0: proven optimal"""


class Monotone(NamedTuple):
    """The level of item `first` must be at least that of item `then`."""

    first: int
    then: int


def solve(
    items: Sequence[Item], budget: int, monotone: Sequence[Monotone] = (), time_limit: float = 50.0
) -> Solution | None:
    """Find the options of least damage within `budget` bytes; None if there are none.

    Raises UnsupportedError without scipy."""
    kept = [_useful(item, free=_is_free(i, monotone)) for i, item in enumerate(items)]
    least = sum(min(item.options[j].nbytes for j in js) for item, js in zip(items, kept, strict=True))
    if least > budget:
        return None
    limit = budget
    for _ in range(_TRIES):
        found = _milp(items, kept, limit, monotone, time_limit)
        if found is None:
            return None
        chosen, gap = found
        nbytes = sum(item.options[j].nbytes for item, j in zip(items, chosen, strict=True))
        if nbytes <= budget:
            damage = math.fsum(item.options[j].damage for item, j in zip(items, chosen, strict=True))
            return Solution(tuple(chosen), nbytes, damage, gap)
        limit -= nbytes - budget  # exceeded within the solver's tolerance
    raise InternalCheckError(f"the solver went over {budget:,} bytes {_TRIES} times; please report this")


def _is_free(number: int, monotone: Sequence[Monotone]) -> bool:
    return all(number not in pair for pair in monotone)


def _useful(item: Item, free: bool) -> list[int]:
    """Indices of the options worth keeping: those not dominated in both size and damage. If levels are compared
    (not `free`), all of them."""
    order = sorted(range(len(item.options)), key=lambda j: (item.options[j].nbytes, item.options[j].damage))
    if not free:
        return order
    out: list[int] = []
    for j in order:
        if not out or item.options[j].damage < item.options[out[-1]].damage:
            out.append(j)
    return out


def _milp(
    items: Sequence[Item], kept: Sequence[Sequence[int]], budget: int, monotone: Sequence[Monotone], time_limit: float
) -> tuple[list[int], float] | None:
    optimize, sparse = _scipy()
    place = [(i, j) for i, js in enumerate(kept) for j in js]
    column = {at: k for k, at in enumerate(place)}
    # the minimum of each item is a constant; for the rest, the solver's tolerance (1e-6) is less than a byte
    floors = [min(items[i].options[j].nbytes for j in js) for i, js in enumerate(kept)]
    extra = [items[i].options[j].nbytes - floors[i] for i, j in place]
    divisor = reduce(math.gcd, extra, 0) or 1
    unit = divisor * max(1.0, (budget - sum(floors)) // divisor / _ROOM)
    room = (budget - sum(floors)) // divisor * divisor / unit
    damage = np.array([items[i].options[j].damage for i, j in place])
    lowest = np.array([min(items[i].options[j].damage for j in js) for i, js in enumerate(kept)])
    above = damage - lowest[[i for i, _ in place]]
    scale = float(above.max()) or 1.0
    one = sparse.coo_matrix((np.ones(len(place)), ([i for i, _ in place], range(len(place)))), (len(items), len(place)))
    weights = sparse.coo_matrix(np.array([[e / unit for e in extra]]))
    rules = [
        optimize.LinearConstraint(one.tocsr(), 1, 1),
        optimize.LinearConstraint(weights.tocsr(), -np.inf, room),
    ]
    if monotone:
        rows, cols, values = [], [], []
        for r, pair in enumerate(monotone):
            for which, sign in ((pair.first, 1.0), (pair.then, -1.0)):
                for j in kept[which]:
                    rows.append(r)
                    cols.append(column[which, j])
                    values.append(sign * items[which].options[j].level)
        matrix = sparse.coo_matrix((values, (rows, cols)), (len(monotone), len(place)))
        rules.append(optimize.LinearConstraint(matrix.tocsr(), -1e-6, np.inf))
    is_large = len(place) > _MANY
    with _quiet():
        done = optimize.milp(
            above / scale,
            constraints=rules,
            integrality=np.ones(len(place)),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": GAP if is_large else 0.0, "time_limit": time_limit, "presolve": is_large},
        )
    if done.x is None and done.status == _OUT_OF_TIME:
        raise UnsupportedError(
            f"the solver found no types within {time_limit:.0f} s; take fewer --types, or groups in place of "
            "--per-tensor"
        )
    if done.x is None:
        return None
    best: list[tuple[float, int]] = [(-1.0, -1)] * len(items)
    for (i, j), x in zip(place, done.x, strict=True):
        best[i] = max(best[i], (float(x), j))
    chosen = [j for _, j in best]
    # relative to the whole damage, including what no choice avoids
    total = math.fsum(items[i].options[j].damage for i, j in enumerate(chosen))
    bound = float(lowest.sum()) + scale * float(done.mip_dual_bound)
    gap = max(0.0, (total - bound) / total) if total > 0 else 0.0
    return chosen, gap


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence HiGHS, which prints to the process's standard output, where a command's JSON goes. Output of other
    threads is lost too while this is active."""
    libc = ctypes.CDLL(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    sys.stdout.flush()
    libc.fflush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        libc.fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise UnsupportedError("optimize needs scipy; install it with: pip install 'quantkit[lab]'") from None
    return optimize, sparse

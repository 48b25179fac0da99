"""What rounding by a plan costs: counts from the catalogue, rates measured on this machine, one thread.

Counted are the second moments' pass (quantkit.lab.calibration.estimate), a factor for each second moment of each
tensor, and the rows: ggml's rounding, quantkit's, and the comparison of both (quantkit.rounding.rounder). A row's time
a weight grows with its columns, for every error goes to all columns after it, and the comparison is a product: it is
measured at two widths, and a line drawn that is at least as steep as these products alone.
Reading and decoding the weights, which any build does, is not counted here, but in the pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ... import kernels
from ...building.engines.native import SLAB_VALUES
from ...gguf.types import QTYPES
from ...model.catalogue import layer_of
from ...planning.plan import Plan
from ...rounding import Factor, factor
from ...rounding.policy import Choice
from ...rounding.rounder import KEPT_BYTES, improved, options_of
from ..calibration.estimate import is_routed
from ..calibration.inputs import Planned, planned

#: widths at which rows are timed, and the order of the factor that is
WIDTHS, FACTOR_COLUMNS = (1024, 4096), 1024
_N_ROWS = 128
#: what is passed on is half a comparison's product
_PRODUCTS = 1.5


@dataclass(frozen=True)
class RowRate:
    """Seconds of one thread a weight."""

    ggml: float
    """of ggml's rounding alone"""
    base: float
    """of both roundings and the comparison, whatever the columns"""
    per_column: float
    """and for each column of the row"""

    def at(self, n_cols: int) -> float:
        return self.base + self.per_column * n_cols


@dataclass(frozen=True)
class Rows:
    """Tensors of one type and width that are rounded in one way."""

    type: str
    choice: Choice
    n_cols: int
    n_values: int


@dataclass(frozen=True)
class RoundingWork:
    """What there is to do."""

    rows: tuple[Rows, ...]
    factors: dict[int, int]
    """columns -> how many factors are made"""
    covariance_bytes: int
    """of all layers, on the disk"""
    layer_bytes: int
    """of the largest layer"""
    full_bytes: int
    """of the second moments that are in memory at once while the largest layer is computed"""
    making: tuple[tuple[int, int], ...]
    """columns, and how many workers can be making a factor of so many at once"""
    expert_columns: int
    """of the routed experts' ffn_down"""

    @cached_property
    def n_values(self) -> int:
        return sum(r.n_values for r in self.rows)

    @property
    def kinds(self) -> dict[tuple[str, str], Choice]:
        """What is to be timed: type and rounding."""
        return {(r.type, r.choice.rounding): r.choice for r in self.rows}

    def factor_operations(self) -> int:
        """Multiplications and additions of all factors: 4/3 n^3 each."""
        return sum(4 * n**3 // 3 * count for n, count in self.factors.items())

    def memory(self, n_threads: int) -> int:
        """The most that rounding holds: factors that are made and those kept, and the slabs at work."""
        most = max((min(n_threads, n) * 20 * n_cols**2 for n_cols, n in self.making), default=0)
        return most + KEPT_BYTES + n_threads * 6 * 4 * SLAB_VALUES


def rounding_work(plan: Plan) -> RoundingWork:
    """Of a plan that rounds something otherwise than ggml."""
    assert plan.rounding is not None
    inputs = {name: p for p in planned(plan.catalogue) for name in p.names}
    rows: dict[tuple[str, str, int], Rows] = {}
    factors: dict[int, int] = {}
    making: dict[int, int] = {}
    experts = 0
    for t in plan.tensors:
        choice, found = plan.rounding.of(t.tensor.name), inputs.get(t.tensor.name)
        if choice is None or found is None:
            continue
        n_cols = t.tensor.n_cols
        was = rows.get(key := (t.type, choice.rounding, n_cols))
        n_values = t.tensor.n_elements + (was.n_values if was else 0)
        rows[key] = Rows(t.type, choice, n_cols, n_values)
        factors[n_cols] = factors.get(n_cols, 0) + found.n_mats
        making[n_cols] = max(making.get(n_cols, 0), found.n_mats)
        if is_routed(t.tensor) and found.n_mats > 1:
            experts = n_cols
    layers = _by_layer(set(inputs.values()))
    return RoundingWork(
        tuple(rows.values()), factors, sum(p.nbytes for p in set(inputs.values())),
        max(sum(p.nbytes for p in some) for some in layers), max(sum(_full(p) for p in some) for some in layers),
        tuple(making.items()), experts,
    )  # fmt: skip


def _by_layer(every: Iterable[Planned]) -> list[list[Planned]]:
    found: dict[int, list[Planned]] = {}
    for p in every:
        found.setdefault(layer_of(p.names[0]) or 0, []).append(p)
    return list(found.values()) or [[]]


def _full(p: Planned) -> int:
    """Bytes of the whole matrices in memory: of experts' one at a time, of heads' all."""
    one = p.names[0].endswith("_exps.weight")
    return 4 * p.n_cols**2 * (1 if one else p.n_mats)


# ---------------------------------------------------------------- rates


def measured_rows(type_: str, choice: Choice) -> RowRate:
    """Of rows with weights and errors of an ordinary size."""
    times = {}
    ggml = 0.0
    for n_cols in WIDTHS:
        rng = np.random.default_rng(n_cols)
        rows = (0.02 * rng.standard_normal((_N_ROWS, n_cols))).astype(np.float32)
        u = np.triu(rng.standard_normal((n_cols, n_cols), np.float32) * np.float32(0.3 / n_cols**0.5), 1)
        np.fill_diagonal(u, 1)
        h = np.eye(n_cols, dtype=np.float32)
        made = Factor(u, np.ones(n_cols, np.float32), h, choice.damp)
        importance = made.importance if QTYPES[type_].uses_imatrix else None
        blocks = kernels.quantize(rows, type_, importance)
        ggml = seconds(lambda r=rows, i=importance: kernels.quantize(r, type_, i)) / rows.size  # type: ignore[misc]
        options = options_of(choice)
        took = seconds(lambda r=rows, b=blocks, m=made, o=options: improved(r, b, type_, m, m.h, o))  # type: ignore[misc]
        times[n_cols] = took / rows.size
    low, high = WIDTHS
    slope = max(_PRODUCTS * measured_product(), (times[high] - times[low]) / (high - low))
    return RowRate(ggml, ggml + max(0.0, times[low] - slope * low), slope)


@cache
def measured_product() -> float:
    """Seconds a weight and column of a comparison's product."""
    n_cols = WIDTHS[-1]
    w, h = np.ones((_N_ROWS, n_cols), np.float32), np.eye(n_cols, dtype=np.float32)
    return seconds(lambda: kernels.feedback_products(w, w, h)) / w.size / n_cols


def measured_factor() -> float:
    """Multiplications and additions in a second, of one thread."""
    n = FACTOR_COLUMNS
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * n, n), np.float32)
    h = x.T @ x / np.float32(len(x))
    h = np.asarray(np.tril(h) + np.tril(h, -1).T)
    return 4 * n**3 / 3 / seconds(lambda: factor(h))


def seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread, the least of three."""
    taken = []
    for _ in range(3):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return max(min(taken), 1e-9)


# ---------------------------------------------------------------- together


@dataclass(frozen=True)
class RoundingCost:
    """Seconds of one thread."""

    ggml: float
    """what the same tensors cost where ggml's bytes are all that is wanted"""
    rows: float
    """ggml's rounding included"""
    factors: float

    @property
    def total(self) -> float:
        return self.rows + self.factors


def cost_of(work: RoundingWork, rates: dict[tuple[str, str], RowRate], factor_rate: float) -> RoundingCost:
    """At these rates."""
    of = [(r, rates[r.type, r.choice.rounding]) for r in work.rows]
    return RoundingCost(
        sum(r.n_values * rate.ggml for r, rate in of),
        sum(r.n_values * rate.at(r.n_cols) for r, rate in of),
        work.factor_operations() / factor_rate,
    )

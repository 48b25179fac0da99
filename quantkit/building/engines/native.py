"""The native engine: one pass from the source's bytes to quantized blocks.

Work is cut into slabs: consecutive rows of one part of one tensor (an expert, a head, a matrix), of at most SLAB_VALUES
values. A worker reads a slab's stored bytes, quantizes them with its expert's slice of the importance matrix, and gives
the blocks to the sink. The system is told which bytes come next, so that a cold disk reads them while the cores work.
With one of quantkit's own kernels this is one call, which converts a few rows at a time to float32; otherwise the whole
slab is converted first. A worker needs only a few buffers of a slab's size, so memory is threads x slab, whatever the
tensor's size. Rows are independent, so results do not depend on slab size or threads.

If the plan asks for a rounding other than ggml's, the slab's rows are rounded again under their covariance
(quantkit.rounding.rounder), and replace ggml's where their output error is lower. Workers share the factors of the
covariance, which are dropped when others need the room. If a device rounds them, slabs are larger, and workers take
turns on it. If the covariance is computed during the build, a layer at a time, the tensors that need it are made layer
by layer, after all others.

If the source is on the Hub, slabs come in the order of its shards, which are kept only while they are needed
(quantkit.building.window); if second moments are computed too, in the order of layers
(quantkit.model.sources.on_demand).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ... import kernels
from ...base.errors import ImatrixError, WeightError
from ...base.workers import share_out
from ...gguf.types import QTYPES
from ...imatrix.matrix import open_imatrix
from ...model.catalogue import Part
from ...model.sources.on_demand import OnDemand, on_demand
from ...model.sources.safetensors_dir import Checkpoint
from ...model.sources.shard_store import Limits, ShardStore, store_of
from ...planning.plan import ImatrixStatus, Plan, Planned, values_of
from ...planning.rounding import Rounding
from ...rounding.covariance import LayerSource, is_by_layer
from ...rounding.rounder import Rounder, rounder_on
from ...weights.rows import RowReader
from ..shard_order import Piece, pieces_of
from ..shards_told import Telling
from ..supply import visits_of
from ..window import Window
from . import Work

#: values per slab: 4 MiB as float32, which suits L2/L3 and makes the overhead of a call small
SLAB_VALUES = 1 << 20
#: values per slab if a device rounds them, which needs many rows at a time
DEVICE_SLAB_VALUES = 1 << 24
#: stored bytes requested ahead of the current slab; always at least one slab per worker
AHEAD_BYTES = 64 << 20


class Slab(NamedTuple):
    """Rows row to row + n_rows of a part, which begin at row `out_row` of the tensor."""

    planned: Planned
    part: Part
    row: int
    n_rows: int
    out_row: int


def slabs(piece: Piece, slab_values: int = SLAB_VALUES) -> Iterator[Slab]:
    """The slabs of a part of a tensor, in order."""
    tensor, part = piece.planned.tensor, piece.planned.tensor.parts[piece.part]
    step = max(1, slab_values // tensor.n_cols)
    # a slab has one expert's slice of the importance matrix
    rows_per_mat = tensor.shape[1] if len(tensor.shape) > 1 else 1
    row, out_row = 0, piece.out_row
    while row < part.out_rows:
        n = min(step, part.out_rows - row, rows_per_mat - out_row % rows_per_mat)
        yield Slab(piece.planned, part, row, n, out_row)
        row += n
        out_row += n


class _Worker:
    """A thread's buffers, and the steps for a slab."""

    def __init__(self, work: Work, rounder: Rounder | None, rounding: Rounding | None) -> None:
        self.work, self.rounder, self.rounding = work, rounder, rounding
        assert work.plan.catalogue.source is not None
        self.reader = RowReader(work.plan.catalogue.source)
        self.blocks = np.empty(0, np.uint8)
        self.rows = np.empty(0, np.float32)
        self.weights = np.empty(0, np.float32)
        self.weights_of = ("", 0)

    def do(self, slab: Slab) -> None:
        planned = slab.planned
        tensor, qt = planned.tensor, QTYPES[planned.type]
        n_cols = tensor.n_cols
        row_bytes = qt.row_bytes(n_cols)
        blocks = self._blocks(slab.n_rows * row_bytes).reshape(slab.n_rows, row_bytes)
        st = self.reader.source.tensor(slab.part.source)
        if st.dtype == planned.type and not qt.is_float:
            self.reader.raw(slab.part, slab.row, blocks)
            if not kernels.is_valid(blocks, qt.name):
                raise WeightError(
                    f"{st.file}: '{st.name}' has {qt.name} blocks whose scale is NaN or Inf in rows {slab.out_row} to "
                    f"{slab.out_row + slab.n_rows - 1}; the file is damaged, get it again"
                )
        else:
            self.reader.quantize(tensor, slab.part, slab.row, slab.out_row, qt.name, self._weights(slab), blocks)
            self._round(slab, blocks)
        self.work.sink.put(tensor.name, slab.out_row, blocks)
        self.work.progress(tensor.name, slab.n_rows * n_cols)

    def _round(self, slab: Slab, blocks: npt.NDArray[np.uint8]) -> None:
        """Replace ggml's blocks by better ones, if the plan asks for it."""
        tensor, rounding = slab.planned.tensor, self.rounding
        choice = None if rounding is None else rounding.of(tensor.name)
        mat = _matrix(slab)
        if rounding is None or choice is None or rounding.is_thin(tensor.name, mat):
            return
        assert self.rounder is not None
        n = slab.n_rows * tensor.n_cols
        if self.rows.size < n:
            self.rows = np.empty(n, np.float32)
        rows = self.rows[:n].reshape(slab.n_rows, tensor.n_cols)
        self.reader.rows(tensor, slab.part, slab.row, rows)
        self.rounder.improve(rows, blocks, slab.planned.type, (tensor.name, mat), choice)

    def _weights(self, slab: Slab) -> npt.NDArray[np.float32] | None:
        """The importance of a slab's columns, as kernels.quantize takes it; cached between slabs that share it."""
        planned = slab.planned
        if planned.imatrix_status != ImatrixStatus.USED or self.work.imatrix is None:
            return None
        tensor = planned.tensor
        mat = _matrix(slab)
        if self.weights_of != (tensor.name, mat):
            self.weights = self.work.imatrix.weights(tensor.name, mat, tensor.n_cols)
            self.weights_of = (tensor.name, mat)
        return self.weights

    def _blocks(self, n: int) -> npt.NDArray[np.uint8]:
        if self.blocks.size < n:
            self.blocks = np.empty(n, np.uint8)
        return self.blocks[:n]


def _matrix(slab: Slab) -> int:
    """The index of a slab's matrix in its tensor."""
    shape = slab.planned.tensor.shape
    return slab.out_row // shape[1] if len(shape) > 2 else 0


def _announced(every: Iterator[Slab], work: Work) -> Iterator[Slab]:
    """Yield the same slabs, after requesting the stored bytes of those that follow."""
    assert work.plan.catalogue.source is not None
    reader = RowReader(work.plan.catalogue.source)
    ahead: deque[tuple[Slab, int]] = deque()
    asked = 0
    for slab in every:
        n = reader.will_need(slab.planned.tensor, slab.part, slab.row, slab.n_rows)
        ahead.append((slab, n))
        asked += n
        while asked > AHEAD_BYTES and len(ahead) > work.n_threads:
            done, n = ahead.popleft()
            asked -= n
            yield done
    yield from (slab for slab, _ in ahead)


class NativeEngine:
    """The native engine (see the module)."""

    name = "native"
    rounds = True

    def __init__(self, slab_values: int | None = None, limits: Limits | None = None) -> None:
        self._slab_values, self.limits = slab_values, limits or Limits()
        self.slab_values = slab_values or SLAB_VALUES

    def scratch_bytes(self, plan: Plan) -> int:
        covariance = None if plan.rounding is None else plan.rounding.covariance
        return covariance.scratch_bytes if is_by_layer(covariance) else 0

    def run(self, work: Work) -> None:
        rounding = work.plan.rounding
        if rounding is not None and rounding.device is not None:
            self.slab_values = self._slab_values or DEVICE_SLAB_VALUES
        if rounding is None or not is_by_layer(rounding.covariance):
            self._make(work, work.plan.tensors, rounding)
            return
        used = ImatrixStatus.USED if work.plan.weights_in_pass else None
        later = {
            t.tensor.name: t
            for t in work.plan.tensors
            if (rounding.of(t.tensor.name) or t.imatrix_status == used) and self._is_missing([t], work)
        }
        others = [t for t in work.plan.tensors if t.tensor.name not in later]
        with self._shards(work) as brings:
            if brings is None:
                self._make(work, others, rounding)
            if later:
                self._by_layer(work, rounding, rounding.covariance, later, [] if brings is None else others)
            if brings is not None:
                self._make(work, others, rounding)

    @contextmanager
    def _shards(self, work: Work) -> Iterator[OnDemand | None]:
        """For a source on the Hub, what brings the shards of a layer, for the pass and for what is made after it."""
        source = work.plan.catalogue.source
        store = None if source is None else store_of(source)
        if store is None or not isinstance(source, Checkpoint):
            yield None
            return

        def tell(shard: str, done: int, total: int) -> None:
            work.progress(f"fetching {shard}: {100 * done // max(1, total)} %", 0)

        with OnDemand(source, store, store.folder, self.limits, tell) as brings:
            yield brings

    def _by_layer(
        self, work: Work, rounding: Rounding, source: LayerSource, later: dict[str, Planned], others: list[Planned]
    ) -> None:
        """Make tensors whose second moments are computed during the build, a layer at a time, with `others` of that
        layer."""
        tensors, plan = {name: t.tensor for name, t in later.items()}, work.plan
        steps = source.layers(
            work.lasting(), tuple(later), lambda what: work.progress(what, 0), plan.weights_in_pass
        )  # fmt: skip
        with closing(steps) as layers:
            for number in layers:
                some = {name: t for name, t in later.items() if t.tensor.layer == number}
                if plan.weights_in_pass:
                    try:
                        weights = values_of(plan, open_imatrix(str(source.importance)), some.values())
                    except ImatrixError as e:
                        raise ImatrixError(f"{e}; and give it with --imatrix FILE") from None
                    work = replace(work, imatrix=weights)
                self._make(work, [t for t in others if t.tensor.layer == number], rounding)
                self._make(work, some.values(), rounding.seen(rounding.choices.keys() & some.keys(), tensors))
                work.sink.commit()

    def _make(self, work: Work, some: Iterable[Planned], rounding: Rounding | None) -> None:
        """Quantize the missing rows of these tensors."""
        covariance = None if rounding is None else rounding.covariance
        rounder = None if rounding is None or covariance is None else rounder_on(rounding.device, covariance)

        def worker() -> Callable[[Slab], None]:
            return _Worker(work, rounder, rounding).do

        pieces = list(pieces_of(some))
        assert work.plan.catalogue.source is not None
        store = store_of(work.plan.catalogue.source)
        brings = on_demand(work.plan.catalogue.source)
        if store is None:
            share_out(_announced(self._missing(pieces, work), work), work.n_threads, worker)
        elif brings is not None:
            source = work.plan.catalogue.source
            pieces.sort(key=lambda p: store.shard(source.tensor(p.planned.tensor.parts[p.part].source)))
            share_out(_announced(self._missing(pieces, work), work), work.n_threads, worker, brings.abandon)
            brings.go_on()
        else:
            self._by_shard(store, pieces, work, worker)

    def _is_missing(self, some: Iterable[Planned], work: Work) -> bool:
        return next(self._missing(pieces_of(some), work), None) is not None

    def _missing(self, pieces: Iterable[Piece], work: Work) -> Iterator[Slab]:
        every = (slab for piece in pieces for slab in slabs(piece, self.slab_values))
        return (s for s in every if not work.sink.has(s.planned.tensor.name, s.out_row, s.n_rows))

    def _by_shard(
        self, store: ShardStore, pieces: list[Piece], work: Work, worker: Callable[[], Callable[[Slab], None]]
    ) -> None:
        """The same for a source whose shards are fetched and removed."""
        missing = [p for p in pieces if next(self._missing([p], work), None) is not None]
        order = visits_of(work.plan, missing, store)
        store.clear(visit.shard for visit in order[: self.limits.keep])
        told_store = Telling(store, order, store.folder.parent)
        window: Window[Slab] = Window(
            told_store, order, self.limits, work.commit, lambda what: work.progress(f"fetching {what}", 0)
        )

        def told() -> Callable[[tuple[int, Slab]], None]:
            do = worker()

            def do_and_tell(job: tuple[int, Slab]) -> None:
                do(job[1])
                window.done(job[0])

            return do_and_tell

        try:
            jobs = window.slabs(lambda visit: _announced(self._missing(visit.pieces, work), work))
            share_out(jobs, work.n_threads, told, window.stop)
        finally:
            window.close()

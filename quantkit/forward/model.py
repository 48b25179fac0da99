"""What is computed: weights by GGUF name, read where they lie, and changed on their way where it is a variant."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..base.errors import KernelError, SourceError, UnsupportedError, WeightError
from ..gguf.types import IK_TYPES, INTEGER_TYPES, QTYPES
from ..model.catalogue import Catalogue, Part, Role, Source, Tensor
from ..model.sources.on_demand import on_demand, whole
from ..weights.rows import RowReader
from .layer import ALL, Family, Key

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: stored bytes that are decoded at a time: what is read is still in the processor's cache then
_SLAB_BYTES = 1 << 20


def _empty(shape: tuple[int, ...]) -> F32:
    return np.empty(shape, np.float32)


class Reader:
    """Matrices of a catalogue's tensors, as float32. Any number of threads may read."""

    def __init__(self, catalogue: Catalogue) -> None:
        if catalogue.source is None:
            raise SourceError(
                catalogue.lacks
                or f"{catalogue.model}: there are no weights here, only a config; give the checkpoint or a GGUF"
            )
        self.source: Source = catalogue.source
        self.tensors = {t.name: t for t in catalogue.tensors}
        self._own = threading.local()
        self._counting = threading.Lock()
        self.bytes_read = 0
        """stored bytes of all that was read, scales aside"""

    def expect(self, *runs: Iterable[str], side_by_side: bool = True) -> None:
        """Tensors of these names are read from now on, one run after the other, in this order, or experts of a layer
        `side_by_side`: of a source on the Hub the next shards are fetched meanwhile."""
        brings = on_demand(self.source)
        if brings is not None:
            brings.expect(chain.from_iterable(self._parts(names, side_by_side) for names in runs))

    def abandon(self) -> None:
        """Nobody reads any more for now: who waits for a shard stops."""
        brings = on_demand(self.source)
        if brings is not None:
            brings.abandon()

    def _parts(self, names: Iterable[str], side_by_side: bool) -> Iterator[str]:
        """The source tensors in the order in which they are read."""

        def layer_of_experts(t: Tensor) -> int | None:
            return t.layer if side_by_side and t.role is Role.ROUTED_EXPERT else None

        for layer, alike in groupby((self.tensors[name] for name in names), layer_of_experts):
            parts: Iterable[Sequence[Part | None]] = [t.parts for t in alike]
            for several in parts if layer is None else zip_longest(*parts):
                yield from (part.source for part in several if part is not None)

    def _reader(self) -> RowReader:
        if not hasattr(self._own, "reader"):
            self._own.reader = RowReader(self.source)
        reader: RowReader = self._own.reader
        return reader

    def matrix(self, key: Key, empty: Callable[[tuple[int, ...]], F32] = _empty) -> F32:
        """float32 [n_rows, n_cols] of one matrix; of the whole tensor [all rows, n_cols] for `ALL`; in an array that
        `empty` makes. Raises SourceError, WeightError."""
        tensor = self.tensors[key.name]
        first, n = self._rows_of(key)
        out = empty((n, tensor.n_cols))
        self._fill(tensor, first, out)
        return out

    def n_values(self, key: Key) -> int:
        return self._rows_of(key)[1] * self.tensors[key.name].n_cols

    def _rows_of(self, key: Key) -> tuple[int, int]:
        """The first row of a matrix in its tensor, and how many it has."""
        tensor = self.tensors[key.name]
        per_mat = tensor.shape[1] if len(tensor.shape) > 1 else 1
        return (0, tensor.n_rows) if key.mat == ALL else (key.mat * per_mat, per_mat)

    def rows(self, name: str, numbers: npt.NDArray[np.int64]) -> F32:
        """float32 [len(numbers), n_cols] of some rows, in ascending order of their numbers."""
        tensor = self.tensors[name]
        out = np.empty((len(numbers), tensor.n_cols), np.float32)
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            self._fill(tensor, int(numbers[start]), out[start:stop])
        return out

    def _fill(self, tensor: Tensor, first: int, out: F32) -> None:
        """Rows first… of a tensor, which are dealt from its parts."""
        reader, at, row, nbytes = self._reader(), 0, 0, 0
        for part in tensor.parts:
            low, high = max(first, row), min(first + len(out), row + part.out_rows)
            if low < high:
                with whole(self.source, part.source):
                    for start, stop in _slabs(part, self.source, low - row, high - row):
                        reader.rows(tensor, part, start, out[at + start + row - low : at + stop + row - low])
                at += high - low
                st = self.source.tensor(part.source)
                nbytes += st.nbytes * (high - low) * part.n_rows // (part.out_rows * max(1, prod(st.shape[:-1])))
            row += part.out_rows
        if at != len(out):
            raise SourceError(f"'{tensor.name}': rows {first:,}-{first + len(out) - 1:,} of {row:,} are asked for")
        with self._counting:
            self.bytes_read += nbytes


def _slabs(part: Part, source: Source, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start to stop of a part, a few at a time; all of a transposed one, which is decoded as a whole."""
    st = source.tensor(part.source)
    n = stop - start
    if not part.transposed:
        n = max(1, _SLAB_BYTES * prod(st.shape[:-1]) // max(1, st.nbytes)) * part.interleave
    for at in range(start, stop, n):
        yield at, min(stop, at + n)


class Change(Protocol):
    """What a variant makes of a source's matrices."""

    def key(self, name: str) -> Hashable:
        """Equal for variants that make the same of this tensor; None where it stays as it is."""

    def apply(self, tensor: Tensor, mat: int, rows: F32) -> F32:
        """What becomes of float32 [n_rows, n_cols], rows of matrix `mat` (or of all, one after the other)."""


@runtime_checkable
class Ready(Protocol):
    """A change that has rows of some tensors ready, so that the source's need not be read."""

    def is_ready(self, name: str) -> bool: ...
    def rows(self, tensor: Tensor, first: int, n_rows: int) -> F32 | None:
        """float32 [n_rows, n_cols], rows first… of a tensor as the change makes them; None where they are gone."""


@dataclass
class Model:
    """A model to compute. Models that share a `reader` are read once for all."""

    catalogue: Catalogue
    name: str = ""
    change: Change | None = None
    reader: Reader | None = None

    def __post_init__(self) -> None:
        from .families import family_of

        self.name = self.name or self.catalogue.model
        self.family: Family = family_of(self.catalogue)
        self._reader = self.reader or Reader(self.catalogue)
        foreign = sorted({t.source_type for t in self.catalogue.tensors} & {*INTEGER_TYPES, *IK_TYPES})
        if foreign:
            raise UnsupportedError(f"{self.name}: tensors of the types {', '.join(foreign)} cannot be computed")

    @property
    def weights(self) -> Reader:
        return self._reader

    def variant(self, name: str, change: Change) -> Model:
        """The same source with other weights on their way."""
        return Model(self.catalogue, name, change, self._reader)

    def key_of(self, name: str) -> Hashable:
        """Equal for models that have the same weights in this tensor."""
        return (id(self._reader), None if self.change is None else self.change.key(name))

    def is_ready(self, name: str) -> bool:
        """Whether `made` need not read the source."""
        return self._holder is not None and self._holder.is_ready(name)

    @property
    def _holder(self) -> Ready | None:
        change: object = self.change
        return change if isinstance(change, Ready) else None

    def made(self, name: str, first: int, n_rows: int) -> F32:
        """float32 [n_rows, n_cols]: rows first… of a tensor that is ready, or else as the change makes them: those of
        one matrix, or of all. Raises as `Reader.matrix` and the change do."""
        tensor = self.weights.tensors[name]
        found = None if self._holder is None else self._holder.rows(tensor, first, n_rows)
        if found is not None:
            return found
        rows = self.weights.rows(name, np.arange(first, first + n_rows))
        mat = first // tensor.shape[1] if len(tensor.shape) > 2 and n_rows == tensor.shape[1] else ALL
        return rows if self.change is None else self.change.apply(tensor, mat, rows)

    def layer_key(self, number: int) -> Hashable:
        return tuple(self.key_of(k.name) for k in self.family.keys(number))


class Rounding(Protocol):
    """What quantizes some tensors in another way than ggml's."""

    def key(self, name: str, qtype: str) -> Hashable:
        """Equal for what makes the same blocks of a tensor at a type; None where they are ggml's."""

    def quantize(self, tensor: Tensor, mat: int, rows: F32, qtype: str, importance: F32 | None) -> U8:
        """Blocks, uint8 [n_rows, row_bytes], of a whole matrix float32 [n_rows, n_cols], with its importance float32
        [n_cols]; asked for only where `key` is not None."""


@dataclass(frozen=True)
class Quantized:
    """The change that quantizing makes: types by tensor name, and importance float32 [n_cols] by name and matrix."""

    types: dict[str, str]
    importance: Importance | None = None
    label: Hashable = None
    """what tells one importance matrix from another"""
    rounding: Rounding | None = None
    """None: ggml's, of all tensors"""

    def key(self, name: str) -> Hashable:
        qtype = self.types.get(name)
        if qtype is None:
            return None
        return (qtype, self.label, None if self.rounding is None else self.rounding.key(name, qtype))

    def apply(self, tensor: Tensor, mat: int, rows: F32) -> F32:
        """Quantize and dequantize. Raises WeightError, KernelError, ImatrixError, SourceError."""
        qtype = self.types.get(tensor.name)
        if qtype is None or not tensor.quantizable:
            return rows
        out = np.empty_like(rows)
        per_mat = tensor.shape[1] if len(tensor.shape) > 2 and mat == ALL else len(rows)
        for i, at in enumerate(range(0, len(rows), per_mat)):
            one = i if mat == ALL else mat
            weights = None
            if self.importance is not None and tensor.name in self.importance:
                weights = self.importance.weights(tensor.name, one, tensor.n_cols)
            try:
                blocks = self._blocks(tensor, one, rows[at : at + per_mat], qtype, weights)
            except (KernelError, WeightError) as e:
                raise type(e)(f"'{tensor.name}': {e}") from None
            dequantized(blocks, qtype, out[at : at + per_mat])
        return out

    def _blocks(self, tensor: Tensor, mat: int, rows: F32, qtype: str, weights: F32 | None) -> U8:
        from .. import kernels

        if self.rounding is None or self.rounding.key(tensor.name, qtype) is None:
            return kernels.quantize(rows, qtype, weights)
        return self.rounding.quantize(tensor, mat, rows, qtype, weights)


class Importance(Protocol):
    """Mean squared inputs of columns, as an importance matrix has them."""

    def __contains__(self, name: str) -> bool: ...
    def weights(self, name: str, mat: int, n_cols: int) -> F32: ...


def dequantized(blocks: npt.NDArray[np.uint8], qtype: str, out: F32) -> None:
    """Fill `out` float32 [n_rows, n_cols] with the values of blocks uint8 [n_rows, row_bytes]."""
    from .. import kernels

    if QTYPES[qtype].is_float:
        kernels.float_to_f32(blocks, qtype, out, False)
    else:
        kernels.dequantize(blocks, qtype, out.shape[1], out)

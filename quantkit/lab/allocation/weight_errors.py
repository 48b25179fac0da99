"""The error that a type causes in a tensor's weights: imatrix-weighted relative squared error, from sampled rows.

    error = Σ w_c (x - q)² / Σ w_c x²        over sampled rows; w_c is the importance of a column, 1 without a matrix

Rows are quantized independently, so the sampled rows equal those of a build, to the bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import KernelError
from ...forward.model import Importance, Model, Quantized, Reader
from ...gguf.types import QTYPES, fitting_type
from ...model.catalogue import Tensor
from ...planning.plan import must_have_weights

F32 = npt.NDArray[np.float32]
#: types worth choosing from, from few bits to many
TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K",
    "Q6_K", "Q8_0",
)  # fmt: skip
_ROWS, _MATS = 64, 8


@dataclass(frozen=True)
class Usable:
    """Which types a tensor can have."""

    importance: Importance | None

    def weighted(self, tensor: Tensor) -> bool:
        return self.importance is not None and tensor.name in self.importance

    def type_of(self, tensor: Tensor, asked: str) -> str | None:
        """The type a tensor gets if `asked` is asked for. None if it cannot have it: no fallback fits its rows, or the
        type needs importance that the matrix lacks."""
        try:
            given = fitting_type(QTYPES[asked], tensor.n_cols).name
        except KernelError:
            return None
        needs = QTYPES[given].needs_imatrix or must_have_weights(tensor.name, given, "")
        return None if needs and not self.weighted(tensor) else given


def weight_errors(
    model: Model,
    tensors: Iterable[Tensor],
    types: Iterable[str],
    importance: Importance | None,
    seed: int = 0,
    n_threads: int = 1,
    progress: Callable[[str, int], None] = lambda name, n_rows: None,
) -> dict[str, dict[str, float]]:
    """Return errors by tensor and by the type it gets. Raises what reading and quantizing raise."""
    usable, wanted = Usable(importance), list(types)

    def one(tensor: Tensor) -> dict[str, float]:
        given = {usable.type_of(tensor, t): None for t in wanted}
        names = [name for name in given if name is not None]
        found = _errors(model.weights, tensor, names, importance if usable.weighted(tensor) else None, seed)
        progress(tensor.name, tensor.n_rows)
        return found

    every = list(tensors)
    model.weights.expect((t.name for t in every), side_by_side=False)
    with ThreadPoolExecutor(max(1, n_threads), "quantkit-errors") as pool:
        try:
            return dict(zip((t.name for t in every), pool.map(one, every), strict=True))
        except BaseException:
            model.weights.abandon()
            raise


def _errors(
    reader: Reader, tensor: Tensor, types: list[str], importance: Importance | None, seed: int
) -> dict[str, float]:
    per_mat = tensor.shape[1] if len(tensor.shape) > 2 else tensor.n_rows
    n_mats = tensor.n_rows // per_mat
    random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    mats = np.sort(random.choice(n_mats, min(_MATS, n_mats), replace=False))
    per = min(per_mat, max(4, _ROWS // len(mats)))
    lost, all_ = dict.fromkeys(types, 0.0), 0.0
    for mat in mats.tolist():
        rows = np.sort(random.choice(per_mat, per, replace=False)) + mat * per_mat
        x = reader.rows(tensor.name, rows.astype(np.int64))
        w = np.ones(tensor.n_cols) if importance is None else importance.weights(tensor.name, mat, tensor.n_cols)
        w = w.astype(np.float64)
        all_ += float((w * x.astype(np.float64) ** 2).sum())
        for name in types:
            lost[name] += float((w * (x.astype(np.float64) - _through(tensor, name, mat, x, importance)) ** 2).sum())
    return {name: value / all_ if all_ else 0.0 for name, value in lost.items()}


def _through(tensor: Tensor, name: str, mat: int, rows: F32, importance: Importance | None) -> F32:
    return Quantized({tensor.name: name}, importance).apply(tensor, mat, rows)


@dataclass(frozen=True)
class Noise:
    """A change by seeded noise: each row gets Gaussian noise with an expected relative squared error of `error`."""

    names: frozenset[str]
    error: float
    seed: int = 0

    def key(self, name: str) -> Hashable:
        return ("noise", self.error, self.seed) if name in self.names else None

    def apply(self, tensor: Tensor, mat: int, rows: F32) -> F32:
        if tensor.name not in self.names:
            return rows
        random = np.random.default_rng([self.seed, zlib.crc32(tensor.name.encode()), mat + 1, len(rows)])
        size = np.sqrt(self.error * (rows.astype(np.float64) ** 2).mean(-1, keepdims=True))
        noise: F32 = random.standard_normal(rows.shape, np.float32) * size.astype(np.float32)
        return rows + noise


FLOOR_ERROR = 2.0**-18 / 3
"""approximate error of rounding to BF16: squares of up to 2^-9 of a value, evenly spread"""

"""Matrices of variants rounded by error feedback: the same bits as in the file that `quantkit build` makes.

Rounding costs many times more than reading and dequantizing, so results are kept: variants share them within a pass,
and `Blocks` keeps them between passes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ... import kernels
from ...model.catalogue import Tensor
from ...planning.plan import Plan
from ...planning.rounding import check_covariance
from ...rounding.covariance import CovarianceSource, standing
from ...rounding.policy import Choice
from ...rounding.rounder import Rounder

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
#: bytes of blocks to keep
_BLOCKS = 2 << 30


class Blocks:
    """Rounded matrices of one model, by the second moments of one source. When room runs out, the least recently used
    go first. Safe for any number of threads; two that need the same matrix at once may both compute it."""

    def __init__(self, source: CovarianceSource, nbytes: int = _BLOCKS) -> None:
        self.source = source
        self._rounder = Rounder(source)
        self._room = nbytes
        self._kept: OrderedDict[Hashable, U8] = OrderedDict()
        self._lock = threading.Lock()

    def quantize(
        self, tensor: Tensor, mat: int, rows: F32, qtype: str, importance: F32 | None, choice: Choice
    ) -> U8:  # fmt: skip
        """Quantize a matrix, or some of its rows, into the blocks that a build makes. Only whole matrices are kept.
        Raises SourceError, KernelError, WeightError."""
        is_whole = len(rows) == (tensor.shape[1] if len(tensor.shape) > 1 else 1)
        used = None if importance is None else importance.tobytes()
        key = (tensor.name, mat, qtype, used, choice._replace(why=""))
        with self._lock:
            if is_whole and key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = kernels.quantize(rows, qtype, importance)
        if mat not in standing(tensor, self.source).thin:
            self._rounder.improve(rows, made, qtype, (tensor.name, mat), choice)
        with self._lock:
            if is_whole and key not in self._kept:
                self._kept[key] = made
                self._room -= made.nbytes
            while self._room < 0 and self._kept:
                self._room += self._kept.popitem(last=False)[1].nbytes
        return made


def rounded_by(plan: Plan, model: Hashable) -> Rounded | None:
    """Return the rounding of a plan's tensors; None if ggml rounds all of them. `model` identifies the weights. Raises
    SourceError if the plan needs a covariance and has none."""
    check_covariance(plan)
    rounding = plan.rounding
    if rounding is None or rounding.covariance is None:
        return None
    choices = {name: choice for name in rounding.choices if (choice := rounding.of(name)) is not None}
    return Rounded(_shared(rounding.covariance, model), choices)  # type: ignore[arg-type]  # hashable: it has no __eq__


@lru_cache(maxsize=1)
def _shared(source: CovarianceSource, model: Hashable) -> Blocks:
    """The blocks that all candidates and passes of one command share."""
    return Blocks(source)


class Rounded:
    """The rounding of a variant (quantkit.forward.model.Rounding): per tensor by its choice, else ggml's."""

    def __init__(self, blocks: Blocks, choices: Mapping[str, Choice]) -> None:
        self._blocks = blocks
        self._choices = {n: c for n, c in choices.items() if not c.is_ggml and n in blocks.source}

    def key(self, name: str, qtype: str) -> Hashable:
        choice = self._choices.get(name)
        return None if choice is None else (id(self._blocks), choice._replace(why=""))

    def quantize(self, tensor: Tensor, mat: int, rows: F32, qtype: str, importance: F32 | None) -> U8:
        return self._blocks.quantize(tensor, mat, rows, qtype, importance, self._choices[tensor.name])

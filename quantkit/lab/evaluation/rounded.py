"""Matrices of variants rounded by error feedback: the bits of the file that `quantkit build` would make.

Rounding costs many times what reading and dequantizing do, so what was made is kept: in one pass variants share it
anyway, and `Blocks` keeps it from pass to pass.
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
#: bytes of blocks that are kept
_BLOCKS = 2 << 30


class Blocks:
    """What was rounded of one model by the second moments of one source, kept as far as there is room: the longest
    unused go first. Any number of threads may use it; two that want the same at once may both make it."""

    def __init__(self, source: CovarianceSource, nbytes: int = _BLOCKS) -> None:
        self.source = source
        self._rounder = Rounder(source)
        self._room = nbytes
        self._kept: OrderedDict[Hashable, U8] = OrderedDict()
        self._lock = threading.Lock()

    def quantize(
        self, tensor: Tensor, mat: int, rows: F32, qtype: str, importance: F32 | None, choice: Choice
    ) -> U8:  # fmt: skip
        """Blocks of a matrix, or of some of its rows: those of a build. Whole matrices are kept. Raises SourceError,
        KernelError, WeightError."""
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
    """What rounds a plan's tensors; None where that is ggml's rounding for all. `model`: whose weights. Raises
    SourceError where the plan has no covariance and needs one."""
    check_covariance(plan)
    rounding = plan.rounding
    if rounding is None or rounding.covariance is None:
        return None
    choices = {name: choice for name in rounding.choices if (choice := rounding.of(name)) is not None}
    return Rounded(_shared(rounding.covariance, model), choices)  # type: ignore[arg-type]  # hashable: it has no __eq__


@lru_cache(maxsize=1)
def _shared(source: CovarianceSource, model: Hashable) -> Blocks:
    """One for the candidates of a command, and its passes."""
    return Blocks(source)


class Rounded:
    """Rounding of a variant (quantkit.forward.model.Rounding): of each tensor as its choice says, else ggml's."""

    def __init__(self, blocks: Blocks, choices: Mapping[str, Choice]) -> None:
        self._blocks = blocks
        self._choices = {n: c for n, c in choices.items() if not c.is_ggml and n in blocks.source}

    def key(self, name: str, qtype: str) -> Hashable:
        choice = self._choices.get(name)
        return None if choice is None else (id(self._blocks), choice._replace(why=""))

    def quantize(self, tensor: Tensor, mat: int, rows: F32, qtype: str, importance: F32 | None) -> U8:
        return self._blocks.quantize(tensor, mat, rows, qtype, importance, self._choices[tensor.name])

"""A source with additional tensors that no file stores: they are computed from config.json when first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..catalogue import Source, SourceTensor


class SyntheticTensors:
    """A `Source` that wraps another and adds 1-D float32 tensors: name -> (values, function that computes them)."""

    def __init__(self, source: Source, made: Mapping[str, tuple[int, Callable[[], npt.NDArray[np.float32]]]]) -> None:
        self._source = source
        config = source.path / "config.json"
        self._made = {name: SourceTensor(name, "F32", (n,), config, 0, 4 * n) for name, (n, _) in made.items()}
        self._make = {name: make for name, (_, make) in made.items()}
        self._bytes: dict[str, npt.NDArray[np.uint8]] = {}

    def __getattr__(self, name: str) -> Any:  # everything else comes from the wrapped source: tensors, scales, config
        return getattr(self._source, name)

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    @property
    def block(self) -> tuple[int, int]:
        return self._source.block

    def tensor(self, name: str) -> SourceTensor:
        return self._made[name] if name in self._made else self._source.tensor(name)

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes of a tensor from byte `start` on."""
        if tensor.name not in self._made:
            self._source.read(tensor, start, out)
            return
        raw = self._bytes.get(tensor.name)
        if raw is None:  # two threads may both compute it, with the same bytes
            raw = self._bytes[tensor.name] = self._make[tensor.name]().view(np.uint8)
        out.reshape(-1)[:] = raw[start : start + out.size]

    def scale(self, name: str) -> npt.NDArray[np.float32]:
        return self._source.scale(name)

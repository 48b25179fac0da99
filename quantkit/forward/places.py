"""Where hidden states are: in memory, or beyond a limit in files mapped into it."""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import torch

from ..base.errors import OutputError


class Places:
    """Makes float32 tensors. The file of a mapped one has no name, and is gone with the tensor."""

    def __init__(self, memory: int | None, folder: Path | None, device: torch.device) -> None:
        self._memory, self._folder, self._device = memory, folder, device
        self._used = 0

    def make(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of any values, to be kept. Raises OutputError when a file is needed and there is no space."""
        nbytes = 4 * prod(shape)
        if self._fits(self._used + nbytes):
            self._used += nbytes
            return torch.empty(shape, dtype=torch.float32, device=self._device)
        return self._mapped(shape, nbytes)

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A zeroed tensor for a while, mapped where it does not fit beside those that are kept. Raises OutputError."""
        nbytes = 4 * prod(shape)
        if self._fits(self._used + nbytes):
            return torch.zeros(shape, dtype=torch.float32, device=self._device)
        return self._mapped(shape, nbytes)

    def _fits(self, nbytes: int) -> bool:
        return self._memory is None or nbytes <= self._memory or self._device.type != "cpu"

    def _mapped(self, shape: tuple[int, ...], nbytes: int) -> torch.Tensor:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
        except OSError as e:
            raise OutputError(
                f"{self._folder or tempfile.gettempdir()}: {nbytes:,} bytes of hidden states cannot be written: "
                f"{e.strerror or e}; free some space, or raise --memory"
            ) from None

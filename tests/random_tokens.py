"""Tokens as they come, for what needs a text but not what it says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tokens:
    """Random tokens in chunks."""

    tokens: npt.NDArray[np.int32]
    names: tuple[str, ...] = ("random",)

    @property
    def first(self) -> int:
        return int(self.tokens.shape[1]) // 2

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        return self.tokens[:, self.first + 1 :]

"""What is chosen of the method."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

#: of the method: raised by whatever makes other bytes of the same rows, factor, type and options
VERSION = 2
#: the usual damping: this share of the mean of the covariance's diagonal is added to its diagonal
DAMP = 0.01


class Method(str, Enum):
    FEEDBACK = "feedback"
    """within a block too: each column's error goes to all columns after it"""
    COARSE = "coarse"
    """ggml quantizes 256 columns at a time, and their errors go to the columns after them"""


class Options(NamedTuple):
    """How rows are rounded. Equal options with equal inputs give equal bytes."""

    method: Method = Method.FEEDBACK
    search: bool = True
    """feedback: look for each block's scales under the covariance, not only where ggml does"""
    gain: bool = False
    """at last scale each row's blocks so that w H q^T = w H w^T for its weights w and values q"""
    damp: float = DAMP
    """of the mean of the covariance's diagonal, added to its diagonal"""

    def __str__(self) -> str:
        """A text that is the same for equal options only, and that does not change between versions."""
        words: list[str] = [self.method.value]
        if self.method is Method.FEEDBACK and self.search:
            words.append("search")
        if self.gain:
            words.append("gain")
        return " ".join([*words, f"damp {self.damp:.6g}"])


class Device(NamedTuple):
    """Where torch rounds rows, in place of the CPU's own kernels."""

    name: str
    """as torch has it: cpu, cuda, cuda:1"""
    text: str
    """what a file says of it: its model, and torch's version"""

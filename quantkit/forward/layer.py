"""What a family and the pass that drives it say to each other.

A layer is a generator: it asks for matrices (`Need`), is sent them as tensors, and computes on all tokens of the
run. So many models can go through a layer side by side, and what they need is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..base.errors import SourceError
from ..model.catalogue import Catalogue

Tensor = torch.Tensor


class Key(NamedTuple):
    """A matrix: of a tensor by GGUF name, the one of that number (an expert); `ALL` for the whole tensor."""

    name: str
    mat: int


ALL = -1


class Need(NamedTuple):
    """Matrices that are needed together."""

    keys: tuple[Key, ...]
    following: tuple[tuple[Key, ...], ...] = ()
    """what will be needed after them, in order, so that it can be read meanwhile"""
    left: tuple[int, int] = (1, 1)
    """the share of the layer that is not computed before they come, as a fraction"""


class Input(NamedTuple):
    """The input of matrices, seen just before it is multiplied."""

    names: tuple[str, ...]
    """tensors that share it"""
    x: Tensor
    """[n_rows, n_cols], or [n_rows, n_mats, n_cols] where each matrix of a dense tensor has its own"""
    mat: int
    """the expert, or `ALL`"""
    n_mats: int
    """matrices of each of the tensors"""


@dataclass
class State:
    """The tokens of a run on their way through a model."""

    hidden: Tensor
    """float32 [n_chunks, n_ctx, n_embd], changed in place"""
    block_chunks: int
    """chunks that are computed at a time"""
    zeros: Callable[[tuple[int, ...]], Tensor]
    """makes a zeroed float32 tensor"""
    see: Callable[[Input], None] | None = None
    experts_together: int = 1
    """routed experts with few tokens that are computed in one product"""
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def n_ctx(self) -> int:
        return self.hidden.shape[1]

    def blocks(self) -> Iterator[Tensor]:
        """Views of `hidden`, a few chunks each."""
        for at in range(0, self.hidden.shape[0], self.block_chunks):
            yield self.hidden[at : at + self.block_chunks]

    def look(self, names: tuple[str, ...], x: Tensor, mat: int = ALL, n_mats: int = 1) -> None:
        """Show the input of `names` to the watchers."""
        if self.see is not None:
            self.see(Input(names, x, mat, n_mats))


Layer = Generator[Need, list[Tensor], None]


class Family(Protocol):
    """A model's computation."""

    n_layers: int
    n_embd: int
    n_vocab: int
    widest: int
    """about how many values a token has at once in a layer"""
    eps: float
    output: str
    """the tensor of the logits: output.weight, or token_embd.weight where they are one"""

    def layer(self, number: int, state: State) -> Layer: ...
    def keys(self, number: int) -> tuple[Key, ...]: ...


def require(catalogue: Catalogue, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SourceError unless the model has all these tensors, in these (ne) shapes."""
    found = {t.name: t.shape for t in catalogue.tensors}
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        n = len(missing)
        some = ", ".join(missing[:3]) + (f" and {n - 3:,} more" if n > 3 else "")
        what = f"the tensors {some} are" if n > 1 else f"the tensor {some} is"
        raise SourceError(f"{catalogue.model}: {what} missing; computing the model needs them")
    for name, shape in shapes.items():
        if _trimmed(found[name]) != _trimmed(shape):
            raise SourceError(
                f"{catalogue.model}: '{name}' has the shape {_shown(found[name])}, but {_shown(shape)} follows from "
                "the metadata; the file is not sound"
            )


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape)

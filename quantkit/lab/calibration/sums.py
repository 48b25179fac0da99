"""What an importance matrix is made of: sums over the inputs of every matrix, as the forward pass shows them.

Sums of a layer are in memory while it is computed, and in a file of their own from its end on. Inputs that tensors
share (gate and up, q_a and kv_a) are summed once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...base.errors import OutputError, ResumeError
from ...forward.layer import ALL, Input
from ...imatrix.entries import Sums
from ...imatrix.write import Shape

F64 = npt.NDArray[np.float64]


class _Summed(NamedTuple):
    """The sums of one input, where it is computed, so that a GPU need not wait for each to arrive."""

    names: tuple[str, ...]
    in_sum2: torch.Tensor
    """float64 [n_mats, n_cols], as `in_sum`"""
    in_sum: torch.Tensor
    counts: F64
    """[n_mats]"""


class InputSums:
    """An observer of the pass: sums of squares, sums and counts of the inputs of tensors of layers, and with `output`
    of the output tensor, in files of `folder`."""

    def __init__(self, folder: Path, output: bool = False) -> None:
        self.folder, self.output = folder, output
        self._now: dict[tuple[str, ...], _Summed] = {}

    def see(self, given: Input) -> None:
        if not self.output and not given.names[0].startswith("blk."):
            return
        x = given.x.flatten(1).float()
        found = self._now.get(given.names)
        n_mats = given.n_mats if given.mat != ALL else 1
        if found is None:
            zeros = torch.zeros((n_mats, x.shape[1]), dtype=torch.float64, device=x.device)
            found = _Summed(given.names, zeros, torch.zeros_like(zeros), np.zeros(n_mats))
            self._now[given.names] = found
        mat = max(given.mat, 0)
        found.in_sum2[mat] += torch.linalg.vecdot(x, x, dim=0).double()
        found.in_sum[mat] += x.sum(0).double()
        found.counts[mat] += len(x)

    def end_of_layer(self, number: int) -> None:
        save_arrays(self.folder / f"sums-{number:05d}.safetensors", self._taken())

    def end(self) -> None:
        """Keep what came after the last layer."""
        save_arrays(self.folder / "sums-output.safetensors", self._taken())

    def _taken(self) -> dict[str, tuple[tuple[str, ...], dict[str, npt.NDArray[Any]]]]:
        out = {
            str(i): (
                s.names,
                {"in_sum2": s.in_sum2.cpu().numpy(), "in_sum": s.in_sum.cpu().numpy(), "counts": s.counts},
            )
            for i, s in enumerate(self._now.values())
        }
        self._now.clear()
        return out

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {}  # all of it is in the files of finished layers

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        pass


class Observers:
    """Several observers of one model."""

    def __init__(self, *each: Any) -> None:
        self._each = each

    def see(self, given: Input) -> None:
        for one in self._each:
            one.see(given)

    def end_of_layer(self, number: int) -> None:
        for one in self._each:
            one.end_of_layer(number)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        pass


def save_arrays(path: Path, inputs: Mapping[str, tuple[tuple[str, ...], Mapping[str, npt.NDArray[Any]]]]) -> None:
    """Write arrays of inputs by number, each with the names of its tensors. Raises OutputError."""
    arrays = {f"{i}.{kind}": values for i, (_, each) in inputs.items() for kind, values in each.items()}
    about = {"inputs": json.dumps({i: list(names) for i, (names, _) in inputs.items()})}
    coming = path.with_suffix(".next")
    try:
        save_file(arrays, coming, about)
        with coming.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(coming, path)
    except (OSError, SafetensorError) as e:
        nbytes = sum(a.nbytes for a in arrays.values())
        raise OutputError(
            f"{path}: {nbytes:,} bytes of sums cannot be written: {getattr(e, 'strerror', None) or e}; free some "
            "space, and run the same command again: it continues with this layer"
        ) from None


class Saved:
    """The files of sums of one or more rounds of a run, added up."""

    def __init__(self, folders: Sequence[Path], which: str = "sums-*.safetensors") -> None:
        self._where: dict[str, list[tuple[Path, str]]] = {}
        self._shapes: dict[str, Shape] = {}
        for folder in folders:
            for path in sorted(folder.glob(which)):
                self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "np") as f:
                inputs: dict[str, list[str]] = json.loads((f.metadata() or {})["inputs"])
                for i, names in inputs.items():
                    n_mats, n_cols = f.get_slice(f"{i}.in_sum2").get_shape()
                    for name in names:
                        self._where.setdefault(name, []).append((path, i))
                        self._shapes[name] = Shape(name, n_mats, n_cols, True)
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise ResumeError(f"{path}: cannot be read: {e}; remove {path.parent} and start again") from None

    @property
    def shapes(self) -> list[Shape]:
        return [self._shapes[name] for name in sorted(self._shapes)]

    def entries(self) -> Iterator[Sums]:
        """Every tensor's sums, by name."""
        for name in sorted(self._where):
            yield self.entry(name)

    def entry(self, name: str) -> Sums:
        """One tensor's sums, over all rounds."""
        arrays = [self._arrays(path, i) for path, i in self._where[name]]
        in_sum2, in_sum, counts = (np.sum([a[k] for a in arrays], 0) for k in ("in_sum2", "in_sum", "counts"))
        return Sums(name, in_sum2, counts, in_sum)

    def counts(self) -> Iterable[tuple[str, F64]]:
        """Tokens seen by each matrix of every tensor."""
        for name, where in sorted(self._where.items()):
            yield name, np.sum([self._arrays(path, i, ("counts",))["counts"] for path, i in where], 0)

    def _arrays(
        self, path: Path, i: str, kinds: Sequence[str] = ("in_sum2", "in_sum", "counts")
    ) -> dict[str, npt.NDArray[Any]]:
        with safe_open(path, "np") as f:
            return {kind: f.get_tensor(f"{i}.{kind}") for kind in kinds}

"""Second moments in which each token counts by how much the model's predictions depend on it: mean |g|^2 x x^T, with x
the input of a matrix and g the gradient at its output (quantkit.forward.gradients). The mean of g g^T is the Fisher
information; here the outputs of a matrix share what they are on average.

token_embd, whose rows are given out and not multiplied, has mean g g^T, g the gradient at what it gives; where it is
the output too, both, each as it counts for a row.

The pass leaves the hidden states after each layer in a file. From these the layers are computed backwards, one by one;
the gradient is kept after each, so that a stopped run goes on there. Where not all second moments of a layer's experts
fit, its experts share those of gate and of up (fisher_work.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...base.errors import KernelError, OutputError
from ...base.memory import memory_sizes
from ...base.outputs import write_text
from ...base.text import size
from ...forward.gradients import Backward
from ...forward.layer import ALL, Key
from ...forward.model import Model
from ...forward.stream import Progress
from ...model.catalogue import Catalogue
from ...rounding.covariance import FISHER, pack, unpack
from .fisher_work import chunks_at_once, fisher_bytes, hidden_bytes, memory_bytes, n_moments, weighted

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

_HIDDEN, _HEAD, _EMBEDDED = "hidden.npy", "head", "embedding"
_EMBEDDING = "token_embd.weight"
#: a file that says what experts have, for a run that goes on
_CHOICE, _OWN, _SHARED = "fisher-experts", "own", "shared"


class Experts(NamedTuple):
    """How a layer's routed experts are computed."""

    own_inputs: bool
    """each gate and each up has its own second moment; else the layer has one for gate and one for up"""
    keep: bool
    """the weights of all are in memory at once; else they are read again for each batch of tokens"""


def choose(catalogue: Catalogue, n_tokens: int, n_ctx: int, folder: Path, identity: str) -> Experts:
    """What fits: second moments of their own and all weights, shared ones and all weights, shared ones. An unfinished
    run of that identity in `folder` keeps its second moments as they are; what another one left is removed. Raises
    KernelError where no way fits the memory, OutputError where hidden states and second moments do not fit the disk."""
    there, choice = memory_sizes()["available_nbytes"], folder / _CHOICE
    said, _, begun = choice.read_text().partition("\n") if choice.exists() else ("", "", "")
    ways = [Experts(True, True), Experts(False, True), Experts(False, False)]
    if said == identity:
        ways = [Experts(begun == _OWN, True), Experts(begun == _OWN, False)]
    elif not any(folder.glob("round-*/state")):  # a pass that is not done says itself whose it is
        for pattern in (f"round-*/{_HIDDEN}", "round-*/gradient-*.npy", "round-*/fisher-*.json"):
            for stale in folder.glob(pattern):
                stale.unlink()
    here = sum(file.stat().st_blocks * 512 for file in folder.glob("round-*/*.npy"))
    free = shutil.disk_usage(folder).free
    for way in ways:
        on_disk = max(0, hidden_bytes(catalogue, n_tokens) + fisher_bytes(catalogue, way.own_inputs) - here)
        need = memory_bytes(catalogue, n_tokens, n_ctx, *way)
        if on_disk <= free and (there is None or need <= there):
            write_text(choice, f"{identity}\n{_OWN if way.own_inputs else _SHARED}", replace=True)
            return way
    if on_disk > free:
        raise OutputError(
            f"{folder}: --fisher needs {on_disk:,} bytes for hidden states and second moments, but {free:,} are free; "
            f"free {on_disk - free:,} more, or give fewer --chunks"
        )
    raise KernelError(
        f"{catalogue.model}: --fisher needs about {size(need)} of memory for the weights and second moments of the "
        f"largest layer and the gradient of all tokens; {size(there or 0)} are free: leave --fisher out, or give fewer "
        "tokens"
    )


class HiddenFile:
    """Hidden states after each layer, float32 [n_layers, n_chunks, n_ctx, n_embd], in a file. Raises OutputError."""

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]) -> None:
        path = folder / _HIDDEN
        try:
            if path.exists():
                self.values = np.load(path, mmap_mode="r+")
            else:
                self.values = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        except (OSError, ValueError) as e:
            raise OutputError(f"{path}: cannot be written: {e}") from None

    def keep(self, n_layers: int, _: int, hidden: torch.Tensor) -> None:
        """An `on_hidden` of the pass."""
        self.values[n_layers - 1] = hidden.cpu().numpy()
        self.values.flush()


class _Sums:
    """Weighted sums of x x^T by matrix, or by tensor where its experts share one."""

    def __init__(self, shared: Collection[str] = ()) -> None:
        self._shared = shared
        self.sums: dict[Key, torch.Tensor] = {}
        """float64 [n_cols, n_cols], or [n_mats, n_cols, n_cols] for a whole tensor of several"""
        self.counts: dict[Key, int] = {}

    def see(self, key: Key, x: torch.Tensor, g: torch.Tensor) -> None:
        weights = g.square().mean(-1)
        weighted = x * weights[..., None]
        self.add(key, torch.einsum("nhc,nhd->hcd", weighted, x) if x.ndim == 3 else weighted.T @ x, len(x))

    def add(self, key: Key, each: torch.Tensor, n: int) -> None:
        if key.name in self._shared:
            key = Key(key.name, ALL)
        if key in self.sums:
            self.sums[key] += each
        else:
            self.sums[key] = each.double()
        self.counts[key] = self.counts.get(key, 0) + n


class _Files(NamedTuple):
    """Where it goes."""

    state: Path
    """of what is unfinished"""
    out: Path
    """of the covariance"""
    own_inputs: bool = True

    def write(self, model: Model, part: str, sums: _Sums, prefix: str = "fisher") -> None:
        """The second moments of a layer, of the output, or of the embedding."""
        about = []
        for name in dict.fromkeys(key.name for key in sums.sums):
            tensor = model.weights.tensors[name]
            if not tensor.quantizable:
                continue
            n, n_mats = tensor.n_cols, n_moments(tensor, self.own_inputs)
            packed, counts = np.zeros((n_mats, n * (n + 1) // 2), np.float32), [0.0] * n_mats
            for key in (k for k in sums.sums if k.name == name):
                full = sums.sums[key].float().numpy()
                for mat, one in enumerate(full if full.ndim == 3 else full[None], max(0, key.mat)):
                    pack(one, packed[mat])
                    counts[mat] = float(sums.counts[key])
            file = f"{prefix}-{name}.npy"
            self._save(self.out / file, packed)
            about.append({"file": file, "tensors": [name], "n_cols": n, "counts": counts, "weights": FISHER})
        write_text(self.state / f"fisher-{part}.json", json.dumps(about), replace=True)

    def keep(self, number: int, gradient: F32) -> None:
        """The gradient at the inputs of a layer, which then is done."""
        self._save(self.state / f"gradient-{number:05d}.npy", gradient)
        for old in self.state.glob("gradient-*.npy"):
            if old.name != f"gradient-{number:05d}.npy":
                old.unlink()

    def kept(self) -> tuple[int, F32] | None:
        """The last layer that is done, and the gradient at its inputs."""
        for path in sorted(self.state.glob("gradient-*.npy")):
            with suppress(OSError, ValueError):
                return int(path.stem.split("-")[1]), np.load(path)
        return None

    def _save(self, path: Path, values: F32) -> None:
        coming = path.with_name(f"{path.name}.next")
        try:
            with coming.open("wb") as f:
                np.save(f, values)
            os.replace(coming, path)
        except OSError as e:
            raise OutputError(
                f"{path}: {values.nbytes:,} bytes cannot be written: {e.strerror or e}; free some space, and run the "
                "same command again: it continues with this layer"
            ) from None


def make_fisher(model: Model, tokens: I32, state: Path, out: Path, experts: Experts, progress: Progress) -> None:
    """Write second moments of all matrices that are multiplied, of the embedding and of the output to `out`, in place
    of the plain ones that are there. `state` has the hidden states of the pass. Goes on where it was stopped. Raises
    SourceError, WeightError, OutputError."""
    files, n_layers = _Files(state, out, experts.own_inputs), model.family.n_layers
    shared = {t.name for t in weighted(model.catalogue) if n_moments(t, experts.own_inputs) < prod(t.shape[2:])}
    hidden = np.load(state / _HIDDEN, mmap_mode="r")
    kept = files.kept()
    if kept is None:
        kept = n_layers, _head(model, hidden[-1], files)
        files.keep(*kept)
    first, gradient = kept
    for number in range(first - 1, -1, -1):
        n_done = (n_layers - 1 - number) * tokens.size
        progress(f"backwards, layer {number + 1} of {n_layers}", n_done, n_layers * tokens.size)
        sums = _Sums(shared)
        back = Backward(model, sums.see, experts.keep)
        for some in _batches(tokens):
            given = hidden[number - 1, some].copy() if number else _embedded(model, tokens[some])
            after = torch.from_numpy(gradient[some])
            gradient[some] = back.layer(number, torch.from_numpy(given), after).numpy()
        files.write(model, f"{number:05d}", sums)
        files.keep(number, gradient)
    _embedding(model, gradient, files)
    _merge(state, out)
    progress(f"backwards, layer 1 of {n_layers}", n_layers * tokens.size, n_layers * tokens.size)


def _batches(tokens: I32) -> Iterator[slice]:
    n = chunks_at_once(tokens.shape[1])
    for at in range(0, len(tokens), n):
        yield slice(at, at + n)


def _embedded(model: Model, tokens: I32) -> F32:
    used, at = np.unique(tokens, return_inverse=True)
    return model.weights.rows(_EMBEDDING, used.astype(np.int64))[at.reshape(tokens.shape)]


def _head(model: Model, hidden: F32, files: _Files) -> F32:
    """The gradient at what comes out of the last layer."""
    sums, gradient = _Sums(), np.empty(hidden.shape, np.float32)
    back = Backward(model, sums.see)
    for chunk, given in enumerate(hidden):
        gradient[chunk] = back.head(torch.from_numpy(given.copy()), chunk).numpy()
    files.write(model, _HEAD, sums, _HEAD)
    return gradient


def _embedding(model: Model, gradient: F32, files: _Files) -> None:
    """Of token_embd: what its rows need that are given out, and where it is the output, what that needs."""
    tensor, sums, key = model.weights.tensors[_EMBEDDING], _Sums(), Key(_EMBEDDING, ALL)
    for g in map(torch.from_numpy, gradient):
        sums.add(key, g.T @ g / tensor.n_rows, len(g))
    if model.family.output == _EMBEDDING:
        packed = np.load(files.out / f"{_HEAD}-{_EMBEDDING}.npy")
        sums.add(key, torch.from_numpy(unpack(packed[0], tensor.n_cols)), 0)
    files.write(model, _EMBEDDED, sums)


def _merge(state: Path, out: Path) -> None:
    """Let the JSON of the layers name these files, and remove those that nothing names any more."""
    found = {path.stem.split("-", 1)[1]: json.loads(path.read_text()) for path in state.glob("fisher-*.json")}
    ends = {name: one for part in (_HEAD, _EMBEDDED) for one in found.pop(part) for name in one["tensors"]}
    for part, ours in {**found, "ends": list(ends.values())}.items():
        path = out / f"layer-{part}.json"
        theirs = json.loads(path.read_text()) if path.exists() else []
        names = {name for one in ours for name in one["tensors"]}
        for one in theirs:
            one["tensors"] = [name for name in one["tensors"] if name not in names]
        write_text(path, json.dumps([one for one in theirs if one["tensors"]] + ours), replace=True)
    named = {one["file"] for path in out.glob("layer-*.json") for one in json.loads(path.read_text())}
    for path in out.glob("*.npy"):
        if path.name not in named:
            path.unlink()

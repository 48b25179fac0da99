"""Second moments X^T X of the inputs of matrices, which rounding better than ggml's needs.

One matrix for each distinct input of a layer: routed and shared experts' gate and up, and the router, share theirs, so
do q_a and kv_a. `ffn_down_exps` has one an expert where there is room, else one for all. Of attn_k_b and attn_v_b each
head has its own. The files are described where they are read, in quantkit.rounding.covariance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...base.errors import OutputError
from ...base.files import reserve
from ...base.outputs import write_text
from ...forward.layer import ALL, Input
from ...model.catalogue import Catalogue, layer_of
from ...rounding.covariance import pack
from .inputs import Planned, planned

F32 = npt.NDArray[np.float32]


class Covariance:
    """An observer of the pass that writes these files. One full matrix is in memory for each dense input of the layer
    that is computed, and of experts one at a time."""

    def __init__(
        self, catalogue: Catalogue, folder: Path, own_experts: bool = True, names: Collection[str] | None = None
    ) -> None:
        """`names`: only inputs of these tensors, and of layers that have some; all where it is None."""
        self.folder, self._only_some = folder, names is not None
        inputs = [p for p in planned(catalogue, own_experts) if names is None or any(n in names for n in p.names)]
        self._plan = {name: p for p in inputs for name in p.names}
        self._counts: dict[Planned, npt.NDArray[np.float64]] = {}
        self._full: dict[Planned, torch.Tensor] = {}
        self._packed: dict[Planned, F32] = {}
        self._at: dict[Planned, int] = {}
        """the expert whose matrix is in memory"""
        self._first: dict[Planned, str] = {}
        """the tensor at which an input was met first in this layer"""

    def see(self, given: Input) -> None:
        plan = self._plan.get(given.names[0])
        if plan is None or self._first.setdefault(plan, given.names[0]) != given.names[0]:
            return  # not asked for, or the same input met again
        x = given.x.float()
        if plan not in self._counts:
            self._counts[plan] = np.zeros(plan.n_mats)
            self._packed[plan] = self._file(plan)
        counts = self._counts[plan]
        if x.ndim == 3:  # [n, heads, cols]
            if plan not in self._full:
                self._full[plan] = torch.zeros((plan.n_mats, plan.n_cols, plan.n_cols), device=x.device)
            self._full[plan] += torch.einsum("nhc,nhd->hcd", x, x)
            counts += len(x)
            return
        mat = given.mat if plan.n_mats > 1 and given.mat != ALL else 0
        if self._at.get(plan) != mat:
            self._pack(plan)
            self._at[plan] = mat
            self._full[plan] = torch.zeros((1, plan.n_cols, plan.n_cols), device=x.device)
        full = self._full[plan][0]
        torch.addmm(full, x.T, x, out=full)
        counts[mat] += len(x)

    def _file(self, plan: Planned) -> F32:
        shape = (plan.n_mats, plan.n_cols * (plan.n_cols + 1) // 2)
        path = self._path(plan)
        try:
            out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            with path.open("r+b") as f:  # all of it now: a full disk must not end the process later
                reserve(f.fileno(), os.fstat(f.fileno()).st_size)
            return out
        except OSError as e:
            raise OutputError(
                f"{path}: {plan.nbytes:,} bytes of covariance cannot be written: {e.strerror or e}; free some space, "
                "and run the same command again: it continues with this layer"
            ) from None

    def _path(self, plan: Planned) -> Path:
        layer = layer_of(plan.names[0]) or 0
        return self.folder / f"layer-{layer:05d}-{plan.names[0].split('.')[2]}.npy"

    def _pack(self, plan: Planned) -> None:
        full = self._full.pop(plan, None)
        if full is not None:
            first = self._at.get(plan, 0)
            for mat, one in enumerate(full.cpu()):
                pack(one.numpy(), self._packed[plan][first + mat])

    def end_of_layer(self, number: int) -> None:
        if self._only_some and not self._counts:
            return
        for plan in list(self._counts):
            self._pack(plan)
        about = [
            {"file": self._path(p).name, "tensors": p.names, "n_cols": p.n_cols, "counts": counts.tolist()}
            for p, counts in self._counts.items()
        ]
        for packed in self._packed.values():
            if isinstance(packed, np.memmap):
                packed.flush()
        write_text(self.folder / f"layer-{number:05d}.json", json.dumps(about), replace=True)
        for each in (self._counts, self._packed, self._at, self._first):
            each.clear()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {}  # all of it is in the files of finished layers

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        pass

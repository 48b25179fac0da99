"""The logits: the output matrix of a model, kept as small as it can be without a change of its values."""

from __future__ import annotations

import numpy as np
import torch

from .layer import Tensor
from .model import Model

#: values of the output matrix that are float32 at a time
_SLICE_VALUES = 1 << 25


class Head:
    """The output matrix in memory, and products with it. R1's is 3.7 GB as float32, half of that as it is stored."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        name = model.family.output
        tensor, change = model.weights.tensors[name], model.change
        changed = change is not None and change.key(name) is not None
        exact = tensor.source_type == "BF16" and not changed
        self._dtype = dtype
        self._step = max(1, _SLICE_VALUES // tensor.n_cols)
        self._matrix = torch.empty(
            (tensor.n_rows, tensor.n_cols), dtype=torch.bfloat16 if exact else dtype, device=device
        )
        for at in range(0, tensor.n_rows, self._step):
            n_rows = min(self._step, tensor.n_rows - at)
            source = model.weights
            rows = model.made(name, at, n_rows) if changed else source.rows(name, np.arange(at, at + n_rows))
            self._matrix[at : at + len(rows)] = torch.from_numpy(rows).to(device)

    def logits(self, x: Tensor) -> Tensor:
        """float32 [n, n_vocab] of x float32 [n, n_embd]."""
        x = x.to(self._dtype)
        slices = torch.split(self._matrix, self._step)
        return torch.cat([torch.nn.functional.linear(x, part.to(self._dtype)).float() for part in slices], -1)

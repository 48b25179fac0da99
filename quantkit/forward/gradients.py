"""Gradients at the outputs of a model's matrices, layer by layer from the last to the first.

What they are gradients of: the log probability of a token that is drawn, at each position, from the model's own
prediction. The mean of their outer products is the Fisher information. A layer is computed again from its inputs, which
the pass has shown (`on_hidden`), and then backwards. In memory are the float32 weights of one layer, or of its routed
experts only one where all do not fit, and what the backward pass keeps of a few chunks. An expert that is not kept is
read again for each batch of chunks, once for each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .layer import ALL, Key, State, Tensor
from .model import Model
from .ops import linear, rms_norm

Seen = Callable[[Key, Tensor, Tensor], None]
"""Called with a matrix, its inputs [n, n_cols], or [n, n_mats, n_cols] where each matrix of a dense tensor has its own,
and the gradients at its outputs, [n, n_out] or [n, n_mats, n_out]."""


class Backward:
    """The parts of a model, each forth and back. Float32, on the CPU. Keeps the weights of the part that was asked for
    last, except those of routed experts where `keep_experts` is False. Raises SourceError, WeightError."""

    def __init__(self, model: Model, see: Seen, keep_experts: bool = True) -> None:
        self.model, self._see, self._keep_experts = model, see, keep_experts
        self._part: object = None
        self._matrices: dict[Key, Tensor] = {}
        self._keys: dict[int, Key] = {}
        self._passing: list[Tensor] = []
        """an expert's matrices, which are not kept; alive until the next ones are sent, so that no other tensor can lie
        where they do"""

    def layer(self, number: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Of inputs of a layer, float32 [n_chunks, n_ctx, n_embd], and the gradient at its outputs: the gradient at
        its inputs."""
        self._begin(number)
        start = hidden.detach().clone().requires_grad_()
        # layers add to hidden states in place, also where the way back needs what was there
        with torch.enable_grad(), allow_mutation_on_saved_tensors():
            state = State(start.clone(), len(hidden), torch.zeros)
            with self._watched():
                layer = self.model.family.layer(number, state)
                need = next(layer)
                try:
                    while True:
                        need = layer.send(self._sent(need.keys))
                except StopIteration:
                    pass
            torch.autograd.backward(state.hidden, gradient)
        assert start.grad is not None
        return start.grad

    def head(self, hidden: Tensor, seed: int) -> Tensor:
        """Of what comes out of the last layer for a chunk, float32 [n_ctx, n_embd]: the gradient there. `seed` decides
        which tokens are drawn."""
        self._begin("head")
        family = self.model.family
        norm, output = self._sent((Key("output_norm.weight", ALL), Key(family.output, ALL)))
        start = hidden.detach().clone().requires_grad_()
        with torch.enable_grad():
            with self._watched():
                logp = torch.log_softmax(linear(rms_norm(start, norm[0], family.eps), output), -1)
            drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
            torch.autograd.backward(logp.gather(1, drawn).sum())
        assert start.grad is not None
        return start.grad

    def _begin(self, part: object) -> None:
        if part != self._part:
            self._matrices.clear()
            self._keys.clear()
            self._passing.clear()
            self._part = part

    def _sent(self, keys: Sequence[Key]) -> list[Tensor]:
        for gone in self._passing:
            self._keys.pop(gone.untyped_storage().data_ptr(), None)
        sent = [self._matrix(key) for key in keys]
        self._passing = [m for key, m in zip(keys, sent, strict=True) if key not in self._matrices]
        for key, matrix in zip(keys, sent, strict=True):
            self._keys[matrix.untyped_storage().data_ptr()] = key
        return sent

    def _matrix(self, key: Key) -> Tensor:
        found = self._matrices.get(key)
        if found is None:
            found = torch.from_numpy(self.model.weights.matrix(key))
            if key.mat == ALL or self._keep_experts:
                self._matrices[key] = found
        return found

    def _watched(self) -> TorchFunctionMode:
        return _Products(self._keys, self._matrix, self._see)


class _Products(TorchFunctionMode):
    """Sees products with known matrices, by where these lie in memory, and waits for their gradients."""

    def __init__(self, keys: dict[int, Key], matrix: Callable[[Key], Tensor], see: Seen) -> None:
        super().__init__()
        self._keys, self._matrix, self._show = keys, matrix, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and (len(args) == 2 or args[2] is None):
            key = self._key(args[1])
            if key is not None:
                return _Product.apply(args[0], args[1], key, self._matrix, self._show)  # type: ignore[no-untyped-call]
        out = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._watch(args[0], args[1], out)
        elif func is torch.einsum:
            self._watch(args[1], args[2], out)
        return out

    def _key(self, weight: Tensor) -> Key | None:
        return self._keys.get(weight.untyped_storage().data_ptr())

    def _watch(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        key, given = self._key(weight), x.detach()
        if key is not None and out.requires_grad:
            out.register_hook(lambda g: self._show(key, given, g))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """x W^T, which keeps x but not W: that is asked for again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, key: Key, matrix: Callable[[Key], Tensor], see: Seen) -> Tensor:
        ctx.save_for_backward(x)
        ctx.key, ctx.matrix, ctx.see = key, matrix, see
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        ctx.see(ctx.key, x, gradient)
        return gradient @ ctx.matrix(ctx.key), None, None, None, None

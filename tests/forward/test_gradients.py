"""Layers computed backwards one by one, against torch's gradients of the whole model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
import torch
from passing import ONE_THREAD, model_of, random_tokens
from test_families import LLAMA, QWEN2, V2, V3, yarn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn import functional

from quantkit.forward.gradients import Backward
from quantkit.forward.layer import ALL, Key, State
from quantkit.forward.model import Model
from quantkit.forward.stream import Pass

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "v2": V2,
    "v3": V3 | {"rope_scaling": yarn(40, 1.0)},
}
N_CHUNKS, N_CTX = 3, 24


def backwards(model: Model, tokens: Any, batch: int, keep: bool = True) -> tuple[torch.Tensor, dict[Key, torch.Tensor]]:
    """The gradient at the embeddings, and sums of g x^T by matrix, by way of `Backward`."""
    hidden: list[torch.Tensor] = []
    Pass([model], tokens, ONE_THREAD, on_hidden=lambda _n, _m, h: hidden.append(h.clone())).run()
    found: dict[Key, torch.Tensor] = {}

    def see(key: Key, x: torch.Tensor, g: torch.Tensor) -> None:
        each = torch.einsum("nhr,nhc->hrc", g, x) if x.ndim == 3 else g.T @ x
        found[key] = found[key] + each if key in found else each

    back = Backward(model, see, keep)
    gradient = torch.stack([back.head(h, seed) for seed, h in enumerate(hidden[-1])])
    embedding = torch.from_numpy(model.weights.matrix(Key("token_embd.weight", ALL)))
    before = [embedding[torch.from_numpy(tokens)], *hidden]
    for number in range(model.family.n_layers - 1, -1, -1):
        parts = range(0, len(tokens), batch)
        gradient = torch.cat(
            [back.layer(number, before[number][i : i + batch], gradient[i : i + batch]) for i in parts]
        )
    return gradient, found


def at_once(model: Model, tokens: Any) -> tuple[torch.Tensor, dict[Key, torch.Tensor]]:
    """The gradient at the embeddings, and of every matrix, of one graph of the whole model."""
    family, leaves = model.family, dict[Key, torch.Tensor]()

    def leaf(key: Key) -> torch.Tensor:
        if key not in leaves:
            leaves[key] = torch.from_numpy(model.weights.matrix(key)).requires_grad_(key.name != "rope_freqs.weight")
        return leaves[key]

    start = leaf(Key("token_embd.weight", ALL)).detach()[torch.from_numpy(tokens)].requires_grad_()
    with allow_mutation_on_saved_tensors():
        state = State(start.clone(), len(tokens), torch.zeros)
        for number in range(family.n_layers):
            layer = family.layer(number, state)
            need = next(layer)
            try:
                while True:
                    need = layer.send([leaf(key) for key in need.keys])
            except StopIteration:
                pass
        norm = torch.from_numpy(model.weights.matrix(Key("output_norm.weight", ALL))[0])
        x = functional.rms_norm(state.hidden, (family.n_embd,), norm, family.eps)
        logp = torch.log_softmax(x @ leaf(Key(family.output, ALL)).T, -1)
        generators = [torch.Generator().manual_seed(chunk) for chunk in range(len(tokens))]
        drawn = torch.stack(
            [torch.multinomial(p.detach().exp(), 1, generator=g) for p, g in zip(logp, generators, strict=True)]
        )
        logp.gather(-1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    assert start.grad is not None
    return start.grad, {key: one.grad for key, one in leaves.items() if one.grad is not None}


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_torchs(name: str, batch: int, tmp_path: Path) -> None:
    config = MODELS[name]
    make = factory.checkpoint if config["model_type"].startswith("deepseek") else factory.dense_checkpoint
    model = model_of(make(tmp_path / name, config))
    tokens = random_tokens(model.family.n_vocab, N_CHUNKS, N_CTX).astype(np.int64)
    gradient, products = backwards(model, tokens, batch)
    wanted, weights = at_once(model, tokens)
    assert off(gradient, wanted) < 1e-3
    matrices = {key for key in weights if "_norm" not in key.name and not key.name.endswith(".bias")}
    assert matrices == products.keys()
    assert len(matrices) > 10
    for key in matrices:
        assert off(products[key].reshape(weights[key].shape), weights[key]) < 1e-3, key


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_experts_that_are_not_kept(name: str, tmp_path: Path) -> None:
    """They are read for each batch, in each direction, and give the same bits."""
    model = model_of(factory.checkpoint(tmp_path / name, MODELS[name]))
    tokens = random_tokens(model.family.n_vocab, N_CHUNKS, N_CTX).astype(np.int64)
    gradient, products = backwards(model, tokens, 2)
    read = model.weights.bytes_read
    again, others = backwards(model, tokens, 2, keep=False)
    assert torch.equal(gradient, again)
    assert products.keys() == others.keys()
    assert all(torch.equal(products[key], others[key]) for key in products)
    assert model.weights.bytes_read - read > 1.5 * read


def test_the_seed_decides_what_is_drawn(tiny_v3: Path) -> None:
    model = model_of(tiny_v3)
    back = Backward(model, lambda *_: None)
    hidden = torch.from_numpy(np.random.default_rng(1).standard_normal((8, model.family.n_embd)).astype(np.float32))
    assert torch.equal(back.head(hidden, 3), back.head(hidden, 3))
    assert not torch.equal(back.head(hidden, 3), back.head(hidden, 4))

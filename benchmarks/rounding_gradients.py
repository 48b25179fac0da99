"""An experiment: second moments in which each token counts by how much the model's predictions depend on it.

    python benchmarks/rounding_gradients.py judge/fp8 --pre deepseek-v3 -c 256 --text calib.txt --chunks 120 \
        --covariance moments/ -o weighted/
    python benchmarks/rounding.py judge/fp8 --covariance weighted/ …

Rounding makes e H e^T small, H = mean x x^T of a matrix's inputs: every token counts alike. Here

    H = mean |g|^2 x x^T

with g the gradient of the log probability of a token drawn from the model's own prediction (so that mean g g^T is the
Fisher matrix), at the matrix's output. Experts' gate and up have one each, of the tokens that they see. token_embd gets
H = mean g g^T of its rows. All by backpropagation through the whole model in memory, so for small ones of deepseek2.
What this does not reach (attn_k_b, attn_v_b) stays as --covariance has it. The new folder is what build, eval and tune
take as --covariance.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import quantkit as qk
from quantkit import text
from quantkit.forward.families import deepseek2
from quantkit.forward.layer import ALL, Key, State
from quantkit.forward.model import Model
from quantkit.forward.ops import rms_norm
from quantkit.lab.evaluation.parts import part
from quantkit.rounding.covariance import pack

Tensor = torch.Tensor
#: chunks that go through the model at a time
_BATCH = 4


class Moments:
    """Weighted sums of x x^T by matrix, filled while gradients flow back through `linear`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._matrices: dict[Key, Tensor] = {}
        self._keys: dict[int, Key] = {}
        self.sums: dict[Key, Tensor] = {}
        self.counts: dict[Key, int] = defaultdict(int)

    def matrix(self, key: Key) -> Tensor:
        if key not in self._matrices:
            self._matrices[key] = torch.from_numpy(self._model.weights.matrix(key))
            self._keys[id(self._matrices[key])] = key
        return self._matrices[key]

    def add(self, key: Key, x: Tensor, weights: Tensor | None = None) -> None:
        """Rows x [n, n_cols], each as often as `weights` [n] says."""
        each = ((x if weights is None else x * weights[:, None]).T @ x).double()
        self.sums[key] = self.sums[key] + each if key in self.sums else each
        self.counts[key] += len(x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """In place of quantkit.forward.ops.linear."""
        out = torch.nn.functional.linear(x, weight, bias)
        key, given = self._keys.get(id(weight)), x.detach()
        if key is not None and out.requires_grad:
            out.register_hook(lambda g: self.add(key, given, g.square().mean(-1)))  # type: ignore[no-untyped-call]
        return out


def through(model: Model, moments: Moments, tokens: np.ndarray) -> None:
    """Some chunks forth and back."""
    family = model.family
    embedding = moments.matrix(Key("token_embd.weight", ALL))
    start = embedding[torch.from_numpy(tokens.astype(np.int64))].requires_grad_()
    state = State(start.clone(), len(tokens), torch.zeros)
    for number in range(family.n_layers):
        layer = family.layer(number, state)
        need = next(layer)
        while True:
            try:
                need = layer.send([moments.matrix(key) for key in need.keys])
            except StopIteration:
                break
    norm = torch.from_numpy(model.weights.matrix(Key("output_norm.weight", ALL))[0])
    x = rms_norm(state.hidden.reshape(-1, family.n_embd).clone(), norm, family.eps)
    output = torch.from_numpy(model.weights.matrix(Key(family.output, ALL)))
    logp = torch.log_softmax(x @ output.T, -1)
    drawn = torch.multinomial(logp.detach().exp(), 1)
    logp.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    assert start.grad is not None
    moments.add(Key("token_embd.weight", ALL), start.grad.reshape(-1, family.n_embd))


def write(model: Model, moments: Moments, folder: Path) -> None:
    """A file for each tensor, and one that says what they are, which is read last."""
    about = []
    for name in dict.fromkeys(key.name for key in moments.sums):
        tensor = model.weights.tensors[name]
        n_mats = tensor.n_rows // tensor.shape[1] if len(tensor.shape) > 2 else 1
        n, counts = tensor.n_cols, [0.0] * n_mats
        packed = np.zeros((n_mats, n * (n + 1) // 2), np.float32)
        for key, full in moments.sums.items():
            if key.name == name:
                at = max(0, key.mat)
                pack(full.float().numpy(), packed[at])
                counts[at] = float(moments.counts[key])
        np.save(folder / f"weighted-{name}.npy", packed)
        about.append({"file": f"weighted-{name}.npy", "tensors": [name], "n_cols": n, "counts": counts})
    (folder / "layer-99999.json").write_text(json.dumps(about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pre", default=None)
    parser.add_argument("-c", "--ctx", type=int, default=256)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--embedding-only", action="store_true", help="all else stays as --covariance has it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    catalogue = qk.open_model(args.model, **({"pre": args.pre} if args.pre else {}))
    model = Model(catalogue)
    chunks = part(text.chunks(catalogue, [args.text], args.ctx), 1, 1, args.chunks)
    moments = Moments(model)
    # a layer adds to hidden states in place, so what is kept for the way back must be a copy
    deepseek2.rms_norm = lambda x, weight, eps: rms_norm(x.clone(), weight, eps)  # type: ignore[attr-defined]
    if not args.embedding_only:
        deepseek2.linear = moments.linear  # type: ignore[attr-defined]
    torch.manual_seed(0)
    start = time.process_time()
    for at in range(0, len(chunks.tokens), _BATCH):
        through(model, moments, chunks.tokens[at : at + _BATCH])
    shutil.copytree(args.covariance, args.output)
    write(model, moments, args.output)
    n = chunks.tokens.size
    print(f"{catalogue.model}: {n:,} tokens, {len(moments.sums):,} matrices, {time.process_time() - start:.0f} s")


if __name__ == "__main__":
    main()

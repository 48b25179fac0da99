"""What second moments weighted by gradients take: memory, disk, operations. No torch: a config is enough to count."""

from __future__ import annotations

from math import prod

from ...forward.hparams import Hparams
from ...model.catalogue import Catalogue, Tensor
from .inputs import is_matrix

#: of activations and their gradients, to the hidden states and inner values of the tokens that are computed at a time
_ACTIVATIONS = 1 << 30


def weighted(catalogue: Catalogue) -> list[Tensor]:
    """The tensors that get a second moment a matrix."""
    ends = ("token_embd.weight", "output.weight")
    return [t for t in catalogue.tensors if t.quantizable and is_matrix(t) and (t.layer is not None or t.name in ends)]


def fisher_bytes(catalogue: Catalogue) -> int:
    """Bytes that they take on the disk."""
    return sum(4 * prod(t.shape[2:]) * (t.n_cols * (t.n_cols + 1) // 2) for t in weighted(catalogue))


def hidden_bytes(catalogue: Catalogue, n_tokens: int) -> int:
    """Bytes of the hidden states after each layer, and of two gradients, on the disk."""
    hp = Hparams(catalogue)
    n_layers = len({t.layer for t in catalogue.tensors if t.layer is not None})
    return 4 * n_tokens * hp.int_("embedding_length") * (n_layers + 2)


def memory_bytes(catalogue: Catalogue, n_tokens: int, n_ctx: int) -> int:
    """Bytes of memory at most: a layer's weights as float32, sums of its second moments as float64 and once more as
    they are written; or the output and logits of a chunk; the gradient of all tokens; what a backward pass keeps."""
    by_layer: dict[int | None, int] = {}
    for t in weighted(catalogue):
        sums = 12 * prod(t.shape[2:]) * t.n_cols**2
        logits = 0 if t.layer is not None else 24 * n_ctx * t.n_rows
        by_layer[t.layer] = by_layer.get(t.layer, 0) + 4 * t.n_elements + sums + logits
    gradient = 4 * n_tokens * Hparams(catalogue).int_("embedding_length")
    return max(by_layer.values()) + gradient + _ACTIVATIONS


def fisher_flop(catalogue: Catalogue, n_tokens: int, share: float) -> int:
    """Operations of the sums: 2 n_cols^2 for each input of each matrix; `share` of the tokens meet a routed expert."""
    total = 0.0
    for t in weighted(catalogue):
        n_mats = prod(t.shape[2:])
        inputs = n_tokens * n_mats * (share if "_exps." in t.name else 1)
        total += 2 * t.n_cols**2 * inputs
    return round(total)

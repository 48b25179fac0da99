"""What second moments weighted by gradients take: memory, disk, operations. No torch: a config is enough to count.

Each matrix has its own second moment, since each has gradients of its own. Those of routed experts' gate and up are as
wide as the model, so where all of them do not fit, the experts of a layer share one for gate and one for up.
"""

from __future__ import annotations

from math import ceil, prod

from ...forward.hparams import Hparams
from ...model.catalogue import Catalogue, Tensor
from .inputs import is_matrix

#: tokens that go through a layer at a time, about
TOKENS_AT_ONCE = 2048
#: values that are kept for the way back for each output of a matrix, and for each pair of attention: about
_KEPT_PER_OUTPUT, _KEPT_PER_PAIR = 3, 4
_SHARED = (".ffn_gate_exps.weight", ".ffn_up_exps.weight")


def chunks_at_once(n_ctx: int) -> int:
    """Chunks that go through a layer at a time."""
    return max(1, TOKENS_AT_ONCE // n_ctx)


def n_batches(n_tokens: int, n_ctx: int) -> int:
    """How often a layer is computed for all tokens."""
    return ceil(n_tokens / (chunks_at_once(n_ctx) * n_ctx))


def weighted(catalogue: Catalogue) -> list[Tensor]:
    """The tensors that get second moments."""
    ends = ("token_embd.weight", "output.weight")
    return [t for t in catalogue.tensors if t.quantizable and is_matrix(t) and (t.layer is not None or t.name in ends)]


def n_moments(tensor: Tensor, own_inputs: bool) -> int:
    """How many second moments a tensor has: one a matrix, but one for all experts' gate, and one for all experts' up,
    without `own_inputs`."""
    return 1 if not own_inputs and tensor.name.endswith(_SHARED) else prod(tensor.shape[2:])


def fisher_bytes(catalogue: Catalogue, own_inputs: bool = True) -> int:
    """Bytes that they take on the disk."""
    return sum(4 * n_moments(t, own_inputs) * (t.n_cols * (t.n_cols + 1) // 2) for t in weighted(catalogue))


def hidden_bytes(catalogue: Catalogue, n_tokens: int) -> int:
    """Bytes of the hidden states after each layer, and of two gradients, on the disk."""
    hp = Hparams(catalogue)
    n_layers = len({t.layer for t in catalogue.tensors if t.layer is not None})
    return 4 * n_tokens * hp.int_("embedding_length") * (n_layers + 2)


def memory_bytes(
    catalogue: Catalogue, n_tokens: int, n_ctx: int, own_inputs: bool = True, keep_experts: bool = True
) -> int:
    """Bytes of memory at most: the weights of a layer as float32, without `keep_experts` two of its experts instead of
    all; its second moments as float64, and once more as they are written; or the output and logits of a chunk. Beside
    that the gradient of all tokens, and what a backward pass keeps."""
    hp = Hparams(catalogue)
    n_experts = hp.int_("expert_count", 0, least=0)
    share = hp.int_("expert_used_count", 0, least=0) / n_experts if n_experts else 0.0
    n_tokens_at_once = min(n_tokens, chunks_at_once(n_ctx) * n_ctx)
    by_layer: dict[int | None, float] = {}
    for t in weighted(catalogue):
        is_routed = "_exps." in t.name
        weights = 4 * t.n_elements * (1 if keep_experts or not is_routed else 2 / n_experts)
        sums = 12 * n_moments(t, own_inputs) * t.n_cols**2
        kept = 24.0 * n_ctx if t.layer is None else 4.0 * _KEPT_PER_OUTPUT * n_tokens_at_once
        activations = kept * t.n_rows * (share if is_routed else 1)
        by_layer[t.layer] = by_layer.get(t.layer, 0) + weights + sums + activations
    attention = 4 * _KEPT_PER_PAIR * n_tokens_at_once * n_ctx * hp.int_("attention.head_count")
    gradient = 4 * n_tokens * hp.int_("embedding_length")
    return round(max(by_layer.values())) + attention + gradient


def fisher_flop(catalogue: Catalogue, n_tokens: int, share: float) -> int:
    """Operations of the sums: 2 n_cols^2 for each input of each matrix; `share` of the tokens meet a routed expert."""
    total = 0.0
    for t in weighted(catalogue):
        n_mats = prod(t.shape[2:])
        inputs = n_tokens * n_mats * (share if "_exps." in t.name else 1)
        total += 2 * t.n_cols**2 * inputs
    return round(total)

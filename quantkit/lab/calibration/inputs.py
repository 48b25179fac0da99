"""Which tensors share an input, and what their second moments take. No torch: a config is enough to count."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from ...model.catalogue import Catalogue, Tensor

#: tensors that share an input -> its name
_INPUT_OF = {
    "attn_q_a": "attn_in", "attn_kv_a_mqa": "attn_in", "attn_q": "attn_in", "attn_k": "attn_in", "attn_v": "attn_in",
    "ffn_gate": "ffn_in", "ffn_up": "ffn_in", "ffn_gate_inp": "ffn_in", "ffn_gate_shexp": "ffn_in",
    "ffn_up_shexp": "ffn_in", "ffn_gate_exps": "ffn_in", "ffn_up_exps": "ffn_in",
}  # fmt: skip


class Planned(NamedTuple):
    """The second moments of a layer's input: one matrix, or one a head or expert."""

    names: tuple[str, ...]
    n_mats: int
    n_cols: int
    all_mats: int
    """matrices of the tensors, though they may share one second moment"""

    @property
    def nbytes(self) -> int:
        return 4 * self.n_mats * (self.n_cols * (self.n_cols + 1) // 2)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is multiplied with inputs: no norm, no bias, no factors."""
    return len([n for n in tensor.shape if n > 1]) > 1 and "_norm" not in tensor.name


def planned(catalogue: Catalogue, own_experts: bool = True) -> list[Planned]:
    """What a covariance has, layer after layer; without `own_experts` the experts' ffn_down share one matrix."""
    by_input: dict[tuple[int, str], tuple[list[str], int, int, int]] = {}
    for t in catalogue.tensors:
        if t.layer is None or not is_matrix(t):
            continue
        kind = t.name.split(".", 2)[2]
        key = _INPUT_OF.get(kind.removesuffix(".weight"), kind)
        per_head = kind in ("attn_k_b.weight", "attn_v_b.weight")
        own = kind == "ffn_down_exps.weight" and own_experts
        n_mats = prod(t.shape[2:]) if per_head or own else 1
        by_input.setdefault((t.layer, key), ([], n_mats, t.n_cols, prod(t.shape[2:])))[0].append(t.name)
    return [Planned(tuple(names), *rest) for names, *rest in by_input.values()]


def covariance_bytes(catalogue: Catalogue, own_experts: bool = True) -> int:
    """Bytes that a model's covariance takes on the disk."""
    return sum(p.nbytes for p in planned(catalogue, own_experts))

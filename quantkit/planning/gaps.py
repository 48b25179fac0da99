"""What an importance matrix leaves out of the tensors that a plan gives it to, and how that is said.

The bytes are llama-quantize's all the same: ones for what was never seen, and for what has only zeros whatever ggml's
quantizer makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..gguf.types import LOST_WITHOUT_WEIGHTS, SPOILED_WITHOUT_WEIGHTS

_NAMED_TENSORS, _NAMED_MATRICES = 3, 8


class Gap(NamedTuple):
    """A tensor of which the importance matrix says less than its entry seems to. Numbers of matrices: experts."""

    tensor: str
    type: str
    is_expert: bool
    n_mats: int
    unseen: tuple[int, ...]
    """never counted: quantized with ones, as llama-quantize does"""
    zeros: tuple[int, ...]
    """counted, but all their weights are 0"""
    n_zero_blocks: int
    """in other matrices: blocks of columns whose weights are all 0"""

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "type": self.type,
            "matrices": self.n_mats,
            "never_seen": list(self.unseen),
            "all_zeros": list(self.zeros),
            "zero_blocks": self.n_zero_blocks,
        }


def gap_warnings(gaps: Sequence[Gap]) -> list[str]:
    """What the importance matrix leaves out, in a sentence for each kind."""
    out = []
    unseen = [(g, g.unseen) for g in gaps if g.unseen]
    if unseen:
        out.append(
            f"the importance matrix never saw {_matrices(unseen)}; as in llama-quantize all their weights then count "
            "alike; for better ones make the matrix from more text, or from text of more kinds"
        )
    for types, become in (
        (LOST_WITHOUT_WEIGHTS, "become zeros"),
        (SPOILED_WITHOUT_WEIGHTS, "are mostly lost"),
    ):
        zeros = [(g, g.zeros) for g in gaps if g.zeros and g.type in types]
        if zeros:
            kinds = ", ".join(sorted({g.type for g, _ in zeros}))
            out.append(
                f"the importance matrix has nothing but zeros for {_matrices(zeros)}; as in llama-quantize their "
                f"weights {become} ({kinds}); make the matrix again, or give these tensors a type that does without, "
                "such as Q8_0"
            )
    return out


def gap_notes(gaps: Sequence[Gap]) -> list[str]:
    """Of blocks of columns without weight: right where the model never uses those columns, else worth a look."""
    some = [g for g in gaps if g.n_zero_blocks]
    if not some:
        return []
    n = sum(g.n_zero_blocks for g in some)
    shown = ", ".join(f"{g.tensor} ({g.n_zero_blocks:,})" for g in some[:_NAMED_TENSORS])
    more = ", …" if len(some) > _NAMED_TENSORS else ""
    return [
        f"the importance matrix has nothing but zeros for {n:,} block{'s' * (n > 1)} of columns in {len(some):,} "
        f"tensor{'s' * (len(some) > 1)}: {shown}{more}; their weights become zeros or are mostly lost, which is right "
        "only if the model never uses these columns"
    ]


def _matrices(some: Sequence[tuple[Gap, tuple[int, ...]]]) -> str:
    """'12 experts in 3 tensors: blk.3.ffn_up_exps.weight 4, 7; …', 'blk.0.attn_q.weight' where that is one matrix."""
    n = sum(len(numbers) for _, numbers in some)
    word = "expert" if all(g.is_expert for g, _ in some) else "matrix"
    words = {"expert": "experts", "matrix": "matrices"}[word]
    shown = []
    for g, numbers in some[:_NAMED_TENSORS]:
        named = ", ".join(map(str, numbers[:_NAMED_MATRICES])) + (", …" if len(numbers) > _NAMED_MATRICES else "")
        which = f" {word if len(numbers) == 1 else words} {named}" if g.n_mats > 1 else ""
        shown.append(g.tensor + which)
    listed = "; ".join(shown) + ("; …" if len(some) > _NAMED_TENSORS else "")
    in_all = f"{n:,} {word if n == 1 else words} in {len(some):,} tensor{'s' * (len(some) > 1)}"
    return f"{in_all}: {listed}"

"""What an importance matrix leaves out for the tensors of a plan, what a policy does about it, and how messages say
both.

With the policy `ones` the bytes are llama-quantize's: ones for what was never seen, and for all zeros
whatever ggml's quantizer makes of them. quantkit.imatrix.policies works out the values of the other policies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..base.errors import ImatrixError, KernelError
from ..gguf.types import LOST_BY_32, LOST_WITHOUT_WEIGHTS, QTYPES, SPOILED_WITHOUT_WEIGHTS, QType, fitting_type
from ..imatrix.entries import Gaps
from ..imatrix.matrix import Imatrix
from ..imatrix.policies import ONES, OWN, UNSEEN, WORDS, Completed, Origin, Policy, is_expert, serves_kv_b
from ..model.catalogue import Catalogue, Role, Tensor

_NAMED_TENSORS, _NAMED_MATRICES = 3, 8


class Gap(NamedTuple):
    """A tensor whose importance matrix entry is less complete than it looks. Matrices (experts) are given by number."""

    tensor: str
    type: str
    is_expert: bool
    n_mats: int
    unseen: tuple[int, ...]
    """never counted, and not filled in by a policy: quantized with ones, as llama-quantize does"""
    zeros: tuple[int, ...]
    """counted, but with weights that are all 0"""
    n_zero_blocks: int
    """blocks of columns whose weights are all 0, in other matrices"""

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "type": self.type,
            "matrices": self.n_mats,
            "never_seen": list(self.unseen),
            "all_zeros": list(self.zeros),
            "zero_blocks": self.n_zero_blocks,
        }


def n_matrices(t: Tensor) -> int:
    """Return how many matrices (experts or heads) a tensor stacks."""
    return t.shape[2] if len(t.shape) > 2 else 1


def completed(catalogue: Catalogue, imatrix: Imatrix, policy: Policy) -> Completed:
    """Return the importance matrix as a policy completes it for this model."""
    return Completed(imatrix, policy, {t.name: (t.n_cols, n_matrices(t)) for t in catalogue.tensors})


def raised_type(t: Tensor, given: QType, entries: Completed, version: str) -> QType | None:
    """Return the larger type that the policy `raise:TYPE` gives a tensor with missing data, or None if it does not.
    Raises ImatrixError if rows of the tensor fit no such type."""
    name = entries.policy.value("raise")
    if not name or given.name == t.source_type or not given.uses_imatrix or not entries.origin(t.name).lacks:
        return None
    try:
        least = fitting_type(QTYPES[name], t.n_cols, version)
    except KernelError as e:
        raise ImatrixError(f"the policy {entries.policy.text}: '{t.name}': {e}; raise to another type") from None
    return least if least.bits > given.bits else None


def gap_of(t: Tensor, type_: str, origin: Origin, found: Gaps | None) -> Gap | None:
    """Return what is still missing for a tensor of this type, or None. `found`: the gaps in its own entry."""
    alike = tuple(m for m, source in enumerate(origin.sources) if source in (ONES, UNSEEN))
    zeros: tuple[int, ...] = ()
    n_blocks = 0
    if found is not None and (type_ in LOST_WITHOUT_WEIGHTS or type_ in SPOILED_WITHOUT_WEIGHTS):
        what = found.of(t.n_cols, n_matrices(t), 32 if type_ in LOST_BY_32 else QTYPES[type_].block)
        zeros = tuple(m for m in what.zeros if origin.sources[m] == OWN)
        n_blocks = what.n_zero_blocks
    if not (alike or zeros or n_blocks):
        return None
    return Gap(t.name, type_, t.role == Role.ROUTED_EXPERT, n_matrices(t), alike, zeros, n_blocks)


def never_seen(gaps: Sequence[Gap], policy: Policy) -> str:
    """Return the message that ends a build: what was never seen, and which policies can stand in for it."""
    which = _matrices([(g, g.unseen) for g in gaps])
    after = "" if policy.text == "fail" else f", and {policy.text} gives {'it' if _n(gaps) == 1 else 'them'} nothing"
    choices = ", ".join(f"{word} ({WORDS[word]})" for word in ("sibling", "prior", "shrink:K", "raise:TYPE", "ones"))
    return (
        f"the importance matrix never saw {which}{after}; say with --imatrix-policy what stands in for "
        f"{'it' if _n(gaps) == 1 else 'them'}: {choices}; or make the matrix from more text"
    )


def _n(gaps: Sequence[Gap]) -> int:
    return sum(len(g.unseen) for g in gaps)


def applied(policy: Policy, origins: Mapping[str, Origin], raised: frozenset[str]) -> str:
    """Describe in one line what a policy changed: for how many matrices, in how many tensors, each source gave the
    values. '' if it changed nothing."""
    if not origins and not raised:
        return ""
    n_mats: Counter[str] = Counter()
    n_tensors: Counter[str] = Counter()
    experts: dict[str, bool] = {}
    for name, origin in origins.items():
        for source, n in origin.counts().items():
            if source != OWN:
                n_mats[source] += n
                n_tensors[source] += 1
                experts[source] = experts.get(source, True) and is_expert(name)
    parts = []
    for source, n in sorted(n_mats.items()):
        which = _counted(n, "expert" if experts[source] else "matrix")
        parts.append(f"{source} for {which} in {_counted(n_tensors[source], 'tensor')}")
    if raised:
        parts.append(f"{_counted(len(raised), 'tensor')} raised to {policy.value('raise')}")
    return f"{policy.text}: {', '.join(parts)}"


def _counted(n: int, word: str) -> str:
    words = {"matrix": "matrices"}.get(word, word + "s")
    return f"{n:,} {word if n == 1 else words}"


def about_kv_b(imatrix: object, policy: Policy, lacking: Sequence[str]) -> str:
    """Explain what helps where attn_k_b or attn_v_b has no entry but attn_kv_b, of the older layout, has one."""
    if not isinstance(imatrix, Imatrix):
        return ""
    said = ""
    if not policy.has("kv_b") and any(serves_kv_b(imatrix, name) for name in lacking):
        said += "; it has entries of attn_kv_b, which the policy kv_b takes for attn_v_b"
    if any("attn_k_b" in name and name.replace("attn_k_b", "attn_kv_b") in imatrix for name in lacking):
        said += (
            "; attn_kv_b's entry cannot serve attn_k_b, which multiplies columns of q and none of the latent: give it "
            "a type that does without, or make the matrix from a file of this layout"
        )
    return said


def gap_warnings(gaps: Sequence[Gap]) -> list[str]:
    """Return a sentence for each kind of gap in the importance matrix that loses precision."""
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
                f"weights {become} ({kinds}); make the matrix again, give these tensors a type that does without, such "
                "as Q8_0, or take other values with --imatrix-policy"
            )
    return out


def gap_notes(gaps: Sequence[Gap]) -> list[str]:
    """Return a note on column blocks without weights: fine if the model never uses those columns, else worth a look."""
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
    """'12 experts in 3 tensors: blk.3.ffn_up_exps.weight 4, 7; …', or with one matrix each, just the tensors' names."""
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

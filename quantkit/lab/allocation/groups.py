"""Groups of tensors that are probed together and share a type: a function in the model × a range of layers.

Granularities, from coarse to fine:

- `role`: embedding, output, attention, dense ffn, shared expert, routed expert
- `kind`: gate and up apart from down; in attention the query tensors, the key and value tensors, and the output
- `family`: names without their layer, gate and up together
- `tensor`: every tensor alone
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...base.errors import UnsupportedError
from ...model.catalogue import Catalogue, Role, Tensor, ranges

GRANULARITIES = ("role", "kind", "family", "tensor")
#: for `kind`, applied to a name without `blk.N.` and `.weight`; the first match counts
_KINDS = (
    (re.compile(r"attn_(q|q_a|q_b)$"), "attn_q"),
    (re.compile(r"attn_output"), "attn_output"),
    (re.compile(r"attn_"), "attn_kv"),
    (re.compile(r"ffn_(gate|up)(|_exps|_shexp)$"), r"ffn_gate_up\2"),
)
_LAYER = re.compile(r"^blk\.\d+\.")


@dataclass(frozen=True)
class Group:
    """Tensors that share a type."""

    name: str
    """such as attn_kv[0-2]"""
    role: str
    kind: str
    """the name without its layers"""
    band: int
    """from 0 for the first layers; consecutive within a kind"""
    tensors: tuple[str, ...]
    n_elements: int


def kind_of(tensor: Tensor, by: str) -> str:
    """The name of the kind a tensor belongs to, without its layer."""
    if by == "role":
        return tensor.role.replace(" ", "_")
    stem = _LAYER.sub("", tensor.name).removesuffix(".weight")
    if by == "tensor":
        return tensor.name.removesuffix(".weight")
    for pattern, kind in _KINDS if by == "kind" else _KINDS[-1:]:
        if pattern.match(stem):
            return pattern.sub(kind, stem) if "\\" in kind else kind
    return stem


def groups_of(catalogue: Catalogue, by: str = "kind", n_bands: int = 3) -> tuple[Group, ...]:
    """Group all tensors that quantizing changes and the forward pass uses, in the order of the file.

    Raises UnsupportedError for a model that the forward pass cannot compute."""
    if by not in GRANULARITIES:
        raise UnsupportedError(f"groups by '{by}' are not known; there are {', '.join(GRANULARITIES)}")
    computed = computed_tensors(catalogue)
    by_kind: dict[str, list[Tensor]] = {}
    for t in catalogue.tensors:
        if t.quantizable and t.name in computed:
            by_kind.setdefault(kind_of(t, by), []).append(t)
    return tuple(
        Group(
            f"{kind}[{ranges({t.layer for t in band if t.layer is not None})}]" if _has_bands(members, by) else kind,
            str(band[0].role), kind, i, tuple(t.name for t in band), sum(t.n_elements for t in band),
        )
        for kind, members in by_kind.items()
        for i, band in enumerate(_bands(members, n_bands))
    )  # fmt: skip


def computed_tensors(catalogue: Catalogue) -> frozenset[str]:
    """Names of the tensors that the forward pass uses; layers that predict further tokens are left out."""
    from ...forward.families import family_of  # needs torch, which reading a sensitivity does not

    family = family_of(catalogue)
    names = {key.name for i in range(family.n_layers) for key in family.keys(i)}
    return frozenset(names | {"token_embd.weight", family.output})


def _has_bands(members: Sequence[Tensor], by: str) -> bool:
    return by != "tensor" and members[0].layer is not None


def _bands(members: Sequence[Tensor], n_bands: int) -> list[list[Tensor]]:
    """Split tensors into runs of layers of equal length, as far as the number of layers allows."""
    layers = sorted({t.layer for t in members if t.layer is not None})
    if not layers:
        return [list(members)]
    n = min(n_bands, len(layers))
    band_of = {layer: i * n // len(layers) for i, layer in enumerate(layers)}
    out: list[list[Tensor]] = [[] for _ in range(n)]
    for t in members:
        out[band_of[t.layer or 0]].append(t)
    return out


ROLES_IN_ORDER = tuple(str(r) for r in Role)

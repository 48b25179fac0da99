"""What is probed together: tensors of one kind that recipes give one type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...gguf.types import QTYPES
from ...model.catalogue import Tensor, family_of
from ...planning.plan import ImatrixStatus, Plan
from ...rounding import Method, supported
from ...rounding.covariance import CovarianceSource, standing
from ...rounding.policy import GGML
from ..allocation.groups import computed_tensors, kind_of
from ..allocation.recipe_text import braces

#: methods, the simplest first
METHODS = (GGML, "coarse", "feedback", "feedback+gain")
#: columns that coarse feedback quantizes at a time
_SLAB = 256
_LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class RoundedGroup:
    """Tensors of one kind at one type, and the methods that can round them."""

    kind: str
    """such as ffn_gate_up_exps"""
    type: str
    tensors: tuple[str, ...]
    families: tuple[str, ...]
    """their names without the layer: blk.*.ffn_gate_exps.weight"""
    n_elements: int
    methods: tuple[str, ...]
    """ggml first"""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.type}"

    @property
    def match(self) -> str:
        """A glob that takes tensors of these names in any layer."""
        return braces(self.families)

    @property
    def first(self) -> int:
        """The first layer of which it has a tensor."""
        layers = [int(m[1]) for name in self.tensors if (m := _LAYER.match(name))]
        return min(layers, default=-1)


def rounded_groups(
    plans: Sequence[Plan], source: CovarianceSource, methods: Iterable[str] = METHODS
) -> tuple[RoundedGroup, ...]:
    """The groups that some of these plans of one model make, in the order of the file: of tensors that are quantized,
    computed with, and have second moments that are not too thin. A tensor to which plans give different types is in a
    group of each. Raises SourceError for second moments of another model."""
    wanted = [GGML, *(m for m in METHODS if m != GGML and m in set(methods))]
    catalogue = plans[0].catalogue
    computed = computed_tensors(catalogue)
    by: dict[tuple[str, str], dict[str, Tensor]] = {}
    for tensor in catalogue.tensors:
        if not tensor.quantizable or tensor.name not in computed or tensor.name not in source:
            continue
        thin = standing(tensor, source).thin
        if len(thin) == _n_mats(tensor):
            continue
        for plan in plans:
            planned = plan[tensor.name]
            if QTYPES[planned.type].is_float or planned.imatrix_status is ImatrixStatus.NEEDED:
                continue
            by.setdefault((kind_of(tensor, "kind"), planned.type), {})[tensor.name] = tensor
    out = []
    for (kind, type_), members in by.items():
        some = tuple(m for m in wanted if m == GGML or _differs(m, type_, members))
        if len(some) > 1:
            families = tuple(dict.fromkeys(family_of(name) for name in members))
            n = sum(t.n_elements for t in members.values())
            out.append(RoundedGroup(kind, type_, tuple(members), families, n, some))
    return tuple(out)


def _n_mats(tensor: Tensor) -> int:
    return tensor.n_rows // tensor.shape[1] if len(tensor.shape) > 2 else 1


def _differs(method: str, type_: str, members: Mapping[str, Tensor]) -> bool:
    """Whether a method is one of its own for these tensors: coarse feedback needs rows of two slabs, and feedback a
    kernel of the type."""
    if method == "coarse":
        return supported(type_) is not None and any(t.n_cols > _SLAB for t in members.values())
    return supported(type_) is Method.FEEDBACK

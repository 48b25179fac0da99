"""From a sensitivity and constraints to a knapsack: items, their options, exact bytes.

The KLD of a whole model is predicted as

    Σ α·e  +  (Σ (β·√e)^(1/γ))^γ

over all groups. Smooth errors add up. Flips add like independent errors, in squares, if γ is 1/2, and add up too if γ
is 1. γ is fitted on measurements of whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...base.errors import RecipeError, UnsupportedError, did_you_mean
from ...gguf.header import pad
from ...gguf.types import QTYPES, STORED_TYPES
from ...model.catalogue import ROLES, Catalogue, Role, Tensor
from ...recipe.schema import known_type
from ...recipe.selectors import matcher
from .damage import N_BOOTSTRAP, Sensitivity
from .groups import Group
from .knapsack import Item, Monotone, Option
from .weight_errors import TYPES, Usable

F64 = npt.NDArray[np.float64]
#: least types by role, which rule out what is known to fail: token_embd at the floor, crushed tensors that every token
#: passes through, and floor types in a body that is already tight. Routed experts may have any type.
MINIMUM: Mapping[str, str] = {
    str(Role.EMBEDDING): "Q3_K", str(Role.OUTPUT): "Q3_K", str(Role.ATTENTION): "IQ3_XXS",
    str(Role.DENSE_FFN): "IQ3_XXS", str(Role.SHARED_EXPERT): "IQ3_XXS",
}  # fmt: skip
#: types with fast matrix products by backend. cpu: those without codebooks; cuda: those of ggml_cuda_should_use_mmq
FAST: Mapping[str, frozenset[str]] = {
    "any": frozenset(QTYPES),
    "cpu": frozenset(
        {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}
    ),
    "cuda": frozenset(QTYPES) - {"IQ1_M", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"},
}  # fmt: skip
_KEPT_BITS = 4.0
"""least bits for tensors that the sensitivity does not cover"""


@dataclass(frozen=True)
class Constraints:
    """Limits on a solution."""

    types: tuple[str, ...] = TYPES
    locks: tuple[tuple[str, str], ...] = ()
    """globs over tensor names, each with its type; the first match counts"""
    minimum: Mapping[str, str] = field(default_factory=lambda: dict(MINIMUM))
    """least types by role, compared by bits"""
    monotone: bool = False
    """within a kind, earlier layers get at least the bits of later ones"""
    per_tensor: bool = False
    """tensors of a group may differ, but not gate and up of a layer"""
    backend: str = "any"


@dataclass(frozen=True)
class Choice:
    """Tensors that share a type."""

    group: Group | None
    """None if the sensitivity does not cover these tensors"""
    tensors: tuple[Tensor, ...]
    asked: tuple[str, ...]
    """types to choose from; a single one for locked tensors"""
    given: tuple[tuple[str, ...], ...]
    """for each of `asked`, the type of each tensor: another one where its rows do not divide into blocks"""


@dataclass(frozen=True)
class Problem:
    """All quantizable tensors of a model, and the cost of each choice."""

    catalogue: Catalogue
    known: Sensitivity
    choices: tuple[Choice, ...]
    constraints: Constraints
    notes: tuple[str, ...] = ()
    _kept: dict[object, tuple[F64, F64]] = field(default_factory=dict, repr=False, compare=False)

    def items(self, gamma: float, weights: tuple[float, float], nbytes_of: Callable[[Tensor, str], int]) -> list[Item]:
        """The items of a knapsack, for an exponent, weights of the two sums, and a way to count bytes."""
        out = []
        for c in self.choices:
            options = []
            for asked, given in zip(c.asked, c.given, strict=True):
                nbytes = sum(nbytes_of(t, g) for t, g in zip(c.tensors, given, strict=True))
                smooth, flips = self.parts(c, given, gamma)
                damage = weights[0] * float(smooth[0]) + weights[1] * float(flips[0])
                options.append(Option(asked, nbytes, damage, QTYPES[asked].bits))
            out.append(Item(c.group.name if c.group else c.tensors[0].name, tuple(options)))
        return out

    def parts(self, choice: Choice, given: Sequence[str], gamma: float) -> tuple[F64, F64]:
        """The terms that a choice adds to the two sums, at these types: [1 + N_BOOTSTRAP] each."""
        key = (id(choice), tuple(given), gamma)
        if key in self._kept:
            return self._kept[key]
        smooth, flips = np.zeros(1 + N_BOOTSTRAP), np.zeros(1 + N_BOOTSTRAP)
        if choice.group is not None:
            total = sum(self.known.sizes[name] for name in choice.group.tensors)
            for t, type_ in zip(choice.tensors, given, strict=True):
                a, b = self.known.parts(choice.group.name, self.known.tensor_error(t.name, type_))
                smooth += a * (t.n_elements / total)
                flips += b ** (1 / gamma) * (t.n_elements / total)
        self._kept[key] = smooth, flips
        return smooth, flips

    def sums(self, types: Mapping[str, str], gamma: float) -> tuple[float, float]:
        """Both sums for a whole model whose tensors have these types. Raises SourceError if an error was not
        sampled."""
        both = [self.parts(c, [types[t.name] for t in c.tensors], gamma) for c in self.choices]
        return sum(float(a[0]) for a, _ in both), sum(float(b[0]) for _, b in both)

    def predict(self, types: Mapping[str, str], gamma: float) -> float:
        """KLD of a whole model whose tensors have these types. Raises what `sums` raises."""
        smooth, flips = self.sums(types, gamma)
        return float(smooth + flips**gamma)

    def monotone(self) -> list[Monotone]:
        """Pairs of choices of one kind in consecutive bands."""
        if not self.constraints.monotone:
            return []
        by_kind: dict[tuple[str, int], list[int]] = {}
        for i, c in enumerate(self.choices):
            if c.group is not None and len(c.asked) > 1:
                by_kind.setdefault((c.group.kind, c.group.band), []).append(i)
        return [
            Monotone(a, b)
            for (kind, band), before in by_kind.items()
            for a in before
            for b in by_kind.get((kind, band + 1), ())
        ]

    def types_of(self, chosen: Iterable[int]) -> dict[str, str]:
        """The type of each tensor."""
        out: dict[str, str] = {}
        for c, j in zip(self.choices, chosen, strict=True):
            out.update({t.name: given for t, given in zip(c.tensors, c.given[j], strict=True)})
        return out

    def asked_of(self, chosen: Iterable[int]) -> dict[str, str]:
        """The type asked for each tensor, before any fallback."""
        return {t.name: c.asked[j] for c, j in zip(self.choices, chosen, strict=True) for t in c.tensors}


def padded(tensor: Tensor, type_: str) -> int:
    """Bytes of a tensor in a file, with padding."""
    return pad(plain(tensor, type_))


def plain(tensor: Tensor, type_: str) -> int:
    """Bytes of a tensor without padding."""
    return STORED_TYPES[type_].row_bytes(tensor.n_cols) * tensor.n_rows


def make_problem(catalogue: Catalogue, known: Sensitivity, usable: Usable, constraints: Constraints) -> Problem:
    """Set up the problem. Raises RecipeError for an unknown lock, minimum or type, UnsupportedError if a group is left
    without any type."""
    types = [_type(t, "--types") for t in constraints.types]
    fast = FAST.get(constraints.backend)
    if fast is None:
        raise RecipeError(f"no backend '{constraints.backend}' is known{did_you_mean(constraints.backend, FAST)}")
    types = sorted({t for t in types if t in fast}, key=lambda t: (QTYPES[t].bits, t))
    if not types:
        raise UnsupportedError(f"none of --types {','.join(constraints.types)} is fast on {constraints.backend}")
    for role, least in constraints.minimum.items():
        if role not in [str(r) for r in ROLES]:
            raise RecipeError(f"--minimum {role}={least}: there is no role '{role}'{did_you_mean(role, ROLES)}")
        _type(least, "--minimum")
    locked, notes = _locked(catalogue, usable, constraints), []
    group_of = {name: g for g in known.groups if g.name in known.probed for name in g.tensors}
    choices, together = [], dict[object, list[Tensor]]()
    for t in catalogue.tensors:
        if not t.quantizable:
            continue
        g = group_of.get(t.name)
        if t.name in locked:
            asked = locked[t.name]
            choices.append(Choice(g, (t,), (asked,), ((_given(usable, t, asked),),)))
        elif g is None:
            asked = _enough(usable, t, types)
            choices.append(Choice(None, (t,), (asked,), ((_given(usable, t, asked),),)))
            notes.append(f"'{t.name}': nothing is known of it, so it gets {asked}")
        else:
            key = (t.name.replace("ffn_up", "ffn_gate"),) if constraints.per_tensor else (g.name,)
            together.setdefault(key, []).append(t)
    for members in together.values():
        g = group_of[members[0].name]
        choices.append(_choice(g, tuple(members), usable, types, constraints))
    return Problem(catalogue, known, tuple(choices), constraints, tuple(notes))


def _choice(
    g: Group, members: tuple[Tensor, ...], usable: Usable, types: Sequence[str], constraints: Constraints
) -> Choice:
    least = QTYPES[constraints.minimum[g.role]].bits if g.role in constraints.minimum else 0.0
    found: dict[tuple[str, ...], str] = {}
    for asked in types:
        given = [usable.type_of(t, asked) for t in members]
        names = tuple(name for name in given if name is not None)
        if len(names) == len(members) and QTYPES[asked].bits >= least:
            found.setdefault(names, asked)
    if not found:
        floor = f" of at least {constraints.minimum[g.role]}" if least else ""
        raise UnsupportedError(
            f"{g.name}: none of the types {', '.join(types)}{floor} can be had for '{members[0].name}' (rows of "
            f"{members[0].n_cols:,} values, {'' if usable.weighted(members[0]) else 'no '}importance); give more "
            "--types"
        )
    return Choice(g, members, tuple(found.values()), tuple(found))


def _locked(catalogue: Catalogue, usable: Usable, constraints: Constraints) -> dict[str, str]:
    out: dict[str, str] = {}
    for glob, type_ in constraints.locks:
        asked = _type(type_, f"--lock {glob}")
        try:
            pattern = matcher(glob)
        except ValueError as e:
            raise RecipeError(f"--lock {glob}={type_}: {e}") from None
        names = [t.name for t in catalogue.tensors if t.quantizable and pattern.match(t.name)]
        if not names:
            every = [t.name for t in catalogue.tensors]
            raise RecipeError(f"--lock {glob}={type_}: '{glob}' matches no tensor{did_you_mean(glob, every)}")
        for name in names:
            out.setdefault(name, asked)
    tensors = {t.name: t for t in catalogue.tensors}
    for name, asked in out.items():
        if usable.type_of(tensors[name], asked) is None:
            raise RecipeError(
                f"--lock: '{name}' cannot be {asked}: its rows have {tensors[name].n_cols:,} values, and there is "
                f"{'an' if usable.weighted(tensors[name]) else 'no'} importance for it"
            )
    return out


def _type(name: str, where: str) -> str:
    try:
        return known_type(name)
    except ValueError as e:
        raise RecipeError(f"{where}: {e}") from None


def _given(usable: Usable, t: Tensor, asked: str) -> str:
    found = usable.type_of(t, asked)
    assert found is not None
    return found


def _enough(usable: Usable, t: Tensor, types: Sequence[str]) -> str:
    """The smallest type that is safe for a tensor that the sensitivity does not cover."""
    can = [name for name in types if usable.type_of(t, name) is not None]
    return next((name for name in can if QTYPES[name].bits >= _KEPT_BITS), can[-1] if can else "Q8_0")

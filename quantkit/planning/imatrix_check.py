"""Check an importance matrix against a recipe and a model: what it lacks, and what of that matters.

Each fault of an entry, a matrix or an expert is a `Lack`, with the bytes of the planned file it affects. A fault
matters if the recipe's type needs or uses weights and no policy supplies others. Faults of the matrix that can be
listed as a `Lack` raise no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..base.text import TextEnum, size, table
from ..gguf.types import LOST_WITHOUT_WEIGHTS, QTYPES, SPOILED_WITHOUT_WEIGHTS, VERSIONS
from ..imatrix.entries import Gaps
from ..imatrix.matrix import Imatrix, NoWeight
from ..imatrix.policies import FAIL, ONES, OUTSIDE_LAYERS, OWN, SHRINK, UNSEEN, Completed, Policy, is_expert
from ..model.catalogue import Catalogue
from ..recipe.load import Recipe
from .gaps import n_matrices
from .plan import ImatrixStatus, Plan, Planned, make_plan, must_have_weights, policy_of

CHECK_VERSION = 1
#: with fewer tokens than this, an expert's values are mostly noise
ENOUGH_TOKENS = 100
_SHOWN_ROWS, _SHOWN_MATRICES = 40, 6


class Fault(TextEnum):
    """Kinds of faults."""

    NO_WEIGHTS = "no weights"
    """a value is NaN, infinite or negative: a build refuses the whole file"""
    WRONG_SIZE = "wrong size"
    MISSING = "no entry"
    NEVER_SEEN = "never seen"
    ZEROS = "all zeros"
    FEW_TOKENS = "few tokens"


class Lack(NamedTuple):
    """A fault in what the matrix has for a tensor."""

    tensor: str
    type: str
    """the type that the recipe gives it; '' for an entry that belongs to no tensor of the model"""
    fault: Fault
    matrices: tuple[int, ...]
    """the experts (or heads) concerned; () for the whole tensor"""
    n_mats: int
    nbytes: int
    """size of these matrices in the planned file"""
    matters: bool
    why: str
    """what it means for the build"""

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "matrices": list(self.matrices)}


@dataclass(frozen=True)
class Check:
    """All that was found: first what matters, and within that by bytes, largest first."""

    plan: Plan
    path: str
    policy: Policy
    min_tokens: int
    lacks: tuple[Lack, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that was found matters for this recipe."""
        return not any(lack.matters for lack in self.lacks)

    def to_json(self) -> dict[str, Any]:
        return {
            "quantkit_imatrix_check": CHECK_VERSION,
            "imatrix": self.path,
            "model": self.plan.catalogue.model,
            "recipe": self.plan.recipe.name,
            "policy": self.policy.text,
            "min_tokens": self.min_tokens,
            "ok": self.ok,
            "found": [lack.to_json() for lack in self.lacks],
            "notes": list(self.notes),
        }

    def text(self, every: bool = False) -> str:
        """Return the check as text for people. `every`: show all rows."""
        head = f"{self.path} for {self.plan.catalogue.model} as {self.plan.recipe.name}, policy {self.policy.text}"
        parts = [head]
        shown = self.lacks if every else self.lacks[:_SHOWN_ROWS]
        if shown:
            rows = [
                [x.tensor, x.type, x.fault, _which(x), f"{x.nbytes:,}", "yes" if x.matters else "no", x.why]
                for x in shown
            ]
            parts.append(table(rows, ["tensor", "type", "fault", "matrices", "bytes", "matters", "why"], right=(4,)))
        if len(shown) < len(self.lacks):
            parts.append(f"and {len(self.lacks) - len(shown):,} more; --all shows them")
        notes = "\n".join(f"note: {n}" for n in self.notes)
        return "\n\n".join([*parts, *([notes] if notes else []), self.verdict()])

    def verdict(self) -> str:
        """Return the last line: whether anything matters, and how many bytes it affects."""
        bad = [x for x in self.lacks if x.matters]
        if not bad:
            found = len(self.lacks)
            return (
                "fine: nothing is wrong" if not found else f"fine: of what was found ({found:,}) nothing matters here"
            )
        # an expert may have two faults, and its whole tensor another: count its bytes once
        most: dict[str, dict[int, int]] = {}
        for x in bad:
            parts = most.setdefault(x.tensor, {})
            parts.update({m: x.nbytes // len(x.matrices) for m in x.matrices} or {-1: x.nbytes})
        nbytes = sum(parts.get(-1, sum(parts.values())) for parts in most.values())
        n = len({x.tensor for x in bad})
        return f"not fine: what was found of {n:,} tensor{'s' * (n != 1)} matters, {size(nbytes)} of the file"


def _which(lack: Lack) -> str:
    if lack.n_mats < 2 or not lack.matrices:
        return "" if lack.n_mats < 2 else f"all {lack.n_mats}"
    more = ", …" if len(lack.matrices) > _SHOWN_MATRICES else ""
    named = ", ".join(map(str, lack.matrices[:_SHOWN_MATRICES])) + more
    return f"{len(lack.matrices)} of {lack.n_mats}: {named}"


def check(
    catalogue: Catalogue,
    recipe: Recipe,
    imatrix: Imatrix,
    policy: Policy | None = None,
    min_tokens: int = ENOUGH_TOKENS,
    mixture_version: str = VERSIONS[0],
) -> Check:
    """Check an importance matrix against a recipe and a model. Reads every value. Raises RecipeError and
    UnsupportedError if no plan can be made, and ImatrixError if the policy cannot be followed with this matrix or the
    file has changed."""
    found, broken = _scan(imatrix)
    chosen = policy_of(recipe, policy)
    # values that are no weights leave the policy nothing to work with
    followed = FAIL if broken else chosen
    plan = make_plan(catalogue, recipe, imatrix, mixture_version, followed)
    shapes = {t.name: (t.n_cols, n_matrices(t)) for t in catalogue.tensors}
    weights = Completed(imatrix, followed, shapes, found)
    lacks = [x for t in plan.tensors for x in _of_tensor(t, plan, imatrix, weights, min_tokens)]
    planned = {t.tensor.name: t for t in plan.tensors}
    for name, bad in broken.items():
        t = planned.get(name)
        n_mats, of = shapes.get(name, (0, 1))[1], f"{imatrix.entries[name].n_values:,}"
        why = f"{bad.value} at {bad.at:,} of {of}: a build refuses the file"
        lacks.append(
            Lack(name, t.type if t else "", Fault.NO_WEIGHTS, (), n_mats, t.nbytes if t else 0, matters=True, why=why)
        )
    lacks.sort(key=lambda x: (not x.matters, -x.nbytes, x.tensor))
    notes = _notes(plan, imatrix, bool(broken))
    return Check(plan, imatrix.path_as_given, chosen, min_tokens, tuple(lacks), tuple(notes))


def _scan(imatrix: Imatrix) -> tuple[dict[str, Gaps], dict[str, NoWeight]]:
    """Return the gaps of each sound entry, and for each other entry its first value that is not a weight."""
    found: dict[str, Gaps] = {}
    broken: dict[str, NoWeight] = {}
    for name in imatrix.entries:
        gaps = imatrix.look_at(name)
        if isinstance(gaps, NoWeight):
            broken[name] = gaps
        else:
            found[name] = gaps
    return found, broken


def _of_tensor(t: Planned, plan: Plan, imatrix: Imatrix, weights: Completed, min_tokens: int) -> list[Lack]:
    """Return the faults in what the matrix has for a tensor."""
    name, n_mats, status = t.tensor.name, n_matrices(t.tensor), t.imatrix_status
    if not t.tensor.quantizable:
        return []

    def lack(fault: Fault, matrices: tuple[int, ...], matters: bool, why: str) -> Lack:
        part = t.nbytes * (len(matrices) or n_mats) // n_mats
        return Lack(name, t.type, fault, matrices if n_mats > 1 else (), n_mats, part, matters, why)

    use = _use(t, plan)
    if name in imatrix and not imatrix.fits(name, t.tensor.n_cols, n_mats):
        refused = status == ImatrixStatus.WRONG_SIZE
        has = f"{imatrix.entries[name].n_values:,} values, not {n_mats * t.tensor.n_cols:,}"
        return [lack(Fault.WRONG_SIZE, (), refused, f"{has}; " + ("a build refuses it" if refused else "not used"))]
    origin = weights.origin(name)
    if name not in imatrix:
        if name in weights:
            left = origin.unseen
            if not left:
                return [lack(Fault.MISSING, (), False, f"{origin.donor} gives it values, by the policy")]
            return [lack(Fault.MISSING, left, use.matters, use.why)]
        if name in OUTSIDE_LAYERS and not use.matters:
            return []  # no matrix is expected to have one
        if status == ImatrixStatus.MISSING and name in OUTSIDE_LAYERS:
            why = "llama-imatrix has none without --process-output, and the type does without"
            return [lack(Fault.MISSING, (), False, why)]
        return [lack(Fault.MISSING, (), use.matters, use.why)]
    out = []
    nothing, empty = weights.without_data(name)
    for fault, matrices in ((Fault.NEVER_SEEN, nothing), (Fault.ZEROS, empty)):
        left = tuple(m for m in matrices if origin.sources[m] in ((OWN, UNSEEN) if fault == Fault.ZEROS else (UNSEEN,)))
        given = tuple(m for m in matrices if m not in left)
        if given:
            by = ", ".join(sorted({origin.sources[m] for m in given}))
            out.append(lack(fault, given, False, f"{by}, by the policy"))
        if left:
            lossy = t.type in LOST_WITHOUT_WEIGHTS or t.type in SPOILED_WITHOUT_WEIGHTS
            if fault == Fault.ZEROS and use.matters:
                why = f"{t.type} loses these weights" if lossy else f"{t.type} keeps these weights all the same"
                out.append(lack(fault, left, lossy, why))
            else:
                out.append(lack(fault, left, use.matters, use.why))
    counts = imatrix.entries[name].counts
    if not imatrix.is_dat and len(counts) == (n_mats if is_expert(name) else 1):
        few = tuple(m for m, count in enumerate(counts) if 0 < count < min_tokens)
        if few:
            n = min(counts[m] for m in few)
            least = f"as few as {n:,.0f} token{'s' * (n != 1)}; "
            shrunk = all(origin.sources[m] in (SHRINK, OWN, ONES) for m in few) and origin.tokens > 0
            why = "drawn towards the mean, by the policy" if shrunk else use.why
            out.append(lack(Fault.FEW_TOKENS, few, use.matters and not shrunk, least + why))
    return out


class _Use(NamedTuple):
    matters: bool
    why: str


def _use(t: Planned, plan: Plan) -> _Use:
    """Return whether weights matter for a tensor of this type, and why."""
    if t.type == t.tensor.source_type:
        return _Use(False, "copied as it is")
    if not QTYPES[t.type].uses_imatrix:
        return _Use(False, f"{t.type} has no use for weights")
    if must_have_weights(t.tensor.name, t.type, plan.recipe.file_type):
        return _Use(True, f"{t.type} must have weights")
    return _Use(True, f"{t.type} uses weights")


def _notes(plan: Plan, imatrix: Imatrix, is_broken: bool) -> list[str]:
    out = []
    if is_broken:
        out.append("the policy was left aside: mend the values that are no weights first")
    names: Mapping[str, Any] = {t.tensor.name: t for t in plan.tensors}
    others = [name for name in imatrix.entries if name not in names]
    if others:
        some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        are = "entry is" if len(others) == 1 else "entries are"
        out.append(f"{len(others):,} {are} of no tensor of {plan.catalogue.model}: {some}")
    blind = [
        n for n, t in names.items()
        if n in imatrix and is_expert(n) and n_matrices(t.tensor) > 1 and len(imatrix.entries[n].counts) == 1
    ]  # fmt: skip
    if blind:
        out.append(
            f"the tokens of each expert are not known of {len(blind):,} tensors, such as {blind[0]}: one count stands "
            "for all, as in the older .dat format"
        )
    return out

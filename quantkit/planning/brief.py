"""A plan in about ten lines, for someone about to build it: model, recipe, size, bits, fallbacks, gaps in the
importance matrix, and every warning. `report.plan_text` shows the whole plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..base.text import short_size, wrapped
from ..model.catalogue import Role
from .plan import ImatrixStatus, Plan, Planned
from .report import fallen, imatrix_notes, plan_warnings
from .rounding import rounding_notes

#: how many types are named; the rest are only counted
_MOST_TYPES = 5
#: how many notes are shown, and how many characters of each
_MOST_NOTES, _MOST_NOTE = 3, 240
_LABEL = 10


def brief_text(plan: Plan, files: Sequence[tuple[str, int]], width: int | None = None) -> str:
    """Return the plan as short text for people. `files`: (name, bytes) of the output. `width`: the most characters a
    line may have; None for no limit."""
    lines = [f"{name:{_LABEL}}{value}" for name, value in _facts(plan, files)]
    notes = [*imatrix_notes(plan), *rounding_notes(plan), *plan.catalogue.notes]
    some = [n if len(n) <= _MOST_NOTE else f"{n[:_MOST_NOTE]}…" for n in notes[:_MOST_NOTES]]
    lines += [f"{'note':{_LABEL}}{n}" for n in some]
    if len(notes) > len(some):
        lines.append(f"{'':{_LABEL}}and {len(notes) - len(some)} more notes: --verbose shows them")
    lines = [wrapped(line, width, " " * _LABEL) for line in lines]
    return "\n".join([*lines, *(wrapped(f"warning: {w}", width) for w in plan_warnings(plan))])


def _facts(plan: Plan, files: Sequence[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    c, recipe = plan.catalogue, plan.recipe
    experts = f", {len(c.moe_layers)} of them with experts" if c.moe_layers else ""
    yield "model", f"{c.model}: {c.arch}, {c.n_layers} layers{experts}, {_count(plan.n_elements)} weights"
    yield "recipe", recipe.name + (f": {recipe.title}" if recipe.title else "")
    total = sum(n for _, n in files)
    many = f" in {len(files)} shards" if len(files) > 1 else ""
    yield "size", f"{short_size(total)} ({total:,} bytes){many}"
    yield "bits", ", ".join(_bits(plan))
    yield "types", ", ".join(_types(plan))
    n, which = fallen(plan)
    if n:
        some = ", ".join(which[:_MOST_NOTES]) + (", …" if len(which) > _MOST_NOTES else "")
        yield "fell back", f"{n} tensor{'s' * (n > 1)}, since rows do not divide into blocks: {some}"
    yield "imatrix", _imatrix(plan)


def _count(n: int) -> str:
    return f"{n / 1e9:,.2f} billion" if n >= 1e9 else f"{n / 1e6:,.1f} million" if n >= 1e6 else f"{n:,}"


def _bits(plan: Plan) -> Iterator[str]:
    yield f"{plan.bpw:.2f} a weight"
    experts = [t for t in plan.tensors if t.tensor.role == Role.ROUTED_EXPERT]
    others = [t for t in plan.tensors if t.tensor.role != Role.ROUTED_EXPERT]
    if experts and others:
        yield f"routed experts {_bpw(experts):.2f}"
        yield f"all else {_bpw(others):.2f}"


def _bpw(tensors: Sequence[Planned]) -> float:
    return 8 * sum(t.nbytes for t in tensors) / sum(t.tensor.n_elements for t in tensors)


def _types(plan: Plan) -> Iterator[str]:
    """Yield the types with the largest shares of the bytes, largest first."""
    of: Counter[str] = Counter()
    for t in plan.tensors:
        of[t.type] += t.nbytes
    most = of.most_common()
    for name, nbytes in most[:_MOST_TYPES]:
        yield f"{name} {100 * nbytes / plan.tensor_bytes:.1f} %"
    if len(most) > _MOST_TYPES:
        yield f"{len(most) - _MOST_TYPES} more"


def _imatrix(plan: Plan) -> str:
    status = Counter(t.imatrix_status for t in plan.tensors)
    if plan.imatrix is None:
        n = status[ImatrixStatus.OPTIONAL]
        return "none" + (f"; {n} tensors would be better with one" if n > 1 else "")
    name = getattr(plan.imatrix, "path_as_given", "")
    n_used = status[ImatrixStatus.USED]
    parts = [f"used for {n_used} tensor{'s' * (n_used != 1)}"]
    if plan.gaps:
        n = len(plan.gaps)
        parts.append(f"{n} tensor{' has' if n == 1 else 's have'} gaps in it: see below")
    return (f"{name}, " if name else "") + "; ".join(parts)

"""The recipes of about the same size that an optimized recipe is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...base.errors import QuantkitError
from ...gguf.types import FILE_TYPES, QTYPES
from ...imatrix.matrix import Imatrix
from ...model.catalogue import Catalogue
from ...planning.file_layout import lay_out, output_kvs
from ...planning.mixtures import BASE_TYPES
from ...planning.plan import Plan, make_plan, with_values
from ...recipe.load import Recipe, load, parse
from ...recipe.named import SCHEMA_LINE, shipped

#: relative difference in bytes that counts as the same size
NEAR = 0.005


@dataclass(frozen=True)
class Baseline:
    """One recipe, or two whose KLD is interpolated linearly in bytes."""

    kind: str
    """UD | stock | uniform"""
    plans: tuple[Plan, ...]
    """one, or the next smaller and the next larger one in bytes"""
    nbytes: tuple[int, ...]
    next_larger: int | None = None
    """index in `plans` of the first that is at least as large; None if there is none"""

    def at(self, target: int, klds: Iterable[float]) -> tuple[float, str]:
        """The KLD at `target` bytes, and how it was obtained."""
        found = list(klds)
        if len(found) == 1:
            gap = self.nbytes[0] / target - 1
            return found[0], f"{self.plans[0].recipe.name}, {100 * gap:+.2f} % bytes"
        (low, high), (a, b) = self.nbytes, found
        share = (target - low) / (high - low)
        names = f"{self.plans[0].recipe.name} and {self.plans[1].recipe.name}"
        return a + share * (b - a), f"between {names}, linear in bytes"


def file_bytes(plan: Plan, imatrix: Imatrix | None) -> int:
    """Size of the file that `build` would make, header and padding included."""
    (layout,) = lay_out(plan, output_kvs(plan, imatrix))
    return layout.nbytes


def baselines(catalogue: Catalogue, imatrix: Imatrix | None, target: int) -> list[Baseline]:
    """Return UD recipes, stock mixtures and uniform types of about `target` bytes, as far as there are any."""
    found = []
    for kind, recipes in (("UD", _ud(catalogue)), ("stock", _stock()), ("uniform", _uniform())):
        sized: dict[int, Plan] = {}
        for recipe in recipes:
            try:
                plan = with_values(make_plan(catalogue, recipe, imatrix), imatrix)
            except QuantkitError:
                continue  # it needs importance, or types, that are not to be had here
            sized.setdefault(file_bytes(plan, imatrix), plan)
        if sized:
            found.append(_around(kind, sized, target))
    return found


def _around(kind: str, sized: dict[int, Plan], target: int) -> Baseline:
    sizes = sorted(sized)
    near = min(sizes, key=lambda n: abs(n - target))
    below, above = [n for n in sizes if n <= target], [n for n in sizes if n >= target]
    picked = [near] if abs(near - target) <= NEAR * target or not below or not above else [below[-1], above[0]]
    larger = next((i for i, n in enumerate(picked) if n >= (1 - NEAR) * target), None)
    return Baseline(kind, tuple(sized[n] for n in picked), tuple(picked), larger)


def _ud(catalogue: Catalogue) -> Iterable[Recipe]:
    for name in shipped():
        if name.startswith("UD-"):
            recipe = load(name)
            if recipe.is_for(catalogue.arch):
                yield recipe


def _stock() -> Iterable[Recipe]:
    return (load(name) for name in FILE_TYPES if not (name in QTYPES and QTYPES[name].is_float))


def _uniform() -> Iterable[Recipe]:
    """One type for all layers; embedding and output as in llama.cpp's mixture."""
    for name, base in BASE_TYPES.items():
        if name == base and not QTYPES[base].is_float:
            yield parse(
                f"{SCHEMA_LINE}\nname: all-{base}\narch: [any]\nfile_type: {name}\nimatrix: optional\n"
                f"otherwise: mixture {name}\nrules:\n"
                f'  - {{match: "blk.*.weight", type: {base}, why: all layers alike}}\n',
                f"all-{base}",
            )  # fmt: skip

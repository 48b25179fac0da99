"""Plans the sizes of recipes x models, locks and compares them; also the size table of recipes for one model.

Each model is opened once per layout, each recipe read once. A cell whose recipe is not for the model's arch is left
out. A cell whose recipe fails on the model is kept with its error, so that it does not go unnoticed.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from ...base.errors import KernelError, QuantkitError, RecipeError, did_you_mean
from ...base.text import TextEnum
from ...gguf.types import QTYPES, VERSIONS
from ...model.catalogue import ROLES, Catalogue, Role
from ...model.families.known import MODELS
from ...model.families.options import Options
from ...model.open import open_model
from ...planning.file_layout import lay_out, output_kvs
from ...planning.plan import Plan, Planned, make_plan
from ...recipe.load import Recipe, load
from ...recipe.named import shipped, shipped_name
from .lock import DEFAULT_NAMES, Cell, Key, Lock, Matrix, group_name, groups, layer_and_rest, ungroup

# ---------------------------------------------------------------- the matrix


def is_path(recipe: str) -> bool:
    """Whether a recipe is given as a path (or a glob of paths), not as a shipped recipe's name."""
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe or os.sep in recipe


def _is_glob(text: str) -> bool:
    return any(c in text for c in "*?[")


def relative_recipe(recipe: str, folder: Path) -> str:
    """Convert a recipe as typed in the current directory to the form stored in a lock in `folder`."""
    return Path(os.path.relpath(os.path.expanduser(recipe), folder)).as_posix() if is_path(recipe) else recipe


def relative_model(model: str, folder: Path) -> str:
    """Convert a model as typed in the current directory to the form stored in a lock in `folder`."""
    path = os.path.expanduser(model)
    return Path(os.path.relpath(path, folder)).as_posix() if os.path.exists(path) else model


def expand_recipes(given: Sequence[str], folder: Path) -> list[str]:
    """Expand to names of shipped recipes and paths relative to `folder`, without repeats. Raises RecipeError if a glob
    matches nothing."""
    known = list(shipped())
    out: list[str] = []
    for item in given:
        if is_path(item):
            found = [item]
            if _is_glob(item) and not os.path.exists(folder / item):
                found = sorted(Path(p).as_posix() for p in glob.glob(item, root_dir=folder, recursive=True))
                if not found:
                    raise RecipeError(f"no file in {folder} matches '{item}'")
        elif item == "all" or _is_glob(item):
            found = known if item == "all" else [n for n in known if fnmatchcase(n.lower(), item.lower())]
            if not found:
                raise RecipeError(f"no shipped recipe matches '{item}'; there are {', '.join(known)}")
        else:
            found = [shipped_name(item) or item]
            if found[0] not in known:
                raise RecipeError(
                    f"no shipped recipe is called '{item}'{did_you_mean(item, known)}; there are {', '.join(known)}; "
                    "a recipe of your own is given as a path ending in .yaml"
                )
        out += [name for name in found if name not in out]
    return out


def expand_models(given: Sequence[str]) -> list[str]:
    """Expand models, without repeats. `all` is every known model; releases of one shape count once."""
    out: list[str] = []
    for item in given:
        by_shape: dict[str, str] = {}
        for name, shape in MODELS.items():
            by_shape.setdefault(shape, name)
        out += [m for m in (by_shape.values() if item == "all" else [item]) if m not in out]
    return out


class Broken(NamedTuple):
    """A recipe, a model or a lock that cannot be read."""

    what: str
    """as in the lock"""
    error: QuantkitError
    file: str
    """the recipe's or lock's file, relative to the current directory; '' if there is none"""


class _Planned(NamedTuple):
    key: Key
    plan: Plan | None
    error: str


def _recipes(matrix: Matrix, folder: Path, broken: list[Broken] | None) -> Iterator[tuple[str, Recipe]]:
    done: set[str] = set()
    for given in matrix.recipes:
        with _collected(broken, given, ""):
            for name in expand_recipes([given], folder):
                path = str(folder / name) if is_path(name) else name
                if name not in done:
                    done.add(name)
                    with _collected(broken, name, _relative(Path(path)) if is_path(name) else ""):
                        yield name, load(path)


@contextmanager
def _collected(broken: list[Broken] | None, what: str, file: str) -> Iterator[None]:
    """Append an error to the list `broken` and go on; without a list, raise it."""
    try:
        yield
    except QuantkitError as e:
        if broken is None:
            raise
        broken.append(Broken(what, e, file))


def _plans(matrix: Matrix, folder: Path, broken: list[Broken] | None = None) -> Iterator[_Planned]:
    """Yield the cells of a matrix, in the order of the lock. A recipe or model that cannot be read raises
    QuantkitError, or is added to `broken` and skipped."""
    recipes = list(_recipes(matrix, folder, broken))
    for model in expand_models(matrix.models):
        catalogues: list[Catalogue] = []
        with _collected(broken, model, ""):
            for layout in dict.fromkeys(matrix.layouts):
                here = folder / model
                catalogue = open_model(str(here) if os.path.exists(here) else model, Options(layout))
                if not any(c.layout == catalogue.layout or c.tensors == catalogue.tensors for c in catalogues):
                    catalogues.append(catalogue)
        for catalogue in catalogues:
            for name, recipe in recipes:
                if recipe.is_for(catalogue.arch):
                    key = Key(recipe=name, model=model, layout=str(catalogue.layout))
                    try:
                        yield _Planned(key, make_plan(catalogue, recipe), "")
                    except QuantkitError as e:
                        yield _Planned(key, None, str(e))


def _cell(key: Key, plan: Plan) -> Cell:
    by_role: Counter[Role] = Counter()
    for t in plan.tensors:
        by_role[t.tensor.role] += t.nbytes
    order = [*ROLES, *sorted(by_role.keys() - set(ROLES))]
    whole = plan.catalogue.kvs_complete
    return Cell(
        cell=key,
        elements=plan.n_elements,
        tensor_bytes=plan.tensor_bytes,
        file_bytes=sum(f.nbytes for f in lay_out(plan, output_kvs(plan, None))) if whole else None,
        roles={str(role): by_role[role] for role in order if role in by_role},
        types=plan.types(),
        tensors=groups((t.tensor.name, t.type) for t in plan.tensors),
    )


def _failed(key: Key, error: str) -> Cell:
    """The cell of a plan that fails: its first error, without the line number, which any comment would shift."""
    return Cell(cell=key, error=re.sub(r"(\.ya?ml):\d+", r"\1", error.partition("\n")[0]))


def make_lock(matrix: Matrix, folder: Path) -> Lock:
    """Make the lock of a matrix. Relative paths in it start at `folder`. Raises QuantkitError."""
    cells = [_failed(key, error) if plan is None else _cell(key, plan) for key, plan, error in _plans(matrix, folder)]
    if not cells:
        raise RecipeError(
            f"no recipe of {', '.join(matrix.recipes)} is for a model of {', '.join(matrix.models)}: nothing to lock"
        )
    return Lock(matrix=matrix, cells=cells)


# ---------------------------------------------------------------- what moved


class Move(NamedTuple):
    """One group of tensors whose type changed in the same way."""

    tensors: str
    n: int
    before: str | None
    """None: there was no such tensor before"""
    after: str | None
    """None: there is no such tensor now"""
    nbytes: int | None
    """bytes now minus bytes before; None if the former shape is unknown"""
    rule: str
    """file:line rules[i] that decides the type now"""


class ChangeStatus(TextEnum):
    """The outcome for a cell."""

    SAME = "same"
    MOVED = "moved"
    TOLERATED = "tolerated"
    NEW = "new"
    VANISHED = "vanished"
    FAILED = "failed"
    """it could be planned before, but not now"""
    PLANNED = "planned"
    """it could not be planned before"""


class Change(NamedTuple):
    """A cell of the lock compared with the current plan."""

    key: Key
    status: ChangeStatus
    before: Cell | None
    after: Cell | None
    moves: tuple[Move, ...]
    detail: str
    """anything that `moves` does not show"""
    file: str
    """the recipe's file, relative to the current directory; '' if it does not exist"""

    @property
    def drifted(self) -> bool:
        return self.status not in (ChangeStatus.SAME, ChangeStatus.TOLERATED)

    @property
    def delta(self) -> int:
        return (self.after.tensor_bytes if self.after else 0) - (self.before.tensor_bytes if self.before else 0)


@dataclass(frozen=True)
class Comparison:
    """The comparison of a lock with its matrix as planned now."""

    file: str
    """the lock"""
    tolerance: Fraction
    changes: tuple[Change, ...]
    broken: tuple[Broken, ...] = ()
    n_skipped: int = 0
    """cells of the lock that were not compared because their recipe or model is in `broken`"""

    @property
    def drifted(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if c.drifted)


def compare(lock: Lock, path: Path, tolerance: Fraction = Fraction(0)) -> Comparison:
    """Plan the matrix of the lock in file `path` again, and compare. A cell whose tensor bytes moved by at most
    `tolerance` (a share of the bytes before; 0: no change of any kind) is tolerated. Recipes and models that cannot be
    read are listed in the result; their cells are not compared."""
    old = {cell.cell: cell for cell in lock.cells}
    changes = []
    broken: list[Broken] = []
    for key, plan, error in _plans(lock.matrix, path.parent, broken):
        before = old.pop(key, None)
        after = _failed(key, error) if plan is None else _cell(key, plan)
        change = _change(key, before, after, plan, error, tolerance)
        changes.append(change._replace(file=_file_of(key, path.parent)))
    unread = {b.what for b in broken}
    skipped = [key for key in old if key.recipe in unread or key.model in unread]
    for key, before in old.items():
        if key in skipped:
            continue
        detail = "the matrix has no such cell now: the recipe or the model has gone, or has another arch"
        changes.append(Change(key, ChangeStatus.VANISHED, before, None, (), detail, _file_of(key, path.parent)))
    return Comparison(os.path.relpath(path), tolerance, tuple(changes), tuple(broken), len(skipped))


def unreadable(path: Path, tolerance: Fraction, error: QuantkitError) -> Comparison:
    """The comparison for a lock that cannot be read; it holds only the error."""
    return Comparison(os.path.relpath(path), tolerance, (), (Broken(str(path), error, _relative(path)),))


def _relative(path: Path) -> str:
    return Path(os.path.relpath(path)).as_posix() if os.path.isfile(path) else ""


def _file_of(key: Key, folder: Path) -> str:
    return _relative(folder / key.recipe if is_path(key.recipe) else Path("recipes") / f"{key.recipe}.yaml")


def _change(key: Key, before: Cell | None, after: Cell, plan: Plan | None, error: str, tolerance: Fraction) -> Change:
    if before is None:
        return Change(key, ChangeStatus.NEW, None, after, (), error or "the lock has no such cell", "")
    if before == after:
        return Change(key, ChangeStatus.SAME, before, after, (), "", "")
    if plan is None:
        was = "it could be planned before" if before.error is None else "it could not be planned before either"
        return Change(key, ChangeStatus.FAILED, before, after, (), f"{error} ({was})", "")
    if before.error is not None:
        return Change(
            key, ChangeStatus.PLANNED, before, after, (), f"it could not be planned before: {before.error}", ""
        )
    moves = _moves(before.tensors, plan.tensors)
    details = []
    if before.elements != after.elements:
        details.append(f"the model has {after.elements:,} elements, and had {before.elements:,}")
    elif before.tensor_bytes != after.tensor_bytes and not moves:
        details.append("no tensor has another type: the shapes of the model changed")
    if before.file_bytes != after.file_bytes:
        was, now = (f"{n:,} bytes" if n is not None else "not known" for n in (before.file_bytes, after.file_bytes))
        details.append(f"the file: {was} before, {now} now")
    within = 0 < tolerance >= Fraction(abs(after.tensor_bytes - before.tensor_bytes), max(before.tensor_bytes, 1))
    return Change(
        key, ChangeStatus.TOLERATED if within else ChangeStatus.MOVED, before, after, moves, "; ".join(details), ""
    )


def _moves(before: Mapping[str, str], now: Sequence[Planned]) -> tuple[Move, ...]:
    """The tensors that changed type, appeared or vanished; equal changes by one rule in several layers are one move."""
    old = ungroup(before)
    found: dict[tuple[str, str | None, str | None, str], tuple[list[int | None], list[int | None]]] = {}

    def add(name: str, was: str | None, is_: str | None, rule: str, nbytes: int | None) -> None:
        layer, rest = layer_and_rest(name)
        layers, sizes = found.setdefault((rest, was, is_, rule), ([], []))
        layers.append(layer)
        sizes.append(nbytes)

    for t in now:
        was = old.pop(t.tensor.name, None)
        if was != t.type:
            then: int | None = 0
            if was is not None:
                try:
                    then = QTYPES[was].row_bytes(t.tensor.n_cols) * t.tensor.n_rows
                except KernelError:  # its shape was another then
                    then = None
            add(t.tensor.name, was, t.type, t.rule, None if then is None else t.nbytes - then)
    for name, was in old.items():
        add(name, was, None, "", None)
    moves = []
    for (rest, was, is_, rule), (layers, sizes) in found.items():
        numbers = [i for i in layers if i is not None]
        known = [n for n in sizes if n is not None]
        name = group_name(numbers, rest) if numbers else rest
        moves.append(Move(name, len(layers), was, is_, sum(known) if len(known) == len(sizes) else None, rule))
    return tuple(moves)


# ---------------------------------------------------------------- the size table


class SizeRow(NamedTuple):
    """A recipe on a model."""

    recipe: str
    title: str
    tensor_bytes: int
    bpw: float
    role: str
    """the role that `bits` is about: routed expert, or dense ffn in a model without experts"""
    bits: float | None
    """bits per weight of that role"""


def size_table(
    catalogue: Catalogue, recipes: Sequence[tuple[str, Recipe]], version: str = VERSIONS[0]
) -> tuple[list[SizeRow], list[str]]:
    """Return the sizes of recipes, each with its display name, on one model, smallest first, and a note for each that
    cannot be planned. Recipes for other archs are left out. Raises RecipeError if none is for the model's arch."""
    rows, notes = [], []
    for name, recipe in recipes:
        if not recipe.is_for(catalogue.arch):
            continue
        try:
            plan = make_plan(catalogue, recipe, None, version)
        except QuantkitError as e:
            notes.append(f"{name} cannot be planned: {e}")
            continue
        rows.append(_size_row(name, plan))
    if not rows and not notes:
        raise RecipeError(
            f"{catalogue.model} is a {catalogue.arch}, and no recipe of {', '.join(n for n, _ in recipes)} is for that"
        )
    return sorted(rows, key=lambda r: (r.tensor_bytes, r.recipe)), notes


def _size_row(name: str, plan: Plan) -> SizeRow:
    for role in (Role.ROUTED_EXPERT, Role.DENSE_FFN):
        of = [t for t in plan.tensors if t.tensor.role == role]
        if of:
            bits = 8 * sum(t.nbytes for t in of) / sum(t.tensor.n_elements for t in of)
            return SizeRow(name, plan.recipe.title, plan.tensor_bytes, plan.bpw, role, bits)
    return SizeRow(name, plan.recipe.title, plan.tensor_bytes, plan.bpw, "", None)


def default_lock() -> Path:
    """The lock in the current directory: the first default name that exists, or else the first one."""
    there = [Path(name) for name in DEFAULT_NAMES if Path(name).is_file()]
    return there[0] if there else Path(DEFAULT_NAMES[0])

"""The candidates to run: recipes on a model, a GGUF as it is, and the published files of a repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...base.errors import QuantkitError, RecipeError
from ...base.text import TextEnum
from ...gguf.quant_names import Published
from ...model.catalogue import Catalogue
from ...planning.fit import Layer, PlacedBytes, weigh
from ...planning.plan import make_plan
from ...recipe.load import Recipe

#: plausible range of bits per weight; files of a repository outside of it belong to another model
_FEWEST, _MOST_BITS = 1.0, 33.0
#: shipped recipes that exist for comparison only
_CONTROL = "NAIVE-"


class Kind(TextEnum):
    """The kind of a candidate."""

    RECIPE = "recipe"
    FILE = "file"
    PUBLISHED = "published"


@dataclass(frozen=True)
class Candidate:
    """A quantization that could be run."""

    name: str
    kind: Kind
    title: str
    weights: PlacedBytes
    bpw: float
    files: tuple[str, ...] = ()
    """of a repository"""
    like: str = ""
    """for published files, whose sizes alone are known: the recipe whose layers give the distribution of their bytes"""


class Memory(NamedTuple):
    """The memory needed besides the weights."""

    context: int
    """tokens"""
    cache_type: str


def usable(names: Sequence[str]) -> list[str]:
    """The names of shipped recipes that are meant for use."""
    return [name for name in names if not name.startswith(_CONTROL)]


def of_recipes(
    catalogue: Catalogue, recipes: Sequence[Recipe], version: str, memory: Memory
) -> tuple[list[Candidate], list[str]]:
    """Return the recipes for the model's arch, and a note for each that cannot be planned. Raises RecipeError if no
    recipe is for this arch, UnsupportedError."""
    out, notes = [], []
    for recipe in recipes:
        if not recipe.is_for(catalogue.arch):
            continue
        try:
            plan = make_plan(catalogue, recipe, None, version)
        except QuantkitError as e:
            notes.append(f"{recipe.name} cannot be planned: {e}")
            continue
        weights = weigh(catalogue, plan, *memory)
        out.append(Candidate(recipe.name, Kind.RECIPE, recipe.title, weights, plan.bpw))
    if not out and not notes:
        names = ", ".join(recipe.name for recipe in recipes)
        raise RecipeError(f"{catalogue.model} is a {catalogue.arch}, and no recipe of {names} is for that")
    return out, notes


def of_file(catalogue: Catalogue, name: str, memory: Memory) -> Candidate:
    """A GGUF as it is. Raises UnsupportedError."""
    weights = weigh(catalogue, None, *memory)
    bpw = 8 * weights.tensor_bytes / _elements(catalogue)
    return Candidate(name, Kind.FILE, "the file as it is", weights, bpw)


def of_repository(
    catalogue: Catalogue, repository: str, published: Sequence[Published], planned: Sequence[Candidate]
) -> tuple[list[Candidate], list[str]]:
    """Return the published files, and notes. Only their sizes are known: the bytes per layer are those of the recipe of
    the same name, or else of the nearest size, scaled. `planned` must not be empty."""
    out, notes = [], []
    for p in published:
        bpw = 8 * p.nbytes / _elements(catalogue)
        if p.missing:
            are = "is" if p.missing == 1 else "are"
            of = p.missing + len(p.files)
            notes.append(f"{repository}: {p.name} is left out: {p.missing} of {of} shards {are} missing")
            continue
        if not _FEWEST <= bpw <= _MOST_BITS:
            notes.append(
                f"{repository}: {p.name} is left out: its {p.nbytes:,} bytes would be {bpw:.2f} bits a weight of "
                f"{catalogue.model}, so it is another model"
            )
            continue
        same = [c for c in planned if c.name.lower() == p.name.lower()]
        like = min(same or planned, key=lambda c: abs(c.weights.tensor_bytes - p.nbytes))
        n = f"{len(p.files)} files" if len(p.files) > 1 else p.files[0].rpartition("/")[2]
        weights = scaled(like.weights, p.nbytes)
        out.append(Candidate(p.name, Kind.PUBLISHED, n, weights, bpw, p.files, like.name))
    return out, notes


def scaled(w: PlacedBytes, tensor_bytes: int) -> PlacedBytes:
    """Scale the weights to `tensor_bytes` in all, with the same distribution over layers; the KV cache stays as it
    is."""

    def share(n: int) -> int:
        return n * tensor_bytes // w.tensor_bytes

    layers = tuple(Layer(share(x.rest), share(x.experts), x.cache) for x in w.layers)
    return replace(w, layers=layers, input=share(w.input), tensor_bytes=tensor_bytes)


def _elements(catalogue: Catalogue) -> int:
    return sum(t.n_elements for t in catalogue.tensors)

"""What a page can show: plain data, as commands print it with --json, and its sources.

Files are recognized by content, not by name: a GGUF, an importance matrix, the results of a study, or the JSON output
of a command. Anything else is a model, which needs a recipe to become a plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..base.errors import SourceError
from ..base.files import text_within
from ..gguf.header import decode, is_gguf, read_header
from ..model.catalogue import Catalogue
from ..pictures.figure import cleaned
from ..planning.plan import Plan

PLAN, GGUF, IMATRIX, STUDY, EVAL = "plan", "GGUF", "importance matrix", "study", "evaluation"
SENSITIVITY, OPTIMIZED, DIFF, SIZES, FIT, WHICH = (
    "sensitivity",
    "optimized recipe",
    "comparison of recipes",
    "size table",
    "fit",
    "choice for a machine",
)
#: largest JSON file that is read, in bytes
_MAX_BYTES = 1 << 28
_SQLITE = b"SQLite format 3\0"
#: kind, the keys that identify its JSON, and its version if it has one
_KEYS: tuple[tuple[str, frozenset[str], int | None], ...] = (
    (PLAN, frozenset({"quantkit_plan"}), 1),
    (SENSITIVITY, frozenset({"quantkit_sensitivity"}), 1),
    (EVAL, frozenset({"quantkit_eval"}), 1),
    (STUDY, frozenset({"quantkit_ablate"}), 1),
    (OPTIMIZED, frozenset({"quantkit_optimize"}), 1),
    (WHICH, frozenset({"quantkit_which"}), 1),
    (IMATRIX, frozenset({"count_unit", "min_tokens", "tensors"}), None),
    (DIFF, frozenset({"before", "after", "changes", "roles"}), None),
    (GGUF, frozenset({"stored", "metadata", "tensors"}), None),
    (FIT, frozenset({"answers", "tensor_bytes", "cache_bytes"}), None),
    (SIZES, frozenset({"recipes", "layout", "model"}), None),
)


class Document(NamedTuple):
    """The content of one section of a page."""

    kind: str
    name: str
    data: Mapping[str, Any]
    catalogue: Catalogue | None = None
    """for a plan made here, or a GGUF"""
    plan: Plan | None = None


def read(source: str, min_tokens: int, progress: Callable[[int], None]) -> Document | None:
    """Read a file's content; None if it is a model that needs a recipe, or no file. Raises SourceError, ImatrixError,
    KernelError."""
    path = Path(source)
    try:
        if not path.is_file():
            return None
        with path.open("rb") as f:
            first = f.read(64)
        if first.startswith(_SQLITE):
            return Document(STUDY, source, cleaned(_study(path)))
        if is_gguf(path):
            kvs = {item.key: item for item in read_header(path).kvs}
            kind = decode(kvs["general.type"]) if "general.type" in kvs else ""
            return _imatrix(source, min_tokens, progress) if kind == "imatrix" else None
        if path.suffix.lower() == ".dat":
            return _imatrix(source, min_tokens, progress)
        if path.suffix.lower() in (".safetensors", ".yaml", ".yml"):
            return None
        return _json(path)
    except OSError as e:
        raise SourceError(f"{source}: cannot be read: {e.strerror or e}") from None


def _study(path: Path) -> dict[str, Any]:
    from ..lab import require_torch

    require_torch()
    from ..lab.studies.report import show_json
    from ..lab.studies.results import Results

    with Results(path, read_only=True) as results:
        return show_json(list(results.of()))


def _imatrix(source: str, min_tokens: int, progress: Callable[[int], None]) -> Document:
    from ..imatrix.coverage import cover
    from ..imatrix.matrix import open_imatrix

    return Document(IMATRIX, source, cleaned(cover(open_imatrix(source), min_tokens, progress).to_json()))


def _json(path: Path) -> Document | None:
    try:
        text = text_within(path, _MAX_BYTES)
    except UnicodeDecodeError:
        _none(path, "is neither a GGUF, an importance matrix, results of a study nor JSON")
    if text is None:
        _none(path, f"has more than {_MAX_BYTES:,} bytes, and JSON of a command has fewer")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as e:
        _none(path, f"is neither a GGUF, an importance matrix, results of a study nor JSON ({e})")
    if not isinstance(said, dict):
        _none(path, "is JSON, but of none of the commands whose --json can be drawn")
    for kind, keys, version in _KEYS:
        if keys <= said.keys():
            if version is not None and said[next(iter(keys))] != version:
                found = said[next(iter(keys))]
                raise SourceError(
                    f"{path}: is the JSON of {_a(kind)} of version {found!r:.20}, and this quantkit knows version "
                    f"{version}; make it again"
                )
            return Document(kind, str(path), _sound(path, kind, said))
    if "model_type" not in said and "architectures" not in said:
        _none(path, "is JSON, but of none of the commands whose --json can be drawn")
    return None


def _sound(path: Path, kind: str, said: dict[str, Any]) -> dict[str, Any]:
    if kind == SENSITIVITY and "shares" not in said:  # the file itself, which has the errors of each tensor
        from ..lab.allocation.damage import read_sensitivity
        from ..lab.allocation.damage_report import sensitivity_json

        said = {**said, **sensitivity_json(read_sensitivity(path))}
    try:
        found: dict[str, Any] = cleaned(said)
    except (ValueError, RecursionError) as e:
        damaged(str(path), kind, e)
    return found


def _none(path: Path, why: str) -> NoReturn:
    raise SourceError(
        f"{path}: {why}; give a GGUF, an importance matrix, the file of a study or a sensitivity, what plan, eval, "
        "optimize, recipe diff, inspect, fit, which or sizes table printed as JSON, or a model with --recipe"
    )


def damaged(name: str, kind: str, why: Exception) -> NoReturn:
    """Raise SourceError for a document whose content does not match its kind."""
    said = f"{type(why).__name__} {why}" if isinstance(why, KeyError | IndexError) else str(why)
    raise SourceError(f"{name}: is damaged, or not {_a(kind)}: {said}; make it again") from None


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeio" else f"a {kind}"


# ---------------------------------------------------------------- what is made here


def of_plan(made: Plan, name: str) -> Document:
    """A plan as `quantkit plan --json` prints it."""
    from ..imatrix.matrix import Imatrix
    from ..planning.file_layout import lay_out, output_kvs

    weights = made.imatrix if isinstance(made.imatrix, Imatrix) else None
    nbytes = sum(f.nbytes for f in lay_out(made, output_kvs(made, weights), None))
    return Document(PLAN, name, cleaned(made.to_json(nbytes)), made.catalogue, made)


def of_gguf(catalogue: Catalogue, source: str) -> Document:
    """A GGUF as `quantkit inspect --json` prints it."""
    from ..model.open import describe_stored
    from ..planning.report import inspection

    paths = [str(p) for p in catalogue.source.files] if catalogue.source else [source]
    return Document(GGUF, source, cleaned(inspection(catalogue, describe_stored(catalogue), paths)), catalogue)


def of_difference(before: Plan, after: Plan) -> Document:
    """Two plans as `quantkit recipe diff --json` prints them."""
    from ..authoring.review import diff

    name = f"{before.recipe.name} and {after.recipe.name}"
    return Document(DIFF, name, cleaned(diff(before, after).to_json()))


def of_sizes(catalogue: Catalogue) -> Document:
    """The size table as `quantkit sizes table` prints it in JSON: of the shipped recipes that have a file, or of all
    mixtures if none is for this arch."""
    from ..authoring.sizes.compare import expand_recipes, size_table
    from ..authoring.sizes.report import size_table as text
    from ..recipe.load import load
    from ..recipe.named import shipped_files

    ours = [name for name in shipped_files() if load(name).is_for(catalogue.arch)]
    names = ours or expand_recipes(("all",), Path())
    rows, notes = size_table(catalogue, [(name, load(name)) for name in names])
    said = json.loads(text(catalogue.model, catalogue.layout, rows, notes, "json"))
    return Document(SIZES, catalogue.model, cleaned(said))


def fit_of(catalogue: Catalogue, plan: Plan | None, gpus: str, context: int) -> Mapping[str, Any]:
    """The fit of a plan, or of a GGUF as it is, as `quantkit fit --json` prints it. Raises ValueError for invalid
    GPUs."""
    from ..base.text import GIB
    from ..planning import fit
    from ..planning.gpus import parse_gpus

    weights = fit.weigh(catalogue, plan, context, "f16")
    found: Mapping[str, Any] = cleaned(fit.to_json(weights, [fit.answer(weights, parse_gpus(gpus), GIB, ())], None))
    return found


def is_stored(catalogue: Catalogue) -> bool:
    """Whether it is a GGUF's catalogue, whose tensors already have their types."""
    return all(bool(t.parts) and t.parts[0].source == t.name for t in catalogue.tensors)


def names(documents: Sequence[Document]) -> str:
    """The title of a page."""
    of = [d for d in documents if d.kind not in (DIFF, SIZES, FIT)] or documents
    every = list(dict.fromkeys(Path(d.name).name or d.name for d in of))
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")

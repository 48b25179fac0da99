"""The files that are published: GGUFs with all their shards, and the manifests and attestations beside them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...base.errors import OutputError, SourceError
from ...base.files import text_within
from ...gguf.header import STRING, decode, read_header
from ...gguf.shards import shard_name, split_name
from ...model.catalogue import Catalogue
from ...model.families.options import Options
from ...model.open import open_model

#: bytes of one file that the Hub takes
LIMIT = 50 * 10**9
STATEMENT = "https://in-toto.io/Statement/v1"
_MAX_PAPER = 1 << 28
CARD = "README.md"


class Paper(NamedTuple):
    """A manifest or an attestation. `digests`: file name -> SHA-256, as it says."""

    path: Path
    kind: str
    digests: Mapping[str, str]
    said: Mapping[str, Any]


class Model(NamedTuple):
    """A GGUF: its files in order, and what is stated of them."""

    title: str
    catalogue: Catalogue
    files: tuple[Path, ...]
    papers: tuple[Paper, ...]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class Parcel:
    models: tuple[Model, ...]
    imatrices: tuple[Path, ...] = ()
    """importance matrices, which are GGUFs too"""

    @property
    def files(self) -> dict[str, Path]:
        """All files by their names in the repository."""
        found = [path for m in self.models for path in m.files] + list(self.imatrices)
        return {p.name: p for p in found} | {q.path.name: q.path for m in self.models for q in m.papers}

    @property
    def titles(self) -> list[str]:
        """The names that an evaluation may have for them."""
        found = [name for m in self.models for name in (m.title, m.files[0].stem)]
        return found + [str(recipe.get("name")) for m in self.models if (recipe := recipe_of(m))]

    @property
    def digests(self) -> dict[str, list[tuple[Path, str]]]:
        """What papers say of a file's SHA-256: name -> (paper, digest)."""
        said: dict[str, list[tuple[Path, str]]] = {}
        for paper in {q.path: q for m in self.models for q in m.papers}.values():
            for name, digest in paper.digests.items():
                said.setdefault(name, []).append((paper.path, digest))
        return said


def gather(given: Sequence[Path]) -> Parcel:
    """What belongs to the given files and folders. Raises SourceError, OutputError for what the Hub does not take."""
    firsts = dict.fromkeys(first for one in given for first in _firsts(one))
    models, imatrices = [], []
    papers: dict[Path, list[Paper]] = {}
    for path in firsts:
        if _is_imatrix(path):
            imatrices.append(path)
            continue
        catalogue = open_model(str(path), Options(pre="(not recognized)", recognize=True, any_kind=True))
        if catalogue.source is None or not all(t.parts and t.parts[0].source == t.name for t in catalogue.tensors):
            raise SourceError(f"{path}: {catalogue.lacks or 'is no GGUF'}")
        files = tuple(catalogue.source.files)
        own = {file.name for file in files}
        if path.parent not in papers:
            papers[path.parent] = _papers(path.parent)
        models.append(
            Model(_title(path), catalogue, files, tuple(q for q in papers[path.parent] if own & q.digests.keys()))
        )
    parcel = Parcel(tuple(models), tuple(imatrices))
    if not models:
        raise SourceError(f"{given[0]}: there is no model in it; give a GGUF, or the folder of one")
    _check(parcel)
    return parcel


def _firsts(given: Path) -> Iterable[Path]:
    """The first shards of what a file or folder is."""
    if not os.path.isdir(given):
        yield _first(given)
        return
    try:
        names = sorted(p for p in given.iterdir() if p.suffix.lower() == ".gguf")
    except OSError as e:
        raise SourceError(f"{given}: cannot be read: {e.strerror or e}") from None
    if not names:
        raise SourceError(f"{given}: there is no GGUF in it; give a GGUF, or the folder of one")
    yield from dict.fromkeys(map(_first, names))


def _first(path: Path) -> Path:
    parts = split_name(path.name)
    first = path if parts is None else path.with_name(shard_name(parts.prefix, 0, parts.n_shards))
    if first != path and not os.path.lexists(first) and parts is not None:
        if os.path.lexists(other := path.with_name(path.name.replace(f"{parts.no:05d}-", "00001-", 1))):
            return other
        raise SourceError(f"{first}: shard 1 of {parts.n_shards} is missing; get it and put it beside {path.name}")
    return first


def _title(path: Path) -> str:
    parts = split_name(path.name)
    return path.stem if parts is None else parts.prefix


def _is_imatrix(path: Path) -> bool:
    try:
        kvs = {item.key: item for item in read_header(path).kvs}
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    kind = kvs.get("general.type")
    return kind is not None and kind.type == STRING and decode(kind) == "imatrix"


def _papers(folder: Path) -> list[Paper]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            text = text_within(path, _MAX_PAPER) if path.is_file() else None
            value = json.loads(text) if text and ("quantkit_manifest" in text or STATEMENT in text) else None
        except (OSError, ValueError, RecursionError):
            continue  # nothing of ours
        paper = _paper(path, value) if isinstance(value, dict) else None
        if paper is not None:
            found.append(paper)
    return found


def _paper(path: Path, value: dict[str, Any]) -> Paper | None:
    try:
        if value.get("quantkit_manifest") == 1:
            return Paper(path, "manifest", {str(f["name"]): str(f["sha256"]) for f in value["files"]}, value)
        if value.get("_type") == STATEMENT:
            digests = {str(s["name"]): str(s["digest"]["sha256"]) for s in value["subject"]}
            return Paper(path, "attestation", digests, value)
    except (KeyError, TypeError, AttributeError):
        return None
    return None


def _check(parcel: Parcel) -> None:
    """Raise OutputError for what cannot be put into one repository."""
    every = [path for m in parcel.models for path in (*m.files, *(q.path for q in m.papers))] + list(parcel.imatrices)
    seen: dict[str, Path] = {}
    for path in every:
        other = seen.setdefault(path.name, path)
        if other != path:
            raise OutputError(f"{path}: has the name of {other}, and both would be one file; rename one of them")
        if not path.name.isprintable() or "\\" in path.name:
            raise OutputError(f"{path}: has a name that the Hub does not take; rename it")
    for model in parcel.models:
        for path in model.files:
            nbytes = path.stat().st_size
            if nbytes > LIMIT:
                # a shard has a header besides its 49 GB of tensors
                command = shlex.join(
                    ["quantkit", "split", str(model.files[0]), str(path.with_name(model.title)), "--max-size", "49G"]
                )
                raise OutputError(
                    f"{path}: has {nbytes:,} bytes, and the Hub takes {LIMIT:,} a file; make shards of it: {command}"
                )


def attestation(model: Model) -> Mapping[str, Any] | None:
    """What the attestation of a model says of how it was built: externalParameters and runDetails."""
    for paper in model.papers:
        if paper.kind == "attestation":
            predicate = paper.said.get("predicate")
            if isinstance(predicate, dict) and isinstance(predicate.get("buildDefinition"), dict):
                return predicate
    return None


def recipe_of(model: Model) -> Mapping[str, Any] | None:
    """What the attestation says of the recipe: its name, text, base and changes."""
    predicate = attestation(model) or {"buildDefinition": {}}
    outside = predicate["buildDefinition"].get("externalParameters")
    recipe = outside.get("recipe") if isinstance(outside, dict) else None
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get("text"), str) else None

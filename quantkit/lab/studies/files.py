"""GGUFs of a study's variants in one folder: each is built once, and an unfinished one is continued.

DIR/STUDY-VARIANT.gguf   a variant
DIR/reference.gguf       the source as BF16, if llama.cpp must run it and it is a checkpoint
DIR/files.json           which file is which variant, and what it is made of
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.errors import OutputError
from ...base.files import text_within
from ...base.outputs import write_text
from ...building.cache import Cache
from ...building.engines.native import NativeEngine
from ...building.identity import identity_of
from ...building.run import prepare, run
from ...forward.stream import Progress
from ...imatrix.matrix import Imatrix
from ...model.catalogue import Catalogue
from ...planning.file_layout import output_kvs
from ...planning.plan import Plan, make_plan
from ...recipe.load import parse
from .record import RECORD
from .study import Variant

_REFERENCE = "reference"
_MOST = 1 << 24
_AS_IT_IS = (
    "name: reference\narch: [any]\nfile_type: BF16\nimatrix: optional\nrules:\n"
    '  - {match: "*", type: BF16, why: "as it is, for llama.cpp"}\n'
)


@dataclass
class StudyFiles:
    """The folder of files (see the module). Raises OutputError if it cannot be used."""

    folder: Path
    study: str
    n_threads: int = 1
    cache: Cache | None = None
    replace: bool = False
    """whether other files that are in the way may be replaced"""
    allow_requantize: bool = True
    _said: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder / RECORD
        try:
            text = text_within(path, _MOST)
            found = json.loads(text or "")
            self._said = found["files"]
        except FileNotFoundError:
            return
        except OSError as e:
            raise OutputError(f"{self.folder}: no files can be built there: {e.strerror or e}") from None
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{path}: is not a record of a study's files; give another folder, or remove it"
            ) from None

    def path_of(self, variant: str) -> Path:
        """The path of a variant's file. Names that differ only in characters unfit for file names are told apart by a
        digest."""
        name = re.sub(r"[^A-Za-z0-9._=-]+", "_", f"{self.study}-{variant}").strip("_")
        if name != f"{self.study}-{variant}".replace(", ", "_"):
            name = f"{name[:120]}-{hashlib.sha256(variant.encode()).hexdigest()[:6]}"
        return self.folder / f"{name}.gguf"

    def build(self, variant: Variant, progress: Progress = lambda what, n_done, n_total: None) -> Path:
        """Build the variant's file unless it exists. Raises what quantkit.building.run raises; OutputError if another
        file has its name."""
        assert variant.plan is not None
        return self._build(self.path_of(variant.name), variant.name, variant.plan, progress, self.cache)

    def reference(self, catalogue: Catalogue, progress: Progress = lambda what, n_done, n_total: None) -> Path:
        """The source as a GGUF: itself, or converted to BF16. Raises what `build` raises."""
        assert catalogue.source is not None
        first = catalogue.source.files[0]
        if first.suffix == ".gguf":
            return first
        plan = make_plan(catalogue, parse(_AS_IT_IS, "reference"))
        return self._build(self.folder / f"{_REFERENCE}.gguf", _REFERENCE, plan, progress)  # needs no cache

    def _build(self, out: Path, name: str, plan: Plan, progress: Progress, cache: Cache | None = None) -> Path:
        matrix = plan.imatrix if isinstance(plan.imatrix, Imatrix) else None
        identity = identity_of(plan, output_kvs(plan, matrix), None, matrix.path if matrix else None)
        if self._is_made(out, identity):
            return out
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{self.folder}: no files can be built there: {e.strerror or e}") from None
        engine = NativeEngine()
        ready = prepare(plan, out, matrix, None, self.replace, self.allow_requantize, engine)
        done = [0, plan.n_elements]

        def show(_tensor: str, n: int) -> None:
            done[0] += n
            progress(f"building {name}", done[0], done[1])

        run(ready, engine, self.n_threads, show, cache)
        s = out.stat()
        self._said[out.name] = {"variant": name, "bytes": s.st_size, "mtime_ns": s.st_mtime_ns, "made_of": identity}
        record = {"quantkit_study_files": 1, "files": self._said}
        write_text(self.folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n", replace=True)
        return out

    def _is_made(self, out: Path, identity: Mapping[str, str]) -> bool:
        of = self._said.get(out.name)
        try:
            s = out.stat()
        except OSError:
            return False
        return isinstance(of, dict) and (of.get("bytes"), of.get("mtime_ns"), of.get("made_of")) == (
            s.st_size, s.st_mtime_ns, dict(identity),
        )  # fmt: skip

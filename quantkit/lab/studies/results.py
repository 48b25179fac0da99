"""Results of studies in one SQLite file, each with its provenance. A stored result is not computed again."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from ...base.errors import OutputError, SourceError
from ...base.version import __version__
from ..evaluation.scores import Scored

_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS results (
    identity TEXT PRIMARY KEY, study TEXT NOT NULL, variant TEXT NOT NULL, levels TEXT NOT NULL, scores TEXT,
    kld_by_chunk BLOB, trouble TEXT NOT NULL, provenance TEXT NOT NULL, made REAL NOT NULL);
"""
_VERSION = "1"


@dataclass(frozen=True)
class Result:
    """A variant's result, or the reason it has none."""

    study: str
    variant: str
    levels: Mapping[str, str]
    scores: Scored | None
    kld_by_chunk: bytes
    """float64, mean KLD of each chunk"""
    trouble: str
    provenance: Mapping[str, Any]


class Results(AbstractContextManager["Results"]):
    """The file of results; with `read_only` it is neither created nor changed. Raises OutputError if it cannot be
    written, SourceError if there is none to read, and for another kind of file."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        if read_only and not path.exists():
            raise SourceError(f"{path}: cannot be read: No such file or directory; quantkit ablate run makes results")
        mode = "ro" if read_only else "rwc"
        try:
            self._db = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode={mode}", timeout=30, uri=True)
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if (tables or read_only) and not {"about", "results"} <= tables:
                self._close("holds other tables than results" if tables else "is empty")
            self._is_new = not tables
            if not tables:
                self._db.executescript(_SCHEMA)
                self._db.execute("INSERT OR IGNORE INTO about VALUES ('quantkit_results', ?)", (_VERSION,))
                self._db.commit()
            found = self._db.execute("SELECT value FROM about WHERE key = 'quantkit_results'").fetchone()
        except sqlite3.DatabaseError as e:
            self._fail(e)
        if found is None:
            self._close("holds other tables than results")
        if found[0] != _VERSION:
            self._db.close()
            raise SourceError(
                f"{path}: has results of version {found[0]:.20}, and this quantkit knows version {_VERSION}; give "
                "another file, or use the quantkit that wrote it"
            )

    def _close(self, why: str) -> NoReturn:
        self._db.close()
        raise SourceError(f"{self.path}: is not a file of results: it {why}; give another name")

    def _fail(self, e: sqlite3.DatabaseError) -> NoReturn:
        if isinstance(e, sqlite3.OperationalError) and not str(e).startswith("no such column"):
            raise OutputError(f"{self.path}: results cannot be kept or read: {e}") from None
        raise SourceError(f"{self.path}: is not a file of results: {e}; give another name") from None

    def __exit__(self, *_: object) -> None:
        """Close the file; delete it if it was created here and nothing was stored."""
        try:
            left = self._is_new and self._db.execute("SELECT count(*) FROM results").fetchone()[0] == 0
        except sqlite3.DatabaseError:
            left = False
        self._db.close()
        if left:
            self.path.unlink(missing_ok=True)

    def get(self, identity: str) -> Result | None:
        """The stored result with this identity, if there is one; failures do not count."""
        found = list(self._rows("WHERE identity = ? AND trouble = ''", (identity,)))
        return found[0] if found else None

    def put(self, identity: str, result: Result) -> None:
        """Store a result for good."""
        scores = None if result.scores is None else json.dumps(asdict(result.scores))
        try:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        identity, result.study, result.variant, json.dumps(dict(result.levels)), scores,
                        result.kld_by_chunk, result.trouble,
                        json.dumps({**result.provenance, "quantkit": __version__}), time.time(),
                    ),
                )  # fmt: skip
        except sqlite3.DatabaseError as e:
            self._fail(e)

    def of(self, study: str | None = None) -> Iterator[Result]:
        """All results, or those of one study, in the order they were stored."""
        return self._rows("WHERE study = ?", (study,)) if study is not None else self._rows("", ())

    def _rows(self, where: str, values: tuple[str, ...]) -> Iterator[Result]:
        try:
            rows = self._db.execute(
                "SELECT study, variant, levels, scores, kld_by_chunk, trouble, provenance FROM results "
                f"{where} ORDER BY made, rowid",
                values,
            ).fetchall()
            for study_, variant, levels, scores, klds, trouble, provenance in rows:
                of = None if scores is None else Scored(**json.loads(scores))
                yield Result(study_, variant, json.loads(levels), of, klds or b"", trouble, json.loads(provenance))
        except sqlite3.DatabaseError as e:
            self._fail(e)
        except (ValueError, TypeError) as e:
            raise SourceError(f"{self.path}: results cannot be read: {e}") from None

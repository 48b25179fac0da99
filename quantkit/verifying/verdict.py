"""Findings, which say what is wrong with a file, where, and what was expected; and the verdict over them."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..base.errors import DamageError

#: findings kept per kind, tensor and file; the others are only counted
KEPT_EACH = 16
#: findings kept in all
KEPT = 10_000

KINDS = (
    "header", "layout", "padding", "length", "shards", "scale", "plan", "metadata", "row", "manifest", "attestation",
    "source",
)  # fmt: skip


class Finding(NamedTuple):
    """One fault of a file."""

    kind: str
    """one of KINDS"""
    file: str
    text: str
    tensor: str = ""
    offset: int | None = None
    """from the start of the file"""
    row: int | None = None
    block: int | None = None
    """of the row"""
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        parts = [self.file] if self.file else []
        if self.tensor:
            parts.append(self.tensor)
        parts.append(self.text)
        line = ": ".join(parts)
        said = [f"{word} {value}" for word, value in (("expected", self.expected), ("found", self.found)) if value]
        if said:
            line += f": {', '.join(said)}"
        return line + (f" (byte {self.offset:,})" if self.offset is not None else "")

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in self._asdict().items() if v not in ("", None)}


class Findings:
    """Collects findings from any thread. Keeps the first KEPT_EACH by place per kind, tensor and file, and KEPT in
    all; which ones does not depend on the order in which threads find them."""

    def __init__(self) -> None:
        self._kept: defaultdict[tuple[str, str, str], list[Finding]] = defaultdict(list)
        self._n_kept = 0
        self._counts: Counter[str] = Counter()
        self._texts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, finding: Finding, times: int = 1) -> None:
        """Add a finding that stands for `times` of its kind."""
        with self._lock:
            self._counts[finding.kind] += times
            if finding.kind in ("plan", "metadata"):
                self._texts[finding.kind, finding.text] += times
            of_its_kind = self._kept[finding.kind, finding.file, finding.tensor]
            bisect.insort(of_its_kind, finding, key=_place)
            self._n_kept += 1
            if len(of_its_kind) > KEPT_EACH:
                del of_its_kind[-1]
                self._n_kept -= 1
            if self._n_kept >= 2 * KEPT:
                self._drop()

    def _drop(self) -> None:
        """Keep only the first KEPT."""
        kept = self._first()
        self._kept.clear()
        for f in kept:
            self._kept[f.kind, f.file, f.tensor].append(f)
        self._n_kept = len(kept)

    def _first(self) -> list[Finding]:
        """The first KEPT by kind, file and place."""
        return sorted(itertools.chain.from_iterable(self._kept.values()), key=_place)[:KEPT]

    @property
    def count(self) -> int:
        return sum(self._counts.values())

    @property
    def n_other_types(self) -> int:
        """The number of tensors whose type is not the plan's."""
        return self._texts["plan", "type"]

    @property
    def tell_of_another_recipe(self) -> bool:
        """Whether the findings are only those of a sound file from another recipe: other types, the sizes that follow
        from them, and keys."""
        return (
            self.n_other_types > 0
            and all(kind in ("plan", "metadata") for kind in self.counts())
            and all(text in ("type", "bytes") for kind, text in self._texts if kind == "plan")
        )

    @property
    def tell_of_other_sources(self) -> bool:
        """Whether the file matches its attestation, and only the given source or matrix does not. Rows and keys that
        differ are then no fault of the file."""
        return self._counts["source"] > 0 and self.counts().keys() <= {"source", "plan", "metadata", "row"}

    def counts(self) -> dict[str, int]:
        """Findings of each kind that occurred."""
        return {kind: self._counts[kind] for kind in KINDS if self._counts[kind]}

    def kept(self) -> list[Finding]:
        """The kept findings, by kind, file and place."""
        with self._lock:
            return self._first()


def _place(finding: Finding) -> tuple[int, str, int, str, int, str]:
    """The sort key of findings."""
    offset, row = finding.offset, finding.row
    return (
        KINDS.index(finding.kind), finding.file, -1 if offset is None else offset, finding.tensor,
        -1 if row is None else row, finding.text,
    )  # fmt: skip


class Progress(Protocol):
    """Receives the start of each stage, and its progress."""

    def start(self, stage: str, total: int, unit: str) -> None: ...
    def advance(self, n: int) -> None: ...


@dataclass
class Verdict:
    """The result of a verification."""

    files: list[tuple[str, int]]
    """(name, bytes) of the files that were read"""
    n_tensors: int
    findings: Findings = field(default_factory=Findings)
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kind: str = ""
    """what the file is if it is no model, such as 'an importance matrix'"""
    recipe: str = ""
    """name of the recipe it was compared with"""
    skipped: bool = False
    """nothing was compared, since a model was asked for and this is none"""

    @property
    def ok(self) -> bool:
        return self.findings.count == 0 and not self.skipped

    @property
    def exit_code(self) -> int:
        """0 if OK, 1 for a sound file that is not the one asked for, DamageError's for a damaged one."""
        if self.ok:
            return 0
        found = self.findings
        sound = found.count == 0 or found.tell_of_another_recipe or found.tell_of_other_sources
        return 1 if sound else DamageError.exit_code

    def line(self) -> str:
        """The verdict in one line."""
        nbytes = sum(n for _, n in self.files)
        n = len(self.files)
        what = f"{n} file{'s' * (n != 1)}, {self.n_tensors:,} tensors, {nbytes:,} bytes"
        if self.skipped and self.findings.count == 0:
            return f"NOT A MODEL: this is {self.kind}, sound in itself: {what}; checked {', '.join(self.checked)}"
        if self.ok:
            of = f"{self.kind}, not a model: " if self.kind else ""
            return f"OK: {of}{what}; checked {', '.join(self.checked)}"
        if self.findings.tell_of_another_recipe:
            return (
                f"ANOTHER RECIPE'S FILE: {self.findings.n_other_types:,} of {self.n_tensors:,} tensors have other "
                f"types than {self.recipe or 'the plan'} gives them; the file is sound in itself: {what}; checked "
                f"{', '.join(self.checked)}"
            )
        if self.findings.tell_of_other_sources:
            return (
                "BUILT FROM OTHER FILES: it is the file of the attestation, but what was given as its source or "
                f"importance matrix is not what it was built from: {what}; checked {', '.join(self.checked)}"
            )
        total = self.findings.count
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.findings.counts().items())
        return f"DAMAGED: {total:,} finding{'s' * (total != 1)} ({kinds}) in {what}; checked {', '.join(self.checked)}"

    def text(self, most: int) -> str:
        """Notes, at most `most` findings, and the verdict last."""
        kept = self.findings.kept()
        lines = [f"note: {note}" for note in self.notes] + [str(f) for f in kept[:most]]
        more = self.findings.count - min(len(kept), most)
        if more > 0:
            lines.append(f"… and {more:,} more")
        return "\n".join([*lines, self.line()])

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "verdict": self.line(),
            "files": [{"name": name, "bytes": n} for name, n in self.files],
            "tensors": self.n_tensors,
            "checked": self.checked,
            "notes": self.notes,
            "counts": self.findings.counts(),
            "findings": [f.to_json() for f in self.findings.kept()],
        }

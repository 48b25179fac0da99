"""Runs a verification from the header to the verdict, at every level for which there is something to compare with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import ImatrixError
from ..gguf.types import QTYPES
from ..imatrix.matrix import Imatrix
from ..planning.gaps import gap_warnings
from ..planning.plan import Plan
from . import against_plan, attestation, evidence, manifest, rounding, structure
from .against_plan import Expected
from .attestation import Attested
from .gguf import Info, kind_of
from .rederive import RowCheck, can_compare, is_zero, rederive
from .scan import Digests, Empty, scan
from .verdict import Finding, Progress, Verdict


@dataclass(frozen=True)
class Request:
    """What to check a file against; with nothing given, only its structure and scales are checked."""

    out: Path
    """the file, or any shard of a set"""
    expected: list[Expected] | None = None
    plan: Plan | None = None
    imatrix: Imatrix | None = None
    ignored_keys: Collection[str] = ()
    rows: RowCheck | None = None
    manifest: dict[str, Any] | None = None
    attested: Attested | None = None
    hash_source: bool = False
    hashing: bool = False
    """compute digests, for writing a manifest"""
    n_threads: int = 1
    recorded: rounding.Recorded | None = None
    """the file's record of tensors that ggml did not round"""


@dataclass
class Outcome:
    verdict: Verdict
    files: structure.Set
    digests: Digests = field(default_factory=Digests)


def verify(request: Request, progress: Progress) -> Outcome:
    """Check a file or a set of shards. Faults of the file become findings of the verdict. Raises SourceError,
    ImatrixError or KernelError only if the check itself is impossible."""
    verdict = Verdict([], 0)
    findings = verdict.findings
    found = structure.check(request.out, findings)
    verdict.files = list(found.names)
    verdict.n_tensors = sum(len(g.tensors) for g in found.files)
    verdict.checked.append("structure")
    verdict.notes += structure.remarks(found.files)
    expected, plan, rows = request.expected, request.plan, request.rows
    first = found.first()
    verdict.notes += rounding.remark(request.recorded)
    verdict.kind = kind_of(first) if first is not None else ""
    if verdict.kind and (expected is not None or plan is not None or rows is not None):
        verdict.skipped = True  # every comparison would only repeat that it is no model
        expected = plan = rows = None
    if plan is not None:
        verdict.recipe = plan.recipe.name
        verdict.notes += gap_warnings(plan.gaps)
    if expected is not None:
        against_plan.check_tensors(found.files, found.whole, expected, findings)
        verdict.checked.append("plan")
    if plan is not None and first is not None:
        against_plan.check_keys(found.files, plan, request.imatrix, request.ignored_keys, verdict)
        verdict.checked.append("metadata")
    if rows is not None:
        _require_imatrix(request, found)
    hashing = request.hashing or request.manifest is not None or request.attested is not None
    empty = Empty()
    digests = scan(found.files, findings, request.n_threads, progress, hashing, empty)
    verdict.checked.append("scales")
    verdict.notes += _of_empty(empty.matrices(found.files), rows)
    if rows is not None:
        if expected is None:
            types = _own_types(request, found, verdict)
        else:
            types = {t.name: t.type for t in expected} | _other_types(found, expected, rows)
        done, total, left_out = rederive(found.files, types, rows, findings, request.n_threads, progress)
        if left_out:
            verdict.notes.append(rounding.not_compared(left_out))
        if rows.on_device is not None:
            verdict.notes += rows.on_device.notes()
        of = f"all {total:,} rows" if done == total else f"{done:,} of {total:,} rows (seed {rows.seed})"
        verdict.checked.append(of)
    if request.manifest is not None:
        manifest.compare(request.manifest, found.files, digests, findings)
        verdict.checked.append("manifest")
    if request.attested is not None:
        _attested(request, request.attested, digests, expected, verdict, progress)
    return Outcome(verdict, found, digests)


_NAMED_TENSORS, _NAMED_MATRICES = 3, 8


def _of_empty(found: list[tuple[Info, list[int]]], rows: RowCheck | None) -> Iterator[str]:
    """A note on matrices whose block scales are all 0, except those that are zeros in the source too."""
    if rows is not None:
        found = [(info, [m for m in numbers if not is_zero(rows, info, m)]) for info, numbers in found]
    some = [(info, numbers) for info, numbers in found if numbers]
    if not some:
        return
    n = sum(len(numbers) for _, numbers in some)
    words = []
    for info, numbers in some[:_NAMED_TENSORS]:
        which = ", ".join(map(str, numbers[:_NAMED_MATRICES])) + (", …" if len(numbers) > _NAMED_MATRICES else "")
        words.append(f"{info.name} {which}" if info.n_rows > info.shape[1] else info.name)
    named = "; ".join(words) + ("; …" if len(some) > _NAMED_TENSORS else "")
    source = "though not in the source" if rows is not None else "which is right only if the source has zeros there"
    experts = all("_exps." in info.name for info, _ in some)
    what = f"expert{'s' * (n > 1)}" if experts else "matrix" if n == 1 else "matrices"
    yield (
        f"all weights are 0 in {n:,} {what} of {len(some):,} tensor{'s' * (len(some) > 1)}, {source}: {named}; an "
        "importance matrix with nothing but zeros for them does that: `quantkit plan --imatrix FILE` names them"
    )


def _other_types(found: structure.Set, expected: list[Expected], rows: RowCheck) -> dict[str, str]:
    """Actual types of tensors whose type is not as expected. Comparing rows by these tells another recipe's file from a
    damaged one."""
    wanted = {t.name: t.type for t in expected}
    return {
        t.name: t.type.name
        for g in found.files
        for t in g.tensors
        if wanted.get(t.name, t.type.name) != t.type.name and can_compare(rows, t.name, t.type.name)
    }


def _require_imatrix(request: Request, found: structure.Set) -> None:
    used = against_plan.uses_imatrix(found.files)
    if used and request.imatrix is None:
        raise ImatrixError(
            f"{request.out}: was made with an importance matrix ({used}), without which its rows cannot be compared; "
            "give it with --imatrix FILE, or --sample none"
        )


def _own_types(request: Request, found: structure.Set, verdict: Verdict) -> dict[str, str]:
    """Without a plan: return the file's own types, and check its names and shapes against the source."""
    assert request.rows is not None
    types = {t.name: t.type.name for g in found.files for t in g.tensors}
    wanted = []
    for t in request.rows.catalogue.tensors:
        qt = QTYPES[types.get(t.name, t.source_type)]
        shape = against_plan.trimmed(t.shape)
        fits = t.n_cols % qt.block == 0
        wanted.append(Expected(t.name, shape, qt.name, qt.row_bytes(t.n_cols) * t.n_rows if fits else 0))
    against_plan.check_tensors(found.files, found.whole, wanted, verdict.findings)
    verdict.notes.append("the types were taken from the file itself: give --recipe or --plan to check them too")
    verdict.checked.append("names and shapes of the source")
    return types


def _attested(
    request: Request, attested: Attested, digests: Digests, expected: list[Expected] | None, verdict: Verdict,
    progress: Progress,
) -> None:  # fmt: skip
    findings = verdict.findings
    attestation.compare_files(attested, digests.files, findings)
    verdict.checked.append("attested digests")
    for name, _ in verdict.files:
        if name not in digests.files:
            findings.add(Finding("attestation", name, "its header is broken, so it was not hashed"))
    if expected is not None:
        attestation.compare_plan(attested, expected, findings)
        verdict.checked.append("attested plan")
    given = request.plan.catalogue if request.plan is not None else request.rows.catalogue if request.rows else None
    source = given.source if given is not None else None
    if source is not None or request.imatrix is not None:
        covariance = None if request.rows is None or request.rows.rounding is None else request.rows.rounding.covariance
        inputs = evidence.Inputs(source, request.imatrix, covariance)
        attestation.compare_sources(attested, inputs, request.hash_source, findings, progress)
        verdict.checked.append("attested sources")
    else:
        verdict.notes.append("the attested source was not looked at: give --source (and --imatrix) to derive again")

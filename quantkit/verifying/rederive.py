"""Makes sampled rows again from the source, and compares them with the file bit for bit.

A row is read from the source, converted to float32 (derive.py), quantized by ggml's own function with its expert's
slice of the importance matrix (ggml.py), and compared with the bytes in the file. Rows are independent: each sampled
row proves itself, and `all` proves the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..base.errors import ImatrixError, KernelError, SourceError
from ..base.workers import share_out
from ..gguf.types import ABORT_WITHOUT_IMATRIX, INTEGER_TYPES, QTYPES
from ..model.catalogue import Catalogue, Source, Tensor
from ..planning.rounding import Rounding
from ..rounding.covariance import NoInputsError
from ..rounding.policy import Choice
from .derive import F32, I64, U8, Deriver
from .ggml import NOT_IN_WHEEL, Ggml
from .gguf import Gguf, Info, read_into
from .on_device import MARGIN, OnDevice
from .rounding import Rounder
from .verdict import KEPT_EACH, Finding, Findings, Progress

#: values per batch: 4 MiB as float32
_BATCH = 1 << 20
_SHOWN = 8
#: the only tensor whose entry may have the wrong size; it then counts as missing (src/llama-quant.cpp)
_EXCUSED = "token_embd.weight"


class Weights(Protocol):
    """An importance matrix whose gaps a policy has filled."""

    @property
    def path(self) -> Path: ...
    def __contains__(self, name: str) -> bool: ...
    def fits(self, name: str, n_cols: int, n_mats: int) -> bool: ...
    def weights(self, name: str, mat: int, n_cols: int) -> F32: ...


class Sample(NamedTuple):
    """How many rows to take: a fraction, or a number; at least one of each matrix."""

    text: str
    fraction: float | None
    n_rows: int | None = None

    def of(self, total_rows: int) -> float:
        """The number of rows as a fraction of `total_rows`."""
        if self.fraction is not None:
            return self.fraction
        return min(1.0, (self.n_rows or 0) / max(1, total_rows))


def parse_sample(text: str) -> Sample:
    """Parse '1%', '0.1%', 'all', or a number of rows. Raises ValueError."""
    said = text.strip().lower()
    if said == "all":
        return Sample(said, 1.0)
    m = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%", said)
    if m and 0 < float(m[1]) <= 100:
        return Sample(said, float(m[1]) / 100)
    m = re.fullmatch(r"([0-9]{1,15})(?:\s*rows)?", said)
    if m and int(m[1]) > 0:
        return Sample(said, None, int(m[1]))
    raise ValueError(f"{text!r:.40} is not a sample such as 1%, 0.1%, all, none, or a number of rows")


def n_chosen(n_rows: int, fraction: float) -> int:
    """The number of rows taken from a matrix of `n_rows`: at least one."""
    return min(n_rows, max(1, round(fraction * n_rows)))


def choose(n_rows: int, fraction: float, seed: int, name: str, mat: int) -> I64:
    """Indices of the rows taken from a matrix of `n_rows`, ascending. The matrix is divided into as many equal
    stretches as there are rows to take, and each gives one, so that no part is missed."""
    n = n_chosen(n_rows, fraction)
    if n == n_rows:
        return np.arange(n_rows)
    edges = np.arange(n + 1, dtype=np.int64) * n_rows // n
    rng = np.random.default_rng([seed, mat, *name.encode()])
    return edges[:-1] + rng.integers(0, np.diff(edges))


@dataclass(frozen=True)
class RowCheck:
    """What to compare rows with, and which rows."""

    catalogue: Catalogue
    source: Source
    imatrix: Weights | None
    ggml: Ggml
    sample: Sample
    seed: int
    rounding: Rounding | None = None
    """how tensors were rounded that ggml did not round"""
    rounder: Rounder | None = None
    """makes the rows of those tensors again; without it they are left out"""
    on_device: OnDevice | None = None
    """counts how rows that a device rounded differ from the CPU's; None if none did"""

    def by_rounder(self, name: str, mat: int) -> Choice | None:
        """The rounding of a matrix; None if ggml rounds it."""
        choice = None if self.rounding is None else self.rounding.of(name)
        return None if self.rounding is None or self.rounding.is_thin(name, mat) else choice

    def can_make(self, name: str, mat: int) -> bool:
        """Whether rows of a matrix can be made again."""
        return self.rounder is not None or self.by_rounder(name, mat) is None


class _Batch(NamedTuple):
    """Rows of one matrix of a tensor, numbered from the tensor's first."""

    g: Gguf
    info: Info
    tensor: Tensor
    mat: int
    rows: I64


def check_imatrix(rows: RowCheck, types: Mapping[str, str]) -> None:
    """Raise ImatrixError if a required entry is missing or does not fit; KernelError if this ggml cannot make a type.
    `types`: tensor name -> type."""
    for t in rows.catalogue.tensors:
        type_ = types.get(t.name)
        if type_ is None or type_ == t.source_type:
            continue
        rows.ggml.require(type_)
        entry = rows.imatrix is not None and t.name in rows.imatrix
        n_mats = prod(t.shape[2:])
        if entry and rows.imatrix is not None and not rows.imatrix.fits(t.name, t.n_cols, n_mats):
            if t.name != _EXCUSED:
                raise ImatrixError(
                    f"{rows.imatrix.path}: the entry of '{t.name}' does not fit its {n_mats:,} x {t.n_cols:,} values; "
                    "is it of this model and layout?"
                )
            entry = False
        if not entry and type_ in ABORT_WITHOUT_IMATRIX:
            given = f"and {rows.imatrix.path} has no entry for it" if rows.imatrix else "give it with --imatrix FILE"
            raise ImatrixError(f"'{t.name}' as {type_} needs an importance matrix to be compared; {given}")


def can_compare(rows: RowCheck, name: str, type_: str) -> bool:
    """Whether rows of a tensor can be made in a type, with the given importance matrix."""
    tensor = next((t for t in rows.catalogue.tensors if t.name == name), None)
    if tensor is None or type_ not in QTYPES or type_ in INTEGER_TYPES or tensor.n_cols % QTYPES[type_].block:
        return False
    if type_ in NOT_IN_WHEEL and not rows.ggml.pinned:
        return False
    if rows.imatrix is None or name not in rows.imatrix:
        return type_ not in ABORT_WITHOUT_IMATRIX
    return rows.imatrix.fits(name, tensor.n_cols, prod(tensor.shape[2:]))


def rederive(
    files: Sequence[Gguf],
    types: Mapping[str, str],
    rows: RowCheck,
    findings: Findings,
    n_threads: int,
    progress: Progress,
) -> tuple[int, int, dict[str, int]]:
    """Compare the sampled rows of every tensor that has its expected type (`types`: name -> type) and the source's
    shape. Returns (rows compared, rows in all, sampled rows left out by tensor). Raises SourceError, ImatrixError or
    KernelError if the comparison itself is impossible."""
    check_imatrix(rows, types)
    by_name = {t.name: t for t in rows.catalogue.tensors}
    pairs: list[tuple[Gguf, Info, Tensor]] = []
    done: set[str] = set()
    for g in files:
        for info in g.tensors:
            t = by_name.get(info.name)
            if t is None or types.get(info.name) != info.type.name or prod(t.shape) != prod(info.shape):
                continue  # already a finding
            if t.n_cols == info.shape[0] and info.end <= g.nbytes and info.name not in done:
                pairs.append((g, info, t))
                done.add(info.name)
    total = sum(t.n_rows for t in by_name.values())
    fraction = rows.sample.of(total)
    mats = {t.name: [m for m in range(prod(t.shape[2:])) if rows.can_make(t.name, m)] for _, _, t in pairs}
    n_sampled = {t.name: len(mats[t.name]) * n_chosen(_mat_rows(t), fraction) for _, _, t in pairs}
    left_out = {t.name: prod(t.shape[2:]) * n_chosen(_mat_rows(t), fraction) - n_sampled[t.name] for _, _, t in pairs}
    progress.start("rows", sum(n_sampled[t.name] * t.n_cols for _, _, t in pairs), "w")

    def batches() -> Iterator[_Batch]:
        for g, info, t in pairs:
            step = max(1, _BATCH // t.n_cols)
            for mat in mats[t.name]:
                chosen = mat * _mat_rows(t) + choose(_mat_rows(t), fraction, rows.seed, t.name, mat)
                for at in range(0, len(chosen), step):
                    yield _Batch(g, info, t, mat, chosen[at : at + step])

    def make() -> Callable[[_Batch], None]:
        worker = _Worker(rows, findings)

        def do(batch: _Batch) -> None:
            worker.compare(batch)
            progress.advance(len(batch.rows) * batch.tensor.n_cols)

        return do

    share_out(batches(), n_threads, make)
    return sum(n_sampled.values()), total, {name: n for name, n in left_out.items() if n}


def _mat_rows(t: Tensor) -> int:
    """Rows of each matrix of a tensor."""
    return t.shape[1] if len(t.shape) > 1 else 1


class _Worker:
    def __init__(self, rows: RowCheck, findings: Findings) -> None:
        self.rows, self.findings = rows, findings
        self.deriver = Deriver(rows.source, rows.ggml)

    def compare(self, batch: _Batch) -> None:
        info, tensor = batch.info, batch.tensor
        due = self._due(batch)
        if isinstance(due, str):
            row = int(batch.rows[0])
            text = f"{info.place(row)} and on cannot be derived: {due}"
            self.findings.add(Finding("row", batch.g.name, text, tensor.name, row=row), len(batch.rows))
            return
        there = _stored(batch, due.shape[1])
        bad = np.flatnonzero((there != due).any(axis=1))
        choice = self.rows.by_rounder(batch.tensor.name, batch.mat)
        if self.rows.on_device is not None and choice is not None:
            self.rows.on_device.add(len(due), due.shape[1] // info.type.block_bytes)
            bad = bad[self._no_better(batch, bad, due[bad], there[bad], choice, self.rows.on_device)]
        for nth, i in enumerate(bad[: KEPT_EACH + 1]):  # the last one stands for all that are not kept
            times = 1 if nth < KEPT_EACH else len(bad) - KEPT_EACH
            self._differs(batch, int(batch.rows[i]), due[i], there[i], times)

    def _no_better(
        self, batch: _Batch, numbers: I64, due: U8, there: U8, choice: Choice, counts: OnDevice
    ) -> npt.NDArray[np.bool_]:
        """Of rows of the batch that are not the CPU's, which are no better than ggml's, so that no build keeps them.
        The others are counted."""
        if not len(numbers) or self.rows.rounder is None:
            return np.ones(len(numbers), np.bool_)
        type_ = batch.info.type.name
        values = self.deriver.rows(batch.tensor, batch.rows[numbers])
        stock = self.rows.ggml.quantize(values, type_, self._weights(batch))
        assert not isinstance(stock, str)  # it made them before
        matrix = (batch.tensor.name, batch.mat)
        of_file, of_cpu, of_ggml = (
            self.rows.rounder.output_errors(values, np.ascontiguousarray(b), type_, matrix, choice)
            for b in (there, due, stock)
        )
        kept = (there == stock).all(axis=1) | (of_file < of_ggml * (1 + MARGIN))
        n_blocks = (due != there).reshape(len(due), -1, batch.info.type.block_bytes).any(-1).sum(-1)
        counts.add_others(int(kept.sum()), int(n_blocks[kept].sum()), of_file[kept].sum(), of_cpu[kept].sum())
        no_better: npt.NDArray[np.bool_] = ~kept
        return no_better

    def _due(self, batch: _Batch) -> U8 | str:
        """The bytes that the rows must have, or the reason they cannot be derived."""
        type_ = batch.info.type.name
        copy = self.deriver.stored(batch.tensor, batch.rows, type_)
        if copy is not None:
            return copy
        values = self.deriver.rows(batch.tensor, batch.rows)
        due = self.rows.ggml.quantize(values, type_, self._weights(batch))
        choice = self.rows.by_rounder(batch.tensor.name, batch.mat)
        if choice is None or self.rows.rounder is None or isinstance(due, str):
            return due
        try:
            self.rows.rounder.improve(values, due, type_, (batch.tensor.name, batch.mat), choice)
        except (KernelError, NoInputsError) as e:  # no build can have made this, whatever the file claims
            return str(e)
        return due

    def _weights(self, batch: _Batch) -> F32 | None:
        imatrix, t = self.rows.imatrix, batch.tensor
        if imatrix is None or t.name not in imatrix or not batch.info.type.uses_imatrix:
            return None
        if not imatrix.fits(t.name, t.n_cols, prod(t.shape[2:])):
            return None
        return np.ascontiguousarray(imatrix.weights(t.name, batch.mat, t.n_cols), np.float32)

    def _differs(self, batch: _Batch, row: int, due: U8, there: U8, times: int) -> None:
        info, qt = batch.info, batch.info.type
        choice = self.rows.by_rounder(batch.tensor.name, batch.mat)
        maker = "ggml" if choice is None else f"quantkit's {choice.rounding} rounding"
        differ = np.flatnonzero(due != there)
        blocks = np.unique(differ // qt.block_bytes)
        block = int(blocks[0])
        at = int(differ[0])
        begin = info.start + row * len(due)
        unit = "column" if qt.block == 1 else "block"
        more = f" and {len(blocks) - 1:,} more" if len(blocks) > 1 else ""
        self.findings.add(
            Finding(
                "row", batch.g.name,
                f"{info.place(row)}, {unit} {block:,}{more} of {len(due) // qt.block_bytes:,}: {qt.name} bytes are not "
                f"what {maker} makes of the source",
                info.name, begin + at, row, block, due[at : at + _SHOWN].tobytes().hex(),
                there[at : at + _SHOWN].tobytes().hex(),
            ),
            times,
        )  # fmt: skip


def _stored(batch: _Batch, row_bytes: int) -> U8:
    """The rows as stored in the file, uint8 [n_rows, row_bytes]."""
    out = np.empty((len(batch.rows), row_bytes), np.uint8)
    runs: list[npt.NDArray[np.intp]] = np.split(
        np.arange(len(batch.rows)), np.flatnonzero(np.diff(batch.rows) != 1) + 1
    )
    try:
        fd = os.open(batch.g.path, os.O_RDONLY)
        try:
            for run in runs:
                at = batch.info.start + int(batch.rows[run[0]]) * row_bytes
                part = out[run[0] : run[-1] + 1]
                done = read_into(fd, at, part)
                if done < part.nbytes:
                    raise SourceError(f"{batch.g.path}: ends at {at + done:,}; it has changed since it was opened")
        finally:
            os.close(fd)
    except OSError as e:
        raise SourceError(f"{batch.g.path}: cannot be read: {e.strerror or e}") from None
    return out


def is_zero(rows: RowCheck, info: Info, mat: int) -> bool:
    """Whether a matrix of a tensor is all zeros in the source; False if the source has no such tensor. Raises
    SourceError."""
    tensor = next((t for t in rows.catalogue.tensors if t.name == info.name), None)
    if tensor is None or prod(tensor.shape) != prod(info.shape):
        return False
    deriver, n = Deriver(rows.source, rows.ggml), info.shape[1]
    step = max(1, _BATCH // tensor.n_cols)
    return not any(
        deriver.rows(tensor, np.arange(row, min(row + step, (mat + 1) * n))).any()
        for row in range(mat * n, (mat + 1) * n, step)
    )


def check_source(catalogue: Catalogue) -> Source:
    """The weights of a model. Raises SourceError if only its headers are known."""
    if catalogue.source is None:
        raise SourceError(
            catalogue.lacks
            or f"{catalogue.model}: rows can only be compared with weights, and here is only a header or a config; "
            "give --source DIR or GGUF, or --sample none"
        )
    return catalogue.source

"""Merging importance matrices of one model: sums and counts are added entry by entry, as llama-imatrix does.

Sums are added in float64 and rounded once, so the order of the files affects only the order of the datasets.
llama-imatrix adds in float32: two files give the same bytes, more may differ in the last bit. If one file's entry has
a single count (a .dat, or an old GGUF), that count is added for each expert of the others.
Source: tools/imatrix/imatrix.cpp (load_imatrix, load_imatrix_legacy).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..base.errors import ImatrixError
from ..gguf.header import KV
from .converting import DEFAULT_CHUNK_SIZE, check_chunk_size, entries_text, further_keys, left_out, lost_in_dat
from .entries import Contents, Entry, Sums
from .matrix import Imatrix
from .write import Facts, Progress, Shape, write_dat, write_gguf

_MAX_CHUNKS = (1 << 32) - 1
#: keys about values that are not added up
_NOT_ADDED = ("imatrix.stats_schema",)


def merge(
    matrices: Sequence[Imatrix], out: Path, *, as_dat: bool, chunk_size: int | None = None, replace: bool = False,
    progress: Progress = lambda _n: None,
) -> tuple[str, ...]:  # fmt: skip
    """Write their sum to `out`. Returns what is lost or assumed, one sentence each.

    `chunk_size` applies to the result, and to any .dat among the files; by default the first that a file records, else
    512. The result has the datasets of all files, in order, and as many chunks as its most used entry saw. in_sum is
    kept for entries for which every file has it; statistics are dropped. Raises ImatrixError if entry sizes differ,
    a file is given twice, or there is only one; OutputError. `out` is then left as it was."""
    if len(matrices) < 2:
        raise ImatrixError("two importance matrices or more can be merged; to rewrite one, convert it")
    check_chunk_size(chunk_size)
    _check_different(matrices)
    sizes = list(dict.fromkeys(m.chunk_size for m in matrices if m.chunk_size))
    size = chunk_size or (sizes[0] if sizes else DEFAULT_CHUNK_SIZE)
    shapes = [_shape(name, matrices) for name in sorted({n for m in matrices for n in m.entries}, key=str.encode)]
    most = max(sum(_most(m, m.entries[s.name], size) for m in matrices if s.name in m) for s in shapes)
    datasets = tuple(d for m in matrices for d in m.datasets)
    facts = Facts(datasets, min(int(most) // size, _MAX_CHUNKS), size, _further(matrices))
    entries = (_add([(m, m.sums(s.name)) for m in matrices if s.name in m], s, size) for s in shapes)
    notes = _notes(matrices, shapes, sizes, size, chunk_size is not None)
    if as_dat:
        counted = {s.name: Entry(0, 0, tuple(range(s.n_mats)), 0 if s.has_in_sum else None) for s in shapes}
        n = write_dat(out, facts, entries, shapes, replace=replace, progress=progress)
        notes += lost_in_dat(Contents(counted, datasets), n)
    else:
        write_gguf(out, facts, entries, shapes, replace=replace, progress=progress)
    return tuple(notes)


def _check_different(matrices: Sequence[Imatrix]) -> None:
    seen: dict[tuple[int, int], Imatrix] = {}
    for m in matrices:
        info = os.stat(m.path)
        first = seen.setdefault((info.st_dev, info.st_ino), m)
        if first is not m:
            also = "" if first.path == m.path else f", as {first.path} before"
            raise ImatrixError(f"{m.path}: is given twice{also}; its tokens would count twice: give it once")


def _shape(name: str, matrices: Sequence[Imatrix]) -> Shape:
    """Return the entry's shape in the result. Raises ImatrixError if two files disagree."""
    having = [m for m in matrices if name in m]
    first = having[0]
    n_values, n_mats = first.entries[name].n_values, 1
    counted = first
    for m in having:
        entry = m.entries[name]
        if entry.n_values != n_values:
            raise ImatrixError(
                f"{m.path}: entry '{name}' has {entry.n_values:,} values, and {n_values:,} in {first.path}; merge only "
                "files of one model"
            )
        if entry.n_mats > 1 and n_mats not in (1, entry.n_mats):
            raise ImatrixError(
                f"{m.path}: entry '{name}' counts {entry.n_mats:,} experts, and {n_mats:,} in {counted.path}; merge "
                "only files of one model"
            )
        if entry.n_mats > n_mats:
            n_mats, counted = entry.n_mats, m
    return Shape(name, n_mats, n_values // n_mats, all(m.entries[name].sum_offset is not None for m in having))


def _most(matrix: Imatrix, entry: Entry, chunk_size: int) -> float:
    return max(entry.counts) * (chunk_size if matrix.is_dat else 1)


def _add(of_files: Sequence[tuple[Imatrix, Sums]], shape: Shape, chunk_size: int) -> Sums:
    dims = (shape.n_mats, shape.n_cols)
    in_sum2, counts = np.zeros(dims), np.zeros(shape.n_mats)
    in_sum = np.zeros(dims) if shape.has_in_sum else None
    for matrix, entry in of_files:
        scale = chunk_size if matrix.is_dat else 1
        values = entry.in_sum2.reshape(dims)
        in_sum2 += values if scale == 1 else values * np.float64(scale)
        counts += entry.counts * scale  # one for all, or one each
        if in_sum is not None and entry.in_sum is not None:
            in_sum += entry.in_sum.reshape(dims)
    return Sums(shape.name, in_sum2, counts, in_sum)


def _further(matrices: Sequence[Imatrix]) -> tuple[KV, ...]:
    """Return the keys that have the same value in every GGUF that has them."""
    found: dict[str, set[KV]] = {}
    for m in matrices:
        for item in further_keys(m.contents.kvs):
            if item.key not in _NOT_ADDED:
                found.setdefault(item.key, set()).add(item)
    return tuple(one for values in found.values() if len(values) == 1 for one in values)


def _notes(
    matrices: Sequence[Imatrix], shapes: Sequence[Shape], sizes: Sequence[int], size: int, is_given: bool
) -> list[str]:
    notes = []
    if len(sizes) > 1:
        told = ", ".join(f"{n:,}" for n in sizes)
        notes.append(
            f"the files have chunks of {told} tokens; those of the result have {size:,}"
            f"{'' if is_given else ' (--chunk-size)'}"
        )
    elif is_given and sizes and sizes[0] != size:
        notes.append(f"the files have chunks of {sizes[0]:,} tokens; those of the result have {size:,}")
    for m in matrices:
        if m.is_dat:
            notes.append(
                f"{m.path} is a .dat, which says neither how many tokens its chunks have nor how many each expert saw: "
                f"{size:,} a chunk are taken{'' if is_given else ' (--chunk-size)'}, for every expert"
            )
    if n := sum(any(s.name not in m for m in matrices) for s in shapes):
        notes.append(f"{n:,} of {len(shapes):,} entries are not in all files")
    if n := sum(_loses_sums(s, matrices) for s in shapes):
        notes.append(f"in_sum is left out of {entries_text(n)}, which not all files have it of")
    if any(e.stats is not None for m in matrices for e in m.entries.values()):
        notes.append("llama-imatrix's statistics are left out: they cannot be added up, and no quantizer reads them")
    others: Mapping[str, None] = {name: None for m in matrices for name in m.contents.others}
    return notes + left_out(Contents({}, others=tuple(others)))


def _loses_sums(shape: Shape, matrices: Sequence[Imatrix]) -> bool:
    return not shape.has_in_sum and any(
        m.entries[shape.name].sum_offset is not None for m in matrices if shape.name in m
    )

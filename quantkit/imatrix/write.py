"""Writing importance matrices in both formats as llama-imatrix does: one entry at a time, in any order; a file is
written completely or not at all.

The input is an iterable of `Sums`, which may compute them lazily; one at a time is in memory. With `shapes`, each goes
straight to its place in the file; without, entries are kept in a temporary file beside the output until the last has
come. Sums may be float64; they are rounded to float32 here, once.
"""

from __future__ import annotations

import os
import shlex
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import ImatrixError, OutputError
from ..base.files import write_at
from ..base.outputs import making
from ..gguf.header import KV, MAX_NAME, STRING, U32, header_bytes, is_utf8, kv, kv_array, pad
from . import scaling
from .entries import Sums

#: called for each entry with the number of bytes of its sums of squares
Progress = Callable[[int], None]
_LARGEST = (1 << 31) - 1


def check_name(out: Path) -> None:
    """Raise OutputError if a GGUF would get a name of the older format."""
    if out.suffix.lower() == ".dat":
        made, quoted = out.with_suffix(".gguf"), shlex.quote
        raise OutputError(
            f"{out}: is named like the older format, but a GGUF is made, which holds more; give {made}, and then, if "
            f"need be: quantkit imatrix convert {quoted(str(made))} -o {quoted(str(out))}"
        )


class Shape(NamedTuple):
    """What is known about an entry before its values."""

    name: str
    n_mats: int
    """number of counts: experts of a stacked tensor, else 1"""
    n_cols: int
    """values for each count"""
    has_in_sum: bool = False
    n_stats: int = 0


class Facts(NamedTuple):
    """The file's facts about itself."""

    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    """tokens in a chunk"""
    more: tuple[KV, ...] = ()
    """further keys of a GGUF, which follow these"""


def shape_of(entry: Sums) -> Shape:
    """Return an entry's shape. Raises ValueError if its arrays do not fit each other."""
    n_mats, n_cols = entry.in_sum2.shape
    if entry.counts.shape != (n_mats,) or (entry.in_sum is not None and entry.in_sum.shape != (n_mats, n_cols)):
        raise ValueError(f"{entry.name}: in_sum2 {entry.in_sum2.shape}, but counts {entry.counts.shape}, or in_sum")
    return Shape(entry.name, n_mats, n_cols, entry.in_sum is not None, 0 if entry.stats is None else entry.stats.size)


def write_gguf(
    path: Path, facts: Facts, entries: Iterable[Sums], shapes: Iterable[Shape] | None = None, *,
    replace: bool = False, progress: Progress = lambda _n: None,
) -> None:  # fmt: skip
    """Write a GGUF with its entries sorted by name, each as in_sum2, counts, in_sum, stats.

    Raises ImatrixError for a name that is too long, and for values that are not finite, or negative where they are
    sums of squares; OutputError if the file cannot be written, or exists and may not be replaced."""
    with _known(path, entries, shapes) as (known, coming):
        tensors, offsets, at = [], {}, 0
        for shape in known:
            _check_name(shape.name)
            for kind, dims in _tensors_of(shape):
                tensors.append((f"{shape.name}.{kind}", dims, "F32", at))
                offsets[shape.name, kind] = at
                at += pad(4 * dims[0] * (dims[1] if len(dims) > 1 else 1))
        header = header_bytes(_kvs(facts), tensors)
        with making(path, replace, len(header) + at) as fd:
            os.ftruncate(fd, len(header) + at)
            write_at(fd, header, 0)
            for entry in _checked(coming, known):
                for kind, _ in _tensors_of(shape_of(entry)):
                    raw = _float32(entry.name, kind, getattr(entry, kind))
                    write_at(fd, raw.data.cast("B"), len(header) + offsets[entry.name, kind])
                progress(4 * entry.in_sum2.size)


def write_dat(
    path: Path, facts: Facts, entries: Iterable[Sums], shapes: Iterable[Shape] | None = None, *,
    replace: bool = False, progress: Progress = lambda _n: None,
) -> int:  # fmt: skip
    """Write a .dat: entries sorted by name, one count each, the last dataset. llama-quantize gets the same values from
    it as from a GGUF with these entries, to the bit. Returns how many entries needed calls other than llama-imatrix's
    for that. Raises the same errors as `write_gguf`."""
    dataset = facts.datasets[-1].encode("utf-8", "surrogateescape") if facts.datasets else b""
    if not 0 <= facts.chunk_count <= _LARGEST:
        raise ImatrixError(
            f"{path}: {facts.chunk_count:,} chunks are more than a .dat can say ({_LARGEST:,}); write a GGUF"
        )
    n_other = 0
    with _known(path, entries, shapes) as (known, coming):
        offsets, at = {}, 4
        for shape in known:
            if shape.n_mats * shape.n_cols > _LARGEST:
                raise ImatrixError(f"{path}: entry '{shape.name}' is larger than a .dat can say; write a GGUF")
            offsets[shape.name] = at
            at += 12 + len(shape.name.encode()) + 4 * shape.n_mats * shape.n_cols
        end = struct.pack("<ii", facts.chunk_count, len(dataset)) + dataset
        with making(path, replace, at + len(end)) as fd:
            os.ftruncate(fd, at + len(end))
            write_at(fd, struct.pack("<i", len(known)), 0)
            write_at(fd, end, at)
            for entry in _checked(coming, known):
                sums = entry._replace(in_sum2=_float32(entry.name, "in_sum2", entry.in_sum2))
                calls, values, is_theirs = scaling.for_dat(sums, facts.chunk_size)
                n_other += not is_theirs
                name = entry.name.encode()
                head = struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, values.size)
                write_at(fd, head, offsets[entry.name])
                write_at(fd, np.ascontiguousarray(values).data.cast("B"), offsets[entry.name] + len(head))
                progress(values.nbytes)
    return n_other


def _kvs(facts: Facts) -> list[KV]:
    return [
        kv("general.type", STRING, "imatrix"),
        kv_array("imatrix.datasets", STRING, [d.encode("utf-8", "surrogateescape") for d in facts.datasets]),
        kv("imatrix.chunk_count", U32, facts.chunk_count),
        kv("imatrix.chunk_size", U32, facts.chunk_size),
        *facts.more,
    ]


def _tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the kinds of tensors of an entry, with their shapes in ne order."""
    yield "in_sum2", (shape.n_cols, shape.n_mats)
    yield "counts", (1, shape.n_mats)
    if shape.has_in_sum:
        yield "in_sum", (shape.n_cols, shape.n_mats)
    if shape.n_stats:
        yield "stats", (shape.n_stats,)


def _check_name(name: str) -> None:
    most = MAX_NAME - len(".in_sum2")
    if not is_utf8(name) or len(name.encode()) > most:
        raise ImatrixError(
            f"entry '{name}': the name has {len(name.encode('utf-8', 'replace')):,} bytes, and a GGUF has at most "
            f"{most} for it; write a .dat"
        )


def _float32(name: str, kind: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(values, np.float32)
    if kind == "stats":  # llama-imatrix writes NaN where there is nothing to compare with
        return out
    lowest = -np.inf if kind == "in_sum" else 0
    if out.size and not (out.min() >= lowest and np.isfinite(out.min()) and np.isfinite(out.max())):
        bad = out.reshape(-1)[~np.isfinite(out.reshape(-1)) | (out.reshape(-1) < lowest)][0]
        raise ImatrixError(
            f"entry '{name}': a value of {kind} is {bad}, and all must be finite"
            f"{' and not negative' * (lowest == 0)} in float32; nothing was written"
        )
    return out


def _checked(entries: Iterable[Sums], known: Sequence[Shape]) -> Iterator[Sums]:
    """Yield the entries as they come. Raises ValueError unless they are exactly the known ones, each once."""
    waiting: Mapping[str, Shape] = {shape.name: shape for shape in known}
    left = dict(waiting)
    for entry in entries:
        if left.pop(entry.name, None) != shape_of(entry):
            raise ValueError(f"{shape_of(entry)} came for {waiting.get(entry.name)}, or came twice")
        yield entry
    if left:
        raise ValueError(f"{len(left)} entries never came, such as {next(iter(left))!r}")


@contextmanager
def _known(
    path: Path, entries: Iterable[Sums], shapes: Iterable[Shape] | None
) -> Iterator[tuple[list[Shape], Iterable[Sums]]]:
    """Yield the shapes, sorted by the bytes of their names, and the entries."""
    if shapes is not None:
        yield sorted(shapes, key=lambda s: s.name.encode()), entries
        return
    with ExitStack() as stack:
        try:
            spool = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            kept = [_keep(spool, entry) for entry in entries]
            spool.seek(0)
        except OSError as e:
            raise OutputError(f"{path}: cannot be written: {e.strerror or e}") from None
        yield sorted(kept, key=lambda s: s.name.encode()), (_take(spool, shape) for shape in kept)


def _keep(spool: BinaryIO, entry: Sums) -> Shape:
    for kind, values in (("in_sum2", entry.in_sum2), ("in_sum", entry.in_sum), ("stats", entry.stats)):
        if values is not None:
            spool.write(_float32(entry.name, kind, values).data.cast("B"))
    spool.write(np.ascontiguousarray(entry.counts, np.float64).data.cast("B"))
    return shape_of(entry)


def _take(spool: BinaryIO, shape: Shape) -> Sums:
    def read(n: int, dtype: type[Any]) -> npt.NDArray[Any]:
        out = np.empty(n, dtype)
        spool.readinto(out.data.cast("B"))  # type: ignore[attr-defined]
        return out

    n = shape.n_mats * shape.n_cols
    in_sum2 = read(n, np.float32).reshape(shape.n_mats, shape.n_cols)
    in_sum = read(n, np.float32).reshape(shape.n_mats, shape.n_cols) if shape.has_in_sum else None
    stats = read(shape.n_stats, np.float32) if shape.n_stats else None
    return Sums(shape.name, in_sum2, read(shape.n_mats, np.float64), in_sum, stats)

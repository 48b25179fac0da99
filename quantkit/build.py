"""A build, from plan to finished files: every check before the first byte, then an engine, then the names.

Files are made under temporary names beside the output (`.NAME.quantkit-PID`) and get their own only
when all are whole and on disk; whatever ends a build early leaves nothing behind under the real name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .catalogue import Catalogue
from .engines import Engine, Progress, Work
from .errors import OutputError, SourceError, UnsupportedError
from .imatrix import Imatrix
from .layout import FileLayout, file_names, lay_out, output_kvs
from .plan import Plan, check_imatrix
from .qtypes import QTYPES


@dataclass(frozen=True)
class Build:
    """A build that has been checked and can run."""

    plan: Plan
    imatrix: Imatrix | None
    files: tuple[tuple[Path, FileLayout], ...]
    out: Path

    @property
    def file_bytes(self) -> int:
        return sum(layout.nbytes for _, layout in self.files)


def prepare(
    plan: Plan,
    out: Path,
    imatrix: Imatrix | None = None,
    split_max_size: int | None = None,
    force: bool = False,
    allow_requantize: bool = False,
    engine: Engine | None = None,
) -> Build:
    """Check everything that can be checked before the first byte. `engine` is the one that will run, for
    the scratch space it needs. Raises the error of what is wrong: ImatrixError, SourceError,
    OutputError, UnsupportedError."""
    catalogue = plan.catalogue
    if catalogue.source is None:
        raise SourceError(
            f"{catalogue.model}: only the {'header' if catalogue.kvs_complete else 'config'} is known, there are no "
            "weights to build from; give a checkpoint directory or a GGUF"
        )
    check_imatrix(plan, imatrix is not None)
    if imatrix is not None:
        imatrix.check()
    _check_requantize(catalogue, plan, allow_requantize)
    layouts = lay_out(plan, output_kvs(plan, imatrix), split_max_size)
    names = file_names(out, len(layouts), split_max_size is not None)
    files = tuple(zip(names, layouts, strict=True))
    _check_output(catalogue, imatrix, out, names, force)
    need, free = sum(layout.nbytes for layout in layouts), shutil.disk_usage(out.parent).free
    scratch = engine.scratch_bytes(plan) if engine is not None else 0
    if need + scratch > free:
        also = f" and its making {scratch:,} more" if scratch else ""
        need += scratch
        raise OutputError(
            f"{out.parent}: the output needs {need - scratch:,} bytes{also}, but {free:,} are free; free "
            f"{need - free:,} more, or choose another place"
        )
    return Build(plan, imatrix, files, out)


def _check_requantize(catalogue: Catalogue, plan: Plan, allowed: bool) -> None:
    for t in plan.tensors:
        stored = QTYPES[t.tensor.source_type]
        if not stored.is_float and stored.block > 1 and t.type != stored.name and not allowed:
            raise UnsupportedError(
                f"{catalogue.model}: '{t.tensor.name}' is already {stored.name}; quantizing it again to {t.type} loses "
                "quality: build from the original, or allow it with --allow-requantize"
            )


def _check_output(
    catalogue: Catalogue, imatrix: Imatrix | None, out: Path, names: tuple[Path, ...], force: bool
) -> None:
    if out.is_dir() or not out.name:
        raise OutputError(f"{out}: is a directory; give the name of the file to make, such as {out / 'model.gguf'}")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no directory {out.parent}; create it first")
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent}: no permission to write there")
    assert catalogue.source is not None
    used = [*catalogue.source.files, *([imatrix.path] if imatrix else [])]
    for name in {*names, out}:
        if not name.exists():
            continue
        for path in used:
            if path.exists() and name.samefile(path):
                raise OutputError(f"{name}: is a source of this build and would be overwritten; choose another name")
        if name in names and not name.is_file():
            raise OutputError(f"{name}: is no regular file and will not be replaced; choose another name")
        if name in names and not force:
            raise OutputError(f"{name}: exists; choose another name, or replace it with --force")


def run(build: Build, engine: Engine, n_threads: int, progress: Progress) -> None:
    """Run an engine and give the files their names. Raises what the engine raises; the output is then
    as it was before."""
    with _temporary(build) as (scratch, temporary):
        try:
            for (_, layout), path in zip(build.files, temporary, strict=True):
                _create(path, layout)
            pairs = tuple((path, layout) for path, (_, layout) in zip(temporary, build.files, strict=True))
            engine.run(Work(build.plan, pairs, build.imatrix, n_threads, progress, scratch))
            for path in temporary:
                _sync(path)
            # the first shard last: without it the others are not taken for a model
            for path, (name, _) in reversed(list(zip(temporary, build.files, strict=True))):
                os.replace(path, name)
            _sync(build.out.parent)
        except OSError as e:
            raise OutputError(
                f"{build.out}: {e.strerror or e}; nothing was changed: mend that and build again"
            ) from None


@contextmanager
def _temporary(build: Build) -> Iterator[tuple[Path, list[Path]]]:
    scratch = build.out.with_name(f".{build.out.name}.quantkit-{os.getpid()}")
    try:
        try:
            scratch.mkdir()
        except OSError as e:
            raise OutputError(f"{scratch}: cannot be made: {e.strerror or e}; choose another place") from None
        yield scratch, [scratch / name.name for name, _ in build.files]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _create(path: Path, layout: FileLayout) -> None:
    """The file with its header and its full length; the space is reserved where the filesystem can."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _reserve(fd, layout.nbytes)
        os.ftruncate(fd, layout.nbytes)
        done = 0
        while done < len(layout.header):
            done += os.pwrite(fd, layout.header[done:], done)
    finally:
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    """Reserve the space, where the filesystem can. Not os.posix_fallocate: where it cannot, the C
    library writes to every block instead, which for a model takes longer than building it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    done = libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
    if done != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {nbytes:,} bytes cannot be reserved")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""A build, from plan to finished files: every check before the first byte, then an engine, then the names.

Files are made in OUT.partial (quantkit.building.unfinished) and get their own names only when they are whole and on
disk; what a build that ends early leaves there, the next one goes on with.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..base import outputs
from ..base.errors import (
    InternalCheckError,
    KernelError,
    OutputError,
    ResumeError,
    SourceError,
    UnsupportedError,
    WeightError,
)
from ..base.outputs import Output
from ..base.workers import share_out
from ..gguf.types import IK_TYPES, QTYPES
from ..imatrix.matrix import Imatrix
from ..imatrix.policies import Completed
from ..model.catalogue import Catalogue
from ..model.sources.shard_store import Limits, store_of
from ..planning.file_layout import FileLayout, file_names, lay_out, output_kvs
from ..planning.plan import Plan, with_values
from ..planning.rounding import check_covariance
from . import leftovers
from .cache import Cache
from .engines import Engine, Progress, Work
from .folder import fetched, folder_of, held_folder, read_journal
from .identity import FileStat, check_unchanged, identity_of, require_same, stat_of
from .journal import ToldBuild
from .supply import Supply, supply_of
from .unfinished import UnfinishedBuild


@dataclass(frozen=True)
class Build:
    """A build that has been checked and can run."""

    plan: Plan
    imatrix: Imatrix | None
    files: tuple[tuple[Path, FileLayout], ...]
    out: Path
    identity: Mapping[str, str]
    """what the bytes depend on (quantkit.building.identity)"""
    sources: Mapping[Path, FileStat]
    replace: frozenset[Path]
    """names under which a file may be replaced: all with --force, else those of shards that are the unfinished build's
    own"""
    restart: bool
    begun: ToldBuild | None
    """the journal of an unfinished build that this one goes on with"""
    supply: Supply | None = None
    """what comes from there"""

    @property
    def weights(self) -> Completed | None:
        """The importance matrix, completed by the plan's policy."""
        return self.plan.weights

    @property
    def file_bytes(self) -> int:
        return sum(file_layout.nbytes for _, file_layout in self.files)


def prepare(
    plan: Plan,
    out: Path,
    imatrix: Imatrix | None = None,
    split_max_size: int | None = None,
    force: bool = False,
    allow_requantize: bool = False,
    engine: Engine | None = None,
    resume: bool | None = None,
) -> Build:
    """Check everything that can be checked before the first byte. `engine` is the one that will run, for
    the scratch space it needs. An unfinished build of the same output is continued; `resume` True asks for one,
    False starts again. Raises the error of what is wrong: ImatrixError, SourceError, OutputError, ResumeError,
    UnsupportedError."""
    catalogue = plan.catalogue
    if catalogue.source is None:
        raise SourceError(
            catalogue.lacks
            or f"{catalogue.model}: only the {'header' if catalogue.kvs_complete else 'config'} is known, there are no "
            "weights to build from; give a checkpoint directory or a GGUF"
        )
    check_covariance(plan)
    if plan.rounding is not None and engine is not None and not engine.rounds:
        raise UnsupportedError(
            f"the engine {engine.name} only rounds as ggml does, and the plan rounds {len(plan.rounding.choices)} "
            "tensors otherwise; take --engine native, or --rounding ggml"
        )
    store, limits = store_of(catalogue.source), Limits() if engine is None else engine.limits
    if store is not None and limits is None:
        assert engine is not None
        raise UnsupportedError(
            f"{catalogue.model}: the engine {engine.name} reads a whole checkpoint, not one on the Hub; take --engine "
            "native, or fetch it first with `quantkit download` and give its folder"
        )
    here = () if store is not None else catalogue.source.files  # what comes from the Hub is known by its commit
    read = [*here, *([imatrix.path] if imatrix else []), *_covariance_files(plan)]
    sources = {path: stat_of(path) for path in read}
    plan = with_values(plan, imatrix)
    _check_requantize(catalogue, plan, allow_requantize)
    kvs = output_kvs(plan, imatrix)
    file_layouts = lay_out(plan, kvs, split_max_size)
    names = file_names(out, len(file_layouts), split_max_size is not None)
    files = tuple(zip(names, file_layouts, strict=True))
    identity = identity_of(plan, kvs, split_max_size, imatrix.path if imatrix else None)
    _check_names(out, names)
    begun = _begun(out, identity, resume)
    supply = supply_of(plan, limits or Limits(), begun)
    finished = _finished(names, _told(out) if resume is False else begun, folder_of(out))
    replace = frozenset(names if force else finished)
    outputs.check(
        [*read, *_beside(catalogue)],
        [
            Output(folder_of(out), "the unfinished build", is_folder=True, only_compared=True),
            *(Output(name, replace=name in replace) for name in names),
        ],
    )
    scratch = engine.scratch_bytes(plan) if engine is not None else 0
    to_write = [file for file in files if file[0] not in finished]
    _check_space(out, to_write, scratch, 0 if supply is None else supply.most)
    return Build(plan, imatrix, files, out, identity, sources, replace, resume is False, begun, supply)


def _covariance_files(plan: Plan) -> tuple[Path, ...]:
    covariance = None if plan.rounding is None else plan.rounding.covariance
    return () if covariance is None else covariance.files


def _begun(out: Path, identity: Mapping[str, str], resume: bool | None) -> ToldBuild | None:
    """The unfinished build to continue. Raises ResumeError when it is of something else."""
    if resume is False:
        return None
    found = read_journal(out, own=True)
    if found is None or not found.records:
        if resume:
            raise ResumeError(f"{out}: there is no unfinished build to continue; leave out --resume to begin one")
        return None
    require_same(folder_of(out), found.head.identity, identity)
    return found


def _told(out: Path) -> ToldBuild | None:
    """What is there when a build starts again: shards that it has finished are its own, and may be replaced."""
    try:
        return read_journal(out, own=True)
    except ResumeError:
        return None


def _finished(names: tuple[Path, ...], begun: ToldBuild | None, folder: Path) -> set[Path]:
    """The files of an unfinished build that have their names already: all their rows are in its journal."""
    if begun is None:
        return set()
    its = leftovers.whole_files(begun)
    return {path for path in names if path.name in its and not os.path.lexists(folder / path.name)}


def _check_space(out: Path, files: Sequence[tuple[Path, FileLayout]], scratch: int, shards: int) -> None:
    """Raises OutputError when what is still to be written has no room, with so many bytes of `scratch`, and of `shards`
    of the source at a time."""
    need, free = 0, shutil.disk_usage(out.parent).free
    came = 0
    with suppress(OSError, OutputError):
        found = held_folder(out, own=True)
        if found is not None:
            with found:
                came = fetched(found)
    for name, file_layout in files:
        try:
            there = os.stat(folder_of(out) / name.name, follow_symlinks=False).st_blocks * 512
        except OSError:
            there = 0
        need += max(0, file_layout.nbytes - there)
    beside = scratch + max(0, shards - came)
    if need + beside > free:
        also = f" and {'the shards of its source' if shards else 'its making'} {beside:,} more" if beside else ""
        less = ", have fewer shards at a time (--keep)" if shards else ""
        raise OutputError(
            f"{out.parent}: the output needs {need:,} bytes{also}, but {free:,} are free; free "
            f"{need + beside - free:,} more{less}, or choose another place"
        )


def _check_requantize(catalogue: Catalogue, plan: Plan, allowed: bool) -> None:
    for t in plan.tensors:
        if t.tensor.source_type in IK_TYPES:
            raise UnsupportedError(
                f"{catalogue.model}: '{t.tensor.name}' is {t.tensor.source_type}, a type that only ik_llama.cpp can "
                "read; build from the original model"
            )
        stored = QTYPES[t.tensor.source_type]
        if not stored.is_float and stored.block > 1 and t.type != stored.name and not allowed:
            raise UnsupportedError(
                f"{catalogue.model}: '{t.tensor.name}' is already {stored.name}; quantizing it again to {t.type} loses "
                "quality: build from the original, or allow it with --allow-requantize"
            )


def _check_names(out: Path, names: Sequence[Path]) -> None:
    """Names that can be, before anything is looked for under them. Raises OutputError."""
    outputs.check((), [Output(out, is_later=True, suffix=".partial"), *(Output(n, is_later=True) for n in names)])


def _beside(catalogue: Catalogue) -> list[Path]:
    """What else of a checkpoint is read: its config, its tokenizer, and all that lies with them."""
    assert catalogue.source is not None
    folder = catalogue.source.path
    return outputs.files_of_folder(folder) if folder.is_dir() else []


def run(build: Build, engine: Engine, n_threads: int, progress: Progress, cache: Cache | None = None) -> int:
    """Run an engine and give the files their names. Tensors that the cache has come from there, and those made are
    kept there. Returns how many values an earlier run had made. Raises what the engine raises; what was there under the
    names is then as it was, and the exception's `kept` says where the unfinished build is, if it is kept."""
    assert build.plan.catalogue.source is not None
    store = store_of(build.plan.catalogue.source)
    begun = UnfinishedBuild(
        build.out, build.files, build.identity, lambda: check_unchanged(build.sources), build.replace
    )
    try:
        if build.restart:
            leftovers.remove(build.out, [name for name, _ in build.files])
        begun.start(build.restart, n_threads, progress)
        file_layouts = tuple(file_layout for _, file_layout in build.files)
        if store is not None:
            store.keep_in(begun.source_folder())
        with begun.durability.committing():
            if cache is not None:
                _use(cache, build, begun, n_threads, progress)
            work = Work(
                build.plan, file_layouts, begun.sink, build.weights, n_threads, progress, begun.scratch,
                begun.durability.commit, begun.lasting,
            )  # fmt: skip
            engine.run(work)
        begun.finish()
        if cache is not None:
            cache.settle()
    except BaseException as e:
        # with weights or kernels as they are, the same command would end here again
        in_vain = isinstance(e, (WeightError, KernelError, UnsupportedError, InternalCheckError))
        kept = begun.abort(keep=not in_vain)
        said = (
            OutputError(f"{build.out}: {e.strerror or e}; mend that and build again") if isinstance(e, OSError) else e
        )
        said.kept = kept  # type: ignore[attr-defined]
        raise said from said.__cause__
    finally:
        if store is not None:
            store.leave()
    return begun.n_kept


def _use(cache: Cache, build: Build, begun: UnfinishedBuild, n_threads: int, progress: Progress) -> None:
    """Fill what the cache has, and have it keep what is made."""
    sink = begun.sink
    sizes = {t.tensor.name: t.tensor.n_elements for t in build.plan.tensors}
    wanted = [t.tensor.name for t in build.plan.tensors if not sink.has(t.tensor.name, 0, t.tensor.n_rows)]
    keys = cache.keys(build.plan, wanted, build.weights, n_threads)
    made = dict(keys)

    def fill(name: str) -> None:
        if cache.fill(keys[name], name, sink):
            sink.have_whole(name)
            progress(name, sizes[name])
            del made[name]

    share_out(wanted, n_threads, lambda: fill)
    begun.durability.on_whole = lambda name: cache.keep(made[name], name, sink) if name in made else None

"""What a pass reads of a model on the Hub: its shards come to a folder while it runs, and go again.

The folder is PLACE/NAME-COMMIT.partial, held against other runs. What a run leaves there that was killed is used by the
next one of the same commit, after it has been hashed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder
from ..base.text import short_size
from ..building.folder import LOCK, SOURCE, folder_of, owner, take
from ..building.folder import fetched as came
from ..hub import watching
from ..model.catalogue import Catalogue, Source
from ..model.sources.on_demand import OnDemand, Tell
from ..model.sources.safetensors_dir import Checkpoint
from ..model.sources.shard_store import Limits, ShardStore, store_of


@dataclass(frozen=True)
class Fetching:
    """How shards come."""

    place: Path
    """the folder in which theirs is made"""
    limits: Limits = field(default_factory=Limits)
    stays: bool = False
    """what has come stays there after an error or an interruption, for the next run"""
    tell: Tell = watching.step


class Needs(NamedTuple):
    """What a pass over a whole model takes from the Hub."""

    where: str
    """hf://org/repo, and the commit"""
    n_shards: int
    nbytes: int
    """of them, each once"""
    most: int
    """bytes on the disk at a time"""
    folder: Path

    def __str__(self) -> str:
        return (
            f"{self.where}: {short_size(self.nbytes)} in {self.n_shards} shard{'s' * (self.n_shards != 1)} for each "
            f"pass over the model, at most {short_size(self.most)} at a time in {self.folder}"
        )


def needs(catalogue: Catalogue, how: Fetching) -> Needs | None:
    """What the passes take from the Hub; None where the weights are here. Raises OutputError where a shard is larger
    than what is allowed."""
    found = _remote(catalogue)
    if found is None:
        return None
    source, store = found
    used = {part.source for t in catalogue.tensors for part in t.parts}
    tensors = [source.tensors[name] for name in used] + [source.scales[n] for n in used if n in source.scales]
    sizes = sorted((store.size(s) for s in {store.shard(t) for t in tensors} if s), reverse=True)
    limits = how.limits
    if limits.disk is not None and sizes and sizes[0] > limits.disk:
        raise OutputError(
            f"{store.repo.where()}: its largest shard has {sizes[0]:,} bytes, more than the {limits.disk:,} of --keep; "
            f"give --keep {-(-sizes[0] // 10**9)}GB or more"
        )
    most = sum(sizes[: limits.keep])
    return Needs(
        f"{store.repo.where()} at commit {store.repo.commit[:12]}", len(sizes), sum(sizes),
        most if limits.disk is None else min(most, limits.disk), _folder(store, how.place),
    )  # fmt: skip


@contextmanager
def fetched(
    catalogue: Catalogue, how: Fetching, announce: Callable[[str], None] = lambda said: None
) -> Iterator[OnDemand | None]:
    """While the body runs, a model's weights can be read as if they were here. `announce` is told what that takes.
    Nothing happens where they are. Raises OutputError for the folder, ResumeError while another run has it."""
    wanted, found = needs(catalogue, how), _remote(catalogue)
    if wanted is None or found is None:
        yield None
        return
    base = wanted.folder.with_name(wanted.folder.name.removesuffix(".partial"))
    with _raising(wanted.folder):
        how.place.mkdir(exist_ok=True)
        try:
            taken = take(base, ())
        except ResumeError:
            raise ResumeError(
                f"{wanted.folder}: process {owner(base)} has shards of the same repository in it; wait for it, or give "
                "another folder with --shards"
            ) from None
    try:
        with _raising(wanted.folder):
            _check_space(wanted, came(taken.folder))
            inside = _inside(taken.folder)
        announce(str(wanted))
        stays = how.stays
        try:
            with OnDemand(*found, inside, how.limits, how.tell) as brings:
                yield brings
            stays = False
        except BaseException as e:
            stays = stays and came(taken.folder) > 0
            if stays:
                before = [e.kept] if hasattr(e, "kept") and e.kept else []
                said = f"shards that have come are kept in {wanted.folder}"
                e.kept = "\n".join([*before, said])  # type: ignore[attr-defined]
            raise
        finally:
            if not stays:
                with _raising(wanted.folder):
                    _remove(taken.folder)
    finally:
        taken.close()


def origin(catalogue: Catalogue) -> str:
    """The repository and the commit that a model is read from; "" where it is here."""
    found = _remote(catalogue)
    return "" if found is None else f"hf://{found[1].repo.name} at commit {found[1].repo.commit}"


def check_same_origin(catalogue: Catalogue, before: str, folder: Path) -> None:
    """Raises ResumeError where what is unfinished in a folder is of another commit of the repository."""
    repo, at, old = before.partition(" at commit ")
    same_repo, _, now = origin(catalogue).partition(" at commit ")
    if at and repo == same_repo and old != now:
        raise ResumeError(
            f"{repo}: what is unfinished in {folder} is of commit {old}, and the repository is now at {now}; to go on, "
            f"give {repo}@{old}, or remove {folder} to start again"
        )


def files_here(source: Source) -> tuple[Path, ...]:
    """The files that a source is read from; none where they come from the Hub."""
    return source.files if store_of(source) is None else ()


def _remote(catalogue: Catalogue) -> tuple[Checkpoint, ShardStore] | None:
    source = catalogue.source
    store = None if source is None else store_of(source)
    return None if store is None or not isinstance(source, Checkpoint) else (source, store)


def _folder(store: ShardStore, place: Path) -> Path:
    name = store.repo.name.rpartition("/")[2]
    return folder_of(place / f"{name}-{store.repo.commit[:12]}")


def _inside(folder: Folder) -> Path:
    """The folder of shards, made if need be."""
    with folder.sub(SOURCE, 0o700) as inside:
        if not inside.is_own:
            raise OutputError(f"{inside.path}: belongs to another user; have it moved away")
        return inside.path


def _check_space(wanted: Needs, there: int) -> None:
    free, need = shutil.disk_usage(wanted.folder).free, max(0, wanted.most - there)
    if need > free:
        raise OutputError(
            f"{wanted.folder}: the shards need {need:,} bytes, but {free:,} are free; have fewer at a time (--keep), "
            "or give another folder with --shards"
        )


def _remove(folder: Folder) -> None:
    """Everything in the folder, and the folder, the lock last."""
    for name in sorted(folder.names(), key=lambda n: n == LOCK):
        folder.remove(name)
    with suppress(OSError):
        os.rmdir(folder.path)


@contextmanager
def _raising(folder: Path) -> Iterator[None]:
    """An OSError as an OutputError."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"{folder}: {e.strerror or e}; give another folder with --shards") from None

"""What a build takes from the Hub: how much, in which order, and what its bytes depend on there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..base.errors import OutputError, ResumeError
from ..base.journal import Ranges
from ..base.text import short_size
from ..model.catalogue import SourceTensor
from ..model.sources.shard_store import Limits, ShardStore, store_of
from ..planning.plan import Plan
from ..rounding.covariance import is_by_layer
from .journal import ToldBuild, rows_of
from .shard_order import Piece, Visit, most_held, pieces_of, visits

#: the entry of a build's identity that names the repository
KEY = "source"


class Supply(NamedTuple):
    """What is fetched for a build, and how much of it is here at a time."""

    where: str
    """hf://org/repo, and the commit"""
    n_shards: int
    nbytes: int
    """to download, of shards that are fetched again as often as they are"""
    most: int
    """bytes on the disk at a time"""
    held: int
    """bytes in memory at a time, of weights whose scales are in another shard"""
    n_again: int
    """shards that are fetched a second time"""
    with_pass: bool = False
    """the model is computed meanwhile, and shards may come again"""

    def text(self, file_bytes: int) -> str:
        """For people, a line. `file_bytes`: of the output."""
        held = f", and {short_size(self.held)} in memory" if self.held else ""
        least = "at least " if self.with_pass else ""
        again = f" ({self.n_again} of them twice)" if self.n_again else ""
        return (
            f"{least}{short_size(self.nbytes)} in {self.n_shards} shard{'s' * (self.n_shards != 1)}{again} from "
            f"{self.where}; at most {short_size(self.most)} of it on the disk at a time, "
            f"{short_size(self.most + file_bytes)} with the output{held}"
        )


def visits_of(plan: Plan, pieces: Iterable[Piece], store: ShardStore) -> list[Visit]:
    """The shards to visit for these pieces, in order; those that are here first."""
    source = plan.catalogue.source
    assert source is not None
    scales: dict[str, SourceTensor] = getattr(source, "scales", {})
    return visits(pieces, lambda n: (source.tensor(n), scales.get(n)), store.shard, store.whole())


def supply_of(plan: Plan, limits: Limits, begun: ToldBuild | None = None) -> Supply | None:
    """What a build takes from the Hub, or what is left of one that was begun; None where the source is here. Raises
    OutputError where a shard is larger than what is allowed."""
    store = None if plan.catalogue.source is None else store_of(plan.catalogue.source)
    if store is None:
        return None
    rows = {} if begun is None else rows_of(begun)
    pieces = [p for p in pieces_of(plan.tensors) if begun is None or not _is_made(rows, p)]
    order = [visit for visit in visits_of(plan, pieces, store) if visit.shard]
    sizes = [store.size(visit.shard) for visit in order]
    if limits.disk is not None and max(sizes, default=0) > limits.disk:
        largest = order[sizes.index(max(sizes))].shard
        raise OutputError(
            f"{store.repo.where(largest)}: has {max(sizes):,} bytes, more than the {limits.disk:,} of --disk; give "
            f"--disk {-(-max(sizes) // 10**9)}GB or more"
        )
    where = f"{store.repo.where()} at commit {store.repo.commit[:12]}"
    if plan.rounding is not None and is_by_layer(plan.rounding.covariance):
        once = sorted((store.size(shard) for shard in {visit.shard for visit in order}), reverse=True)
        most = sum(once[: limits.keep])
        most = most if limits.disk is None else min(most, limits.disk)
        return Supply(where, len(once), sum(once), most, 0, 0, with_pass=True)
    nbytes = {t.name: t.nbytes for visit in order for t in visit.hold}
    n_again = len(order) - len({visit.shard for visit in order})
    return Supply(
        where, len(order), sum(sizes), limits.most(sizes),
        most_held(order, nbytes.__getitem__), n_again,
    )  # fmt: skip


def _is_made(rows: Mapping[str, Ranges], piece: Piece) -> bool:
    tensor = piece.planned.tensor
    return tensor.name in rows and rows[tensor.name].covers(piece.out_row, tensor.parts[piece.part].out_rows)


def identity_of_source(store: ShardStore) -> dict[str, str]:
    """What a build's bytes depend on, in words that can be compared."""
    repo = store.repo
    return {KEY: f"hf://{repo.name} at commit {repo.commit}", "shards": f"sha256 {store.shards_digest[:12]}"}


def check_not_moved(was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ResumeError where an unfinished build is of another commit of the same repository."""
    before, here = was.get(KEY, ""), now.get(KEY, "")
    repo, at, old = before.partition(" at commit ")
    if not at or before == here or not here.startswith(f"{repo} at commit "):
        return
    raise ResumeError(
        f"{repo}: the unfinished build is of commit {old}, and the repository is now at {here.partition(at)[2]}; to go "
        f"on, give {repo}@{old}, or start again with --restart"
    )

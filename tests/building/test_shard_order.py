"""Shards that come and go: their order, how many at a time, and early ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.base.errors import SourceError
from quantkit.base.workers import share_out
from quantkit.building.shard_order import Piece, Visit, most_held, pieces_of, visits
from quantkit.building.window import Window
from quantkit.model.catalogue import Part, SourceTensor, Tensor, is_quantizable, layer_of, role_of
from quantkit.model.sources.shard_store import Limits
from quantkit.planning.plan import ImatrixStatus, Planned

#: a layer of R1 spans three or four of its shards
R1_SHARD_BYTES = 4_300_000_000


def source(name: str, shard: str, nbytes: int) -> SourceTensor:
    return SourceTensor(name, "F8_E4M3", (nbytes,), Path(shard), 0, nbytes)


def planned(name: str, sources: list[str]) -> Planned:
    parts = tuple(Part(one, (1, 256), 0, 1) for one in sources)
    shape = (256, 1, len(parts)) if len(parts) > 1 else (256, 1)
    tensor = Tensor(name, shape, role_of(name), layer_of(name), is_quantizable(name, shape), "BF16", parts)
    return Planned(tensor, "Q8_0", "Q8_0", 272 * len(parts), "", "", ImatrixStatus.OPTIONAL)


def order_of(
    outputs: list[list[str]],
    tensors: dict[str, tuple[SourceTensor, SourceTensor | None]],
    first: tuple[str, ...] = (),
    max_held: int = 1 << 29,
) -> list[Visit]:
    pieces = pieces_of(planned(f"t{i}.weight", sources) for i, sources in enumerate(outputs))
    return visits(pieces, tensors.__getitem__, lambda t: str(t.file), first, max_held)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[list[str]], dict[str, tuple[SourceTensor, SourceTensor | None]]]:
    n, shard = draw(st.integers(1, 12)), st.sampled_from("abcde")
    tensors: dict[str, tuple[SourceTensor, SourceTensor | None]] = {}
    for i in range(n):
        scale = source(f"w{i}_scale_inv", draw(shard), 4) if draw(st.booleans()) else None
        tensors[f"w{i}"] = source(f"w{i}", draw(shard), draw(st.integers(1, 50))), scale
    names = st.sampled_from(sorted(tensors))
    return draw(st.lists(st.lists(names, min_size=1, max_size=4), min_size=1, max_size=6)), tensors


@given(model=models(), first=st.lists(st.sampled_from("abcde")), max_held=st.integers(0, 100))
def test_everything_is_made_once_from_what_is_there(
    model: tuple[list[list[str]], dict[str, tuple[SourceTensor, SourceTensor | None]]],
    first: list[str],
    max_held: int,
) -> None:
    outputs, tensors = model
    order = order_of(outputs, tensors, tuple(first), max_held)
    held: dict[str, int] = {}
    made: list[tuple[str, int]] = []
    for visit in order:
        for tensor in visit.hold:
            assert str(tensor.file) == visit.shard
            held[tensor.name] = tensor.nbytes
        assert sum(n for name, n in held.items() if not name.endswith("inv")) <= max_held
        for piece in visit.pieces:
            for one in tensors[piece.planned.tensor.parts[piece.part].source]:
                assert one is None or str(one.file) == visit.shard or one.name in held
            made.append((piece.planned.tensor.name, piece.part))
        for name in visit.let_go:
            del held[name]
    assert not held
    assert sorted(made) == sorted((f"t{i}.weight", k) for i, parts in enumerate(outputs) for k in range(len(parts)))
    n_visits = len(order)
    assert n_visits <= 2 * len({visit.shard for visit in order})
    if max_held == 100 and sum(w.nbytes for w, _ in tensors.values()) <= 100:
        assert n_visits == len({visit.shard for visit in order})  # with enough memory, no shard comes twice
    if n_visits == len({visit.shard for visit in order}) and max_held == 100:
        there = [visit.shard in first for visit in order]
        assert there == sorted(there, reverse=True)  # shards that are already there come first


def deepseek_r1() -> tuple[list[list[str]], dict[str, tuple[SourceTensor, SourceTensor | None]], dict[str, int]]:
    """Layers 3 to 9 of R1 in the order of its checkpoint, cut into shards wherever one is full, even between a weight
    and its scales; only the experts' tensors."""
    stored: list[tuple[str, int]] = []
    outputs = []
    for layer in range(3, 10):
        for expert in range(256):
            for kind in ("gate", "up", "down"):
                name = f"{layer}.{expert}.{kind}"
                stored += [(name, 2048 * 7168), (f"{name}_scale_inv", 4 * 16 * 56)]
        outputs += [[f"{layer}.{expert}.{kind}" for expert in range(256)] for kind in ("down", "gate", "up")]
    sizes: dict[str, int] = {}
    of: dict[str, SourceTensor] = {}
    at = 0
    for name, nbytes in stored:
        if sizes.get(f"{at:05d}", 0) + nbytes > R1_SHARD_BYTES:
            at += 1
        sizes[f"{at:05d}"] = sizes.get(f"{at:05d}", 0) + nbytes
        of[name] = source(name, f"{at:05d}", nbytes)
    tensors: dict[str, tuple[SourceTensor, SourceTensor | None]] = {
        n: (t, of[f"{n}_scale_inv"]) for n, t in of.items() if not n.endswith("inv")
    }
    return outputs, tensors, sizes


def test_of_deepseek_r1_no_shard_comes_twice_with_one_at_a_time() -> None:
    outputs, tensors, sizes = deepseek_r1()
    order = order_of(outputs, tensors)
    assert [visit.shard for visit in order] == sorted(sizes)
    assert Limits(1).most([sizes[v.shard] for v in order]) <= R1_SHARD_BYTES
    assert most_held(order, lambda name: tensors[name][0].nbytes if name in tensors else 3584) < 30_000_000
    # a layer's tensors are complete when its last shard has been visited
    last = {}
    for i, visit in enumerate(order):
        for piece in visit.pieces:
            last[piece.planned.tensor.name] = i
    for number, parts in enumerate(outputs):
        shards = {str(one.file) for part in parts for one in tensors[part] if one is not None}
        assert last[f"t{number}.weight"] == max(int(shard) for shard in shards)


def test_how_much_is_on_the_disk_at_a_time() -> None:
    assert Limits(1).most([5, 3, 4, 1]) == 5
    assert Limits(2).most([5, 3, 4, 1]) == 8
    assert Limits(9).most([5, 3, 4, 1]) == 13
    assert Limits(9, disk=8).most([5, 3, 4, 1]) == 8
    assert Limits().most([]) == 0


class Shelf:
    """A store that fetches nothing, but records which shards are there, and how many at most."""

    def __init__(self, fails_at: str = "") -> None:
        self.there: list[str] = []
        self.log: list[str] = []
        self.most = 0
        self.fails_at = fails_at
        self.held: set[str] = set()

    def size(self, shard: str) -> int:
        return 10

    def fetch(self, shard: str, progress: Callable[[int], None] | None = None) -> None:
        assert shard not in self.there
        if shard == self.fails_at:
            raise SourceError(f"{shard}: is not to be had")
        if progress is not None:
            progress(10)
        self.there.append(shard)
        self.log.append(f"+{shard}")
        self.most = max(self.most, len(self.there))

    def drop(self, shard: str) -> None:
        self.there.remove(shard)
        self.log.append(f"-{shard}")

    def hold(self, tensor: SourceTensor) -> None:
        assert str(tensor.file) in self.there
        self.held.add(tensor.name)

    def let_go(self, name: str) -> None:
        self.held.remove(name)


def work_through(
    shelf: Shelf, order: list[Visit], limits: Limits, n_threads: int, do: Callable[[Piece], None]
) -> list[int]:
    """Let threads do every piece; returns how many pieces were durable at each commit."""
    done, lock, commits = 0, threading.Lock(), list[int]()
    window: Window[Piece] = Window(shelf, order, limits, lambda: commits.append(done))

    def worker() -> Callable[[tuple[int, Piece]], None]:
        def one(job: tuple[int, Piece]) -> None:
            nonlocal done
            assert order[job[0]].shard in shelf.there
            do(job[1])
            with lock:
                done += 1
            window.done(job[0])

        return one

    try:
        share_out(window.slabs(lambda visit: visit.pieces), n_threads, worker, window.stop)
    finally:
        window.close()
    assert done == sum(len(visit.pieces) for visit in order)
    return commits


@given(
    model=models(), keep=st.integers(1, 4), disk=st.sampled_from([None, 10, 25]), n_threads=st.integers(1, 3),
    max_held=st.integers(0, 100),
)  # fmt: skip
def test_a_window_has_no_more_than_allowed_and_drops_what_is_durable(
    model: tuple[list[list[str]], dict[str, tuple[SourceTensor, SourceTensor | None]]],
    keep: int,
    disk: int | None,
    n_threads: int,
    max_held: int,
) -> None:
    order = order_of(*model, max_held=max_held)
    shelf = Shelf()
    commits = work_through(shelf, order, Limits(keep, disk), n_threads, lambda piece: None)
    assert shelf.most <= min(keep, 99 if disk is None else disk // 10)
    assert shelf.held == set()
    n_dropped = sum(one.startswith("-") for one in shelf.log)
    assert len(commits) == n_dropped
    for i, n in enumerate(commits):  # a shard's rows were recorded before it was removed
        assert n >= sum(len(visit.pieces) for visit in order[: i + 1])


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("keep", [1, 3])
def test_what_goes_wrong_ends_it(keep: int, n_threads: int) -> None:
    tensors: dict[str, tuple[SourceTensor, SourceTensor | None]] = {
        f"w{i}": (source(f"w{i}", f"s{i}", 5), None) for i in range(6)
    }
    order = order_of([list(tensors)], tensors)
    with pytest.raises(SourceError, match="s4: is not to be had"):
        work_through(Shelf("s4"), order, Limits(keep), n_threads, lambda piece: None)

    def fail(piece: Piece) -> None:
        if piece.part == 2:
            raise SourceError("rows of s2 are bad")

    with pytest.raises(SourceError, match="rows of s2 are bad"):
        work_through(Shelf(), order, Limits(keep), n_threads, fail)


def test_more_threads_than_work() -> None:
    tensors: dict[str, tuple[SourceTensor, SourceTensor | None]] = {"w0": (source("w0", "s0", 5), None)}
    work_through(Shelf(), order_of([["w0"]], tensors), Limits(1), 8, lambda piece: None)
    work_through(Shelf(), [], Limits(1), 2, lambda piece: None)

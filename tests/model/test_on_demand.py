"""Shards that come when they are read: by any threads in any order the right bytes, and never more than are allowed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import SourceError
from quantkit.hub.repo import RemoteFile
from quantkit.model.catalogue import SourceTensor
from quantkit.model.sources.on_demand import OnDemand
from quantkit.model.sources.shard_store import Limits, ShardStore

PER_SHARD = 4
N = 16


class Shelf:
    """A repository in memory: shards of `PER_SHARD` tensors of `N` bytes each."""

    name, commit = "me/m", "0" * 40

    def __init__(self, n_shards: int) -> None:
        self.data = {
            f"m-{i}.safetensors": bytes((i * 7 + j) % 256 for j in range(N * PER_SHARD)) for i in range(n_shards)
        }
        self.files = {
            path: RemoteFile(len(data), hashlib.sha256(data).hexdigest(), None) for path, data in self.data.items()
        }
        self.came: list[str] = []
        self.wrong: set[str] = set()

    def where(self, path: str = "") -> str:
        return f"hf://me/m/{path}"

    def fetch(self, path: str, to: Path, progress: Callable[[int], None]) -> None:
        if path in self.wrong:
            raise SourceError(f"{path}: is wrong")
        self.came.append(path)
        progress(len(self.data[path]))
        to.write_bytes(self.data[path])


class Watched(ShardStore):
    """Counts the shards that are there at most."""

    most = 0

    def fetch(self, shard: str, progress: Callable[[int], None] | None = None) -> bool:
        came = super().fetch(shard, progress)
        assert self._folder is not None
        self.most = max(self.most, sum(1 for _ in self._folder.iterdir()))
        return came


class World:
    """Weights of `n_shards` shards; the scale of every third lies in the next shard."""

    def __init__(self, n_shards: int) -> None:
        self.shelf = Shelf(n_shards)
        repo: Any = self.shelf
        folder = Path("/nowhere")
        self.store = Watched(repo, folder)
        self.tensors, self.scales = {}, {}
        for i, path in enumerate(self.shelf.data):
            for j in range(PER_SHARD - 1):
                name = f"{i}.{j}"
                self.tensors[name] = SourceTensor(name, "F8_E4M3", (N,), folder / path, j * N, N)
            scale = list(self.shelf.data)[(i + 1) % n_shards]
            self.scales[f"{i}.0"] = SourceTensor(f"{i}.scale", "F32", (N // 4,), folder / scale, 3 * N, N)
        self.source: Any = SimpleNamespace(tensors=self.tensors, scales=self.scales)

    def on_demand(self, folder: Path, limits: Limits) -> OnDemand:
        return OnDemand(self.source, self.store, folder, limits)

    def bytes_of(self, t: SourceTensor) -> bytes:
        return self.shelf.data[t.file.name][t.offset : t.offset + t.nbytes]

    def read(self, brings: OnDemand, name: str) -> bool:
        """A tensor and its scale, in pieces; whether they are right."""
        tensor, ok = self.tensors[name], True
        with brings.whole(name):
            for at in range(0, N, 4):
                out = np.empty(4, np.uint8)
                self.store.read(tensor, at, out)
                ok &= out.tobytes() == self.bytes_of(tensor)[at : at + 4]
            if name in self.scales:
                raw = np.empty(N, np.uint8)
                self.store.read(self.scales[name], 0, raw)
                ok &= raw.tobytes() == self.bytes_of(self.scales[name])
        return ok


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_order_any_threads(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n_shards, keep, n_threads = (data.draw(st.integers(1, n)) for n in (5, 3, 4))
    world = World(n_shards)
    some = st.lists(st.sampled_from(sorted(world.tensors)), max_size=40)
    passes = data.draw(st.lists(some, min_size=1, max_size=3))
    said = data.draw(st.sampled_from(["all", "nothing", "others"]))
    folder = tmp_path_factory.mktemp("shards")
    with world.on_demand(folder, Limits(keep)) as brings, ThreadPoolExecutor(n_threads) as pool:
        for names in passes:
            if said != "nothing":
                brings.expect(names if said == "all" else data.draw(some))
            assert all(pool.map(lambda name: world.read(brings, name), names))
    assert world.store.most <= keep
    assert len(list(folder.iterdir())) <= keep
    assert len(world.shelf.came) - brings.n_fetched in (0, 1)  # one that was on its way in the end


@pytest.mark.parametrize(("keep", "times"), [(1, 7), (2, 5), (3, 5)])
def test_what_will_be_needed_last_goes(keep: int, times: int, tmp_path: Path) -> None:
    """Of a layer whose first and last shard have what is needed first, each comes once if two can be there."""
    world = World(5)
    names = ["0.1", "3.1", "0.2", "1.1", "2.1", "3.2", "4.1"]
    with world.on_demand(tmp_path, Limits(keep)) as brings:
        brings.expect(names)
        assert all(world.read(brings, name) for name in names)
    assert len(world.shelf.came) == times


def test_the_next_ones_come_while_nothing_is_read(tmp_path: Path) -> None:
    world = World(4)
    with world.on_demand(tmp_path, Limits(3)) as brings:
        brings.expect([f"{i}.1" for i in range(4)])
        assert world.read(brings, "0.1")
        while len(world.shelf.came) < 3:
            threading.Event().wait(0.01)
        assert world.read(brings, "3.1")
    assert [path[2] for path in world.shelf.came] == ["0", "1", "2", "3"]


def test_what_does_not_come_is_said_to_all_who_need_it_and_to_no_other(tmp_path: Path) -> None:
    world = World(3)
    world.shelf.wrong.add("m-1.safetensors")
    with world.on_demand(tmp_path, Limits(1)) as brings, ThreadPoolExecutor(2) as pool:
        brings.expect(["0.1", "1.1", "1.2", "2.1"])
        for tried in [pool.submit(world.read, brings, name) for name in ("1.1", "1.2")]:
            with pytest.raises(SourceError, match="is wrong"):
                tried.result()
        assert world.read(brings, "2.1")


def test_who_waits_is_let_go(tmp_path: Path) -> None:
    world, stay = World(2), threading.Event()
    fetch = world.shelf.fetch

    def slow(path: str, to: Path, progress: Callable[[int], None]) -> None:
        stay.wait()
        fetch(path, to, progress)

    world.shelf.fetch = slow  # type: ignore[method-assign]
    with world.on_demand(tmp_path, Limits(1)) as brings, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(world.read, brings, "0.1")
        while not brings._waited:
            threading.Event().wait(0.01)
        brings.abandon()
        assert type(waits.exception()).__name__ == "_StoppedError"
        stay.set()
        brings.expect(["0.1"])
        assert world.read(brings, "0.1")


def test_shards_of_an_earlier_run_are_hashed_and_no_more_are_kept_than_may_be(tmp_path: Path) -> None:
    world = World(4)
    with world.on_demand(tmp_path, Limits(3)) as brings:
        assert all(world.read(brings, f"{i}.1") for i in range(3))
    assert len(world.shelf.came) == 3
    (damaged,) = tmp_path.glob("00001-*")
    damaged.write_bytes(b"\0" * len(world.shelf.data["m-1.safetensors"]))
    (tmp_path / "junk").write_text("of somebody")
    with world.on_demand(tmp_path, Limits(2)) as brings:
        assert sorted(p.name[:5] for p in tmp_path.iterdir()) == ["00000", "00001"]
        assert all(world.read(brings, f"{i}.1") for i in (0, 1))
    assert world.shelf.came[3:] == ["m-1.safetensors"]
    assert brings.n_fetched == 1

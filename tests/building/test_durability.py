"""Work on tensors that are whole on disk: it runs beside the syncing, and before the files are closed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from stopping import SLAB, Builder

from quantkit.base.errors import OutputError
from quantkit.building.engines import Work
from quantkit.building.engines.native import NativeEngine
from quantkit.building.folder import read_journal
from quantkit.building.journal import durable
from quantkit.building.run import Build
from quantkit.building.unfinished import UnfinishedBuild
from quantkit.imatrix.matrix import open_imatrix


class Begun:
    """A build that has begun, to be driven step by step."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.ready: Build = b.ready(split_max_size=1 << 20)
        self.build = UnfinishedBuild(b.out, self.ready.files, self.ready.identity, lambda: None)
        self.build.start(False, 1, lambda _name, _n: None)
        self.order: list[str] = []
        """names of whole tensors, in the order in which `on_whole` ended"""

    def make_all(self) -> None:
        layouts = tuple(layout for _, layout in self.ready.files)
        weights = open_imatrix(str(self.b.imatrix))
        work = Work(self.ready.plan, layouts, self.build.sink, weights, 1, lambda _name, _n: None, self.build.scratch)
        NativeEngine(SLAB).run(work)

    @property
    def names(self) -> set[str]:
        return {t.tensor.name for t in self.ready.plan.tensors}


@pytest.fixture
def begun(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> Iterator[Begun]:
    (tmp_path / "out").mkdir()
    made = Begun(Builder(tiny_v3, tiny_imatrix, tmp_path / "out" / "m.gguf"))
    yield made
    made.build.close()


def test_no_sync_waits_for_what_is_done_with_a_whole_tensor(begun: Begun) -> None:
    """All rows are synced and recorded, and shards get their names, while the first tensor is still being copied; only
    the end of the build waits for it."""
    let_go, in_time = threading.Event(), []

    def on_whole(name: str) -> None:
        in_time.append(let_go.wait(60))
        fd, place = begun.build.sink.target(name)
        assert os.pread(fd, 1, place.offset + place.n_rows * place.row_bytes - 1) != b""
        begun.order.append(name)

    begun.build.durability.on_whole = on_whole
    begun.make_all()
    begun.build.durability.commit()
    found = read_journal(begun.b.out)
    assert found is not None
    assert durable(found) == [t[1] for t in found.head.tensors]
    assert len(list(begun.b.out.parent.glob("*.gguf"))) == len(begun.ready.files) > 1
    assert begun.order == []
    threading.Timer(0.2, let_go.set).start()
    begun.build.finish()
    assert in_time == [True] * len(begun.names)
    assert sorted(begun.order) == sorted(begun.names)
    assert not begun.b.folder.exists()


def test_a_build_that_ends_early_waits_too(begun: Begun) -> None:
    let_go = threading.Event()

    def on_whole(name: str) -> None:
        let_go.wait(60)
        assert os.fstat(begun.build.sink.target(name)[0]).st_size > 0
        begun.order.append(name)

    begun.build.durability.on_whole = on_whole
    begun.make_all()
    threading.Timer(0.2, let_go.set).start()
    said = begun.build.abort(keep=True)
    assert said is not None
    assert said.endswith(
        f" bytes are kept in {begun.b.folder}: the same command goes on from there, --restart starts again"
    )
    assert sorted(begun.order) == sorted(begun.names)
    assert begun.build.durability.failure is None


def test_what_fails_there_ends_the_build(begun: Begun) -> None:
    """The failure is raised like one in the syncing thread: at the next row, or at the end."""

    def on_whole(_name: str) -> None:
        raise MemoryError("no memory for the copy")

    begun.build.durability.on_whole = on_whole
    begun.make_all()
    with pytest.raises(MemoryError, match="no memory for the copy"):
        begun.build.finish()
    with pytest.raises(MemoryError, match="no memory for the copy"):
        begun.make_all()
    assert begun.b.folder.exists()
    assert begun.build.abort(keep=True) is not None


def test_a_journal_that_cannot_be_begun_leaves_nothing(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = b.ready()

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    build = UnfinishedBuild(b.out, ready.files, ready.identity, lambda: None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as e:
        build.start(False, 1, lambda _name, _n: None)
    assert str(e.value) == f"{b.out}: No space left on device; free some space and build again"
    assert build.abort(keep=True) is None
    assert list(b.out.parent.iterdir()) == []


@pytest.fixture
def b(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> Builder:
    (tmp_path / "out").mkdir()
    return Builder(tiny_v3, tiny_imatrix, tmp_path / "out" / "m.gguf")

"""Matrices that other threads make ready, and the memory they are in."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from passing import model_of, random_tokens

from quantkit.forward import ahead, buffers
from quantkit.forward import model as models
from quantkit.forward.ahead import Ahead
from quantkit.forward.buffers import Buffers
from quantkit.forward.layer import ALL, Key
from quantkit.forward.model import F32, Model, Reader
from quantkit.forward.stream import Options, Pass

CPU = torch.device("cpu")
NAMES = tuple(f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down"))
EXPERTS = [tuple(Key(n, e) for n in NAMES) for e in range(4)]


class Waiting(Reader):
    """A reader that waits to be let go, and counts who reads at once."""

    def __init__(self, catalogue: Any) -> None:
        super().__init__(catalogue)
        self.asked: Counter[Key] = Counter()
        self.most = 0
        self._now, self._lock, self.together = 0, threading.Lock(), threading.Barrier(1)

    def matrix(self, key: Key, *more: Any) -> F32:
        with self._lock:
            self._now += 1
            self.asked[key] += 1
            self.most = max(self.most, self._now)
        self.together.wait(60)
        made = super().matrix(key, *more)
        with self._lock:
            self._now -= 1
        return made


@pytest.fixture
def waiting(tiny_v3: Path) -> tuple[Model, Waiting]:
    catalogue = model_of(tiny_v3).catalogue
    reader = Waiting(catalogue)
    return Model(catalogue, reader=reader), reader


def test_several_threads_read(waiting: tuple[Model, Waiting]) -> None:
    """The three matrices of an expert, all at once: none begins to read before the others are there."""
    model, reader = waiting
    reader.together = threading.Barrier(3)
    with Ahead(CPU, torch.float32, 3) as made:
        made.prepare(model, EXPERTS[0])
        gate, up, down = made.take(model, EXPERTS[0], ())
    assert reader.most == 3
    reader.together = threading.Barrier(1)
    for tensor, name in zip((gate, up, down), NAMES, strict=True):
        assert np.array_equal(tensor.numpy(), model.weights.matrix(Key(name, 0)))


@pytest.mark.parametrize(("room", "n_experts"), [(0, 1), (1, 1), (2, 2), (3, 3), (100, 4)])
def test_so_much_is_read_ahead(
    room: int, n_experts: int, waiting: tuple[Model, Waiting], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reader = waiting
    one = 4 * sum(model.weights.n_values(key) for key in EXPERTS[0])
    monkeypatch.setattr(ahead, "_AHEAD_BYTES", room * one)
    with Ahead(CPU, torch.float32, 2) as made:
        made.prepare_some(model, EXPERTS)
        for keys in EXPERTS[:n_experts]:
            made.take(model, keys, ())
        assert reader.asked == dict.fromkeys((key for keys in EXPERTS[:n_experts] for key in keys), 1)
        for keys in EXPERTS[n_experts:]:  # what was taken makes room
            made.prepare_some(model, [keys])
            made.take(model, keys, ())
    assert set(reader.asked.values()) == {1}
    assert len(reader.asked) == 12


def test_each_is_read_once_by_many_threads(waiting: tuple[Model, Waiting]) -> None:
    model, reader = waiting
    Pass([model], random_tokens(384), Options(n_threads=4)).run()
    assert set(reader.asked.values()) == {1}


@pytest.mark.parametrize("name", ["blk.0.attn_k_b.weight", "blk.1.ffn_up_exps.weight", "blk.0.attn_q_a.weight"])
def test_rows_a_few_at_a_time(name: str, tiny_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed ones, experts out of many parts, and plain ones."""
    whole = model_of(tiny_v3).weights.matrix(Key(name, ALL))
    monkeypatch.setattr(models, "_SLAB_BYTES", 700)
    few = model_of(tiny_v3).weights
    assert np.array_equal(few.matrix(Key(name, ALL)), whole)
    numbers = np.array([0, 3, 4, 5, len(whole) - 1])
    assert np.array_equal(few.rows(name, numbers), whole[numbers])


# ------------------------------------------------------------ memory


def address(array: F32) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    made = Buffers()
    one = made.empty((512, 1024))
    where = address(one)
    tensor, row, one = torch.from_numpy(one), one[7], np.empty(0, np.float32)
    assert address(made.empty((512, 1024))) != where
    del tensor  # the row still is a part of it
    assert address(made.empty((512, 1024))) != where
    view = torch.from_numpy(row)
    del row
    assert address(made.empty((512, 1024))) != where
    del view, one
    gc.collect()
    again = [made.empty((512, 1024)) for _ in range(4)]
    assert where in map(address, again)
    assert len(set(map(address, again))) == 4


def test_memory_of_another_size_is_not_taken() -> None:
    made = Buffers()
    where = address(made.empty((2048, 1024)))
    assert address(made.empty((4096, 1024))) != where  # too small
    assert address(made.empty((1023, 1024))) != where  # less than half
    assert address(made.empty((1024, 1024))) == where


def test_so_much_free_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_KEPT", 9 << 20)
    made = Buffers()
    several = [made.empty((1024, 1024)) for _ in range(5)]
    del several
    made.empty((1, 1 << 18))
    assert [len(one) for one in made._free] == [4 << 20] * 2

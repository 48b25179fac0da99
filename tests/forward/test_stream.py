"""What the pass promises: nothing read twice or in vain, results that depend on nothing but weights and tokens."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
import torch
from passing import ONE_THREAD, Tokens, difference, logits_of, model_of, random_tokens

from quantkit.base.errors import OutputError
from quantkit.forward import stream
from quantkit.forward.layer import ALL, Input, Key
from quantkit.forward.model import F32, Model, Quantized, Reader
from quantkit.forward.stream import Options, Pass
from quantkit.model.catalogue import Catalogue, Tensor

TOKENS = random_tokens(384, n_chunks=5, n_ctx=24)


class Counting(Reader):
    """A reader that knows what was asked of it."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__(catalogue)
        self.asked: Counter[Key] = Counter()
        self._lock = threading.Lock()

    def matrix(self, key: Key, *more: Any) -> F32:
        with self._lock:
            self.asked[key] += 1
        return super().matrix(key, *more)


class Scaled:
    """A change of some tensors that counts how often it is applied."""

    def __init__(self, names: tuple[str, ...], by: float) -> None:
        self.names, self.by = names, np.float32(by)
        self.applied: Counter[tuple[str, int]] = Counter()

    def key(self, name: str) -> Hashable:
        return float(self.by) if name in self.names else None

    def apply(self, tensor: Tensor, mat: int, rows: F32) -> F32:
        self.applied[tensor.name, mat] += 1
        out: F32 = rows * self.by
        return out


class Watch:
    """An observer that keeps all it sees."""

    def __init__(self) -> None:
        self.seen: list[Input] = []
        self.layers: list[int] = []

    def see(self, given: Input) -> None:
        self.seen.append(given._replace(x=given.x.clone()))

    def end_of_layer(self, number: int) -> None:
        self.layers.append(number)

    def state(self) -> dict[str, F32]:
        return {}

    def restore(self, state: dict[str, F32]) -> None:
        raise AssertionError("nothing was kept")


def counted(folder: Path) -> tuple[Model, Counting]:
    catalogue = model_of(folder).catalogue
    reader = Counting(catalogue)
    return Model(catalogue, reader=reader), reader


@pytest.fixture(scope="module")
def reference(tiny_v3: Path) -> torch.Tensor:
    return logits_of(model_of(tiny_v3), TOKENS)


# ------------------------------------------------------------ results depend on nothing else


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_size_of_a_block(
    block_bytes: int, tiny_v3: Path, reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_BLOCK_BYTES", block_bytes)
    assert Pass([model_of(tiny_v3)], TOKENS).block_chunks == {1: 1, 1 << 20: 3}[block_bytes]
    assert difference(logits_of(model_of(tiny_v3), TOKENS), reference) < 3e-6


def test_chunks_do_not_know_of_each_other(tiny_v3: Path, reference: torch.Tensor) -> None:
    assert difference(logits_of(model_of(tiny_v3), TOKENS[2:3])[0], reference[2]) < 3e-6


def test_tokens_do_not_know_of_later_ones(tiny_v3: Path, reference: torch.Tensor) -> None:
    assert difference(logits_of(model_of(tiny_v3), TOKENS[:, :7]), reference[:, :7]) < 3e-6


def test_some_positions_only(tiny_v3: Path, reference: torch.Tensor) -> None:
    assert difference(logits_of(model_of(tiny_v3), TOKENS, first=20), reference[:, 20:]) < 1e-6


def test_threads(tiny_v3: Path, reference: torch.Tensor) -> None:
    before = torch.get_num_threads()
    assert difference(logits_of(model_of(tiny_v3), TOKENS, Options(n_threads=2)), reference) < 3e-6
    assert torch.get_num_threads() == before


def test_hidden_states(tiny_v3: Path, reference: torch.Tensor) -> None:
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def see(layers: int, model: int, hidden: torch.Tensor) -> None:
        seen[layers, model] = hidden.clone()

    model = model_of(tiny_v3)
    other = model.variant("b", Scaled(("blk.1.ffn_down_exps.weight",), 2.0))
    Pass([model, other], TOKENS, ONE_THREAD, on_hidden=see).run()
    assert sorted(seen) == [(layer, m) for layer in (1, 2, 3) for m in (0, 1)]
    assert all(h.shape == (5, 24, 256) and h.dtype == torch.float32 for h in seen.values())
    assert torch.equal(seen[1, 0], seen[1, 1])
    assert not torch.equal(seen[2, 0], seen[2, 1])
    norm = torch.from_numpy(model.weights.matrix(Key("output_norm.weight", ALL))[0])
    head = torch.from_numpy(model.weights.matrix(Key("output.weight", ALL)))
    x = seen[3, 0]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.family.eps) * norm
    assert difference(x @ head.T, reference) < 1e-6


# ------------------------------------------------------------ what is read


def test_all_is_read_once(tiny_v3: Path) -> None:
    model, reader = counted(tiny_v3)
    logits_of(model, TOKENS)
    assert set(reader.asked.values()) == {1}
    source = model.catalogue.source
    assert source is not None
    parts = {p.source for t in model.catalogue.tensors if "token_embd" not in t.name for p in t.parts}
    stored = sum(source.tensor(name).nbytes for name in parts)
    embedding = len(np.unique(TOKENS)) * 256 * 2
    # attn_k_b and attn_v_b are halves of what is stored as one
    assert reader.bytes_read == stored + embedding


def test_an_expert_that_no_token_chose_is_not_read(tiny_v3: Path) -> None:
    model, reader = counted(tiny_v3)
    watch = Watch()
    few = TOKENS[:1, :1]
    Pass([model], few, ONE_THREAD, [watch]).run()
    assert watch.layers == [0, 1, 2]
    for layer in (1, 2):
        names = tuple(f"blk.{layer}.ffn_{x}_exps.weight" for x in ("gate", "up", "down"))
        chosen = {i.mat for i in watch.seen if i.names == names[:2]}
        assert len(chosen) == 2  # of 4
        assert {key for key in reader.asked if key.name in names} == {Key(n, e) for n in names for e in chosen}
    assert Key("output.weight", ALL) not in reader.asked


def test_variants_and_the_reference_in_one_pass(tiny_v3: Path, reference: torch.Tensor) -> None:
    alone, reader = counted(tiny_v3)
    logits_of(alone, TOKENS)
    once = reader.bytes_read
    model, reader = counted(tiny_v3)
    attention = {f"blk.{i}.attn_output.weight": "Q4_0" for i in range(3)}
    experts = {f"blk.2.ffn_{x}_exps.weight": "Q8_0" for x in ("gate", "up", "down")}
    variants = [
        model,
        model.variant("a", Quantized(attention)),
        model.variant("b", Quantized(experts)),
        model.variant("c", Quantized(attention | experts | {"token_embd.weight": "Q8_0", "output.weight": "Q4_0"})),
    ]
    together = logits_of(variants, TOKENS)
    assert torch.equal(together[0], reference)
    for i, variant in enumerate(variants[1:], 1):
        assert torch.equal(together[i], logits_of(Model(variant.catalogue, change=variant.change), TOKENS))
        assert difference(together[i], reference) > 1e-3
    # the embedding and the output are read again for c, whose are others
    again = (len(np.unique(TOKENS)) + 384) * 256 * 2
    assert once < reader.bytes_read <= 4 * again + once
    assert {n for key, n in reader.asked.items() if key.name.startswith("blk.")} == {1}


def test_variants_are_computed_once_where_they_are_alike(tiny_v3: Path) -> None:
    model = model_of(tiny_v3)
    a, b = Scaled(("blk.2.ffn_up_shexp.weight",), 2.0), Scaled(("blk.2.ffn_up_shexp.weight",), 3.0)
    told: list[tuple[int, int]] = []
    models = [model, model.variant("a", a), model.variant("b", b), model.variant("a again", Scaled(a.names, 2.0))]
    logits = logits_of(models, TOKENS, progress=lambda _what, done, total: told.append((done, total)))
    n = TOKENS.size
    # layers 0 and 1 for all four together, layer 2 for three of them; a layer of experts in six steps, the other in two
    assert n == 120
    assert told == [(done, 600) for done in (0, 60, 120, *range(140, 241, 20), *range(260, 601, 20))]
    assert torch.equal(logits[1], logits[3])
    assert a.applied == {("blk.2.ffn_up_shexp.weight", ALL): 1}
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])


def test_what_observers_see(tiny_v3: Path) -> None:
    """Every matrix has its input before it is multiplied; two models each have their own observer."""
    model = model_of(tiny_v3)
    first, second = Watch(), Watch()
    Pass([model, model.variant("b", Scaled(("token_embd.weight",), 2.0))], TOKENS, ONE_THREAD, [first, second]).run()
    seen: Counter[str] = Counter()
    for given in first.seen:
        for name in given.names:
            n_cols = model.weights.tensors[name].n_cols
            assert given.x.shape[-1] == n_cols
            seen[name] += given.x.shape[0]
    n = TOKENS.size
    for tensor in model.catalogue.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            assert seen[tensor.name] == (2 * n if "_exps." in tensor.name else n), tensor.name
    assert len(second.seen) > 10
    assert not torch.equal(first.seen[0].x, second.seen[0].x)


# ------------------------------------------------------------ memory


def mapped_without_a_name(folder: Path) -> int:
    """Files of a folder that are mapped into this process and have no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in lines)


def test_hidden_states_beyond_the_memory(tiny_v3: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    mapped: dict[int, int] = {}

    class Looking(Watch):
        def see(self, given: Input) -> None:
            number = int(given.names[0].split(".")[1]) if given.names[0].startswith("blk.") else -1
            mapped[number] = mapped_without_a_name(tmp_path)

    options = Options(n_threads=1, memory=0, folder=tmp_path)
    logits = logits_of(model_of(tiny_v3), TOKENS, options, observers=[Looking()])
    assert torch.equal(logits, reference)
    # hidden states, and in layers with experts what these add to them
    assert mapped == {0: 1, 1: 2, 2: 2, -1: 1}
    assert mapped_without_a_name(tmp_path) == 0
    assert sorted(os.listdir(tmp_path)) == ["lock", "state"]


def test_a_part_of_the_hidden_states_beyond_the_memory(tiny_v3: Path, tmp_path: Path) -> None:
    one = TOKENS.size * 256 * 4
    mapped: list[int] = []
    model = model_of(tiny_v3)
    models = [model, model.variant("b", Scaled(("blk.0.ffn_up.weight",), 2.0))]
    options = Options(n_threads=1, memory=one + 1, folder=tmp_path)
    logits = logits_of(models, TOKENS, options, progress=lambda *_: mapped.append(mapped_without_a_name(tmp_path)))
    assert torch.equal(logits, logits_of(models, TOKENS))
    assert mapped[:2] == [0, 1]  # one that both share, and in layer 0 another
    assert max(mapped) == 3  # and what experts add to both


def test_no_space_for_hidden_states(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _at: int, _n: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError) as caught:
        logits_of(model_of(tiny_v3), TOKENS, Options(n_threads=1, memory=0, folder=tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: 122,880 bytes of hidden states cannot be written: No space left on device; free some space, or "
        "raise --memory"
    )


def test_tokens_of_all_chunks_are_used(tiny_v3: Path) -> None:
    """A chunk more than a block has, so that the last block is a part of one."""
    tokens: Tokens = random_tokens(384, n_chunks=3, n_ctx=8)
    assert factory.TINY_V3["vocab_size"] > tokens.max()
    assert logits_of(model_of(tiny_v3), tokens).shape == (3, 8, 384)

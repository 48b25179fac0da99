"""Experts that are computed together, as on a GPU, give what they give one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from passing import difference, logits_of, model_of, random_tokens
from test_stream import Watch
from torch.nn import functional

from quantkit.forward import experts
from quantkit.forward.experts import Choice, Experts, by_offsets, by_padding, grouped
from quantkit.forward.layer import Input, State
from quantkit.forward.model import Quantized
from quantkit.forward.stream import Options

TOKENS = random_tokens(384, n_chunks=3, n_ctx=24)
N_EXPERTS, N_EMBD, N_FF = 6, 16, 8
WAYS = {"padding": by_padding, "offsets": by_offsets}
NAMES = ("gate", "up", "down")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [[3, 1, 7], [5], [1, 1, 1, 1], [0, 4, 0]])
def test_a_grouped_product(sizes: list[int], way: str, dtype: torch.dtype) -> None:
    if way == "offsets" and not hasattr(functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    torch.manual_seed(1)
    x = torch.randn(sum(sizes), 16)
    weights = [torch.randn(24, 16).to(dtype) for _ in sizes]
    each = [part.to(dtype) @ w.T for part, w in zip(torch.split(x, sizes), weights, strict=True)]
    found = WAYS[way](x, weights, sizes)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.cat(each))
    torch.testing.assert_close(grouped(x, weights, sizes), torch.cat(each))


@pytest.mark.parametrize("together", [2, 3, 16])
def test_a_model(together: int, tiny_v3: Path) -> None:
    model = model_of(tiny_v3)
    models = [model, model.variant("b", Quantized({"blk.1.ffn_up_exps.weight": "Q4_0"}))]
    one_by_one, grouped_ = [Watch(), Watch()], [Watch(), Watch()]
    reference = logits_of(models, TOKENS, observers=one_by_one)
    options = Options(n_threads=1, experts_together=together)
    assert difference(logits_of(models, TOKENS, options, observers=grouped_), reference) < 3e-6
    for a, b in zip(one_by_one, grouped_, strict=True):
        seen = [{(i.names, i.mat, i.n_mats, j): i.x for j, i in enumerate(each)} for each in (_sorted(a), _sorted(b))]
        assert seen[0].keys() == seen[1].keys()
        for key, x in seen[0].items():
            torch.testing.assert_close(seen[1][key], x, rtol=1e-4, atol=1e-5)


def _sorted(watch: Watch) -> list[Input]:
    return sorted(watch.seen, key=lambda i: (i.names, i.mat))


def computed(
    counts: list[int], together: int, sent: list[tuple[torch.Tensor, ...]] | None = None
) -> tuple[list[tuple[str, int, int]], torch.Tensor]:
    """What was looked at (of which tensor, expert, how many rows) when so many tokens choose each expert, and what the
    experts add."""
    torch.manual_seed(2)
    which = torch.cat([torch.full((n,), e, dtype=torch.int32) for e, n in enumerate(counts)])
    which = which[torch.randperm(len(which))].view(-1, 2)
    looked: list[tuple[str, int, int]] = []
    state = State(
        torch.randn(1, len(which), N_EMBD), 1, torch.zeros, lambda i: looked.append((i.names[0], i.mat, len(i.x))),
        together,
    )  # fmt: skip
    total = torch.zeros(len(which), N_EMBD)
    every = Experts(NAMES, N_EXPERTS, Choice(which, torch.rand(which.shape)), state, torch.ones(N_EMBD), 1e-6, total)
    weights = [
        (torch.randn(N_FF, N_EMBD), torch.randn(N_FF, N_EMBD), torch.randn(N_EMBD, N_FF)) for _ in range(N_EXPERTS)
    ]
    for need in every.needs():
        every.add(need.keys[0].mat, weights[need.keys[0].mat])
    every.finish()
    return looked, total


def groups(looked: list[tuple[str, int, int]]) -> list[list[int]]:
    """The experts that were computed together: their gates come before their downs."""
    out: list[list[int]] = []
    before = "down"
    for name, expert, _ in looked:
        if name == "gate":
            if before == "down":
                out.append([])
            out[-1].append(expert)
        before = name
    return out


def test_which_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [4, 6, 0, 2, 8, 4]
    looked, alone = computed(counts, 1)
    assert groups(looked) == [[0], [1], [3], [4], [5]]
    looked, total = computed(counts, 2)
    assert groups(looked) == [[0, 1], [3, 4], [5]]
    torch.testing.assert_close(total, alone)
    monkeypatch.setattr(experts, "_FEW", 6)  # an expert of more is computed alone, and those before it first
    looked, total = computed(counts, 4)
    assert groups(looked) == [[0, 1, 3], [4], [5]]
    torch.testing.assert_close(total, alone)
    monkeypatch.setattr(experts, "_ROWS_AT_ONCE", 7)  # no more rows at a time
    looked, total = computed(counts, 4)
    assert groups(looked) == [[0], [1], [3], [4], [4], [5]]
    assert max(n for _, _, n in looked) == 7
    torch.testing.assert_close(total, alone)
    for name in ("gate", "down"):
        assert [sum(n for what, e, n in looked if (what, e) == (name, i)) for i in range(N_EXPERTS)] == counts


def test_the_share_of_a_layer_that_is_left() -> None:
    torch.manual_seed(2)
    which = torch.tensor([[0, 2], [2, 5]], dtype=torch.int32)
    state = State(torch.zeros(1, 2, N_EMBD), 1, torch.zeros)
    every = Experts(
        NAMES, N_EXPERTS, Choice(which, torch.ones(2, 2)), state, torch.ones(N_EMBD), 1e-6, torch.zeros(2, N_EMBD)
    )
    needs = every.needs()
    assert [(n.keys[0].mat, n.left, [f[0].mat for f in n.following]) for n in needs] == [
        (0, (3, 5), [2, 5]), (2, (2, 5), [5]), (5, (1, 5), []),
    ]  # fmt: skip

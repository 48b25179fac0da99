"""Sums over inputs, against sums by hand; files of them, added up over rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.base.errors import ResumeError
from quantkit.forward.layer import ALL, Input
from quantkit.imatrix.write import Shape
from quantkit.lab.calibration.sums import InputSums, Observers, Saved

GATE, UP = "blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"


def given(n: int, n_cols: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, n_cols)).astype(np.float32))


def test_experts_are_summed_apart_and_tensors_that_share_an_input_together(tmp_path: Path) -> None:
    sums = InputSums(tmp_path)
    first, second = given(5, 8, 1), given(3, 8, 2)
    for x in (first[:2], first[2:]):  # in two blocks
        sums.see(Input((GATE, UP), x, 0, 4))
    sums.see(Input((GATE, UP), second, 2, 4))
    sums.end_of_layer(3)
    saved = Saved([tmp_path])
    assert saved.shapes == [Shape(GATE, 4, 8, True), Shape(UP, 4, 8, True)]
    for name in (GATE, UP):
        entry = saved.entry(name)
        assert entry.counts.tolist() == [5, 0, 3, 0]
        assert entry.in_sum is not None
        for mat, wide in ((0, first.double().numpy()), (2, second.double().numpy())):
            np.testing.assert_allclose(entry.in_sum2[mat], (wide**2).sum(0), rtol=1e-6)
            np.testing.assert_allclose(entry.in_sum[mat], wide.sum(0), rtol=1e-5, atol=1e-6)
        assert not entry.in_sum2[[1, 3]].any()


def test_heads_with_inputs_of_their_own_are_columns_of_one_entry(tmp_path: Path) -> None:
    x = given(6, 8, 3).view(6, 2, 4)
    sums = InputSums(tmp_path)
    sums.see(Input(("blk.0.attn_k_b.weight",), x, ALL, 2))
    sums.end_of_layer(0)
    entry = Saved([tmp_path]).entry("blk.0.attn_k_b.weight")
    assert entry.counts.tolist() == [6]
    np.testing.assert_allclose(entry.in_sum2[0], (x.double().numpy() ** 2).sum(0).ravel(), rtol=1e-6)


def test_the_output_only_where_it_is_asked_for(tmp_path: Path) -> None:
    for asked in (False, True):
        folder = tmp_path / str(asked)
        folder.mkdir()
        sums = InputSums(folder, asked)
        sums.see(Input(("output.weight",), given(4, 8, 4), ALL, 1))
        sums.end()
        assert [s.name for s in Saved([folder]).shapes] == ["output.weight"] * asked


def test_rounds_are_added_up(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        sums = InputSums(folder)
        Observers(sums).see(Input((GATE,), given(3, 8, i), i, 2))
        Observers(sums).end_of_layer(3)
    both = Saved(folders).entry(GATE)
    assert both.counts.tolist() == [3, 3]
    for i, folder in enumerate(folders):
        np.testing.assert_array_equal(both.in_sum2[i], Saved([folder]).entry(GATE).in_sum2[i])
    assert [(n, c.tolist()) for n, c in Saved(folders).counts()] == [(GATE, [3, 3])]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sums-00003.safetensors"
    file.write_bytes(b"x" * 40)
    with pytest.raises(ResumeError) as e:
        Saved([tmp_path])
    assert str(e.value).startswith(f"{file}: cannot be read: ")
    assert str(e.value).endswith(f"; remove {tmp_path} and start again")

"""Second moments X^T X: by hand, and of a model's run against the sums of squares of its importance matrix."""

from __future__ import annotations

import json
from pathlib import Path

import making
import numpy as np
import pytest
import torch
from small_builds import OPTIONS

from quantkit.base.errors import ImatrixError, OutputError, SourceError
from quantkit.building.folder import folder_of
from quantkit.forward.layer import ALL, Input
from quantkit.imatrix.matrix import open_imatrix
from quantkit.lab.calibration.covariance import Covariance
from quantkit.lab.calibration.covariance_folder import choose_own, described
from quantkit.lab.calibration.inputs import covariance_bytes, planned
from quantkit.lab.calibration.make_imatrix import Target
from quantkit.model.open import open_model
from quantkit.rounding.covariance import Covariances, pack, unpack


@pytest.fixture(scope="module")
def made(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imatrix.gguf, and cov of the same run."""
    folder = tmp_path_factory.mktemp("made")
    file = making.some_text(folder / "text.txt")
    making.make(tiny_v3, file, folder / "imatrix.gguf", covariance=folder / "cov")
    return folder


def test_a_triangle_is_packed_by_rows() -> None:
    full = np.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]], np.float32)
    packed = np.zeros(6, np.float32)
    pack(full, packed)
    assert packed.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(unpack(packed, 3), full)


@pytest.mark.parametrize("own", [True, False])
def test_sums_by_hand(own: bool, tiny_v3: Path, tmp_path: Path) -> None:
    """Two blocks of an input that tensors share, which is met again; heads; experts, each its own or one for all."""
    model = open_model(str(tiny_v3), OPTIONS)
    rng = np.random.default_rng(5)

    def given(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    observer = Covariance(model, tmp_path, own)
    x, heads, experts = given(7, 256), given(7, 2, 64), {0: given(4, 256), 3: given(5, 256)}
    for block, heads_of in ((x[:3], heads[:3]), (x[3:], heads[3:])):
        observer.see(Input(("blk.1.ffn_gate_inp.weight",), block, ALL, 1))
        observer.see(Input(("blk.1.ffn_gate_shexp.weight", "blk.1.ffn_up_shexp.weight"), block, ALL, 1))
        observer.see(Input(("blk.1.attn_k_b.weight",), heads_of, ALL, 2))
    for mat, rows in experts.items():
        observer.see(Input(("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"), x[:2], mat, 4))
        observer.see(Input(("blk.1.ffn_down_exps.weight",), rows, mat, 4))
    observer.end_of_layer(1)
    found = Covariances(tmp_path)
    by_hand = x.double().numpy().T @ x.double().numpy()
    for name in ("ffn_gate_inp", "ffn_gate_shexp", "ffn_up_exps"):
        matrix, count = found.matrix(f"blk.1.{name}.weight", 2, 256)
        np.testing.assert_allclose(matrix, by_hand, rtol=1e-4, atol=1e-4)
        assert count == 7
    for head in range(2):
        matrix, count = found.matrix("blk.1.attn_k_b.weight", head, 64)
        each = heads[:, head].double().numpy()
        np.testing.assert_allclose(matrix, each.T @ each, rtol=1e-4, atol=1e-4)
        assert count == 7
    for mat in range(4):
        its = [experts[mat]] if own and mat in experts else [] if own else list(experts.values())
        every = torch.cat(its).double().numpy() if its else np.zeros((0, 256))
        matrix, count = found.matrix("blk.1.ffn_down_exps.weight", mat, 256)
        np.testing.assert_allclose(matrix, every.T @ every, rtol=1e-4, atol=1e-4)
        assert count == len(every)


def test_the_diagonal_is_the_importance_matrix(made: Path, tiny_v3: Path) -> None:
    matrix, found = open_imatrix(str(made / "imatrix.gguf")), Covariances(made / "cov")
    model = open_model(str(tiny_v3), OPTIONS)
    n = 0
    for p in planned(model):
        for name in p.names:
            sums = matrix.sums(name)
            flat = sums.in_sum2.reshape(-1, p.n_cols)
            for mat in range(p.n_mats):
                moments, count = found.matrix(name, mat, p.n_cols)
                if sums.counts.size > 1 and p.n_mats == 1:  # experts' gate and up have the tokens of all
                    continue
                np.testing.assert_allclose(np.diag(moments), flat[mat], rtol=1e-3, atol=1e-6)
                assert count == sums.counts[mat if sums.counts.size > 1 else 0]
                np.testing.assert_array_equal(moments, moments.T)
                n += 1
    assert n > 40


def test_what_is_written_is_what_was_said(made: Path, tiny_v3: Path) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    nbytes = sum(np.load(f, mmap_mode="r").nbytes for f in (made / "cov").glob("*.npy"))
    assert nbytes == covariance_bytes(model)
    about = [one for f in (made / "cov").glob("*.json") for one in json.loads(f.read_text())]
    assert sorted(one["tensors"] for one in about) == sorted([*p.names] for p in planned(model))
    assert described(model, True) == (
        f"{nbytes:,} bytes = {nbytes / 2**20:.2f} MiB = {nbytes / 1e6:.2f} MB: "
        f"{sum(p.n_mats for p in planned(model))} matrices of "
        f"{len(about)} inputs, 8 of experts' ffn_down"
    )


def test_r1_by_its_config() -> None:
    """61 layers: 7168 inputs twice, 1536 for q_b, 128 heads of 128 and of 512, 16384 for the output; ffn_down of 3
    dense layers, 58 shared experts and 256 experts each."""

    def triangle(n: int) -> int:
        return 4 * n * (n + 1) // 2

    layer = 2 * triangle(7168) + triangle(1536) + 128 * (triangle(128) + triangle(512)) + triangle(16384)
    model = open_model("deepseek-r1")
    for own, n in ((True, 256), (False, 1)):
        wanted = 61 * layer + 3 * triangle(18432) + 58 * (1 + n) * triangle(2048)
        assert covariance_bytes(model, own) == wanted


def test_room_decides_what_experts_get(tiny_v3: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    own, pooled = covariance_bytes(model), covariance_bytes(model, False)
    assert choose_own(model, tmp_path / "cov", own)
    assert not choose_own(model, tmp_path / "cov", own - 1)
    assert choose_own(model, tmp_path / "cov", None)
    with pytest.raises(OutputError) as e:
        choose_own(model, tmp_path / "cov", pooled - 1)
    assert str(e.value) == (
        f"{tmp_path / 'cov'}: the covariance needs {pooled:,} bytes even with one matrix a layer for the experts' "
        f"ffn_down, and --disk allows {pooled - 1:,}; allow more, or leave --covariance out"
    )


def test_a_folder_with_something_in_it(tiny_v3: Path, tmp_path: Path) -> None:
    file, folder = making.some_text(tmp_path / "text.txt"), tmp_path / "cov"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError) as e:
        making.make(tiny_v3, file, tmp_path / "x.gguf", covariance=folder)
    assert str(e.value) == f"{folder}: is not empty (it has 'mine.txt'); give a new folder to --covariance"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cov", "text.txt"]
    (folder / "mine.txt").unlink()  # an empty one may be there
    making.make(tiny_v3, file, tmp_path / "x.gguf", n_chunks=1, covariance=folder)
    assert (folder / "layer-00002.json").exists()
    assert not folder_of(folder).exists()


def test_not_with_a_coverage_to_reach(tiny_v3: Path, tmp_path: Path) -> None:
    file = making.some_text(tmp_path / "text.txt")
    with pytest.raises(ImatrixError) as e:
        making.make(tiny_v3, file, tmp_path / "x.gguf", covariance=tmp_path / "cov", target=Target(0.9, 10))
    assert str(e.value) == (
        "--target-coverage and --covariance do not go together: make the importance matrix first, then give "
        "--covariance with the --chunks that it took"
    )


def test_a_folder_that_is_none(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as e:
        Covariances(tmp_path)
    assert str(e.value) == f"{tmp_path}: holds no covariance; make it with quantkit imatrix make --covariance"
    found = Covariances(made / "cov")
    with pytest.raises(SourceError) as e:
        found.matrix("blk.9.ffn_down.weight", 0, 256)
    assert str(e.value) == f"{made / 'cov'}: has nothing for 'blk.9.ffn_down.weight'; it is of another model"
    with pytest.raises(SourceError) as e:
        found.matrix("blk.0.ffn_down.weight", 0, 128)
    assert str(e.value).endswith("is not of 'blk.0.ffn_down.weight' with 128 columns; it is of another model")

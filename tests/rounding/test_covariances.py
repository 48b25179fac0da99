"""Which second moment a matrix has, and folders that are damaged or of another model: a sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import factory
import numpy as np
import pytest
from small_builds import OPTIONS

from quantkit import kernels
from quantkit.base.errors import SourceError
from quantkit.model.open import open_model
from quantkit.rounding.covariance import SHRINK, Covariances, Moments, standing
from quantkit.rounding.policy import Choice
from quantkit.rounding.rounder import Rounder

AGAIN = "; make the covariance again"
DOWN = "blk.1.ffn_down_exps.weight"
OUTPUT = "blk.1.attn_output.weight"


@pytest.fixture
def folder(tiny_covariance: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_covariance, tmp_path / "cov"))


def test_tensors_that_share_an_input_share_a_moment(tiny_covariance: Path) -> None:
    moments = Moments(Covariances(tiny_covariance))
    gate, up, shared = (f"blk.1.ffn_{x}.weight" for x in ("gate_exps", "up_exps", "up_shexp"))
    assert moments.key(gate, 3) == moments.key(up, 0) == moments.key(shared, 0)
    np.testing.assert_array_equal(moments.mean(gate, 3, 256), moments.mean(shared, 0, 256))
    assert moments.key(DOWN, 0) != moments.key(DOWN, 3)
    assert moments.key("blk.2.ffn_up_exps.weight", 0) != moments.key(up, 0)
    sums, count = Covariances(tiny_covariance).matrix(gate, 0, 256)
    assert count == 600
    np.testing.assert_array_equal(moments.mean(gate, 0, 256), sums / np.float32(600))


def test_an_experts_own_is_drawn_towards_its_layers(tiny_covariance: Path) -> None:
    """By 512 tokens: (n H + 512 P') / (n + 512), P' being the mean of all scaled to H's trace."""
    source = Covariances(tiny_covariance)
    sums = [source.matrix(DOWN, mat, 256)[0].astype(np.float64) for mat in range(4)]
    assert source.counts(DOWN) == (600, 40, 0, 600)
    pooled = sum(sums) / 1240
    own = sums[3] / 600
    expected = (600 * own + SHRINK * pooled * (np.trace(own) / np.trace(pooled))) / (600 + SHRINK)
    got = Moments(source).mean(DOWN, 3, 256)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, got.T)


def test_what_is_thin(tiny_v3: Path, tiny_covariance: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    tensors = {t.name: t for t in model.tensors}
    source = Covariances(tiny_covariance)
    down = standing(tensors[DOWN], source)
    assert (down.n_mats, down.thin, down.why, down.n_unseen) == (4, frozenset({1, 2}), "", 1)
    assert standing(tensors[OUTPUT], source).thin == frozenset()
    embedding = standing(tensors["token_embd.weight"], source)
    assert (embedding.thin, embedding.why) == (frozenset({0}), "the covariance has none of their inputs")
    few = Covariances(factory.covariance_for(model, tmp_path / "few", n_tokens=100))
    gate = standing(tensors["blk.1.ffn_gate_exps.weight"], few)
    assert (gate.thin, gate.why) == (frozenset(range(4)), "the covariance has fewer tokens than their 256 columns")
    pooled = Covariances(factory.covariance_for(model, tmp_path / "pooled", own_experts=False))
    assert standing(tensors[DOWN], pooled).why == (
        "experts share one covariance there, and each needs its own (make it without --pooled-experts)"
    )


def test_the_digest_is_of_the_content(tiny_v3: Path, folder: Path, tmp_path: Path) -> None:
    one = Covariances(folder).digest
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert Covariances(elsewhere).digest == one
    with (folder / "layer-00001-attn_output.npy").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x3f")
    assert Covariances(folder).digest != one
    factory.edit_json(elsewhere / "layer-00002.json", lambda about: about[0]["counts"].__setitem__(0, 601))
    assert Covariances(elsewhere).digest not in (one, Covariances(folder).digest)
    other = factory.covariance_for(open_model(str(tiny_v3), OPTIONS), tmp_path / "other", seed=14)
    assert Covariances(other).digest != one


def test_held_out(folder: Path, tiny_covariance: Path) -> None:
    assert Covariances(folder).held_out is None
    shutil.copytree(tiny_covariance, folder / "held-out")
    found = Covariances(folder)
    assert found.held_out is not None
    assert found.held_out.digest == found.digest == Covariances(tiny_covariance).digest
    assert len(found.files) == 2 * len(Covariances(tiny_covariance).files)


@pytest.mark.parametrize("where", ["held-out", "."])
def test_a_held_out_covariance_of_another_kind(folder: Path, tiny_covariance: Path, where: str) -> None:
    shutil.copytree(tiny_covariance, folder / "held-out")
    factory.edit_json(folder / where / "layer-00001.json", lambda about: about[0].__setitem__("weights", "fisher"))
    made, plain = (folder / "held-out", folder) if where == "held-out" else (folder, folder / "held-out")
    with pytest.raises(SourceError) as e:
        Rounder(Covariances(folder))
    assert str(e.value) == (
        f"{folder / 'held-out'}: judges what is rounded by {folder}, but of 'blk.1.attn_k_b.weight' {made} was made "
        f"with --fisher and {plain} without it; make both alike"
    )


def truncate(folder: Path) -> None:
    file = folder / "layer-00001-attn_output.npy"
    file.write_bytes(file.read_bytes()[:1000])


def put(value: float) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        file = folder / "layer-00001-attn_output.npy"
        packed = np.load(file)
        packed[0, 0] = value
        np.save(file, packed)

    return do


def other_type(folder: Path) -> None:
    file = folder / "layer-00001-attn_output.npy"
    np.save(file, np.load(file).astype(np.float64))


FILE = "layer-00001-attn_output.npy"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, f"{FILE}: cannot be read: mmap length is greater than file size{AGAIN}"),
        (put(np.nan), f"{FILE}: matrix 0 holds values that are no sums of squares{AGAIN}"),
        (put(-1.0), f"{FILE}: matrix 0 holds values that are no sums of squares{AGAIN}"),
        (other_type, f"{FILE}: is not of float32 for each matrix of '{OUTPUT}'{AGAIN}"),
        (lambda f: (f / FILE).write_bytes(b""), f"{FILE}: cannot be read: No data left in file{AGAIN}"),
    ],
    ids=["truncated", "NaN", "negative", "float64", "empty"],
)
def test_a_damaged_array(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder)
    with pytest.raises(SourceError) as e:
        Covariances(folder).matrix(OUTPUT, 0, 128)
    assert str(e.value) == f"{folder / says.split(':', maxsplit=1)[0]}:{says.partition(':')[2]}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
        ('[{"file": "../x.npy", "tensors": ["a"], "n_cols": 4, "counts": [1]}]', "'../x.npy' is no file's name"),
        ('[{"file": "x", "tensors": ["a"], "n_cols": 4, "counts": [NaN]}]', "counts are not numbers of inputs"),
        ('[{"file": "x", "tensors": ["a"], "n_cols": 4, "counts": []}]', "counts are not numbers of inputs"),
        ('[{"file": "x", "tensors": ["a"], "n_cols": -4, "counts": [1]}]', "-4 columns"),
        ('[{"file": "x", "tensors": "a", "n_cols": 4, "counts": [1]}]', "tensors are not a list of names"),
        ("{}", "it lists no input"),
    ],
)
def test_json_that_no_run_writes(folder: Path, text: str, says: str) -> None:
    (folder / "layer-00001.json").write_text(text)
    with pytest.raises(SourceError) as e:
        Covariances(folder)
    assert str(e.value) == f"{folder / 'layer-00001.json'}: cannot be read: {says}{AGAIN}"


def test_of_another_model(tiny_v3: Path, folder: Path) -> None:
    tensors = {t.name: t for t in open_model(str(tiny_v3), OPTIONS).tensors}
    factory.edit_json(folder / "layer-00001.json", lambda about: [one.update(n_cols=512) for one in about])
    with pytest.raises(SourceError) as e:
        standing(tensors[OUTPUT], Covariances(folder))
    assert str(e.value) == (f"{folder}: has 1 x 512 columns for '{OUTPUT}', which has 1 x 128; it is of another model")


def test_rows_that_cannot_be_rounded_stay_ggmls(folder: Path) -> None:
    """Whatever rows are beside them; and a second moment that has no inverse ends the build in a sentence."""
    rounder, choice = Rounder(Covariances(folder)), Choice("feedback", "t")
    rows = np.random.default_rng(3).standard_normal((4, 128)).astype(np.float32)
    rows[2] *= np.float32(3e36)
    stock = kernels.quantize(np.clip(rows, -1e6, 1e6), "Q8_0")
    together, alone = stock.copy(), stock.copy()
    rounder.improve(rows, together, "Q8_0", (OUTPUT, 0), choice)
    for i in range(4):
        rounder.improve(rows[i : i + 1], alone[i : i + 1], "Q8_0", (OUTPUT, 0), choice)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[2], stock[2])
    assert (together[[0, 1, 3]] != stock[[0, 1, 3]]).any(axis=1).all()
    np.save(folder / FILE, np.zeros((1, 128 * 129 // 2), np.float32))
    with pytest.raises(SourceError) as e:
        Rounder(Covariances(folder)).improve(rows, stock, "Q8_0", (OUTPUT, 0), choice)
    assert str(e.value) == (
        f"{folder}: '{OUTPUT}', matrix 0: the covariance of 128 columns is zero: no token has reached the tensor; or "
        "leave it to ggml by a rule with rounding: ggml"
    )


def test_json_is_what_the_laboratory_writes(folder: Path) -> None:
    about = json.loads((folder / "layer-00001.json").read_text())
    assert set(about[0]) == {"file", "tensors", "n_cols", "counts"}

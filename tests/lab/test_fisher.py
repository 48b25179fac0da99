"""Second moments weighted by gradients: by hand from the gradients of layers, and what the folder says of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
import torch
from conftest import Run
from small_builds import OPTIONS

from quantkit.base.errors import KernelError, OutputError, SourceError
from quantkit.base.text import size
from quantkit.building.folder import folder_of
from quantkit.forward.gradients import Backward
from quantkit.forward.layer import ALL, Key
from quantkit.forward.model import Model
from quantkit.forward.stream import Options, Pass
from quantkit.gguf.header import decode, read_header
from quantkit.lab.calibration import fisher
from quantkit.lab.calibration.estimate import work_of
from quantkit.lab.calibration.fisher_work import fisher_bytes, hidden_bytes, memory_bytes, weighted
from quantkit.model.open import open_model
from quantkit.planning.file_layout import ROUNDING_PREFIX
from quantkit.rounding.covariance import Covariances


@pytest.fixture(scope="module")
def made(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, imatrix.gguf, and cov of the same run."""
    folder = tmp_path_factory.mktemp("made")
    file = making.some_text(folder / "text.txt")
    making.make(tiny_v3, file, folder / "imatrix.gguf", covariance=folder / "cov", fisher=True)
    return folder


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "identity"}


def test_by_hand(made: Path, tiny_v3: Path) -> None:
    """The output, the last layer and the embedding, of the same chunks."""
    model = Model(open_model(str(tiny_v3), OPTIONS))
    tokens = making.chunks_of(tiny_v3, made / "text.txt", 4).tokens
    hidden: list[torch.Tensor] = []
    Pass([model], tokens, Options(n_threads=1), on_hidden=lambda _n, _m, h: hidden.append(h.clone())).run()
    sums: dict[Key, torch.Tensor] = {}

    def see(key: Key, x: torch.Tensor, g: torch.Tensor) -> None:
        x, g = x.double().reshape(len(x), -1, x.shape[-1]), g.double().reshape(len(x), -1, g.shape[-1])
        each = torch.stack([(x[:, h].T * g[:, h].square().mean(-1)) @ x[:, h] for h in range(x.shape[1])])
        sums[key] = sums.get(key, torch.zeros(())) + each

    back = Backward(model, see)
    gradient = torch.stack([back.head(h, i) for i, h in enumerate(hidden[-1])])
    last = model.family.n_layers - 1
    for number in range(last, -1, -1):
        name = "token_embd.weight"
        before = hidden[number - 1]
        if number == 0:
            before = torch.from_numpy(model.weights.matrix(Key(name, ALL)))[torch.from_numpy(tokens.astype(np.int64))]
        gradient = back.layer(number, before, gradient)
    found, n = Covariances(made / "cov"), 0
    for key, wanted in sums.items():
        if not model.weights.tensors[key.name].quantizable:
            continue
        for mat, one in enumerate(wanted, max(0, key.mat)):
            matrix, _ = found.matrix(key.name, mat, one.shape[0])
            np.testing.assert_allclose(matrix, one.numpy(), rtol=2e-3, atol=1e-4 * float(one.abs().max()))
            n += 1
    assert n > 40
    g = gradient.double().reshape(-1, model.family.n_embd)
    matrix, count = found.matrix("token_embd.weight", 0, model.family.n_embd)
    outer = (g.T @ g / model.family.n_vocab).numpy()
    np.testing.assert_allclose(matrix, outer, rtol=2e-3, atol=1e-4 * float(np.abs(outer).max()))
    assert count == tokens.size


def test_the_folder_says_what_it_is(made: Path, tiny_v3: Path) -> None:
    found, model = Covariances(made / "cov"), open_model(str(tiny_v3), OPTIONS)
    assert found.weighting == "fisher"
    about = [one for f in (made / "cov").glob("*.json") for one in json.loads(f.read_text())]
    ours = {name for one in about if one.get("weights") == "fisher" for name in one["tensors"]}
    assert ours == {t.name for t in weighted(model) if t.layer is None or t.layer < 3} - {"rope_freqs.weight"}
    names = [name for one in about for name in one["tensors"]]
    assert len(names) == len(set(names))
    files = {path.name for path in (made / "cov").glob("*.npy")}
    assert files == {one["file"] for one in about}
    nbytes = sum(
        np.load(path, mmap_mode="r").nbytes for path in (made / "cov").glob("*.npy") if "layer-" not in path.name
    )
    assert nbytes == fisher_bytes(model)
    assert not folder_of(made / "imatrix.gguf").exists()


def test_weights_that_are_not_known(made: Path, tmp_path: Path) -> None:
    (tmp_path / "layer-00000.json").write_text(
        json.dumps([{"file": "x.npy", "tensors": ["a"], "n_cols": 1, "counts": [1], "weights": "moon"}])
    )
    with pytest.raises(SourceError, match="weights 'moon'; known is 'fisher'; make the covariance again"):
        Covariances(tmp_path)


def test_the_same_again_and_where_it_was_stopped(made: Path, tiny_v3: Path, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    seen: list[str] = []

    def stop(what: str, _done: int, _total: int) -> None:
        seen.append(what)
        if what == "backwards, layer 1 of 3":
            raise EnoughError

    how: dict[str, Any] = {"covariance": tmp_path / "cov", "fisher": True}
    with pytest.raises(EnoughError) as e:
        making.make(tiny_v3, made / "text.txt", tmp_path / "x.gguf", progress=stop, **how)
    assert "the same command goes on there" in getattr(e.value, "kept", "")
    assert not (tmp_path / "cov").exists()
    seen.clear()
    making.make(tiny_v3, made / "text.txt", tmp_path / "x.gguf", progress=lambda what, *_: seen.append(what), **how)
    assert set(seen) == {"backwards, layer 1 of 3"}  # nothing else was computed again
    assert digests(tmp_path / "cov") == digests(made / "cov")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cov", "x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == (made / "imatrix.gguf").read_bytes()


def sizes(available: int) -> Any:
    return lambda: {"total_nbytes": 1 << 40, "available_nbytes": available}


def test_what_does_not_fit_is_refused(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = making.some_text(tmp_path / "text.txt")
    need = memory_bytes(open_model(str(tiny_v3), OPTIONS), 4 * making.CTX, making.CTX, False, False)
    monkeypatch.setattr(fisher, "memory_sizes", sizes(need - 1))
    with pytest.raises(KernelError) as e:
        making.make(tiny_v3, file, tmp_path / "x.gguf", covariance=tmp_path / "cov", fisher=True)
    assert str(e.value) == (
        f"{tiny_v3.name}: --fisher needs about {size(need)} of memory for the weights and second moments of the "
        f"largest layer and the gradient of all tokens; {size(need - 1)} are free: leave --fisher out, or give fewer "
        "tokens"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_what_does_not_fit_the_disk_is_refused(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    need = hidden_bytes(model, 640) + fisher_bytes(model, False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(need, 1, need - 1))
    with pytest.raises(OutputError) as e:
        fisher.choose(model, 640, 32, tmp_path, "it")
    assert str(e.value) == (
        f"{tmp_path}: --fisher needs {need:,} bytes for hidden states and second moments, but {need - 1:,} are free; "
        "free 1 more, or give fewer --chunks"
    )


def test_what_fits(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that does; of a run that goes on with what it has begun."""
    model = open_model(str(tiny_v3), OPTIONS)
    own, shared, small = (memory_bytes(model, 640, 32, *way) for way in ((True, True), (False, True), (False, False)))
    assert own > shared > small
    for available, wanted in ((own, (True, True)), (own - 1, (False, True)), (shared - 1, (False, False))):
        monkeypatch.setattr(fisher, "memory_sizes", sizes(available))
        assert fisher.choose(model, 640, 32, tmp_path, f"{available}") == wanted
    monkeypatch.setattr(fisher, "memory_sizes", sizes(own))
    assert fisher.choose(model, 640, 32, tmp_path, f"{shared - 1}") == (False, True)
    monkeypatch.setattr(fisher, "memory_sizes", lambda: {"total_nbytes": None, "available_nbytes": None})
    assert fisher.choose(model, 640, 32, tmp_path, "other") == (True, True)


@pytest.mark.parametrize("keep", [True, False])
def test_experts_share(keep: bool, made: Path, tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of gate and up of a layer are the sums over its experts; all others are the same, bit for bit."""
    model = open_model(str(tiny_v3), OPTIONS)
    need = memory_bytes(model, 4 * making.CTX, making.CTX, False, keep)
    monkeypatch.setattr(fisher, "memory_sizes", sizes(need))
    how: dict[str, Any] = {"covariance": tmp_path / "cov", "fisher": True}
    making.make(tiny_v3, made / "text.txt", tmp_path / "x.gguf", **how)
    own, shared = Covariances(made / "cov"), Covariances(tmp_path / "cov")
    n_shared = 0
    for t in weighted(model):
        if t.name not in own:
            continue
        counts = shared.counts(t.name)
        if t.name.endswith(("_gate_exps.weight", "_up_exps.weight")):
            assert len(counts) == 1
            assert counts[0] == sum(own.counts(t.name))
            total = sum(own.matrix(t.name, mat, t.n_cols)[0].astype(float) for mat in range(t.shape[2]))
            found = shared.matrix(t.name, 0, t.n_cols)[0]
            np.testing.assert_allclose(found, total, rtol=1e-5, atol=1e-6 * float(np.abs(total).max()))
            n_shared += 1
            continue
        assert counts == own.counts(t.name)
        for mat in range(len(counts)):
            here, there = (found.matrix(t.name, mat, t.n_cols)[0] for found in (shared, own))
            np.testing.assert_array_equal(here, there)
    assert n_shared == 2 * len(model.moe_layers)
    nbytes = sum(np.load(p, mmap_mode="r").nbytes for p in (tmp_path / "cov").glob("*.npy") if "layer-" not in p.name)
    assert nbytes == fisher_bytes(model, False)


def test_what_another_text_left_is_not_used(made: Path, tiny_v3: Path, tmp_path: Path) -> None:
    """Stopped on the way back over one text, then asked for another."""

    class EnoughError(Exception):
        pass

    def stop(what: str, _done: int, _total: int) -> None:
        if what == "backwards, layer 1 of 3":
            raise EnoughError

    how: dict[str, Any] = {"covariance": tmp_path / "cov", "fisher": True}
    other = making.some_text(tmp_path / "other.txt", 700)
    with pytest.raises(EnoughError):
        making.make(tiny_v3, other, tmp_path / "x.gguf", progress=stop, **how)
    assert any((folder_of(tmp_path / "x.gguf") / "round-0").glob("gradient-*.npy"))
    making.make(tiny_v3, made / "text.txt", tmp_path / "x.gguf", **how)
    assert digests(tmp_path / "cov") == digests(made / "cov")


def test_what_is_built_by_it_says_so(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    """In the file's metadata and in the attestation; and rows are made again by it."""
    file = making.some_text(tmp_path / "text.txt", 1200)
    making.make(tiny_v3, file, tmp_path / "x.gguf", n_chunks=20, covariance=tmp_path / "cov", fisher=True)
    how = ("--imatrix", tmp_path / "x.gguf", "--pre", "deepseek-v3", "--covariance", tmp_path / "cov")
    built = ("-r", "Q4_K_M", "--rounding", "feedback", "-o", tmp_path / "q.gguf", "--attest", tmp_path / "q.json", "-q")
    done = quantkit("build", tiny_v3, *how, *built)
    assert done.returncode == 0, done.stderr
    keys = {item.key: decode(item) for item in read_header(tmp_path / "q.gguf").kvs}
    assert keys[ROUNDING_PREFIX + "weights"] == "fisher"
    assert any("token_embd.weight" in line for line in keys[ROUNDING_PREFIX + "tensors"])
    said = json.loads((tmp_path / "q.json").read_text())["predicate"]["buildDefinition"]["resolvedDependencies"]
    (covariance,) = (one for one in said if one["annotations"]["role"] == "covariance")
    assert covariance["annotations"]["weights"] == "fisher"
    done = quantkit("verify", tmp_path / "q.gguf", "--source", tiny_v3, *how, "-r", "Q4_K_M", "--rounding", "feedback")
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_estimate_of_r1() -> None:
    """In 64 GB there is room for a layer whose experts share, not for 256 experts and their second moments."""
    model = open_model("deepseek-r1")
    work = work_of(model, 1 << 20, 512, covariance=True, fisher=True)
    plain = work_of(model, 1 << 20, 512, covariance=True)
    assert work.flop > 3 * plain.flop
    assert work.bytes_read > 1000 * plain.bytes_read  # 512 batches, forth and back
    assert work.fisher_disk == hidden_bytes(model, 1 << 20) + fisher_bytes(model, False) > 1 << 40
    assert work.fisher_memory == memory_bytes(model, 1 << 20, 512, False, False)
    assert work.fisher_memory < 64e9
    assert memory_bytes(model, 1 << 20, 512) > 400e9
    assert plain.fisher_memory == plain.fisher_disk == 0

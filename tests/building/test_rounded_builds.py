"""Builds with a rounding other than ggml's: the same bytes however they are made, ggml's sizes, a lower output error;
and no mix-up with other builds."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, Tools
from gguf import GGUFReader
from passing import perplexity
from small_builds import plan_of
from stopping import SLAB, EnoughError, N

from quantkit import kernels
from quantkit.base.errors import ResumeError, UnsupportedError
from quantkit.building import run as builds
from quantkit.building.cache import Cache
from quantkit.building.engines import Work
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.building.engines.native import NativeEngine
from quantkit.gguf.header import decode, read_header
from quantkit.imatrix.matrix import open_imatrix
from quantkit.model.catalogue import Tensor
from quantkit.planning.file_layout import ROUNDING_PREFIX, output_kvs
from quantkit.planning.plan import Plan
from quantkit.planning.rounding import with_covariance, with_device
from quantkit.recipe.load import Rounding, parse
from quantkit.rounding.covariance import Covariances, Moments
from quantkit.rounding.on_torch import devices
from quantkit.rounding.options import VERSION
from quantkit.weights.rows import RowReader

RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rounding: feedback
rules:
  - {match: "*ffn_down_exps.weight", type: Q2_K, why: t}
  - {match: "*ffn_gate_exps.weight", type: TQ1_0, why: a type without feedback}
  - {match: "*ffn_up_exps.weight", type: Q3_K, why: t}
  - {match: "*shexp.weight", type: Q4_K, rounding: ggml, why: t}
  - {match: "blk.*.{attn_k_b,attn_output}.weight", type: Q8_0, why: t}
  - {match: "blk.*.attn_q_a.weight", type: F16, why: t}
  - {match: "*", type: Q4_K, why: t}
"""
DOWN, GATE, UP = (f"blk.1.ffn_{x}_exps.weight" for x in ("down", "gate", "up"))


def plan(source: Path, imatrix: Path, covariance: Path | None, text: str = RECIPE) -> Plan:
    recipe = parse(text, "r.yaml")
    recipe = recipe if covariance is not None else recipe.with_rounding(Rounding("ggml"))
    made = plan_of(source, recipe, imatrix)
    return made if covariance is None else with_covariance(made, Covariances(covariance))


def build(
    made: Plan, out: Path, imatrix: Path, cache: Cache | None = None, n_threads: int = 2, slab: int = SLAB, **more: Any
) -> bytes:
    ready = builds.prepare(made, out, open_imatrix(str(imatrix)), force=True, engine=NativeEngine(), **more)
    builds.run(ready, NativeEngine(slab), n_threads, lambda _name, _n: None, cache)
    return b"".join(path.read_bytes() for path, _ in ready.files)


@pytest.fixture(scope="module")
def made(tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path) -> Plan:
    return plan(tiny_v3, tiny_imatrix, tiny_covariance)


@pytest.fixture(scope="module")
def rounded(made: Plan, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "m.gguf"
    build(made, out, tiny_imatrix)
    return out


@pytest.fixture(scope="module")
def stock(tiny_v3: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stock") / "m.gguf"
    build(plan(tiny_v3, tiny_imatrix, None), out, tiny_imatrix)
    return out


def blocks(file: Path, name: str) -> bytes:
    info = next(t for t in read_header(file).tensors if t.name == name)
    return file.read_bytes()[info.offset : info.offset + info.nbytes]


@pytest.mark.parametrize(("n_threads", "slab"), [(1, SLAB), (3, 700), (2, 1 << 20)])
def test_the_same_bytes_for_any_threads_and_slabs(
    made: Plan, rounded: Path, tiny_imatrix: Path, tmp_path: Path, n_threads: int, slab: int
) -> None:
    assert build(made, tmp_path / "m.gguf", tiny_imatrix, n_threads=n_threads, slab=slab) == rounded.read_bytes()


@pytest.mark.parametrize("kernel", [k for k in kernels.FEEDBACK])
def test_the_same_bytes_with_any_kernels(
    made: Plan, rounded: Path, tiny_imatrix: Path, tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ggml" if kernel == "plain" else kernel
    monkeypatch.setenv("QUANTKIT_KERNELS", name)
    assert build(made, tmp_path / "m.gguf", tiny_imatrix) == rounded.read_bytes()


def test_the_tensors_have_the_stock_files_sizes_and_places(rounded: Path, stock: Path) -> None:
    """Only the header is longer, by its record of the rounding."""
    a, b = read_header(rounded), read_header(stock)
    assert [(t.name, t.type, t.shape, t.nbytes, t.offset - a.data_offset) for t in a.tensors] == [
        (t.name, t.type, t.shape, t.nbytes, t.offset - b.data_offset) for t in b.tensors
    ]
    assert rounded.stat().st_size - a.data_offset == stock.stat().st_size - b.data_offset
    more = [item for item in a.kvs if item not in b.kvs]
    assert [item.key for item in a.kvs if item not in more] == [item.key for item in b.kvs]
    assert {item.key for item in more} == {
        ROUNDING_PREFIX + k for k in ("version", "options", "covariance", "tokens", "tensors")
    }


def test_what_the_file_says_of_itself(rounded: Path, tiny_covariance: Path) -> None:
    said = {item.key.removeprefix(ROUNDING_PREFIX): decode(item) for item in read_header(rounded).kvs}
    assert (said["version"], said["options"], said["tokens"]) == (2, "damp 0.01, search", 600)
    assert said["covariance"] == Covariances(tiny_covariance).digest
    assert [str(line) for line in GGUFReader(rounded).fields[ROUNDING_PREFIX + "tensors"].contents()] == [
        "feedback blk.{0-2}.attn_k_b.weight",
        "feedback blk.{0-2}.attn_kv_a_mqa.weight",
        "feedback blk.{0-2}.attn_output.weight",
        "feedback blk.{0-2}.attn_q_b.weight",
        "feedback blk.{0-2}.attn_v_b.weight",
        "feedback blk.{0}.ffn_down.weight",
        "feedback blk.{0}.ffn_gate.weight",
        "feedback blk.{0}.ffn_up.weight",
        "feedback blk.{1-2}.ffn_down_exps.weight but 1-2",
        "coarse blk.{1-2}.ffn_gate_exps.weight",
        "feedback blk.{1-2}.ffn_up_exps.weight",
    ]


def values(file: Path, tensor: Tensor) -> np.ndarray:
    found = next(t for t in GGUFReader(file).tensors if t.name == tensor.name)
    raw = np.ascontiguousarray(found.data).reshape(tensor.n_rows, -1).view(np.uint8)
    return kernels.dequantize(raw, found.tensor_type.name, tensor.n_cols)


def test_output_errors_are_lower_and_no_rows_is_higher(
    made: Plan, rounded: Path, stock: Path, tiny_covariance: Path
) -> None:
    moments, source = Moments(Covariances(tiny_covariance)), made.catalogue.source
    assert source is not None
    for name, mat, most in ((UP, 3, 0.9), (DOWN, 0, 0.95), (DOWN, 3, 0.95), ("blk.2.attn_output.weight", 0, 0.95)):
        tensor = made[name].tensor
        n = tensor.shape[1]
        weights = np.empty((n, tensor.n_cols), np.float32)
        parts = [part for part in tensor.parts for _ in range(part.out_rows // n)]
        RowReader(source).rows(tensor, parts[mat], 0, weights)
        h = moments.mean(name, mat, tensor.n_cols).astype(np.float64)
        ours, theirs = (
            np.einsum("ri,ij,rj->r", e, h, e)
            for e in (weights - values(file, tensor)[mat * n : (mat + 1) * n] for file in (rounded, stock))
        )
        assert (ours <= theirs * (1 + 1e-6)).all()
        assert ours.sum() < most * theirs.sum(), name


def test_what_is_not_to_be_rounded_is_ggmls(made: Plan, rounded: Path, stock: Path) -> None:
    rounding = made.rounding
    assert rounding is not None
    same = [t.tensor.name for t in made.tensors if rounding.of(t.tensor.name) is None]
    assert {"output.weight", "token_embd.weight", "blk.1.ffn_up_shexp.weight", "blk.1.attn_q_a.weight"} <= {*same}
    for name in same:
        assert blocks(rounded, name) == blocks(stock, name), name
    assert blocks(rounded, UP) != blocks(stock, UP)
    # the matrices of the experts' ffn_down that saw too little
    ours, theirs = (np.frombuffer(blocks(f, DOWN), np.uint8).reshape(4, -1) for f in (rounded, stock))
    assert [bool((a == b).all()) for a, b in zip(ours, theirs, strict=True)] == [False, True, True, False]


def test_a_held_out_covariance_judges(
    tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, rounded: Path, stock: Path, tmp_path: Path
) -> None:
    """The held-out covariance weighs other columns than the one used for rounding: most rows stay ggml's."""
    folder = Path(shutil.copytree(tiny_covariance, tmp_path / "cov"))
    inside = Path(shutil.copytree(tiny_covariance, folder / "held-out"))
    for file in inside.glob("*.npy"):
        packed, n = np.load(file), 0
        while n * (n + 1) // 2 < packed.shape[1]:
            n += 1
        full = np.zeros(packed.shape[1], np.float32)
        full[np.cumsum([0, *range(n, 1, -1)])] = 1.0
        np.save(file, np.tile(full, (len(packed), 1)))
    made = plan(tiny_v3, tiny_imatrix, folder)
    build(made, tmp_path / "m.gguf", tiny_imatrix)
    rows = [np.frombuffer(blocks(f, UP), np.uint8).reshape(1024, -1) for f in (tmp_path / "m.gguf", rounded, stock)]
    judged, plain, theirs = (r for r in rows)
    stays, was = (judged == theirs).all(axis=1), (plain == theirs).all(axis=1)
    assert was.mean() < 0.1
    assert stays.mean() > 0.5
    np.testing.assert_array_equal(judged[~stays], plain[~stays])
    keys = {item.key: decode(item) for item in read_header(tmp_path / "m.gguf").kvs}
    held_out = Covariances(folder).held_out
    assert held_out is not None
    assert keys[ROUNDING_PREFIX + "held_out"] == held_out.digest


# ---------------------------------------------------------------- going on


def stopped(made: Plan, out: Path, imatrix: Path, after: int) -> None:
    done = 0

    class Counting(NativeEngine):
        def run(self, work: Work) -> None:
            super().run(replace(work, progress=count))

    def count(_name: str, n: int) -> None:
        nonlocal done
        done += n
        if done >= after:
            raise EnoughError

    ready = builds.prepare(made, out, open_imatrix(str(imatrix)))
    with pytest.raises(EnoughError):
        builds.run(ready, Counting(SLAB), 1, lambda _name, _n: None)


@pytest.mark.parametrize("after", [1, N // 3, int(0.9 * N)])
def test_going_on_gives_the_same_bytes(
    made: Plan, rounded: Path, tiny_imatrix: Path, tmp_path: Path, after: int
) -> None:
    stopped(made, tmp_path / "m.gguf", tiny_imatrix, after)
    assert build(made, tmp_path / "m.gguf", tiny_imatrix, resume=True) == rounded.read_bytes()


def test_other_rounding_is_another_build(
    made: Plan, tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    stopped(made, out, tiny_imatrix, N // 3)
    other = Path(shutil.copytree(tiny_covariance, tmp_path / "cov"))
    packed = np.load(other / "layer-00002-attn_output.npy")
    packed *= np.float32(1.5)
    np.save(other / "layer-00002-attn_output.npy", packed)
    was, now = Covariances(tiny_covariance).digest[:12], Covariances(other).digest[:12]
    with pytest.raises(ResumeError) as e:
        builds.prepare(plan(tiny_v3, tiny_imatrix, other), out, open_imatrix(str(tiny_imatrix)))
    assert f": covariance was 600 tokens (sha256 {was}), is 600 tokens (sha256 {now}); " in str(e.value)
    assert str(e.value).endswith("; start again with --restart, or give another output")
    text = RECIPE.replace("rounding: feedback\n", "rounding: feedback+gain\n")
    with pytest.raises(ResumeError) as e:
        builds.prepare(plan(tiny_v3, tiny_imatrix, tiny_covariance, text), out, open_imatrix(str(tiny_imatrix)))
    assert ": rounding was damp 0.01, search (method 2, tensors " in str(e.value)
    with pytest.raises(ResumeError) as e:
        builds.prepare(plan(tiny_v3, tiny_imatrix, None), out, open_imatrix(str(tiny_imatrix)))
    assert "rounding was damp 0.01, search" in str(e.value)
    assert "is absent" in str(e.value)


def test_rounding_on_a_device_is_another_build(made: Plan, rounded: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    device = devices.find("torch")
    assert device is not None
    there, out = with_device(made, device), tmp_path / "m.gguf"
    stopped(made, out, tiny_imatrix, N // 3)
    with pytest.raises(ResumeError, match=re.escape(f"search, on {device.text} (method {VERSION}, tensors ")):
        builds.prepare(there, out, open_imatrix(str(tiny_imatrix)))
    assert with_device(made, None) is made
    n_rounded = sum(1 for t in made.tensors if made.rounding and made.rounding.of(t.tensor.name))
    first, second = (Cache(tmp_path / "cache", 1 << 30) for _ in range(2))
    assert build(made, tmp_path / "a.gguf", tiny_imatrix, first) == rounded.read_bytes()
    build(there, tmp_path / "b.gguf", tiny_imatrix, second, slab=1 << 20)
    assert second.n_found == len(made.tensors) - n_rounded


def test_killed_and_gone_on_with(
    rounded: Path, tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    (tmp_path / "r.yaml").write_text(RECIPE)
    words: list[object] = [
        "build",
        tiny_v3,
        "-r",
        tmp_path / "r.yaml",
        "--pre",
        "deepseek-v3",
        "--imatrix",
        tiny_imatrix,
    ]
    words += ["--covariance", tiny_covariance, "-o", out, "-t", 1, "-q"]
    command = [sys.executable, "-m", "quantkit", *map(str, words)]
    env = os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.01", "QUANTKIT_KERNELS": "ggml"}  # slower kernels, same bytes
    process = subprocess.Popen(command, env=env, cwd=tempfile.gettempdir())
    journal = tmp_path / "m.gguf.partial" / "journal"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=tempfile.gettempdir(), check=True)
    assert out.read_bytes() == rounded.read_bytes()


# ---------------------------------------------------------------- the cache


def test_the_cache_tells_them_apart(
    made: Plan, rounded: Path, stock: Path, tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, tmp_path: Path
) -> None:
    def cache() -> Cache:
        return Cache(tmp_path / "cache", 1 << 30)

    n_rounded = sum(1 for t in made.tensors if made.rounding and made.rounding.of(t.tensor.name))
    n = len(made.tensors)
    ggml, first, second, third = cache(), cache(), cache(), cache()
    assert build(plan(tiny_v3, tiny_imatrix, None), tmp_path / "a.gguf", tiny_imatrix, ggml) == stock.read_bytes()
    assert build(made, tmp_path / "b.gguf", tiny_imatrix, first) == rounded.read_bytes()
    assert first.n_found == n - n_rounded
    assert build(made, tmp_path / "c.gguf", tiny_imatrix, second) == rounded.read_bytes()
    assert second.n_found == n
    other = Path(shutil.copytree(tiny_covariance, tmp_path / "cov"))
    shutil.copy(other / "layer-00001-attn_output.npy", other / "layer-00002-attn_output.npy")
    build(plan(tiny_v3, tiny_imatrix, other), tmp_path / "d.gguf", tiny_imatrix, third)
    assert third.n_found == n - n_rounded


# ---------------------------------------------------------------- llama.cpp


def test_what_is_built_of_it_is_not_said_to_be_rounded(rounded: Path) -> None:
    plan = plan_of(rounded, parse(RECIPE, "r.yaml").with_rounding(Rounding("ggml")), None)
    assert any(item.key.startswith(ROUNDING_PREFIX) for item in plan.catalogue.kvs)
    assert not any(item.key.startswith(ROUNDING_PREFIX) for item in output_kvs(plan, None))


def test_the_other_engine_refuses(made: Plan, tiny_imatrix: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as e:
        builds.prepare(
            made, tmp_path / "m.gguf", open_imatrix(str(tiny_imatrix)), engine=LlamaQuantizeEngine(Path("lq"))
        )
    assert made.rounding is not None
    assert str(e.value) == (
        f"the engine llama-quantize only rounds as ggml does, and the plan rounds {len(made.rounding.choices)} tensors "
        "otherwise; take --engine native, or --rounding ggml"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.tools
def test_llama_cpp_runs_it(tools: Tools, rounded: Path, tmp_path: Path) -> None:
    """llama-gguf-split loads every tensor, llama-perplexity computes with it."""
    done = subprocess.run(
        [tools.gguf_split, "--split-max-tensors", "20", rounded, tmp_path / "s"], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert len(list(tmp_path.glob("s-*.gguf"))) == 3
    text = tmp_path / "t.txt"
    text.write_text("the router stays as it is and the words go on " * 60)
    saved = perplexity(tools.perplexity, rounded, text, tmp_path / "logits", 64, "--chunks", "2")
    assert (saved.tokens.shape, saved.log_probs.shape[:2]) == ((2, 64), (2, 31))
    assert bool(saved.log_probs.isfinite().all())


def test_no_covariance_and_one_of_another_model_are_refused_before_a_byte(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, quantkit: Run
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    common = ("build", tiny_v3, "-r", tmp_path / "r.yaml", "--pre", "deepseek-v3", "--imatrix", tiny_imatrix, "-q")
    done = quantkit(*common, "-o", tmp_path / "m.gguf")
    assert done.returncode == 4
    assert done.stderr == (
        "error: 'output.weight' and 25 more tensors are to be rounded by feedback (r.yaml:4 rounding), which needs a "
        "covariance of their inputs: give --covariance DIR; make one with: quantkit imatrix make MODEL --text F -o "
        "imatrix.gguf --covariance DIR\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    done = quantkit(*common, "-o", tmp_path / "m.gguf", "--covariance", empty)
    assert (done.returncode, done.stderr) == (
        4, f"error: {empty}: holds no covariance; make it with quantkit imatrix make --covariance\n"
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "r.yaml"]

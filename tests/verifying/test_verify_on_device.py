"""Builds whose rows torch rounded, by the command line: what the file says, and how `verify` counts what is not the
CPU's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import info_of, rewrite, set_key
from conftest import Run
from small_builds import OPTIONS

import quantkit as qk
from quantkit.gguf.header import STRING, decode, kv, read_header
from quantkit.model.open import open_model
from quantkit.recipe.load import parse
from quantkit.rounding.covariance import Covariances

RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "*ffn_down_exps.weight", type: Q2_K, why: t}
  - {match: "*ffn_gate_exps.weight", type: TQ1_0, why: a type without feedback}
  - {match: "blk.*.{attn_k_b,attn_output}.weight", type: Q8_0, why: t}
  - {match: "*", type: Q4_K, why: t}
"""
UP = "blk.1.ffn_up_exps.weight"
DEVICE = f"the CPU by torch {torch.__version__}"
KEY = "quantkit.rounding.device"


class World:
    """A build rounded by torch and one by the CPU's kernels, and `verify` as a user types it."""

    def __init__(self, folder: Path, v3: Path, imatrix: Path, covariance: Path, quantkit: Run) -> None:
        self.run, self.v3, self.recipe = quantkit, v3, folder / "r.yaml"
        self.out, self.reference, self.attestation = folder / "m.gguf", folder / "cpu.gguf", folder / "build.json"
        self.covariance, self.imatrix = covariance, imatrix
        self.recipe.write_text(RECIPE)
        self.made = ("-r", self.recipe, "--pre", "deepseek-v3", "--imatrix", imatrix, "--covariance", covariance)
        for out, more in ((self.out, ("--rounding-device", "torch", "--attest", self.attestation)),
                          (self.reference, ())):  # fmt: skip
            done = quantkit("build", v3, "-o", out, *self.made, "--rounding", "feedback", "-q", *more)
            assert done.returncode == 0, done.stderr

    def verify(self, out: Path, *more: str | Path) -> tuple[int, list[str]]:
        source = ("-s", self.v3, *self.made[2:], "--sample", "all")
        done = self.run("verify", out, "-q", *source, *more)
        return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture(scope="module")
def world(
    tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, tmp_path_factory: pytest.TempPathFactory, quantkit: Run
) -> World:
    return World(tmp_path_factory.mktemp("on_device"), tiny_v3, tiny_imatrix, tiny_covariance, quantkit)


def tensor_bytes(file: Path, name: str) -> bytes:
    info = info_of(file, name)
    return file.read_bytes()[info.offset : info.offset + info.nbytes]


def test_the_file_and_the_attestation_say_where(world: World) -> None:
    said = {item.key: item for item in read_header(world.out).kvs}
    assert decode(said[KEY]) == DEVICE
    assert KEY not in {item.key for item in read_header(world.reference).kvs}
    statement = json.loads(world.attestation.read_text())
    outside = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert outside["roundingDevice"] == DEVICE


def test_the_blocks_are_nearly_all_the_cpus(world: World) -> None:
    names = [t.name for t in read_header(world.reference).tensors]
    assert [t.name for t in read_header(world.out).tensors] == names
    n = n_same = 0
    for name in names:
        a, b = (np.frombuffer(tensor_bytes(f, name), np.uint8) for f in (world.out, world.reference))
        assert len(a) == len(b)
        n, n_same = n + len(a), n_same + int((a == b).sum())
    assert n_same / n > 0.97
    # coarse is the CPU's, and so are tensors that nothing but ggml rounds
    for name in ("blk.1.ffn_gate_exps.weight", "output.weight", "token_embd.weight"):
        assert tensor_bytes(world.out, name) == tensor_bytes(world.reference, name)


def test_verify_counts_what_is_not_the_cpus(world: World) -> None:
    code, lines = world.verify(world.out, "-r", world.recipe, "--rounding", "feedback", "--attestation",
                               world.attestation)  # fmt: skip
    assert code == 0, lines
    (note,) = [line for line in lines if "rounded on" in line]
    m = re.fullmatch(
        rf"note: of ([\d,]+) rows that were rounded on {re.escape(DEVICE)}, ([\d,]+) are not the CPU's bytes "
        r"\(([\d,]+) of ([\d,]+) blocks\)(?:; the output error of these is ([\d.]+) x that of the CPU's rows)?",
        note,
    )
    assert m is not None, note
    n_rows, n_others, n_blocks, n_all = (int(m[i].replace(",", "")) for i in range(1, 5))
    assert 1000 < n_rows <= n_all
    assert n_others <= n_blocks < 0.05 * n_all
    assert (m[5] is not None) == (n_others > 0)
    if m[5] is not None:
        assert 0.8 < float(m[5]) < 1.25


def test_verify_from_python_counts_too(world: World) -> None:
    recipe = parse(RECIPE + "rounding: feedback\n", "r.yaml")
    plan = qk.plan(
        open_model(str(world.v3), OPTIONS), recipe, str(world.imatrix), covariance=Covariances(world.covariance)
    )
    verdict = qk.verify(world.out, plan=plan, sample="5%")
    assert verdict.ok, verdict.findings
    assert any(f"rounded on {DEVICE}" in note for note in verdict.notes)


@pytest.mark.parametrize("on_device", [True, False])
def test_rows_that_no_rounding_keeps_are_found(world: World, tmp_path: Path, on_device: bool) -> None:
    """Levels of a row that are turned over: a device may differ, but not for the worse."""
    damaged = Path(shutil.copy(world.out if on_device else world.reference, tmp_path / "m.gguf"))
    info = info_of(damaged, UP)
    with damaged.open("r+b") as f:
        f.seek(info.offset + 16)
        level = f.read(64)
        f.seek(info.offset + 16)
        f.write(bytes(255 - b for b in level))
    code, lines = world.verify(damaged, "-r", world.recipe, "--rounding", "feedback")
    assert code == 12
    (finding,) = [line for line in lines if UP in line]
    assert "Q4_K bytes are not what quantkit's feedback rounding makes of the source" in finding


@pytest.mark.parametrize("text", ["", "x" * 201, "a\x1b[31m"])
def test_a_device_that_no_build_writes_is_refused(world: World, tmp_path: Path, text: str) -> None:
    odd = Path(shutil.copy(world.out, tmp_path / "m.gguf"))
    rewrite(odd, lambda kvs, _: set_key(kvs, kv(KEY, STRING, text)))
    done = world.run("verify", odd, "-q")
    assert done.returncode == 4
    assert "say nothing that a build writes (device)" in done.stderr


def test_names_of_devices(world: World, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    build = ("build", world.v3, "-o", out, *world.made, "-q")
    done = world.run(*build, "--rounding", "feedback", "--rounding-device", "tpu")
    assert done.returncode == 2
    assert "'tpu' is not a device that rounds rows: cpu, cuda, cuda:1, auto, torch" in done.stderr
    done = world.run(*build, "--rounding-device", "torch")
    assert done.returncode != 0
    assert "--rounding-device needs a rounding to use it" in done.stderr
    done = world.run(*build, "--rounding", "feedback", "--rounding-device", "cuda:99")
    assert done.returncode != 0
    assert ("has no CUDA" if not torch.cuda.is_available() else "device 'cuda:99' is not here") in done.stderr
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the GPU")
def test_auto_without_a_gpu_is_the_cpu(world: World, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    done = world.run("build", world.v3, "-o", out, *world.made, "--rounding", "feedback", "--rounding-device", "auto")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == world.reference.read_bytes()

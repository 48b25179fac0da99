"""torch is an extra: what is installed without it, and what runs without it. The same bytes as with it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file

from quantkit.cli import cli
from quantkit.cli.doctor import LAB, PICTURES, REQUIRED
from quantkit.model import demo

ROOT = Path(__file__).parent.parent
#: in a folder on PYTHONPATH: no torch and no scipy for this Python and for what it starts
SITE = """\
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
#: SHA-256 of the files of demo.make_checkpoint, as it made them with torch
MADE_WITH_TORCH = {
    "config.json": "ce1c81e7858b75b1751816cf85ddf7a79e6b21ba43a922edf6790a95c4a65f04",
    "generation_config.json": "303dd5c7eace33eccba86d9b9c6d68a4b2daeb57fa1edb94ecde0c0b88018702",
    "model-00001-of-00003.safetensors": "7f497cffd3ca5f6be8693a6c8d73de00ca8f8e50b9170b78f51f8910865c18d6",
    "model-00002-of-00003.safetensors": "c2570df6274800e8ab8479f1795379d7ce2d2eb409f9414fa66435172ce59622",
    "model-00003-of-00003.safetensors": "deb71d41850fefe2591d57825410f4fc1eeed3b053a75cbc5cf2610b70434673",
    "model.safetensors.index.json": "6dcaab99063cc88b1329c94495bb83742d7b7d9ccfd264afecc43be5262394b1",
    "tokenizer.json": "1d502f65f9b9720998dc7abf70f95264b05157698fcd0d6a0bfd82696ba84138",
    "tokenizer_config.json": "ca76b748a9361962f8c477b346f7adf229c308e9ce61bd37cc94bd2b748aa46f",
}
#: and of a checkpoint whose blocks, 96 x 40, divide nothing
ODD_MADE_WITH_TORCH = {
    "model-00001-of-00003.safetensors": "32867ec6822249c1dc5fbd730b9b5df86661e0a7e8875896a0ff9c13ee78c550",
    "model-00002-of-00003.safetensors": "6fb2678506c99220c93e835512b1dd0784646c402ac385fb100f7a7b4c6b64a6",
    "model-00003-of-00003.safetensors": "ced75ed19f76e21ff99e470c3e6a35b627115ad6f54abeb89211573688b271f9",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has no torch."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")
    return env


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# ---------------------------------------------------------------- what is installed


def project() -> dict[str, Any]:
    reader = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    said: dict[str, Any] = reader.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return said


def installed_with(requirements: list[str]) -> set[str]:
    """The distributions that pip installs for these requirements here, and for theirs, by normalized name."""
    found: set[tuple[str, str]] = set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in sorted({"", *wanted.extras}):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for line in importlib.metadata.requires(name) or ():
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    todo.append(inner)
    return {name for name, _ in found}


def heavy(names: set[str]) -> list[str]:
    return sorted(n for n in names if re.match(r"(torch|scipy|triton|transformers|nvidia-|cuda-)", n))


def test_the_base_brings_no_torch_and_no_cuda() -> None:
    base = installed_with(project()["dependencies"])
    assert {"numpy", "click", "ml-dtypes", "pydantic-core"} <= base
    assert heavy(base) == []


def test_the_extras_bring_it() -> None:
    extras = project()["optional-dependencies"]
    assert {Requirement(r).name for r in extras["lab"]} == set(LAB)
    assert {Requirement(r).name for r in extras["pictures"]} == set(PICTURES)
    assert "torch" in heavy({Requirement(r).name for r in extras["test"]})


def test_the_doctor_looks_for_all_that_is_required() -> None:
    assert [Requirement(r).name for r in project()["dependencies"]] == list(REQUIRED)


def test_every_requirement_has_a_constraint() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    extras = project()["optional-dependencies"]
    wanted = {Requirement(r).name for r in [*project()["dependencies"], *extras["lab"], *extras["test"]]}
    assert wanted - pinned == set()


# ---------------------------------------------------------------- what runs


def leaves() -> list[list[str]]:
    found: list[list[str]] = [[]]
    for name, command in cli.commands.items():
        found.append([name])
        found += [[name, sub] for sub in getattr(command, "commands", {})]
    return found


def test_every_help(bare: dict[str, str]) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from quantkit.cli import cli\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    done = CliRunner().invoke(cli, [*line.split(), '--help'])\n"
        "    print(done.exit_code, done.output.splitlines()[0])\n"
    )
    lines = "".join(" ".join(words) + "\n" for words in leaves())
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | bare, input=lines, capture_output=True, text=True, check=True,
        cwd="/",
    )  # fmt: skip
    heads = done.stdout.splitlines()
    assert len(heads) == len(leaves()) > 25
    assert all(head.startswith("0 Usage: ") for head in heads)


def test_the_demo(bare: dict[str, str], quantkit: Run, tmp_path: Path) -> None:
    done = quantkit("demo", "--dir", tmp_path / "demo", env=bare)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "demo" / demo.NAME) == MADE_WITH_TORCH


def test_a_plan_with_rope_factors(bare: dict[str, str], quantkit: Run) -> None:
    for model in ("deepseek-r1", "deepseek-r1-distill-llama-8b"):
        done = quantkit("plan", model, "--recipe", "Q4_K_M", "--json", env=bare)
        assert done.returncode == 0, done.stderr
        assert done.stdout == quantkit("plan", model, "--recipe", "Q4_K_M", "--json").stdout


def test_dequant(bare: dict[str, str], quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    done = quantkit("dequant", tiny_v3, tmp_path / "out", env=bare)
    assert done.returncode == 0, done.stderr
    assert quantkit("dequant", tiny_v3, tmp_path / "again").returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_dequant_on_a_gpu_says_what_to_install(
    bare: dict[str, str], quantkit: Run, tiny_v3: Path, tmp_path: Path
) -> None:
    done = quantkit("dequant", tiny_v3, tmp_path / "out", "--device", "cuda", env=bare)
    assert (done.returncode, done.stdout) == (9, "")
    assert done.stderr == (
        "error: torch, which computes on cuda, is not installed; run: pip install 'quantkit[lab]', or leave out "
        "--device cuda: the bytes are the same\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the same bytes


def test_the_checkpoint_of_the_demo(tmp_path: Path) -> None:
    demo.make_checkpoint(tmp_path)
    assert digests(tmp_path) == MADE_WITH_TORCH


def test_a_checkpoint_with_blocks_that_divide_nothing(tmp_path: Path) -> None:
    blocks = {**demo.CONFIG["quantization_config"], "weight_block_size": [96, 40]}
    odd = {"hidden_size": 330, "moe_intermediate_size": 200, "kv_lora_rank": 77, "quantization_config": blocks}
    demo.make_checkpoint(tmp_path, demo.CONFIG | odd, 5)
    assert digests(tmp_path).items() >= ODD_MADE_WITH_TORCH.items()


def test_codes_and_scales_are_those_of_torch(tmp_path: Path) -> None:
    """Of one weight, by torch's own FP8, so that a change of numpy's random numbers does not hide behind digests."""
    demo.make_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    stored = load_file(tmp_path / "model-00001-of-00003.safetensors")
    codes, scale = stored[name], stored[name + "_scale_inv"]
    assert (codes.dtype, tuple(codes.shape), tuple(scale.shape)) == (torch.float8_e4m3fn, (288, 512), (3, 4))
    rng = np.random.default_rng([demo.SEED, *name.encode()])
    values = rng.standard_normal((288, 512), np.float32) * np.float32(0.7 / 512**0.5)
    values[:, rng.integers(0, 512, 4)] *= 6
    weight = torch.from_numpy(values)
    for i, down in enumerate(range(0, 288, 128)):
        for j, across in enumerate(range(0, 512, 128)):
            tile = weight[down : down + 128, across : across + 128]
            assert scale[i, j] == tile.abs().max() / 448
            want = (tile / scale[i, j]).to(torch.float8_e4m3fn)
            got = codes[down : down + 128, across : across + 128]
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))

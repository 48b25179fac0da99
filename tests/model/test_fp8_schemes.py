"""FP8 checkpoints by each scheme that the real converter reads: whole files compared with its, what `dequant` makes
with torch's product, and `verify` against the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Run, Tools
from dequantizing import dequant, load, require_equal
from factory import SMALL_LLAMA as LLAMA
from factory import SMALL_V3 as V3
from factory import checkpoint, dense_checkpoint, edit_json
from safetensors.torch import load_file, save_file
from small_builds import NAMED, build_named, data, fields, uniform

FP8 = torch.float8_e4m3fn
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}
BLOCK = {
    **CHANNEL,
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}}
    },
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


class Scheme(NamedTuple):
    suffix: str
    quantization: Mapping[str, Any] | None
    block: tuple[int, int] | None
    """rows and columns of a scale; 0 for all"""
    shape: str = "2-D"
    """of the scale of a tensor or a row: 2-D, 1-D or scalar"""
    dtype: torch.dtype = torch.float32
    beside: tuple[str, ...] = ()
    """suffixes of tensors beside each weight that are not used"""


SCHEMES = {
    "fp8-tensor": Scheme("_scale_inv", {"quant_method": "fp8", "weight_block_size": None}, (0, 0), "scalar"),
    "fp8-tensor-unsaid": Scheme("_scale_inv", {"quant_method": "fp8", "activation_scheme": "static"}, (0, 0), "scalar"),
    "fp8-row": Scheme("_scale_inv", {"quant_method": "fp8", "weight_block_size": None}, (1, 0), "1-D", torch.bfloat16),
    "fp8-small-blocks": Scheme("_scale_inv", {"quant_method": "fp8", "weight_block_size": [16, 32]}, (16, 32)),
    "fp8-activation": Scheme(
        "_scale_inv", {"quant_method": "fp8", "weight_block_size": None}, (0, 0), "scalar",
        beside=("_activation_scale", ".activation_scale"),
    ),
    "modelopt-tensor": Scheme("_scale", MODELOPT, (0, 0), "scalar", beside=(".input_scale",)),
    "modelopt-one": Scheme("_scale", MODELOPT, (0, 0), "1-D"),
    "modelopt-row": Scheme("_scale", MODELOPT, (1, 0), "1-D"),
    "modelopt-file": Scheme("_scale", None, (0, 0), "scalar", beside=(".input_scale", ".k_scale", ".v_scale")),
    "compressed-channel": Scheme("_scale", CHANNEL, (1, 0), dtype=torch.bfloat16),
    "compressed-block": Scheme("_scale", BLOCK, (16, 32), dtype=torch.bfloat16),
}  # fmt: skip


def quantized(folder: Path, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Turn the projections of a checkpoint to FP8 by a scheme; returns what their weights are as bfloat16."""
    want: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            if not name.endswith("proj.weight"):
                out[name] = want[name] = tensor
                continue
            rows, cols = tensor.shape
            down, across = (n or size for n, size in zip(scheme.block or (0, 0), (rows, cols), strict=True))
            generator = torch.Generator().manual_seed(len(name) * rows + cols)
            scale = torch.rand((-(-rows // down), -(-cols // across)), generator=generator) / 100 + 0.001
            scale = scale.to(scheme.dtype)
            out[name] = (100 * tensor.float()).clamp(-400, 400).to(FP8)
            whole = scale.float().repeat_interleave(down, 0).repeat_interleave(across, 1)[:rows, :cols]
            want[name] = (out[name].float() * whole).bfloat16()
            out[name + scheme.suffix] = {
                "2-D": scale, "1-D": scale.reshape(-1), "scalar": scale.reshape(-1)[0].clone(),
            }[scheme.shape]  # fmt: skip
            for suffix in scheme.beside:
                base = name.removesuffix(".weight") if suffix.startswith(".") else name
                out[base + suffix] = torch.tensor(0.5)
        save_file(out, file, {"format": "pt"})
        weight_map |= dict.fromkeys(out, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if scheme.quantization is not None:
        edit_json(folder / "config.json", lambda c: c.update(quantization_config=scheme.quantization))
    else:
        quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    return want


class Made(NamedTuple):
    folder: Path
    want: dict[tuple[str, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder with SCHEME-ARCH/Tiny and the converter's SCHEME-ARCH.gguf."""
    folder = tmp_path_factory.mktemp("fp8")
    want, jobs = {}, []
    for arch in ("deepseek2", "llama"):
        plain = folder / arch / "Tiny"
        _ = checkpoint(plain, V3, n_shards=1) if arch == "deepseek2" else dense_checkpoint(plain, LLAMA)
        for name, scheme in SCHEMES.items():
            model = Path(shutil.copytree(plain, folder / f"{name}-{arch}" / "Tiny"))
            want[name, arch] = quantized(model, scheme)
            jobs.append((model, folder / f"{name}-{arch}.gguf"))
    tools.convert_all(jobs, NAMED.pre)
    return Made(folder, want)


@pytest.mark.tools
@pytest.mark.parametrize("arch", ["deepseek2", "llama"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_converter_makes_the_same_file(made: Made, tmp_path: Path, name: str, arch: str) -> None:
    theirs = made.folder / f"{name}-{arch}.gguf"
    out = build_named(made.folder / f"{name}-{arch}" / "Tiny", tmp_path / "ours.gguf", uniform("BF16", "BF16"))
    assert fields(out) == fields(theirs)
    assert data(out) == data(theirs)


@pytest.mark.tools
@pytest.mark.parametrize("arch", ["deepseek2", "llama"])
@pytest.mark.parametrize("name", SCHEMES)
def test_dequant_gives_torchs_product(made: Made, tmp_path: Path, name: str, arch: str) -> None:
    out = dequant(made.folder / f"{name}-{arch}" / "Tiny", tmp_path / "out")
    require_equal(load(out), made.want[name, arch])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "hf_quant_config.json").exists()


@pytest.mark.tools
@pytest.mark.parametrize("name", ["fp8-tensor", "modelopt-row", "compressed-block"])
def test_verify_derives_the_weights_again(quantkit: Run, made: Made, tmp_path: Path, name: str) -> None:
    model = made.folder / f"{name}-llama" / "Tiny"
    out = build_named(model, tmp_path / "ours.gguf", uniform("Q8_0", "Q8_0"))
    recipe = tmp_path / "all.yaml"
    recipe.write_text('name: all\narch: [llama]\nfile_type: Q8_0\nrules:\n  - {match: "*", type: Q8_0, why: t}\n')
    done = quantkit("verify", out, "--source", model, "--recipe", recipe, "--pre", "llama-bpe", "--sample", "100%")
    assert done.returncode == 0, done.stdout
    assert "checked structure, plan, metadata, scales, all 1,156 rows" in done.stdout

"""Checkpoints dequantized, read back and compared, for tests of several rooms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from quantkit.dequant import DequantOptions, prepare, run
from quantkit.dequant.decode import Decoder, Native
from quantkit.model.sources.safetensors_dir import open_checkpoint


def dequant(
    src: Path, dst: Path, dtype: str = "bf16", shard_size: int = 5 * 10**9, *, mtp: bool = True, restart: bool = False,
    decoder: Decoder | None = None, threads: int = 2,
) -> Path:  # fmt: skip
    job = prepare(open_checkpoint(src), dst, DequantOptions(dtype, shard_size, mtp), restart)
    run(job, decoder or Native(), threads, lambda name, done: None)
    return dst


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by safetensors' own reader."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            out |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dict
    return out


def require_equal(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        same = got[name].reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
        assert bool(same.all()), name

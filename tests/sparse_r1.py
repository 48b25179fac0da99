"""DeepSeek-R1's checkpoint with all its 91,991 headers and none of its weights: 163 sparse shards."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

from quantkit.model import demo
from quantkit.model.families.known import config

N_SHARDS = 163
_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def make(folder: Path) -> Path:
    """Write the directory (a few tens of MB on disk, 688 GB apparent) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = config("deepseek-r1")
    stored: list[tuple[str, str, list[int]]] = []
    for name, shape, kind in demo.checkpoint_tensors(cfg):
        dtype = {"fp8": "F8_E4M3", "bias": "F32"}.get(kind, "BF16")
        stored.append((name, dtype, list(shape)))
        if kind == "fp8":
            stored.append((name + "_scale_inv", "F32", [-(-n // 128) for n in shape]))
    total = sum(prod(shape) * _BYTES[dtype] for _, dtype, shape in stored)
    shards: list[list[tuple[str, str, list[int]]]] = [[] for _ in range(N_SHARDS)]
    at = 0
    for item in stored:
        shards[min(N_SHARDS - 1, at * N_SHARDS // total)].append(item)
        at += prod(item[2]) * _BYTES[item[1]]
    weight_map = {}
    for i, items in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{N_SHARDS:06d}.safetensors"
        header, end = {}, 0
        for name, dtype, sizes in items:
            n = prod(sizes) * _BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end + n]}
            weight_map[name] = file
            end += n
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            f.truncate(8 + len(raw) + end)
    # the official index states twice the element count there
    index = {"metadata": {"total_size": 1369062772000}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(cfg))
    demo.make_tokenizer(folder, cfg["vocab_size"])
    return folder

"""A checkpoint cut into other shards, of the same weights: as many as are asked for, in the order of their names, or
dealt out, so that scales do not lie with their weights.

    python tests/tools/reshard.py FROM TO SHARDS [--deal]
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def reshard(folder: Path, to: Path, n_shards: int, deal: bool = False) -> Path:
    """The checkpoint of `folder` at `to`, in `n_shards` shards of about the same size."""
    from safetensors.torch import load_file, save_file

    to.mkdir(parents=True)
    tensors: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif path.name != "model.safetensors.index.json":
            shutil.copyfile(path, to / path.name)
    nbytes = [t.numel() * t.element_size() for _, t in sorted(tensors.items())]
    shards: list[dict[str, Any]] = [{} for _ in range(n_shards)]
    so_far = 0
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[i % n_shards if deal else min(n_shards - 1, n_shards * so_far // sum(nbytes))][name] = tensor
        so_far += nbytes[i]
    weight_map: dict[str, str] = {}
    for number, held in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file(held, to / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(nbytes)}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


if __name__ == "__main__":
    import sys

    given = [one for one in sys.argv[1:] if one != "--deal"]
    print(reshard(Path(given[0]), Path(given[1]), int(given[2]), "--deal" in sys.argv))

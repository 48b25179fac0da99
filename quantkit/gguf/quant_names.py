"""Names of quantizations, found in the file names of published GGUFs.

DeepSeek-R1-UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00001-of-00003.gguf    UD-IQ1_S
Q4_K_M/model-00001-of-00009.gguf                                  Q4_K_M, by its folder
DeepSeek-R1.i1-q4_k_m.gguf                                        Q4_K_M
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from .shards import split_name

_QUANT = re.compile(
    r"(?<![a-z0-9])(?:ud[-_])?(?:i?q\d_(?:k(?:_(?:xs|xl|s|m|l))?|xxs|xs|s|m|nl|0|1)|tq\d_0|bf16|f16|fp16|f32|mxfp4(?:_moe)?)"
    r"(?![a-z0-9_])",
    re.IGNORECASE,
)
#: files beside the models that are not models
_NO_MODELS = re.compile(r"imatrix|mmproj|lora|vocab", re.IGNORECASE)


class Published(NamedTuple):
    """The files of one quantization, in the order of their shards."""

    name: str
    files: tuple[str, ...]
    nbytes: int
    missing: int
    """shards that do not exist although the others' names count them"""


def quant_name(path: str) -> str | None:
    """Return what a file is quantized as, from its name, else its folder's; None if neither tells."""
    parts = PurePosixPath(path).parts
    stem = re.sub(r"\.gguf$", "", _unsharded(parts[-1]), flags=re.IGNORECASE)
    for text in (stem, *reversed(parts[:-1])):
        found = _QUANT.findall(text)
        if found:
            name = str(found[-1]).upper().replace("UD_", "UD-")
            return {"FP16": "F16"}.get(name, name)
    return None


def published(files: Mapping[str, int]) -> list[Published]:
    """Return the models among the files of a repository (path -> bytes), smallest first, each with all its shards.
    Where several models have the same quantization, each is named after its file."""
    sets: dict[tuple[str, int], list[str]] = {}
    for path in files:
        if not path.lower().endswith(".gguf") or _NO_MODELS.search(PurePosixPath(path).name):
            continue
        split = split_name(PurePosixPath(path).name)
        folder = str(PurePosixPath(path).parent)
        key = (path, 1) if split is None else (f"{folder}/{split.prefix}", split.n_shards)
        sets.setdefault(key, []).append(path)
    names = {key: quant_name(paths[0]) for key, paths in sets.items()}
    alike = [name for name in names.values() if name is not None]
    out = []
    for key, paths in sets.items():
        name = names[key]
        if name is None or alike.count(name) > 1:
            name = re.sub(r"\.gguf$", "", PurePosixPath(key[0]).name, flags=re.IGNORECASE)
        total = sum(files[path] for path in paths)
        out.append(Published(name, tuple(sorted(paths)), total, key[1] - len(paths)))
    return sorted(out, key=lambda p: (p.nbytes, p.name))


def _unsharded(name: str) -> str:
    split = split_name(name)
    return name if split is None else split.prefix

"""The plan of a dequantized checkpoint, to the byte: shards, index, config.json, and files carried over.

Shards are cut as in Hugging Face's `save_pretrained`: tensors in order, a new shard where the next tensor would
exceed the size, or just `model.safetensors` if one shard is enough. Planning reads only the names and sizes of the
files that are carried over, and opens each once to see that it can be read.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from ..base.errors import SourceError
from ..model.catalogue import SourceTensor
from ..model.families.beside import check_files
from ..model.sources.quantization import MODELOPT_CONFIG
from ..model.sources.safetensors_dir import SINGLE, Checkpoint
from ..model.sources.safetensors_header import DTYPE_BYTES, INDEX
from . import beside

FP8 = "F8_E4M3"
#: --dtype -> (safetensors' name of it, torch's)
DTYPES = {"bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16"), "f32": ("F32", "float32")}
CONFIG = "config.json"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
#: files with weights: not copied, since the output has its own
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class DequantOptions(NamedTuple):
    """The options of a run."""

    dtype: str = "bf16"
    """one of DTYPES, for what was FP8"""
    shard_size: int = 5 * 10**9
    """most bytes of tensor data in a shard; a larger tensor gets its own"""
    keep_mtp: bool = True
    """keep the layers from num_hidden_layers on (MTP), which predict further tokens"""


class Moved(NamedTuple):
    """A tensor of the output, and its source."""

    source: SourceTensor
    dtype: str
    offset: int
    """of its first byte, from the start of the shard file"""
    nbytes: int


class Shard(NamedTuple):
    """A safetensors file of the output."""

    name: str
    header: bytes
    """everything before the data"""
    tensors: tuple[Moved, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class DequantPlan:
    """The plan of the output directory."""

    options: DequantOptions
    shards: tuple[Shard, ...]
    index: bytes | None
    """None for a single shard"""
    config: bytes
    carried: tuple[tuple[str, int], ...]
    """path inside the directory, and size, of each file that is copied"""
    left_out: tuple[str, ...]
    """files with weights that are neither read nor copied"""
    refused: tuple[tuple[str, str], ...]
    """other files that are not copied, and why: links out of the folder, and what is not a regular file"""
    n_dropped: int
    """how many weights of MTP layers are dropped from the output"""

    @property
    def tensors(self) -> Iterable[Moved]:
        return (t for shard in self.shards for t in shard.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        own = sum(s.nbytes for s in self.shards) + len(self.index or b"") + len(self.config)
        return own + sum(size for _, size in self.carried)


def plan_dequant(source: Checkpoint, options: DequantOptions) -> DequantPlan:
    """Plan the output for a checkpoint. Raises SourceError if it has no FP8 weights, or if layers are to be dropped but
    it does not state how many it has."""
    stored = list(source.tensors.values())
    if not any(t.dtype == FP8 for t in stored):
        dtypes = ", ".join(sorted({t.dtype for t in stored}))
        raise SourceError(f"{source.path}: there is nothing to dequantize, its tensors are {dtypes}; use it as it is")
    check_files(source.path)
    kept = stored if options.keep_mtp else _main_layers(source, stored)
    # the order in which readers go through them: files, and tensors by name
    kept.sort(key=lambda t: (t.file, t.name))
    dtype = DTYPES[options.dtype][0]
    shards = tuple(_lay_out([(t, dtype if t.dtype == FP8 else t.dtype) for t in kept], options.shard_size))
    index = None
    if len(shards) > 1:
        where = {t.source.name: shard.name for shard in shards for t in shard.tensors}
        total = sum(shard.tensor_bytes for shard in shards)
        index = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    others = _other_files(source)
    config = _config(source.config, options)
    return DequantPlan(options, shards, index, config, *others, len(stored) - len(kept))


def _main_layers(source: Checkpoint, tensors: Iterable[SourceTensor]) -> list[SourceTensor]:
    n_layers = source.config.get("num_hidden_layers")
    if type(n_layers) is not int or n_layers < 1:
        raise SourceError(
            f"{source.path / CONFIG}: num_hidden_layers is {n_layers!r:.80}, so MTP layers cannot be told from others; "
            "keep them with --mtp keep"
        )

    def beyond(name: str) -> bool:
        found = _LAYER.search(name)
        return found is not None and int(found[1]) >= n_layers

    return [t for t in tensors if not beyond(t.name)]


def _lay_out(tensors: Sequence[tuple[SourceTensor, str]], shard_size: int) -> Iterable[Shard]:
    groups: list[list[tuple[SourceTensor, str, int]]] = [[]]
    size = 0
    for source, dtype in tensors:
        nbytes = prod(source.shape) * DTYPE_BYTES[dtype]
        if groups[-1] and size + nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append((source, dtype, nbytes))
        size += nbytes
    n = len(groups)
    for i, group in enumerate(groups):
        yield _shard(SINGLE if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors", group)


def _shard(name: str, tensors: list[tuple[SourceTensor, str, int]]) -> Shard:
    """Return a shard of these tensors, in their order, or, where that would misalign one (readers map the file),
    with the widest dtypes first, as safetensors' own writers do."""
    begin = 0
    for _, dtype, nbytes in tensors:
        if begin % DTYPE_BYTES[dtype]:
            tensors = sorted(tensors, key=lambda t: -DTYPE_BYTES[t[1]])
            break
        begin += nbytes
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for source, dtype, nbytes in tensors:
        entries[source.name] = {"dtype": dtype, "shape": source.shape, "data_offsets": (begin, begin + nbytes)}
        begin += nbytes
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    header = struct.pack("<Q", len(raw)) + raw
    moved, at = [], len(header)
    for source, dtype, nbytes in tensors:
        moved.append(Moved(source, dtype, at, nbytes))
        at += nbytes
    return Shard(name, header, tuple(moved))


def _config(config: Mapping[str, Any], options: DequantOptions) -> bytes:
    """Return the output's config.json: without quantization_config, with the new dtype, other keys unchanged."""
    out = {k: v for k, v in config.items() if k != "quantization_config"}
    # transformers renamed the key: a config has the old one, the new one, or both
    for key in [k for k in ("dtype", "torch_dtype") if k in out] or ["torch_dtype"]:
        out[key] = DTYPES[options.dtype][1]
    if not options.keep_mtp and "num_nextn_predict_layers" in out:
        out["num_nextn_predict_layers"] = 0
    return _json(out)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class _Others(NamedTuple):
    carried: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


def _other_files(source: Checkpoint) -> _Others:
    """Return the files to copy (also in subfolders), the files with weights, and what is refused, with reasons.
    Raises SourceError for a file that cannot be read: better now than at the end of the run."""
    carried, left_out, refused = [], [], []
    read = {os.path.normpath(p) for p in (*source.files, *(source.path / n for n in (CONFIG, INDEX, MODELOPT_CONFIG)))}
    for found in beside.files(source.path):
        if os.path.normpath(source.path / found.name) in read:
            continue
        if found.name.endswith(_WEIGHTS):
            left_out.append(found.name)
        elif found.refused:
            refused.append((found.name, found.refused))
        else:
            os.close(beside.open_to_copy(source.path, found.name))
            carried.append((found.name, found.nbytes))
    return _Others(tuple(carried), tuple(left_out), tuple(refused))

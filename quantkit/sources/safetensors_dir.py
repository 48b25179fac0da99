"""A checkpoint directory as Hugging Face publishes it: config.json, safetensors shards, their index.

    file  = u64 length of the header | header, JSON | data
    header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}

Only headers are read here, and everything they claim is checked: against the file, the index and
each other. FP8 weights (F8_E4M3) have their scales beside them as `<name>_scale_inv`, one for each
block of 128 x 128, those at the edges partial. `metadata.total_size` of the index is not used: the
official repository's is wrong.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..catalogue import SourceTensor
from ..errors import SourceError, UnsupportedError
from .files import Files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
MAX_HEADER = 100_000_000

#: bytes a value of the dtypes of the format
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
WEIGHT_DTYPES = ("F8_E4M3", "BF16", "F16", "F32")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


class Checkpoint:
    """A checked safetensors directory: `tensors` by name, scales apart, and their bytes on request."""

    def __init__(self, path: Path, config: Mapping[str, Any], tensors: dict[str, SourceTensor]) -> None:
        self.path = path
        self.config = config
        self.block = weight_block(path, config)
        self.tensors = {n: t for n, t in tensors.items() if not n.endswith(SCALE_SUFFIX)}
        self.scales = {n.removesuffix(SCALE_SUFFIX): t for n, t in tensors.items() if n.endswith(SCALE_SUFFIX)}
        self._check_scales()
        self.files = tuple(sorted({t.file for t in tensors.values()}))
        self._files = Files(self.files)

    def tensor(self, name: str) -> SourceTensor:
        return self.tensors[name]

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with the stored bytes of a tensor from byte `start` on."""
        self._files.read(tensor, start, out)

    def scale(self, name: str) -> npt.NDArray[np.float32]:
        """The scales of an FP8 weight, float32 [ceil(rows/block), ceil(cols/block)]."""
        st = self.scales[name]
        raw = np.empty(st.nbytes, np.uint8)
        self._files.read(st, 0, raw)
        if st.dtype == "F32":
            values = raw.view(np.float32)
        elif st.dtype == "F16":
            values = raw.view(np.float16).astype(np.float32)
        elif st.dtype == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:  # F8_E8M0: 2^(code - 127), 255 is NaN
            values = np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
            values[raw == 255] = np.nan
        return values.reshape(st.shape)

    def _check_scales(self) -> None:
        for name, scale in self.scales.items():
            weight = self.tensors.get(name)
            if weight is None:
                raise SourceError(
                    f"{scale.file}: scale '{scale.name}' has no weight '{name}' beside it; the checkpoint is incomplete"
                )
            if weight.dtype != "F8_E4M3":
                raise SourceError(f"{weight.file}: '{name}' has a scale, but is {weight.dtype}, not F8_E4M3")
            if scale.dtype not in SCALE_DTYPES:
                raise UnsupportedError(
                    f"{scale.file}: scale '{scale.name}' is {scale.dtype}, not one of {SCALE_DTYPES}"
                )
            if len(weight.shape) != 2:
                raise SourceError(f"{weight.file}: '{name}' is FP8 with shape {list(weight.shape)}, not 2-D")
            want = tuple(-(-n // b) for n, b in zip(weight.shape, self.block, strict=True))
            if scale.shape != want:
                raise SourceError(
                    f"{scale.file}: scale '{scale.name}' has the shape {list(scale.shape)}, but a weight of "
                    f"{list(weight.shape)} in blocks of {self.block[0]}x{self.block[1]} needs {list(want)}"
                )
        for name, weight in self.tensors.items():
            if weight.dtype == "F8_E4M3" and name not in self.scales:
                raise SourceError(
                    f"{weight.file}: '{name}' is F8_E4M3, but its scale '{name}{SCALE_SUFFIX}' is in no shard"
                )
            if weight.dtype == "F8_E5M2":
                raise UnsupportedError(f"{weight.file}: '{name}' is F8_E5M2; quantkit reads F8_E4M3")


def weight_block(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """The block size of FP8 weights that config.json states, 128 x 128 when it does not."""
    quant = config.get("quantization_config")
    if not isinstance(quant, dict):
        return (128, 128)
    method, fmt = quant.get("quant_method", "fp8"), quant.get("fmt", "e4m3")
    if method != "fp8" or fmt != "e4m3":
        raise UnsupportedError(
            f"{path}/config.json: quantization_config is {method}/{fmt}; quantkit reads fp8/e4m3 and unquantized"
        )
    block = quant.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise SourceError(f"{path}/config.json: weight_block_size is {block}, not two positive integers")
    return (block[0], block[1])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{path}: not valid JSON: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory and check its headers. Raises SourceError for the first thing wrong."""
    config = read_json(path / "config.json")
    if (path / INDEX).exists():
        tensors = _indexed(path)
    elif (path / SINGLE).exists():
        tensors = read_shard(path / SINGLE)
    else:
        found = sorted(p.name for p in path.glob("*.safetensors"))
        if len(found) != 1:
            what = f"{len(found)} safetensors files ({found[0]}, …) but no {INDEX}" if found else "no safetensors files"
            raise SourceError(f"{path}: a checkpoint directory needs {INDEX} or {SINGLE}; it has {what}")
        tensors = read_shard(path / found[0])
    return Checkpoint(path, config, tensors)


def _indexed(path: Path) -> dict[str, SourceTensor]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path / INDEX}: has no weight_map object")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise SourceError(f"{path / INDEX}: weight_map gives '{name}' the file {file!r}, not a name")
        shards.setdefault(file, set()).add(name)
    for file in shards:
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file or "\0" in file or not file:
            raise SourceError(f"{path / INDEX}: weight_map names '{file}', which is outside the checkpoint directory")
    tensors: dict[str, SourceTensor] = {}
    missing = [f for f in sorted(shards) if not (path / f).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{path}: shard {missing[0]}{more} of the {len(shards)} that {INDEX} names is missing; download it again"
        )
    for file in sorted(shards):
        here = read_shard(path / file)
        if here.keys() != shards[file]:
            lacking = sorted(shards[file] - here.keys())
            if lacking:
                raise SourceError(f"{path / file}: '{lacking[0]}' should be here by {INDEX}, but is not")
            extra = sorted(here.keys() - shards[file])[0]
            elsewhere = f"places it in {weight_map[extra]}" if extra in weight_map else "does not name it"
            raise SourceError(f"{path / file}: holds '{extra}', but {INDEX} {elsewhere}")
        tensors.update(here)
    return tensors


class _TwiceError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _TwiceError(next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i])))
    return out


def read_shard(path: Path) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file, by name. Raises SourceError for anything its header should not say."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise SourceError(f"{path}: {size} bytes are too few for a safetensors file")
            (n,) = struct.unpack("<Q", head)
            if n > min(size - 8, MAX_HEADER):
                raise SourceError(
                    f"{path}: claims a header of {n:,} bytes, but has {size - 8:,} after the length "
                    f"(at most {MAX_HEADER:,}); it is truncated or no safetensors file"
                )
            raw = f.read(n)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_once)
    except _TwiceError as e:
        raise SourceError(f"{path}: '{e}' occurs twice in the header") from None
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{path}: the header is not valid JSON: {str(e)[:200]}") from None
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    start, available = 8 + n, size - 8 - n
    tensors = {name: _tensor(path, name, info, start, available) for name, info in header.items()}
    end = 0
    for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if t.offset - start != end:
            how = "overlaps the tensor before it" if t.offset - start < end else "leaves a hole before it"
            raise SourceError(f"{path}: the data of '{t.name}' at {t.offset - start:,} {how}, which ends at {end:,}")
        end += t.nbytes
    if end != available:
        raise SourceError(f"{path}: the tensors end at {end:,} of {available:,} data bytes; the file is not whole")
    return tensors


def _tensor(path: Path, name: str, info: Any, start: int, available: int) -> SourceTensor:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        ok = type(begin) is int and type(end) is int and all(type(d) is int and d >= 0 for d in shape)
        known = dtype in DTYPE_BYTES
    except (KeyError, TypeError, ValueError):
        ok = known = False
    if not ok or not isinstance(shape, list):
        raise SourceError(f"{path}: the header entry of '{name}' is malformed: {str(info)[:120]}")
    if not known:
        raise UnsupportedError(f"{path}: '{name}' has the unknown dtype {str(dtype)[:40]!r}")
    want = prod(shape) * DTYPE_BYTES[dtype]
    if not 0 <= begin <= end <= available:
        raise SourceError(
            f"{path}: the data of '{name}' is said to be at {begin:,}-{end:,}, outside the file's {available:,} "
            "data bytes; the shard is truncated: download it again"
        )
    if end - begin != want:
        raise SourceError(f"{path}: '{name}' is {dtype} {shape}, {want:,} bytes, but its offsets span {end - begin:,}")
    return SourceTensor(name, dtype, tuple(shape), path, start + begin, want)

"""A checkpoint directory as Hugging Face publishes it: config.json, safetensors shards, their index.

    file  = u64 length of the header | header, JSON | data
    header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}

Only headers are read here, and everything they claim is checked: against the file, the index and
each other. FP8 weights (F8_E4M3) have their scales beside them, as DeepSeek has it by the name
`<name>_scale_inv` and one for each block of 128 x 128, those at the edges partial (quantization.py has
the other ways); U8 scales are powers of two (F8_E8M0) where config.json has the scale_fmt "ue8m0".
`metadata.total_size` of the index is not used: the official repository's is wrong.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError, UnsupportedError
from ...base.first_bytes import ENOUGH, not_json, not_the_file
from ..catalogue import SourceTensor
from .files import Files, regular_size
from .kinds import other_folder
from .quantization import MODELOPT_CONFIG, other_scale, read_scheme, sorted_out

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
MAX_NAME = 256
MAX_DIMS = 8
MAX_DEPTH = 32

#: bytes a value of the dtypes of the format
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


class Checkpoint:
    """A checked safetensors directory: `tensors` by name, scales apart, and their bytes on request."""

    def __init__(self, path: Path, config: Mapping[str, Any], tensors: dict[str, SourceTensor]) -> None:
        self.path = path
        self.config = config
        self._scheme = read_scheme(path, config, _modelopt(path))
        self.block, self.scales, self.tensors = sorted_out(self._scheme, tensors)
        if (config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0":
            self.scales = {n: t._replace(dtype="F8_E8M0") if t.dtype == "U8" else t for n, t in self.scales.items()}
        self._check_scales()
        self.files = tuple(sorted({t.file for t in tensors.values()}))
        self._files = Files(self.files)

    def tensor(self, name: str) -> SourceTensor:
        return self.tensors[name]

    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with the stored bytes of a tensor from byte `start` on."""
        self._files.read(tensor, start, out)

    def will_need(self, tensor: SourceTensor, start: int, nbytes: int) -> None:
        """Ask for stored bytes of a tensor ahead of their reading."""
        self._files.will_need(tensor, start, nbytes)

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
            values = np.ldexp(np.float32(1), np.minimum(raw, 254).astype(np.int32) - 127).astype(np.float32)
            values[raw == 255] = np.nan
        return values.reshape(st.shape)

    def _check_scales(self) -> None:
        for name, scale in self.scales.items():
            weight = self.tensors.get(name)
            if weight is None:
                raise SourceError(
                    f"{scale.file}: scale '{scale.name}' has no weight '{name}' in any shard; the checkpoint is not "
                    "whole: download it again"
                )
            if weight.dtype != "F8_E4M3":
                raise SourceError(
                    f"{weight.file}: '{name}' has a scale, but is {weight.dtype}, not F8_E4M3; only one of the two can "
                    "be right: download the checkpoint again"
                )
            if scale.dtype not in SCALE_DTYPES:
                raise UnsupportedError(
                    f"{scale.file}: scale '{scale.name}' is {scale.dtype}; quantkit reads {', '.join(SCALE_DTYPES)}"
                )
            if len(weight.shape) != 2:
                raise SourceError(
                    f"{weight.file}: '{name}' is FP8 with the shape {list(weight.shape)}; blocks of scales need two "
                    "dimensions"
                )
            want = tuple(-(-n // b) for n, b in zip(weight.shape, self.block, strict=True))
            if scale.shape != want:
                each = f"in blocks of {self.block[0]}x{self.block[1]}"
                if self.block[1] >= weight.shape[1] and self._scheme.block is None:
                    each = f"with one a {'row' if self.block[0] == 1 else 'tensor'}"
                raise SourceError(
                    f"{scale.file}: scale '{scale.name}' has the shape {list(scale.shape)}, but a weight of "
                    f"{list(weight.shape)} {each} needs {list(want)}; do config.json and shards belong together?"
                )
        for name, weight in self.tensors.items():
            if weight.dtype == "F8_E4M3" and name not in self.scales:
                wanted = f"{name}{self._scheme.suffix}"
                if other := other_scale(name, self.tensors):
                    raise UnsupportedError(
                        f"{weight.file}: the scale of the FP8 weight '{name}' is '{other}', where a checkpoint of its "
                        f"config.json has '{wanted}'; quantkit and llama.cpp's converter read that only: get the "
                        "weights it was made from, or FP8 with such scales"
                    )
                raise SourceError(
                    f"{weight.file}: '{name}' is F8_E4M3, but its scale '{wanted}' is in no shard; the checkpoint is "
                    "not whole: download it again"
                )
            if weight.dtype == "F8_E5M2":
                raise UnsupportedError(f"{weight.file}: '{name}' is F8_E5M2; quantkit reads F8_E4M3")


def _modelopt(path: Path) -> dict[str, Any] | None:
    return read_json(path / MODELOPT_CONFIG) if (path / MODELOPT_CONFIG).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
    try:
        size = regular_size(path)
        if size > MAX_HEADER:
            raise SourceError(f"{path}: {size:,} bytes are too many for it (at most {MAX_HEADER:,})")
        raw = path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    return parse_json(path, raw)


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object that was read from a file. Raises SourceError."""
    if says := not_json(raw[:ENOUGH]):
        raise SourceError(f"{path}: {says}")
    return _object(f"{path}: is", raw, dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory and check its headers. Raises SourceError for the first thing wrong."""
    try:
        if says := other_folder(path):
            raise UnsupportedError(f"{path}: {says}")
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    config = read_json(path / "config.json")
    try:
        if (path / INDEX).exists():
            return Checkpoint(path, config, _indexed(path))
        found = [SINGLE] if (path / SINGLE).exists() else sorted(p.name for p in path.glob("*.safetensors"))
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    if len(found) != 1:
        what = f"{len(found)} safetensors files ({found[0]}, …) but no {INDEX}" if found else "no safetensors files"
        raise SourceError(
            f"{path}: a checkpoint directory needs {INDEX} or {SINGLE}; it has {what}: download what is missing"
        )
    return Checkpoint(path, config, read_shard(path / found[0]))


def _indexed(path: Path) -> dict[str, SourceTensor]:
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: has no weight_map object; download it again")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        _check_name(index, name)
        if not isinstance(file, str):
            raise SourceError(f"{index}: weight_map gives '{name}' the file {file!r:.80}, not a name")
        shards.setdefault(file, set()).add(name)
    for file in shards:
        pure = PurePosixPath(file)
        if not file.isprintable() or not 0 < len(file) <= MAX_NAME:
            raise SourceError(f"{index}: weight_map names {file!r:.80}, which is not a file name")
        if pure.is_absolute() or ".." in pure.parts or "\\" in file:
            raise SourceError(f"{index}: weight_map names '{file}', which is outside the checkpoint directory")
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
                raise SourceError(
                    f"{path / file}: '{lacking[0]}' should be here by {INDEX}, but is not; download both again"
                )
            extra = sorted(here.keys() - shards[file])[0]
            elsewhere = f"places it in {weight_map[extra]}" if extra in weight_map else "does not name it"
            raise SourceError(f"{path / file}: holds '{extra}', but {INDEX} {elsewhere}; download both again")
        tensors.update(here)
    return tensors


def _object(what: str, raw: bytes, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    """A JSON object of modest depth. Raises SourceError that begins with `what`."""
    try:
        value = json.loads(raw, object_pairs_hook=pairs)
        level = [value]
        for _ in range(MAX_DEPTH):
            inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
            level = [v for group in inner for v in group]
        if level:
            raise RecursionError(f"nested deeper than {MAX_DEPTH}")
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{what} not valid JSON: {str(e)[:200]}; download it again") from None
    if not isinstance(value, dict):
        raise SourceError(f"{what} a JSON {type(value).__name__}, not an object; download it again")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        counts = Counter(k for k, _ in pairs)
        twice = next(k for k, n in counts.items() if n > 1)
        raise ValueError(f"{twice!r:.80} occurs twice")
    return out


def _check_name(file: Path, name: str) -> None:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise SourceError(f"{file}: {name!r:.80} is not a name for a tensor (1 to {MAX_NAME} printable characters)")


def read_shard(path: Path) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file, by name. Raises SourceError for anything its header should not say."""
    try:
        size = regular_size(path)
        with open(path, "rb") as f:
            if says := not_the_file(f.read(ENOUGH)):
                raise SourceError(f"{path}: {says}")
            f.seek(0)
            head = f.read(8)
            if len(head) < 8:
                raise SourceError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
            (n,) = struct.unpack("<Q", head)
            if n > min(size - 8, MAX_HEADER):
                raise SourceError(
                    f"{path}: claims a header of {n:,} bytes, but has {size - 8:,} after the length "
                    f"(at most {MAX_HEADER:,}); it is truncated or not a safetensors file: download it again"
                )
            raw = f.read(n)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    header = _object(f"{path}: the header is", raw, _once)
    header.pop("__metadata__", None)
    start, available = 8 + n, size - 8 - n
    tensors = {name: _tensor(path, name, info, start, available) for name, info in header.items()}
    end = 0
    for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if t.offset - start != end:
            how = "overlaps the tensor before it" if t.offset - start < end else "leaves a hole before it"
            raise SourceError(
                f"{path}: the data of '{t.name}' at {t.offset - start:,} {how}, which ends at {end:,}; "
                "download it again"
            )
        end += t.nbytes
    if end != available:
        raise SourceError(
            f"{path}: the tensors end at {end:,} of {available:,} data bytes; the file is not as it was written: "
            "download it again"
        )
    return tensors


def _tensor(path: Path, name: str, info: Any, start: int, available: int) -> SourceTensor:
    _check_name(path, name)
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        ok = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_DIMS
        ok = ok and all(type(n) is int and 0 <= n < 1 << 62 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError):
        ok = False
    if not ok:
        raise SourceError(f"{path}: the header entry of '{name}' is malformed: {info!r:.80}; download it again")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedError(f"{path}: '{name}' has the unknown dtype {dtype!r:.80}")
    want = prod(shape) * DTYPE_BYTES[dtype]
    if not begin <= end <= available:
        raise SourceError(
            f"{path}: the data of '{name}' is said to be at {begin:,}-{end:,}, outside the file's {available:,} "
            "data bytes; the shard is truncated: download it again"
        )
    if end - begin != want:
        raise SourceError(
            f"{path}: '{name}' is {dtype} {shape}, {want:,} bytes, but its offsets span {end - begin:,}; "
            "download it again"
        )
    return SourceTensor(name, dtype, tuple(shape), path, start + begin, want)

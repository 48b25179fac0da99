"""What the files of a checkpoint in safetensors say, from their bytes, wherever those came from: headers and the index.

    file  = u64 length of the header | header, JSON | data
    header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}

Everything that is claimed is checked: against the file's size, the index and each other. `where` is the place for
messages.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from ...base.errors import SourceError, UnsupportedError
from ...base.first_bytes import ENOUGH, not_json, not_the_file
from ..catalogue import SourceTensor

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
#: bytes of a file that one cut short may have had
MAX_FILE = 1 << 46
MAX_NAME = 256
MAX_DIMS = 8
MAX_DEPTH = 32

#: bytes a value of the dtypes of the format
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


def parse_json(where: str, raw: bytes) -> dict[str, Any]:
    """A JSON object that was read from a file. Raises SourceError."""
    if says := not_json(raw[:ENOUGH]):
        raise SourceError(f"{where}: {says}")
    return _object(f"{where}: is", raw, dict)


def header_bytes(where: str, head: bytes, size: int) -> int:
    """The bytes that the header has after its length, from the first bytes of a file of `size`. Raises SourceError."""
    if says := not_the_file(head[:ENOUGH]):
        raise SourceError(f"{where}: {says}")
    if len(head) < 8:
        raise SourceError(f"{where}: {size} bytes are too few for a safetensors file; download it again", cut=True)
    n: int = struct.unpack("<Q", head[:8])[0]
    if n > min(size - 8, MAX_HEADER):
        raise SourceError(
            f"{where}: claims a header of {n:,} bytes, but has {size - 8:,} after the length "
            f"(at most {MAX_HEADER:,}); it is truncated or no safetensors file: download it again",
            cut=n <= MAX_HEADER,
        )
    return n


def parse_index(where: str, raw: bytes) -> dict[str, set[str]]:
    """The names of the tensors of each shard, from the bytes of the index. Raises SourceError."""
    weight_map = parse_json(where, raw).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: has no weight_map object; download it again")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        _check_name(where, name)
        if not isinstance(file, str):
            raise SourceError(f"{where}: weight_map gives '{name}' the file {file!r:.80}, not a name")
        shards.setdefault(file, set()).add(name)
    for file in shards:
        pure = PurePosixPath(file)
        if not file.isprintable() or not 0 < len(file) <= MAX_NAME:
            raise SourceError(f"{where}: weight_map names {file!r:.80}, which is no file name")
        if pure.is_absolute() or ".." in pure.parts or "\\" in file:
            raise SourceError(f"{where}: weight_map names '{file}', which is outside the checkpoint directory")
    return shards


def check_shard(where: str, here: Mapping[str, SourceTensor], shards: Mapping[str, set[str]], file: str) -> None:
    """Raise SourceError where a shard does not hold just what the index says."""
    lacking = sorted(shards[file] - here.keys())
    if lacking:
        raise SourceError(f"{where}: '{lacking[0]}' should be here by {INDEX}, but is not; download both again")
    extra = sorted(here.keys() - shards[file])
    if extra:
        other = next((name for name, held in shards.items() if extra[0] in held), None)
        elsewhere = f"places it in {other}" if other is not None else "does not name it"
        raise SourceError(f"{where}: holds '{extra[0]}', but {INDEX} {elsewhere}; download both again")


def parse_shard(where: str, raw: bytes, size: int, file: Path, cut: bool = False) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file of `size` bytes, by name, from its header (without the length before it).
    `file` is what they name as their place. If `cut`, the data may be missing at the end. Raises SourceError for
    anything that the header should not say."""
    header = _object(f"{where}: the header is", raw, _once)
    header.pop("__metadata__", None)
    start, available = 8 + len(raw), size - 8 - len(raw)
    room = MAX_FILE if cut else available
    tensors = {name: _tensor(where, name, info, start, room, file) for name, info in header.items()}
    end = 0
    for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if t.offset - start != end:
            how = "overlaps the tensor before it" if t.offset - start < end else "leaves a hole before it"
            raise SourceError(
                f"{where}: the data of '{t.name}' at {t.offset - start:,} {how}, which ends at {end:,}; "
                "download it again"
            )
        end += t.nbytes
    if end != available and not (cut and end > available):
        raise SourceError(
            f"{where}: the tensors end at {end:,} of {available:,} data bytes; the file is not as it was written: "
            "download it again"
        )
    return tensors


def _tensor(where: str, name: str, info: Any, start: int, available: int, file: Path) -> SourceTensor:
    _check_name(where, name)
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        ok = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_DIMS
        ok = ok and all(type(n) is int and 0 <= n < 1 << 62 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError):
        ok = False
    if not ok:
        raise SourceError(f"{where}: the header entry of '{name}' is malformed: {info!r:.80}; download it again")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedError(f"{where}: '{name}' has the unknown dtype {dtype!r:.80}")
    want = prod(shape) * DTYPE_BYTES[dtype]
    if not begin <= end <= available:
        raise SourceError(
            f"{where}: the data of '{name}' is said to be at {begin:,}-{end:,}, outside the file's {available:,} "
            "data bytes; the shard is truncated: download it again",
            cut=begin <= end < MAX_FILE,
        )
    if end - begin != want:
        raise SourceError(
            f"{where}: '{name}' is {dtype} {shape}, {want:,} bytes, but its offsets span {end - begin:,}; "
            "download it again"
        )
    return SourceTensor(name, dtype, tuple(shape), file, start + begin, want)


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


def _check_name(where: str, name: str) -> None:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise SourceError(f"{where}: {name!r:.80} is no name for a tensor (1 to {MAX_NAME} printable characters)")

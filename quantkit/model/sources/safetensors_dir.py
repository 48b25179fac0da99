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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError, UnsupportedError
from ...base.first_bytes import ENOUGH
from ..catalogue import UNREAD, SourceTensor
from .files import Files, Reader, regular_size
from .kinds import other_folder
from .quantization import MODELOPT_CONFIG, is_weight, other_scale, read_scheme, sorted_out
from .safetensors_header import (
    INDEX,
    MAX_HEADER,
    check_shard,
    header_bytes,
    parse_index,
    parse_json,
    parse_shard,
)

SINGLE = "model.safetensors"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


class Checkpoint:
    """A checked safetensors directory: `tensors` by name, scales apart, and their bytes on request.

    `path` is the folder of config.json, the tokenizer and what else is small; a tensor's `file` is where its shard is
    in it, or would be. `absent` are tensors whose headers are not here, with their shards. Where `lacks` says why,
    weights cannot be read, and `note` what is not here. `reader` reads them otherwise than from the files.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        tensors: dict[str, SourceTensor],
        absent: Mapping[str, Path] | None = None,
        lacks: str = "",
        note: str = "",
        reader: Reader | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.lacks, self.note = lacks, note
        self.commit = ""
        """of the repository on the Hub that it was opened at"""
        self._absent = absent or {}
        self._scheme = read_scheme(path, config, _modelopt(path))
        self.block, self.scales, self.tensors = sorted_out(self._scheme, tensors)
        if (config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0":
            self.scales = {n: t._replace(dtype="F8_E8M0") if t.dtype == "U8" else t for n, t in self.scales.items()}
        self._check_scales()
        self.files = tuple(sorted({t.file for t in tensors.values()}))
        self._files: Reader = reader or Files(self.files)
        self.store = reader
        """what shards of a repository on the Hub come and go in (shard_store); None where they lie here"""

    @property
    def named(self) -> dict[str, SourceTensor]:
        """The weights that are known, and those whose headers are not here, as `UNREAD`."""
        unread = {n: SourceTensor(n, UNREAD, (), f, 0, 0) for n, f in self._absent.items()}
        return self.tensors | {n: t for n, t in unread.items() if is_weight(self._scheme, n)}

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
                if name in self._absent:
                    continue
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
                if wanted in self._absent:
                    continue
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
    return parse_json(str(path), read_small(path))


def read_small(path: Path) -> bytes:
    """The bytes of a file of JSON. Raises SourceError."""
    try:
        size = regular_size(path)
        if size > MAX_HEADER:
            raise SourceError(f"{path}: {size:,} bytes are too many for it (at most {MAX_HEADER:,})")
        return path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None


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
    shards = parse_index(str(path / INDEX), read_small(path / INDEX))
    missing = [f for f in sorted(shards) if not (path / f).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{path}: shard {missing[0]}{more} of the {len(shards)} that {INDEX} names is missing; download it again",
            cut=True,
        )
    tensors: dict[str, SourceTensor] = {}
    for file in sorted(shards):
        here = read_shard(path / file)
        check_shard(str(path / file), here, shards, file)
        tensors.update(here)
    return tensors


def open_partial(path: Path, whole: SourceError) -> Checkpoint:
    """A checkpoint of which shards are missing or cut short, as `whole` says who wanted all of it: what its headers say
    as far as they are here. Raises SourceError for what is wrong with those."""
    if not (path / INDEX).exists():
        single = next(iter(sorted(path.glob("*.safetensors"))), path / SINGLE)
        note = f"not whole, so nothing can be built from it: {single.name} ends before its data"
        return Checkpoint(path, read_json(path / "config.json"), read_shard(single, True), None, str(whole), note)
    shards = parse_index(str(path / INDEX), read_small(path / INDEX))
    tensors: dict[str, SourceTensor] = {}
    absent: dict[str, Path] = {}
    gone, short = [], []
    for file in sorted(shards):
        try:
            here = read_shard(path / file, cut=True)
        except (SourceError, FileNotFoundError) as e:
            if isinstance(e, SourceError) and not e.cut:
                raise
            gone.append(file)
            absent |= dict.fromkeys(shards[file], path / file)
            continue
        check_shard(str(path / file), here, shards, file)
        tensors.update(here)
        if any(t.offset + t.nbytes > (path / file).stat().st_size for t in here.values()):
            short.append(file)
    says = [f"{_some(gone)} of {len(shards)} is missing, and shapes in it are config.json's"] if gone else []
    says += [f"{_some(short)} of {len(shards)} ends before its data"] if short else []
    note = f"not whole, so nothing can be built from it: {'; '.join(says)}"
    return Checkpoint(path, read_json(path / "config.json"), tensors, absent, str(whole), note)


def _some(files: list[str]) -> str:
    return f"shard {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def read_shard(path: Path, cut: bool = False) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file, by name; if `cut`, its data may be missing at the end. Raises SourceError
    for anything its header should not say; if `cut`, FileNotFoundError."""
    try:
        size = regular_size(path)
        with open(path, "rb") as f:
            n = header_bytes(str(path), f.read(ENOUGH), size)
            f.seek(8)
            raw = f.read(n)
    except OSError as e:
        if cut and isinstance(e, FileNotFoundError):
            raise
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    return parse_shard(str(path), raw, size, path, cut)

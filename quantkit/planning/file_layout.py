"""Plan -> files, offsets, header bytes, exact sizes. Pure: no I/O, so headers are written before any weight is read.

The keys are those that llama-quantize writes: the source's keys in order, then general.quantization_version
and general.file_type, the recipe's metadata, and what llama-quantize records about the importance matrix. Where a
policy filled in missing values, one of quantkit's own keys says so. Split files are what llama-gguf-split makes
from the whole file (quantkit.gguf.shards). Source: src/llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ..base.errors import OutputError
from ..gguf.header import BOOL, F32, KV, STRING, U32, header_bytes, is_other_alignment, kv, kv_array, pad
from ..gguf.shards import MAX_SHARDS, Limits, check_prefix, groups, shard_name, split_kvs
from ..gguf.types import FILE_TYPES
from ..rounding.options import VERSION as ROUNDING_VERSION
from .plan import Plan, Planned

GGML_QUANT_VERSION = 2
POLICY_KEY = "quantkit.imatrix.policy"
#: prefix of the keys about tensors that are not rounded as ggml does it
ROUNDING_PREFIX = "quantkit.rounding."
_MAX_VALUE = 127
#: the GGUF types in which llama-quantize writes the values of --override-kv
_OVERRIDE_TYPES = {"str": STRING, "int": U32, "float": F32, "bool": BOOL}


class ImatrixFacts(Protocol):
    """What the metadata says about an importance matrix."""

    @property
    def path_as_given(self) -> str: ...
    @property
    def datasets(self) -> tuple[str, ...]: ...
    @property
    def n_chunks(self) -> int: ...
    @property
    def entries(self) -> Mapping[str, object]: ...


class Placed(NamedTuple):
    """A tensor and its place: `offset` in bytes from the start of its file."""

    planned: Planned
    offset: int


@dataclass(frozen=True)
class FileLayout:
    """One output file."""

    header: bytes
    tensors: tuple[Placed, ...]
    nbytes: int
    """exact size, padding included"""


def output_kvs(plan: Plan, imatrix: ImatrixFacts | None) -> tuple[KV, ...]:
    """Return the keys of the output. An alignment key other than 32 is dropped: llama-quantize copies it but aligns to
    32 all the same, which breaks the file unless its header happens to end at a multiple. The policy that the source
    records is dropped too."""
    moved = ("general.quantization_version", "general.file_type", POLICY_KEY)
    out = [
        item
        for item in plan.catalogue.kvs
        if item.key not in moved and not item.key.startswith(ROUNDING_PREFIX) and not is_other_alignment(item)
    ]
    added = [
        kv("general.quantization_version", U32, GGML_QUANT_VERSION),
        kv("general.file_type", U32, FILE_TYPES[plan.recipe.file_type]),
    ]
    added += [kv(o.key, _OVERRIDE_TYPES[o.type], o.value) for o in plan.recipe.metadata]
    if imatrix is not None:
        added.append(kv("quantize.imatrix.file", STRING, _cut(imatrix.path_as_given)))
        if imatrix.datasets:
            added.append(kv("quantize.imatrix.dataset", STRING, _cut(imatrix.datasets[0])))
        added.append(kv("quantize.imatrix.entries_count", U32, len(imatrix.entries)))
        if imatrix.n_chunks > 0:
            added.append(kv("quantize.imatrix.chunks_count", U32, imatrix.n_chunks))
        if plan.applied:
            added.append(kv(POLICY_KEY, STRING, plan.applied))
    added += rounding_kvs(plan)
    # llama-quantize sets an existing key by removing it and appending the new one
    replaced = {item.key for item in added}
    return tuple([item for item in out if item.key not in replaced] + added)


def rounding_kvs(plan: Plan) -> list[KV]:
    """Return the keys about tensors that are not rounded as ggml does it. With the source and the covariance they are
    enough to make the same rows again. While the plan has no covariance, its digest is all zeros."""
    rounding = plan.rounding
    listed = [] if rounding is None else rounding.listed()
    if rounding is None or not listed:
        return []
    said = {"options": rounding.options}
    if rounding.policy_text:
        said["policy"] = rounding.policy_text
    if rounding.device is not None:
        said["device"] = rounding.device.text
    covariance = rounding.covariance
    name, digest = rounding.digest()
    said[name] = digest
    if covariance is not None and covariance.held_out is not None:
        said["held_out"] = covariance.held_out.digest
    if covariance is not None and covariance.weighting:
        said["weights"] = covariance.weighting
    return [
        kv(ROUNDING_PREFIX + "version", U32, ROUNDING_VERSION),
        *(kv(ROUNDING_PREFIX + name, STRING, value) for name, value in said.items()),
        kv(ROUNDING_PREFIX + "tokens", U32, 0 if covariance is None else covariance.n_tokens),
        kv_array(ROUNDING_PREFIX + "tensors", STRING, listed),
    ]


def _cut(text: str) -> bytes:
    """Cut a string to the 127 bytes that llama-quantize keeps when it records one."""
    return text.encode()[:_MAX_VALUE]


def lay_out(plan: Plan, kvs: Sequence[KV], split_max_size: int | None = None) -> tuple[FileLayout, ...]:
    """Return the output files, in order. `split_max_size`: bytes of tensor data in a shard, None for a single file;
    a larger tensor gets its own shard. Raises OutputError if there are more shards than can be numbered."""
    if split_max_size is None:
        return (_file(kvs, plan.tensors),)
    cut = groups([t.nbytes for t in plan.tensors], Limits(max_bytes=split_max_size))
    if len(cut) > MAX_SHARDS:
        raise OutputError(f"--split-max-size {split_max_size:,} makes {len(cut):,} shards, more than {MAX_SHARDS:,}")
    out = []
    for no, (start, stop) in enumerate(cut):
        own = split_kvs(no, len(cut), len(plan.tensors))
        out.append(_file([*kvs, *own] if no == 0 else own, plan.tensors[start:stop]))
    return tuple(out)


def _file(kvs: Sequence[KV], tensors: Iterable[Planned]) -> FileLayout:
    infos, offsets, at = [], [], 0
    for t in tensors:
        infos.append((t.tensor.name, t.tensor.shape, t.type, at))
        offsets.append((t, at))
        at += pad(t.nbytes)
    header = header_bytes(kvs, infos)
    placed = tuple(Placed(t, len(header) + offset) for t, offset in offsets)
    return FileLayout(header, placed, len(header) + at)


def file_names(out: Path, n_files: int, split: bool) -> tuple[Path, ...]:
    """Return OUT itself, or PREFIX-00001-of-0000N.gguf and so on in llama.cpp's numbering. Raises OutputError if OUT
    is already numbered."""
    if not split:
        return (out,)
    check_prefix(out)
    prefix = out.name.removesuffix(".gguf")
    return tuple(out.with_name(shard_name(prefix, i, n_files)) for i in range(n_files))

"""Published advice for running a model: how to sample tokens, and the type of the KV cache.

For DeepSeek-R1's dynamic quantizations (January 2025): temperature 0.6, min-p 0.05, a K cache of q4_0, seed 3407.
Today's llama.cpp keeps no V cache for MLA models (attn_k_b + attn_v_b), refuses different types for their K and V, and
quantizes V only with flash attention (src/llama-context.cpp). With attn_kv_b there is a V cache, which stays f16 as
published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..base.errors import UnsupportedError
from ..gguf.header import F32, KV, STRING, decode
from ..gguf.types import QTYPES
from ..model.catalogue import Catalogue
from ..planning.fit import cache_bytes, has_mla_cache

SEED = 3407
_MIN_P = 0.05
_R1_TEMP = 0.6


@dataclass(frozen=True)
class Sampling:
    """How to sample tokens. `temp` None leaves it to the program."""

    temp: float | None
    min_p: float
    seed: int
    why: str


@dataclass(frozen=True)
class CacheTypes:
    """Types of the KV cache. `value` None: V is a view of K and has no bytes of its own."""

    key: str
    value: str | None

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of llama.cpp's tools: -ctk, -ctv, and -fa if V is quantized, which requires it."""
        out: list[str] = [] if self.key == "f16" else ["-ctk", self.key]
        value = self.key if self.value is None else self.value
        if value != "f16":
            out += ["-ctv", value]
        if is_quantized(value):
            out += ["-fa", "on"]
        return tuple(out)


def is_quantized(cache_type: str) -> bool:
    """Whether values of that type are stored in blocks."""
    return QTYPES[cache_type.upper()].block > 1


def is_deepseek(catalogue: Catalogue) -> bool:
    """Whether the published advice on R1's cache applies to this model."""
    return catalogue.arch == "deepseek2"


def cache_types(catalogue: Catalogue, key: str | None, value: str | None) -> tuple[CacheTypes, str]:
    """Return the types of the KV cache, as asked for or else as published, and a note. Raises UnsupportedError for two
    types where llama.cpp takes only one, and for blocks that do not divide a head."""
    note = ""
    if key is None:
        key = "q4_0" if is_deepseek(catalogue) else "f16"
        try:
            cache_bytes(catalogue, 1, key, "f16")
        except UnsupportedError:
            if key == "f16":
                raise
            key, note = "f16", "the published q4_0 K cache does not divide this model's heads; f16 it is"
    if not has_mla_cache(catalogue):
        return CacheTypes(key, value or "f16"), note
    if value is not None and value != key:
        raise UnsupportedError(
            f"{catalogue.model}: llama.cpp keeps only K for it (MLA), and refuses K of {key} with V of {value}; "
            "leave --cache-type-v out"
        )
    return CacheTypes(key, None), note


def sampling(catalogue: Catalogue, thinks: bool, temp: float | None, seed: int) -> Sampling:
    """Return the sampling: as asked for, else from the file (general.sampling.*), else as published for R1, also for
    its distills, which think too."""
    kvs = {item.key: item for item in catalogue.kvs}
    own, min_p = _float(kvs, "general.sampling.temp"), _float(kvs, "general.sampling.min_p")
    low = _MIN_P if min_p is None else min_p
    if temp is not None:
        return Sampling(temp, low, seed, "as asked for")
    if own is not None:
        return Sampling(own, low, seed, "temperature by the file's general.sampling.temp")
    if thinks or "r1" in (_text(kvs, "general.name") + catalogue.model).lower():
        return Sampling(_R1_TEMP, low, seed, "as published for R1")
    return Sampling(None, low, seed, "no temperature is published in the file, so the program's own")


def _float(kvs: Mapping[str, KV], key: str) -> float | None:
    item = kvs.get(key)
    if item is None or item.type != F32:
        return None
    value = float(decode(item))
    return round(value, 6) if 0 <= value <= 10 else None


def _text(kvs: Mapping[str, KV], key: str) -> str:
    item = kvs.get(key)
    return str(decode(item)) if item is not None and item.type == STRING else ""

"""The rope: where config.json defines it, and its scaling as keys (linear, yarn) or as a tensor (llama3).

    rope_scaling, rope_theta                          until transformers 4
    rope_parameters, with rope_theta inside           since transformers 5; preferred if both exist
    rope_parameters.full_attention, .sliding_attention, each with a rope_theta

Source: llama.cpp's conversion/base.py, TextModel.__init__ and set_gguf_parameters, and conversion/llama.py,
generate_extra_tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.errors import UnsupportedError
from ...gguf.header import F32, I32, KV, STRING, U32, kv, kv_array
from .config import Config

_BOTH = (
    "config.json has rope_parameters (transformers 5) and rope_scaling (before), and they differ: rope_parameters was "
    "taken, as llama.cpp does"
)
_NESTED = ("full_attention", "sliding_attention")
_LOCAL_THETAS = ("local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq")
_THETAS = ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base")
_CONTEXT = "original_max_position_embeddings"


class Rope(NamedTuple):
    """What config.json says about the rope."""

    kind: str | None
    """linear, yarn or llama3; None without scaling"""
    scaling: Config
    """the section with the scaling's numbers; empty if there is none"""
    theta: float | None
    """the base of the frequencies; None if neither config.json nor its class has one"""
    local_theta: float | None
    """the base for layers with a sliding window"""
    sections: tuple[int, ...]
    """how many values of a head each of up to four coordinates rotates"""
    mscale_all_dim: float | None
    notes: tuple[str, ...]

    def kvs(self, arch: str) -> Iterator[KV]:
        """Yield the rope keys in the middle of an arch's keys: scaling, sections, bases."""
        if self.kind in ("linear", "yarn"):
            yield from _scaling_kvs(arch, self.kind, self.scaling)
        if self.sections:
            yield kv_array(f"{arch}.rope.dimension_sections", I32, (*self.sections, 0, 0, 0, 0)[:4])
        if self.theta is not None:
            yield kv(f"{arch}.rope.freq_base", F32, self.theta)
        if self.local_theta is not None:
            yield kv(f"{arch}.rope.freq_base_swa", F32, self.local_theta)


def read_rope(c: Config, arch: str, kinds: tuple[str, ...], theta: float | None) -> Rope:
    """Read the rope of a config. `kinds`: the scalings that llama.cpp supports for the arch; `theta`: the base if
    config.json has none. Raises SourceError; UnsupportedError for another kind, or partly rotated heads."""
    notes = (_BOTH,) if _differ(c.values) else ()
    new = "rope_parameters" in c.values
    outer = c.section("rope_parameters" if new else "rope_scaling") or Config(c.model, {})
    nested = any(key in outer.values for key in _NESTED)
    # layers with windowed attention have their own section beside that of the other layers
    inner = outer.section("full_attention") if "full_attention" in outer.values else outer
    inner = inner or Config(c.model, {})
    if not nested and _CONTEXT in c.values:
        with_context = {_CONTEXT: c.values[_CONTEXT], **inner.values}
        inner = Config(c.model, with_context, "" if _CONTEXT not in inner.values else inner.prefix)
    local = outer.section("sliding_attention")
    local_key = None if nested else c.first(_LOCAL_THETAS)
    for place, key in ((inner, "partial_rotary_factor"), (c, "partial_rotary_factor")):
        if place.positive(key, 1.0) != 1:
            raise UnsupportedError(
                f"{c.model}: config.json: {place.prefix}{key} is {place.float_(key):g}: heads of {arch} are rotated "
                "whole in llama.cpp"
            )
    if local_key is not None:
        local_theta: float | None = c.positive(local_key)
    else:
        local_theta = None if local is None or local.values.get("rope_theta") is None else local.positive("rope_theta")
    # null means explicitly none
    if nested or "rope_theta" in inner.values:
        theta = None if inner.values.get("rope_theta") is None else inner.positive("rope_theta")
    elif any(key in c.values for key in _THETAS):
        theta_key = c.first(_THETAS)
        theta = None if theta_key is None else c.positive(theta_key)
    # in rope_scaling, transformers 4 preferred the old name
    names = ("rope_type", "type") if new else ("type", "rope_type")
    kind = next((inner.values[key] for key in names if inner.values.get(key) is not None), None)
    if kind == "default":
        kind = None
    if kind is not None and kind not in kinds:
        shown = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
        raise UnsupportedError(
            f"{c.model}: config.json: the rope scaling has the type {kind!r:.60}; quantkit knows {shown} for {arch}"
        )
    mscale = outer.values.get("mscale_all_dim")
    return Rope(
        kind,
        inner,
        theta,
        local_theta,
        _sections(outer),
        None if mscale is None else outer.float_("mscale_all_dim"),
        notes,
    )


def _differ(values: Mapping[str, Any]) -> bool:
    """Whether a config's old and new spellings contradict each other about the rope."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if "rope_parameters" not in values or not isinstance(old, dict):
        return False

    kinds = []
    for section in (new if isinstance(new, dict) else {}, old):
        kinds.append(section.get("rope_type") or section.get("type") or "default")
    if kinds[0] != kinds[1] or not isinstance(new, dict):
        return kinds[0] != kinds[1]
    return any(old[key] != new[key] for key in (old.keys() & new.keys()) - {"type", "rope_type"})


def _sections(outer: Config) -> tuple[int, ...]:
    value = outer.values.get("mrope_section")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 16 for n in value):
        raise outer.fail("mrope_section", f"is {value!r:.60}, not a list of integers")
    return tuple(value)


def _scaling_kvs(arch: str, kind: str, scaling: Config) -> Iterator[KV]:
    """Yield the rope.scaling.* keys of a linear or yarn section."""
    prefix = f"{arch}.rope.scaling."
    yield kv(prefix + "type", STRING, kind)
    yield kv(prefix + "factor", F32, scaling.float_("factor"))
    if kind != "yarn":
        return
    yield kv(prefix + "original_context_length", U32, scaling.int_(_CONTEXT))
    for keys, ours in (
        (("extrapolation_factor",), "yarn_ext_factor"),
        (("attention_factor", "attn_factor"), "yarn_attn_factor"),
        (("beta_fast",), "yarn_beta_fast"),
        (("beta_slow",), "yarn_beta_slow"),
    ):
        key = next((k for k in keys if k in scaling.values), None)
        if key is not None and scaling.values[key] is not None:
            yield kv(prefix + ours, F32, scaling.float_(key))


class Llama3Scaling(NamedTuple):
    """The llama3 kind of scaling: each frequency of the rope is divided by its own factor."""

    theta: float
    head: int
    """values in a head, all rotated"""
    factor: float
    low: float
    high: float
    context: int
    """context length of the training before the scaling"""

    def factors(self) -> npt.NDArray[np.float32]:
        """Return float32 [head / 2], rope_freqs.weight: 1 for short waves, `factor` for long ones, something between
        for the rest. Bit for bit what a converter gets from torch, provided that the powers agree."""
        return self.factors_of(self.powers())

    def powers(self) -> npt.NDArray[np.float32]:
        """Return float32 [head / 2]: theta to the powers 0, 2 / head, 4 / head, …, each rounded to the nearest float32.

        torch's are the same for a theta of 500000 and heads of 64 and 128, as in every published Llama 3. Its powf is
        not correctly rounded, and differs between processors: for other shapes a few of its powers are the float32
        next to ours, and since `factors_of` subtracts, the last bits of a factor can then differ.
        """
        exponents = np.arange(0, self.head, 2, dtype=np.float32) / np.float32(self.head)
        with np.errstate(over="ignore"):  # to infinity, as in torch: the factor then becomes `factor`
            base = float(np.float32(self.theta))
        return np.array([base ** float(e) for e in exponents], np.float32)

    def factors_of(self, powers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 [head / 2]: the factors for these powers of theta, in float32 and torch's order of operations,
        in which number / tensor is the tensor's reciprocal times the number."""
        one, low, factor = (np.float32(x) for x in (1, self.low, self.factor))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            frequencies = one / powers
            wavelengths = one / frequencies * np.float32(2 * math.pi)
            smooth = (one / wavelengths * np.float32(self.context) - low) / np.float32(self.high - self.low)
            between = one / ((one - smooth) / factor + smooth)
            stretched = np.where(wavelengths > np.float32(self.context / self.low), factor, between)
            out: npt.NDArray[np.float32] = np.where(wavelengths < np.float32(self.context / self.high), one, stretched)
        return out


def llama3(scaling: Config, theta: float, head: int) -> Llama3Scaling:
    """Read a llama3 section and check it. Raises SourceError if a value is missing or invalid."""
    out = Llama3Scaling(
        theta,
        head,
        scaling.positive("factor", 8.0),
        scaling.positive("low_freq_factor", 1.0),
        scaling.positive("high_freq_factor", 4.0),
        scaling.int_(_CONTEXT, 8192),
    )
    if out.low >= out.high:
        raise scaling.fail("high_freq_factor", f"is {out.high:g}, not above low_freq_factor, {out.low:g}")
    return out

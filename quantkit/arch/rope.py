"""Rope scaling, as keys (linear, yarn) and as a tensor (llama3). Source: llama.cpp's conversion/base.py,
set_gguf_parameters, and conversion/llama.py, generate_extra_tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..gguf_format import F32, KV, STRING, U32, kv
from .config import Config


def rope_type(scaling: Config) -> object:
    """What config.json calls the kind of scaling, under its new name or its old one."""
    return scaling.values.get("rope_type", scaling.values.get("type"))


def scaling_kvs(arch: str, scaling: Config) -> Iterator[KV]:
    """The rope.scaling.* keys of a linear or yarn section."""
    prefix, kind = f"{arch}.rope.scaling.", rope_type(scaling)
    yield kv(prefix + "type", STRING, str(kind))
    yield kv(prefix + "factor", F32, scaling.float_("factor"))
    if kind != "yarn":
        return
    yield kv(prefix + "original_context_length", U32, scaling.int_("original_max_position_embeddings"))
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
    """The llama3 kind: each frequency of the rope is divided by a factor of its own."""

    theta: float
    head: int
    """values of a head, all of them rotated"""
    factor: float
    low: float
    high: float
    context: int
    """of the training before the stretch"""

    def factors(self) -> npt.NDArray[np.float32]:
        """float32 [head / 2]: rope_freqs.weight. 1 where waves are short, `factor` where they are long,
        between the two in the middle. By torch, as in a converter: the power of another library may
        differ in the last bit."""
        import torch

        frequencies = 1.0 / (self.theta ** (torch.arange(0, self.head, 2, dtype=torch.float32) / self.head))
        wavelengths = 2 * math.pi / frequencies
        smooth = (self.context / wavelengths - self.low) / (self.high - self.low)
        between = 1 / ((1 - smooth) / self.factor + smooth)
        stretched = torch.where(wavelengths > self.context / self.low, self.factor, between)
        out: npt.NDArray[np.float32] = torch.where(wavelengths < self.context / self.high, 1.0, stretched).numpy()
        return out


def llama3(scaling: Config, theta: float, head: int) -> Llama3Scaling:
    """A llama3 section, checked. Raises SourceError when a value is missing or makes no wavelengths."""
    out = Llama3Scaling(
        theta,
        head,
        scaling.positive("factor"),
        scaling.positive("low_freq_factor"),
        scaling.positive("high_freq_factor"),
        scaling.int_("original_max_position_embeddings"),
    )
    if out.low >= out.high:
        raise scaling.fail("high_freq_factor", f"is {out.high:g}, not above low_freq_factor, {out.low:g}")
    return out

"""Rotary position embeddings as ggml computes them: plain, linear, YaRN, and with a factor for each frequency.

Source: ggml's ggml_rope_ext (rope_yarn, ggml_rope_yarn_corr_dims) and llama.cpp's llama_context, which sets the
attention factor so that it cancels ggml's own correction of the magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..base.errors import SourceError, UnsupportedError
from .hparams import Hparams

F32 = npt.NDArray[np.float32]

#: turns of a pair within the original context from which YaRN leaves it alone, and up to which it is stretched whole
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Rope:
    """How positions turn pairs of `n_rot` values."""

    n_rot: int
    base: float
    scale: float
    """1 / the factor by which the context is stretched"""
    ext_factor: float
    """1 for YaRN, else 0"""
    attn_factor: float
    n_ctx_orig: int
    neox: bool
    """pairs are (i, i + n_rot/2); otherwise (2i, 2i + 1)"""

    def tables(self, n_ctx: int, factors: F32 | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [n_ctx, n_rot / 2]. Angles are divided by `factors`, float32 [n_rot / 2]."""
        half = np.arange(self.n_rot // 2)
        f32 = np.float32
        # ggml multiplies the angle of a pair by this ratio for the next one, in float32
        steps = np.full((n_ctx, len(half)), f32(self.base) ** f32(-2.0 / self.n_rot), f32)
        steps[:, 0] = np.arange(n_ctx, dtype=f32)
        extrapolated: F32 = np.cumprod(steps, axis=1, dtype=f32)
        if factors is not None:
            extrapolated = (extrapolated / factors[None, :]).astype(f32)
        theta: F32 = (extrapolated * f32(self.scale)).astype(f32)
        magnitude = self.attn_factor
        if self.ext_factor:
            low, high = self._correction()
            ramp = 1 - np.clip((half - low) / max(0.001, high - low), 0, 1)
            mix = (ramp * self.ext_factor).astype(f32)[None, :]
            theta = (theta * (1 - mix) + extrapolated * mix).astype(f32)
            magnitude *= 1 + 0.1 * math.log(1 / self.scale)
        return torch.from_numpy(np.cos(theta) * f32(magnitude)), torch.from_numpy(np.sin(theta) * f32(magnitude))

    def _correction(self) -> tuple[float, float]:
        def at(turns: float) -> float:
            return self.n_rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = math.floor(at(_BETA_FAST)), math.ceil(at(_BETA_SLOW))
        return max(0, low), min(self.n_rot - 1, high)

    def turn(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Turn the last axis of x [n_seqs, n_ctx, n_heads, n_rot] by the position on the second."""
        cos, sin = (t[None, : x.shape[1], None, :] for t in tables)
        if self.neox:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def mscale(factor: float, by: float) -> float:
    """YaRN's magnitude for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1


def read_rope(hp: Hparams, n_rot: int, neox: bool) -> Rope:
    """The rope of a model's metadata, as llama.cpp takes it for a context within the trained one."""
    kind = hp.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{hp.model}: rope scaling '{kind:.40}' is not computed; there are none, linear, yarn")
    factor = 1.0
    for key in ("rope.scaling.factor", "rope.scale_linear"):  # the latter is the old name
        if key in hp:
            factor = hp.float_(key) or 1.0
            break
    if factor < 0:
        raise SourceError(f"{hp.model}: {hp.arch}.{key} is {factor:g}; it must be at least 0")
    if n_rot % 2:
        raise SourceError(f"{hp.model}: {n_rot} values of a head are rotated; they must be pairs")
    n_ctx_orig = hp.int_("rope.scaling.original_context_length", hp.int_("context_length"))
    # yarn_beta_fast, yarn_beta_slow, yarn_ext_factor and yarn_attn_factor of the metadata are not read: llama.cpp has
    # them for other archs only
    rope = Rope(
        n_rot=n_rot,
        base=hp.float_("rope.freq_base", 10000.0, above=1),
        scale=1.0 if kind == "none" else 1 / factor,
        ext_factor=0.0,
        attn_factor=hp.float_("rope.scaling.attn_factor", 1.0),
        n_ctx_orig=n_ctx_orig,
        neox=neox,
    )
    if kind != "yarn":
        return rope
    attn = mscale(1 / rope.scale, 1.0)
    log_mul = hp.float_("rope.scaling.yarn_log_multiplier", 0.0) if hp.arch == "deepseek2" else 0.0
    if log_mul:
        attn = 1.0  # llama.cpp takes the magnitudes of all dimensions and of the turned ones for one
    attn /= 1 + 0.1 * math.log(1 / rope.scale)  # ggml puts it back
    return replace(rope, ext_factor=1.0, attn_factor=rope.attn_factor * attn)

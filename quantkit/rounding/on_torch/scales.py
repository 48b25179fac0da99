"""ggml's searches of the scale of 32 columns x, with weights w, both [32, n_rows]; see native/k_search.h and
native/iq4_round.h."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .feed import Levelled
from .halves import quotient, steps
from .starts import iq4_levels

#: of the largest value of a group that is not nothing
_LEAST = 1e-15


def _largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the largest values by magnitude, with its sign, and the magnitude; [n_rows]."""
    at = x.abs().argmax(0)[None]
    found = x.gather(0, at)[0]
    return found, found.abs()


def symmetric(x: Tensor, w: Tensor, n: int) -> Tensor:
    """make_qx_quants: [n_rows], the scale of levels -n..n - 1."""
    most, size = _largest(x)
    wx = w * x
    scale, best = torch.zeros_like(most), torch.zeros_like(most)
    for i in (0, *range(-9, 0), *range(1, 10)):
        numerator = np.float32(-(np.float32(n) + np.float32(0.1) * np.float32(i)))
        level = steps(float(numerator) / most * x).clamp_(-n, n - 1)
        sum_lx, sum_l2 = (wx * level).sum(0), (w * level * level).sum(0)
        found = quotient(sum_lx, sum_l2)
        if i == 0:
            scale, best = found, found * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, found, scale)
        best = torch.where(better, found * sum_lx, best)
    return torch.where(size < _LEAST, 0.0, scale)


def affine(x: Tensor, w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """make_qkx3_quants: the scale of levels 0..most, and the minimum below them; [n_rows]."""
    low, high = x.amin(0).clamp(max=0.0), x.amax(0)
    sum_w, sum_x = w.sum(0), (w * x).sum(0)
    dead = high <= low
    at_first, spread = low, high - low
    inverse = most / spread
    scale = 1.0 / inverse
    best = _off(x, w, steps(inverse * (x - low)).clamp_(0, most), scale, low)
    for i in range(37):
        numerator = np.float32(-0.9) + np.float32(0.05) * np.float32(i) + np.float32(most)
        level = steps(float(numerator) / (high - low) * (x - low)).clamp_(0, most)
        wl = w * level
        sum_l, sum_l2, sum_xl = wl.sum(0), (wl * level).sum(0), (wl * x).sum(0)
        d = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / d
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / d
        above = this_low > 0
        this_scale = torch.where(above, sum_xl / sum_l2, this_scale)
        this_low = torch.where(above, 0.0, this_low)
        off = _off(x, w, level, this_scale, this_low)
        better = (d > 0) & (off < best)
        best = torch.where(better, off, best)
        scale = torch.where(better, this_scale, scale)
        low = torch.where(better, this_low, low)
    return torch.where(dead, 0.0, scale), -torch.where(dead, at_first, low)


def _off(x: Tensor, w: Tensor, level: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    away = scale * level + low - x
    return (w * (away * away)).sum(0)


def eight(x: Tensor) -> Tensor:
    """[n_rows]: the scale of Q8_0."""
    return x.abs().amax(0) / 127.0


def iq4(x: Tensor, w: Tensor) -> Tensor:
    """[n_rows]: the scale of IQ4_NL."""
    levels, thresholds = iq4_levels(x.device)
    first = float(levels[0])
    most, size = _largest(x)
    nearest = Levelled(torch.ones_like(most), levels, thresholds)
    scale, best = torch.zeros_like(most), torch.zeros_like(most)
    for i in (None, *range(-7, 8)):
        inverse = 1.0 / (-most / first) if i is None else (i + first) / most
        level, _ = nearest(torch.nan_to_num(inverse * x))
        wl = w * level
        sum_lx, sum_l2 = (wl * x).sum(0), (wl * level).sum(0)
        found = sum_lx / sum_l2
        if i is None:
            scale = torch.where(sum_l2 > 0, found, 0.0)
            best = scale * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, found, scale)
        best = torch.where(better, scale * sum_lx, best)
    return torch.where(size < _LEAST, 0.0, scale)

"""The few operations that models are made of, in float32 as llama.cpp computes them. x is [n_tokens, n_cols]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..base.errors import SourceError

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by the root of its mean square, times `weight`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias), W [n_out, n_cols], in W's precision."""
    return functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [n_seqs, n_ctx, n_heads, d], k and v [n_seqs, n_ctx, n_kv_heads, …] -> [n_seqs, n_ctx, n_heads, d_v].
    Heads share keys and values in equal runs."""
    n_heads, n_kv = q.shape[2], k.shape[2]
    if n_kv not in (1, n_heads):
        k, v = (t.repeat_interleave(n_heads // n_kv, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if n_kv == 1 and n_heads > 1:
        k, v = (t.expand(-1, n_heads, -1, -1) for t in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


@dataclass(frozen=True)
class Router:
    """How tokens choose experts. Source: llama.cpp's build_moe_ffn."""

    n_experts: int
    n_used: int
    sigmoid: bool
    """scores by sigmoid; otherwise by softmax"""
    normalize: bool
    """weights of the chosen are made to sum to 1"""
    scale: float
    n_groups: int = 1
    n_groups_used: int = 1

    def check(self, model: str) -> None:
        """Raise SourceError where so many experts cannot be chosen."""
        n, groups = self.n_experts, self.n_groups
        if n % groups or self.n_groups_used > groups or self.n_used > n // groups * self.n_groups_used:
            raise SourceError(
                f"{model}: {self.n_used:,} of {n:,} experts in {self.n_groups_used:,} of {groups:,} groups cannot be "
                "chosen for a token"
            )

    def choose(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of logits float32 [n, n_experts]: the numbers of the chosen experts int64 [n, n_used], and their weights
        float32 [n, n_used]. `bias` [n_experts] counts in the choice only."""
        scores = torch.sigmoid(logits) if self.sigmoid else torch.softmax(logits, -1)
        ranked = scores if bias is None else scores + bias
        if self.n_groups > 1:
            groups = ranked.view(-1, self.n_groups, self.n_experts // self.n_groups)
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept.scatter_(1, best.topk(self.n_groups_used, -1).indices, True)
            ranked = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        chosen = ranked.topk(self.n_used, -1).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=6.103515625e-5)
        return chosen, weights * self.scale if self.scale not in (0.0, 1.0) else weights

"""Scores of a candidate's predictions against the reference's, token by token and summarized.

The definitions are llama-perplexity's: the second half of each chunk is scored; KLD sums over tokens whose reference
log probability is above -16; Δp is the difference in the probability of the text's own token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.errors import TextError
from ..frames import frame

F64 = npt.NDArray[np.float64]

#: the least log probability that counts in a KLD
LEAST = -16.0
#: engines
NATIVE, STOCK = "native", "llama.cpp"
_RESAMPLES, _SEED = 10_000, 20_250_127


class Tokens(NamedTuple):
    """Scores of tokens, float64 [n_chunks, n_scored] each."""

    nll: F64
    """-log probability of the text's token"""
    kld: F64
    """KL divergence from the reference"""
    dp: F64
    """probability of the text's token minus the reference's"""
    same_top: F64
    """1 if the most likely token is the reference's"""


@dataclass(frozen=True)
class Agreement:
    """How greedy continuations of prompts compare with the reference's."""

    n_prompts: int
    n_tokens: int
    identical: float
    """share of prompts whose continuations are the same throughout"""
    mean_first_difference: float
    """tokens before the first difference; `n_tokens` if there is none"""


@dataclass(frozen=True)
class Scored:
    """The figures of a candidate. KLD in nats; shares are fractions of 1."""

    name: str
    file_bytes: int
    bpw: float
    ppl: float
    ppl_se: float
    ppl_ratio: float
    mean_kld: float
    mean_kld_se: float
    median_kld: float
    kld_90: float
    kld_95: float
    kld_99: float
    kld_999: float
    kld_max: float
    rms_dp: float
    same_top: float
    same_top_se: float
    agree_32: float | None = None
    """share of prompts that continue alike for 32 tokens; None if not measured"""
    first_difference_32: float | None = None
    tool_ppl: float | None = None
    """as llama-perplexity itself prints it; None with the native engine, and if not measured"""
    tool_mean_kld: float | None = None


@dataclass(frozen=True)
class Compared:
    """Two candidates: the difference of their mean KLDs, with an interval over chunks."""

    a: str
    b: str
    difference: float
    """mean KLD of b minus that of a"""
    low: float
    high: float
    """95 % interval, paired bootstrap over chunks"""
    bytes_ratio: float
    """file size of b / file size of a"""
    verdict: str


def check_ctx(n_ctx: int) -> None:
    """Raise TextError for chunks without any scored token."""
    if n_ctx < 3:
        raise TextError(f"a chunk of {n_ctx} tokens has none that is scored: give --ctx 3 or more")


def mean_se(values: F64) -> tuple[float, float]:
    """The mean and its standard error, which treats tokens as independent, as llama-perplexity does."""
    flat = values.reshape(-1)
    return float(flat.mean()), float(flat.std() / np.sqrt(max(1, flat.size - 1)))


def score(name: str, size: tuple[int, float], of: Tokens, reference_nll: F64) -> Scored:
    """A candidate's figures. `size` is bytes and bits per weight."""
    nll, nll_se = mean_se(of.nll)
    kld, kld_se = mean_se(of.kld)
    top, top_se = mean_se(of.same_top)
    q = [float(v) for v in np.quantile(of.kld, (0.5, 0.9, 0.95, 0.99, 0.999))]
    return Scored(
        name=name,
        file_bytes=size[0],
        bpw=size[1],
        ppl=float(np.exp(nll)),
        ppl_se=float(np.exp(nll) * nll_se),
        ppl_ratio=float(np.exp(nll - reference_nll.mean())),
        mean_kld=kld,
        mean_kld_se=kld_se,
        median_kld=q[0],
        kld_90=q[1],
        kld_95=q[2],
        kld_99=q[3],
        kld_999=q[4],
        kld_max=float(of.kld.max()),
        rms_dp=float(np.sqrt((of.dp**2).mean())),
        same_top=top,
        same_top_se=top_se,
    )


def compare(a: Scored, b: Scored, kld_a: F64, kld_b: F64) -> Compared:
    """Compare two candidates on the same chunks."""
    by_chunk = kld_b.mean(-1) - kld_a.mean(-1)
    low, high = interval(by_chunk)
    if low > 0:
        verdict = f"{a.name} is better"
    elif high < 0:
        verdict = f"{b.name} is better"
    else:
        verdict = "cannot tell"
    return Compared(a.name, b.name, float(by_chunk.mean()), low, high, b.file_bytes / max(1, a.file_bytes), verdict)


def interval(by_chunk: F64, share: float = 0.95) -> tuple[float, float]:
    """The confidence interval of the mean, by bootstrap over chunks; deterministic."""
    if len(by_chunk) < 2:
        return -np.inf, np.inf
    return _middle(_resampled(by_chunk), share)


def ratio_interval(a: F64, b: F64, share: float = 0.95) -> tuple[float, float]:
    """The confidence interval of mean(a) / mean(b) on the same chunks, by paired bootstrap; [0, ∞) for one chunk."""
    if len(a) < 2:
        return 0.0, np.inf
    return _middle(_resampled(a) / np.maximum(_resampled(b), np.finfo(float).tiny), share)


def _resampled(by_chunk: F64) -> F64:
    """Means of chunks drawn with replacement; the draws depend only on the number of chunks."""
    random = np.random.default_rng(_SEED)
    means = np.empty(_RESAMPLES)
    for at in range(0, _RESAMPLES, 1000):
        picked = random.integers(0, len(by_chunk), (1000, len(by_chunk)))
        means[at : at + 1000] = by_chunk[picked].mean(-1)
    return means


def _middle(values: F64, share: float) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)


@dataclass(frozen=True)
class Evaluation:
    """A reference and its candidates on one text."""

    reference: str
    reference_ppl: float
    n_chunks: int
    n_ctx: int
    texts: tuple[str, ...]
    candidates: tuple[Scored, ...]
    pairs: tuple[Compared, ...]
    engine: str = NATIVE
    noise_kld: float | None = None
    """mean KLD of the reference against itself, run twice; None if runs are identical by construction"""

    @property
    def n_tokens(self) -> int:
        """The number of scored tokens."""
        return self.n_chunks * (self.n_ctx - 1 - self.n_ctx // 2)

    def to_frame(self) -> Any:
        """The candidates as a pandas DataFrame. Raises ToolError if pandas is not installed."""
        return frame(asdict(c) for c in self.candidates)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "quantkit_eval": 1,
            "engine": self.engine,
            "reference": {"name": self.reference, "ppl": self.reference_ppl, "n_tokens": self.n_tokens},
            "n_chunks": self.n_chunks,
            "n_ctx": self.n_ctx,
            "texts": list(self.texts),
            "noise_kld": self.noise_kld,
            "candidates": [asdict(c) for c in self.candidates],
            "pairs": [
                {**asdict(p), "low": finite(p.low), "high": finite(p.high)} for p in self.pairs
            ],
        }  # fmt: skip


def finite(value: float) -> float | None:
    """The value for JSON; None for an infinite end of an interval (of one chunk)."""
    return value if np.isfinite(value) else None


def interval_text(low: float, high: float) -> str:
    """An interval of mean KLDs, or a remark if one chunk gives none."""
    return f"{low:+.5f} … {high:+.5f}" if np.isfinite(low) and np.isfinite(high) else "one chunk gives none"


def pairs_of(candidates: Sequence[Scored], klds: Sequence[F64]) -> tuple[Compared, ...]:
    """Compare every two candidates, in order."""
    return tuple(
        compare(candidates[i], candidates[j], klds[i], klds[j])
        for i in range(len(candidates))
        for j in range(i + 1, len(candidates))
    )


class Point(NamedTuple):
    """A candidate by size and damage."""

    name: str
    file_bytes: int
    mean_kld: float


def unbeaten(points: Iterable[tuple[str, int, float]]) -> list[Point]:
    """The points (name, bytes, mean KLD) that no other beats in both size and mean KLD, smallest first."""
    out: list[Point] = []
    for p in sorted((Point(*p) for p in points), key=lambda p: (p.file_bytes, p.mean_kld)):
        if not out or p.mean_kld < out[-1].mean_kld:
            out.append(p)
    return out

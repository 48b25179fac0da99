"""What breaks first in the text of an over-quantized model: it repeats itself endlessly, turns to gibberish, or never
finishes thinking. Pure functions of texts and of log probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

#: a repetition has at least this many characters and periods: rulers, tables and indents are shorter
LEAST_CHARS, LEAST_PERIODS = 160, 3
#: and at least this many characters if it ends the output
LEAST_AT_END = 64
#: a repetition that stops is a fault too if it fills at least this share of the output
LEAST_SHARE = 0.5
#: gibberish: a window of tokens with a mean log probability below this under the reference (a perplexity of 150)
LEAST_LOG_PROB, WINDOW = -5.0, 32
OPEN, CLOSE = "<think>", "</think>"

ThinkingState = Literal["none", "finished", "unfinished", "empty", "no answer"]


@dataclass(frozen=True)
class Repetition:
    """The longest stretch of a sequence that repeats itself exactly."""

    period: int
    onset: int
    """where the first period begins"""
    length: int
    """of the stretch, including the first period"""
    share: float
    """of the sequence"""
    to_the_end: bool
    """whether the sequence ends with it"""


def repetition(
    items: str | Sequence[int],
    least: int = LEAST_CHARS,
    least_periods: int = LEAST_PERIODS,
    least_at_end: int | None = None,
) -> Repetition | None:
    """Find the longest periodic stretch of a text or of token ids, of at least `least` items and `least_periods`
    periods; at the end of the text, `least_at_end` items are enough (default: the smaller of `LEAST_AT_END` and
    `least`). Returns None if there is none. Of stretches that are nearly as long, takes the shorter period."""
    values: npt.NDArray[np.int64]
    if isinstance(items, str):
        values = np.frombuffer(items.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    else:
        values = np.asarray(items, np.int64)
    n, at_end = len(values), min(least, LEAST_AT_END) if least_at_end is None else least_at_end
    best: Repetition | None = None
    for period in range(1, n // least_periods + 1):
        longer = max(least_periods * period, 0 if best is None else int(best.length * 1.1) + 1)
        anywhere, last = max(longer, least) - period, max(longer, at_end) - period
        same = values[period:] == values[:-period]  # items equal to the one a period earlier
        if np.count_nonzero(same) < min(anywhere, last):
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False]))))
        starts, ends = edges[::2], edges[1::2]
        at = int((ends - starts).argmax())
        if ends[at] - starts[at] < anywhere:
            at = len(ends) - 1
            if ends[at] != len(same) or ends[at] - starts[at] < last:
                continue
        length = int(ends[at] - starts[at]) + period
        best = Repetition(period, int(starts[at]), length, length / n, int(starts[at]) + length == n)
    return best


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """The share of token n-grams that occurred before (seq-rep-n); 0 for fewer than n tokens. It also rises with loops
    that change a little each time."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is under a reference."""

    mean: float
    """natural log probability per token"""
    worst: float
    """the lowest mean of any window"""
    onset: int | None
    """the first token of the first window below `LEAST_LOG_PROB`; None if there is no such window"""
    share: float
    """of tokens that lie in such windows"""


def likelihood(log_probs: npt.NDArray[np.float64], window: int = WINDOW, least: float = LEAST_LOG_PROB) -> Likelihood:
    """Summarize log probabilities [n tokens], n > 0. A text shorter than the window is one window."""
    n = len(log_probs)
    size = min(window, n)
    sums = np.concatenate(([0.0], np.cumsum(log_probs)))
    means = (sums[size:] - sums[:-size]) / size
    low = np.flatnonzero(means < least)
    inside = np.zeros(n, bool)
    for start in low:
        inside[start : start + size] = True
    return Likelihood(float(log_probs.mean()), float(means.min()), int(low[0]) if len(low) else None, inside.mean())


def thinking(text: str, prompt: str = "") -> ThinkingState:
    """How far the thinking between <think> and </think> got. It may begin in the prompt, as in R1's template."""
    opened = prompt.rfind(OPEN) > prompt.rfind(CLOSE)
    if not opened:
        before, found, text = text.partition(OPEN)
        if not found:
            return "none" if CLOSE not in before else _after(*before.split(CLOSE, 1))
    thought, closed, answer = text.partition(CLOSE)
    return _after(thought, answer) if closed else "unfinished"


def _after(thought: str, answer: str) -> ThinkingState:
    if not answer.strip():
        return "no answer"
    return "finished" if thought.strip() else "empty"


@dataclass(frozen=True)
class Diagnosis:
    """The findings on one output."""

    n_chars: int
    n_tokens: int | None
    """by the model's tokenizer; None if that cannot be rebuilt"""
    repetition: Repetition | None
    """in characters"""
    period_tokens: int | None
    onset_token: int | None
    repeated_4grams: float | None
    thinking: ThinkingState
    likelihood: Likelihood | None
    """None without a reference, or for an empty output"""
    faults: tuple[str, ...]


def faults_of(
    text: str, ended: bool, found: Repetition | None, thought: ThinkingState, likely: Likelihood | None
) -> tuple[str, ...]:
    """The names of an output's faults. `ended` says whether the model ended the output itself."""
    faults = []
    if not text.strip():
        faults.append("empty")
    if found is not None and found.to_the_end and not ended:
        faults.append("endless repetition")
    elif found is not None and found.share >= LEAST_SHARE:
        faults.append("repetition")
    if likely is not None and likely.onset is not None:
        faults.append("gibberish")
    if thought in ("unfinished", "empty"):
        faults.append(f"{thought} thinking")
    elif thought == "no answer":
        faults.append("no answer after thinking")
    return tuple(faults)

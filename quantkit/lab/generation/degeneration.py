"""What breaks first in the text of an over-quantized model: it repeats itself without end, turns to gibberish, or does
not come to the end of its thinking. Pure functions of texts and of log probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

#: a repetition counts from so many characters, and so many times its period: rulers, tables and indents are shorter
LEAST_CHARS, LEAST_PERIODS = 160, 3
#: and from so many at the end of an output
LEAST_AT_END = 64
#: share of an output from which repetition that came to an end is a fault too
LEAST_SHARE = 0.5
#: gibberish is what the reference gives a mean log probability below this over a window of tokens: a perplexity of 150
LEAST_LOG_PROB, WINDOW = -5.0, 32
OPEN, CLOSE = "<think>", "</think>"

ThinkingState = Literal["none", "finished", "unfinished", "empty", "no answer"]


@dataclass(frozen=True)
class Repetition:
    """The longest stretch of a sequence that repeats itself exactly."""

    period: int
    onset: int
    """where the first of the periods begins"""
    length: int
    """of the stretch, the first period among it"""
    share: float
    """of the sequence"""
    to_the_end: bool
    """whether the sequence ends in it"""


def repetition(
    items: str | Sequence[int],
    least: int = LEAST_CHARS,
    least_periods: int = LEAST_PERIODS,
    least_at_end: int | None = None,
) -> Repetition | None:
    """The longest periodic stretch of a text or of token ids, of at least `least` items and `least_periods` periods;
    at the end, of `least_at_end` items (`LEAST_AT_END`, or `least` if that is less). None where there is none. Of
    stretches that are nearly as long, the one with the shorter period."""
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
        same = values[period:] == values[:-period]  # items that are those one period before
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
    """The share of n-grams of tokens that were there before (seq-rep-n); 0 for fewer than n tokens. It rises with
    loops that change a little each time, too."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Likelihood:
    """What a reference thinks of a text."""

    mean: float
    """log probability of a token, natural"""
    worst: float
    """the least mean of a window"""
    onset: int | None
    """the first token of the first window below `LEAST_LOG_PROB`; None: there is none"""
    share: float
    """of tokens that are in such windows"""


def likelihood(log_probs: npt.NDArray[np.float64], window: int = WINDOW, least: float = LEAST_LOG_PROB) -> Likelihood:
    """Of log probabilities [n tokens], n > 0; a text shorter than the window is one window."""
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
    """How far thinking between <think> and </think> came. It may begin in the prompt, as R1's template has it."""
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
    """What was found in one output."""

    n_chars: int
    n_tokens: int | None
    """by the model's tokenizer; None where that cannot be rebuilt"""
    repetition: Repetition | None
    """in characters"""
    period_tokens: int | None
    onset_token: int | None
    repeated_4grams: float | None
    thinking: ThinkingState
    likelihood: Likelihood | None
    """None without a reference, or without a token"""
    faults: tuple[str, ...]


def faults_of(
    text: str, ended: bool, found: Repetition | None, thought: ThinkingState, likely: Likelihood | None
) -> tuple[str, ...]:
    """The faults of an output by name; `ended` says whether the model ended it itself."""
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

"""Faults of texts: repetition, gibberish, thinking that does not end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from quantkit.lab.generation.degeneration import (
    LEAST_AT_END,
    LEAST_CHARS,
    Repetition,
    ThinkingState,
    faults_of,
    likelihood,
    repeated_share,
    repetition,
    thinking,
)

WORDS = (
    "It was a bright cold day in April, and the clocks were striking thirteen. Winston Smith slipped quickly through "
    "the doors of the building, though not quickly enough to keep out a swirl of gritty dust that came in with him."
)


def primitive(unit: str) -> int:
    """The least period of a unit that goes on for ever."""
    return (unit + unit).find(unit, 1)


@given(
    st.text(alphabet="abcdefgh \n", max_size=60),
    st.text(alphabet="uvwxyz é漢", min_size=1, max_size=40),
    st.integers(5, 60),
)
def test_a_loop_after_other_text_is_found(before: str, unit: str, times: int) -> None:
    """Period and onset are those it was made with, of letters that are not in what comes before."""
    unit = unit.replace(" ", "_")
    loop = unit * times
    found = repetition(before + loop)
    period = primitive(unit)
    assume(len(loop) >= LEAST_CHARS)
    assert found is not None
    assert (found.period, found.to_the_end) == (period, True)
    assert found.onset == len(before)
    assert found.length == len(loop)
    assert found.share == pytest.approx(len(loop) / (len(before) + len(loop)))


@given(st.text(max_size=400))
def test_what_is_found_repeats(text: str) -> None:
    found = repetition(text, least=6)
    if found is not None:
        part = text[found.onset : found.onset + found.length]
        assert part[found.period :] == part[: -found.period]
        assert len(part) == found.length >= 3 * found.period
        assert found.to_the_end == (found.onset + found.length == len(text))
        # no longer stretch of this period at this place
        assert found.onset == 0 or text[found.onset - 1] != text[found.onset - 1 + found.period]


def test_examples_of_repetition() -> None:
    assert repetition("") is None
    assert repetition(WORDS) is None
    assert repetition("-" * (LEAST_CHARS - 1) + ".") is None
    assert repetition("-" * LEAST_CHARS + ".") == Repetition(1, 0, LEAST_CHARS, LEAST_CHARS / (LEAST_CHARS + 1), False)
    # at the end less is enough
    assert repetition("A" + ".E" * (LEAST_AT_END // 2)) == Repetition(2, 1, LEAST_AT_END, 64 / 65, True)
    assert repetition("A" + ".E" * (LEAST_AT_END // 2 - 1)) is None
    # half a period more counts, and what follows ends it
    text = WORDS + "The end. " * 30 + "The "
    assert repetition(text) == Repetition(9, len(WORDS), 274, 274 / len(text), True)
    found = repetition(text + WORDS)
    assert found is not None
    assert (found.period, found.onset, found.length, found.to_the_end) == (9, len(WORDS), 274, False)
    # a paragraph, thrice; twice is no loop
    assert repetition(WORDS * 2) is None
    assert repetition(WORDS * 3) == Repetition(len(WORDS), 0, 3 * len(WORDS), 1.0, True)
    # the longest of two
    n = 200 + len(WORDS)
    assert repetition("ab" * 100 + WORDS + "xyz" * 200) == Repetition(3, n, 600, 600 / (600 + n), True)
    # tokens
    assert repetition([5, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1], least=9) == Repetition(3, 1, 10, 10 / 11, True)


def test_repeated_share() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(list(range(100))) == 0
    assert repeated_share([7] * 13) == pytest.approx(0.9)
    # 1. a b c 2. a b c 3. …: no exact period, but n-grams come again
    counting = [x for i in range(50) for x in (1000 + i, 1, 2, 3, 4, 5, 6, 7)]
    assert repetition(counting, least=16) is None
    assert repeated_share(counting) > 0.45


@pytest.mark.parametrize(
    ("text", "prompt", "state"),
    [
        ("An answer.", "", "none"),
        ("<think>Hm.</think>An answer.", "", "finished"),
        ("Well. <think>Hm.</think>An answer.", "", "finished"),
        ("<think>\n\n</think>An answer.", "", "empty"),
        ("<think>Hm. Wait,", "", "unfinished"),
        ("<think>Hm.</think>\n \n", "", "no answer"),
        ("<think></think>", "", "no answer"),
        ("Hm. Wait,", "<|User|>Why?<|Assistant|><think>\n", "unfinished"),
        ("Hm.</think>So.", "<|User|>Why?<|Assistant|><think>\n", "finished"),
        ("\n</think>So.", "<|User|>Why?<|Assistant|><think>\n", "empty"),
        ("So.", "<think>Hm.</think>Well.<|User|>Why?<|Assistant|>", "none"),
        ("Hm.</think>So.", "", "finished"),
        ("", "", "none"),
        ("", "<think>", "unfinished"),
    ],
)
def test_thinking(text: str, prompt: str, state: ThinkingState) -> None:
    assert thinking(text, prompt) == state


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=200), st.integers(1, 40))
def test_windows_of_likelihood(values: list[float], window: int) -> None:
    x = np.array(values)
    size = min(window, len(x))
    means = [float(x[i : i + size].mean()) for i in range(len(x) - size + 1)]
    found = likelihood(x, window, least=-7.03125)
    assert found.mean == pytest.approx(x.mean())
    assert found.worst == pytest.approx(min(means))
    low = [i for i, m in enumerate(means) if m < -7.03125 - 1e-9]
    nearly = [i for i, m in enumerate(means) if m < -7.03125 + 1e-9]
    if low == nearly:
        assert found.onset == (low[0] if low else None)
        assert found.share == pytest.approx(len({j for i in low for j in range(i, i + size)}) / len(x))


def test_gibberish_has_an_onset() -> None:
    x = np.concatenate([np.full(100, -1.0), np.full(100, -9.0)])
    found = likelihood(x, window=20)
    # the first window with more than half of it bad: 11 of 20
    assert (found.mean, found.worst, found.onset, found.share) == (-5, -9, 91, 109 / 200)
    assert likelihood(np.full(50, -4.9)).onset is None


def test_faults() -> None:
    loop, part = Repetition(3, 0, 300, 1.0, True), Repetition(3, 0, 300, 0.3, False)
    bad = likelihood(np.full(40, -8.0))
    assert faults_of("A text", True, None, "none", None) == ()
    assert faults_of(" \n", False, None, "none", None) == ("empty",)
    assert faults_of("abc", False, loop, "unfinished", None) == ("endless repetition", "unfinished thinking")
    assert faults_of("abc", True, loop, "none", None) == ("repetition",)
    assert faults_of("abc", False, part, "finished", bad) == ("gibberish",)
    assert faults_of("abc", True, None, "empty", None) == ("empty thinking",)
    assert faults_of("abc", True, None, "no answer", None) == ("no answer after thinking",)

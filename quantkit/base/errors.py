"""Every error that quantkit raises on purpose, in one tree, with its exit code.

They are defined together so that the exit codes are easily seen to be distinct, and so that callers
can catch `QuantkitError` and know that its message is meant for people: it names the
thing, the numbers and the next step. Any other exception that escapes is a bug in quantkit.

    QuantkitError                1
    ├── RecipeError              3   a recipe: YAML, unknown key or type, rules that cannot work
    ├── SourceError              4   a checkpoint, GGUF or config.json: missing, malformed, inconsistent
    │   └── UnsupportedError     5   well-formed, but not something quantkit can convert
    ├── ImatrixError             6   an importance matrix: malformed, an entry missing or of the wrong size
    ├── OutputError              7   the place to write: exists, is a source, no space, not writable
    ├── WeightError              8   the weights themselves: NaN, Inf, not representable in a type
    ├── KernelError              9   a quantization kernel: not present, wrong arguments
    ├── ToolError               10   llama.cpp tools: not found, failed, gave something else than asked
    ├── InternalCheckError      11   a check of quantkit's own result failed; please report it
    ├── DamageError             12   a finished file that is not what it should be: verify, merge, split
    ├── ResumeError             13   an unfinished build that cannot be continued: of another plan, in use, damaged
    └── TextError               14   a text to be made into tokens: missing, not UTF-8, too short, a chat it cannot be

2 is click's own code for wrong usage, and 130 an interrupt.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

#: characters of a long line that are kept at its start, and at its end, where the next step is
_LINE_START, _LINE_END = 1200, 600
#: most lines in a message that lists mistakes
_MAX_MISTAKES = 20


class QuantkitError(Exception):
    """Base of all errors with a message for people. Text from a hostile file is safe to show in it:
    unprintable characters are escaped, and very long lines are shortened in the middle."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(map(showable, str(message).split("\n"))))


def showable(line: str) -> str:
    """Return an untrusted line so that it is safe to show."""
    if len(line) > _LINE_START + _LINE_END + 1:
        line = f"{line[:_LINE_START]}…{line[-_LINE_END:]}"
    return line if line.isprintable() else "".join(ch if ch.isprintable() else ascii(ch)[1:-1] for ch in line)


def listed(mistakes: Collection[str]) -> str:
    """Return one line for each mistake; if there are very many, the first ones and the total."""
    if len(mistakes) <= _MAX_MISTAKES:
        return "\n".join(mistakes)
    return "\n".join([*list(mistakes)[:_MAX_MISTAKES], f"and {len(mistakes) - _MAX_MISTAKES:,} mistakes more"])


class RecipeError(QuantkitError):
    exit_code = 3


class SourceError(QuantkitError):
    """`cut`: the file lacks its end, and what is there may still be usable as far as it goes."""

    exit_code = 4

    def __init__(self, message: object = "", cut: bool = False) -> None:
        super().__init__(message)
        self.cut = cut


class UnsupportedError(SourceError):
    exit_code = 5


class ImatrixError(QuantkitError):
    exit_code = 6


class OutputError(QuantkitError):
    exit_code = 7


class WeightError(QuantkitError):
    exit_code = 8


class KernelError(QuantkitError):
    exit_code = 9


class ToolError(QuantkitError):
    exit_code = 10


class InternalCheckError(QuantkitError):
    exit_code = 11


class DamageError(QuantkitError):
    exit_code = 12


class ResumeError(QuantkitError):
    exit_code = 13


class TextError(QuantkitError):
    exit_code = 14


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known word, or '' when nothing is near."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""

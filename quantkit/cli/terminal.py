"""What the command line prints, on its way out: the one place through which standard output and error go.

Names and titles come from files of strangers. So nothing that steers a terminal passes: control characters are written
as \\u001b, which in JSON is the same text. What the terminal's encoding lacks is replaced, by ? or in JSON by its
escape. Standard output that cannot be written (a full disk, closed) is an OutputError; standard error that cannot be is
given up in silence, since nobody is left to be told.
"""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from typing import Any, TextIO

from quantkit.base.errors import OutputError

#: control characters but \n and \t, those that turn the direction of writing, line ends that are not, lone surrogates
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_BUT_RETURN = re.compile(_UNSAFE.pattern.replace("\x0b-\x1f", "\x0b\x0c\x0e-\x1f"))

#: characters of a line, where a terminal does not say; and the fewest that are reckoned with
_USUAL, _NARROWEST = 80, 40


def showable(text: str) -> str:
    """Text without anything that steers a terminal; inside of a JSON string it means the same."""
    return _UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _in_encoding(text: str, encoding: str) -> str:
    """The text as far as the encoding has its characters. Commands print JSON in one piece, as an object or array."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        if text[:1] in ("{", "["):
            return re.sub("[^\0-\x7f]+", lambda m: json.dumps(m[0])[1:-1], text)
        return text.encode(encoding, "replace").decode(encoding)
    return text


class Stream:
    """Standard output or error, as said above; what `sys.stdout` and `sys.stderr` are while quantkit runs. It has no
    `buffer`: nothing goes around it."""

    errors = "replace"

    def __init__(self, raw: TextIO | None, fd: int, unsafe: re.Pattern[str] = _UNSAFE) -> None:
        self._raw, self._fd, self._unsafe = raw, fd, unsafe
        self.encoding = (raw.encoding if raw is not None else None) or "utf-8"
        self._given_up = False

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"text is written, not {type(text).__name__}")
        shown = _in_encoding(self._unsafe.sub(_escape, text), self.encoding)
        if shown:
            self._do("write", shown)
        return len(text)

    def flush(self) -> None:
        if self._raw is not None:
            self._do("flush")

    def _do(self, what: str, *args: str) -> None:
        if self._given_up:
            return
        try:
            if self._raw is None:
                raise ValueError
            getattr(self._raw, what)(*args)
        except BrokenPipeError:
            self._give_up()
            if self._fd == 1:
                raise
        except (OSError, ValueError) as e:
            self._give_up()
            if self._fd == 1:
                why = (e.strerror if isinstance(e, OSError) else None) or "it is closed"
                raise OutputError(f"standard output cannot be written: {why}") from None

    def _give_up(self) -> None:
        """From now on nothing is written, by Python at its end neither."""
        self._given_up = True
        if self._raw is not None:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._fd)
                os.close(nowhere)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._raw is not None and self._raw.isatty()
        return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd


class Streams:
    """While this is entered, `sys.stdout` and `sys.stderr` are Streams."""

    def __enter__(self) -> None:
        _hold_descriptors()
        self._before = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = Stream(sys.stdout, 1), Stream(sys.stderr, 2)

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before


def _hold_descriptors() -> None:
    """Where standard input, output or error is closed, /dev/null takes its number: else the next file that is opened
    would get it, and what a library prints would be written into a model."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def width() -> int | None:
    """How many characters fit on a line of standard output: $COLUMNS, else what the terminal says. None where it is no
    terminal: what goes to a file or another program is neither shortened nor wrapped."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdecimal() and len(asked) < 6 and int(asked):
        return max(_NARROWEST, int(asked))
    if not sys.stdout.isatty():
        return None
    with suppress(OSError, ValueError):
        return max(_NARROWEST, os.get_terminal_size(sys.stdout.fileno()).columns or _USUAL)
    return _USUAL


def bars_file() -> Any:
    """Where progress bars go: standard error, which for them may return to the start of a line."""
    if isinstance(sys.stderr, Stream):
        return Stream(sys.stderr._raw, 2, _UNSAFE_BUT_RETURN)
    return sys.stderr

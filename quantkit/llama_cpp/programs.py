"""Running llama.cpp's programs: killed along with the process that waits for them, and quoted when they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from ..base.errors import ToolError

#: seconds between two checks on a running program
_POLL = 0.1
#: how many of its last lines are quoted
_LINES = 12


def run(command: Sequence[str], model: Path, look: Callable[[], None] = lambda: None) -> bytes:
    """Run a program on a model, calling `look` while it runs. Returns its standard output. Raises ToolError with the
    last lines of its standard error, or of its output if standard error is empty."""
    # llama.cpp's options in the environment would change what is compared
    env = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=log, env=env)
        except OSError as e:
            raise cannot_run(command[0], e) from None
        try:
            while process.poll() is None:
                look()
                time.sleep(_POLL)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            name = Path(command[0]).name
            lines = _last_lines(log) or _last_lines(said)
            last = ":\n" + "\n".join(lines) if lines else " and said nothing"
            raise ToolError(f"{name} ended with code {process.returncode} on {model}{last}")
        said.seek(0)
        return said.read()


def _last_lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode("utf-8", "replace").strip().splitlines()[-_LINES:]


def cannot_run(binary: str | Path, e: OSError) -> ToolError:
    """Return the error for a program that does not even start."""
    return ToolError(f"{binary}: cannot be run: {e.strerror or e}")


def failure(binary: Path, code: int, last: Iterable[str], made: bool = True) -> ToolError:
    """Return the error for how a program ended, with its last words; `made`: whether it made the file it should."""
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = f"failed with exit code {code}" if code or made else "ended without an error, but made no file"
    words = list(last)
    told = "its last words:\n  " + "\n  ".join(words) if words else "it said nothing"
    return ToolError(f"{binary} {how}; {told}")

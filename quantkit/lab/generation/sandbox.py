"""Starts `confined` to run programs from models' answers, with limits."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...base.errors import ToolError
from .confined import has_landlock, has_seccomp

Driver = Literal["plain", "pygame", "checks"]
_MOST_SAID = 1 << 16
#: seconds allowed beyond those of the jobs
_PATIENCE = 60


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 60
    """of wall-clock time"""
    cpu_seconds: int = 30
    memory: int = 2 << 30
    """bytes of address space"""
    file_bytes: int = 64 << 20
    """per file that it writes"""


@dataclass(frozen=True)
class Job:
    """A program, `program.py` in its own folder, and how to run it."""

    folder: Path
    driver: Driver
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    """exit code, or minus the number of a signal"""
    timed_out: bool
    stdout: str
    stderr: str

    @property
    def why(self) -> str | None:
        """What went wrong, in one line; None if nothing did."""
        if self.timed_out:
            return "did not end in the time it was given"
        if self.code < 0:
            names = {signal.SIGXCPU: "used more processor time than allowed", signal.SIGKILL: "was killed"}
            return names.get(signal.Signals(-self.code), f"was ended by {signal.Signals(-self.code).name}")
        if self.code:
            last = self.stderr.strip().splitlines()[-1:] or [f"ended with code {self.code}"]
            return last[0][:300]
        return None


def run_jobs(jobs: Sequence[Job], limits: Limits, imports: Sequence[str] = ()) -> list[Ended]:
    """Run jobs one after the other; `imports` are modules that all of them use. Raises ToolError if programs cannot be
    confined or a module is missing."""
    if not has_seccomp():
        raise ToolError("programs of models are only run where they can be confined: on Linux, x86-64 or ARM64")
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    code += "from quantkit.lab.generation.confined import main; main()"
    path = [p for p in sys.path if os.path.isabs(p)]
    asked = {
        "imports": list(imports),
        "limits": asdict(limits),
        "jobs": [{"folder": str(j.folder.absolute()), "driver": j.driver, **j.more} for j in jobs],
    }
    env = {
        "PATH": os.defpath, "LANG": "C.UTF-8", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy",
        "PYGAME_HIDE_SUPPORT_PROMPT": "1", "QUANTKIT_HOME": os.path.expanduser("~"),
    }  # fmt: skip
    command = [sys.executable, "-B", "-c", code, json.dumps(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    try:
        said, wrong = process.communicate(json.dumps(asked), _PATIENCE + limits.seconds * len(jobs))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        last = (wrong.strip().splitlines() or [f"code {process.returncode}"])[-1]
        raise ToolError(f"programs cannot be run confined: {last[:300]}")
    return [
        Ended(e["code"], e["timed_out"], _head(j.folder / "stdout"), _head(j.folder / "stderr"))
        for j, e in zip(jobs, json.loads(said), strict=True)
    ]


def _head(path: Path) -> str:
    return (left_by(path, _MOST_SAID) or b"").decode("utf-8", "replace")


def left_by(path: Path, most: int) -> bytes | None:
    """Read what a program left in a file, at most `most` bytes. Returns None for anything but a regular file: a link
    could lead out of its folder, and a pipe has no end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as f:
        return f.read(most) if stat.S_ISREG(os.fstat(fd).st_mode) else None


__all__ = ["Ended", "Job", "Limits", "has_landlock", "left_by", "run_jobs"]

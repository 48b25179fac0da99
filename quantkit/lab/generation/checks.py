"""Runs a rubric's checks on what a program did, in a confined process.

A check is a Python script that fails by an assertion or any other exception. It sees `answer` (the model's text),
`code` (the program found in it, or None), `runs` (a list of `Run` per scenario, by name), `facts`
(quantkit.lab.generation.game_facts), and `every`, all runs of all scenarios.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import game_facts


@dataclass(frozen=True)
class Run:
    """One run of a program in a scenario."""

    seed: int
    code: int
    """the exit code"""
    why: str | None
    """what went wrong; None if nothing did"""
    stdout: str
    stderr: str
    recording: Mapping[str, Any] | None
    """by the pygame driver (see quantkit.lab.generation.game_recorder); None if it made none"""


def run_checks(checks: Sequence[Mapping[str, str]]) -> None:
    """Run each check on runs.json, and write results.json: `name`, `passed`, and `why` it failed."""
    given = json.loads(Path("runs.json").read_text("utf-8"))
    runs = {name: [Run(**run) for run in some] for name, some in given["runs"].items()}
    every = [run for some in runs.values() for run in some]
    results = []
    for check in checks:
        scope = {
            "answer": given["answer"], "code": given["code"], "runs": runs, "every": every, "facts": game_facts,
        }  # fmt: skip
        try:
            exec(compile(check["script"], check["name"], "exec"), scope)
            why = None
        except Exception as e:
            why = str(e)[:300] or type(e).__name__
            if not isinstance(e, AssertionError):
                why = "there is no program" if given["code"] is None else f"{type(e).__name__}: {why}"
        results.append({"name": check["name"], "passed": why is None, "why": why})
    Path("results.json").write_text(json.dumps(results), "utf-8")

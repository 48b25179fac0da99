"""Rubrics: a task, and scripted checks of the programs that a model writes for it. Gives pass@k over several tries."""

from __future__ import annotations

import json
import math
import re
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...base.errors import RecipeError, ToolError, did_you_mean, listed
from ...base.text import markdown_table
from .degeneration import CLOSE
from .sandbox import Ended, Job, Limits, left_by, run_jobs

_SHIPPED = Path(__file__).parent / "rubrics"
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_SPELLINGS = {"python": ("python", "py", "python3")}
Progress = Callable[[str, int, int], None]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scenario(_Strict):
    """A way to run the program."""

    name: str
    driver: Literal["plain", "pygame"] = "plain"
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """of Python's random, with the pygame driver: one run each"""
    frames: int = Field(600, ge=1, le=100_000)
    keys: dict[int, str] = Field(default_factory=dict)
    """keys to press by frame, named as in pygame.K_…"""
    pilot: bool = False


class Check(_Strict):
    """A script that passes, or fails by an exception; quantkit.lab.generation.checks lists what it sees."""

    name: str
    criterion: str = ""
    script: str


class Rubric(_Strict):
    """A rubric, as in its YAML file."""

    name: str
    source: str = ""
    prompt: str = Field(min_length=1)
    chat: bool = True
    """whether the prompt is a user's message, if the model has a chat template"""
    seeds: tuple[int, ...] = Field(min_length=1)
    temp: float = Field(0.6, ge=0)
    min_p: float = Field(0.05, ge=0, le=1)
    n_predict: int = Field(8192, ge=1)
    extract: str = "python"
    """language of the code block that holds the program; the last such block counts"""
    imports: tuple[str, ...] = ()
    """modules that the programs need"""
    scenarios: tuple[Scenario, ...] = ()
    checks: tuple[Check, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Checked:
    """A check of one answer."""

    name: str
    passed: bool
    why: str | None
    """why it failed; None if it passed"""


@dataclass(frozen=True)
class Tried:
    """An answer and its checks."""

    seed: int
    checks: tuple[Checked, ...]

    @property
    def score(self) -> int:
        """How many checks it passes."""
        return sum(c.passed for c in self.checks)


@dataclass(frozen=True)
class Scores:
    """A model's tries."""

    model: str
    tries: tuple[Tried, ...]

    def pass_at(self, k: int, check: str | None = None) -> float:
        """The share of choices of k tries in which at least one passes a check, or all checks."""
        if check is None:
            n_passed = sum(all(c.passed for c in t.checks) for t in self.tries)
        else:
            n_passed = sum(c.passed for t in self.tries for c in t.checks if c.name == check)
        return pass_at_k(len(self.tries), n_passed, k)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        n = len(self.tries)
        names = [c.name for c in self.tries[0].checks]
        return {
            "model": self.model,
            "n_tries": n,
            "n_checks": len(names),
            "mean_score": sum(t.score for t in self.tries) / n,
            "pass_at": {str(k): self.pass_at(k) for k in range(1, n + 1)},
            "checks": [
                {"name": name, "pass_at": {str(k): self.pass_at(k, name) for k in range(1, n + 1)}} for name in names
            ],
            "tries": [{"score": t.score, **asdict(t)} for t in self.tries],
        }


def pass_at_k(n: int, n_passed: int, k: int) -> float:
    """The unbiased pass@k of n tries: 1 - C(n - passed, k) / C(n, k)."""
    if not 1 <= k <= n:
        raise ValueError(f"k is 1 to {n}, not {k}")
    return 1 - math.comb(n - n_passed, k) / math.comb(n, k)


def shipped() -> list[str]:
    """The names of the rubrics that come with quantkit."""
    return sorted(p.stem for p in _SHIPPED.glob("*.yaml"))


def load_rubric(name: str) -> Rubric:
    """Load a rubric, by the name of a shipped one or by its file. Raises RecipeError."""
    path = Path(name)
    if name in shipped():
        path = _SHIPPED / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            f"{name}: is not a rubric{did_you_mean(name, shipped())}; give a .yaml file, or one of: "
            f"{', '.join(shipped())}"
        )
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as e:
        raise RecipeError(f"{name}: cannot be read: {e.strerror or e}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise RecipeError(f"{name}: is not YAML: {' '.join(str(e).split())[:300]}") from None
    try:
        made = Rubric.model_validate(found)
    except ValidationError as e:
        wrong = [f"{name}: {'.'.join(map(str, m['loc'])) or 'the file'}: {m['msg']}" for m in e.errors()]
        raise RecipeError(listed(wrong)) from None
    for what, names in (("checks", [c.name for c in made.checks]), ("scenarios", [s.name for s in made.scenarios])):
        twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
        if twice is not None:
            raise RecipeError(f"{name}: {what}: {twice!r} is there twice; give each a name of its own")
    return made


def check_ready(rubric: Rubric) -> None:
    """Raise ToolError if a module that the programs need is not installed."""
    missing = [m for m in rubric.imports if find_spec(m) is None]
    if missing:
        raise ToolError(
            f"the rubric {rubric.name} runs programs that need {', '.join(missing)}, not installed; run: pip install "
            + " ".join(missing)
        )


def program_in(answer: str, language: str = "python") -> str | None:
    """Find the last code block in a language, else the last one without a language; thinking before `</think>` is
    skipped. Returns None if there is no block."""
    wanted = _SPELLINGS.get(language.lower(), (language.lower(),))
    blocks = _FENCE.findall(answer.rpartition(CLOSE)[2])
    for names in (wanted, ("",)):
        named = [code for lang, code in blocks if lang.lower() in names]
        if named:
            return textwrap.dedent(named[-1])
    return None


def judge(rubric: Rubric, answer: str, limits: Limits | None = None) -> tuple[Checked, ...]:
    """Run the program in an answer, and the checks. Raises ToolError if programs cannot be confined."""
    code = program_in(answer, rubric.extract)
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="quantkit-rubric-", ignore_cleanup_errors=True) as place:
        runs: dict[str, list[dict[str, Any]]] = {s.name: [] for s in rubric.scenarios}
        if code is not None and rubric.scenarios:
            planned = [(s, seed) for s in rubric.scenarios for seed in s.seeds]
            jobs = [_job(Path(place) / str(i), code, s, seed) for i, (s, seed) in enumerate(planned)]
            for (s, seed), job, ended in zip(planned, jobs, run_jobs(jobs, limits, rubric.imports), strict=True):
                runs[s.name].append(_run_of(job, seed, ended, limits))
        folder = Path(place) / "checks"
        folder.mkdir()
        given = {"answer": answer, "code": code, "runs": runs}
        (folder / "runs.json").write_text(json.dumps(given), "utf-8")
        checks = [{"name": c.name, "script": c.script} for c in rubric.checks]
        (ended,) = run_jobs([Job(folder, "checks", {"checks": checks})], limits)
        try:
            results = json.loads((folder / "results.json").read_text("utf-8"))
        except (OSError, ValueError):
            raise ToolError(
                f"the checks of {rubric.name} cannot be run: they {ended.why or 'left no result'}"
            ) from None
    return tuple(Checked(**r) for r in results)


def _job(folder: Path, code: str, scenario: Scenario, seed: int) -> Job:
    folder.mkdir()
    (folder / "program.py").write_text(code, "utf-8", "replace")
    asked: Mapping[str, Any] = {
        "frames": scenario.frames, "keys": scenario.keys, "pilot": scenario.pilot, "seed": seed,
    }  # fmt: skip
    return Job(folder, scenario.driver, {"scenario": asked} if scenario.driver == "pygame" else {})


def _run_of(job: Job, seed: int, ended: Ended, limits: Limits) -> dict[str, Any]:
    return {
        "seed": seed, "code": ended.code, "why": ended.why, "stdout": ended.stdout, "stderr": ended.stderr,
        "recording": _json(job.folder / "record.json", limits),
    }  # fmt: skip


def _json(path: Path, limits: Limits) -> Any:
    """A program's JSON file; None if it is not JSON."""
    try:
        return json.loads(left_by(path, limits.file_bytes) or b"")
    except (ValueError, RecursionError):
        return None


def markdown(rubric: Rubric, found: Sequence[Scores]) -> str:
    """A table of models, one of checks, and why tries failed."""
    n = len(found[0].tries)
    names = [c.name for c in found[0].tries[0].checks]
    rows = [
        [
            s.model, f"{sum(t.score for t in s.tries) / n:.2f}", *(f"{t.score}" for t in s.tries),
            f"{s.pass_at(1):.0%}", *([f"{s.pass_at(n):.0%}"] if n > 1 else []),
        ]
        for s in found
    ]  # fmt: skip
    head = ["model", f"mean of {len(names)}", *(f"seed {t.seed}" for t in found[0].tries), "all: pass@1"]
    head += [f"all: pass@{n}"] if n > 1 else []
    by_check = [[name, *(f"{s.pass_at(1, name):.0%} / {s.pass_at(n, name):.0%}" for s in found)] for name in names]
    failed = [
        [s.model, str(t.seed), c.name, c.why or ""] for s in found for t in s.tries for c in t.checks if not c.passed
    ]
    lines = [f"Rubric {rubric.name}: {len(names)} checks, {n} tries", "", markdown_table(rows, head, range(1, 9))]
    lines += ["", markdown_table(by_check, [f"pass@1 / pass@{n}", *(s.model for s in found)], range(1, 1 + len(found)))]
    if failed:
        lines += ["", markdown_table(failed, ["model", "seed", "fails", "why"], (1,))]
    return "\n".join(lines)

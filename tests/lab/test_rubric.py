"""Rubrics: schema, pass@k, programs in answers, what confined programs cannot do, and the Flappy Bird test on games
that each fail one criterion."""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.base.errors import RecipeError, ToolError
from quantkit.lab.generation.confined import has_landlock, has_seccomp
from quantkit.lab.generation.rubric import (
    Checked,
    Rubric,
    Scores,
    Tried,
    check_ready,
    judge,
    load_rubric,
    markdown,
    pass_at_k,
    program_in,
    shipped,
)
from quantkit.lab.generation.sandbox import Ended, Job, Limits, run_jobs

DATA = Path(__file__).parent.parent / "data"
confined = pytest.mark.skipif(not has_seccomp(), reason="programs are confined on Linux, x86-64 and ARM64 only")
files_closed = pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
needs_pygame = pytest.mark.skipif(find_spec("pygame") is None, reason="pygame is not installed")
SIMPLE = """\
name: double
prompt: Write a Python program that prints the double of 21.
seeds: [1, 2]
scenarios:
  - {name: run}
checks:
  - {name: prints 42, script: 'assert runs["run"][0].stdout == "42\\n", runs["run"][0].stdout'}
  - {name: ends well, script: 'assert runs["run"][0].why is None, runs["run"][0].why'}
"""


# ---------------------------------------------------------------- pass@k


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_pass(n: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(min(c) < passed for c in choices) / math.comb(n, k))


def test_pass_at_k_needs_k_tries() -> None:
    with pytest.raises(ValueError, match="k is 1 to 3, not 4"):
        pass_at_k(3, 1, 4)


def test_scores() -> None:
    def tried(seed: int, *passed: bool) -> Tried:
        return Tried(seed, tuple(Checked(n, p, None if p else "so") for n, p in zip("ab", passed, strict=True)))

    scores = Scores("m", (tried(1, True, True), tried(2, True, False), tried(3, False, False)))
    assert [t.score for t in scores.tries] == [2, 1, 0]
    assert [scores.pass_at(k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [scores.pass_at(k, "a") for k in (1, 2, 3)] == pytest.approx([2 / 3, 1, 1])
    said = scores.to_json()
    assert (said["mean_score"], said["n_tries"], said["n_checks"]) == (1, 3, 2)
    assert said["checks"][1]["pass_at"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3), "3": 1}
    text = markdown(load_rubric("flappy-bird"), [scores])
    assert "| m | 1.00 | 2 | 1 | 0 | 33% | 100% |" in text
    assert "| m | 3 | b | so |" in text


# ---------------------------------------------------------------- programs in answers


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("```Python title=a\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("<think>```python\nx = 1\n```</think>\nI cannot.", None),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```\nx = 2\n```", "x = 1\n"),
        ("```bash\npip install pygame\n```", None),
        ("```python\nx = 1\n", None),
        ("x = 1", None),
        ("", None),
        ("1. So:\n   ```python\n   x = 1\n   ```", "x = 1\n"),
    ],
)
def test_the_program_in_an_answer(answer: str, code: str | None) -> None:
    assert program_in(answer) == code


# ---------------------------------------------------------------- the file


def test_the_shipped_rubric() -> None:
    assert shipped() == ["flappy-bird"]
    rubric = load_rubric("flappy-bird")
    assert len(rubric.checks) == 10
    assert (rubric.seeds, rubric.temp, rubric.min_p) == ((3407, 3408, 3409), 0.6, 0.05)
    assert rubric.prompt.startswith("Create a Flappy Bird game in Python. You must include these things:\n1. ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("prompt:", "promt:"), "{file}: prompt: Field required\n{file}: promt: Extra inputs are not permitted"),
        (("[1, 2]", "[]"), "{file}: seeds: Tuple should have at least 1 item after validation, not 0"),
        (
            ("{name: run}", "{name: run, driver: doom}"),
            "{file}: scenarios.0.driver: Input should be 'plain' or 'pygame'",
        ),
        (("ends well", "prints 42"), "{file}: checks: 'prints 42' is there twice; give each a name of its own"),
        (("[1, 2]", "[1, 2"), "{file}: is not YAML: while parsing a flow sequence"),
    ],
)
def test_a_rubric_that_is_none(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(SIMPLE.replace(*change))
    with pytest.raises(RecipeError) as e:
        load_rubric(str(file))
    assert str(e.value).startswith(says.format(file=file))


def test_a_rubric_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as e:
        load_rubric("flappy-brid")
    assert str(e.value) == (
        "flappy-brid: is not a rubric (did you mean flappy-bird?); give a .yaml file, or one of: flappy-bird"
    )
    with pytest.raises(RecipeError) as e:
        load_rubric(str(tmp_path / "r.yaml"))
    assert str(e.value) == f"{tmp_path / 'r.yaml'}: cannot be read: No such file or directory"


def test_a_module_that_is_missing() -> None:
    rubric = Rubric.model_validate(
        {"name": "n", "prompt": "p", "seeds": [1], "imports": ["nomodule"], "checks": [{"name": "a", "script": ""}]}
    )
    with pytest.raises(ToolError) as e:
        check_ready(rubric)
    assert str(e.value) == ("the rubric n runs programs that need nomodule, not installed; run: pip install nomodule")


# ---------------------------------------------------------------- confined programs


def run_all(folder: Path, programs: list[str], limits: Limits | None = None) -> list[Ended]:
    jobs = []
    for i, program in enumerate(programs):
        (folder / str(i)).mkdir()
        (folder / str(i) / "program.py").write_text(program)
        jobs.append(Job(folder / str(i), "plain"))
    return run_jobs(jobs, limits or Limits())


@confined
def test_what_a_program_can_do(tmp_path: Path) -> None:
    ended = run_all(
        tmp_path,
        [
            "print('hi')",
            "import threading\nt = threading.Thread(target=print, args=('thread',))\nt.start(); t.join()",
            "import os\nopen('a', 'w').write('mine')\nos.mkdir('b')\nos.rename('a', 'b/a')\nprint(open('b/a').read())",
            "import os, tempfile\nassert os.environ['HOME'] == os.getcwd() == tempfile.gettempdir()",
            "raise SystemExit(3)",
            "1 / 0",
            "import sys; sys.exit('no luck')",
        ],
    )
    assert [(e.code, e.stdout) for e in ended] == [
        (0, "hi\n"), (0, "thread\n"), (0, "mine\n"), (0, ""), (3, ""), (1, ""), (1, ""),
    ]  # fmt: skip
    assert [e.why for e in ended] == [
        None, None, None, None, "ended with code 3", "ZeroDivisionError: division by zero", "no luck",
    ]  # fmt: skip
    assert "program.py" in ended[5].stderr


@confined
def test_what_a_program_cannot_do(tmp_path: Path) -> None:
    refused = "PermissionError: [Errno 1] Operation not permitted"
    cases = {
        "import socket; socket.socket()": refused,
        "import socket; socket.create_connection(('127.0.0.1', 9))": refused,
        "import socket; socket.socketpair()": refused,
        "import os; os.fork()": refused,
        "import subprocess; subprocess.run(['true'])": refused,
        "import os; os.execv('/bin/true', ['true'])": refused,
        "import os; os.kill(os.getppid(), 9)": refused,
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()": refused,
        "x = bytearray(1 << 30)": "MemoryError",
        "f = open('x', 'wb')\nwhile True: f.write(b'0' * 65536)": "OSError: [Errno 27] File too large",
    }
    ended = run_all(tmp_path, list(cases), Limits(memory=1 << 29, file_bytes=1 << 20))
    for (program, says), e in zip(cases.items(), ended, strict=True):
        assert e.code == 1, program
        assert e.why == says, program
    assert (tmp_path / "9" / "x").stat().st_size == 1 << 20


@confined
@files_closed
def test_a_program_sees_no_files_of_others(tmp_path: Path) -> None:
    secret, home = tmp_path / "secret", Path.home()
    secret.write_text("s")
    ended = run_all(
        tmp_path,
        [
            f"open({str(secret)!r})",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"import os; os.listdir({str(home)!r})",
            "open('/etc/passwd')",
            "import os; open(f'/proc/{os.getppid()}/environ')",
            "import os; os.remove('../secret')",
        ],
    )
    for e in ended:
        assert e.why is not None
        assert e.why.startswith("PermissionError: [Errno 13] Permission denied: "), e
    assert secret.read_text() == "s"
    assert not (tmp_path / "new").exists()


@confined
def test_what_a_program_leaves_is_read_with_care(tmp_path: Path) -> None:
    """A link leads to nothing outside, a pipe is not waited for, and what is no recording is none."""
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    ended = run_all(
        tmp_path,
        [
            f"import os; os.remove('stdout'); os.symlink({str(secret)!r}, 'stdout')",
            "import os; os.remove('stdout'); os.mkfifo('stdout')",
            "print('x' * (1 << 20))",
            "import os; os.write(1, bytes(range(256)))",
        ],
    )
    assert [(e.code, len(e.stdout)) for e in ended] == [(0, 0), (0, 0), (0, 1 << 16), (0, 256)]
    rubric = Rubric.model_validate(
        {
            "name": "n", "prompt": "p", "seeds": [1], "scenarios": [{"name": "r"}],
            "checks": [{"name": "a", "script": "assert runs['r'][0].recording is None, 'it has one'"}],
        }
    )  # fmt: skip
    for left in (
        f"import os; os.symlink({str(secret)!r}, 'record.json')",
        "open('record.json', 'w').write('[' * 99999)",
    ):
        assert judge(rubric, f"```python\n{left}\n```") == (Checked("a", True, None),)
    # and a recording of a program's own making can only fail a check
    own = "open('record.json', 'w').write('{}')"
    assert judge(rubric, f"```python\n{own}\n```") == (Checked("a", False, "it has one"),)


@confined
def test_a_program_does_not_run_for_ever(tmp_path: Path) -> None:
    sleeping, after = run_all(tmp_path, ["import time; time.sleep(99)", "print(1)"], Limits(seconds=1))
    assert (sleeping.timed_out, sleeping.why) == (True, "did not end in the time it was given")
    assert after.stdout == "1\n"
    (tmp_path / "busy").mkdir()
    (busy,) = run_all(tmp_path / "busy", ["while True: pass"], Limits(cpu_seconds=1))
    assert (busy.timed_out, busy.why) == (False, "used more processor time than allowed")


@confined
def test_a_rubric_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "double.yaml"
    file.write_text(SIMPLE)
    rubric = load_rubric(str(file))
    assert judge(rubric, "```python\nprint(2 * 21)\n```") == (
        Checked("prints 42", True, None), Checked("ends well", True, None),
    )  # fmt: skip
    assert judge(rubric, "```python\nprint(2 * 21)\n1 / 0\n```") == (
        Checked("prints 42", True, None), Checked("ends well", False, "ZeroDivisionError: division by zero"),
    )  # fmt: skip
    assert judge(rubric, "```python\nprint(21)\n```")[0] == Checked("prints 42", False, "21\n")
    # without a program there are no runs
    assert judge(rubric, "No.")[0] == Checked("prints 42", False, "there is no program")


# ---------------------------------------------------------------- Flappy Bird

GAME = (DATA / "flappy_bird.txt").read_text()
#: for each criterion what is changed in a game that meets all, and why it fails then
FAULTS = {
    "background": (
        ("background = random.choice(LIGHT)", "pass"),
        "always (173, 216, 230), so not chosen at random",
    ),
    "SPACE accelerates": (
        ("velocity += FLAP", "velocity = FLAP if velocity > 0 else velocity"),
        "three presses lift it no higher than one: ",
    ),
    "bird": (('random.choice(["square", "circle", "triangle"])', '"square"'), "always a square"),
    "land": (("(230, 200, 40)]", "(60, 60, 200)]"), "neither dark brown nor yellow: (60, 60, 200)"),
    "score": (("score += 1", "score += 0"), "it stays 0, and no pipe was passed in three flights"),
    "pipes": (
        ("PIPES = [(0, 100, 0), (196, 164, 116), (85, 85, 85)]", "PIPES = [(0, 100, 0)]"),
        "always (0, 100, 0), so not chosen at random",
    ),
    "losing": (("if event.key == pygame.K_q:", "if event.key == pygame.K_x:"), "q does not quit: frames"),
    "markdown": (("```python", "```"), "no section that begins with ```python"),
    "no errors": (
        ("                score += 1\n", "                score += 1\n                assert score < 3\n"),
        "AssertionError",
    ),
}
#: other ways to fail some of them
OTHERS = [
    ("background", "LIGHT = [(173, 216, 230)", "LIGHT = [(250, 220, 220)", "does not start light blue, but "),
    ("background", "(240, 230, 250)]", "(240, 230, 250), (40, 40, 90)]", "not light: (40, 40, 90)"),
    ("bird", "DARK = [(120, 0, 0),", "DARK = [(255, 230, 0),", "not dark: (255, 230, 0)"),
    ("bird", "color = random.choice(DARK)", "color = DARK[0]", "always of the colour (120, 0, 0)"),
    ("land", "land = random.choice(LAND)", "land = LAND[0]", "always (101, 67, 33), so not chosen at random"),
    ("score", "(WIDTH - shown.get_width() - 10, 10)", "(10, 10)", "no number at the top right"),
    ("score", "score += 1", "score += 5", "it grows by [5]"),
    (
        "pipes",
        "upper = random.randint(60, HEIGHT - LAND_HEIGHT - GAP - 60)",
        "upper = 200",
        "always at the same height",
    ),
    ("losing", 'f"Best score: {best}"', '"Bad luck"', "no best score is shown"),
    ("losing", "text.get_rect(center=(WIDTH // 2,", "text.get_rect(center=(20,", "outside the screen: "),
    ("losing", "if event.key == pygame.K_ESCAPE:", "if event.key == pygame.K_x:", "Esc does not quit: frames"),
    ("losing", "                    new_game()\n", "                    pass\n", "SPACE does not restart the game"),
]


@pytest.fixture(scope="module")
def flappy() -> Rubric:
    return load_rubric("flappy-bird")


@confined
@needs_pygame
def test_a_game_that_meets_all_criteria(flappy: Rubric) -> None:
    assert [(c.name, c.why) for c in judge(flappy, f"Here it is:\n```python\n{GAME}```\n")] == [
        (c.name, None) for c in flappy.checks
    ]


@pytest.fixture(scope="module")
def short(flappy: Rubric) -> Rubric:
    """The same with half of the seeds of Python's random."""
    return flappy.model_copy(
        update={"scenarios": tuple(s.model_copy(update={"seeds": s.seeds[::2]}) for s in flappy.scenarios)}
    )


def failures(flappy: Rubric, answer: str) -> dict[str, str | None]:
    return {c.name: c.why for c in judge(flappy, answer) if not c.passed}


@confined
@needs_pygame
@pytest.mark.parametrize("criterion", FAULTS)
def test_a_game_that_fails_one_criterion(short: Rubric, criterion: str) -> None:
    (old, new), why = FAULTS[criterion]
    answer = f"```python\n{GAME}```"
    assert answer.count(old) == 1
    failed = failures(short, answer.replace(old, new))
    assert list(failed) == [criterion]
    assert str(failed[criterion]).startswith(why)


@confined
@needs_pygame
@pytest.mark.parametrize(("criterion", "old", "new", "why"), OTHERS)
def test_other_ways_to_fail_a_criterion(flappy: Rubric, criterion: str, old: str, new: str, why: str) -> None:
    assert GAME.count(old) == 1
    (check,) = (c for c in flappy.checks if c.name == criterion)
    used = tuple(s for s in flappy.scenarios if f'"{s.name}"' in check.script or "lose and {key}" in check.script)
    if criterion == "losing":
        used = tuple(s.model_copy(update={"seeds": s.seeds[:1]}) for s in used)
    only = flappy.model_copy(update={"checks": (check,), "scenarios": used})
    (checked,) = judge(only, f"```python\n{GAME.replace(old, new)}```")
    assert not checked.passed
    assert str(checked.why).startswith(why)


@confined
@needs_pygame
def test_what_is_no_game(flappy: Rubric) -> None:
    """Without a window nothing of a game can be seen: pygame's criterion fails with all that are about one."""
    failed = failures(flappy, "```python\nprint('Flap!')\n```")
    assert failed["pygame"] == "no run opened a window of pygame's and drew a frame"
    assert {c.name for c in flappy.checks} - set(failed) == {"markdown", "no errors"}
    failed = failures(flappy, f"```python\n{GAME}")
    assert failed["markdown"] == "no section of code, or one that does not end"
    assert failed["background"] == "there is no program"
    assert failed["no errors"] == "no program"
    assert len(failed) == 10

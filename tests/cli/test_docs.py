"""The documentation: its commands are parsed by the real command line, and those of the first hour are run."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command_tree import commands

from quantkit.cli import cli
from quantkit.cli.files import Group

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted(DOCS.glob("*.md"))]


def commands_of(text: str) -> Iterator[str]:
    """Every line of a code block that begins with `quantkit`, and every `quantkit …` within a sentence."""
    prose: list[str] = []
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            if line.strip().startswith("quantkit "):
                yield re.split(r" {2,}| \| | > ", line.strip())[0]  # what follows is its description
        else:
            prose.append(line)
    yield from re.findall(r"`(quantkit [^`]+)`", " ".join(prose))


def _is_placeholder(word: str) -> bool:
    return "…" in word or word in ("...", "COMMAND")


def parse(line: str) -> None:
    """Give the line to click's own parsers, as far as they go without files: each command, option and choice."""
    command: click.Command = cli
    ctx = click.Context(cli, info_name="quantkit")
    words = [word for word in shlex.split(line.replace(";", ""))[1:] if not _is_placeholder(word)]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if isinstance(command, Group) and command.default is not None and words[0] not in command.commands:
            words.insert(0, command.default)
        name, found, words = command.resolve_command(ctx, words)
        assert found is not None
        command, ctx = found, click.Context(found, info_name=name, parent=ctx)
    values, _, _ = command.make_parser(ctx).parse_args(list(words))
    for param in command.get_params(ctx):
        if isinstance(param.type, click.Choice | click.types._NumberRangeBase) and param.name in values:
            value = values[param.name]
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str):
                    param.type.convert(one, param, ctx)


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    wrong = []
    for line in commands_of(page.read_text("utf-8")):
        try:
            parse(line)
        except click.BadOptionUsage as e:
            if line.split()[-1] != e.option_name:  # a sentence may name an option without its value
                wrong.append(f"{line}: {e.format_message()}")
        except (click.ClickException, ValueError) as e:
            wrong.append(f"{line}: {e.format_message() if isinstance(e, click.ClickException) else e}")
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("quantkit plam deepseek-r1", "there is no command 'plam'"),
        ("quantkit plan deepseek-r1 --recipy UD-IQ1_S", "No such option"),
        ("quantkit plan deepseek-r1 --layout kv", "'kv' is not one of"),
        ("quantkit fit deepseek-r1 --ctx 0", "0 is not in the range"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, why: str) -> None:
    with pytest.raises(click.ClickException) as e:
        parse(line)
    assert why in e.value.format_message()


def test_examples_in_help_are_of_the_command_line() -> None:
    wrong, seen = [], 0
    for name, command in commands():
        text = inspect.cleandoc(command.help or "").replace("\\\n", " ")
        for line in text.splitlines():
            if line.strip().startswith("quantkit "):
                seen += 1
                example = re.split(r" {4,}|  (?=[a-z])| \| | > ", line.strip())[0]
                try:
                    parse(example)
                except (click.ClickException, ValueError) as e:
                    says = e.format_message() if isinstance(e, click.ClickException) else e
                    wrong.append(f"{name}: {example}: {says}")
    assert wrong == []
    assert seen > 60


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    assert [p.name for p in DOCS.glob("*.md") if p.name != "README.md" and f"]({p.name})" not in index] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_first_hour(tmp_path: Path) -> None:
    """Its commands, in their order and in one folder, as a new user types them."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / "first-hour.md").read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 6
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    if not env["PYTHONPATH"]:
        del env["PYTHONPATH"]
    done = subprocess.run(
        ["bash", "-euc", "\n".join(blocks)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "OK: " in done.stdout  # verify's verdict
    assert re.search(r"mean KLD", done.stdout)

"""Functions take few things: what belongs together is one object."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import quantkit

MOST = 8


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether click calls it, with a parameter for each of its options."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def too_long(text: str) -> Iterator[str]:
    """The functions with more than MOST parameters but self and cls, each with its number."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_command(node):
            a = node.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x is not None)]
            n = sum(x.arg not in ("self", "cls") for x in every)
            if n > MOST:
                yield f"{node.name}: {n}"


def test_no_function_has_more_than_eight_parameters() -> None:
    root = Path(quantkit.__file__).parent
    sources = sorted(root.rglob("*.py"))
    assert len(sources) > 100
    assert [f"{p.relative_to(root)} {found}" for p in sources for found in too_long(p.read_text("utf-8"))] == []


def test_the_count_takes_all_kinds_of_parameters() -> None:
    assert list(too_long("def f(self, a, /, b, c, d, *e, g, h, **i): ...")) == []
    assert list(too_long("async def f(a, /, b, c, d, *e, g, h, i, **j): ...")) == ["f: 9"]
    assert list(too_long("@click.command()\ndef f(a, b, c, d, e, f, g, h, i): ...")) == []

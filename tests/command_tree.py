"""The commands of the command line, as click has them."""

from __future__ import annotations

from collections.abc import Iterator

import click

from quantkit.cli import cli


def commands() -> Iterator[tuple[str, click.Command]]:
    def walk(prefix: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for name, sub in command.commands.items():
                yield from walk(f"{prefix} {name}".strip(), sub)
        else:
            yield prefix, command

    yield from walk("", cli)

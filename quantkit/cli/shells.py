"""Completion for the shell, by click's protocol: bash, zsh and fish call `quantkit` with $_QUANTKIT_COMPLETE set.

bash breaks words at = and :, so that in `--type GLOB=Q4` it asks about Q4 alone: here the word is put together again.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NoReturn

from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

if TYPE_CHECKING:
    import click

VARIABLE = "_QUANTKIT_COMPLETE"
_BREAK = re.compile("[=:]+")


class _Bash(BashComplete):
    """bash, with the words as they were typed."""

    _is_joined = False
    """whether the word at the cursor was broken"""

    def get_completion_args(self) -> tuple[list[str], str]:
        words = split_arg_string(os.environ["COMP_WORDS"])
        at = int(os.environ["COMP_CWORD"])
        typed: list[str] = []
        joins = False
        for word in [*words[1:at], words[at] if at < len(words) else ""]:
            is_break = _BREAK.fullmatch(word) is not None
            if typed and (is_break or joins):
                typed[-1] += word
                self._is_joined = True
            else:
                typed.append(word)
                self._is_joined = False
            joins = is_break
        return typed[:-1], typed[-1]

    def format_completion(self, item: CompletionItem[str]) -> str:
        if self._is_joined and item.type == "plain":
            return f"{item.type},{_BREAK.split(item.value)[-1]}"
        return super().format_completion(item)


def complete(cli: click.Command) -> NoReturn:
    """Answer the shell and exit."""
    add_completion_class(_Bash, "bash")
    cli.main(prog_name="quantkit", complete_var=VARIABLE)
    raise SystemExit(1)  # main never returns

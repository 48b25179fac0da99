"""quantkit imatrix check: an importance matrix held against a recipe and a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from .changes import change_options
from .files import IMATRIX, MODEL, RECIPE, Command
from .options import (
    imatrix_policy_option,
    json_option,
    layout_option,
    mixture_version_option,
    only_types,
    recipe_of,
    set_option,
    tokenizer_options,
)

if TYPE_CHECKING:
    from quantkit.imatrix.policies import Policy

#: the exit code when something was found that matters
_FOUND = 1


@click.command(cls=Command)
@click.argument("file", metavar="FILE", type=IMATRIX)
@click.option("-r", "--recipe", required=True, type=RECIPE, help="Name of a shipped recipe, or path of a YAML file.")
@click.option(
    "-m", "--model", required=True, type=MODEL, metavar="SOURCE",
    help="The model: a known one's name, a config.json, a checkpoint or a GGUF.",
)  # fmt: skip
@click.option(
    "--min-tokens", type=click.IntRange(1), default=100, show_default=True, metavar="N",
    help="List the experts that saw fewer tokens.",
)  # fmt: skip
@imatrix_policy_option
@set_option
@mixture_version_option
@layout_option
@tokenizer_options
@change_options
@click.option("--all", "every", is_flag=True, help="Every row, not the first 40.")
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    file: str,
    recipe: str,
    model: str,
    min_tokens: int,
    policy: Policy | None,
    sets: tuple[str, ...],
    mixture_version: str,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    every: bool,
    as_json: bool,
) -> None:
    """Check an importance matrix for a recipe and a model: entries, sizes, values, experts never or rarely seen.

    Beside each finding are the bytes of the file that it affects, and whether it matters: whether the tensor's type
    uses these values and the policy does not replace them. Findings that matter come first, by bytes. Exit code 0 if
    none matters, 1 if one does, 6 if FILE cannot be read.

    \b
    quantkit imatrix check imatrix.gguf --recipe UD-IQ1_S --model deepseek-r1
    quantkit imatrix check imatrix.gguf -r UD-IQ1_S -m deepseek-r1 --imatrix-policy sibling,shrink:50
    quantkit imatrix check imatrix.gguf -r UD-IQ1_S -m deepseek-r1 --json | jq '.found[] | select(.matters) | .tensor'
    """
    from quantkit.imatrix.matrix import open_imatrix
    from quantkit.model.open import open_model
    from quantkit.planning.imatrix_check import check as run

    rules = recipe_of(recipe, sets)
    matrix = open_imatrix(file)
    # the tokenizer is no part of it
    described = open_model(model, only_types(layout, pre, pad_token))
    found = run(described, rules, matrix, policy, min_tokens, mixture_version)
    click.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if as_json else found.text(every))
    ctx.exit(0 if found.ok else _FOUND)

"""quantkit inspect."""

from __future__ import annotations

import json

import click

from .files import MODEL, Command
from .options import json_option, layout_option, only_types, tokenizer_options


@click.command(cls=Command)
@click.argument("source", type=MODEL)
@click.option("--all", "every_tensor", is_flag=True, help="A line for each tensor instead of each kind.")
@json_option
@layout_option
@tokenizer_options
def inspect(
    source: str, every_tensor: bool, as_json: bool, layout: str, pre: str | None, pad_token: str | None
) -> None:
    """Show what is inside a GGUF or a checkpoint: metadata, tensors, types, sizes. Reads headers only.

    \b
    quantkit inspect R1-UD-IQ1_S-00001-of-00003.gguf
    quantkit inspect DeepSeek-R1/ --json | jq .stored
    """
    from quantkit.model.open import describe_stored, open_model
    from quantkit.model.sources.remote import is_remote
    from quantkit.planning import report

    from .terminal import width

    # a tokenizer nobody knows is no reason not to look
    catalogue = open_model(source, only_types(layout, pre, pad_token)._replace(any_kind=True))
    paths = (
        [str(p) for p in catalogue.source.files]
        if catalogue.source
        else [source if is_remote(source) else "(config only)"]
    )
    found = report.inspection(catalogue, describe_stored(catalogue), paths)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        click.echo(report.inspection_text(found, every_tensor, width()))

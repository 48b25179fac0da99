"""Options of commands that read texts: --text, --chat, --ctx, --chunks, --parse-special."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from .files import TEXT
from .options import F, together

if TYPE_CHECKING:
    from quantkit.model.catalogue import Catalogue
    from quantkit.text.chunking import Chunks


def _texts(required: bool) -> Callable[[F], F]:
    """As `texts`, `chat` and `parse_special`."""
    return together(
        click.option(
            "--text",
            "texts",
            multiple=True,
            required=required,
            type=TEXT,
            help="A file, a folder of text files, a .jsonl file with a `text` on each line, or - for standard input. "
            "Repeatable, read in order.",
        ),
        click.option(
            "--chat",
            is_flag=True,
            help="Apply the model's chat template to the `messages` of each line of .jsonl files.",
        ),
        click.option(
            "--parse-special",
            is_flag=True,
            help="Read the text of a control token (<|im_start|>) as that token; --chat always does.",
        ),
    )


text_options, optional_text_options = _texts(True), _texts(False)
#: as `n_ctx` and `n_chunks`
chunk_options = together(
    click.option(
        "-c", "--ctx", "n_ctx", type=click.IntRange(2, 1 << 20), default=512, show_default=True,
        help="Tokens per chunk.",
    ),
    click.option("--chunks", "n_chunks", type=click.IntRange(1), help="The most chunks to use.  [default: the whole "
    "text]"),
)  # fmt: skip


def check_countable(model: Catalogue) -> None:
    """Raise UsageError for a model without a tokenizer, whose --estimate cannot count a --text."""
    if model.source is None and not model.kvs_complete:
        raise click.UsageError(f"{model.model} has no tokenizer here to count a --text; give --text-tokens instead")


def choosing_options(of_text: str) -> Callable[[F], F]:
    """Texts to choose and to report on, and how they are cut. `of_text`: what becomes of --text."""
    return together(
        click.option("--text", "texts", multiple=True, type=TEXT, help=of_text),
        click.option(
            "--choose-text", "choose_texts", multiple=True, type=TEXT, help="Text to choose on, instead of --text."
        ),
        click.option(
            "--report-text", "report_texts", multiple=True, type=TEXT, help="Text to report on, instead of --text."
        ),
        click.option(
            "-c", "--ctx", "n_ctx", type=click.IntRange(2, 1 << 20), default=512, show_default=True,
            help="Tokens per chunk.",
        ),
        click.option(
            "--chunks", "n_chunks", type=click.IntRange(1), help="The most chunks of each text, evenly spread.  "
            "[default: all]"
        ),
    )  # fmt: skip


def read_chunks(
    model: Catalogue, texts: Iterable[str], n_ctx: int, n_chunks: int | None, chat: bool, parse_special: bool
) -> Chunks:
    """The chunks that these options name; what is odd about them goes to standard error. Raises as
    quantkit.text.chunks."""
    from quantkit import text

    made = text.chunks(model, list(texts), n_ctx, n_chunks, chat=chat, parse_special=parse_special)
    print_notes(made.notes)
    return made


def print_notes(notes: Iterable[str]) -> None:
    """A line of standard error for each."""
    for note in notes:
        click.echo(f"note: {note}", err=True)

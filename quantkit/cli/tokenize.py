"""quantkit tokenize."""

from __future__ import annotations

import json

import click

from .files import MODEL, Command
from .options import json_option, tokenizer_options
from .text_options import chunk_options, print_notes, text_options


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@text_options
@chunk_options
@click.option("--ids", is_flag=True, help="Print the token ids, as llama-tokenize --ids does, and nothing else.")
@json_option
@tokenizer_options
def tokenize(
    model: str,
    texts: tuple[str, ...],
    chat: bool,
    parse_special: bool,
    n_ctx: int,
    n_chunks: int | None,
    ids: bool,
    as_json: bool,
    pre: str | None,
    pad_token: str | None,
) -> None:
    """Count the tokens and chunks of a text, or print its token ids. No weight is read.

    MODEL is a checkpoint directory or a GGUF. The ids are those that llama-imatrix and llama-perplexity compute with;
    llama-tokenize prints them with --no-escape --no-parse-special, and one more for the last line's end.

    \b
    quantkit tokenize R1-UD-IQ1_S-00001-of-00003.gguf --text calibration.txt
    quantkit tokenize DeepSeek-R1/ --text chats.jsonl --chat --ids
    """
    from quantkit import text
    from quantkit.model.families.options import Options
    from quantkit.model.open import open_model
    from quantkit.text.chunking import encode_sources

    tokenizer = text.tokenizer(open_model(model, Options(pre=pre, pad_token=pad_token)))
    limit = None if n_chunks is None else n_chunks * n_ctx
    found, read = encode_sources(tokenizer, texts, chat=chat, parse_special=parse_special, limit=limit)
    print_notes(read.notes)
    v, bos = tokenizer.vocabulary, tokenizer.bos if tokenizer.add_bos else None
    facts = {
        "tokenizer": v.model,
        "pre": v.pre,
        "vocabulary": len(v.tokens),
        "fingerprint": v.fingerprint,
        "texts": list(read.names),
        "bytes": read.nbytes,
        "tokens": len(found),
        "whole_text": limit is None or len(found) < limit,
        "ctx": n_ctx,
        "chunks": len(found) // n_ctx,
        "bos": bos,
        "add_eos": tokenizer.add_eos,
    }
    if as_json:
        click.echo(json.dumps(facts | ({"ids": found.tolist()} if ids else {}), indent=None if ids else 1))
    elif ids:
        click.echo(str(found.tolist()))
    else:
        whole = facts["whole_text"]
        rate = f", {len(found) / read.nbytes:.3f} a byte" if whole and read.nbytes else " (--chunks ends there)"
        lines = [
            ("tokenizer", f"{v.model}{v.pre and f', {v.pre}'}, {len(v.tokens):,} tokens"),
            ("text", f"{read.nbytes:,} bytes of {', '.join(read.names)}"),
            ("tokens", f"{len(found):,}{rate}"),
            ("BOS", "none" if bos is None else f"{bos} {v.tokens[bos]!r}, first of the text and of every chunk"),
            ("chunks", f"{len(found) // n_ctx:,} of {n_ctx:,} tokens; {len(found) % n_ctx:,} tokens are left over"),
        ]
        click.echo("\n".join(f"{name:10} {value}" for name, value in lines))

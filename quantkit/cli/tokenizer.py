"""quantkit tokenizer check."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar
from .files import MENDED, MODEL, Group
from .options import json_option

if TYPE_CHECKING:
    from quantkit.text.check import Checked, Subject


@click.group(cls=Group)
def tokenizer() -> None:
    """Look at a model's tokenizer, and mend its padding token.

    \b
    quantkit tokenizer check R1-UD-IQ1_S-00001-of-00003.gguf
    """


@tokenizer.command()
@click.argument("source", type=MODEL)
@click.option("--fix", type=click.Choice(["pad"]), help="Mend the padding token, in the file or in a copy (-o).")
@click.option("--pad-token", metavar="TOKEN", help="The padding token to set, by text or id.  [default: the family's]")
@click.option("-o", "--output", type=MENDED, metavar="FILE", help="Write a mended copy, and leave SOURCE as it is.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress; findings and errors only.")
def check(
    source: str, fix: str | None, pad_token: str | None, output: Path | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Say what is wrong with a tokenizer, what that does, and how it is mended; exit 1 if anything is.

    SOURCE is a GGUF (of a split one any shard, or hf://org/repo/file.gguf) or a checkpoint. Looked at: the padding
    token, the pre-tokenizer, thinking and chat tokens, the chat template's beginning and end, types, and the rows.

    --fix pad changes four bytes of a GGUF's header in their place, and says how they were; no weight is touched. Where
    the header has no padding token it must grow: then -o writes a copy.

    \b
    quantkit tokenizer check R1-UD-IQ1_S-00001-of-00003.gguf
    quantkit tokenizer check DeepSeek-R1/ --json | jq .findings
    quantkit tokenizer check R1-Q4_K_M.gguf --fix pad
    quantkit tokenizer check R1-Q4_K_M.gguf --fix pad --pad-token 2 -o R1-mended.gguf
    """
    from quantkit.text import check as checks

    from .terminal import width

    if fix is None and (pad_token is not None or output is not None):
        raise click.UsageError("--pad-token and -o go with --fix pad")
    path, subject = _subject(source)
    said = ""
    if fix is not None:
        if path is None:
            raise click.UsageError(
                "--fix changes a GGUF that is here; a checkpoint's files stay as they are, and `quantkit build` with "
                "--pad-token writes another padding token"
            )
        path, said = _mend(path, checks.check(subject), pad_token, output, force, quiet)
        subject = _subject(str(path))[1]
    found = checks.check(subject)
    if as_json:
        click.echo(json.dumps({**found.to_json(), "mended": said or None}, indent=1, ensure_ascii=False))
    else:
        click.echo("\n\n".join([*([said] if said else []), _text(found, width())]))
    if not found.is_fine:
        sys.exit(1)


def _subject(source: str) -> tuple[Path | None, Subject]:
    """The GGUF whose header has the tokenizer, if it is one and here; and what is to be checked."""
    from quantkit.gguf.header import is_gguf, read_header
    from quantkit.gguf.shards import shard_name, split_name
    from quantkit.model.open import open_model
    from quantkit.model.sources.remote import is_remote
    from quantkit.text.check import Subject

    from .ggufs import as_built
    from .options import only_types

    path = as_built(Path(source)) if not is_remote(source) else Path()
    if path.is_file() and is_gguf(path):
        split = split_name(path.name)
        if split is not None and split.n_shards > 1:
            first = path.with_name(shard_name(split.prefix, 0, split.n_shards))
            path = first if first.is_file() else path
        header = read_header(path)
        rows = next((t.shape[-1] for t in header.tensors if t.name == "token_embd.weight"), None)
        return path, Subject(str(path), header.kvs, rows, False)
    catalogue = open_model(source, only_types("k_b+v_b", None, None))
    rows = next((t.shape[-1] for t in catalogue.tensors if t.name == "token_embd.weight"), None)
    is_gguf_elsewhere = all(t.parts and t.parts[0].source == t.name for t in catalogue.tensors)
    return None, Subject(source, catalogue.kvs, rows, not is_gguf_elsewhere)


def _mend(
    path: Path, found: Checked, pad_token: str | None, output: Path | None, force: bool, quiet: bool
) -> tuple[Path, str]:
    """Set the padding token; the file that has it now, and what was done, in words."""
    from quantkit.base.errors import UnsupportedError
    from quantkit.gguf import change
    from quantkit.gguf.header import read_header
    from quantkit.model.families.tokenizer import token_id
    from quantkit.text.check import PAD_KEY
    from quantkit.text.known_tokens import pad_for

    v = found.vocabulary
    pad = pad_for(v.tokens, found.family) if pad_token is None else token_id(str(path), v.tokens, pad_token)
    if pad is None:
        raise UnsupportedError(f"{path}: its vocabulary has no token that is for padding; name one with --pad-token")
    if pad_token is None and not any(f.id.startswith("pad-") for f in found.findings):
        assert v.pad is not None
        return path, f"{path}: the padding token, {v.pad:,} ({v.tokens[v.pad]!r}), is fine; nothing was changed"
    header = read_header(path)
    is_there = change.fits_in_place(header, PAD_KEY)
    now = f"{pad:,} ({v.tokens[pad]!r})"
    if output is not None:
        with ExitStack() as stack:
            bar: Any = stack.enter_context(open_bar(header.file_bytes, "B", quiet))
            way = change.copy_with(path, output, PAD_KEY, pad, force, bar.update)
        said = f"{output}: a copy of {path} ({way}) with the padding token {now}"
        return output, f"{said}; {path} is as it was"
    if not is_there:
        raise UnsupportedError(
            f"{path}: its header has no {PAD_KEY} of 32 bits, and no room for one; write a mended copy with -o"
        )
    before = change.set_in_place(path, PAD_KEY, pad)
    back = shlex.join(["quantkit", "tokenizer", "check", os.fspath(path), "--fix", "pad", "--pad-token", str(before)])
    was = f"{before:,}" + (f" ({v.tokens[before]!r})" if before < len(v.tokens) else "")
    return path, (
        f"{path}: the padding token is {now} now; it was {was}\n"
        f"back: {back}\n"
        "A manifest or attestation of this file is stale now; `quantkit verify --write-manifest` makes a manifest anew."
    )


def _text(found: Checked, width: int | None) -> str:
    from quantkit.base.text import table, wrapped

    v = found.vocabulary
    rows = "" if found.n_rows is None else f", {found.n_rows:,} rows of token_embd"
    of = "not one of R1's families" if found.family is None else f"the vocabulary of {found.family.name}"
    parts = [wrapped(f"{v.where}: {v.model}{v.pre and f', {v.pre}'}, {len(v.tokens):,} tokens{rows}; {of}", width)]
    cells = [
        [r.role, "none" if r.id is None else str(r.id), "" if r.expected is None else str(r.expected), r.type, r.text]
        for r in found.roles
    ]
    parts.append(table(cells, ["token", "id", "usual", "type", "text"], (1, 2), width))
    for f in found.findings:
        lines = [wrapped(f"{f.severity}: {f.what} [{f.id}]", width)]
        lines += [wrapped(f"    so: {f.harm}", width, " " * 8)] if f.harm not in ("", "none") else []
        lines += [wrapped(f"    mend: {f.mend}", width, " " * 8)] if f.mend else []
        parts.append("\n".join(lines))
    parts.append("fine" if found.is_fine else "not fine")
    return "\n\n".join(parts)

"""quantkit ollama."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .bars import open_bar
from .files import MODEL, MODELFILE, Command, will_write
from .run_card import first_shard

if TYPE_CHECKING:
    from quantkit.gguf.split import OutputFile, ShardSet
    from quantkit.running.chat_format import ChatFormat
    from quantkit.text.encoding import Tokenizer


@click.command(cls=Command)
@click.argument("model", metavar="FILE|DIR", type=MODEL)
@click.argument("name", metavar="NAME")
@click.option(
    "-o",
    "--output",
    type=MODELFILE,
    default="Modelfile",
    show_default=True,
    metavar="FILE",
    help="The Modelfile. Shards are merged into one GGUF beside it.",
)
@click.option(
    "--ctx", "context", type=click.IntRange(1, 1 << 24), default=8192, show_default=True, help="Context, in tokens."
)
@click.option("--temp", type=click.FloatRange(0, 10), help="Temperature.  [default: the file's, or 0.6 for R1]")
@click.option("--create", is_flag=True, help="Then run `ollama create NAME`.")
@click.option("--force", is_flag=True, help="Replace output files that exist.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
def ollama(
    model: str, name: str, output: Path, context: int, temp: float | None, create: bool, force: bool, quiet: bool
) -> None:
    """Put a GGUF into Ollama: one file, and a Modelfile.

    Ollama takes one file only, so shards are merged beside the Modelfile (the blocks are shared where the filesystem
    can). The chat template is translated to Ollama's language where it is fixed texts around messages, as those of
    DeepSeek, its distills, ChatML, Qwen2 and Llama 3 are.

    \b
    quantkit ollama R1-UD-IQ1_S-00001-of-00003.gguf r1 --create
    quantkit ollama R1/ r1:iq1_s -o r1/Modelfile
    """
    from quantkit.base.errors import ToolError
    from quantkit.base.outputs import write_text
    from quantkit.gguf.header import STRING, decode
    from quantkit.gguf.split import open_set
    from quantkit.model.open import open_model
    from quantkit.model.sources.remote import is_remote
    from quantkit.running import advice, modelfile
    from quantkit.running.programs import shell_word
    from quantkit.text.encoding import Tokenizer
    from quantkit.text.vocabulary import vocabulary_of

    modelfile.check_model_name(name)
    if is_remote(model):
        raise click.UsageError("Ollama needs the file itself; fetch it with `quantkit download` first")
    path = first_shard(model)
    catalogue = open_model(str(path))
    if not all(t.parts and t.parts[0].source == t.name for t in catalogue.tensors):
        raise click.UsageError(f"{model} is not a GGUF; build one first")
    tokenizer = Tokenizer(vocabulary_of(catalogue))
    found, why = _format(tokenizer)
    shards = open_set(path)
    merged = _plan_merge(shards, output, force) if len(shards.inputs) > 1 else None
    source = path if merged is None else merged.path
    beside = source.absolute().parent == output.absolute().parent
    texts = {item.key: str(decode(item)) for item in catalogue.kvs if item.type == STRING}
    thinks = "</think>" in (tokenizer.vocabulary.chat_template or "")
    text = modelfile.Modelfile(
        f"./{source.name}" if beside else os.path.abspath(source),
        None if found is None else modelfile.go_template(found, tokenizer.add_bos),
        advice.sampling(catalogue, thinks, temp, advice.SEED),
        context,
        modelfile.stops(found, tokenizer),
        modelfile.license_text(texts.get(key, "") for key in ("general.license", "general.license.link")),
    ).text()
    if merged is not None:
        _merge(shards, merged, force, quiet)
    write_text(output, text, replace=force)
    if why:
        click.echo(f"warning: {why}", err=True)
    words = ["ollama", "create", name, "-f", str(output)]
    program = shutil.which("ollama")
    if not quiet:
        click.echo(f"{output}: written, for {source}")
    if create and program is not None:
        code = subprocess.run([program, *words[1:]], check=False).returncode
        if code:
            raise ToolError(f"{program} ended with code {code}; its words are above. {output} is there")
    elif create:
        raise ToolError(
            f"ollama is not on PATH; {output} is there. Install Ollama, then: {' '.join(map(shell_word, words))}"
        )
    elif not quiet:
        click.echo(f"next: {' '.join(map(shell_word, words))} && ollama run {name}")


def _format(tokenizer: Tokenizer) -> tuple[ChatFormat | None, str]:
    """The chat format, and what is to be said where there is none."""
    from quantkit.base.errors import TextError
    from quantkit.running.chat_format import find

    tail = (
        "so the Modelfile has no TEMPLATE: Ollama looks for one like it among its own, and without one gives the "
        "model bare prompts; add a TEMPLATE by hand"
    )
    try:
        found = find(tokenizer)
    except TextError as e:
        return None, f"{e}; {tail}"
    return found, "" if found is not None else f"the chat template is more than fixed texts around messages, {tail}"


def _plan_merge(shards: ShardSet, output: Path, force: bool) -> OutputFile:
    """One file of the shards, beside the Modelfile. Raises OutputError."""
    from quantkit.base.outputs import Output
    from quantkit.gguf.shards import split_name
    from quantkit.gguf.split import plan_merge
    from quantkit.gguf.split_writer import check_output

    parts = split_name(shards.inputs[0].path.name)
    prefix = parts.prefix if parts is not None else "model"
    merged = plan_merge(shards, output.with_name(f"{prefix}.gguf"), False)
    will_write(Output(merged.path, "the merged file", force, suffix=".part"))
    check_output(shards, (merged,), force)
    return merged


def _merge(shards: ShardSet, merged: OutputFile, force: bool, quiet: bool) -> None:
    from quantkit.gguf.split_writer import write

    with open_bar(sum(piece.nbytes for piece in merged.ranges), "B", quiet) as bar:

        def progress(nbytes: int) -> None:
            bar.update(nbytes)

        how = write(shards, (merged,), progress, force)
    if not quiet:
        click.echo(f"{merged.path}: {merged.nbytes:,} bytes, merged by {' and '.join(how) or 'header only'}")

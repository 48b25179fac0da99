"""quantkit run-card."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .files import MODEL, Command
from .fit import GpuList
from .ggufs import as_built
from .memory_options import CACHE_TYPES, context_option, reserve_option
from .options import Size, json_option

if TYPE_CHECKING:
    from quantkit.planning.gpus import Gpus
    from quantkit.running.card import Card


@click.command("run-card", cls=Command)
@click.argument("model", metavar="FILE|DIR", type=MODEL)
@click.option(
    "--vram",
    type=GpuList(),
    metavar="LIST",
    help="GiB of each GPU, or its name, such as 24,2x80,24+80,4x3090; lines for each.  [default: no GPU]",
)
@click.option(
    "--unified",
    type=Size(bare=2**30),
    metavar="GIB",
    help="Memory that processor and GPU share, as of Apple's: 128, 128GB or 128GiB; in place of --vram.",
)
@click.option("--ram", type=Size(bare=2**30, least=0), metavar="GIB", help="RAM for the rest: 64, 64GB or 64GiB.")
@context_option
@click.option(
    "--cache-type", type=CACHE_TYPES, help="Type of the K cache, and of V under MLA.  [default: q4_0 for R1, else f16]"
)
@click.option("--cache-type-v", type=CACHE_TYPES, help="Type of the V cache, where there is one.  [default: f16]")
@click.option("--temp", type=click.FloatRange(0, 10), help="Temperature.  [default: the file's, or 0.6 for R1]")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 2), default=3407, show_default=True, help="Seed, as published for R1."
)
@reserve_option
@click.option("--exec", "execute", is_flag=True, help="Start the first of the programs that is on PATH.")
@json_option
def run_card(
    model: str,
    vram: tuple[Gpus, ...] | None,
    unified: int | None,
    ram: int | None,
    context: int,
    cache_type: str | None,
    cache_type_v: str | None,
    temp: float | None,
    seed: int,
    reserve: int,
    execute: bool,
    as_json: bool,
) -> None:
    """Show how to run a GGUF: command lines, memory and the prompt format.

    FILE is a GGUF or a shard of one, DIR a folder that holds one. Only headers are read. The lines are those of
    llama-cli, llama-server, ik_llama.cpp and KoboldCpp, with the advice that was published for R1.

    \b
    quantkit run-card R1-UD-IQ1_S-00001-of-00003.gguf --vram 24,2x80,24+80 --ram 128
    quantkit run-card R1/ --unified 192GB --ctx 4096
    quantkit run-card model.gguf --vram 24 --exec
    """
    import json

    from quantkit.model.open import open_model
    from quantkit.model.sources.remote import is_remote
    from quantkit.running import card, placement

    if vram and unified is not None:
        raise click.UsageError("give --vram or --unified, not both")
    if execute and (as_json or (vram is not None and len(vram) > 1)):
        raise click.UsageError("--exec starts one program: give one choice of --vram, and no --json")
    remote = is_remote(model)
    if execute and remote:
        raise click.UsageError("--exec needs a file that is here; fetch it with `quantkit download` first")
    path = model if remote else str(first_shard(model))
    catalogue = open_model(path)
    if not all(t.parts and t.parts[0].source == t.name for t in catalogue.tensors):
        raise click.UsageError(f"{model} is not a GGUF; build one first")
    wishes = card.Wishes(context, cache_type, cache_type_v, temp, seed, ram)
    if unified is not None:
        places = [lambda w: placement.in_unified_memory(w, unified, reserve)]
    elif vram:
        places = [lambda w, g=gpus: placement.on_gpus(w, g, reserve) for gpus in vram]  # type: ignore[misc]
    else:
        places = [placement.without_gpus]
    called = path.rsplit("/", 1)[-1] if remote else path
    called = f"./{called}" if called.startswith("-") else called  # no option of those programs
    made = card.make_card(catalogue, called, wishes, places)
    if execute:
        _start(made)
    elif as_json:
        click.echo(json.dumps(card.card_json(made), indent=1, ensure_ascii=False))
    else:
        click.echo(card.card_text(made, ram))


def first_shard(name: str) -> Path:
    """The GGUF that a FILE or DIR is: its first shard, by whatever name it was given."""
    from quantkit.gguf.shards import shard_name, split_name
    from quantkit.running.files import gguf_in

    path = Path(name)
    if os.path.isdir(path):  # False for a name that no file can have
        path = gguf_in(path)
    path = as_built(path)
    parts = split_name(path.name)
    first = path if parts is None else path.with_name(shard_name(parts.prefix, 0, parts.n_shards))
    return first if os.path.lexists(first) else path


def _start(made: Card) -> None:
    """Become the first program that is here. Raises ToolError where none is."""
    from quantkit.base.errors import ToolError

    lines = made.setups[0].lines
    for line in lines:
        program = shutil.which(line.argv[0])
        if program is not None:
            click.echo(line.shell)
            sys.stdout.flush()
            try:
                os.execv(program, line.argv)
            except OSError as e:
                raise ToolError(f"{program}: cannot be run: {e.strerror or e}") from None
    names = ", ".join(dict.fromkeys(line.argv[0] for line in lines))
    raise ToolError(f"none of {names} is on PATH; install llama.cpp, or add its folder to PATH")

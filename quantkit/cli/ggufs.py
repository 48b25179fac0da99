"""GGUFs as people name them: by any shard, or by the name that a split one was built under."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click


def as_built(path: Path) -> Path:
    """The file itself, or where there is none, the first shard of the set that was built under that name: R1.gguf finds
    R1-00001-of-00003.gguf. Raises UsageError where several sets could be meant."""
    from quantkit.gguf.shards import split_name

    if os.path.lexists(path):  # False, too, where that cannot be known: whoever opens the file says why
        return path
    prefix = path.name.removesuffix(".gguf")
    try:
        beside = sorted(path.absolute().parent.iterdir())
    except OSError:
        return path
    found = [p for p in beside if (parts := split_name(p.name)) and parts.prefix == prefix]
    sets = {parts.n_shards for p in found if (parts := split_name(p.name))}
    if len(sets) > 1:
        firsts = [re.sub(r"-\d{5,}-of-", "-00001-of-", p.name) for p in found]
        names = ", ".join(str(path.with_name(name)) for name in dict.fromkeys(firsts))
        raise click.UsageError(f"{path}: several sets of shards have that name: {names}; give the first shard of one")
    return path.with_name(found[0].name) if found else path


def gguf_of(name: str) -> str | None:
    """The GGUF of that name as `open_model` takes it, here or at hf://… or https://…; None where it is none: a recipe,
    say. Raises SourceError for a name that ends in .gguf and is not there."""
    from quantkit.base.errors import SourceError
    from quantkit.gguf.header import is_gguf
    from quantkit.model.sources.remote import is_remote

    if is_remote(name):
        from quantkit.model.hub import gguf_address

        return gguf_address(name)
    path = as_built(Path(name))
    try:
        if path.is_file() and (path.suffix.lower() == ".gguf" or is_gguf(path)):
            return str(path)
    except OSError:
        return None
    if path.suffix.lower() == ".gguf" and not os.path.lexists(path):
        raise SourceError(f"{name}: there is no such file")
    return None


def title(name: str) -> str:
    """What a GGUF goes by in a table: its file's name, without a shard's number."""
    from quantkit.gguf.shards import split_name

    last = re.sub(r"[@?].*$", "", name.rsplit("/", 1)[-1]) or name
    parts = split_name(last)
    return last if parts is None else f"{parts.prefix}.gguf"

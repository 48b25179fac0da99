"""quantkit cache."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .files import CACHE, FOLDER, Group
from .options import Size

if TYPE_CHECKING:
    from quantkit.building.cache import Cache


@click.group(cls=Group)
def cache() -> None:
    """Show what a build cache holds, and make it smaller.

    \b
    quantkit cache show ~/quantkit-cache
    quantkit cache prune ~/quantkit-cache --max-size 50G
    """


@cache.command()
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(folder: Path, as_json: bool) -> None:
    """Show how many tensors FOLDER holds, their bytes, and when they were last used.

    \b
    quantkit cache show ~/quantkit-cache
    """
    from quantkit.base.text import size

    entries = _open(folder, 0).entries()
    total = sum(n for _, n, _ in entries)
    if as_json:
        said = {"folder": str(folder), "tensors": len(entries), "bytes": total}
        used = {"first_used": entries[0][0], "last_used": entries[-1][0]} if entries else {}
        click.echo(json.dumps({**said, **used}))
        return
    click.echo(f"{folder}: {len(entries):,} tensors, {size(total)}")
    if entries:
        ends = (entries[0][0], entries[-1][0])
        first, last = (datetime.fromtimestamp(t, timezone.utc).isoformat(" ", "minutes") for t in ends)
        click.echo(f"used between {first} and {last}")


@cache.command()
@click.argument("folder", type=CACHE)
@click.option("--max-size", type=Size(), required=True, help="The most FOLDER may hold.")
def prune(folder: Path, max_size: int) -> None:
    """Remove the least recently used tensors until FOLDER holds at most --max-size.

    \b
    quantkit cache prune ~/quantkit-cache --max-size 50G
    """
    from quantkit.base.errors import OutputError

    opened = _open(folder, max_size)
    before = opened.entries()
    try:
        opened.evict()
    except OSError as e:
        raise OutputError(f"{folder}: {e.strerror or e}") from None
    after = opened.entries()
    freed = sum(n for _, n, _ in before) - sum(n for _, n, _ in after)
    click.echo(f"{folder}: {len(before) - len(after):,} tensors removed, {freed:,} bytes; {len(after):,} are left")


def _open(folder: Path, max_size: int) -> Cache:
    from quantkit.building.cache import Cache

    return Cache(folder, max_size, make=False)

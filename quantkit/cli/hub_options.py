"""Options of commands that compute a model whose shards may come from the Hub, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .files import PLACE
from .options import F, Size, together

if TYPE_CHECKING:
    from quantkit.lab.fetched import Fetching
    from quantkit.model.catalogue import Catalogue
    from quantkit.model.families.options import Options
    from quantkit.model.sources.on_demand import OnDemand

    _KeepParam = click.ParamType[tuple[int, int | None]]
else:
    _KeepParam = click.ParamType  # generic in newer releases only

#: more shards than a model has
_ALL = 1 << 30


class Keep(_KeepParam):
    """3, a number of shards, or 60GB, their bytes; a value is both, as quantkit.model.sources.shard_store.Limits."""

    name = "n|size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:  # fmt: skip
        text = str(value).strip()
        if not text.isascii() or not text.isdigit():
            return _ALL, Size().convert(value, param, ctx)
        if not 0 < int(text) <= _ALL:
            self.fail(f"{value!r} is neither a number of shards, 1 or more, nor a size such as 60GB", param, ctx)
        return int(text), None


def hub_options(where: str) -> Callable[[F], F]:
    """--keep and --shards, as `keep` and `shards`. `where` shards lie by default."""
    return together(
        click.option(
            "--keep",
            type=Keep(),
            default="3",
            show_default=True,
            metavar="N|SIZE",
            help="With hf://…: the most shards of the source on the disk at a time, those on their way included; or "
            "their bytes: 60GB.",
        ),
        click.option(
            "--shards",
            type=PLACE,
            metavar="DIR",
            help=f"With hf://…: the folder in which they lie meanwhile.  [default: {where}]",
        ),
    )


def open_weights(source: str, options: Options | None) -> Catalogue:
    """The model that SOURCE names, with the weights of a repository too. Raises what `open_model` raises."""
    from quantkit.model.hub import with_layers
    from quantkit.model.open import open_model

    return with_layers(open_model(source, options))


def fetching(
    keep: tuple[int, int | None], shards: Path | None, output: Path | None, quiet: bool
) -> Fetching:  # fmt: skip
    """How shards come, beside an output that a run goes on with, or into the folder of temporary files."""
    import tempfile

    from quantkit.lab.fetched import Fetching
    from quantkit.model.sources.shard_store import Limits

    place = shards or (Path(tempfile.gettempdir()) if output is None else output.parent)
    how = Fetching(place, Limits(*keep), output is not None)
    return how if not quiet else Fetching(place, how.limits, how.stays, lambda shard, done, total: None)


def fetched(model: Catalogue, how: Fetching, quiet: bool) -> AbstractContextManager[OnDemand | None]:
    """Within it the weights of a model on the Hub can be read."""
    from quantkit.lab.fetched import fetched as lab_fetched

    return lab_fetched(model, how, lambda said: None if quiet else click.echo(said, err=True))

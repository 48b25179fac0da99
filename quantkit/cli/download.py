"""quantkit download."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import by_name, open_bar
from .files import MADE_FOLDER, Command, will_write
from .options import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantkit.hub.repo import Repo
    from quantkit.model.download import Found


@click.command(cls=Command)
@click.argument("repo")
@click.option(
    "-r",
    "--recipe",
    "quant",
    metavar="NAME",
    help="Fetch the GGUF of this name, such as UD-IQ1_S, whatever its folder.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help='Fetch files whose paths match: "*UD-IQ1_S*". Repeatable.'
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="But not these. Repeatable.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit.  [default: the repository's main branch]")
@click.option(
    "--to", "folder", type=MADE_FOLDER, metavar="DIR", help="The folder.  [default: the repository's name, here]"
)
@click.option("--force", is_flag=True, help="Replace files that exist and are not the repository's.")
@click.option("-n", "--dry-run", is_flag=True, help="Show the files and their sizes; fetch nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No list, no progress; errors only.")
@json_option
def download(
    repo: str,
    quant: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    revision: str | None,
    folder: Path | None,
    **how: bool,
) -> None:
    """Fetch a model from the Hub: a GGUF by its quantization, or a checkpoint to build from.

    REPO is org/repo, hf://org/repo[@revision], or the address of its page. Every file is checked by the repository's
    hash. After an interruption, run the same command again to continue.

    \b
    quantkit download unsloth/DeepSeek-R1-GGUF --recipe UD-IQ1_S
    quantkit download unsloth/DeepSeek-R1-GGUF --include "*UD-IQ1_S*" --to models/ --dry-run
    quantkit download deepseek-ai/DeepSeek-R1 --to DeepSeek-R1/
    """
    from quantkit.base.outputs import Output
    from quantkit.hub.address import is_hub, parse
    from quantkit.hub.repo import open_repo
    from quantkit.model import begun
    from quantkit.model import download as lab

    if quant is not None and include:
        raise click.UsageError("--recipe and --include both choose files; give one")
    address = parse(repo if is_hub(repo) or "://" in repo else f"hf://{repo}")
    if revision is not None:
        if address.revision is not None and address.revision != revision:
            raise click.UsageError(f"{repo} and --revision {revision} name different revisions; give one")
        address = address._replace(revision=revision)
    place = folder or Path(address.repo.rpartition("/")[2])
    if folder is None:
        will_write(Output(place, "--to", is_folder=True, replace=True))
    found_repo = open_repo(address)
    try:
        paths = lab.chosen(found_repo, address.path, quant, include, exclude)
    except lab.ChoiceError as e:
        raise click.UsageError(str(e)) from None
    silent = how["quiet"] or how["as_json"]
    if note := begun.check(found_repo, paths, place, how["force"]):
        click.echo(f"note: {note}", err=True)
    there = sum(found_repo.files[p].size for p in paths if (place / p).is_file())
    with open_bar(there, "B", silent or not there, "checking what is there") as bar:
        found = lab.look(found_repo, paths, place, how["force"], by_name(bar))
    if not how["quiet"] and not how["as_json"]:
        _show(found_repo, found, place)
    if how["dry_run"] and how["as_json"]:
        click.echo(json.dumps(_json(found_repo, found, place, True), indent=1, ensure_ascii=False))
    lab.check_room(found, place)
    if not how["dry_run"]:
        _fetch(found_repo, found, place, silent)
    if how["as_json"] and not how["dry_run"]:
        click.echo(json.dumps(_json(found_repo, found, place, False), indent=1, ensure_ascii=False))
    elif not how["quiet"] and not how["dry_run"]:
        _show_next(found, place)


def _show(repo: Repo, found: Sequence[Found], place: Path) -> None:
    from quantkit.base.text import columns, size

    rows = [(f.path, size(f.nbytes), _state(f)) for f in found]
    click.echo(f"{repo.where()} at commit {repo.commit[:12]}, to {place}:")
    click.echo(columns(rows))
    missing = [f.nbytes - f.part for f in found if not f.there and not f.cached]
    copied = [f.nbytes for f in found if f.cached]
    more = f"; {len(copied):,} come from the local cache, {size(sum(copied))}" if copied else ""
    click.echo(f"{len(missing):,} of {len(found):,} files are to be fetched, {size(sum(missing))}{more}")


def _state(one: Found) -> str:
    if one.there:
        return "is there"
    return "is in the local cache" if one.cached else f"{one.part:,} bytes are there" if one.part else ""


def _fetch(repo: Repo, found: Sequence[Found], place: Path, quiet: bool) -> None:
    from quantkit.model import download as lab

    total = sum(f.nbytes for f in found if not f.there)
    with open_bar(total, "B", quiet, initial=sum(f.part for f in found)) as bar:
        try:
            lab.fetch(repo, found, place, by_name(bar))
        except BaseException as e:
            e.kept = f"{place} keeps what came; run the same command again to continue"  # type: ignore[attr-defined]
            raise


def _show_next(found: Sequence[Found], place: Path) -> None:
    from quantkit.model.download import models_of

    models = models_of(found)
    whole = [model for model in models if not model.missing]
    if whole:
        click.echo("whole, with the repository's hashes; to check and to run:")
        for model in whole:
            name = shlex.quote(str(place / model.files[0]))
            click.echo(f"  quantkit verify {name}\n  quantkit run-card {name}")
    elif not models and any(f.path.endswith(".safetensors") for f in found):
        click.echo(f"{place}: whole, with the repository's hashes; plan a file of it:")
        click.echo(f"  quantkit plan {shlex.quote(str(place))} --recipe UD-IQ1_S")
    else:
        click.echo(f"{place}: {len(found):,} files, with the repository's hashes")


def _json(repo: Repo, found: Sequence[Found], place: Path, dry_run: bool) -> dict[str, Any]:
    return {
        "quantkit_download": 1,
        "repository": repo.name,
        "commit": repo.commit,
        "folder": str(place),
        "files": [
            {
                "path": f.path,
                "bytes": f.nbytes,
                "sha256": repo.files[f.path].sha256,
                "was_there": f.there,
                "from_cache": f.cached is not None,
                "bytes_there": f.nbytes if f.there else f.part,
            }
            for f in found
        ],
        "fetched": not dry_run,
    }

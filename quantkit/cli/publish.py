"""quantkit publish."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar
from .files import GGUF, PATH, Command
from .ggufs import as_built
from .options import json_option

if TYPE_CHECKING:
    from quantkit.hub.address import Address
    from quantkit.hub.sending import Item, Sent


@click.command(cls=Command)
@click.argument("files", metavar="FILE|DIR...", nargs=-1, required=True, type=GGUF)
@click.argument("repo", metavar="REPO")
@click.option("--dry-run", is_flag=True, help="Show the card, the files and where they would go; needs no network.")
@click.option("--public", is_flag=True, help="Everybody may see it.  [default: private]")
@click.option("--force", is_flag=True, help="Replace files of other content there, and its README.md.")
@click.option("--license", "license_", metavar="NAME", help="Licence, by its name on the Hub.  [default: the file's]")
@click.option("--base-model", metavar="ORG/NAME", help="The model that was quantized.  [default: the file's]")
@click.option("--eval", "evaluation", type=PATH, metavar="FILE", help="What `quantkit eval … --json` printed.")
@click.option("--revision", metavar="BRANCH", help="The branch, made if need be.  [default: main]")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
def publish(
    files: tuple[Path, ...],
    repo: str,
    dry_run: bool,
    public: bool,
    force: bool,
    license_: str | None,
    base_model: str | None,
    evaluation: Path | None,
    revision: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Put GGUFs into a repository of the Hugging Face Hub, with a model card.

    Shards are found from the first, and manifests and attestations that lie beside go along. What is there already is
    not sent again; a file with other content is only replaced with --force. HF_TOKEN, or `hf auth login`, says who you
    are.

    \b
    quantkit publish R1-UD-IQ1_S-00001-of-00003.gguf me/R1-GGUF --dry-run
    quantkit publish R1/ me/R1-GGUF --license mit --base-model deepseek-ai/DeepSeek-R1 --eval eval.json
    """
    from quantkit.authoring.publishing import evaluation as evaluations
    from quantkit.authoring.publishing.card import card_text
    from quantkit.authoring.publishing.front_matter import front_of
    from quantkit.authoring.publishing.parcel import CARD, gather
    from quantkit.hub.sending import Item, Wish, send

    to = _address(repo, revision)
    measured = None if evaluation is None else evaluations.read(evaluation)
    parcel = gather([as_built(path) for path in files])
    if measured is not None and evaluation is not None:
        evaluations.check_names(measured, parcel.titles, evaluation)
    front = front_of(parcel.models, license_, base_model)
    card = card_text(parcel, front, measured, to)
    items = [Item(CARD, card.encode()), *(Item(name, path) for name, path in parcel.files.items())]
    for note in front.notes:
        click.echo(f"note: {note}", err=True)
    if dry_run:
        if as_json:
            _print_json(to, public, items, card, None)
        elif not quiet:
            click.echo(_plan_text(to, public, items) + "\n\n" + card, nl=False)
        return
    show = not quiet and sys.stderr.isatty()
    told = _Told(sum(item.nbytes for item in items), quiet, as_json)
    try:
        sent = send(items, Wish(to, public, force, show, parcel.digests), told)
    except BaseException as e:
        if told.has_begun:
            e.kept = "what has arrived stays in the Hub's storage; the same command goes on"  # type: ignore[attr-defined]
        raise
    finally:
        told.close()
    if as_json:
        _print_json(to, public, items, card, sent)
    elif not quiet:
        click.echo(_done_text(to, sent))


class _Told:
    """Progress: a bar while hashing, then a line for each file, under which huggingface_hub's own bar is."""

    def __init__(self, nbytes: int, quiet: bool, as_json: bool) -> None:
        self._nbytes, self._quiet, self._as_json = nbytes, quiet, as_json
        self._bar: Any = None
        self.has_begun = False

    def hashed(self, item: Item, n: int) -> None:
        if self._bar is None:
            self._bar = open_bar(self._nbytes, "B", self._quiet, "hashing")
        self._bar.update(n)

    def sending(self, item: Item) -> None:
        from quantkit.base.text import short_size

        self.close()
        self.has_begun = True
        if not self._quiet and not self._as_json:
            click.echo(f"sending {item.name} ({short_size(item.nbytes)})", err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, sentence: str) -> None:
        click.echo(f"note: {sentence}", err=True)


def _address(repo: str, revision: str | None) -> Address:
    """The repository, and the branch unless it is main."""
    from quantkit.hub.address import is_hub, parse

    if "/" not in repo:
        raise click.UsageError(f"{repo!r} is no name of a repository; give ORG/NAME")
    to = parse(repo if is_hub(repo) or "://" in repo else f"hf://{repo}")
    if to.path:
        raise click.UsageError(f"{repo}: files go to the top of a repository; give ORG/NAME")
    if revision is not None and to.revision is not None:
        raise click.UsageError("the branch is given twice: in REPO and by --revision")
    branch = revision or to.revision
    return to._replace(revision=None if branch == "main" else branch)


def _plan_text(to: Address, public: bool, items: list[Item]) -> str:
    from quantkit.base.text import size, table

    who = "public" if public else "private, if it is made now"
    rows = [[item.name, f"{item.nbytes:,}"] for item in items]
    total = size(sum(item.nbytes for item in items))
    head = f"to {to.repo}, branch {to.revision or 'main'} ({who}): {len(items)} files, {total}"
    return f"{head}\n\n{table(rows, ['file', 'bytes'], (1,))}"


def _done_text(to: Address, sent: Sent) -> str:
    lines = [f"{sent.url}  commit {sent.commit[:12]}"]
    lines.append(f"sent {len(sent.sent)} files, {len(sent.skipped)} were there already")
    lines += [f"its own {name} is kept; --force replaces it" for name in sent.kept]
    return "\n".join(lines)


def _print_json(to: Address, public: bool, items: list[Item], card: str, sent: Sent | None) -> None:
    said: dict[str, Any] = {
        "quantkit_publish": 1,
        "repo": to.repo,
        "revision": to.revision or "main",
        "public": public,
        "dry_run": sent is None,
        "files": [{"name": item.name, "bytes": item.nbytes} for item in items],
        "card": card,
    }
    if sent is not None:
        said |= sent._asdict()
    click.echo(json.dumps(said, indent=1, ensure_ascii=False))

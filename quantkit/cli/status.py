"""quantkit status."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .files import PATH, Command
from .ggufs import as_built

if TYPE_CHECKING:
    from quantkit.building.journal import ToldBuild


_SHARDS = {"fetched": "fetched", "kept": "kept", "left": "left"}


@click.command(cls=Command)
@click.argument("out", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(out: Path, as_json: bool) -> None:
    """Show how far the build of OUT is. OUT is what you gave to `quantkit build -o`.

    Only what is safely on disk is counted. Run the same `quantkit build` again to continue.

    \b
    quantkit status R1-UD-IQ1_S.gguf
    """
    from quantkit.base.outputs import Output, check_name
    from quantkit.building.folder import folder_of, owner, read_journal

    check_name(Output(out))
    found = read_journal(out)
    if found is None:
        said, text = _finished(out)
    else:
        said = _facts(found, out, owner(out))
        text = _text(found, said, folder_of(out))
    click.echo(json.dumps({"output": str(out), **said}, indent=1) if as_json else text)


def _finished(out: Path) -> tuple[dict[str, Any], str]:
    """What is known of a build that is done: of one file, or of shards, which were built under a name that none of them
    has. Raises OutputError."""
    from quantkit.base.errors import OutputError
    from quantkit.gguf.shards import shard_name, split_name

    first = as_built(out)
    if not first.is_file():
        raise OutputError(f"{out}: there is neither such a file nor an unfinished build of it")
    parts = split_name(first.name)
    if parts is None or first == out:
        nbytes = out.stat().st_size
        text = f"{out}: complete, {nbytes:,} bytes; `quantkit verify {shlex.quote(str(out))}` checks it"
        return {"state": "complete", "bytes": nbytes}, text
    names = [shard_name(parts.prefix, i, parts.n_shards) for i in range(parts.n_shards)]
    there = [p for name in names if (p := out.with_name(name)).is_file()]
    nbytes = sum(p.stat().st_size for p in there)
    files = [{"name": p.name, "bytes": p.stat().st_size} for p in there]
    if len(there) < len(names):
        missing = next(name for name in names if not out.with_name(name).is_file())
        text = (
            f"{out}: {len(there)} of {len(names)} shards are there, {missing} is not, and no build of it is unfinished"
        )
        return {"state": "incomplete", "bytes": nbytes, "files": files, "shards": len(names)}, text
    text = (
        f"{out}: complete, {len(there)} shards, {nbytes:,} bytes; `quantkit verify {shlex.quote(str(out))}` checks them"
    )
    return {"state": "complete", "bytes": nbytes, "files": files, "shards": len(names)}, text


def _facts(found: ToldBuild, out: Path, pid: int | None) -> dict[str, Any]:
    """What is known of an unfinished build."""
    from quantkit.building.folder import folder_of
    from quantkit.building.journal import durable
    from quantkit.building.shards_told import read_told

    head = found.head
    rows = list(zip(durable(found), head.tensors, strict=True))
    files = []
    for i, (name, nbytes) in enumerate(head.files):
        mine = [(n, t) for n, t in rows if t[3] == i]
        kept = sum(n * t[2] for n, t in mine)
        whole = all(n == t[1] for n, t in mine) and out.with_name(name).is_file()
        files.append({"name": name, "bytes": nbytes, "durable_bytes": kept, "complete": whole})
    shards = read_told(folder_of(out))
    return {
        "state": "unfinished",
        "process": pid,
        "started": head.started,
        "durable_bytes": sum(n * t[2] for n, t in rows),
        "tensor_bytes": sum(t[1] * t[2] for _, t in rows),
        "tensors_complete": sum(n == t[1] for n, t in rows),
        "tensors": len(rows),
        "files": files,
        **({} if shards is None else {"shards": shards._asdict()}),
        "identity": head.identity,
    }


def _text(found: ToldBuild, said: dict[str, Any], folder: Path) -> str:
    from quantkit.base.errors import showable
    from quantkit.base.text import short_size

    done, total = said["durable_bytes"], said["tensor_bytes"]
    pid = said["process"]
    at_work = (
        "no process is working on it: run the same `quantkit build` again"
        if pid is None
        else f"process {pid} is working on it"
    )
    lines = [
        f"unfinished, in {folder}; begun {said['started']}; {at_work}",
        f"safely on the disk: {done:,} of {total:,} bytes ({100 * done / max(1, total):.1f} %), "
        f"{said['tensors_complete']:,} of {said['tensors']:,} tensors complete",
    ]
    if len(said["files"]) > 1:
        complete = sum(f["complete"] for f in said["files"])
        lines.append(f"shards that are complete: {complete} of {len(said['files'])}")
    if shards := said.get("shards"):
        three = [f"{shards[what]:,} {words} ({short_size(shards[f'{what}_bytes'])})" for what, words in _SHARDS.items()]
        lines.append(f"shards of the source: {', '.join(three)}")
    identity = found.head.identity
    lines += [f"  {name:9} {what}" for name, what in identity.items() if not name.startswith(("source ", "metadata "))]
    sources = [name for name in identity if name.startswith("source ")]
    if sources:
        n = len(sources)
        lines.append(f"  sources   {n} file{'s' * (n != 1)}, {sources[0].removeprefix('source ')} first")
    return "\n".join(map(showable, lines))  # what a journal says may be another user's

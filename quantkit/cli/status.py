"""quantkit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .files import PATH, Command

if TYPE_CHECKING:
    from quantkit.building.journal import Journal


@click.command(cls=Command)
@click.argument("out", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="The same for a script.")
def status(out: Path, as_json: bool) -> None:
    """Show how far a build of OUT is: OUT as it was given to `quantkit build -o`.

    What is told here is on the disk for good; `quantkit build` with the same arguments goes on from there.

    \b
    quantkit status R1-UD-IQ1_S.gguf
    """
    from quantkit.base.errors import OutputError
    from quantkit.base.outputs import Output, check_name
    from quantkit.building.folder import folder_of, owner, read_journal

    check_name(Output(out))
    found = read_journal(out)
    if found is None:
        if not out.is_file():
            raise OutputError(f"{out}: there is neither such a file nor an unfinished build of it")
        said: dict[str, Any] = {"state": "complete", "bytes": out.stat().st_size}
        text = f"{out}: complete, {out.stat().st_size:,} bytes; `quantkit verify {out}` checks it"
    else:
        said = _facts(found, out, owner(out))
        text = _text(found, said, folder_of(out))
    click.echo(json.dumps({"output": str(out), **said}, indent=1) if as_json else text)


def _facts(found: Journal, out: Path, pid: int | None) -> dict[str, Any]:
    """What is known of an unfinished build."""
    from quantkit.building.journal import durable

    head = found.head
    rows = list(zip(durable(found), head.tensors, strict=True))
    files = []
    for i, (name, nbytes) in enumerate(head.files):
        mine = [(n, t) for n, t in rows if t[3] == i]
        kept = sum(n * t[2] for n, t in mine)
        whole = all(n == t[1] for n, t in mine) and out.with_name(name).is_file()
        files.append({"name": name, "bytes": nbytes, "durable_bytes": kept, "complete": whole})
    return {
        "state": "unfinished",
        "process": pid,
        "started": head.started,
        "durable_bytes": sum(n * t[2] for n, t in rows),
        "tensor_bytes": sum(t[1] * t[2] for _, t in rows),
        "tensors_complete": sum(n == t[1] for n, t in rows),
        "tensors": len(rows),
        "files": files,
        "identity": head.identity,
    }


def _text(found: Journal, said: dict[str, Any], folder: Path) -> str:
    from quantkit.base.errors import showable

    done, total = said["durable_bytes"], said["tensor_bytes"]
    pid = said["process"]
    at_work = "nobody is at it: the same `quantkit build` goes on" if pid is None else f"process {pid} is at it"
    lines = [
        f"unfinished, in {folder}; begun {said['started']}; {at_work}",
        f"on the disk for good: {done:,} of {total:,} bytes ({100 * done / max(1, total):.1f} %), "
        f"{said['tensors_complete']:,} of {said['tensors']:,} tensors whole",
    ]
    if len(said["files"]) > 1:
        complete = sum(f["complete"] for f in said["files"])
        lines.append(f"shards that are complete: {complete} of {len(said['files'])}")
    identity = found.head.identity
    lines += [f"  {name:9} {what}" for name, what in identity.items() if not name.startswith(("source ", "metadata "))]
    sources = [name for name in identity if name.startswith("source ")]
    if sources:
        n = len(sources)
        lines.append(f"  sources   {n} file{'s' * (n != 1)}, {sources[0].removeprefix('source ')} first")
    return "\n".join(map(showable, lines))  # what a journal says may be another user's

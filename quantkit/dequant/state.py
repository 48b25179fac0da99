"""The state of an unfinished output directory: a journal in it describes the run, and stays until the run is complete.

The journal's parts are the shards by number; its units are bytes. A shard under its own name is finished: it gets that
name once its bytes are on disk and the journal has recorded them all. A resumed run reads it back, and writes it again
if it is damaged. config.json and the index come last, so that an unfinished directory does not look like a
checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..base import journal
from ..base.errors import OutputError, ResumeError, SourceError
from ..base.folders import Folder
from ..base.journal import Ranges, Record, Told
from ..base.version import __version__
from ..model.sources.safetensors_dir import Checkpoint
from ..model.sources.safetensors_header import INDEX
from .place import PART, place_of
from .plan import CONFIG, DequantPlan

STATE, OF = ".quantkit-dequant.journal", "dequant"
#: state file of older versions, which had no journal
_OLD = ".quantkit-dequant.json"
#: deepest nesting of folders in which unfinished files are looked for
_MAX_DEPTH = 64
#: what to do if the run cannot be continued
_OTHERWISE = "start again with --restart, or choose another directory"

#: keys of the journal's head that must not differ -> their names in messages
_SETTINGS = {"quantkit": "quantkit's version", "dtype": "--dtype", "shard_size": "--shard-size", "mtp": "--mtp"}


def state_of(source: Checkpoint, plan: DequantPlan) -> dict[str, Any]:
    """Return what identifies a run: its settings; size, modification time and the header's SHA-256 of each source file
    (for config.json of the whole file); and the files that it makes. Raises SourceError."""
    return {
        "quantkit": __version__,
        "dtype": plan.options.dtype,
        "shard_size": plan.options.shard_size,
        "mtp": "keep" if plan.options.keep_mtp else "drop",
        "source": {p.relative_to(source.path).as_posix(): _print_of(p) for p in (*source.files, source.path / CONFIG)},
        "makes": [*(s.name for s in plan.shards), *(name for name, _ in plan.carried), INDEX, CONFIG],
    }


def _print_of(path: Path) -> list[int | str]:
    try:
        with open(path, "rb") as f:
            n = int.from_bytes(f.read(8), "little") if path.name != CONFIG else -1
            f.seek(0)
            digest = hashlib.sha256(f.read(8 + n if n >= 0 else -1)).hexdigest()
        info = path.stat()
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    return [info.st_size, info.st_mtime_ns, digest]


def read_state(folder: Folder | None) -> Told[dict[str, Any]] | None:
    """Read the journal in a directory; None if there is none. Raises ResumeError if it is damaged, OutputError if it
    belongs to another user, OSError."""
    if folder is None:
        return None
    otherwise = f"remove {folder.path} to start again"
    told = journal.read(folder, STATE, OF, _head, otherwise, folder.own, alone=True)
    if told is None and folder.look(STATE) is not None:
        raise ResumeError(f"{folder.path / STATE}: is damaged and cannot be continued; {otherwise}")
    if told is None and folder.look(_OLD) is not None:
        raise ResumeError(f"{folder.path / _OLD}: is of an older quantkit and cannot be continued; {otherwise}")
    return told


def _head(said: dict[str, Any]) -> dict[str, Any]:
    """Return the known keys of a journal's head. Raises KeyError or ValueError unless a run could have written it."""
    head = {key: said[key] for key in (*_SETTINGS, "source", "makes")}
    if not isinstance(head["source"], dict) or not isinstance(head["makes"], list):
        raise ValueError
    if not all(map(_is_inside, head["makes"])):
        raise ValueError
    return head


def _is_inside(name: object) -> bool:
    """Whether this is a relative path to a file in a directory or below it."""
    if not isinstance(name, str) or not name:
        return False
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def require_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ResumeError, naming the first difference, if the state found belongs to another run than the one wanted."""
    for key, what in _SETTINGS.items():
        if found.get(key) != wanted[key]:
            raise ResumeError(
                f"{folder}: holds an unfinished run, whose {what} was {found.get(key)!r:.80} and now is "
                f"{wanted[key]!r}; {_OTHERWISE}"
            )
    before, now = found["source"], wanted["source"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        how = "is gone" if name not in now else "is new"
        if name in now and name in before:
            pairs = zip(("size", "modification time", "header"), before[name], now[name], strict=False)
            how = f"has another {next((what for what, a, b in pairs if a != b), 'fingerprint')}"
        raise ResumeError(f"{folder}: holds an unfinished run, since which {name} of the source {how}; {_OTHERWISE}")


def finished(folder: Folder, plan: DequantPlan, records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the finished shards with their journal records: those that exist and are recorded completely; their bytes
    are not compared here. Raises ResumeError for a shard with another size or header, OutputError for one that belongs
    to another user."""
    told: dict[int, list[Record]] = {}
    for record in records:
        told.setdefault(record.part, []).append(record)
    done = {}
    for number, shard in enumerate(plan.shards):
        path = folder.path / shard.name
        try:
            with open(folder.open(shard.name, owner=folder.own), "rb") as f:
                size = os.fstat(f.fileno()).st_size
                header = f.read(len(shard.header))
        except FileNotFoundError:
            continue
        except OSError as e:
            raise OutputError(f"{path}: cannot be read: {e.strerror or e}") from None
        if size != shard.nbytes or header != shard.header:
            how = f"is {size:,} bytes, not {shard.nbytes:,}" if size != shard.nbytes else "has another header"
            raise ResumeError(f"{path}: is not the shard that was finished here, it {how}; remove it, or {_OTHERWISE}")
        if _are_whole(told.get(number, []), shard.nbytes):
            done[shard.name] = told[number]
    return done


def _are_whole(records: Iterable[Record], nbytes: int) -> bool:
    """Whether the records cover this many bytes, each exactly once."""
    there, n = Ranges(), 0
    for r in records:
        there.add(r.start, r.n)
        n += r.n
    return there.covers(0, nbytes) and n == nbytes


def leftovers(folder: Folder | None, found: Told[dict[str, Any]] | None, restart: bool) -> list[tuple[str, int]]:
    """Return the files to delete before a run, with the bytes they occupy: unfinished ones, and with `restart` all
    that the journal says the run makes. Links are not followed. Raises OSError."""
    if folder is None:
        return []
    out = list(_unfinished(folder, ""))
    if restart and found is not None:
        for name in dict.fromkeys(found.head["makes"]):
            with suppress(OSError, OutputError), place_of(folder, name) as (inner, last):
                info = inner.look(last)
                if info is not None and stat.S_ISREG(info.st_mode):
                    out.append((name, info.st_blocks * 512))
    return out


def _unfinished(folder: Folder, prefix: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    for name in sorted(folder.names()):
        info = folder.look(name)
        if info is None:
            continue
        if not stat.S_ISDIR(info.st_mode):
            if name.startswith(".") and name.endswith(PART):
                yield f"{prefix}{name}", info.st_blocks * 512
        elif depth < _MAX_DEPTH:
            with folder.sub(name) as inner:
                yield from _unfinished(inner, f"{prefix}{name}/", depth + 1)

"""What an unfinished output directory is: a small JSON file in it that says of what run, there until the run is whole.

A shard under its own name is finished: it was renamed to it after its bytes were on disk and its CRC-32 in the state.
A run that goes on reads it back, and writes it again where it is damaged. config.json and the index come last, so that
nothing takes an unfinished directory for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..base.errors import OutputError, ResumeError, SourceError
from ..base.folders import Folder
from ..base.version import __version__
from ..model.sources.safetensors_dir import INDEX, MAX_HEADER, Checkpoint, parse_json
from .place import PART, place_of
from .plan import CONFIG, DequantPlan

STATE = ".quantkit-dequant.json"
#: folders in each other in which unfinished files are looked for
_MAX_DEPTH = 64
#: how to go on when one cannot
_OTHERWISE = "start again with --restart, or choose another directory"

#: keys of the state that must be the same -> what they are called
_SETTINGS = {"quantkit": "quantkit's version", "dtype": "--dtype", "shard_size": "--shard-size", "mtp": "--mtp"}


def state_of(source: Checkpoint, plan: DequantPlan) -> dict[str, Any]:
    """What a run is of: its settings, and size, modification time and SHA-256 of the header of each source file
    (of config.json the whole), with the files that it makes, and the CRC-32 of each shard that is finished: none yet.
    Raises SourceError."""
    return {
        "quantkit": __version__,
        "dtype": plan.options.dtype,
        "shard_size": plan.options.shard_size,
        "mtp": "keep" if plan.options.keep_mtp else "drop",
        "source": {p.relative_to(source.path).as_posix(): _print_of(p) for p in (*source.files, source.path / CONFIG)},
        "makes": [*(s.name for s in plan.shards), *(name for name, _ in plan.carried), INDEX, CONFIG],
        "finished": {},
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


def read_state(folder: Folder | None) -> dict[str, Any] | None:
    """The state in a directory, None where there is none. Raises ResumeError for one that is damaged, OutputError for
    one that is another's, OSError."""
    if folder is None:
        return None
    path = folder.path / STATE
    try:
        with open(folder.open(STATE, owner=folder.own, alone=True), "rb") as f:
            state = parse_json(path, f.read(MAX_HEADER + 1))
    except FileNotFoundError:
        return None
    except SourceError as e:
        raise ResumeError(f"{e}; remove {folder.path} to start again") from None
    makes, files, done = state.get("makes"), state.get("source"), state.get("finished")
    if isinstance(files, dict) and isinstance(done, dict) and isinstance(makes, list) and all(map(_is_inside, makes)):
        return state
    raise ResumeError(f"{path}: is not what quantkit dequant writes; remove {folder.path} to start again")


def _is_inside(name: object) -> bool:
    """Whether this is the name of a file in a directory or one below."""
    if not isinstance(name, str) or not name:
        return False
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def require_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ResumeError, naming the first difference, where the state found is not that of the run wanted."""
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


def finished(folder: Folder, plan: DequantPlan, sums: Mapping[str, str]) -> frozenset[str]:
    """The names of the shards that are finished: there, and with a checksum, which is not compared here. Raises
    ResumeError for one whose size or header is another, OutputError for one that is another's."""
    done = set()
    for shard in plan.shards:
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
        if shard.name in sums:
            done.add(shard.name)
    return frozenset(done)


def leftovers(folder: Folder | None, found: Mapping[str, Any] | None, restart: bool) -> list[tuple[str, int]]:
    """The files in the directory that are to go before a run goes on, with the bytes they take: unfinished ones, and
    where it starts again all that the state says were made. Nothing behind a link. Raises OSError."""
    if folder is None:
        return []
    out = list(_unfinished(folder, ""))
    if restart and found is not None:
        for name in dict.fromkeys(found["makes"]):
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


def state_bytes(state: Mapping[str, Any]) -> bytes:
    return (json.dumps(state, indent=1, ensure_ascii=False) + "\n").encode()

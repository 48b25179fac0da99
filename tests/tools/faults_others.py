"""kill -9 of the other commands that go on where they were: dequant, split and merge.

The process kills itself before, after or half-way through a call that makes, writes, syncs, renames or removes
something in the output's folder. Then nothing there has a name and is not as it should be, and the same command makes
the right files, without making again what its journal told of.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from faults_child import events
from faults_journal import records_of
from faults_site import FaultError, Row, Site, require
from gguf import GGUFWriter

#: bytes of the one tensor of each shard
_SHARD = 300_000
_N_SHARDS = 5


class Work(NamedTuple):
    """A command, as often as it is killed."""

    name: str
    args: Callable[[Site, Path], list[str]]
    """by the folder in which the output goes"""
    older: bool = False
    """whether files of the output's names are there already, with other bytes, to be replaced"""


def _gguf(site: Site) -> Path:
    path = site.folder / "whole.gguf"
    if not path.exists():
        writer = GGUFWriter(path, "llama")
        for i in range(_N_SHARDS):
            writer.add_tensor(f"blk.{i}.x.weight", np.full(_SHARD, i, np.int8))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _dequant(site: Site, folder: Path) -> list[str]:
    return ["dequant", str(site.source), str(folder / "dst"), "--shard-size", "2M", "-t", "1", "-q"]


def _split(site: Site, folder: Path) -> list[str]:
    return ["split", str(_gguf(site)), str(folder / "n"), "--max-tensors", "1", "--json", "-q"]


def _split_again(site: Site, folder: Path) -> list[str]:
    return [*_split(site, folder), "--force"]


def _merge(site: Site, folder: Path) -> list[str]:
    shards = site.folder / "shards"
    if not shards.exists():
        shards.mkdir()
        require(site.server.run(_split(site, shards), site.env).code == 0, "the split failed")
    return [
        "merge",
        str(shards / f"n-00001-of-0000{_N_SHARDS}.gguf"),
        str(folder / "n.gguf"),
        "--json",
        "-q",
        "--force",
    ]


WORKS = (
    Work("dequant", _dequant),
    Work("split", _split),
    Work("split over older shards", _split_again, older=True),
    Work("merge over an older file", _merge, older=True),
)


def kills_of(work: Work, site: Site, times: int) -> Row:
    row = Row(work.name, "", times, "")
    folder, log = site.place().parent, site.folder / "log"
    done = site.server.run(work.args(site, folder), site.env)
    require(done.code == 0, f"the undisturbed run failed: {done.err}")
    right = _files(folder)
    older = {name: b"older " + name.encode() for name in right} if work.older else {}
    shutil.rmtree(folder)

    def begun(**watch: object) -> tuple[Path, int]:
        folder = site.place().parent
        for name, raw in older.items():
            (folder / name).write_bytes(raw)
        return folder, site.server.run(work.args(site, folder), site.env, root=str(folder), log=str(log), **watch).code

    folder, code = begun()
    require(code == 0, "the watched run failed")
    shutil.rmtree(folder)
    calls = events(log)
    n_calls = len(calls)
    rare = [i + 1 for i, e in enumerate(calls) if e.what not in ("write", "sync-begin", "sync-end")]
    came: Counter[str] = Counter()
    drawn = kept = 0
    while sum(came.values()) < times and drawn < 5 * times:
        drawn += 1
        at = site.rng.choice(rare) if site.rng.random() < 0.5 else site.rng.randint(1, n_calls)
        how = site.rng.choice(("before", "after", "half"))
        folder, code = begun(kill_at=at, kill=how)
        try:
            require(code in (0, -9), f"exit {code}")
            if code == -9:
                came[events(log)[-1].old] += 1
                kept += _check_rerun(work, site, folder, right, older)
        except FaultError as e:
            row.failures.append(f"killed {how} call {at} of {n_calls}: {e}")
        finally:
            shutil.rmtree(folder)
    row.what = f"killed at a call, of {n_calls}"
    row.came_of_it = ", ".join(f"{n} {what}" for what, n in came.most_common()) + f"; {kept:,} bytes not made again"
    return row


def _check_rerun(work: Work, site: Site, folder: Path, right: dict[str, bytes], older: dict[str, bytes]) -> int:
    """Bytes that were not made again."""
    found = _files(folder)
    for name, raw in found.items():
        require(raw in (right.get(name), older.get(name)), f"{name} has its name and is not as it should be")
    args = work.args(site, folder)
    if work.name == "dequant":
        require("dst/config.json" not in found or found == right, "config.json is there, and not all the rest")
        told = records_of(folder / "dst" / ".quantkit-dequant.journal")
        shards = {name for name in found if name.endswith(".safetensors")}
        inodes = {name: (folder / name).stat().st_ino for name in shards}
        done = site.server.run(args, site.env)
        if found == right and told is None:  # it was done, but for the removal of its journal
            require(done.code == 7, f"rerun: exit {done.code}: {done.err}")
            return 0
        require((done.code, done.err) == (0, ""), f"rerun: exit {done.code}: {done.err}")
        require(_files(folder) == right, "rerun: other bytes than the undisturbed run's")
        names = [] if told is None else [name for name in told[0]["makes"] if f"dst/{name}" in shards]
        require({f"dst/{name}" for name in names} == shards, "a shard has its name that the journal does not know")
        for name in shards:
            require((folder / name).stat().st_ino == inodes[name], f"rerun: {name} was made again")
        kept = sum(len(found[name]) for name in shards)
    else:
        whole = found == right
        parts = {path.name for path in folder.glob(".quantkit-shards-*/*.part")}
        journals = list(folder.glob(".quantkit-shards-*/journal"))
        told = records_of(journals[0]) if journals else None
        named = sum(found.get(name) == raw for name, raw in right.items())
        if found and not older:
            done = site.server.run(args, site.env)
            require(done.code == 7 and "exists; choose another name" in done.err, f"exit {done.code}: {done.err}")
            require(_files(folder) == found, "a refused run changed something")
            args = [*args, "--force"]
        done = site.server.run(args, site.env)
        require((done.code, done.err) == (0, ""), f"rerun: exit {done.code}: {done.err}")
        require(_files(folder) == right, "rerun: other bytes than the undisturbed run's")
        kept = json.loads(done.out)["copied"].get("kept from before", 0)
        n_told = len({part for part, _, _ in told[1]}) if told is not None else 0
        nbytes = sum(map(len, right.values())) if len(right) == 1 else n_told * _SHARD
        if n_told and not whole and len(parts) + named >= n_told:
            require(kept >= (_SHARD if len(right) == 1 else nbytes), f"rerun: kept {kept:,} bytes of {n_told} files")
    left = {path.name for path in folder.rglob("*") if path.name.startswith(".")}
    require(not left, f"rerun: left {sorted(left)}")
    return kept


def _files(folder: Path) -> dict[str, bytes]:
    """The files with names, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }  # fmt: skip

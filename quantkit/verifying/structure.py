"""Checks the headers of a file, or of all its shards: layout of the data, padding, lengths, split keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..base.errors import SourceError
from ..gguf.types import IK_TYPES
from .gguf import Gguf, aligned, kind_of, read, regular
from .verdict import Finding, Findings

#: in any case: some downloads use capitals, though llama.cpp wants lower case
SHARD_NAME = re.compile(r"^(?P<prefix>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_USUAL_NAME = re.compile(r".*-of-\d{5}\.gguf$", re.DOTALL)
#: split key -> its type in llama-gguf-split, llama-quantize and gguf-py
SPLIT_KEYS = {"split.no": "u16", "split.count": "u16", "split.tensors.count": "i32"}
_CHUNK = 1 << 20


class Set(NamedTuple):
    """The files of one model, in order."""

    files: tuple[Gguf, ...]
    whole: bool
    """whether every file of the set exists and has a readable header"""
    names: tuple[tuple[str, int], ...]
    """(name, bytes) of every file that exists"""

    def first(self) -> Gguf | None:
        """The file with the model's keys: shard 1, or the only one; None if it could not be read."""
        for g in self.files:
            m = SHARD_NAME.match(g.name)
            if m is None or int(m["no"]) == 1:
                return g
        return None


def paths_of(out: Path, findings: Findings) -> list[Path]:
    """The file, or every existing shard of its set. Raises SourceError if `out` itself does not exist."""
    if os.path.isdir(out):
        found = sorted(p.name for p in out.glob("*.gguf"))
        hint = f", such as {out / found[0]}" if found else ""
        raise SourceError(f"{out}: is a directory; give a GGUF file{hint}")
    regular(out)
    m = SHARD_NAME.match(out.name)
    if m is None:
        return [out]
    count = int(m["count"])
    there = {
        int(n["no"]): path
        for path in out.parent.iterdir()
        if (n := SHARD_NAME.match(path.name))
        and n["prefix"].lower() == m["prefix"].lower()
        and n["count"] == m["count"]
    }
    wanted = range(1, count + 1)
    missing = [no for no in wanted if no not in there]
    if missing:
        names = ", ".join(f"{m['prefix']}-{no:05d}-of-{m['count']}.gguf" for no in missing[:3])
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        findings.add(Finding("shards", out.name, f"{names}{more} missing", expected=f"{count:,} shards"))
    for no in sorted(there):
        if no not in wanted:
            findings.add(
                Finding("shards", there[no].name, f"is beyond the last of {count:,} shards, or before the first")
            )
    return [there[no] for no in sorted(there) if no in wanted]


def check(out: Path, findings: Findings) -> Set:
    """Read and check the headers, the layout and the padding of a file and its fellow shards."""
    before = findings.count
    paths = paths_of(out, findings)
    missing = findings.count > before
    files = [g for path in paths if (g := read(path, findings)) is not None]
    for g in files:
        _check_layout(g, findings)
        _check_padding(g, findings)
    _check_split(files, complete=not missing and len(files) == len(paths), findings=findings)
    for g in files:
        m = SHARD_NAME.match(g.name)
        if m is None or int(m["no"]) == 1:
            _check_model_keys(g, findings)
    names = tuple((path.name, regular(path)) for path in paths)
    return Set(tuple(files), not missing and len(files) == len(paths), names)


def remarks(files: Iterable[Gguf]) -> Iterator[str]:
    """Notes on unusual properties that are no faults."""
    old = [g.name for g in files if g.version == 2]
    if old:
        yield f"{old[0]} is of GGUF version 2, as llama.cpp wrote it in 2023; it reads as version 3 does"
    capitals = [g.name for g in files if SHARD_NAME.match(g.name) and not _USUAL_NAME.match(g.name)]
    if capitals:
        yield (
            f"{capitals[0]}: llama.cpp finds the shards of a model only by names in small letters, …-of-00002.gguf; "
            "rename them, or make one file of them with `quantkit merge`"
        )
    foreign = sorted({t.type.name for g in files for t in g.tensors if t.type.name in IK_TYPES})
    if foreign:
        yield (f"of {', '.join(foreign)}, types that only ik_llama.cpp has, no more than place and size was checked")


def _check_model_keys(g: Gguf, findings: Findings) -> None:
    if kind_of(g) == "an importance matrix":  # has no general.architecture
        return
    key = g.keys.get("general.architecture")
    if key is None or key.type_name != "str":
        found = "nothing" if key is None else key.shown()
        findings.add(Finding("header", g.name, "general.architecture", expected="a string", found=found))


def _check_layout(g: Gguf, findings: Findings) -> None:
    """Check that each tensor begins where the one before it ends, padded, and that the last ends with the file;
    gguf.cpp refuses anything else. The sizes of ik_llama.cpp's types have changed over time, so bytes after such a
    tensor may be its own."""
    at = g.data_start
    loose = False
    if not g.tensors and g.n_claimed == 0 and g.nbytes == g.header_end:
        return  # a first shard without tensors has no padding
    in_order = sorted(g.tensors, key=lambda t: (t.start, t.end))
    for t in g.tensors:
        if (t.start - g.data_start) % g.alignment:
            findings.add(
                Finding(
                    "layout", g.name, "is not aligned", t.name, t.start, expected=f"a multiple of {g.alignment}",
                    found=f"offset {t.start - g.data_start:,}",
                )
            )  # fmt: skip
        if t.end > g.nbytes:
            findings.add(
                Finding(
                    "layout", g.name, "lies beyond the end of the file", t.name, t.start,
                    expected=f"{t.nbytes:,} bytes", found=f"{max(0, g.nbytes - t.start):,}",
                )
            )  # fmt: skip
    for given, placed in zip(g.tensors, in_order, strict=True):
        if given is not placed:
            findings.add(
                Finding(
                    "layout", g.name, "data are not in the order of the header", given.name, given.start,
                    expected=f"'{given.name}'", found=f"'{placed.name}'",
                )
            )  # fmt: skip
    for t in in_order:
        if t.start < at:
            findings.add(
                Finding("layout", g.name, "overlaps what is before it", t.name, t.start, expected=f"at {at:,}")
            )
        elif t.start > at and len(g.tensors) == g.n_claimed and not loose:
            text = f"a hole of {t.start - at:,} bytes before it"
            findings.add(Finding("layout", g.name, text, t.name, t.start, expected=f"at {at:,}"))
        at = max(at, aligned(t.end, g.alignment))
        loose = t.type.name in IK_TYPES
    if at != g.nbytes and len(g.tensors) == g.n_claimed and not (loose and g.nbytes > at):
        text = "the file is too short" if g.nbytes < at else "bytes behind the last tensor"
        if g.nbytes > at and _begins_at(g, at):
            text += (
                ", where another GGUF begins: several files were joined into one, as by cat, which none can read; "
                "get them again, and make one of shards with `quantkit merge`"
            )
        findings.add(Finding("length", g.name, text, expected=f"{at:,} bytes", found=f"{g.nbytes:,}"))


def _begins_at(g: Gguf, at: int) -> bool:
    """Whether a GGUF's magic is at `at`. Raises SourceError."""
    try:
        with open(g.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), 4, at) == b"GGUF"
    except OSError as e:
        raise SourceError(f"{g.path}: cannot be read: {e.strerror or e}") from None


def _check_padding(g: Gguf, findings: Findings) -> None:
    """Check that everything outside the header and the tensors is zero. Skipped if the place of any tensor is unknown.
    Raises SourceError."""
    if len(g.tensors) != g.n_claimed:
        return
    at, what, loose = g.header_end, "the header", False
    try:
        with open(g.path, "rb", buffering=0) as file:
            for t in sorted(g.tensors, key=lambda t: (t.start, t.end)):
                if not loose:
                    _check_zeros(file.fileno(), g, at, min(t.start, g.nbytes), what, findings)
                if t.end > at:
                    at, what, loose = t.end, f"'{t.name}'", t.type.name in IK_TYPES
            if not loose:
                _check_zeros(file.fileno(), g, at, g.nbytes, what, findings)
    except OSError as e:
        raise SourceError(f"{g.path}: cannot be read: {e.strerror or e}") from None


def _check_zeros(fd: int, g: Gguf, begin: int, end: int, what: str, findings: Findings) -> None:
    for at in range(begin, end, _CHUNK):
        raw = os.pread(fd, min(_CHUNK, end - at), at)
        rest = raw.lstrip(b"\0")
        if rest:
            findings.add(
                Finding(
                    "padding", g.name, f"after {what} not zero", offset=at + len(raw) - len(rest), expected="00",
                    found=f"{rest[0]:02x}",
                )
            )  # fmt: skip
            return


def _check_split(files: list[Gguf], complete: bool, findings: Findings) -> None:
    names: dict[str, str] = {}
    for g in files:
        for t in g.tensors:
            other = names.setdefault(t.name, g.name)
            if other != g.name:
                findings.add(Finding("shards", g.name, f"is in {other} too", t.name, t.start))
    total = sum(g.n_claimed for g in files)
    for g in files:
        m = SHARD_NAME.match(g.name)
        has = {name: g.keys[name] for name in SPLIT_KEYS if name in g.keys}
        count = has["split.count"].number() if "split.count" in has else None
        if m is None or int(m["count"]) == 1:
            if count is not None and count > 1:
                text = "is one shard of several by its keys, but not by its name"
                findings.add(
                    Finding("shards", g.name, text, offset=has["split.count"].offset, found=f"split.count {count}")
                )
            continue
        for name, want in _split_keys(int(m["no"]), int(m["count"]), total if complete else None):
            key = has.get(name)
            if key is None:
                findings.add(Finding("shards", g.name, name, expected=f"{SPLIT_KEYS[name]} {want}", found="nothing"))
            elif key.type_name != SPLIT_KEYS[name] or (want is not None and key.number() != want):
                expected = f"{SPLIT_KEYS[name]}{'' if want is None else f' {want}'}"
                findings.add(Finding("shards", g.name, name, offset=key.offset, expected=expected, found=key.shown()))


def _split_keys(no: int, count: int, total: int | None) -> Iterator[tuple[str, int | None]]:
    yield "split.no", no - 1
    yield "split.count", count
    yield "split.tensors.count", total

"""A manifest: the bytes and SHA-256 of every file, and of every tensor with its type and shape.

{"quantkit_manifest": 1,
 "files": [{"name", "bytes", "sha256"}],
 "tensors": [{"name", "file", "type", "shape", "bytes", "sha256"}]}     shapes in GGUF (ne) order
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import SourceError
from ..base.first_bytes import ENOUGH, not_the_file
from ..base.outputs import write_text
from .gguf import Gguf, regular
from .scan import Digests
from .verdict import Finding, Findings

VERSION = 1
_MOST = 1 << 28


def make(files: Sequence[Gguf], digests: Digests) -> dict[str, Any]:
    """Make the manifest of files without findings."""
    return {
        "quantkit_manifest": VERSION,
        "files": [{"name": g.name, "bytes": g.nbytes, "sha256": digests.files[g.name]} for g in files],
        "tensors": [
            {
                "name": t.name,
                "file": g.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "sha256": digests.tensors[g.name, t.name],
            }
            for g in files
            for t in g.tensors
        ],
    }


def write_json(path: Path, value: Mapping[str, Any], replace: bool = False) -> None:
    """Write a JSON file atomically. Raises OutputError, also if it exists and `replace` is false."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", replace)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises SourceError."""
    try:
        if regular(path) > _MOST:
            raise SourceError(f"{path}: too large for {what} (at most {_MOST:,} bytes)")
        raw = path.read_bytes()
        if says := not_the_file(raw[:ENOUGH]):
            raise SourceError(f"{path}: {says}")
        value = json.loads(raw)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{path}: is not {what}: not JSON: {str(e)[:100]}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: is not {what}: a JSON {type(value).__name__}")
    return value


def read(path: Path) -> dict[str, Any]:
    """Read a manifest and check its form. Raises SourceError."""
    value = read_json(path, "a manifest")
    shape = {"files": {"name": str, "bytes": int, "sha256": str}}
    shape["tensors"] = {**shape["files"], "file": str, "type": str, "shape": list}
    good = value.get("quantkit_manifest") == VERSION and all(
        isinstance(value.get(part), list)
        and all(
            isinstance(item, dict) and all(isinstance(item.get(k), kind) for k, kind in keys.items())
            for item in value[part]
        )
        for part, keys in shape.items()
    )
    if not good:
        raise SourceError(f"{path}: is not a manifest of version {VERSION}; make one with verify --write-manifest")
    return value


def compare(given: Mapping[str, Any], files: Sequence[Gguf], digests: Digests, findings: Findings) -> None:
    """Report differences from a manifest. Files are matched by name; if no name matches, by their order."""
    want = {f["name"]: f for f in given["files"]}
    there = {g.name: g for g in files}
    renamed: dict[str, str] = {}
    if not want.keys() & there.keys() and len(want) == len(there):
        renamed = dict(zip(there, want, strict=True))

    def differs(file: str, what: str, expected: object, found: object, tensor: str = "") -> None:
        if expected != found:
            findings.add(Finding("manifest", file, what, tensor, expected=str(expected), found=str(found)))

    for name, g in there.items():
        item = want.pop(renamed.get(name, name), None)
        if item is None:
            findings.add(Finding("manifest", name, "is not in the manifest"))
            continue
        differs(name, "bytes", item["bytes"], g.nbytes)
        differs(name, "SHA-256", item["sha256"], digests.files[name])
    for name in want:
        findings.add(Finding("manifest", name, "is in the manifest, but not here"))
    tensors = {t["name"]: t for t in given["tensors"]}
    for g in files:
        for t in g.tensors:
            item = tensors.pop(t.name, None)
            if item is None:
                findings.add(Finding("manifest", g.name, "is not in the manifest", t.name))
                continue
            differs(g.name, "file", item["file"], renamed.get(g.name, g.name), t.name)
            differs(g.name, "type", item["type"], t.type.name, t.name)
            differs(g.name, "shape", item["shape"], list(t.shape), t.name)
            differs(g.name, "SHA-256", item["sha256"], digests.tensors.get((g.name, t.name), "none"), t.name)
    for name, item in tensors.items():
        findings.add(Finding("manifest", item["file"], "is in the manifest, but not here", name))

"""What a build is made from: digests of its source's files, its importance matrix and its covariance.

A source of 688 GB takes long to hash, so of its big files the header is hashed and the length noted, which
names every tensor, type and place but not the weights; with `whole` the weights too. Small files and the
importance matrix are always hashed whole. All but the weights is hashed before the build, and what was written to
meanwhile is refused: what is stated is what was used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import SourceError
from ..imatrix.matrix import Imatrix
from ..model.catalogue import Source
from ..rounding.covariance import CovarianceSource, is_by_layer
from .gguf import read as read_gguf
from .gguf import regular
from .verdict import Findings, Progress

#: the digest of a big file's header; its length is in the annotations
HEADER_DIGEST = "headerSha256"
COVARIANCE_DIGEST = "quantkitCovarianceSha256"
_CHUNK = 1 << 23
_SMALL = 1 << 27
#: what besides weights a checkpoint's metadata is made from
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "model.safetensors.index.json", "README.md",
    "hf_quant_config.json",
)  # fmt: skip


def file_digest(path: Path, n: int | None = None, progress: Progress | None = None) -> str:
    """SHA-256 of a file, or of its first `n` bytes. Raises SourceError."""
    sha = hashlib.sha256()
    left = regular(path) if n is None else n
    try:
        with open(path, "rb") as file:
            while left:
                raw = file.read(min(_CHUNK, left))
                if not raw:
                    raise SourceError(f"{path}: ended {left:,} bytes too soon; it has changed since it was opened")
                sha.update(raw)
                left -= len(raw)
                if progress is not None:
                    progress.advance(len(raw))
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    return sha.hexdigest()


def _header_bytes(path: Path) -> int:
    """How many bytes the header of a weights file has."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")
    made = read_gguf(path, Findings())
    if made is None:
        raise SourceError(f"{path}: its header cannot be read")
    return made.header_end


class Dependency(NamedTuple):
    """A file that a build is made from: `digest` of its header or, where `is_whole`, of all of it."""

    path: Path
    role: str
    nbytes: int
    header_bytes: int | None
    digests: dict[str, str]
    state: tuple[int, int, int]
    """size, time of modification and inode when it was hashed"""
    weights: str = ""
    """of a covariance: how inputs were weighted, where not alike"""


@dataclass(frozen=True)
class Evidence:
    """What a build is made from, taken before it begins: a file that is written to meanwhile is noticed."""

    files: tuple[Dependency, ...]

    def check(self) -> None:
        """Raises SourceError where a file is not what it was."""
        for file in self.files:
            if _state(file.path) != file.state:
                raise SourceError(
                    f"{file.path}: was written to since the build began, so what was built from cannot be attested; "
                    "put it back as it was, and build again"
                )

    def to_json(self, whole: bool, progress: Progress) -> list[dict[str, Any]]:
        """The files as in-toto resource descriptors, with `whole` all of each hashed. Raises SourceError."""
        todo = [f for f in self.files if whole and "sha256" not in f.digests and f.role != "covariance"]
        if todo:
            progress.start("source hashes", sum(file.nbytes for file in todo), "B")
        out = []
        for file in self.files:
            digest, notes = dict(file.digests), {"role": file.role, "bytes": file.nbytes}
            if file.header_bytes is not None:
                notes["headerBytes"] = file.header_bytes
            if file.weights:
                notes["weights"] = file.weights
            if file in todo:
                digest["sha256"] = file_digest(file.path, progress=progress)
            out.append({"name": file.path.name, "digest": digest, "annotations": notes})
        self.check()
        return out


def _state(path: Path) -> tuple[int, int, int]:
    try:
        info = path.stat()
    except OSError as e:
        raise SourceError(f"{path}: cannot be read any more: {e.strerror or e}") from None
    return (info.st_size, info.st_mtime_ns, info.st_ino)


class Inputs(NamedTuple):
    """What a build is made from."""

    source: Source | None
    imatrix: Imatrix | None = None
    covariance: CovarianceSource | None = None


def gather(
    source: Source, imatrix: Imatrix | None, progress: Progress, covariance: CovarianceSource | None = None
) -> Evidence:
    """The source's files, the importance matrix, the covariance: headers of big files, and all of small ones, hashed;
    of the covariance its own digest. Raises SourceError."""
    folder = source.path if source.path.is_dir() else source.path.parent
    beside = [folder / name for name in _BESIDE if (folder / name).is_file()] if source.path.is_dir() else []
    small = [p for p in beside if regular(p) <= _SMALL]
    headers = {path: _header_bytes(path) for path in source.files}
    everything = dict.fromkeys([*source.files, *small, *([imatrix.path] if imatrix is not None else [])])
    sizes = {path: headers.get(path, regular(path)) for path in everything}
    progress.start("source hashes", sum(sizes.values()), "B")
    out = []
    for path, nbytes in sizes.items():
        state = _state(path)
        role = "imatrix" if imatrix is not None and path == imatrix.path else "source"
        digest = file_digest(path, nbytes, progress)
        kind = HEADER_DIGEST if path in headers else "sha256"
        out.append(Dependency(path, role, state[0], headers.get(path), {kind: digest}, state))
    return Evidence(tuple(out) + _of_covariance(covariance))


def _of_covariance(covariance: CovarianceSource | None) -> tuple[Dependency, ...]:
    """A folder of arrays as one dependency."""
    out = []
    if is_by_layer(covariance):  # computed in the build: the text is what it was made from
        for file in covariance.files:
            state = _state(file)
            out.append(Dependency(file, "text", state[0], None, {"sha256": file_digest(file)}, state))
        return tuple(out)
    for one in () if covariance is None else (covariance, covariance.held_out):
        if one is not None and one.files:
            folder = one.files[0].parent
            nbytes = sum(_state(file)[0] for file in one.files if file.parent == folder)
            digest = {COVARIANCE_DIGEST: one.digest}
            out.append(Dependency(folder, "covariance", nbytes, None, digest, _state(folder), one.weighting))
    return tuple(out)

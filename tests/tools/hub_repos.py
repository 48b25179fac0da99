"""Repositories of the local server that speaks the Hub's API (hub_server.py): commits, branches, and files with hashes.

A file is a `Blob`, whose bytes lie in a local file that nobody changes. Large files and those of weights are stored
with Git LFS, as .gitattributes has it on the Hub: they have a SHA-256 and come from the second host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".dat", ".npz", ".pt")
LFS_BYTES = 10 << 20


@dataclass(frozen=True)
class Blob:
    """The content of a file: where its bytes are, how many, and its hashes. `sha256` is None where it is not in LFS."""

    place: Path
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def lfs(self, sha: str = "sha256") -> dict[str, Any] | None:
        """What the API says of LFS, with its name of the hash: `sha256` with the model, `oid` in trees."""
        return None if self.sha256 is None else {sha: self.sha256, "size": self.size, "pointerSize": 134}


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository. `granted` are the tokens that may read the files of a gated one; a private one takes any valid
    token."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)
    """the ids of commits, oldest first"""
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag, or an id in full."""
        name = revision.removeprefix("refs/heads/")
        if self.branches.get(name):
            return self.commits[self.branches[name][-1]]
        return self.commits.get(self.tags.get(name.removeprefix("refs/tags/"), revision))

    def commit(self, branch: str, files: Mapping[str, Blob], title: str) -> Commit:
        """A new commit of just these files at the end of a branch, which is made if there is none."""
        line = self.branches.setdefault(branch, [])
        said = [self.id, branch, str(len(self.commits)), *line, title]
        said += [f"{path} {blob.etag}" for path, blob in sorted(files.items())]
        made = Commit(hashlib.sha1("\n".join(said).encode()).hexdigest(), title, dict(files))
        self.commits[made.id] = made
        line.append(made.id)
        return made


def blob_of(path: Path, name: str, sha256: Callable[[Path], str] | None = None) -> Blob:
    """The blob of a local file that is called `name` in its repository. `sha256` gives the hash of files that are
    too large to read."""
    size = path.stat().st_size
    if name.endswith(LFS_SUFFIXES) or size >= LFS_BYTES:
        sha = sha256(path) if sha256 else _digest(path)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()
        return Blob(path, size, git_sha1(pointer), sha)
    return Blob(path, size, git_sha1(path.read_bytes()), None)


def git_sha1(data: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def files_of(folder: Path, sha256: Callable[[Path], str] | None = None) -> dict[str, Blob]:
    """All files below a folder by their path in it, hidden ones (a download's .cache) too but for those of git."""
    found = ((p, p.relative_to(folder).as_posix()) for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: blob_of(p, name, sha256) for p, name in found if not name.startswith(".git/")}


def tree(files: Mapping[str, Blob], under: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder as the API lists them: folders too, and all levels if `recursive`."""
    prefix = f"{under.strip('/')}/" if under.strip("/") else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        for depth in range(1, len(inner)) if recursive else range(1, min(2, len(inner))):
            name = prefix + "/".join(inner[:depth])
            entries[name] = {"type": "directory", "oid": git_sha1(name.encode()), "size": 0, "path": name}
        if recursive or len(inner) == 1:
            entries[path] = entry(path, blob)
    return [entries[name] for name in sorted(entries)]


def entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as trees have it."""
    lfs = blob.lfs("oid")
    return {"type": "file", "oid": blob.oid, "size": blob.size, "path": path} | ({"lfs": lfs} if lfs else {})


def siblings(files: Mapping[str, Blob], blobs: bool) -> Iterable[dict[str, Any]]:
    """The files as the model's page in the API has them; with sizes and hashes if `blobs`."""
    for path, blob in sorted(files.items()):
        said: dict[str, Any] = {"rfilename": path}
        if blobs:
            lfs = blob.lfs()
            said |= {"size": blob.size, "blobId": blob.oid} | ({"lfs": lfs} if lfs else {})
        yield said


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()

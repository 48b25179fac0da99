"""A model's repository at one commit: its files with sizes and hashes, their bytes, and how they come here checked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..base.errors import SourceError
from ..base.version import __version__
from . import ranges
from .address import Address
from .parallel import each
from .patience import REFUSED, persist

_CHUNK = 1 << 20
_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


class RemoteFile(NamedTuple):
    """What the repository says of a file: its bytes, and the hash they have: SHA-256 if it is stored with Git LFS, as
    all weights are, else the name that git gives it (SHA-1 of "blob SIZE\\0" and the bytes)."""

    size: int
    sha256: str | None
    git_sha1: str | None

    def digest(self) -> Any:
        """A hash to update with all bytes, and to hold against `expected`."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    @property
    def expected(self) -> str | None:
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Repo:
    """A repository at one commit, which `revision` was when it was opened. Threads may read at the same time."""

    name: str
    """org/repo"""
    revision: str | None
    """as the user gave it: a branch, a tag, a commit; None is the default branch"""
    commit: str
    """40 hex digits"""
    files: Mapping[str, RemoteFile]

    def where(self, path: str = "") -> str:
        """The address of a file, or of the whole, for messages: the user's form."""
        return str(Address(self.name, self.revision, path))

    def read(self, path: str, start: int, n: int) -> bytes:
        """At most `n` bytes of a file from `start` on, fewer at its end only. Raises SourceError."""
        try:
            got, size = ranges.read(self.where(path), self._url(path), start, n)
        except FileNotFoundError:
            raise SourceError(f"{self.where(path)}: {REFUSED[404]}") from None
        self._check_size(path, size)
        return got

    def stream(self, path: str, start: int, n: int, put: Callable[[bytes], Any]) -> None:
        """The same in pieces of up to 64 KiB or so, each given to `put` once and in order."""
        try:
            size = ranges.stream(self.where(path), self._url(path), start, n, put)
        except FileNotFoundError:
            raise SourceError(f"{self.where(path)}: {REFUSED[404]}") from None
        self._check_size(path, size)

    def fetch(self, path: str, to: Path, progress: Callable[[int], None] | None = None) -> None:
        """A whole file at `to`, checked by its hash; `progress` is told how many of its bytes are there. An interrupted
        one is continued from `to`.part, whose bytes are checked with the rest. Raises SourceError, and OSError for
        the place."""
        part = to.with_name(f"{to.name}.part")
        if self._fetched(path, part, progress) or self._fetched(path, part, progress):
            os.replace(part, to)
            return
        raise self._wrong(path)

    def cached(self, path: str) -> Path | None:
        """Where a file lies in Hugging Face's cache, at this commit; None if it does not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def cached_content(self, path: str) -> Path | None:
        """Where a file's content lies in Hugging Face's cache, of whatever commit; None if it does not. Its size is
        right; its hash is to be checked."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        file = self.files[path]
        blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model") / "blobs"
        for place in (blobs / file.expected if file.expected else None, self.cached(path)):
            try:
                if place is not None and place.is_file() and place.stat().st_size == file.size:
                    return place
            except OSError:
                continue
        return None

    def small(self, paths: Sequence[str]) -> Path:
        """Get small files into Hugging Face's cache, those that are not there yet; returns the folder they are in, the
        snapshot of this commit. Raises SourceError."""
        with quiet():
            places = list(each(self._small, paths))
        folder = places[0]
        for _ in range(paths[0].count("/") + 1):
            folder = folder.parent
        return folder

    def moved(self) -> str | None:
        """The commit that the revision is now, if another. Raises SourceError."""
        now = open_repo(Address(self.name, self.revision, "")).commit
        return None if now == self.commit else now

    def _url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, path, revision=self.commit)

    def _check_size(self, path: str, size: int) -> None:
        said = self.files[path].size if path in self.files else size
        if size != said:
            raise SourceError(
                f"{self.where(path)}: the server has {size:,} bytes, the repository says {said:,} at commit "
                f"{self.commit[:12]}; try again later"
            )

    def _fetched(self, path: str, part: Path, progress: Callable[[int], None] | None) -> bool:
        """Whether the file is whole and right in `part`, which is gone if not."""
        file, said = self.files[path], progress or (lambda done: None)
        digest, done = file.digest(), 0
        with open(part, "a+b") as out:
            out.seek(0)
            while chunk := out.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)

            def put(piece: bytes) -> None:
                nonlocal done
                out.write(piece)
                digest.update(piece)
                done += len(piece)
                said(done)

            if done < file.size:
                self.stream(path, done, file.size - done, put)
        if done == file.size and file.expected in (None, digest.hexdigest()):
            return True
        part.unlink()
        return False

    def _small(self, path: str) -> Path:
        api, where = client(), self.where(path)
        for again in (False, True):
            found = persist(
                where,
                lambda again=again: api.hf_hub_download(  # type: ignore[misc]
                    self.name, path, revision=self.commit, force_download=again
                ),
            )
            file, data = self.files[path], Path(found).read_bytes()
            digest = file.digest()
            digest.update(data)
            if len(data) == file.size and file.expected in (None, digest.hexdigest()):
                return Path(found)
        raise self._wrong(path)

    def _wrong(self, path: str) -> SourceError:
        kind = "SHA-256" if self.files[path].sha256 else "git's SHA-1"
        return SourceError(
            f"{self.where(path)}: what came twice is not what the repository has at commit {self.commit[:12]}: "
            f"{kind} should be {self.files[path].expected}; try again later, or by another network"
        )


def open_repo(address: Address) -> Repo:
    """The repository of an address, its revision resolved to a commit. One request. Raises SourceError."""
    where = str(address._replace(path=""))
    api = client()

    def asked() -> Any:
        from huggingface_hub import constants

        with quiet():
            return api.model_info(
                address.repo,
                revision=address.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )

    try:
        info = persist(where, asked)
        files = {s.rfilename: _file(s) for s in info.siblings or ()}
        if not _COMMIT.fullmatch(info.sha):
            raise ValueError("no commit")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise SourceError(f"{where}: the server's answer is not one of the Hub ({e}); check HF_ENDPOINT") from None
    return Repo(address.repo, address.revision, info.sha, files)


def _file(said: Any) -> RemoteFile:
    """What the answer says of a file. Raises ValueError where its name or its numbers cannot be."""
    name, size, sha256 = said.rfilename, said.size, None
    if said.lfs:
        size, sha256 = said.lfs.size, said.lfs.sha256
    path = PurePosixPath(name)
    if not name.isprintable() or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
        raise ValueError(f"a file is called {name!r:.80}")
    if type(size) is not int or size < 0 or (sha256 is not None and not _SHA256.fullmatch(sha256)):
        raise ValueError(f"no size or hash of {name!r:.80}")
    return RemoteFile(size, sha256, said.blob_id)


def client() -> Any:
    """huggingface_hub's, of the endpoint as it is set now."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, library_name="quantkit", library_version=__version__)


@contextmanager
def quiet(group: str | None = "huggingface_hub.http_get", bars: bool = False) -> Iterator[None]:
    """Without huggingface_hub's own warnings, which show signed addresses, and unless `bars` without its bars: those of
    a group, or None for all."""
    from huggingface_hub import utils

    hub: Any = utils
    was = hub.logging.get_verbosity()
    hidden = not bars and not hub.are_progress_bars_disabled(group)
    if hidden:
        hub.disable_progress_bars(group)
    hub.logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.logging.set_verbosity(was)
        if hidden:
            hub.enable_progress_bars(group)

"""The headers of a GGUF that lies elsewhere, by HTTP range requests: never its data.

    hf://org/repo/path/x.gguf[@revision]     Hugging Face, with huggingface_hub's endpoint, token and session
    https://host/path/x.gguf                 any server; http:// too

A growing prefix is fetched until the header parses, 1 MiB at first, then twice as much each time
(R1's header has 5 MB, in 4 requests).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from ...base.errors import SourceError, did_you_mean
from ...gguf.header import KV, MAX_HEADER, Header, PrefixTooShortError, TensorInfo, is_utf8, parse_header
from ...gguf.shards import read_set
from ...hub import address, ranges
from ...hub.patience import REFUSED
from ...hub.repo import Repo
from .gguf_file import GgufFile, GgufHeaders, joined
from .shard_store import ShardStore

FIRST_BYTES = 1 << 20
_REMOTE = re.compile(r"(hf|https?)://", re.IGNORECASE)
_HF = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<early>[^/]+))?/(?P<folder>([^/]+/)*)(?P<name>[^/@]+)(@(?P<late>.+))?",
    re.IGNORECASE,
)


class _Place(NamedTuple):
    """Where a file and those beside it are: as a person writes it, and as a URL."""

    name: str
    shown: tuple[str, str]
    """what stands before and after the name"""
    url: tuple[str, str]
    quoted: bool
    """the name has the form it has in URLs"""

    def where(self, name: str) -> str:
        return name.join(self.shown)


def is_remote(source: str) -> bool:
    """Whether a source on the command line names a file elsewhere."""
    return _REMOTE.match(source) is not None


def open_remote(source: str, repo: Repo | None = None) -> GgufHeaders:
    """The checked headers of a GGUF elsewhere, of all shards of a split one; of one in a repository at its commit,
    whatever the revision is by now. Raises SourceError."""
    place = _place(source) if repo is None else _pinned(source, repo)
    if repo is not None and (path := address.parse(source).path) not in repo.files:
        raise SourceError(f"{source}: there is no such file{did_you_mean(path, repo.files)}")

    def read(name: str) -> Header:
        return _header(place, name)

    try:
        kvs, found = joined(read_set(place.name, place.where, read))
    except FileNotFoundError:
        raise SourceError(f"{source}: {REFUSED[404]}") from None
    if repo is None:
        return GgufHeaders(source, place.name.removesuffix(".gguf"), kvs, [info for _, info in found])
    return _by_shards(source, repo, kvs, [(shard.name, info) for shard, info in found])


def _by_shards(source: str, repo: Repo, kvs: tuple[KV, ...], infos: list[tuple[str, TensorInfo]]) -> GgufFile:
    """Of a GGUF in a repository the headers, and what reads its weights shard by shard (shard_store)."""
    path = address.parse(source).path
    # where its files would be; nothing is there
    folder = Path("/", "hf:", repo.name, repo.commit)
    shards = dict.fromkeys([path, *(f"{path.rpartition('/')[0]}/{name}".lstrip("/") for name, _ in infos)])
    store = ShardStore(repo, folder, shards)
    made = GgufFile(folder / path, kvs, [((folder / path).with_name(name), info) for name, info in infos], store)
    made.where, made.commit = source, repo.commit
    made.lacks = (
        f"{source}: only the headers are read from the Hub here, and this needs the weights; fetch it first with "
        f"`quantkit download` and give the file"
    )
    return made


def _pinned(source: str, repo: Repo) -> _Place:
    from huggingface_hub import hf_hub_url

    place, found = _place(source), address.parse(source)
    name = found.path.rpartition("/")[2]
    url = hf_hub_url(found.repo, found.path, revision=repo.commit)
    return _Place(name, place.shown, (url.removesuffix(url.rpartition("/")[2]), ""), quoted=False)


def _place(source: str) -> _Place:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if not is_utf8(source):
        raise SourceError(f"{source!a}: is not UTF-8")
    if source[:5].lower() == "hf://":
        m = _HF.fullmatch(source)
        if m is None or not m["name"].endswith(".gguf") or (m["early"] and m["late"]):
            raise SourceError(f"{source}: is not hf://org/repo/file.gguf or hf://org/repo/file.gguf@revision")
        try:
            url = hf_hub_url(m["repo"], m["folder"] + m["name"], revision=unquote(m["early"] or m["late"] or "main"))
        except HFValidationError as e:
            raise SourceError(f"{source}: {e}") from None
        shown = source[: m.start("name")], source[m.end("name") :]
        return _Place(m["name"], shown, (url.removesuffix(url.rpartition("/")[2]), ""), quoted=False)
    parts = urlsplit(source)
    folder, _, name = parts.path.rpartition("/")
    if not parts.netloc or not name.endswith(".gguf"):
        raise SourceError(f"{source}: is not the address of a file.gguf")
    around = f"{parts.scheme}://{parts.netloc}{folder}/", f"?{parts.query}" if parts.query else ""
    url = around[0]
    if url.startswith(f"{constants.ENDPOINT}/"):  # the page that shows a file, copied from the browser
        url = re.sub(r"^(.*?//[^/]+/[^/]+/[^/]+)/blob/", r"\1/resolve/", url)
    return _Place(name, around, (url, around[1]), quoted=True)


def _header(place: _Place, name: str) -> Header:
    """Fetch as much of a file as its header needs. Raises SourceError, or FileNotFoundError."""
    where = place.where(name)
    url = name.join(place.url) if place.quoted else quote(name).join(place.url)
    prefix, wanted = bytearray(), FIRST_BYTES
    while True:
        more, file_bytes = ranges.read(where, url, len(prefix), wanted - len(prefix))
        prefix += more
        try:
            return parse_header(where, bytes(prefix), file_bytes)
        except PrefixTooShortError as e:
            wanted = min(MAX_HEADER, max(2 * len(prefix), e.needed))

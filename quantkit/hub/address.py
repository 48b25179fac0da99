"""Addresses on the Hub, as people write and copy them.

hf://org/repo[@revision][/path][@revision]
https://huggingface.co/org/repo                           a model's page
https://huggingface.co/org/repo/tree/revision[/path]      one of its folders; blob/ and resolve/: a file
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ..base.errors import SourceError

FORM = "hf://org/repo, hf://org/repo@revision or hf://org/repo/file.gguf"
_HF = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<early>[^/@]+))?(/(?P<path>[^@]*?))?/?(@(?P<late>[^@]+))?", re.IGNORECASE
)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
#: first parts of addresses that are no organization
_NO_MODELS = ("datasets", "spaces", "kernels", "buckets")


class Address(NamedTuple):
    """A repository, or a file or folder in it; `path` is "" for all of it. Nothing is quoted."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://{self.repo}{at}" + (f"/{self.path}" if self.path else "")


def is_hub(source: str) -> bool:
    """Whether a source is an address on the Hub, rather than a path or another server's."""
    return source[:5].lower() == "hf://" or _page(source) is not None


def is_gguf(source: str) -> bool:
    """Whether it is the address of a GGUF, by its name."""
    return re.search(r"\.gguf(@[^/]*)?$", source.partition("?")[0]) is not None


def parse(source: str) -> Address:
    """The address that `is_hub` saw. Raises SourceError for one that is none."""
    page = _page(source)
    if page is not None:
        repo, kind, revision, path = page
        if not repo or kind not in ("", "tree", "blob", "resolve"):
            raise SourceError(f"{source}: is not the page of a model or of a file; give {FORM}")
        return _checked(source, Address(repo, unquote(revision) or None, unquote(path)))
    m = _HF.fullmatch(source)
    if m is None or (m["early"] and m["late"]):
        raise SourceError(f"{source}: is not {FORM}")
    revision = m["early"] or m["late"]
    return _checked(source, Address(m["repo"], unquote(revision) if revision else None, m["path"] or ""))


def _checked(source: str, address: Address) -> Address:
    kind, name = address.repo.split("/")
    if kind.lower() in _NO_MODELS:
        raise SourceError(f"{source}: {kind} hold no models; give {FORM}")
    if not all(re.fullmatch(r"[\w.-]{1,96}", part, re.ASCII) for part in (kind, name)) or ".." in address.repo:
        raise SourceError(f"{source}: '{address.repo}' is no name of a repository; give {FORM}")
    parts = address.path.split("/")
    if address.path and not all(part and part not in (".", "..") and part.isprintable() for part in parts):
        raise SourceError(f"{source}: '{address.path}' is no path in a repository; give {FORM}")
    return address


def _page(source: str) -> tuple[str, str, str, str] | None:
    """Repository, kind, revision and path of a page, quoted; None for what is on another server."""
    if source[:8].lower() != "https://" and source[:7].lower() != "http://":
        return None
    parts = urlsplit(source)
    if parts.hostname not in _HOSTS:
        from huggingface_hub import constants

        if f"{parts.scheme}://{parts.netloc}" != constants.ENDPOINT:
            return None
    found = [part for part in parts.path.split("/") if part]
    kind, revision = [*found[2:4], "", ""][:2]
    return "/".join(found[:2]) if len(found) > 1 else "", kind, revision, "/".join(found[4:])

"""The headers of a GGUF that lies elsewhere, by HTTP range requests: never its data.

    hf://org/repo/path/x.gguf[@revision]     Hugging Face, with huggingface_hub's endpoint, token and session
    https://host/path/x.gguf                 any server; http:// too

A growing prefix is fetched until the header parses, 1 MiB at first, then twice as much each time
(R1's header has 5 MB, in 4 requests). A server that ignores ranges is read to the same place, and
the connection closed. The token goes to Hugging Face's endpoint only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from ...base.errors import SourceError
from ...base.version import __version__
from ...gguf.header import MAX_HEADER, Header, PrefixTooShortError, is_utf8, parse_header
from ...gguf.shards import read_set
from .gguf_file import GgufHeaders, joined

FIRST_BYTES = 1 << 20
_REMOTE = re.compile(r"(hf|https?)://", re.IGNORECASE)
_HF = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<early>[^/]+))?/(?P<folder>([^/]+/)*)(?P<name>[^/@]+)(@(?P<late>.+))?",
    re.IGNORECASE,
)
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_REFUSED = {
    401: "it needs a token; log in with `hf auth login`, or set HF_TOKEN",
    403: "access is refused; ask for it on the model's page, and check that the token may read it",
    404: "there is no such file, or it is private; check the name, and log in with `hf auth login` for a private one",
    416: "the file is empty",
    429: "too many requests; try again later",
}


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


def open_remote(source: str) -> GgufHeaders:
    """The checked headers of a GGUF elsewhere, of all shards of a split one. Raises SourceError."""
    place = _place(source)

    def read(name: str) -> Header:
        return _header(place, name)

    try:
        kvs, infos = joined(read_set(place.name, place.where, read))
    except FileNotFoundError:
        raise SourceError(f"{source}: {_REFUSED[404]}") from None
    return GgufHeaders(source, place.name.removesuffix(".gguf"), kvs, [info for _, info in infos])


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
        more, file_bytes = _fetch(where, url, len(prefix), wanted - len(prefix))
        prefix += more
        try:
            return parse_header(where, bytes(prefix), file_bytes)
        except PrefixTooShortError as e:
            wanted = min(MAX_HEADER, max(2 * len(prefix), e.needed))


def _fetch(where: str, url: str, start: int, n: int) -> tuple[bytes, int]:
    """At most `n` bytes of a file from `start` on, fewer at its end only, and the bytes it has in all."""
    with _get(where, url, {"Range": f"bytes={start}-{start + n - 1}", "Accept-Encoding": "identity"}) as answer:
        status, headers, chunks = answer
        if status == 404:
            raise FileNotFoundError
        if status not in (200, 206):
            why = _REFUSED.get(status, "try again later" if status >= 500 else "the server refuses it")
            raise SourceError(f"{where}: the server answers {status}: {why}")
        m = _RANGE.fullmatch(headers.get("Content-Range", ""))
        length = headers.get("Content-Length", "")
        if (status == 206 and (m is None or int(m[1]) != start)) or (status == 200 and not length.isdigit()):
            raise SourceError(
                f"{where}: the server does not say how long the file is (status {status}, Content-Range "
                f"{headers.get('Content-Range')!r}); download the file and give its path"
            )
        # a server that ignores the range (200) sends the file from its start on
        skip, file_bytes = (start, int(length)) if m is None or status == 200 else (0, int(m[2]))
        wanted = min(start + n, file_bytes) - start + skip
        got = bytearray()
        for chunk in chunks:
            got += chunk
            if len(got) >= wanted:
                break
    if len(got) < wanted:
        raise SourceError(f"{where}: the server sent {len(got):,} of {wanted:,} bytes and stopped; try again")
    return bytes(got[skip:wanted]), file_bytes


@contextmanager
def _get(where: str, url: str, headers: dict[str, str]) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """Status, headers and body of a URL, streamed; the connection is closed afterwards, however much was read.
    huggingface_hub's session is one of requests in its older releases, of httpx or httpx2 in its newer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    token = None if url.startswith(f"{constants.ENDPOINT}/") else False  # None: the one of `hf auth login`, if any
    headers = build_hf_headers(token=token, library_name="quantkit", library_version=__version__) | headers
    session: Any = get_session()
    package = sys.modules[type(session).__module__.partition(".")[0]]
    names = ("RequestException", "HTTPError", "StreamError", "InvalidURL")
    failures = tuple(getattr(package, name) for name in names if hasattr(package, name))
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        if callable(session.stream):
            with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
                yield answer.status_code, answer.headers, answer.iter_bytes()
        else:
            with session.get(url, headers=headers, timeout=timeout, stream=True) as answer:
                yield answer.status_code, answer.headers, answer.iter_content(1 << 16)
    except OfflineModeIsEnabled:
        raise SourceError(f"{where}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it") from None
    except FileNotFoundError:
        raise
    except (OSError, *failures) as e:
        raise SourceError(f"{where}: cannot be fetched: {e or type(e).__name__}") from None

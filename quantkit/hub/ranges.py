"""Bytes of a file elsewhere, by HTTP range, over huggingface_hub's session.

The token goes to Hugging Face's endpoint only: the session drops it where an answer sends it to another host. A body
that is cut short is gone on with where it ended; a server that ignores ranges is read to the same place, and the
connection closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..base.errors import SourceError
from ..base.version import __version__
from .patience import PassingError, failures_of_session, persist, refusal

_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def read(where: str, url: str, start: int, n: int) -> tuple[bytes, int]:
    """At most `n` bytes of a file from `start` on, fewer at its end only, and the bytes it has in all. Raises
    SourceError, and FileNotFoundError for a file that is not there."""
    got = bytearray()
    file_bytes = stream(where, url, start, n, got.extend)
    return bytes(got), file_bytes


def stream(where: str, url: str, start: int, n: int, put: Callable[[bytes], Any]) -> int:
    """The same in pieces, each given to `put` once and in order; returns the bytes the file has in all."""
    done, size = 0, 0

    def attempt() -> None:
        nonlocal done, size
        before = done
        try:
            with _get(url, start + done, n - done) as (status, headers, chunks):
                skip, size = _span(where, status, headers, start + done)
                wanted = min(start + n, size) - start - done
                for chunk in chunks:
                    piece = chunk[skip : skip + wanted]
                    skip = max(0, skip - len(chunk))
                    if piece:
                        put(piece)
                        done += len(piece)
                        wanted -= len(piece)
                    if wanted <= 0:
                        return
        except failures_of_session() as e:
            if done == before:
                raise
            raise PassingError(f"cannot be fetched: {e or type(e).__name__}", moved=True) from None
        if wanted > 0:
            short = f"the server sent {done:,} of {done + wanted:,} bytes and stopped; try again"
            raise PassingError(short, moved=done > before)

    persist(where, attempt)
    return size


def _span(where: str, status: int, headers: Any, start: int) -> tuple[int, int]:
    """How many bytes of a body are before `start`, and the bytes of the whole file."""
    if status == 404 and headers.get("x-error-code") in (None, "EntryNotFound"):
        raise FileNotFoundError
    if status not in (200, 206):
        raise refusal(where, status, headers)
    m = _RANGE.fullmatch(headers.get("Content-Range", ""))
    length = headers.get("Content-Length", "")
    if (status == 206 and (m is None or int(m[1]) != start)) or (status == 200 and not length.isdigit()):
        raise SourceError(
            f"{where}: the server does not say how long the file is (status {status}, Content-Range "
            f"{headers.get('Content-Range')!r}); download the file and give its path"
        )
    # a server that ignores the range (200) sends the file from its start on
    return (start, int(length)) if m is None or status == 200 else (0, int(m[2]))


@contextmanager
def _get(url: str, start: int, n: int) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """Status, headers and body of a URL, streamed; the connection is closed afterwards, however much was read."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    token = None if url.startswith(f"{constants.ENDPOINT}/") else False  # None: the one of `hf auth login`, if any
    headers = build_hf_headers(token=token, library_name="quantkit", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{start + n - 1}", "Accept-Encoding": "identity"}
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            yield answer.status_code, answer.headers, answer.iter_bytes()
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as answer:
            yield answer.status_code, answer.headers, answer.iter_content(1 << 16)

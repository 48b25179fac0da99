"""To try again what may go well next time: after 429 and 5xx as long as the server asks, after a broken connection.

What is tried raises `PassingError` for such a failure, or lets one of huggingface_hub's and its session's errors
through. What no patience helps becomes a SourceError in one sentence. Tries are bounded; one that got bytes
begins the count anew.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from ..base.errors import SourceError
from . import watching

T = TypeVar("T")
#: seconds to wait after each failure in a row, where the server asks for none; there is one try more
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
#: seconds that a server may ask for; the Hub counts requests by five minutes
LONGEST = 300
PASSING = (408, 425, 429, 500, 502, 503, 504)
REFUSED = {
    401: "it needs a token; log in with `hf auth login`, or set HF_TOKEN",
    403: "access is refused; ask for it on the model's page, and check that the token may read it",
    404: "there is no such file, or it is private; check the name, and log in with `hf auth login` for a private one",
    416: "the file is empty",
    429: "too many requests; try again later",
}
_thread = threading.local()
_RATE = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})")


class PassingError(Exception):
    """A failure that may pass: what it was, as a sentence without the place. `asked` seconds are to be waited, if the
    server said so; `moved` says that something came, so that the count of tries begins anew."""

    def __init__(self, says: str, asked: float | None = None, moved: bool = False) -> None:
        super().__init__(says)
        self.says, self.asked, self.moved = says, asked, moved


def persist(where: str, call: Callable[[], T]) -> T:
    """What `call` returns, at last. Raises SourceError when the tries are used up or cannot help."""
    failures = 0
    while True:
        try:
            return call()
        except SourceError:
            raise
        except PassingError as e:
            passing = e
        except Exception as e:
            if type(e) is FileNotFoundError:
                raise
            passing = _of(where, e)
        failures = 0 if passing.moved else failures + 1
        if failures > len(WAITS):
            raise SourceError(f"{where}: {passing.says}")
        wait = 0.0 if passing.moved else WAITS[failures - 1]
        if passing.asked is not None:
            wait = passing.asked
        if wait > LONGEST:
            raise SourceError(f"{where}: {passing.says}; it asks for a wait of {wait:,.0f} seconds: try again then")
        if wait >= 1:
            watching.note(f"{where}: {passing.says}; waiting {wait:,.0f} s, then trying again")
        stop: threading.Event | None = getattr(_thread, "stop", None)
        if stop is None:
            time.sleep(wait)
        elif stop.wait(wait):
            raise SourceError(f"{where}: {passing.says}")


def stop_by(event: threading.Event) -> None:
    """In this thread, waits end when `event` is set, and so do tries."""
    _thread.stop = event


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait: Retry-After as a number or a date, or the Hub's rate limit."""
    if m := _RATE.search(headers.get("ratelimit") or ""):
        return float(m[1])
    said = (headers.get("retry-after") or "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return None


def refusal(where: str, status: int, headers: Mapping[str, str]) -> Exception:
    """What an answer's status means: a PassingError, or a SourceError that says what to do."""
    says = f"the server answers {status}: {REFUSED.get(status, _other(status))}"
    if status in PASSING:
        return PassingError(says, asked_wait(headers))
    code = headers.get("x-error-code")
    if code == "GatedRepo":
        return SourceError(f"{where}: the model is gated; {_ask(where, status)}")
    if code == "RepoNotFound" or (status == 404 and code != "EntryNotFound" and "/" not in _below(where)):
        return SourceError(
            f"{where}: there is no such repository, or it is private; check the name, and log in with `hf auth login` "
            "for a private one"
        )
    if status == 404:
        says = REFUSED[404]
    return SourceError(f"{where}: {says}")


def _ask(where: str, status: int) -> str:
    """What opens a gated model."""
    from huggingface_hub import constants

    m = re.match(r"hf://([^/@]+/[^/@]+)", where)
    page = f"{constants.ENDPOINT}/{m[1]}" if m else "the model's page"
    if status == 401:
        return (
            f"accept its terms at {page}, and set HF_TOKEN to a token of that account, or log in with `hf auth login`"
        )
    return f"accept its terms at {page} with the account whose token is in HF_TOKEN, or wait until access is granted"


def _below(where: str) -> str:
    """What follows the repository in an address of hf://; elsewhere all of it."""
    return re.sub(r"^hf://[^/]+/[^/]+/?", "", where)


def _other(status: int) -> str:
    return "try again later" if status >= 500 else "the server refuses it"


def _of(where: str, e: Exception) -> PassingError:
    """An error of huggingface_hub or of its session as one that may pass. Raises SourceError for others of theirs, and
    the error itself where it is nobody's."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    if isinstance(e, LocalEntryNotFoundError) and isinstance(e.__cause__, Exception):
        e = e.__cause__
    if isinstance(e, OfflineModeIsEnabled):
        raise SourceError(f"{where}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it") from None
    if isinstance(e, RevisionNotFoundError):
        raise SourceError(f"{where}: the repository has no such revision; check the name") from None
    if isinstance(e, HFValidationError):
        raise SourceError(f"{where}: {e}") from None
    answer: Any = getattr(e, "response", None)
    if answer is not None and isinstance(getattr(answer, "status_code", None), int):
        said = refusal(where, answer.status_code, answer.headers)
        if isinstance(said, PassingError):
            return said
        raise said from None
    if isinstance(e, failures_of_session()) or (isinstance(e, OSError) and e.errno is None):
        return PassingError(f"cannot be fetched: {str(e).split(chr(10))[0] or type(e).__name__}")
    raise e


def failures_of_session() -> tuple[type[Exception], ...]:
    """What huggingface_hub's session raises: it is one of requests in older releases, of httpx or httpx2 in newer."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    package = sys.modules[type(get_session()).__module__.partition(".")[0]]
    names = ("RequestException", "HTTPError", "StreamError", "InvalidURL")
    return tuple(getattr(package, name) for name in names if hasattr(package, name))

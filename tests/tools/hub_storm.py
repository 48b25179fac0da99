"""A spell of bad weather at the local server of the Hub's API (hub_server.py): so many faults, by a seed, on the
requests of somebody who publishes.

Every third request or so meets one of the faults that can happen to its kind. Some end a run at once (a token that is
refused), and seven in a row to the same request are more than its tries: then the command is given again.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase

from hub_server import Fault, Hub

_HIT, _IN_A_ROW = 0.35, 7


def _busy(status: int, seconds: int) -> Callable[[], Fault]:
    return lambda: Fault(status=status, headers={"Retry-After": str(seconds)})


def _slow() -> None:
    threading.Event().wait(0.05)  # not time.sleep, which a test may have taken away


_ANY = {
    "429, Retry-After": _busy(429, 1),
    "500": lambda: Fault(status=500),
    "502, Retry-After": _busy(502, 2),
    "503, Retry-After": _busy(503, 1),
    "504": lambda: Fault(status=504),
    "slow": lambda: Fault(do=_slow),
    "cut before the answer": lambda: Fault(take=0),
    "done, the answer lost": lambda: Fault(cut=0),
}
_REFUSED = {"the token refused": lambda: Fault(status=401)}
_KINDS: list[tuple[str, str, dict[str, Callable[[], Fault]]]] = [
    ("GET", "/api/models/*", _ANY),
    ("POST", "/api/repos/create", _ANY),
    ("POST", "*/preupload/*", _ANY | _REFUSED),
    ("POST", "*/objects/batch", _ANY | _REFUSED | {"seven in a row": lambda: Fault(status=503)}),
    ("POST", "*/objects/verify", _ANY | _REFUSED),
    ("POST", "/complete/*", _ANY | {"a part refused": lambda: Fault(status=400)}),
    (
        "POST",
        "*/commit/*",
        _ANY | _REFUSED | {"a conflict": lambda: Fault(status=412), "the commit refused": lambda: Fault(status=403)},
    ),
    (
        "PUT",
        "/lfs/*",
        _ANY
        | {
            "cut in the upload": lambda: Fault(take=3_000),
            "the address run out": lambda: Fault(status=403),
            "wrong ETag": lambda: Fault(headers={"ETag": '"00000000000000000000000000000000"'}),
            "no ETag": lambda: Fault(headers={"ETag": ""}),
        },
    ),
]


class Storm:
    """What goes wrong at `hub` from now on, `n` times in all. `counts` says what did, by kind."""

    def __init__(self, hub: Hub, n: int, seed: int = 1) -> None:
        self.left, self.counts = n, Counter[str]()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._row: tuple[str, int] = ("", 0)
        hub.faults_for = self._faults  # type: ignore[method-assign]

    def _faults(self, host: str, method: str, path: str) -> list[Fault]:
        with self._lock:
            kinds = next((k for m, pattern, k in _KINDS if m == method and fnmatchcase(path, pattern)), None)
            if self.left <= 0 or kinds is None:
                return []
            name, n = self._row
            if n and path.endswith("/batch"):
                self._row = (name, n - 1)
            elif self._random.random() < _HIT:
                name = self._random.choice(list(kinds))
                self._row = (name, _IN_A_ROW - 1) if name == "seven in a row" else ("", 0)
            else:
                return []
            self.left -= 1
            self.counts[name] += 1
            return [kinds[name]()]

"""A local server that speaks the Hub's API as far as huggingface_hub uses it, with faults on demand and a log.

    hub = Hub()
    first = hub.add("org/repo", folder)            a commit on main; the files stay where they are, do not change them
    hub.fail(Fault("*.safetensors", cut=1000))     the next request for one ends after 1,000 bytes
    run(..., env=hub.environment(home))            or the fixture `hub`, which sets it for this process too
    hub.log                                        all requests so far: host, method, path, range, whether with a token
    hub.close()

Files of LFS are redirected to a second host ("cdn": localhost, another port), by a signed address; a token
that comes there is answered with 400 and is in the log. There is no Xet. What can be asked is a list of routes:
those for reading are in hub_reading.py; a module that adds others appends to `hub.routes`.

    python tests/tools/hub_server.py org/repo=FOLDER …     to try things by hand: prints what to set
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import Blob, Repo, files_of

TOKEN = "hf_theTokenThatNobodyElseMaySee"
CHUNK = 1 << 16


class Request(NamedTuple):
    """What a client asks. `path` is quoted still, without the query."""

    host: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: Callable[[], bytes]
    """the whole body, to be read at most once"""

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None


@dataclass
class Reply:
    """An answer: `body`, or the bytes of `blob`, of which ranges can be asked."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    blob: Blob | None = None


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


def refused(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Reply:
    """An error as the Hub has them; `code` is RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo or empty."""
    said = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return as_json({"error": message}, status, said | (headers or {}))


Route = tuple[str, "re.Pattern[str]", Callable[["Hub", Request, "re.Match[str]"], Reply]]


@dataclass
class Fault:
    """What goes wrong with requests whose path (unquoted, e.g. /org/repo/resolve/main/x or, on the second host,
    /org/repo/x) fits the pattern: the next `times` of them, after `after` that go well."""

    path: str = "*"
    times: int = 1
    after: int = 0
    method: str = "*"
    host: str = "*"
    """hub, cdn, or both"""
    status: int = 0
    """answered instead, with `headers`, such as {"Retry-After": "1"}; 404 says that there is no such file"""
    headers: dict[str, str] = field(default_factory=dict)
    """without a status, in place of the answer's own"""
    take: int | None = None
    """the connection is closed after so many bytes of the request's body, and nothing is done"""
    cut: int | None = None
    """the connection is closed after so many bytes of the body"""
    wrong: int | None = None
    """the byte of the body at this place is another; of a shorter body the last"""
    pause: float = 0.0
    """seconds before the answer"""
    do: Callable[[], object] | None = None
    """called before the answer, for example to move a branch"""
    hits: int = 0
    """how often it has happened"""

    def fits(self, host: str, method: str, path: str) -> bool:
        return fnmatchcase(path, self.path) and fnmatchcase(method, self.method) and fnmatchcase(host, self.host)


def passing_faults(shard: Callable[..., Fault], n_shards: int) -> list[Fault]:
    """Faults of each shard, numbered from 1, that pass when it is asked for again; `shard` makes one of a shard."""
    now = {"Retry-After": "0"}
    return [
        fault
        for n in range(1, n_shards + 1)
        for fault in (
            shard(n, status=429, headers=now, times=2),
            shard(n, cut=1000, after=3, times=2),
            shard(n, status=503, headers=now, after=5),
            shard(n, wrong=30_000, after=6),
        )
    ]


@dataclass
class Logged:
    """A request that came, and what was sent."""

    host: str
    method: str
    path: str
    range: str | None
    token: bool
    status: int = 0
    sent: int = 0
    """bytes of the body"""


class Hub:
    """The two hosts. `latency` is waited before each answer, in seconds; `page` entries make a page of a tree; bodies
    share a line of `rate` bytes a second, if it is not 0."""

    def __init__(self, store: Path | None = None) -> None:
        from hub_reading import ROUTES

        self.repos: dict[str, Repo] = {}
        self.routes: list[Route] = list(ROUTES)
        self.tokens = {TOKEN}
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.latency = 0.0
        self.page = 1000
        self.rate = 0.0
        self.line = threading.Lock()
        self.store = store
        """where a module that takes uploads keeps them"""
        self.lock = threading.RLock()
        self._servers = {"hub": _Server(self, "hub"), "cdn": _Server(self, "cdn")}
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            for server in self._servers.values()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers['hub'].server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self._servers['cdn'].server_address[1]}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What makes a child process take this server for Hugging Face, with its cache below `home`."""
        said = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return said | {"HF_TOKEN": token or "", "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"}

    def add(
        self,
        repo: str,
        folder: Path,
        branch: str = "main",
        title: str = "a commit",
        sha256: Callable[[Path], str] | None = None,
    ) -> str:
        """Commit a folder as all there is, to a repository that is made if need be; its id."""
        with self.lock:
            held = self.repos.setdefault(repo, Repo(repo))
            return held.commit(branch, files_of(folder, sha256), title).id

    def fail(self, *faults: Fault) -> None:
        with self.lock:
            self.faults.extend(faults)

    def sent(self, pattern: str = "*") -> int:
        """Bytes of bodies sent for paths that fit."""
        return sum(one.sent for one in list(self.log) if fnmatchcase(one.path, pattern))

    def asked(self, pattern: str = "*", method: str = "GET") -> list[Logged]:
        """The requests for paths that fit."""
        return [one for one in list(self.log) if one.method == method and fnmatchcase(one.path, pattern)]

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
        for thread in self._threads:
            thread.join()
        for server in self._servers.values():
            server.server_close()

    def reply(self, request: Request) -> Reply:
        """The answer of the first route that fits."""
        if request.host == "cdn" and request.headers.get("Authorization"):
            return refused(400, "", "a token was sent to a host that must not see it")
        for host_method, pattern, handler in self.routes:
            host, _, methods = host_method.partition(" ")
            found = pattern.fullmatch(request.path)
            if host == request.host and request.method in methods.split("|") and found:
                return handler(self, request, found)
        return refused(404, "", f"nothing is at {request.path}")

    def faults_for(self, host: str, method: str, path: str) -> list[Fault]:
        """Those that happen to a request now."""
        happen = []
        with self.lock:
            for fault in self.faults:
                if not fault.fits(host, method, path) or fault.times <= 0:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                fault.hits += 1
                happen.append(fault)
        return happen


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, hub: Hub, host: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.host = hub, host

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, host = self.server.hub, self.server.host
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        logged = Logged(host, self.command, path, self.headers.get("Range"), "Authorization" in self.headers)
        hub.log.append(logged)
        faults = hub.faults_for(host, self.command, path)
        time.sleep(hub.latency + sum(fault.pause for fault in faults))
        for fault in faults:
            if fault.do is not None:
                fault.do()
        unread = [int(self.headers.get("Content-Length") or 0)]
        take = next((fault.take for fault in faults if fault.take is not None), None)
        if take is not None:
            self.rfile.read(min(take, unread[0]))
            self.close_connection = True
            return

        def body() -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                return b"".join(self._chunks())
            return self.rfile.read(unread.pop()) if unread else b""

        status = next((fault for fault in faults if fault.status), None)
        request = Request(host, self.command, parts.path, parse_qs(parts.query), self.headers, body)
        if status is not None:
            code = "EntryNotFound" if status.status == 404 else ""
            reply = refused(status.status, code, "a fault of the test", status.headers)
        else:
            with hub.lock:
                reply = hub.reply(request)
            for fault in faults:
                reply.headers |= fault.headers
        if unread and unread[0]:
            self.close_connection = True  # a body that nobody read
        self._send(reply, logged, faults)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (names of http.server)

    def _chunks(self) -> Iterator[bytes]:
        while n := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, reply: Reply, logged: Logged, faults: list[Fault]) -> None:
        first, length, headers = 0, len(reply.body), dict(reply.headers)
        if reply.blob is not None:
            length = reply.blob.size
            headers["Accept-Ranges"] = "bytes"
            m = re.fullmatch(r"bytes=(\d+)-(\d*)", logged.range or "")
            if m and int(m[1]) >= length:
                reply = Reply(416, headers={"Content-Range": f"bytes */{length}"})
                length, headers = 0, reply.headers
            elif m:
                first, last = int(m[1]), min(int(m[2] or length), length - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{length}"
                reply = Reply(206, headers=headers, blob=reply.blob)
                length = last + 1 - first
        logged.status = reply.status
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = next((fault.cut for fault in faults if fault.cut is not None), None)
        wrong = [min(fault.wrong, length - 1) for fault in faults if fault.wrong is not None]
        with suppress(OSError):
            for at, chunk in _body(reply, first, min(length, length if cut is None else cut)):
                for place in wrong:
                    if at <= place < at + len(chunk):
                        chunk[place - at] ^= 0x55
                if self.server.hub.rate:
                    with self.server.hub.line:
                        time.sleep(len(chunk) / self.server.hub.rate)
                logged.sent += len(chunk)  # before: the client may be done before us
                self.wfile.write(chunk)
        if cut is not None:
            self.close_connection = True


def _body(reply: Reply, first: int, length: int) -> Iterator[tuple[int, bytearray]]:
    """The pieces of a body, each with its place in it."""
    if reply.blob is None:
        yield 0, bytearray(reply.body[:length])
        return
    with open(reply.blob.place, "rb") as file:
        file.seek(first)
        for at in range(0, length, CHUNK):
            yield at, bytearray(file.read(min(CHUNK, length - at)))


if __name__ == "__main__":
    import sys

    served = Hub()
    for given in sys.argv[1:]:
        name, _, where = given.partition("=")
        print(f"{name}: commit {served.add(name, Path(where).absolute())}")
    print(f"export HF_ENDPOINT={served.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1; Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    served.close()

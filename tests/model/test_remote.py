"""Headers by HTTP range: a local server counts the bytes it sends; huggingface_hub and its sessions are real."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import requests
from conftest import Run
from factory import gguf_file
from huggingface_hub import constants

from quantkit.base.errors import SourceError
from quantkit.gguf.header import I32, KV, STRING, U16, U32, kv, kv_array
from quantkit.hub import patience
from quantkit.model.open import open_model
from quantkit.model.sources.gguf_file import open_gguf
from quantkit.model.sources.remote import FIRST_BYTES, is_remote, open_remote

ARCH = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]
DATA = 9 << 20
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves a folder; what it does wrong is set by the test."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = True
        self.status = 0
        self.stop_after: int | None = None
        self.content_range: str | None = None
        self.sent = 0
        self.seen: list[tuple[str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        if self.path.startswith("/api/models/"):  # which commit it is
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in hub.folder.iterdir() if p.is_file()]
            said = json.dumps({"id": "org/repo", "sha": COMMIT, "siblings": files}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            return
        if self.path.startswith("/api/"):  # huggingface_hub's own business
            self.send_error(404)
            return
        hub.seen.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        path = hub.folder / self.path.partition("?")[0].rpartition("/")[2]
        if hub.status or not path.exists():
            self.send_response(hub.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        blob = path.read_bytes()
        m = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if m and hub.ranges:
            first, last = int(m[1]), min(int(m[2]), len(blob) - 1)
            if first >= len(blob):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = blob[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", hub.content_range or f"bytes {first}-{last}/{len(blob)}")
        else:
            body = blob
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: hub.stop_after]
        try:
            for at in range(0, len(body), 1 << 16):
                hub.sent += len(body[at : at + (1 << 16)])  # before: the client may be done before us
                self.wfile.write(body[at : at + (1 << 16)])
        except OSError:  # the client has what it wanted
            pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that huggingface_hub takes for Hugging Face."""
    server = Hub(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()


@pytest.fixture
def old_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """huggingface_hub's session as releases before 1.0 have it."""
    with requests.Session() as session:
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
        yield


def model(folder: Path, name: str = "x.gguf", keys: list[KV] | None = None) -> Path:
    """9 MB of data behind a small header."""
    return gguf_file(folder / name, {"blk.0.ffn_up.weight": ((256, DATA // 1024), "F32", bytes(DATA))}, keys or ARCH)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(SourceError) as e:
        call()
    return str(e.value)


@pytest.mark.parametrize("session", ["new", "old"])
@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("hf://org/repo/x.gguf", "/org/repo/resolve/main/x.gguf"),
        ("hf://org/repo/Q4/deep/x.gguf@v1.0", "/org/repo/resolve/v1.0/Q4/deep/x.gguf"),
        ("hf://org/repo@refs%2Fpr%2F1/x.gguf", "/org/repo/resolve/refs%2Fpr%2F1/x.gguf"),
        ("URL/org/repo/resolve/main/x.gguf?download=true", "/org/repo/resolve/main/x.gguf?download=true"),
        ("URL/org/repo/blob/main/x.gguf", "/org/repo/resolve/main/x.gguf"),
    ],
)
def test_the_header_alone_is_fetched(
    hub: Hub, tmp_path: Path, source: str, path: str, session: str, request: pytest.FixtureRequest
) -> None:
    if session == "old":
        request.getfixturevalue("old_session")
    local = open_gguf(model(tmp_path))
    got = open_remote(source.replace("URL", hub.url))
    assert (got.kvs, got.infos, got.stem) == (local.kvs, local.infos, "x")
    assert hub.seen == [(path, f"bytes=0-{FIRST_BYTES - 1}", "Bearer hf_secret")]
    assert hub.sent == FIRST_BYTES < DATA


def test_a_longer_header_takes_more_requests_but_no_byte_twice(hub: Hub, tmp_path: Path) -> None:
    keys = [*ARCH, kv_array("tokenizer.ggml.tokens", STRING, [f"token {i:06d}" for i in range(150_000)])]
    local = open_gguf(model(tmp_path, keys=keys))
    assert open_remote("hf://org/repo/x.gguf").kvs == local.kvs
    assert [r for _, r, _ in hub.seen] == ["bytes=0-1048575", "bytes=1048576-2097151", "bytes=2097152-4194303"]
    assert hub.sent == 4 << 20


def test_one_huge_value_is_fetched_in_one_step(hub: Hub, tmp_path: Path) -> None:
    keys = [*ARCH, kv("general.description", STRING, "x" * (5 << 20))]
    local = open_gguf(model(tmp_path, keys=keys))
    assert open_remote("hf://org/repo/x.gguf").kvs == local.kvs
    assert len(hub.seen) == 3  # the value's end is known after the first, what follows it is not


@pytest.mark.parametrize("session", ["new", "old"])
def test_a_server_without_ranges_is_not_read_to_the_end(
    hub: Hub, tmp_path: Path, session: str, request: pytest.FixtureRequest
) -> None:
    if session == "old":
        request.getfixturevalue("old_session")
    data = 96 << 20  # beyond what the sockets' buffers could take
    local = open_gguf(gguf_file(tmp_path / "x.gguf", {"a.weight": ((256, data // 1024), "F32", bytes(data))}, ARCH))
    hub.ranges = False
    assert open_remote("hf://org/repo/x.gguf").infos == local.infos
    hub.shutdown()
    assert hub.sent < data // 2


def test_a_split_file_is_read_by_the_headers_of_all_shards(hub: Hub, tmp_path: Path) -> None:
    for no in (1, 2, 3):
        keys = [*(ARCH if no == 1 else []), kv("split.no", U16, no - 1), kv("split.count", U16, 3)]
        keys.append(kv("split.tensors.count", I32, 3))
        gguf_file(tmp_path / f"m-{no:05d}-of-00003.gguf", {f"blk.{no - 1}.a.weight": ((4,), "F32", bytes(16))}, keys)
    got = open_remote("hf://org/repo/m-00001-of-00003.gguf@dev")
    assert [i.name for i in got.infos] == ["blk.0.a.weight", "blk.1.a.weight", "blk.2.a.weight"]
    assert [p for p, _, _ in hub.seen] == [f"/org/repo/resolve/dev/m-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    assert refusal(lambda: open_remote("hf://org/repo/m-00001-of-00003.gguf@dev")) == (
        "hf://org/repo/m-00002-of-00003.gguf@dev: shard 2 of 3 is missing; get it and put it beside the first"
    )


def test_the_token_goes_to_the_endpoint_only(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url + "0")  # this host is now another one
    open_remote(f"{hub.url}/x.gguf")
    assert hub.seen == [("/x.gguf", "bytes=0-1048575", None)]


def test_other_commands_take_a_remote_source(hub: Hub, tmp_path: Path, quantkit: Run) -> None:
    model(tmp_path)
    catalogue = open_model("hf://org/repo/x.gguf")
    assert (catalogue.model, catalogue.source, len(catalogue.tensors)) == ("x", None, 1)
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    found = json.loads(quantkit("inspect", "hf://org/repo/x.gguf", "--json", env=env).stdout)
    assert (found["files"], found["stored"]) == (["hf://org/repo/x.gguf"], {"F32": {"tensors": 1, "bytes": DATA}})
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: r\narch: [deepseek2]\nfile_type: Q8_0\nrules:\n  - {match: "*", type: Q8_0, why: x}\n')
    assert quantkit("plan", "hf://org/repo/x.gguf", "-r", recipe, env=env).returncode == 0


@pytest.mark.parametrize(
    ("status", "what"),
    [
        (401, "the server answers 401: it needs a token; log in with `hf auth login`, or set HF_TOKEN"),
        (403, "the server answers 403: access is refused; ask for it on the model's page, and check that the token may "
              "read it"),
        (404, "there is no such file, or it is private; check the name, and log in with `hf auth login` for a private "
              "one"),
        (410, "the server answers 410: the server refuses it"),
        (429, "the server answers 429: too many requests; try again later"),
        (503, "the server answers 503: try again later"),
    ],
)  # fmt: skip
def test_a_server_that_refuses(hub: Hub, status: int, what: str) -> None:
    hub.status = status
    assert refusal(lambda: open_remote("hf://org/repo/x.gguf")) == f"hf://org/repo/x.gguf: {what}"


def test_files_that_are_no_model(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    (tmp_path / "empty.gguf").touch()
    whole = model(tmp_path).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:90])
    (tmp_path / "short.gguf").write_bytes(whole[:-100_000])
    assert refusal(lambda: open_remote("hf://org/repo/page.gguf")).endswith(
        "page.gguf: is a web page, not the file: download the file itself, not the page that shows it"
    )
    assert refusal(lambda: open_remote("hf://org/repo/empty.gguf")).endswith("answers 416: the file is empty")
    assert "but the file ends at 90; it is truncated" in refusal(lambda: open_remote("hf://org/repo/cut.gguf"))
    assert f"but the file ends at {len(whole) - 100_000:,}; the file is truncated" in refusal(
        lambda: open_remote("hf://org/repo/short.gguf")
    )


@pytest.mark.parametrize("session", ["new", "old"])
def test_a_connection_that_breaks(hub: Hub, tmp_path: Path, session: str, request: pytest.FixtureRequest) -> None:
    if session == "old":
        request.getfixturevalue("old_session")
    local = open_gguf(model(tmp_path))
    hub.stop_after = 7 << 16
    assert open_remote("hf://org/repo/x.gguf").infos == local.infos  # continued, from where it ended
    assert [r for _, r, _ in hub.seen][:2] == ["bytes=0-1048575", "bytes=458752-1048575"]
    hub.stop_after = 0
    hub.seen.clear()
    assert re.match(
        "hf://org/repo/x.gguf: (cannot be fetched: |the server sent 0 of 1,048,576 bytes)",
        refusal(lambda: open_remote("hf://org/repo/x.gguf")),
    )
    assert len(hub.seen) == 4


def test_a_server_that_hides_the_length(hub: Hub, tmp_path: Path) -> None:
    model(tmp_path)
    hub.content_range = "bytes 0-1048575/*"
    assert refusal(lambda: open_remote("hf://org/repo/x.gguf")) == (
        "hf://org/repo/x.gguf: the server does not say how long the file is (status 206, Content-Range "
        "'bytes 0-1048575/*'); download the file and give its path"
    )


@pytest.mark.parametrize("session", ["new", "old"])
def test_no_server(hub: Hub, session: str, request: pytest.FixtureRequest) -> None:
    if session == "old":
        request.getfixturevalue("old_session")
    assert refusal(lambda: open_remote("http://127.0.0.1:9/x.gguf")).startswith(
        "http://127.0.0.1:9/x.gguf: cannot be fetched: "
    )


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("hf://org/x.gguf", "is not hf://org/repo/file.gguf or hf://org/repo/file.gguf@revision"),
        ("hf://org/repo/model.safetensors", "is not hf://org/repo/file.gguf or hf://org/repo/file.gguf@revision"),
        ("hf://org/repo@a/x.gguf@b", "is not hf://org/repo/file.gguf or hf://org/repo/file.gguf@revision"),
        ("https://host/", "is not the address of a file.gguf"),
        ("https:///x.gguf", "is not the address of a file.gguf"),
    ],
)
def test_sources_that_are_no_address(source: str, what: str) -> None:
    assert is_remote(source)
    assert refusal(lambda: open_remote(source)) == f"{source}: {what}"


def test_what_is_not_remote() -> None:
    assert not any(map(is_remote, ["x.gguf", "/a/hf:/x.gguf", "org/repo", "hf:x.gguf", "deepseek-r1"]))


def test_on_the_command_line(hub: Hub, tmp_path: Path, quantkit: Run) -> None:
    """With HF_ENDPOINT as a user sets it; and HF_HUB_OFFLINE."""
    model(tmp_path)
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    done = quantkit("recipe", "from-gguf", "hf://org/repo/x.gguf", "--json", env=env)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["round_trip"] == {"tensors": 1, "bytes": DATA, "equal": True}
    assert "# cloned from hf://org/repo/x.gguf by" in made["recipe"]
    assert hub.sent == FIRST_BYTES
    done = quantkit("recipe", "diff", tmp_path / "x.gguf", "hf://org/repo/x.gguf", env=env)
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        0,
        f"x (layout as is): {tmp_path}/x.gguf -> hf://org/repo/x.gguf",
    )
    done = quantkit("recipe", "from-gguf", "hf://org/repo/x.gguf", env=env | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "error: hf://org/repo: HF_HUB_OFFLINE is set, so nothing is fetched; unset it\n"
    assert os.listdir(tmp_path) == ["x.gguf"]  # nothing is kept

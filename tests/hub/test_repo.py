"""Repositories on the Hub: the real client, a local server, and faults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Fault, Hub, Reply
from hypothesis import given
from hypothesis import strategies as st

from quantkit.base.errors import SourceError
from quantkit.hub import patience
from quantkit.hub.address import Address, is_hub, parse
from quantkit.hub.parallel import each
from quantkit.hub.patience import asked_wait
from quantkit.hub.repo import RemoteFile, Repo, open_repo
from quantkit.hub.watching import watched

HERE = Address("org/repo", None, "")
WEIGHTS = bytes(range(256)) * 2000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text('{"a": 1}')
    (made / "model.safetensors").write_bytes(WEIGHTS)
    (made / "sub" / "a b+c.txt").write_text("small")
    return made


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0,) * 5)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(SourceError) as e:
        call()
    assert TOKEN not in str(e.value)
    return str(e.value)


def opened(hub: Hub, folder: Path) -> Repo:
    hub.add("org/repo", folder)
    return open_repo(HERE)


def test_a_repository_is_its_files_at_one_commit(hub: Hub, folder: Path, tmp_path: Path) -> None:
    first = hub.add("org/repo", folder)
    repo = open_repo(HERE)
    assert (repo.name, repo.revision, repo.commit) == ("org/repo", None, first)
    assert {path: (f.size, f.sha256) for path, f in repo.files.items()} == {
        "config.json": (8, None),
        "model.safetensors": (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()),
        "sub/a b+c.txt": (5, None),
    }
    assert len(hub.asked("/api/models/*")) == 1
    assert repo.moved() is None
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"new" * 1000)
    second = hub.add("org/repo", other)
    assert repo.moved() == second
    # the commit it was opened at is what is read
    assert repo.read("model.safetensors", 254, 4) == b"\xfe\xff\x00\x01"
    assert open_repo(HERE).files["model.safetensors"].size == 3000
    assert open_repo(HERE._replace(revision=first)).commit == first
    assert [one for one in hub.log if one.host == "cdn"]
    assert not any(one.token for one in hub.log if one.host == "cdn")


def test_small_files_come_to_the_cache_and_whole_ones_anywhere(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repo = opened(hub, folder)
    assert repo.cached("config.json") is None
    snapshot = repo.small(["sub/a b+c.txt", "config.json"])
    assert snapshot.name == repo.commit
    assert (snapshot / "config.json").read_text() == '{"a": 1}'
    assert (snapshot / "sub" / "a b+c.txt").read_text() == "small"
    assert repo.cached("config.json") == snapshot / "config.json"
    n = len(hub.log)
    assert repo.small(["config.json"]) == snapshot
    assert len(hub.log) == n  # nothing is asked for what is there
    seen: list[int] = []
    repo.fetch("model.safetensors", tmp_path / "w.safetensors", seen.append)
    assert (tmp_path / "w.safetensors").read_bytes() == WEIGHTS
    assert (seen[-1], seen) == (len(WEIGHTS), sorted(seen))
    repo.fetch("config.json", tmp_path / "c.json")
    assert (tmp_path / "c.json").read_text() == '{"a": 1}'
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_fetch_goes_on_and_is_checked_as_a_whole(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repo, to = opened(hub, folder), tmp_path / "w"
    (tmp_path / "w.part").write_bytes(WEIGHTS[:300_000])
    repo.fetch("model.safetensors", to)
    assert to.read_bytes() == WEIGHTS
    assert [(one.range, one.sent) for one in hub.log if one.host == "cdn"] == [
        (f"bytes=300000-{len(WEIGHTS) - 1}", len(WEIGHTS) - 300_000)
    ]
    (tmp_path / "w.part").write_bytes(b"x" * 300_000)  # of something else: fetched anew, once
    repo.fetch("model.safetensors", to)
    assert to.read_bytes() == WEIGHTS
    (tmp_path / "w.part").write_bytes(WEIGHTS + b"more")
    repo.fetch("model.safetensors", to)
    assert to.read_bytes() == WEIGHTS


def test_wrong_bytes_never_become_the_file(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repo, to = opened(hub, folder), tmp_path / "w"
    hub.fail(Fault("/org/repo/*", host="cdn", wrong=77))
    repo.fetch("model.safetensors", to)
    assert to.read_bytes() == WEIGHTS  # by a second download
    to.unlink()
    hub.fail(Fault("/org/repo/*", host="cdn", wrong=77, times=2))
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    assert refusal(lambda: repo.fetch("model.safetensors", to)) == (
        "hf://org/repo/model.safetensors: what came twice is not what the repository has at commit "
        f"{repo.commit[:12]}: SHA-256 should be {sha}; try again later, or by another network"
    )
    assert not to.exists()
    hub.fail(Fault("*/config.json", wrong=3, times=9))
    assert "git's SHA-1 should be " in refusal(lambda: repo.small(["config.json"]))


def test_faults_that_pass(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add("org/repo", folder)
    now = {"Retry-After": "0"}
    hub.fail(Fault("/api/models/*", status=429, headers=now), Fault("/api/models/*", after=1, status=503))
    repo = open_repo(HERE)
    hub.fail(
        Fault("*/resolve/*", status=500, after=0),
        Fault("/org/repo/*", host="cdn", cut=100_000),
        Fault("/org/repo/*", host="cdn", cut=0, after=1),
        Fault("/org/repo/*", host="cdn", status=429, headers=now, after=2),
        Fault("/org/repo/*", host="cdn", status=502, after=3, times=2),
    )
    repo.fetch("model.safetensors", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == WEIGHTS
    assert all(fault.hits for fault in hub.faults)
    hub.fail(Fault("*config.json", status=429, headers=now, times=2), Fault("*config.json", cut=3, after=2))
    assert (repo.small(["config.json"]) / "config.json").read_text() == '{"a": 1}'
    # nothing of the size is asked twice: what came before the cut is kept
    assert hub.sent("/org/repo/model.safetensors") < len(WEIGHTS) + 1000


def test_faults_that_do_not_pass(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repo = opened(hub, folder)
    hub.fail(Fault("*/resolve/*", status=503, times=6))
    said = "hf://org/repo/model.safetensors: the server answers 503: try again later"
    assert refusal(lambda: repo.fetch("model.safetensors", tmp_path / "w")) == said
    hub.fail(Fault("*/resolve/*", status=429, headers={"Retry-After": "4000"}))
    assert refusal(lambda: repo.read("model.safetensors", 0, 1)) == (
        "hf://org/repo/model.safetensors: the server answers 429: too many requests; try again later; it asks for a "
        "wait of 4,000 seconds: try again then"
    )
    hub.fail(Fault("*/resolve/*", status=404))
    assert refusal(lambda: repo.read("model.safetensors", 0, 1)).endswith(
        "model.safetensors: there is no such file, or it is private; check the name, and log in with `hf auth login` "
        "for a private one"
    )
    hub.close()
    assert refusal(lambda: open_repo(HERE)).startswith("hf://org/repo: cannot be fetched: ")


def test_a_wait_is_told(hub: Hub, folder: Path) -> None:
    repo, told = opened(hub, folder), []

    class Watcher:
        def note(self, sentence: str) -> None:
            told.append(sentence)

        def step(self, what: str, done: int, total: int) -> None:
            pass

    hub.fail(Fault("*/resolve/*", status=429, headers={"Retry-After": "1"}))
    with watched(Watcher()):
        assert repo.read("model.safetensors", 0, 2) == b"\0\1"
    assert told == [
        "hf://org/repo/model.safetensors: the server answers 429: too many requests; try again later; waiting 1 s, "
        "then trying again"
    ]


def test_who_may_read(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = opened(hub, folder)
    hub.repos["org/repo"].gated = True
    ask = f"hf://org/repo/model.safetensors: the model is gated; accept its terms at {hub.url}/org/repo"
    assert refusal(lambda: repo.read("model.safetensors", 0, 1)) == (
        f"{ask} with the account whose token is in HF_TOKEN, or wait until access is granted"
    )
    none = (
        "hf://org/{}: there is no such repository, or it is private; check the name, and log in with `hf auth login` "
        "for a private one"
    )
    assert refusal(lambda: open_repo(HERE._replace(repo="org/absent"))) == none.format("absent")
    assert refusal(lambda: open_repo(HERE._replace(revision="v9"))) == (
        "hf://org/repo@v9: the repository has no such revision; check the name"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal(lambda: open_repo(HERE)) == (
        "hf://org/repo: the server answers 401: it needs a token; log in with `hf auth login`, or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "")
    assert refusal(lambda: repo.read("model.safetensors", 0, 1)) == (
        f"{ask}, and set HF_TOKEN to a token of that account, or log in with `hf auth login`"
    )
    hub.repos["org/repo"].private = True
    assert refusal(lambda: open_repo(HERE)) == none.format("repo")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(lambda: open_repo(HERE)) == ("hf://org/repo: HF_HUB_OFFLINE is set, so nothing is fetched; unset it")


def test_no_token_goes_anywhere_else(
    hub: Hub, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not to the second host, with faults on the way too; not to what is printed or logged; not into a file."""
    caplog.set_level("DEBUG")
    hub.fail(
        Fault("/org/repo/*", host="cdn", cut=1000, times=2),
        Fault("*", status=500, after=3, times=2),
        Fault("/org/repo/*", host="cdn", wrong=9, after=3),
    )
    hub.add("org/repo", folder)
    repo = open_repo(HERE)
    repo.small(["config.json", "model.safetensors"])
    repo.fetch("model.safetensors", tmp_path / "w")
    assert repo.read("model.safetensors", 0, 1) == b"\0"
    assert any(one.token for one in hub.log)
    assert not any(one.token for one in hub.log if one.host == "cdn")
    assert not any(one.status == 400 for one in hub.log)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    seen = capfd.readouterr()
    assert TOKEN not in seen.out + seen.err + caplog.text


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("hf://org/repo", Address("org/repo", None, "")),
        ("HF://org/repo/", Address("org/repo", None, "")),
        ("hf://org/repo@v1.0", Address("org/repo", "v1.0", "")),
        ("hf://org/repo@refs%2Fpr%2F1/a/b.gguf", Address("org/repo", "refs/pr/1", "a/b.gguf")),
        ("hf://org/repo/a/b.gguf@dev", Address("org/repo", "dev", "a/b.gguf")),
        ("https://huggingface.co/org/repo", Address("org/repo", None, "")),
        ("https://hf.co/org/repo/?library=x#files", Address("org/repo", None, "")),
        ("https://huggingface.co/org/repo/tree/main", Address("org/repo", "main", "")),
        ("https://huggingface.co/org/repo/tree/main/a%20b", Address("org/repo", "main", "a b")),
        ("https://huggingface.co/org/repo/blob/refs%2Fpr%2F1/x.gguf", Address("org/repo", "refs/pr/1", "x.gguf")),
    ],
)
def test_addresses(source: str, address: Address) -> None:
    assert is_hub(source)
    assert parse(source) == address


FORMS = "hf://org/repo, hf://org/repo@revision or hf://org/repo/file.gguf"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf://org", f"is not {FORMS}"),
        ("hf://org/repo@a/x.gguf@b", f"is not {FORMS}"),
        ("hf://datasets/org/repo", f"datasets hold no models; give {FORMS}"),
        ("hf://org/re po", f"'org/re po' is no name of a repository; give {FORMS}"),
        ("hf://org/repo/a/../b", f"'a/../b' is no path in a repository; give {FORMS}"),
        ("https://huggingface.co/org", f"is not the page of a model or of a file; give {FORMS}"),
        ("https://huggingface.co/org/repo/discussions", f"is not the page of a model or of a file; give {FORMS}"),
        ("https://huggingface.co/datasets/repo", f"datasets hold no models; give {FORMS}"),
    ],
)
def test_what_is_no_address(source: str, says: str) -> None:
    assert is_hub(source)
    assert refusal(lambda: parse(source)) == f"{source}: {says}"


def test_what_is_elsewhere() -> None:
    assert not any(map(is_hub, ["org/repo", "https://example.org/x.gguf", "hf:/org/repo", "/a/hf:/x", "https://"]))


_NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True)
_PART = st.text("abc XYZ0+#%é-_", min_size=1, max_size=8)


@given(_NAME, _NAME, st.none() | st.from_regex(r"[a-z0-9][a-z0-9./-]{0,9}[a-z]", fullmatch=True), st.lists(_PART))
def test_an_address_is_read_back_as_it_is_written(org: str, name: str, revision: str | None, parts: list[str]) -> None:
    address = Address(f"{org}/{name}", revision, "/".join(parts))
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], wait: float | None) -> None:
    assert asked_wait(headers) == wait


def test_hashes() -> None:
    file = RemoteFile(3, None, "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f")
    digest = file.digest()
    digest.update(b"abc")
    assert digest.hexdigest() == file.expected  # as `git hash-object` has it


def answer(hub: Hub, path: str, reply: Reply) -> None:
    """From now on the server answers so."""
    hub.routes.insert(0, ("hub GET", re.compile(path), lambda hub, request, m: reply))


GOOD = {"rfilename": "a.gguf", "size": 3, "blobId": "0" * 40}
LFS = {"sha256": "0" * 64, "size": 3, "pointerSize": 134}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>log in</html>", "Expecting value: line 1 column 1 (char 0)"),
        (b"[]", ""),
        (b'{"id": "org/repo"}', ""),
        ({"sha": "main", "siblings": []}, "no commit"),
        ({"siblings": [{**GOOD, "rfilename": "../x"}]}, "a file is called '../x'"),
        ({"siblings": [{**GOOD, "rfilename": "/etc/x"}]}, "a file is called '/etc/x'"),
        ({"siblings": [{**GOOD, "rfilename": "a\\b"}]}, "a file is called 'a\\\\b'"),
        ({"siblings": [{**GOOD, "rfilename": "a\x1b[2J"}]}, "a file is called 'a\\x1b[2J'"),
        ({"siblings": [{**GOOD, "size": -1}]}, "no size or hash of 'a.gguf'"),
        ({"siblings": [{**GOOD, "size": "3"}]}, "no size or hash of 'a.gguf'"),
        ({"siblings": [{**GOOD, "lfs": {**LFS, "sha256": "x"}}]}, "no size or hash of 'a.gguf'"),
    ],
)
def test_a_server_that_is_no_hub(hub: Hub, body: bytes | dict[str, Any], why: str) -> None:
    if isinstance(body, dict):
        body = json.dumps({"id": "org/repo", "sha": "0" * 40} | body).encode()
    answer(hub, "/api/models/.*", Reply(body=body, headers={"Content-Type": "application/json"}))
    said = refusal(lambda: open_repo(HERE))
    assert said.startswith("hf://org/repo: the server's answer is not one of the Hub (")
    assert said.endswith("); check HF_ENDPOINT")
    assert why in said


def test_a_file_that_is_not_of_the_size_the_list_has(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repo = opened(hub, folder)
    answer(hub, ".*/resolve/.*", Reply(body=b"short", headers={"X-Repo-Commit": repo.commit, "ETag": '"x"'}))
    assert refusal(lambda: repo.fetch("model.safetensors", tmp_path / "w")) == (
        f"hf://org/repo/model.safetensors: the server has 5 bytes, the repository says {len(WEIGHTS):,} at commit "
        f"{repo.commit[:12]}; try again later"
    )


def test_who_waits_is_woken_when_another_has_failed(hub: Hub, folder: Path) -> None:
    repo = opened(hub, folder)
    hub.fail(
        Fault("*/config.json", pause=0.5, status=404),
        Fault("*/model.safetensors", status=429, headers={"Retry-After": "200"}),
    )
    assert "there is no such file" in refusal(
        lambda: list(each(lambda path: repo.read(path, 0, 1), ["config.json", "model.safetensors"]))
    )

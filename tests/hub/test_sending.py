"""Publishing to the local server that speaks the Hub's API, through the real client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import factory
import pytest
from conftest import Run
from hub_server import TOKEN, Fault, Hub
from hub_uploads import Uploads

from quantkit.base.errors import OutputError
from quantkit.gguf.header import STRING, U32, kv
from quantkit.hub import patience
from quantkit.hub.address import Address
from quantkit.hub.repo import open_repo
from quantkit.hub.sending import Item, Sent, Wish, send

ME = Address("me/Tiny", None, "")
KVS = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]
BIG = [bytes(range(256)) * 3000, bytes(reversed(range(256))) * 9000, b"q" * 1000]


class Quiet:
    """Hears everything, and keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def hashed(self, item: Item, n: int) -> None:
        pass

    def sending(self, item: Item) -> None:
        pass

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


class Scene(NamedTuple):
    hub: Hub
    uploads: Uploads
    items: list[Item]

    def send(self, items: Sequence[Item] | None = None, told: Quiet | None = None, **wish: object) -> Sent:
        asked = Wish(**({"to": ME} | wish))  # type: ignore[arg-type]
        return send(self.items if items is None else items, asked, told or Quiet())

    def refusal(self, items: Sequence[Item] | None = None, **wish: object) -> str:
        with pytest.raises(OutputError) as e:
            self.send(items, None, **wish)
        assert TOKEN not in str(e.value)
        assert "\n" not in str(e.value)
        return str(e.value)

    def with_other(self, name: str, content: bytes) -> list[Item]:
        return [Item(name, content) if item.name == name else item for item in self.items]


@pytest.fixture
def site(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(patience, "WAITS", (0.0,) * 5)
    folder = tmp_path / "mine"
    folder.mkdir()
    items = [Item("README.md", b"---\nlicense: mit\n---\n# Tiny\n")]
    for no, data in enumerate(BIG):
        path = folder / f"m-{no + 1:05d}-of-00003.gguf"
        path.write_bytes(data)
        items.append(Item(path.name, path))
    path = folder / "m.json"
    path.write_text('{"a": 1}')
    return Scene(hub, Uploads(hub), [*items, Item(path.name, path)])


def content(item: Item) -> bytes:
    return item.content if isinstance(item.content, bytes) else item.content.read_bytes()


def assert_published(site: Scene, items: Sequence[Item], folder: Path, to: Address = ME) -> None:
    """What is fetched by the reader that checks hashes is what was sent."""
    repo = open_repo(to)
    assert set(repo.files) == {".gitattributes", *(item.name for item in items)}
    folder.mkdir()
    for item in items:
        repo.fetch(item.name, folder / item.name)
        assert (folder / item.name).read_bytes() == content(item)


def test_published_and_read_back(site: Scene, tmp_path: Path) -> None:
    done = site.send()
    assert done.sent == tuple(item.name for item in site.items)
    assert (done.skipped, done.kept, done.url) == ((), (), f"{site.hub.url}/me/Tiny")
    assert site.hub.repos["me/Tiny"].private
    assert [c.title for c in site.hub.repos["me/Tiny"].commits.values()] == [
        "initial commit",
        "Publish m-00001-of-00003.gguf and 4 more",
    ]
    assert sum(n for _, n in site.uploads.put) == sum(map(len, BIG))
    assert len(site.uploads.put) > len(BIG)  # one in parts
    assert_published(site, site.items, tmp_path / "back")
    again = site.send()
    assert again == Sent(done.commit, done.url, (), tuple(i.name for i in site.items), ())
    assert sum(n for _, n in site.uploads.put) == sum(map(len, BIG))


def test_no_token_comes_to_another_host(site: Scene) -> None:
    site.send()
    assert any(one.host == "cdn" and one.method == "PUT" for one in site.hub.log)
    assert not any(one.token for one in site.hub.log if one.host == "cdn")


def test_other_content_is_replaced_only_if_asked(site: Scene, tmp_path: Path) -> None:
    site.send()
    name = site.items[3].name
    for other in (b"r" * 1000, b"longer" * 1000):
        changed = site.with_other(name, other)
        before = len(site.uploads.put)
        assert site.refusal(changed) == (
            f"hf://me/Tiny: has {name} already, with other content; give --force to replace it, or another repository"
        )
        assert len(site.uploads.put) == before
    assert "has m.json already" in site.refusal(site.with_other("m.json", b'{"a": 2}'))
    readme = site.with_other("README.md", b"# Mine\n")
    assert site.send(readme).kept == ("README.md",)
    changed = [*readme[:3], Item(name, b"r" * 1000), *readme[4:]]
    assert site.send(changed, force=True).sent == ("README.md", name)
    assert_published(site, changed, tmp_path / "back")


def test_a_branch_and_who_may_see_it(site: Scene, tmp_path: Path) -> None:
    to = ME._replace(revision="try/one")
    site.send(site.items[:2], public=True, to=to)
    repo = site.hub.repos["me/Tiny"]
    assert not repo.private
    assert set(repo.branches) == {"main", "try/one"}
    assert len(repo.branches["main"]) == 1
    assert_published(site, site.items[:2], tmp_path / "back", to)
    assert site.refusal() == "hf://me/Tiny: the repository is public; give --public to publish there all the same"
    site.send(public=True)
    repo.private = True
    told = Quiet()
    site.send(told=told, public=True)
    assert told.notes == ["hf://me/Tiny is private and stays so; its settings on the Hub change that"]


def broken() -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_what_passes(
    site: Scene, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """503 and connections that break, at each kind of request; in huggingface_hub's own waits no second is lost."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    asked = {
        "POST": ("/api/repos/create", "/api/models/*/preupload/*", "*/batch", "*/verify", "/complete/*", "*/commit/*"),
        "PUT": ("/lfs/*",),
        "GET": ("/api/models/me/Tiny",),
    }[method]
    faults = [Fault(path, status=503, method=method) for path in asked]
    faults += [Fault(path, do=broken, method=method, after=1) for path in asked if path != "/api/repos/create"]
    if method == "PUT":
        faults += [Fault("/lfs/*", status=403, method="PUT", after=2), Fault("/lfs/*", cut=0, after=3)]
    site.hub.fail(*faults)
    site.send()
    assert_published(site, site.items, tmp_path / "back")
    assert len(site.hub.repos["me/Tiny"].commits) == 2
    missed = [fault.path for fault in faults if not fault.hits]
    assert missed == [], missed
    assert capfd.readouterr() == ("", "")  # no signed address, no token


def test_the_answer_to_the_commit_is_lost(site: Scene, tmp_path: Path) -> None:
    """It was made, and is not made twice."""
    site.hub.fail(Fault("*/commit/main", cut=5))
    site.send()
    assert_published(site, site.items, tmp_path / "back")
    assert len(site.hub.repos["me/Tiny"].commits) == 2


def test_a_commit_in_between(site: Scene, tmp_path: Path) -> None:
    site.send(site.items[:2])
    repo = site.hub.repos["me/Tiny"]

    def move() -> None:
        repo.commit("main", repo.at("main").files, "somebody else's")  # type: ignore[union-attr]

    site.hub.fail(Fault("*/batch", do=move))
    says = site.refusal()
    last = repo.branches["main"][-1]
    assert says == (
        f"hf://me/Tiny: has got commit {last[:12]} meanwhile; give the same command again, which sends nothing twice"
    )
    n = len(site.uploads.put)
    site.hub.fail(Fault("*/commit/main", do=move))
    assert "has got commit" in site.refusal()
    site.send()
    assert len(site.uploads.put) == n
    assert_published(site, site.items, tmp_path / "back")


def test_refusals(site: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    site.uploads.readers.add(TOKEN)
    assert site.refusal() == (
        "hf://me/Tiny: the server answers 403: the token may not write there; check the name, and make a token with "
        "write access"
    )
    site.uploads.readers.clear()
    unknown = site.with_other("README.md", b"---\nlicense: unknown\n---\n")
    assert 'Invalid metadata in README.md. - "license" must be one of' in site.refusal(unknown)
    assert set(open_repo(ME).files) == {".gitattributes"}
    paper = {site.items[1].name: [(Path("sha.json"), "0" * 64)]}
    assert site.refusal(expected=paper) == (
        f"sha.json: says another SHA-256 of {site.items[1].name} than it has; make it again, or move it elsewhere"
    )
    site.hub.tokens.clear()
    assert site.refusal() == (
        "hf://me/Tiny: the server answers 401: the server does not know the token; log in with `hf auth login`, or set "
        "HF_TOKEN"
    )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    says = "hf://me/Tiny: sending needs a token; log in with `hf auth login`, or set HF_TOKEN"
    assert site.refusal() == says


def test_nobody_is_there(site: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert site.refusal().startswith("hf://me/Tiny: cannot be sent: ")


def test_the_command_interrupted(site: Scene, tmp_path: Path) -> None:
    args = ["publish", "m-00002-of-00003.gguf", "me/Tiny", "--license", "mit", "--base-model", "a/B"]
    factory.gguf_file(tmp_path / "m.gguf", {f"t{i}.weight": ((256, 64), "F32", bytes(65536)) for i in range(3)}, KVS)
    split = [sys.executable, "-m", "quantkit", "split", "m.gguf", "m", "--max-tensors", "1", "-q"]
    assert subprocess.run(split, cwd=tmp_path, check=False).returncode == 0
    env = os.environ | site.hub.environment(tmp_path / "home")
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *args], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )

    def interrupt() -> None:
        process.send_signal(signal.SIGINT)
        process.wait(60)

    site.hub.fail(Fault("/lfs/*", method="PUT", do=interrupt))
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        "interrupted; what has arrived stays in the Hub's storage; the same command goes on"
    )
    assert set(open_repo(ME).files) == {".gitattributes"}


def test_the_command_killed_and_given_again(site: Scene, quantkit: Run, sound_set: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound_set, tmp_path / "set"))
    shards = sorted(folder.glob("*.gguf"))
    assert quantkit("verify", shards[0], "--write-manifest", folder / "sha.json", "-q").returncode == 0
    args = ["publish", str(folder), "me/Tiny", "--license", "mit", "--base-model", "a/B"]
    env = os.environ | site.hub.environment(tmp_path / "home")
    process = subprocess.Popen([sys.executable, "-m", "quantkit", *args], cwd=tmp_path, env=env)
    site.hub.fail(Fault("/lfs/*", method="PUT", after=1, do=process.kill))
    assert process.wait(120) == -9
    assert set(open_repo(ME).files) == {".gitattributes"}
    arrived = {oid for oid, _ in site.uploads.put if site.uploads.blob(oid).exists()}
    assert arrived
    site.uploads.put.clear()
    done = quantkit(*args, env=env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert f"sent {len(shards) + 2} files, 0 were there already" in done.stdout
    assert not arrived & {oid for oid, _ in site.uploads.put}
    repo = open_repo(ME)
    for path in (*shards, folder / "sha.json"):
        repo.fetch(path.name, tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    repo.fetch("README.md", tmp_path / "README.md")
    assert "license: mit" in (tmp_path / "README.md").read_text()

    again = quantkit(*args, "--json", env=env)
    said = json.loads(again.stdout)
    assert (said["sent"], said["kept"], said["commit"]) == ([], [], repo.commit)
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"!")
    wrong = quantkit(*args[:2], "me/Other", env=env)
    assert wrong.returncode == 7
    assert f"says another SHA-256 of {shards[0].name} than it has" in wrong.stderr
    assert "me/Other" not in site.hub.repos
    (folder / "sha.json").rename(tmp_path / "elsewhere.json")
    other = quantkit(*args, env=env)
    assert other.returncode == 7
    says = f"error: hf://me/Tiny: has {shards[0].name} already, with other content; give --force to replace it, or "
    assert other.stderr.splitlines()[-1] == f"{says}another repository"
    kept = [p for p in (tmp_path / "home").rglob("*") if p.is_file()] if (tmp_path / "home").exists() else []
    assert not [p for p in kept if TOKEN.encode() in p.read_bytes()]
    assert hashlib.sha256((tmp_path / shards[1].name).read_bytes()).hexdigest() in (tmp_path / "sha.json").read_text()

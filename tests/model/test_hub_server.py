"""The local server is what huggingface_hub takes for the Hub: the real client, as its users call it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_repos import git_sha1
from hub_server import TOKEN, Fault, Hub
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    (made / "deep" / "er").mkdir(parents=True)
    (made / "config.json").write_text('{"a": 1}')
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (made / "deep" / "er" / "a b+c.gguf").write_bytes(b"x" * 70_000)
    return made


def test_what_the_client_sees(hub: Hub, folder: Path) -> None:
    commit = hub.add("org/repo", folder)
    api = HfApi()
    info = api.model_info("org/repo", files_metadata=True)
    assert info.sha == commit
    assert info.siblings is not None
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    said = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings}
    assert list(said) == ["config.json", "deep/er/a b+c.gguf", "model.safetensors"]
    assert (said["config.json"], said["model.safetensors"]) == ((8, None), (256_000, weights))
    hub.page = 2
    entries = list(api.list_repo_tree("org/repo", recursive=True, revision=commit))
    assert [e.path for e in entries] == ["config.json", "deep", "deep/er", "deep/er/a b+c.gguf", "model.safetensors"]
    files = {e.path: e for e in entries if isinstance(e, RepoFile)}
    assert files["config.json"].blob_id == git_sha1(b'{"a": 1}')
    assert len(hub.asked("/api/*/tree/*")) == 3
    assert [e.path for e in api.list_repo_tree("org/repo", "deep")] == ["deep/er"]
    found = api.get_paths_info("org/repo", ["config.json", "deep", "absent"])
    assert [(type(e).__name__, e.path) for e in found] == [("RepoFile", "config.json"), ("RepoFolder", "deep")]
    assert HfFileSystem(skip_instance_cache=True).cat_file("org/repo/model.safetensors", 255, 258) == b"\xff\x00\x01"


def test_downloads_come_from_the_second_host_without_the_token(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add("org/repo", folder)
    got = Path(snapshot_download("org/repo"))
    for path in ("config.json", "model.safetensors", "deep/er/a b+c.gguf"):
        assert (got / path).read_bytes() == (folder / path).read_bytes()
    to = hf_hub_download("org/repo", "model.safetensors", local_dir=tmp_path / "to", force_download=True)
    assert Path(to).read_bytes() == (folder / "model.safetensors").read_bytes()
    at_cdn = [one for one in hub.log if one.host == "cdn"]
    assert at_cdn
    assert not any(one.token for one in at_cdn)
    assert all(one.token for one in hub.log if one.host == "hub" and "/resolve/" in one.path)
    assert [one.status for one in hub.log if one.status not in (200, 302, 307) and "harness" not in one.path] == []


def test_revisions(hub: Hub, folder: Path) -> None:
    first = hub.add("org/repo", folder)
    hub.repos["org/repo"].tags["v1"] = first
    (folder / "config.json").unlink()
    (folder / "config2.json").write_text("{}")
    second = hub.add("org/repo", folder)
    third = hub.add("org/repo", folder, "dev")
    api = HfApi()
    shas = [api.model_info("org/repo", revision=r).sha for r in (None, "main", "v1", first, "dev")]
    assert shas == [second, second, first, first, third]
    assert [c.commit_id for c in api.list_repo_commits("org/repo")] == [second, first]
    refs = api.list_repo_refs("org/repo")
    assert [(b.name, b.target_commit) for b in refs.branches] == [("main", second), ("dev", third)]
    assert [t.name for t in refs.tags] == ["v1"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/repo", revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/repo", "absent.json")


def test_who_may_read(hub: Hub, folder: Path) -> None:
    hub.add("org/private", folder)
    hub.add("org/gated", folder)
    hub.repos["org/private"].private = True
    hub.repos["org/gated"].gated = True
    api = HfApi()
    assert api.whoami()["name"] == "me"
    assert api.model_info("org/private").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/private", token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/absent")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("org/private", token="hf_wrong")
    assert api.model_info("org/gated").gated
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "model.safetensors")
    hub.repos["org/gated"].granted.add(TOKEN)
    assert hf_hub_download("org/gated", "model.safetensors")


def test_faults(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("org/repo", folder)
    whole = (folder / "model.safetensors").read_bytes()
    moved: list[str] = []
    hub.fail(
        Fault("/org/repo/*", host="cdn", cut=1000),
        Fault("/org/repo/*", host="cdn", after=1, status=429, headers={"Retry-After": "0"}),
        Fault("*/resolve/*", pause=0.05, do=lambda: moved.append("called")),
    )
    assert Path(hf_hub_download("org/repo", "model.safetensors")).read_bytes() == whole
    assert [(one.status, one.sent) for one in hub.log if one.host == "cdn" and one.status != 429] == [
        (200, 1000),
        (200, 256_000),  # it had kept none of so little
    ]
    assert moved == ["called"]
    assert [fault.hits for fault in hub.faults] == [1, 1, 1]
    hub.fail(Fault("/org/repo/*", host="cdn", wrong=5, times=2))
    got = Path(hf_hub_download("org/repo", "model.safetensors", force_download=True)).read_bytes()
    assert (got[5], got[:5] + got[6:]) == (5 ^ 0x55, whole[:5] + whole[6:])  # which the client does not see
    hub.fail(Fault("*/resolve/*", status=404))
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/repo", "config.json")
    assert TOKEN not in caplog.text

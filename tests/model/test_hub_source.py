"""hf://org/repo as SOURCE: a checkpoint by its headers, from a local server through the real client."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from factory import gguf_file
from hub_server import TOKEN, Fault, Hub

from quantkit.base.errors import SourceError, UnsupportedError
from quantkit.gguf.header import STRING, U32, kv
from quantkit.hub import patience
from quantkit.model.families.options import Options
from quantkit.model.open import describe_stored, open_model
from quantkit.model.sources.safetensors_header import INDEX

#: what a plan says of the commit, in JSON and in text
AT = re.compile(
    r' "commit": "[0-9a-f]{40}",\n|,?\n  "read on the Hub at commit \w+"|^note: read on the Hub at commit \w+\n', re.M
)
PRE = Options(pre="deepseek-v3")
ARCH = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0,) * 5)


def refusal(call: Callable[[], Any], error: type[SourceError] = SourceError) -> str:
    with pytest.raises(error) as e:
        call()
    assert TOKEN not in str(e.value)
    return str(e.value)


def test_a_repository_is_what_its_folder_is(hub: Hub, tiny_v3: Path) -> None:
    hub.add("me/Tiny-V3", tiny_v3)
    here, there = open_model(str(tiny_v3), PRE), open_model("hf://me/Tiny-V3", PRE)
    for name in ("model", "arch", "layout", "n_layers", "tensors", "kvs", "kvs_complete", "notes"):
        at = (f"read on the Hub at commit {there.commit}",) if name == "notes" else ()
        assert getattr(there, name) == (getattr(here, name) + at if at else getattr(here, name)), name
    assert describe_stored(there) == describe_stored(here)
    assert there.source is None
    weights = sum(p.stat().st_size for p in tiny_v3.glob("*.safetensors"))
    assert 0 < hub.sent("*.safetensors") < weights / 10
    shards = len(list(tiny_v3.glob("*.safetensors")))
    assert len([one for one in hub.log if one.host == "cdn"]) == shards  # one request for each header
    assert not any(one.token for one in hub.log if one.host == "cdn")


def test_a_page_of_the_hub_and_a_revision(hub: Hub, tiny_v3: Path, v3: Path) -> None:
    first = hub.add("me/Tiny-V3", v3)
    (v3 / "config.json").write_text("{}")
    hub.add("me/Tiny-V3", v3, "broken")
    for source in (f"hf://me/Tiny-V3@{first}", f"{hub.url}/me/Tiny-V3", f"{hub.url}/me/Tiny-V3/tree/main"):
        hub.repos["me/Tiny-V3"].commits[first].files["config.json"].place.write_bytes(
            (tiny_v3 / "config.json").read_bytes()
        )
        assert open_model(source, PRE).model == "Tiny-V3"
    (v3 / "config.json").write_text("{}")
    assert "names the architecture None" in refusal(lambda: open_model("hf://me/Tiny-V3@broken"), UnsupportedError)


def test_on_the_command_line(hub: Hub, tiny_v3: Path, tiny_imatrix: Path, quantkit: Run, tmp_path: Path) -> None:
    hub.add("me/Tiny-V3", tiny_v3)
    there, here = "hf://me/Tiny-V3", str(tiny_v3)
    pre = ("--pre", "deepseek-v3")

    def same(*args: str | Path) -> None:
        got, want = (quantkit(*[x if a == "SRC" else a for a in args]) for x in (there, here))
        assert (got.returncode, got.stderr) == (0, want.stderr)
        assert AT.sub("", got.stdout).replace(there, here) == AT.sub("", want.stdout)

    same("plan", "SRC", "-r", "UD-IQ1_S", *pre, "--json")
    same("plan", "SRC", "-r", "UD-IQ1_S", *pre, "--imatrix", tiny_imatrix)
    same("recipe", "diff", "Q8_0", "Q4_K_M", "--model", "SRC")
    same("fit", "SRC", "-r", "UD-IQ1_S", "--vram", "1GB")
    found, local = (json.loads(quantkit("inspect", s, *pre, "--json").stdout) for s in (there, here))
    assert found.pop("files") == [there]
    commit = found.pop("commit")
    assert commit == hub.repos["me/Tiny-V3"].branches["main"][-1]
    assert found["notes"].pop() == f"read on the Hub at commit {commit}"
    assert local.pop("files")
    assert found == local


def test_what_is_in_the_cache_is_whole(hub: Hub, tiny_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    hub.add("me/Tiny-V3", tiny_v3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(lambda: open_model("hf://me/Tiny-V3", PRE)) == (
        "hf://me/Tiny-V3: HF_HUB_OFFLINE is set, and it is not in Hugging Face's cache; unset it, or download it first"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    snapshot_download("me/Tiny-V3")
    sent = hub.sent("*.safetensors")
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert open_model("hf://me/Tiny-V3", PRE).source is not None
        assert open_model("me/Tiny-V3", PRE).source is not None
    assert hub.sent("*.safetensors") == sent


def test_faults_on_the_way(hub: Hub, tiny_v3: Path) -> None:
    hub.add("me/Tiny-V3", tiny_v3)
    now = {"Retry-After": "0"}
    hub.fail(
        Fault("/api/models/*", status=429, headers=now),
        Fault("*/resolve/*", status=429, headers=now, times=5, after=2),
        Fault("*.safetensors", status=503, times=3, after=1),
        Fault("*.safetensors", host="cdn", cut=100, times=4),
        Fault("*.safetensors", pause=0.2),
    )
    assert open_model("hf://me/Tiny-V3", PRE).tensors == open_model(str(tiny_v3), PRE).tensors
    assert all(fault.hits for fault in hub.faults)


def test_the_checks_of_a_folder(hub: Hub, v3: Path) -> None:
    """Hostile headers, the index against shards, scales: by the same code."""
    shard = sorted(v3.glob("*.safetensors"))[0]
    whole = shard.read_bytes()

    def said(damage: bytes) -> str:
        shard.write_bytes(damage)
        hub.add("me/Tiny-V3", v3)
        here = refusal(lambda: open_model(str(v3), PRE))
        there = refusal(lambda: open_model("hf://me/Tiny-V3", PRE))
        assert here.replace(str(v3), "hf://me/Tiny-V3") == there
        return there

    assert "claims a header of" in said((1 << 60).to_bytes(8, "little") + whole[8:])
    assert "is a Git LFS pointer" in said(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "not valid JSON" in said(whole[:8] + b"]" + whole[9:])
    renamed = whole.replace(b"layernorm", b"layernarm", 1)
    assert f"by {INDEX}, but is not" in said(renamed)
    assert "the tensors end at" in said(whole + b"1")
    shard.unlink()
    commit = hub.add("me/Tiny-V3", v3)
    assert refusal(lambda: open_model("hf://me/Tiny-V3", PRE)).endswith(
        f"that {INDEX} names is not in the repository at commit {commit[:12]}; is its upload complete?"
    )


def test_a_repository_of_ggufs(hub: Hub, tmp_path: Path, quantkit: Run) -> None:
    folder = tmp_path / "ggufs"
    for name in ("A/x-00001-of-00002.gguf", "A/x-00002-of-00002.gguf", "y.gguf", "mmproj-f16.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        gguf_file(folder / name, {"blk.0.ffn_up.weight": ((256, 4), "F32", bytes(4096))}, ARCH)
    hub.add("org/GGUF", folder)
    said = refusal(lambda: open_model("hf://org/GGUF"))
    assert said.splitlines()[0] == "hf://org/GGUF: holds 2 GGUFs; give the address of one, or of a folder with one:"
    names = [line.split("  (")[0] for line in said.splitlines()[1:]]
    assert names == ["hf://org/GGUF/A/x-00001-of-00002.gguf", "hf://org/GGUF/y.gguf"]
    assert open_model("hf://org/GGUF/y.gguf").model == "y"
    shutil.rmtree(folder / "A")
    hub.add("org/GGUF", folder)
    assert open_model("hf://org/GGUF").model == "y"  # there is just one
    assert quantkit("recipe", "from-gguf", "hf://org/GGUF").returncode == 0
    assert refusal(lambda: open_model("hf://org/GGUF/B")).startswith(
        "hf://org/GGUF/B: is no file or folder with a GGUF"
    )
    (folder / "y.gguf").rename(folder / "README.md")
    (folder / "mmproj-f16.gguf").unlink()
    hub.add("org/GGUF", folder)
    assert refusal(lambda: open_model("hf://org/GGUF")) == (
        "hf://org/GGUF: holds neither a checkpoint (config.json) nor a GGUF"
    )


def test_an_id_alone_says_how_to_read_it() -> None:
    assert refusal(lambda: open_model("org/Nowhere-V3")) == (
        "'org/Nowhere-V3' is no directory, no file and not in Hugging Face's cache; to read a repository on the Hub, "
        "give hf://org/Nowhere-V3"
    )


def test_a_wait_is_a_note_on_standard_error(hub: Hub, tiny_v3: Path, quantkit: Run) -> None:
    hub.add("me/Tiny-V3", tiny_v3)
    hub.fail(Fault("/api/models/*", status=429, headers={"Retry-After": "1"}))
    done = quantkit("inspect", "hf://me/Tiny-V3", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["arch"] == "deepseek2"
    assert done.stderr == (
        "note: hf://me/Tiny-V3: the server answers 429: too many requests; try again later; waiting 1 s, then trying "
        "again\n"
    )


def test_where_a_checkpoint_on_the_hub_is_not_what_is_wanted(hub: Hub, tiny_v3: Path, quantkit: Run) -> None:
    hub.add("me/Tiny-V3", tiny_v3)
    for args in (("recipe", "diff", "hf://me/Tiny-V3", "Q8_0"), ("recipe", "from-gguf", "hf://me/Tiny-V3")):
        done = quantkit(*args)
        assert (done.returncode, done.stderr) == (
            5,
            "error: hf://me/Tiny-V3: is a checkpoint, and a GGUF is wanted; of a model give it with --model\n",
        )
    for words in (["dequant", "hf://me/Tiny-V3", "out"], ["verify", "hf://me/Tiny-V3"]):
        done = quantkit(*words)
        assert (done.returncode, done.stderr) == (
            4,
            "error: hf://me/Tiny-V3: this is read from a file or folder here; download it first (`quantkit download "
            "me/Tiny-V3`), and give its path\n",
        )


def test_a_gguf_is_pinned_to_the_commit_of_the_first_look(
    hub: Hub, quantkit: Run, sound_set: Path, tmp_path: Path
) -> None:
    """Its branch moves to a file of other content after the first header; that of the second is the same commit's."""
    first, *others = sorted(p.name for p in sound_set.glob("*.gguf"))
    commit = hub.add("me/G", sound_set)
    repo = hub.repos["me/G"]
    files = dict(repo.commits[commit].files)
    swapped = {name: files[others[-1 - i]] for i, name in enumerate(others)}
    local = json.loads(quantkit("inspect", sound_set / first, "--json").stdout)
    for source in (f"hf://me/G/{first}", f"{hub.url}/me/G/blob/main/{first}", f"hf://me/G/{first}@main"):
        repo.branches["main"][:] = [commit]
        hub.fail(Fault(f"/me/G/{first}", host="cdn", do=lambda: repo.commit("main", files | swapped, "moved")))
        done = quantkit("inspect", source, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["commit"], found["tensors"]) == (commit, local["tensors"])
        assert repo.branches["main"] != [commit]


def test_the_commit_of_a_gguf_is_printed_and_in_json(
    hub: Hub, quantkit: Run, sound_set: Path, tiny_v3: Path, tmp_path: Path
) -> None:
    first = sorted(p.name for p in sound_set.glob("*.gguf"))[0]
    commit, at = hub.add("me/G", sound_set), f"hf://me/G/{first}"
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: r\narch: [deepseek2]\nfile_type: Q8_0\nrules:\n  - {match: "*", type: Q8_0, why: x}\n')
    for args, key in (
        (("plan", at, "-r", recipe), "commit"),
        (("inspect", at), "commit"),
        (("recipe", "from-gguf", at), "commit"),
        (("which", at, "--vram", "24"), "commit"),
        (("verify", sound_set / first, "--source", at, "-r", recipe), "source_commit"),
    ):
        done = quantkit(*args)
        assert f"Hub at commit {commit}" in " ".join((done.stdout + done.stderr).split()), (args, done.stderr)
        done = quantkit(*args, "--json")
        assert json.loads(done.stdout)[key] == commit, args
    hub.add("me/Tiny", tiny_v3)
    done = quantkit("plan", "hf://me/Tiny", "-r", "Q8_0", "--pre", "deepseek-v3", "--json")
    assert json.loads(done.stdout)["commit"] == hub.repos["me/Tiny"].branches["main"][-1]

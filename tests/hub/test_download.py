"""quantkit download: through the real client, from a local Hub."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import Run
from hub_server import TOKEN, Fault, Hub

from quantkit.base.errors import SourceError
from quantkit.hub.address import Address
from quantkit.hub.repo import open_repo
from quantkit.model.download import ChoiceError, chosen

BYTES = {name: os.urandom(70_000 + 1000 * i) for i, name in enumerate(("a", "b", "c", "d"))}
GGUFS = {
    "R1-UD-IQ1_S/R1-UD-IQ1_S-00001-of-00002.gguf": BYTES["a"],
    "R1-UD-IQ1_S/R1-UD-IQ1_S-00002-of-00002.gguf": BYTES["b"],
    "R1-q4_k_m.gguf": BYTES["c"],
    "config.json": b"{}",
    "README.md": b"# R1",
}


@pytest.fixture
def ggufs(hub: Hub, tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    for path, data in GGUFS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    hub.add("org/R1-GGUF", folder)
    return folder


@pytest.fixture
def run(quantkit: Run) -> Run:
    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        done = quantkit("download", *args)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def test_a_quantization_by_its_name_whatever_its_folder(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    to = tmp_path / "models"
    done = run("org/R1-GGUF", "--recipe", "ud-iq1_s", "--to", to)
    assert done.returncode == 0, done.stderr
    got = {str(p.relative_to(to)): p.read_bytes() for p in to.rglob("*") if p.is_file()}
    assert got == {path: data for path, data in GGUFS.items() if "IQ1_S" in path}
    first = to / "R1-UD-IQ1_S" / "R1-UD-IQ1_S-00001-of-00002.gguf"
    assert f"quantkit verify {first}\n  quantkit run-card {first}\n" in done.stdout
    n = len([one for one in hub.log if one.host == "cdn"])
    assert "0 of 2 files are to be fetched" in run("org/R1-GGUF", "--recipe", "UD-IQ1_S", "--to", to).stdout
    assert len([one for one in hub.log if one.host == "cdn"]) == n  # what is there and right is not fetched again
    assert not any(one.token for one in hub.log if one.host == "cdn")


def test_patterns_a_file_and_what_is_left_out(ggufs: Path) -> None:
    repo = open_repo(Address("org/R1-GGUF", None, ""))
    parts = [path for path in GGUFS if "IQ1_S" in path]
    assert chosen(repo, include=["*IQ1_S*"]) == parts
    assert chosen(repo, include=["R1-UD-IQ1_S/"], exclude=["*00002-of*"]) == parts[:1]
    assert chosen(repo, "R1-q4_k_m.gguf") == ["R1-q4_k_m.gguf"]
    assert chosen(repo, "R1-UD-IQ1_S") == parts
    with pytest.raises(ChoiceError) as e:
        chosen(repo)
    assert str(e.value).splitlines() == [
        "hf://org/R1-GGUF holds 2 models; choose one:",
        "  --recipe Q4_K_M  (72,000 bytes = 70.31 KiB = 72.00 kB, 1 file)",
        "  --recipe UD-IQ1_S  (141,000 bytes = 137.70 KiB = 141.00 kB, 2 files)",
    ]
    says = {
        "has no GGUF called 'UD-IQ1_M' (did you mean UD-IQ1_S?); there are Q4_K_M, UD-IQ1_S": {"recipe": "UD-IQ1_M"},
        "no file matches '*Q9*'; there are Q4_K_M, UD-IQ1_S": {"include": ["*Q9*"]},
        "--exclude leaves none of 2 files; leave it out": {"recipe": "UD-IQ1_S", "exclude": ["*"]},
    }
    for sentence, how in says.items():
        with pytest.raises(SourceError) as refused:
            chosen(repo, **how)  # type: ignore[arg-type]
        assert str(refused.value) == f"hf://org/R1-GGUF: {sentence}"


def test_a_set_that_lacks_shards_a_folder_and_files_that_are_no_models(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    files = ("m-Q4_K_M-00001-of-00003.gguf", "m-Q4_K_M-00003-of-00003.gguf", "imatrix.gguf", "sub/model.safetensors",
             "sub/config.json", "sub/x.gguf")  # fmt: skip
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(BYTES["a"])
    hub.add("org/odd", folder)
    repo = open_repo(Address("org/odd", None, ""))
    with pytest.raises(SourceError, match=r"Q4_K_M lacks 1 of its 3 shards; choose another, or try again later"):
        chosen(repo, recipe="Q4_K_M")
    assert chosen(repo, "sub") == ["sub/config.json", "sub/model.safetensors"]
    done = run("org/odd", "--include", "*.gguf", "--exclude", "sub/*", "--to", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert "run-card" not in done.stdout  # neither of a part of a model nor of what is none
    assert done.stdout.endswith(f"{tmp_path / 'x'}: 3 files, with the repository's hashes\n")


def test_a_choice_is_asked_for_and_nothing_fetched(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    done = run("hf://org/R1-GGUF", "--to", tmp_path / "x")
    assert done.returncode == 2, done.stderr
    assert "--recipe UD-IQ1_S" in done.stderr
    assert not (tmp_path / "x").exists()
    assert not [one for one in hub.log if one.host == "cdn"]


def test_a_checkpoint_comes_without_weights_in_other_formats(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    files = {
        "model.safetensors": BYTES["a"],
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x",
    }
    for path in (*files, "pytorch_model.bin", "onnx/model.onnx"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(files.get(path, BYTES["d"]))
    hub.add("org/Base", folder)
    to = tmp_path / "Base"
    done = run("org/Base", "--to", to, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["fetched"]
    assert {f["path"]: f["bytes"] for f in said["files"]} == {path: len(data) for path, data in files.items()}
    assert {p.name: p.read_bytes() for p in to.iterdir()} == files
    assert f"quantkit plan {to} --recipe UD-IQ1_S" in run("org/Base", "--to", to).stdout


def test_what_was_cut_or_wrong_is_fetched_again(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    to, one = tmp_path / "m", "R1-q4_k_m.gguf"
    to.mkdir()
    (to / f"{one}.part").write_bytes(BYTES["c"][:30_000])  # as a run that was killed leaves it
    hub.fail(Fault("/org/*", host="cdn", cut=1000))
    hub.fail(Fault("/org/*", host="cdn", status=503))
    assert run("org/R1-GGUF", "--include", one, "--to", to).returncode == 0
    assert (to / one).read_bytes() == BYTES["c"]
    assert [p.name for p in to.iterdir()] == [one]
    (to / one).unlink()
    hub.fail(Fault("/org/*", host="cdn", wrong=77, times=2))
    done = run("org/R1-GGUF", "--include", one, "--to", to)
    assert done.returncode == 4, done.stderr
    assert "what came twice is not what the repository has" in done.stderr
    assert not (to / one).exists()


def test_other_files_and_links_are_left_alone(run: Run, ggufs: Path, tmp_path: Path) -> None:
    to, one = tmp_path / "m", "R1-q4_k_m.gguf"
    to.mkdir()
    (to / one).write_bytes(b"mine")
    done = run("org/R1-GGUF", "--include", one, "--to", to)
    assert done.returncode == 7, done.stderr
    assert f"{to / one}: exists and is not the repository's; move it away, or replace it with --force" in done.stderr
    assert (to / one).read_bytes() == b"mine"
    assert run("org/R1-GGUF", "--include", one, "--to", to, "--force").returncode == 0
    assert (to / one).read_bytes() == BYTES["c"]
    (to / "R1-UD-IQ1_S").symlink_to(tmp_path)
    done = run("org/R1-GGUF", "--recipe", "UD-IQ1_S", "--to", to)
    assert done.returncode == 7, done.stderr
    assert "is a symbolic link, which is neither followed nor replaced" in done.stderr


def test_a_dry_run_fetches_nothing(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    done = run("org/R1-GGUF", "--recipe", "UD-IQ1_S", "--to", tmp_path / "x", "-n")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 files are to be fetched, 141,000 bytes" in done.stdout
    assert not (tmp_path / "x").exists()
    assert not [one for one in hub.log if one.host == "cdn"]


def test_options_that_contradict_each_other(run: Run, ggufs: Path) -> None:
    done = run("org/R1-GGUF", "--recipe", "Q4_K_M", "--include", "*")
    assert done.returncode == 2, done.stderr
    assert "--recipe and --include both choose files; give one" in done.stderr
    done = run("hf://org/R1-GGUF@main", "--revision", "v2")
    assert done.returncode == 2, done.stderr
    assert "name different revisions; give one" in done.stderr

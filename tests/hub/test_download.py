"""quantkit download: through the real client, from a local Hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Run
from hub_repos import Blob
from hub_server import TOKEN, Fault, Hub

from quantkit.base.errors import SourceError
from quantkit.cli.bars import open_bar
from quantkit.hub.address import Address
from quantkit.hub.repo import open_repo
from quantkit.model.download import ChoiceError, chosen, fetch, look

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


def test_the_address_of_another_server(run: Run) -> None:
    done = run("https://example.com/x")
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: https://example.com/x: is not hf://org/repo"), done.stderr


def test_a_gated_repository(run: Run, hub: Hub, ggufs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are listed; fetching says in a sentence where to accept the terms, and HF_TOKEN."""
    repo = hub.repos["org/R1-GGUF"]
    repo.gated = True
    args = ("org/R1-GGUF", "--recipe", "Q4_K_M", "--to", tmp_path / "m")
    for token, says in (
        (TOKEN, "with the account whose token is in HF_TOKEN, or wait until access is granted"),
        ("", ", and set HF_TOKEN to a token of that account, or log in with `hf auth login`"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        done = run(*args)
        assert done.returncode == 4, done.stderr
        comma = "" if says.startswith(",") else " "
        assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
            f"error: hf://org/R1-GGUF/R1-q4_k_m.gguf: the model is gated; accept its terms at {hub.url}/org/R1-GGUF"
            f"{comma}{says}"
        ]
        assert "Traceback" not in done.stderr
        assert "R1-q4_k_m.gguf" in done.stdout
        assert not list(tmp_path.glob("m/*.gguf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo.granted.add(TOKEN)
    assert run(*args).returncode == 0
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["R1-q4_k_m.gguf"]


def part_way(hub: Hub, to: Path) -> str:
    """A download of both shards of UD-IQ1_S that ends after the first and a part of the second; its commit."""
    hub.fail(Fault("*00002-of*", host="cdn", cut=40_000), Fault("*00002-of*", host="cdn", after=1, status=403))
    repo = open_repo(Address("org/R1-GGUF", None, ""))
    with pytest.raises(SourceError, match="access is refused"):
        fetch(
            repo, look(repo, chosen(repo, recipe="UD-IQ1_S"), to, False, lambda _p, _n: None), to, lambda _p, _n: None
        )
    assert list(to.rglob("*.part"))
    return repo.commit


def test_a_revision_that_moves_between_two_runs(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    args, parts = ("org/R1-GGUF", "--recipe", "UD-IQ1_S"), [p for p in GGUFS if "IQ1_S" in p]
    dirs = [tmp_path / name for name in ("same", "old", "new")]
    firsts = {part_way(hub, to) for to in dirs}
    assert len(firsts) == 1
    first = firsts.pop()
    other = tmp_path / "other"
    for path, data in GGUFS.items():
        (other / path).parent.mkdir(parents=True, exist_ok=True)
        (other / path).write_bytes(b"# R1, again" if path == "README.md" else data)
    second = hub.add("org/R1-GGUF", other)
    moved = f"hf://org/R1-GGUF: the download began at commit {first}, and the repository is at {{}} now"
    done = run(*args, "--to", dirs[0])
    assert done.returncode == 0, done.stderr
    assert f"note: {moved.format(second)}; its files here are the same: going on\n" in done.stderr
    assert not [p for p in dirs[0].iterdir() if p.is_file()]  # no notes of ours are left

    (other / parts[1]).unlink()
    (other / parts[1]).write_bytes(BYTES["d"])
    third = hub.add("org/R1-GGUF", other)
    before = {p: p.read_bytes() for p in dirs[1].rglob("*") if p.is_file()}
    done = run(*args, "--to", dirs[1])
    assert done.returncode == 13, done.stderr
    assert done.stderr.endswith(
        f"error: {moved.format(third)}, with other content of {parts[1]}; give --revision {first} to go on with the "
        "old one, or --force for the new one\n"
    )
    assert {p: p.read_bytes() for p in dirs[1].rglob("*") if p.is_file()} == before
    n = hub.sent("/org/*")
    assert run(*args, "--to", dirs[1], "--revision", first).returncode == 0
    assert hub.sent("/org/*") - n == len(BYTES["b"]) - 40_000
    assert [(dirs[1] / p).read_bytes() for p in parts] == [BYTES["a"], BYTES["b"]]

    n = hub.sent("/org/*")
    done = run(*args, "--to", dirs[2], "--force")
    assert (done.returncode, "1 of its files are fetched anew" in done.stderr) == (0, True), done.stderr
    assert hub.sent("/org/*") - n == len(BYTES["d"])
    assert [(dirs[2] / p).read_bytes() for p in parts] == [BYTES["a"], BYTES["d"]]


def test_after_kill_9_nothing_is_fetched_twice(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    large, to = os.urandom(3_000_000), tmp_path / "m"
    (ggufs / "big-Q8_0.gguf").write_bytes(large)
    hub.add("org/R1-GGUF", ggufs)
    hub.rate = 2e6
    args = ["org/R1-GGUF", "--include", "*.gguf", "--exclude", "R1-UD*", "--to", str(to)]
    process = subprocess.Popen([sys.executable, "-m", "quantkit", "download", *args, "-q"], cwd=tmp_path)
    part = to / "big-Q8_0.gguf.part"
    while not part.exists() or part.stat().st_size < 500_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    hub.rate = 0
    had, hub.log[:] = part.stat().st_size, []
    assert 500_000 <= had < len(large)
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert f"{had:,} bytes are there" in done.stdout
    assert hub.sent("/org/R1-GGUF/big*") == len(large) - had
    assert {p.name: p.read_bytes() for p in to.iterdir()} == {"big-Q8_0.gguf": large, "R1-q4_k_m.gguf": BYTES["c"]}
    hub.log.clear()
    assert run(*args).returncode == 0
    assert hub.sent("/org/*") == 0


def test_the_list_is_shown_where_the_disk_is_too_small(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    blob = Blob(ggufs / "R1-q4_k_m.gguf", 10**17, "0" * 40, "0" * 64)
    hub.repos["org/R1-GGUF"].commit("main", {"R1-Q8_0.gguf": blob}, "larger than any disk")
    for more in ((), ("--dry-run",)):
        done = run("org/R1-GGUF", "--to", tmp_path / "m", *more)
        assert done.returncode == 7, done.stderr
        assert "R1-Q8_0.gguf" in done.stdout
        assert "1 of 1 files are to be fetched, 100,000,000,000,000,000 bytes" in done.stdout
        assert "100,000,000,000,000,000 bytes more are needed, but " in done.stderr
    said = run("org/R1-GGUF", "--to", tmp_path / "m", "--dry-run", "--json")
    assert (said.returncode, json.loads(said.stdout)["files"][0]["bytes"]) == (7, 10**17)
    assert not (tmp_path / "m").exists()


def test_the_bar_begins_where_the_last_run_ended(hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    """What was there is on it, and is no speed."""
    to = tmp_path / "m"
    part_way(hub, to)
    repo = open_repo(Address("org/R1-GGUF", None, ""))
    found = look(repo, chosen(repo, recipe="UD-IQ1_S"), to, False, lambda _p, _n: None)
    assert [(f.there, f.part) for f in found] == [(True, 0), (False, 40_000)]
    steps: list[int] = []
    fetch(repo, found, to, lambda _path, n: steps.append(n))
    assert sum(steps) == len(BYTES["b"]) - 40_000
    assert min(steps) >= 0
    with open_bar(len(BYTES["b"]), "B", False, initial=40_000) as bar:
        assert (bar.n, bar.format_dict["initial"]) == (40_000, 40_000)


def test_what_is_in_the_local_cache_is_not_fetched_again(run: Run, hub: Hub, ggufs: Path, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    first, second = (p for p in GGUFS if "IQ1_S" in p)
    hf_hub_download("org/R1-GGUF", first)
    hf_hub_download("org/R1-GGUF", "config.json")
    (ggufs / "new.txt").write_text("another commit")
    hub.add("org/R1-GGUF", ggufs)
    hub.log.clear()
    done = run("org/R1-GGUF", "--include", "*IQ1_S*", "--include", "config.json", "--to", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 files are to be fetched, 71,000 bytes" in done.stdout
    assert "; 2 come from the local cache, 70,002 bytes" in done.stdout
    assert hub.sent("/org/*") == len(BYTES["b"])
    assert not hub.asked(f"*{first}")
    assert (tmp_path / "m" / first).read_bytes() == BYTES["a"]
    cached = Path(hf_hub_download("org/R1-GGUF", second)).resolve()
    cached.write_bytes(bytes(len(BYTES["b"])))  # a damaged cache is found by the hash
    done = run("org/R1-GGUF", "--recipe", "UD-IQ1_S", "--to", tmp_path / "n")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / "n" / p).read_bytes() for p in (first, second)] == [BYTES["a"], BYTES["b"]]

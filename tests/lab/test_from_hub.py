"""What computes a model whose shards come from the Hub while it runs: the same results as from a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
from conftest import Run
from hub_server import TOKEN, Fault, Hub, passing_faults
from making import some_text
from reshard import reshard
from small_builds import OPTIONS

import quantkit as qk
from quantkit.base.errors import ResumeError
from quantkit.lab.fetched import Fetching, fetched
from quantkit.lab.identity import of_model, of_run
from quantkit.model.hub import with_weights
from quantkit.model.open import open_model

SOURCE = "hf://me/Tiny-V3"
ENV = {"OMP_NUM_THREADS": "1"}
HOW = ("--pre", "deepseek-v3", "-t", "1", "-c", "32", "--chunks", "4")
N_SHARDS = 5


@pytest.fixture(scope="session")
def dealt(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 in five shards, no scale with its weight."""
    return reshard(tiny_v3, tmp_path_factory.mktemp("dealt") / "Tiny-V3", N_SHARDS, deal=True)


@pytest.fixture(scope="session")
def in_order(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 in five shards, in the order of names."""
    return reshard(tiny_v3, tmp_path_factory.mktemp("ordered") / "Tiny-V3", N_SHARDS)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def expected(in_order: Path, text: Path, quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The importance matrix that is made from the folder."""
    out = tmp_path_factory.mktemp("expected") / "i.gguf"
    made = quantkit("imatrix", "make", in_order, "--text", text, *HOW, "-o", out, "-q", env=ENV)
    assert made.returncode == 0, made.stderr
    return out.read_bytes()


class Runs:
    """Commands in a folder of their own, whose source is SOURCE."""

    def __init__(self, hub: Hub, quantkit: Run, text: Path, folder: Path) -> None:
        self.hub, self.quantkit, self.text, self.folder = hub, quantkit, text, folder
        self.out = folder / "i.gguf"
        self.most_files = 0

    def make(self, *more: str | Path, source: str = SOURCE) -> subprocess.CompletedProcess[str]:
        how = ("--text", self.text, *HOW, "-o", self.out, *more)
        return self.quantkit("imatrix", "make", source, *how, cwd=self.folder, env=ENV)

    def start(self, *more: str) -> subprocess.Popen[str]:
        python = (sys.executable, "-m", "quantkit")
        args = [*python, "imatrix", "make", SOURCE, "--text", str(self.text), *HOW, "-o", str(self.out)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*args, *more], cwd=self.folder, env=os.environ | ENV, stdout=pipe, stderr=pipe, text=True
        )

    def look(self) -> None:
        """Count the shards that are there, whole or not."""
        for source in self.folder.glob("Tiny-V3-*.partial/source"):
            self.most_files = max(self.most_files, len(os.listdir(source)))

    def watch(self) -> None:
        self.hub.fail(Fault("*.safetensors", host="cdn", times=9999, do=self.look))

    def shards(self, n: int, **what: Any) -> Fault:
        """What goes wrong with the n-th shard, after its header has been read."""
        return Fault(f"/me/Tiny-V3/model-{n:05d}-*", host="cdn", **({"after": 1} | what))

    def whole(self) -> list[str]:
        """The shards that were sent, in order."""
        return [one.path[-22:-21] for one in self.hub.log if one.host == "cdn" and one.sent > 400_000]


@pytest.fixture
def runs(hub: Hub, quantkit: Run, text: Path, in_order: Path, tmp_path: Path) -> Runs:
    hub.add("me/Tiny-V3", in_order)
    (tmp_path / "out").mkdir()
    return Runs(hub, quantkit, text, tmp_path / "out")


@pytest.mark.parametrize(("kind", "keep"), [("in_order", 1), ("in_order", 3), ("dealt", 1), ("dealt", 4)])
def test_an_importance_matrix_with_few_shards_at_a_time(
    runs: Runs, kind: str, keep: int, expected: bytes, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    runs.hub.add("me/Tiny-V3", folder)
    runs.watch()
    ran = runs.make("--keep", str(keep))
    assert ran.returncode == 0, ran.stderr
    assert runs.out.read_bytes() == expected
    assert 1 <= runs.most_files <= keep
    n, came = len(runs.whole()), runs.hub.sent("*.safetensors")
    said = re.search(r"([\d,]+) bytes in ([\d,]+) shards fetched", ran.stdout)
    assert said is not None
    assert int(said[2]) == n
    assert int(said[1].replace(",", "")) <= came < int(said[1].replace(",", "")) + 100_000  # the rest are headers
    if kind == "in_order":
        assert n == N_SHARDS if keep == 3 else n <= 2 * N_SHARDS
    assert re.search(
        rf"{SOURCE} at commit [0-9a-f]{{12}}: .* in 5 shards for each pass over the model, at most .* at a time in "
        r"Tiny-V3-[0-9a-f]{12}\.partial|/out/Tiny-V3-[0-9a-f]{12}\.partial",
        ran.stderr,
    )
    assert os.listdir(runs.folder) == ["i.gguf"]
    assert TOKEN not in ran.stdout + ran.stderr


def test_a_limit_of_bytes_and_another_folder(runs: Runs, in_order: Path, expected: bytes, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in in_order.glob("*.safetensors"))
    refused = runs.make("--keep", str(largest - 1) + "B")
    assert refused.returncode == 7
    assert f"its largest shard has {largest:,} bytes, more than the {largest - 1:,} of --keep; give --keep 1GB" in (
        refused.stderr
    )
    assert not os.listdir(runs.folder)
    there = tmp_path / "there"
    runs.hub.fail(Fault("*.safetensors", host="cdn", times=9999, do=lambda: seen.update(there.glob("*/source/*"))))
    seen: set[Path] = set()
    made = runs.make("--keep", f"{largest}B", "--shards", there, "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["shards_fetched"] == len(runs.whole())
    assert runs.out.read_bytes() == expected
    assert seen
    assert os.listdir(there) == []
    wrong = runs.make("--keep", "0")
    assert (wrong.returncode, wrong.stderr.splitlines()[-1]) == (
        2,
        "Error: Invalid value for '--keep': '0' is neither a number of shards, 1 or more, nor a size such as 60GB",
    )


def test_a_covariance_too(runs: Runs, in_order: Path) -> None:
    local = runs.make("--covariance", "here", source=str(in_order))
    assert local.returncode == 0, local.stderr
    first = runs.out.read_bytes()
    made = runs.make("--covariance", "there", "--force", "--keep", "2")
    assert made.returncode == 0, made.stderr
    assert runs.out.read_bytes() == first
    names = sorted(os.listdir(runs.folder / "here"))
    assert sorted(os.listdir(runs.folder / "there")) == names
    for name in names:
        a, b = ((runs.folder / kind / name).read_bytes() for kind in ("here", "there"))
        # a run goes on with its own only; of which pass the sums are is the same wherever the model lies
        assert (a == b) == (name != "identity"), name


def test_what_passes_is_waited_for(runs: Runs, expected: bytes) -> None:
    runs.hub.fail(*passing_faults(runs.shards, N_SHARDS))
    ran = runs.make("--keep", "3")
    assert ran.returncode == 0, ran.stderr
    assert runs.out.read_bytes() == expected
    assert all(fault.hits for fault in runs.hub.faults)


def test_wrong_bytes_are_refused_and_what_is_done_is_kept(runs: Runs, expected: bytes) -> None:
    runs.hub.fail(runs.shards(4, wrong=30_000, times=2))
    refused = runs.make("--keep", "1")
    assert refused.returncode == 4
    assert "model-00004-of-00005.safetensors: what came twice is not what the repository has at commit" in (
        refused.stderr
    )
    assert "is kept in" in refused.stderr
    assert not runs.out.exists()
    before = len(runs.whole())
    ran = runs.make("--keep", "1")
    assert ran.returncode == 0, ran.stderr
    assert runs.out.read_bytes() == expected
    assert len(runs.whole()) - before <= before  # the layers that were done are not read again
    assert os.listdir(runs.folder) == ["i.gguf"]


@pytest.mark.parametrize("keep", ["1", "2"])
def test_after_kill_9_the_same_command_goes_on(runs: Runs, keep: str, expected: bytes) -> None:
    process = runs.start("--keep", keep)
    runs.hub.fail(runs.shards(4, do=process.kill))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert (runs.folder / "i.gguf.partial/round-0/state").exists() or keep == "2"
    left = list(runs.folder.glob("Tiny-V3-*.partial/source/*"))
    assert left
    runs.watch()
    before = len(runs.whole())
    ran = runs.make("--keep", keep)
    assert ran.returncode == 0, ran.stderr
    assert runs.out.read_bytes() == expected
    assert runs.most_files <= int(keep)
    assert len(runs.whole()) - before < N_SHARDS + 2
    assert os.listdir(runs.folder) == ["i.gguf"]


def test_a_revision_that_moved_is_refused_with_both_commits(
    runs: Runs, dealt: Path, in_order: Path, expected: bytes
) -> None:
    first = runs.hub.add("me/Tiny-V3", in_order)
    process = runs.start("--keep", "1")
    runs.hub.fail(runs.shards(4, do=process.kill))
    process.communicate(timeout=300)
    assert (runs.folder / "i.gguf.partial/round-0/state").exists()
    second = runs.hub.add("me/Tiny-V3", dealt)
    refused = runs.make()
    assert refused.returncode == 13
    partial = f"{runs.out}.partial"
    assert refused.stderr.strip().splitlines()[-1] == (
        f"error: {SOURCE}: what is unfinished in {partial} is of commit {first}, and the repository is now at "
        f"{second}; to go on, give {SOURCE}@{first}, or remove {partial} to start again"
    )
    ran = runs.make("--keep", "1", source=f"{SOURCE}@{first}")
    assert ran.returncode == 0, ran.stderr
    assert runs.out.read_bytes() == expected


def test_ctrl_c_does_not_wait_for_the_server(runs: Runs, expected: bytes) -> None:
    process = runs.start("--keep", "1")
    endless = runs.shards(3, pause=600)
    runs.hub.fail(endless)
    while not endless.hits:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    runs.hub.faults.clear()
    assert runs.make("-q").returncode == 0
    assert runs.out.read_bytes() == expected


def evaluated(runs: Runs, source: str, *more: str) -> dict[str, Any]:
    how = ("--text", runs.text, *HOW, "-r", "Q4_K_M", "--json", *more)
    ran = runs.quantkit("eval", source, *how, cwd=runs.folder, env=ENV | {"TMPDIR": str(runs.folder)})
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    return said


def test_the_figures_of_an_evaluation_of_several_passes(runs: Runs, in_order: Path) -> None:
    more = ("-c", "80", "--prompts", "2")
    here = evaluated(runs, str(in_order), *more)
    runs.watch()
    there = evaluated(runs, SOURCE, *more, "--keep", "2")
    assert there == here
    assert 1 <= runs.most_files <= 2
    assert len(runs.whole()) > 2 * N_SHARDS  # what was dropped came again for the next pass
    before = len(runs.whole())
    assert evaluated(runs, SOURCE, *more, "--keep", "5") == here
    assert len(runs.whole()) - before == N_SHARDS  # what need not go stays for all passes
    assert os.listdir(runs.folder) == []


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    rules = """\
name: small
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "blk.*.ffn_*_exps.weight", type: Q2_K, why: so}
  - {match: "*", type: Q4_K, why: so}
"""
    file.write_text(rules)
    return file


def same_from_both(runs: Runs, local: Path, keep: str, command: str, *args: str | Path) -> list[Any]:
    """What a command prints as JSON of the folder, and of the Hub; -o is one file of each."""
    said = []
    for name, source, more in (("here", str(local), ()), ("there", SOURCE, ("--keep", keep))):
        words = [str(a).replace("SOURCE", source).replace("OUT", name) for a in args]
        ran = runs.quantkit(
            *command.split(), *words, *more, cwd=runs.folder, env=ENV | {"TMPDIR": str(runs.folder)}
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        said.append(json.loads(ran.stdout) if "--json" in args else ran.stdout)
    return said


def test_a_sensitivity_and_what_is_optimized_by_it(runs: Runs, in_order: Path) -> None:
    runs.watch()
    args = ("SOURCE", "--pre", "deepseek-v3", "-t", "1", "--text", runs.text, "-c", "32", "--chunks", "2")
    few = ("--groups", "role", "--bands", "1", "--probes", "Q2_K", "--types", "Q2_K,Q4_K,Q6_K", "-o", "OUT.json", "-q")
    same_from_both(runs, in_order, "3", "sensitivity measure", *args, *few)
    here, there = (json.loads((runs.folder / f"{name}.json").read_text()) for name in ("here", "there"))
    assert here == there
    both = same_from_both(
        runs, in_order, "3", "optimize", *args, "--target", "4.5bpw", "-s", "there.json", "--json", "-q", "--types",
        "Q2_K,Q4_K,Q6_K", "--no-compare",
    )  # fmt: skip
    assert both[0] == both[1]
    assert 1 <= runs.most_files <= 3
    assert sorted(os.listdir(runs.folder)) == ["here.json", "there.json"]


def test_a_policy_of_rounding(runs: Runs, in_order: Path, recipe: Path, tmp_path: Path) -> None:
    runs.watch()
    imatrix, cov = tmp_path / "imatrix.gguf", tmp_path / "cov"
    making.make(in_order, some_text(tmp_path / "text.txt", 1200), imatrix, n_chunks=40, covariance=cov)
    other = some_text(tmp_path / "other.txt", seed=5)
    both = same_from_both(
        runs, in_order, "3", "rounding tune", "SOURCE", "--pre", "deepseek-v3", "-t", "1", "--text", other, "-c", "32",
        "--chunks", "2", "-r", recipe, "--imatrix", imatrix, "--covariance", cov, "--method", "feedback",
        "--json", "-q",
    )  # fmt: skip
    assert both[0] == both[1]
    assert 1 <= runs.most_files <= 3


def test_a_study(runs: Runs, in_order: Path, recipe: Path) -> None:
    (runs.folder / "study.yaml").write_text(
        f"base: {recipe}\naxes: {{out: {{match: output.weight, types: [Q4_K, Q6_K]}}}}\n"
    )
    runs.watch()
    args = ("study.yaml", "SOURCE", "--pre", "deepseek-v3", "-t", "1", "--text", runs.text, "-c", "32", "--chunks", "2")
    same_from_both(runs, in_order, "2", "ablate run", *args, "-o", "OUT.db", "--at-a-time", "1", "-q")
    here, there = (
        json.loads(runs.quantkit("ablate", "show", f"{name}.db", "--json", cwd=runs.folder).stdout)
        for name in ("here", "there")
    )
    assert len(here["results"]) == 2
    assert here == there
    assert 1 <= runs.most_files <= 2
    again = ("ablate", "run", *args[:1], SOURCE, *args[2:], "-o", "x.db")
    refused = runs.quantkit(*again, "--cache", "c", cwd=runs.folder)
    assert (refused.returncode, "--cache needs all of the source at hand" in refused.stderr) == (5, True)
    gone = runs.shards(3, status=404, times=99, after=0)
    runs.hub.fail(gone)
    failed = runs.quantkit(*again, cwd=runs.folder, env=ENV)
    assert failed.returncode == 4  # and not a variant's trouble
    assert not runs.quantkit("ablate", "show", "x.db", "--json", cwd=runs.folder).stdout.count('"trouble": "hf')


def test_two_runs_do_not_share_a_folder(runs: Runs, tmp_path: Path) -> None:
    model = with_weights(open_model(SOURCE, OPTIONS))
    how = Fetching(tmp_path)
    with fetched(model, how), pytest.raises(ResumeError) as e, fetched(model, how):
        pass
    assert re.fullmatch(
        rf"{tmp_path}/Tiny-V3-[0-9a-f]{{12}}\.partial: process {os.getpid()} has shards of the same repository in it; "
        "wait for it, or give another folder with --shards",
        str(e.value),
    )


def test_a_model_is_the_same_wherever_it_lies(hub: Hub, in_order: Path, dealt: Path) -> None:
    """Results are of its weights; an unfinished run is of a commit."""
    tokens = np.zeros((1, 4), np.int32)
    here = open_model(str(in_order), OPTIONS)
    hub.add("me/Tiny-V3", in_order)
    there = with_weights(open_model(SOURCE, OPTIONS))
    hub.add("me/Tiny-V3", in_order)
    moved = with_weights(open_model(SOURCE, OPTIONS))
    hub.add("me/Tiny-V3", dealt)
    other = with_weights(open_model(SOURCE, OPTIONS))
    assert of_model(here) == of_model(there) == of_model(moved) != of_model(other)
    runs = {of_run(m.source, tokens, ()) for m in (here, there, moved, other) if m.source is not None}
    assert len(runs) == 4


def test_from_python(hub: Hub, in_order: Path, text: Path, expected: bytes, tmp_path: Path) -> None:
    """The same bytes; the folder of shards is gone afterwards; a model that is here is read where it is."""
    hub.add("me/Tiny-V3", in_order)
    options = qk.imatrix.ImatrixOptions(threads=1)
    there = tmp_path / "shards"
    found = qk.open_model(SOURCE, pre="deepseek-v3")
    for keep, model in ((2, found), (1, qk.open_model(in_order, pre="deepseek-v3"))):
        with qk.fetched_weights(model, keep=keep, folder=there) as readable:
            out = tmp_path / f"{keep}.gguf"
            qk.imatrix.make(readable, [text], out, 32, 4, options=options)
        assert out.read_bytes() == expected
    assert os.listdir(there) == []
    with pytest.raises(qk.SourceError):
        qk.imatrix.make(found, [text], tmp_path / "x.gguf", 32, 4, options=options)

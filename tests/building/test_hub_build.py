"""Builds with a source on the Hub, shard by shard: the same bytes as from a folder, whatever happens in between."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from hub_server import TOKEN, Fault, Hub, passing_faults
from making import some_text
from reshard import reshard

import quantkit as qk

RECIPE = ("-r", "UD-IQ1_S", "--pre", "deepseek-v3")


@pytest.fixture(scope="session")
def dealt(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 in five shards, with no scale in the shard of its weight."""
    return reshard(tiny_v3, tmp_path_factory.mktemp("dealt") / "Tiny-V3", 5, deal=True)


@pytest.fixture(scope="session")
def in_order(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 in five shards, in order; the last has the output tensor, and is fetched after the first."""
    return reshard(tiny_v3, tmp_path_factory.mktemp("ordered") / "Tiny-V3", 5)


@pytest.fixture(scope="session")
def expected(in_order: Path, tiny_imatrix: Path, quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file built from the folder."""
    out = tmp_path_factory.mktemp("expected") / "m.gguf"
    assert quantkit("build", in_order, "-o", out, *RECIPE, "--imatrix", tiny_imatrix, "-q").returncode == 0
    return out.read_bytes()


class Builds:
    """Builds of me/Tiny-V3 to m.gguf."""

    def __init__(self, hub: Hub, quantkit: Run, imatrix: Path, folder: Path) -> None:
        self.hub, self.quantkit, self.folder = hub, quantkit, folder
        self.out, self.source = folder / "m.gguf", folder / "m.gguf.partial" / "source"
        self.options = (*RECIPE, "--imatrix", imatrix)
        self.most_files = 0

    def run(self, *more: str | Path, source: str = "hf://me/Tiny-V3") -> subprocess.CompletedProcess[str]:
        return self.quantkit("build", source, "-o", self.out, *self.options, *more, cwd=self.folder)

    def start(self, *more: str) -> subprocess.Popen[str]:
        args: list[str | Path] = [
            sys.executable,
            "-m",
            "quantkit",
            "build",
            "hf://me/Tiny-V3",
            "-o",
            self.out,
            *self.options,
            *more,
        ]
        env = os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.05"}
        pipe = subprocess.PIPE
        return subprocess.Popen(args, cwd=self.folder, env=env, stdout=pipe, stderr=pipe, text=True)

    def look(self) -> None:
        """Count the shards that are there, complete or not."""
        if self.source.is_dir():
            self.most_files = max(self.most_files, len(os.listdir(self.source)))

    def shards(self, n: int, **what: Any) -> Fault:
        """Plan a fault for the n-th shard, after its header was read."""
        return Fault(f"/me/Tiny-V3/model-{n:05d}-*", host="cdn", **({"after": 1} | what))


@pytest.fixture
def builds(hub: Hub, quantkit: Run, tiny_imatrix: Path, in_order: Path, tmp_path: Path) -> Builds:
    hub.add("me/Tiny-V3", in_order)
    (tmp_path / "out").mkdir()
    return Builds(hub, quantkit, tiny_imatrix, tmp_path / "out")


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("kind", "keep"), [("in_order", 1), ("dealt", 1), ("dealt", 3)])
def test_the_same_bytes_with_few_shards_at_a_time(
    builds: Builds, kind: str, keep: int, expected: bytes, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    builds.hub.add("me/Tiny-V3", folder)
    builds.hub.fail(Fault("*.safetensors", host="cdn", times=999, do=builds.look))
    ran = builds.run("--keep", str(keep), "--threads", "2")
    assert ran.returncode == 0, ran.stderr
    assert builds.out.read_bytes() == expected
    assert 1 <= builds.most_files <= keep
    whole = [one.sent for one in builds.hub.log if one.host == "cdn" and one.sent > 400_000]
    assert sorted(whole) == sorted(path.stat().st_size for path in folder.glob("*.safetensors"))  # each shard once
    assert builds.hub.sent("*.safetensors") < sum(whole) + 100_000
    assert os.listdir(builds.folder) == ["m.gguf"]
    said = " ".join(ran.stdout.split())
    assert re.search(r"download .* in 5 shards from hf://me/Tiny-V3 at commit [0-9a-f]{12}; at most ", said)
    assert TOKEN not in ran.stdout + ran.stderr


def test_a_limit_of_bytes(builds: Builds, in_order: Path, expected: bytes) -> None:
    largest = max(path.stat().st_size for path in in_order.glob("*.safetensors"))
    refused = builds.run("--disk", str(largest - 1))
    assert refused.returncode == 7
    assert f"has {largest:,} bytes, more than the {largest - 1:,} of --disk; give --disk" in refused.stderr
    assert not os.listdir(builds.folder)
    builds.hub.fail(Fault("*.safetensors", host="cdn", times=999, do=builds.look))
    assert builds.run("--disk", str(largest), "-q").returncode == 0
    assert (builds.most_files, builds.out.read_bytes() == expected) == (1, True)


@pytest.mark.parametrize("keep", ["1", "3"])
def test_after_kill_9_the_same_command_goes_on(builds: Builds, keep: str, in_order: Path, expected: bytes) -> None:
    process = builds.start("--keep", keep)
    builds.hub.fail(builds.shards(4, do=process.kill))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert not builds.out.exists()
    before = builds.hub.sent("*.safetensors")
    ran = builds.run("--keep", keep)
    assert ran.returncode == 0, ran.stderr
    assert "continuing the build" in ran.stdout or keep == "3"
    assert builds.out.read_bytes() == expected
    again = builds.hub.sent("*.safetensors") - before
    # with one at a time, four shards were done and removed, and one of these has a weight with scales in the last
    # shard; with three, complete ones are not fetched again
    assert again < shard_bytes(in_order) * 2.5 / 5


def test_what_passes_is_waited_for_and_nothing_is_lost(builds: Builds, expected: bytes) -> None:
    builds.hub.fail(*passing_faults(builds.shards, 5))
    ran = builds.run("--keep", "2")
    assert ran.returncode == 0, ran.stderr
    assert builds.out.read_bytes() == expected
    assert all(fault.hits for fault in builds.hub.faults)


def test_wrong_bytes_are_refused_and_never_used(builds: Builds, expected: bytes) -> None:
    builds.hub.fail(builds.shards(3, wrong=30_000, times=2))
    refused = builds.run("--keep", "1")
    assert refused.returncode == 4
    assert "model-00003-of-00005.safetensors: what came twice is not what the repository has at commit" in (
        refused.stderr
    )
    assert "are kept in" in refused.stderr
    assert not builds.out.exists()
    assert os.listdir(builds.source) == []
    assert builds.run("--keep", "1").returncode == 0
    assert builds.out.read_bytes() == expected


def test_kept_shards_are_hashed_before_they_are_used(builds: Builds, expected: bytes) -> None:
    builds.hub.fail(builds.shards(3, status=404, times=9))
    refused = builds.run("--keep", "3")
    assert refused.returncode == 4
    assert "model-00003-of-00005.safetensors: there is no such file" in refused.stderr
    whole = [path for path in builds.source.iterdir() if path.suffix != ".part"]
    assert whole
    for path in whole:
        with open(path, "r+b") as f:
            f.seek(20_000)
            f.write(b"\xff" * 100)
    builds.hub.faults.clear()
    ran = builds.run("--keep", "2")
    assert ran.returncode == 0, ran.stderr
    assert builds.out.read_bytes() == expected


def test_a_revision_that_moved_is_refused_with_both_commits(
    builds: Builds, dealt: Path, in_order: Path, expected: bytes
) -> None:
    first = builds.hub.add("me/Tiny-V3", in_order)
    process = builds.start("--keep", "1")
    builds.hub.fail(builds.shards(3, do=process.kill))
    process.communicate(timeout=300)
    second = builds.hub.add("me/Tiny-V3", dealt)
    assert first != second
    refused = builds.run()
    assert refused.returncode == 13
    assert refused.stderr.strip().endswith(
        f"hf://me/Tiny-V3: the unfinished build is of commit {first}, and the repository is now at {second}; to go on, "
        f"give hf://me/Tiny-V3@{first}, or start again with --restart"
    )
    ran = builds.run("--keep", "1", source=f"hf://me/Tiny-V3@{first}")
    assert ran.returncode == 0, ran.stderr
    assert "were kept from before" in ran.stdout
    assert builds.out.read_bytes() == expected
    builds.out.unlink()
    builds.hub.faults.clear()
    process = builds.start("--keep", "1")
    builds.hub.fail(builds.shards(3, do=process.kill))
    process.communicate(timeout=300)
    builds.hub.add("me/Tiny-V3", in_order)
    assert builds.run("--restart").returncode == 0
    assert builds.out.read_bytes() == expected


def test_a_place_that_takes_no_more_is_one_sentence(
    builds: Builds, tiny_v3: Path, expected: bytes, tmp_path: Path
) -> None:
    large = reshard(tiny_v3, tmp_path / "Tiny-V3", 2)
    builds.hub.add("me/Tiny-V3", large)
    smallest = min(path.stat().st_size for path in large.glob("*.safetensors"))
    limit = len(expected) + 5000
    assert limit < smallest
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refused = builds.run("--keep", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.returncode == 7
    assert "source: model-0000" in refused.stderr
    assert "cannot be kept there: File too large; mend that and give the same command again" in refused.stderr
    assert builds.run("--keep", "2").returncode == 0
    assert builds.out.read_bytes() == expected


def test_status_says_what_has_come_and_what_is_left(builds: Builds, in_order: Path, quantkit: Run) -> None:
    process = builds.start("--keep", "1")
    builds.hub.fail(builds.shards(4, do=process.kill))  # the last of five that comes but one
    process.communicate(timeout=300)
    said = json.loads(quantkit("status", builds.out, "--json").stdout)
    sizes = [path.stat().st_size for path in sorted(in_order.glob("*.safetensors"))]
    n = said["shards"]["fetched"]
    assert 1 <= n < 5
    assert said["shards"]["kept"] <= 1
    assert said["shards"]["left"] == 5 - n
    assert said["shards"]["fetched_bytes"] + said["shards"]["left_bytes"] == sum(sizes)
    text = quantkit("status", builds.out).stdout
    assert re.search(rf"shards of the source: {n} fetched \(.*\), [01] kept \(.*\), {5 - n} left \(.*\)", text)
    assert builds.run("--keep", "1").returncode == 0
    assert os.listdir(builds.folder) == ["m.gguf"]


@pytest.mark.parametrize("keep", [1, 3])
def test_second_moments_are_computed_meanwhile(
    builds: Builds, keep: int, in_order: Path, quantkit: Run, tmp_path: Path
) -> None:
    """Rounded by feedback, the model computed from the same shards layer by layer: the file that is built here."""
    text = some_text(tmp_path / "text.txt", 1200)
    env = {"OMP_NUM_THREADS": "1"}
    more = ("--rounding", "feedback", "--text", text, "-c", "32", "--chunks", "40", "-t", "1")
    here = quantkit("build", in_order, "-o", tmp_path / "here.gguf", *builds.options, *more, env=env)
    assert here.returncode == 0, here.stderr
    builds.hub.fail(Fault("*.safetensors", host="cdn", times=9999, do=builds.look))
    how = ("build", "hf://me/Tiny-V3", "-o", builds.out, *builds.options, *more, "--keep", str(keep))
    if keep == 1:
        builds.hub.fail(builds.shards(4, wrong=30_000, times=2, after=3))
        refused = quantkit(*how, env=env, cwd=builds.folder)
        assert (refused.returncode, "what came twice is not" in refused.stderr) == (4, True), refused.stderr
        assert "are kept in" in refused.stderr
    ran = quantkit(*how, env=env, cwd=builds.folder)
    assert ran.returncode == 0, ran.stderr
    assert builds.out.read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert 1 <= builds.most_files <= keep
    if keep == 3:
        assert re.search(r"download +at least .* in 5 shards from", " ".join(ran.stdout.split()))
    assert os.listdir(builds.folder) == ["m.gguf"]


def test_from_python(builds: Builds, tiny_imatrix: Path, expected: bytes, tmp_path: Path) -> None:
    model = qk.open_model("hf://me/Tiny-V3", pre="deepseek-v3")
    plan = qk.plan(model, "UD-IQ1_S", tiny_imatrix)
    builds.hub.fail(Fault("*.safetensors", host="cdn", times=999, do=builds.look))
    made = qk.build(plan, builds.out, threads=1, options=qk.BuildOptions(keep=1))
    assert builds.out.read_bytes() == expected
    assert (made.nbytes, builds.most_files) == (len(expected), 1)
    with pytest.raises(qk.UnsupportedError, match="a cache needs all of the source at hand"):
        qk.build(plan, tmp_path / "x.gguf", options=qk.BuildOptions(cache=tmp_path / "cache"))


def test_ctrl_c_does_not_wait_for_the_server(builds: Builds, expected: bytes) -> None:
    process = builds.start("--keep", "1")
    endless = builds.shards(3, pause=600)
    builds.hub.fail(endless)
    while not endless.hits:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    builds.hub.faults.clear()
    assert builds.run("-q").returncode == 0
    assert builds.out.read_bytes() == expected


def test_what_was_built_is_verified_by_a_few_ranges(builds: Builds, in_order: Path, expected: bytes) -> None:
    builds.out.write_bytes(expected)
    more = ("verify", builds.out, "--source", "hf://me/Tiny-V3", *builds.options, "--sample", "2")
    done = builds.quantkit(*more, "--json", cwd=builds.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert any("row" in one for one in said["checked"]), said
    assert 100_000 < builds.hub.sent("*.safetensors") < shard_bytes(in_order)


def test_what_needs_all_of_a_source_is_refused(builds: Builds, quantkit: Run, tmp_path: Path) -> None:
    for more, says in (
        (("--attest", "a.json"), "--attest needs all of the source at hand"),
        (("--cache", "cache"), "--cache needs all of the source at hand"),
    ):
        refused = builds.run(*more)
        assert (refused.returncode, says in refused.stderr) == (5, True), refused.stderr
    assert not os.listdir(builds.folder)


@pytest.fixture(scope="module")
def halves(in_order: Path, quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v3 as a GGUF of 16-bit weights in shards."""
    folder = tmp_path_factory.mktemp("halves")
    recipe = folder / "bf16.yaml"
    recipe.write_text('name: h\narch: [deepseek2]\nfile_type: BF16\nrules:\n  - {match: "*", type: BF16, why: all}\n')
    args = ("--pre", "deepseek-v3", "--split-max-size", "600KB", "-q")
    done = quantkit("build", in_order, "-o", folder / "m.gguf", "-r", recipe, *args)
    assert done.returncode == 0, done.stderr
    recipe.unlink()
    return folder


def test_a_gguf_on_the_hub_is_built_from_by_the_same_window(
    hub: Hub, quantkit: Run, halves: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """Its shards come one at a time, each once, and the bytes are those of a build from the file; after kill -9 too."""
    shards = sorted(halves.glob("*.gguf"))
    assert len(shards) > 3
    (tmp_path / "served").mkdir()
    for path in shards:
        (tmp_path / "served" / "Q").mkdir(exist_ok=True)
        (tmp_path / "served" / "Q" / path.name).symlink_to(path)
    hub.add("me/G", tmp_path / "served")
    options, out = ("-r", "UD-IQ1_S", "--imatrix", tiny_imatrix), tmp_path / "m.gguf"
    assert quantkit("build", shards[0], "-o", tmp_path / "here.gguf", *options, "-q").returncode == 0
    expected = (tmp_path / "here.gguf").read_bytes()
    source, most = f"hf://me/G/Q/{shards[0].name}", [0]
    hub.log.clear()

    def look() -> None:
        kept = tmp_path / "m.gguf.partial" / "source"
        most[0] = max(most[0], len(os.listdir(kept)) if kept.is_dir() else 0)

    hub.fail(Fault("*.gguf", host="cdn", times=999, do=look))
    done = quantkit("build", source, "-o", out, *options, "--keep", "1")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == expected
    assert most == [1]
    assert f"in {len(shards)} shards from hf://me/G at commit" in " ".join(done.stdout.split())
    whole = sum(path.stat().st_size for path in shards)
    headers = sum(min(1 << 20, path.stat().st_size) for path in shards)
    assert hub.sent("*.gguf") <= whole + headers
    assert not (tmp_path / "m.gguf.partial").exists()

    out.unlink()
    hub.faults.clear()
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "build",
        source,
        "-o",
        str(out),
        *map(str, options),
        "--keep",
        "1",
        "-q",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.05"})
    hub.fail(Fault(f"*{shards[-1].name}", host="cdn", after=1, do=process.kill))
    assert process.wait(300) == -signal.SIGKILL
    assert quantkit("build", source, "-o", out, *options, "--keep", "1", "-q").returncode == 0
    assert out.read_bytes() == expected
    done = quantkit("verify", out, "--source", source, *options, "--sample", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("row" in one for one in json.loads(done.stdout)["checked"])
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox. " * 200)
    done = quantkit("imatrix", "make", source, "--text", text, "-o", tmp_path / "i.gguf")
    assert (done.returncode, "`quantkit download`" in done.stderr) == (4, True), done.stderr

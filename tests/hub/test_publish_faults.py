"""quantkit publish when a hundred things go wrong, at the local server that speaks the Hub's API."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Run
from hub_server import TOKEN, Hub
from hub_storm import Storm
from hub_uploads import Uploads

from quantkit.cli import main
from quantkit.hub import patience

N_FAULTS = 100
#: a run is given again after one that has ended; more would mean that it does not go on
_MOST_RUNS = 40


@pytest.fixture(scope="module")
def shards(sound_set: Path, quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many shards, of which some are sent in parts, and its manifest."""
    folder = tmp_path_factory.mktemp("many")
    first = sorted(sound_set.glob("*.gguf"))[0]
    assert quantkit("merge", first, folder / "whole.gguf", "-q").returncode == 0
    assert quantkit("split", folder / "whole.gguf", folder / "m", "--max-tensors", "6", "-q").returncode == 0
    (folder / "whole.gguf").unlink()
    first = sorted(folder.glob("*.gguf"))[0]
    assert quantkit("verify", first, "--write-manifest", folder / "sha.json", "-q").returncode == 0
    return folder


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_hundred_faults(
    hub: Hub,
    shards: Path,
    seed: int,
    quantkit: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever ends a run, nothing is to be seen of it, and the same command goes on; in the end there is one commit,
    and what is downloaded is what was published."""
    monkeypatch.setattr(patience, "WAITS", (0.0,) * 5)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # nor are Retry-After's seconds waited
    uploads, storm = Uploads(hub, part=8 << 10), Storm(hub, N_FAULTS, seed)
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    args = ["quantkit", "publish", str(shards), "me/Tiny", "--license", "mit", "--base-model", "a/B", "-q", "--json"]
    monkeypatch.setattr(sys, "argv", args)
    ends: list[str] = []
    while True:
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        assert "signature=" not in said.out + said.err
        if not end.value.code:
            break
        repo = hub.repos.get("me/Tiny")
        if repo is not None:
            seen = [set(commit.files) for commit in repo.commits.values()]
            assert seen in ([{".gitattributes"}], [{".gitattributes"}, {".gitattributes", "README.md", *files}])
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert (end.value.code, len(errors)) == (7, 1), said.err
        assert "Traceback" not in said.err
        ends.append(errors[0])
        assert len(ends) < _MOST_RUNS, ends
    assert storm.left == 0, f"{storm.left} faults were not met"
    last = json.loads(said.out)
    assert sorted(last["sent"] + last["skipped"]) == sorted([*files, "README.md"])
    assert not (last["sent"] and last["skipped"])
    assert len(hub.repos["me/Tiny"].commits) == 2
    to = tmp_path / "back"
    done = quantkit("download", "me/Tiny", "--include", "*", "--to", to, "-q")
    assert done.returncode == 0, done.stderr
    back = {path.name: path.read_bytes() for path in to.iterdir()}
    assert {name: data for name, data in back.items() if name not in ("README.md", ".gitattributes")} == files
    assert "license: mit" in back["README.md"].decode()
    assert not any(one.token for one in hub.log if one.host == "cdn")
    large = sum(len(data) for name, data in files.items() if name.endswith(".gguf"))
    stored = sum(n for _, n in uploads.put)
    with capsys.disabled():
        sys.stdout.write(
            f"\npublish, seed {seed}: {N_FAULTS} faults ({_counts(storm)}), {len(ends) + 1} runs, {large:,} bytes of "
            f"weights, {stored:,} received for them\n"
        )


def _counts(storm: Storm) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(storm.counts.items()))

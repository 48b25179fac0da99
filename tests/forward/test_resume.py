"""What a stopped pass leaves, and how the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import flip
from passing import logits_of, model_of, random_tokens

from quantkit.base.errors import OutputError, ResumeError
from quantkit.forward.kept import Kept
from quantkit.forward.layer import Input
from quantkit.forward.model import Quantized
from quantkit.forward.stream import Options, Pass

TOKENS = random_tokens(384, n_chunks=4, n_ctx=16)


def options(folder: Path, identity: str = "a run", **more: Any) -> Options:
    return Options(n_threads=1, folder=folder, identity=identity, **more)


class Sums:
    """An observer that sums, and keeps its sums between layers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.sums: dict[str, np.ndarray] = {}
        self.layers: list[int] = []

    def see(self, given: Input) -> None:
        name = f"{given.names[0]}.{given.mat}"
        self.counts[name] += len(given.x)
        summed = given.x.flatten(1).double().sum(0).numpy()
        self.sums[name] = self.sums.get(name, 0) + summed

    def end_of_layer(self, number: int) -> None:
        self.layers.append(number)

    def state(self) -> dict[str, Any]:
        return {f"{n}.counts": np.array(self.counts[n], np.int64) for n in self.counts} | dict(self.sums)

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            if name.endswith(".counts"):
                self.counts[name.removesuffix(".counts")] = int(values)
            else:
                self.sums[name] = values


class Stop(Exception):  # noqa: N818
    """Raised by a test to end a pass."""


#: what is done in a layer of four experts: attention, router and shared expert, each expert
STEPS = [TOKENS.size * done // 6 for done in range(7)]


def stop_within(n_layers: int) -> Callable[[str, int, int], None]:
    """Stop when a part of the next layer is done."""

    def progress(_what: str, n_done: int, _total: int) -> None:
        if n_done > n_layers * TOKENS.size:
            raise Stop

    return progress


CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from passing import logits_of, model_of
from test_resume import TOKENS, options

def progress(what, n_done, n_total):
    if n_done == n_total:  # in the middle of what is kept after layer 2
        from quantkit.forward import kept
        real = os.fsync
        def die(fd):
            os.kill(os.getpid(), signal.SIGKILL)
        kept.os.fsync = die

logits_of(model_of(Path(sys.argv[1])), TOKENS, options(Path(sys.argv[2])), progress=progress)
"""


def test_kill_9_and_again(tiny_v3: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here.parent), str(here), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(  # not where the source is, which has no compiled kernels
        [sys.executable, "-c", CHILD, tiny_v3, tmp_path / "kept"],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path / "kept")) == ["lock", "state", "state.next"]
    told: list[int] = []
    again = logits_of(model_of(tiny_v3), TOKENS, options(tmp_path / "kept"), progress=lambda _w, n, _t: told.append(n))
    assert told == [2 * TOKENS.size + done for done in STEPS]  # where it goes on, and only the last layer
    assert torch.equal(again, logits_of(model_of(tiny_v3), TOKENS))


def test_sums_and_variants_go_on(tiny_v3: Path, tmp_path: Path) -> None:
    """The variant differs from layer 1 on; the pass is stopped within layer 2, between the two."""

    def run(folder: Path | None, **more: Any) -> tuple[list[Sums], torch.Tensor]:
        model = model_of(tiny_v3)
        both = [model, model.variant("b", Quantized({"blk.1.ffn_up_exps.weight": "Q4_0"}))]
        watching = [Sums(), Sums()]
        how = Options(n_threads=1) if folder is None else options(folder)
        return watching, logits_of(both, TOKENS, how, observers=watching, **more)

    sums, logits = run(None)
    with pytest.raises(Stop):
        run(tmp_path / "kept", progress=stop_within(3))
    told: list[tuple[int, int]] = []
    sums_again, logits_again = run(tmp_path / "kept", progress=lambda _w, n, t: told.append((n, t)))
    both = [STEPS[i] + STEPS[i - behind] for i in range(1, 7) for behind in (1, 0)]  # the two in turn
    assert told == [(3 * TOKENS.size + done, 5 * TOKENS.size) for done in (0, *both)]
    assert torch.equal(logits_again, logits)
    for ours, theirs in zip(sums_again, sums, strict=True):
        assert ours.counts == theirs.counts
        assert ours.layers == [2]
        assert all(np.array_equal(ours.sums[name], theirs.sums[name]) for name in theirs.sums)


def test_a_pass_that_is_done_goes_on_with_the_head(tiny_v3: Path, tmp_path: Path) -> None:
    first = logits_of(model_of(tiny_v3), TOKENS, options(tmp_path))
    told: list[int] = []
    again = logits_of(model_of(tiny_v3), TOKENS, options(tmp_path), progress=lambda _w, n, _t: told.append(n))
    assert told == [3 * TOKENS.size]  # where it goes on, and no layer
    assert torch.equal(first, again)


def test_not_after_each_layer(tiny_v3: Path, tmp_path: Path) -> None:
    """With time between them only the last is kept."""
    with pytest.raises(Stop):
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path, keep_seconds=3600), progress=stop_within(2))
    assert os.listdir(tmp_path) == ["lock"]
    logits_of(model_of(tiny_v3), TOKENS, options(tmp_path, keep_seconds=3600))
    assert sorted(os.listdir(tmp_path)) == ["lock", "state"]


def test_ctrl_c_leaves_what_was_kept(tiny_v3: Path, tmp_path: Path) -> None:
    def interrupt(_what: str, n_done: int, _total: int) -> None:
        if n_done == 2 * TOKENS.size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path), progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["lock", "state"]
    assert torch.equal(logits_of(model_of(tiny_v3), TOKENS, options(tmp_path)), logits_of(model_of(tiny_v3), TOKENS))


def test_two_at_once(tiny_v3: Path, tmp_path: Path) -> None:
    with Kept(tmp_path, "a run"), pytest.raises(ResumeError) as caught:
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path))
    assert str(caught.value) == f"{tmp_path}: another run is using it; wait for it, or give another output"
    logits_of(model_of(tiny_v3), TOKENS, options(tmp_path))


def test_of_another_run(tiny_v3: Path, tmp_path: Path) -> None:
    logits_of(model_of(tiny_v3), TOKENS, options(tmp_path))
    with pytest.raises(ResumeError) as caught:
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path, "another"))
    assert str(caught.value) == (
        f"{tmp_path}/state: is of another run (other model, text or settings); give another output, or remove "
        f"{tmp_path}"
    )


@pytest.fixture
def kept(tiny_v3: Path, tmp_path: Path) -> Path:
    """The file of a pass that was stopped after two layers."""
    with pytest.raises(Stop):
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path), progress=stop_within(2))
    return tmp_path / "state"


def not_gone_on_with(kept: Path, why: str, tiny_v3: Path) -> None:
    with pytest.raises(ResumeError) as caught:
        logits_of(model_of(tiny_v3), TOKENS, options(kept.parent))
    assert str(caught.value) == f"{kept}: cannot be continued: {why}; remove {kept.parent}"


def test_a_flipped_bit(kept: Path, tiny_v3: Path) -> None:
    flip(kept, kept.stat().st_size - 1000)
    not_gone_on_with(kept, "its data is not what was written", tiny_v3)


def test_a_file_cut_short(kept: Path, tiny_v3: Path) -> None:
    os.truncate(kept, kept.stat().st_size - 5)
    not_gone_on_with(kept, "it is too short", tiny_v3)


def test_a_file_with_more(kept: Path, tiny_v3: Path) -> None:
    with kept.open("ab") as f:
        f.write(b"x")
    not_gone_on_with(kept, "its data is not what was written", tiny_v3)


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe\n", b"{}\n", b"[1]\n", b"null\n", b"\0" * 5000])
def test_a_file_of_something_else(data: bytes, kept: Path, tiny_v3: Path) -> None:
    kept.write_bytes(data)
    not_gone_on_with(kept, "it is not what a run keeps", tiny_v3)


def test_a_state_of_other_tokens(kept: Path, tiny_v3: Path) -> None:
    """The same identity by mistake: it is not taken for what it is not."""
    with pytest.raises(ResumeError) as caught:
        logits_of(model_of(tiny_v3), TOKENS[:2], options(kept.parent))
    assert str(caught.value) == (
        f"{kept}: cannot be continued: it has an array [4, 16, 256] where there should be [2, 16, 256]; "
        f"remove {kept.parent}"
    )


def test_no_folder_to_keep_in(tiny_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        Pass([model_of(tiny_v3)], TOKENS, options(tmp_path / "file" / "kept")).run()
    assert str(caught.value) == f"{tmp_path}/file/kept: cannot be written: Not a directory"


def test_a_full_disk(tiny_v3: Path, tmp_path: Path) -> None:
    """The last layer that was kept stays."""
    with pytest.raises(Stop):
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path), progress=stop_within(1))
    os.symlink("/dev/full", tmp_path / "state.next")
    with pytest.raises(OutputError) as caught:
        logits_of(model_of(tiny_v3), TOKENS, options(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: 65,536 bytes of what is kept between layers cannot be written: No space left on device; free "
        "some space, and run the same command again: it continues after the last saved layer"
    )
    (tmp_path / "state.next").unlink()
    told: list[int] = []
    logits_of(model_of(tiny_v3), TOKENS, options(tmp_path), progress=lambda _w, n, _t: told.append(n))
    assert told == [TOKENS.size + done for done in STEPS] + [2 * TOKENS.size + done for done in STEPS[1:]]

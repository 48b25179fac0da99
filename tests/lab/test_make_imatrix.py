"""Importance matrices made by the pass: llama-imatrix's values, from any source; killed at any moment; full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imatrices
import making
import numpy as np
import pytest
import small_builds
from conftest import Tools
from making import CTX

from quantkit.base.errors import ImatrixError, OutputError, ResumeError, SourceError, TextError, WeightError
from quantkit.building.folder import folder_of
from quantkit.imatrix.matrix import open_imatrix
from quantkit.lab.calibration.make_imatrix import Target
from quantkit.model.open import open_model

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.some_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def made(tiny_v3: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkpoint, 4 chunks."""
    out = tmp_path_factory.mktemp("made") / "imatrix.gguf"
    making.make(tiny_v3, file, out)
    return out


class EnoughError(Exception):
    """Raised where a run is to end."""


@pytest.mark.tools
def test_llama_imatrix_has_the_same(
    made: Path, file: Path, tiny_bf16: Path, imatrix_tool: Path, tmp_path: Path
) -> None:
    how: list[str | Path] = ["-f", file, "-c", str(CTX), "--chunks", "4", "--no-ppl"]
    theirs = open_imatrix(str(imatrices.llama_imatrix(imatrix_tool, tiny_bf16, tmp_path / "theirs.gguf", *how)))
    ours = open_imatrix(str(made))
    assert ours.entries.keys() == theirs.entries.keys()
    assert (ours.n_chunks, ours.chunk_size, ours.datasets) == (4, CTX, (str(file),))
    differ, counted, every = 0.0, 0.0, []
    for name in theirs.entries:
        a, b = ours.sums(name), theirs.sums(name)
        assert a.in_sum2.shape == b.in_sum2.shape
        differ, counted = differ + float(np.abs(a.counts - b.counts).sum()), counted + float(b.counts.sum())
        u, v = making.means(ours, name), making.means(theirs, name)
        every.append((np.abs(u - v) / np.maximum(v, 1e-30))[a.counts == b.counts].ravel())
    assert differ <= 0.005 * counted
    relative = np.concatenate(every)
    assert np.median(relative) < 0.002
    assert np.quantile(relative, 0.99) < 0.05


@pytest.mark.tools
def test_stock_tools_read_it(made: Path, tools: Tools, imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    out = small_builds.llama_quantize(tools, tiny_bf16, tmp_path / "q.gguf", "ffn_.*_exps=iq4_xs\n", "Q4_K_M", made)
    assert out.stat().st_size > 0
    how: list[str | Path] = ["-m", tiny_bf16, "--in-file", made, "-o", tmp_path / "again.gguf"]
    done = subprocess.run([imatrix_tool, *how], capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    a, b = open_imatrix(str(made)), open_imatrix(str(tmp_path / "again.gguf"))
    for name in a.entries:
        np.testing.assert_array_equal(a.sums(name).in_sum2, b.sums(name).in_sum2)


@pytest.mark.tools
def test_a_gguf_gives_the_same_bytes_as_its_checkpoint(made: Path, file: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    making.make(tiny_bf16, file, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == made.read_bytes()


def test_in_sums_are_there_too(made: Path) -> None:
    for name in (matrix := open_imatrix(str(made))).entries:
        s = matrix.sums(name)
        assert s.in_sum is not None
        seen = s.counts > 0  # a mean square is no less than the square of the mean
        mean = s.in_sum[seen] / s.counts[seen][:, None]
        assert (mean**2 <= making.means(matrix, name)[seen] * 1.001 + 1e-9).all()


def test_the_output_tensor_when_asked(tiny_v3: Path, file: Path, made: Path, tmp_path: Path) -> None:
    making.make(tiny_v3, file, tmp_path / "x.gguf", process_output=True)
    with_output = open_imatrix(str(tmp_path / "x.gguf"))
    assert with_output.entries.keys() - open_imatrix(str(made)).entries.keys() == {"output.weight"}
    assert with_output.sums("output.weight").counts.tolist() == [4 * CTX]


def test_a_target_ends_the_run_and_is_counted_by_expert(tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    n_all = making.chunks_of(tiny_v3, file).n_chunks
    done = making.make(tiny_v3, file, tmp_path / "a.gguf", n_chunks=None, target=Target(0.5, 20))
    assert done.coverage is not None
    assert done.coverage >= 0.5
    assert done.n_chunks < n_all
    matrix = open_imatrix(str(tmp_path / "a.gguf"))
    assert matrix.n_chunks == done.n_chunks
    counts = np.concatenate([matrix.sums(f"blk.{i}.ffn_gate_exps.weight").counts for i in (1, 2)])
    assert done.coverage == (counts >= 20).mean()
    assert counts.sum() == 2 * 2 * done.n_chunks * CTX
    # rounds do not change what is summed
    making.make(tiny_v3, file, tmp_path / "b.gguf", n_chunks=done.n_chunks)
    other = open_imatrix(str(tmp_path / "b.gguf"))
    for name in matrix.entries:
        np.testing.assert_array_equal(matrix.sums(name).counts, other.sums(name).counts)
        np.testing.assert_allclose(matrix.sums(name).in_sum2, other.sums(name).in_sum2, rtol=1e-4)
    far = making.make(tiny_v3, file, tmp_path / "c.gguf", n_chunks=6, target=Target(1.0, 10**6))
    assert (far.coverage, far.n_chunks) == (0.0, 6)


def test_a_dense_model_has_no_coverage(file: Path, tmp_path: Path) -> None:
    import factory

    model = factory.dense_checkpoint(tmp_path / "Dense", factory.TINY_LLAMA)
    with pytest.raises(ImatrixError) as e:
        making.make(model, file, tmp_path / "x.gguf", target=Target(0.99, 100))
    assert str(e.value) == "Dense: has no experts, so there is no coverage to reach; leave it out"


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize("flags", [["--covariance"], ["--target"]])
def test_killed_before_any_rename_or_removal_the_same_files_come(
    flags: list[str], tiny_v3: Path, file: Path, tmp_path: Path
) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))}
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "tools" / "kills.py"), str(tiny_v3), str(file), str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert "out.gguf" in said["whole"]
    assert len(said["kills"]) > 8
    for kill in said["kills"]:
        assert (kill["how"], kill["again"]) == (-signal.SIGKILL, 0), kill
        made = {name: value for name, value in kill["made"].items() if "out.gguf.partial" not in name}
        made = {name: value for name, value in made.items() if "cov.partial" not in name}
        assert made == said["whole"], kill["n"]


def test_stopped_it_says_what_is_kept_and_goes_on(tiny_v3: Path, file: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    seen: list[int] = []

    def stop(_what: str, n_done: int, _n_total: int) -> None:
        seen.append(n_done)
        if n_done >= 2 * 4 * CTX:
            raise EnoughError

    with pytest.raises(EnoughError) as e:
        making.make(tiny_v3, file, out, progress=stop)
    kept = f"what is finished is kept in {folder_of(out)}; the same command goes on there"
    assert getattr(e.value, "kept", None) == kept
    assert not out.exists()
    seen.clear()
    making.make(tiny_v3, file, out, progress=lambda _w, n, _t: seen.append(n))
    # the first layer was not computed again; the others have six steps each: attention, router and four experts
    assert seen == [layer + 128 * step // 6 for layer in (128, 256) for step in range(layer == 256, 7)]
    assert out.read_bytes() == made.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


def test_stopped_before_anything_is_kept_nothing_is_left(tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    def stop(_what: str, _n_done: int, _n_total: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError) as e:
        making.make(tiny_v3, file, tmp_path / "x.gguf", progress=stop)
    assert getattr(e.value, "kept", None) is None
    assert not list(tmp_path.iterdir())


def test_what_is_unfinished_of_another_text_is_left_alone(tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"

    def stop(_what: str, n_done: int, _n_total: int) -> None:
        if n_done >= 2 * 4 * CTX:
            raise EnoughError

    with pytest.raises(EnoughError):
        making.make(tiny_v3, file, out, progress=stop)
    state = (folder_of(out) / "round-0" / "state").read_bytes()
    with pytest.raises(ResumeError) as e:
        making.make(tiny_v3, file, out, n_chunks=3)
    round_ = folder_of(out) / "round-0"
    assert str(e.value) == (
        f"{round_ / 'state'}: is of another run (other model, text or settings); give another output, or remove "
        f"{round_}"
    )
    assert (round_ / "state").read_bytes() == state


def test_two_at_once(tiny_v3: Path, file: Path, made: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "x.gguf", []

    def another(_what: str, n_done: int, _n_total: int) -> None:
        if n_done == 4 * CTX:
            with pytest.raises(ResumeError) as e:
                making.make(tiny_v3, file, out)
            said.append(str(e.value))

    making.make(tiny_v3, file, out, progress=another)
    assert said == [f"{out}: is being built by process {os.getpid()}; wait for it, or give another output"]
    assert out.read_bytes() == made.read_bytes()


def test_an_unfinished_build_is_not_taken_for_ones_own(tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    folder = folder_of(out)
    folder.mkdir()
    (folder / "journal").write_text("a build's")
    with pytest.raises(OutputError) as e:
        making.make(tiny_v3, file, out)
    assert str(e.value) == (
        f"{folder}: is the unfinished build of a GGUF; finish that, move it away, or give another output"
    )
    assert (folder / "journal").read_text() == "a build's"


# ---------------------------------------------------------------- what cannot be


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Files of this process end there, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("limit", "covariance", "what"),
    [
        (1 << 13, False, "bytes of sums cannot be written: "),
        (1 << 17, False, "bytes of what is kept between layers cannot be written: File too large"),
        (1 << 17, True, "bytes of covariance cannot be written: "),
    ],
)
def test_a_disk_that_fills(
    limit: int, covariance: bool, what: str, tiny_v3: Path, file: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    options: dict[str, Any] = {"covariance": tmp_path / "cov"} if covariance else {}
    with largest_file(limit), pytest.raises(OutputError) as e:
        making.make(tiny_v3, file, out, **options)
    assert what in str(e.value)
    assert "run the same command again: it continues" in str(e.value)
    assert "\n" not in str(e.value)
    assert not out.exists()
    making.make(tiny_v3, file, out, **options)
    assert out.read_bytes() == made.read_bytes()


def test_an_output_that_is_there(tiny_v3: Path, file: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError) as e:
        making.make(tiny_v3, file, out)
    assert str(e.value) == f"{out}: exists; choose another name, or replace it with --force"
    assert out.read_text() == "mine"
    making.make(tiny_v3, file, out, replace=True)
    assert out.read_bytes() == made.read_bytes()


def test_the_name_of_the_older_format(tiny_v3: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as e:
        making.make(tiny_v3, file, Path("my sums.dat"))
    assert str(e.value) == (
        "my sums.dat: is named like the older format, but a GGUF is made, which holds more; give my sums.gguf, and "
        "then, if need be: quantkit imatrix convert 'my sums.gguf' -o 'my sums.dat'"
    )


def test_a_checkpoint_with_nan(v3: Path, file: Path, tmp_path: Path) -> None:
    import factory

    name = "model.layers.1.self_attn.o_proj.weight"
    shard = factory.shard_of(v3, name)
    blob = bytearray(shard.read_bytes())
    n = int.from_bytes(blob[:8], "little")
    start = json.loads(blob[8 : 8 + n])[name]["data_offsets"][0]
    blob[8 + n + start + 5] = 0x7F  # NaN in E4M3
    shard.write_bytes(bytes(blob))
    with pytest.raises(WeightError) as e:
        making.make(v3, file, tmp_path / "x.gguf")
    assert str(e.value) == (
        f"'blk.1.attn_output.weight' (from {shard.name}: '{name}'), row 0, column 5 is nan; llama-quantize refuses "
        "such weights too: the checkpoint is damaged, download that shard again"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Tiny-V3"]  # to go on there would end there


def test_only_a_config(file: Path, tmp_path: Path) -> None:
    from quantkit.lab.calibration.make_imatrix import make_imatrix

    with pytest.raises(SourceError) as e:
        make_imatrix(open_model("deepseek-r1"), making.chunks_of, tmp_path / "x.gguf")  # type: ignore[arg-type]
    assert str(e.value).startswith("deepseek-r1: there are no weights here, only a config; give the checkpoint")


def test_a_text_of_another_encoding_or_too_short(tiny_v3: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    for data, says in (
        (b"", f"{file}: has 0 bytes of text; give a longer one"),
        ("à".encode("latin-1") * 9, f"{file}: is not UTF-8: byte 0xE0 at 0"),
        ("abc".encode("utf-16"), f"{file}: is UTF-16"),
        (b"abc", f"{file}: 3 bytes make "),
    ):
        file.write_bytes(data)
        with pytest.raises(TextError) as e:
            making.make(tiny_v3, file, tmp_path / "x.gguf")
        assert str(e.value).startswith(says)

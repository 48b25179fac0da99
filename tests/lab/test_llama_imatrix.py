"""llama-imatrix driven in runs: the bytes of one run, though it was stopped; checkpoints by way of a GGUF; errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imatrices
import making
import pytest
from making import CTX
from small_builds import OPTIONS

from quantkit.base.errors import ResumeError, ToolError
from quantkit.building.folder import folder_of
from quantkit.imatrix.matrix import open_imatrix
from quantkit.lab.calibration.llama_imatrix import ToolOptions, make_with_tool
from quantkit.model.open import open_model

pytestmark = pytest.mark.tools
#: chunks that the tool computes at a time
AT_ONCE = 2048 // CTX
N = 2 * AT_ONCE + 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.some_text(tmp_path_factory.mktemp("text") / "text.txt", 1500)


@pytest.fixture(scope="module")
def one_run(imatrix_tool: Path, tiny_bf16: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool itself makes."""
    out = tmp_path_factory.mktemp("one") / "one.gguf"
    how: list[str | Path] = ["-f", file, "-c", str(CTX), "--chunks", str(N), "--no-ppl"]
    return imatrices.llama_imatrix(imatrix_tool, tiny_bf16, out, *how)


def drive(tool: Path, model: Path, file: Path, out: Path, progress: Any = None, **more: Any) -> int:
    text = file.read_text()
    options = ToolOptions(tool, save_frequency=1, n_threads=1, **more)
    told = (progress,) if progress else ()
    chunks = making.chunks_of(model, file, N)
    return make_with_tool(open_model(str(model), OPTIONS), chunks, text, out, options, *told)


class EnoughError(Exception):
    """Raised where a run is to end."""


def test_stopped_within_a_run_it_goes_on_to_the_bytes_of_one_run(
    imatrix_tool: Path, tiny_bf16: Path, file: Path, one_run: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "x.gguf", []

    def stop(_what: str, n_done: int, n_total: int) -> None:
        assert n_total == N * CTX
        seen.append(n_done // CTX)
        if n_done > AT_ONCE * CTX:
            raise EnoughError

    with pytest.raises(EnoughError) as e:
        drive(imatrix_tool, tiny_bf16, file, out, stop)
    assert getattr(e.value, "kept", "").startswith(f"what is finished is kept in {folder_of(out)}; ")
    assert [p.name for p in folder_of(out).glob("part-*.gguf")] == [f"part-{AT_ONCE}.gguf"]
    seen.clear()
    drive(imatrix_tool, tiny_bf16, file, out, lambda _w, n, _t: seen.append(n // CTX))
    assert AT_ONCE < seen[0] <= seen[-1] == N
    assert out.read_bytes() == one_run.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


def test_a_checkpoint_by_way_of_a_gguf(
    imatrix_tool: Path, tiny_v3: Path, file: Path, one_run: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "x.gguf", set()
    n = drive(imatrix_tool, tiny_v3, file, out, lambda what, _n, _t: said.add(what))
    assert said == {"BF16 GGUF for llama-imatrix", "llama-imatrix"}
    assert out.read_bytes() == one_run.read_bytes()
    assert n == len(open_imatrix(str(one_run)).entries)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


def test_of_another_text_it_is_not_gone_on_with(
    imatrix_tool: Path, tiny_bf16: Path, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"

    def stop(_what: str, n_done: int, _n_total: int) -> None:
        if n_done > AT_ONCE * CTX:
            raise EnoughError

    with pytest.raises(EnoughError):
        drive(imatrix_tool, tiny_bf16, file, out, stop)
    with pytest.raises(ResumeError) as e:
        drive(imatrix_tool, tiny_bf16, making.some_text(tmp_path / "other.txt", 1500, seed=4), out)
    folder = folder_of(out)
    assert str(e.value) == (
        f"{folder}: is of another run (other model, text or settings); give another output, or remove {folder}"
    )


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "echo loading; echo no memory >&2; exit 3",
            "failed with exit code 3; its last words:\n  loading\n  no memory",
        ),
        ("kill -9 $$", "was ended by SIGKILL; it said nothing"),
        ("exit 0", "ended without an error, but made no file; it said nothing"),
    ],
)
def test_its_errors(text: str, says: str, tiny_bf16: Path, file: Path, tmp_path: Path) -> None:
    tool = script(tmp_path / "tool", text)
    with pytest.raises(ToolError) as e:
        drive(tool, tiny_bf16, file, tmp_path / "x.gguf")
    assert str(e.value) == f"{tool} {says}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tool"]


def test_what_is_no_importance_matrix(tiny_bf16: Path, file: Path, tmp_path: Path) -> None:
    tool = script(tmp_path / "tool", 'while [ "$1" != -o ]; do shift; done; echo GGUFnone > "$2"')
    with pytest.raises(ToolError) as e:
        drive(tool, tiny_bf16, file, tmp_path / "x.gguf")
    assert str(e.value).startswith(f"{tool} made no usable importance matrix (")
    assert str(e.value).endswith("); is the disk full, or the model damaged?")


def test_it_wants_two_chunks(imatrix_tool: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    file = making.some_text(tmp_path / "text.txt", 8)
    n = making.chunks_of(tiny_bf16, file).n_tokens
    with pytest.raises(ToolError) as e:
        drive(imatrix_tool, tiny_bf16, file, tmp_path / "x.gguf")
    assert str(e.value) == (
        f"llama-imatrix needs at least two chunks of text, {2 * CTX} tokens, and there are {n}; give a longer text, a "
        "smaller --ctx, or --engine native"
    )

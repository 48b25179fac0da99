"""`build --restart` with other shards: the finished ones of the abandoned build are removed, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run
from stopping import Builder, EnoughError, N, rename_in

from quantkit.base.errors import ResumeError
from quantkit.building import unfinished
from quantkit.building.folder import read_journal, take
from quantkit.building.leftovers import finished_shards, whole_files
from quantkit.gguf.header import read_header

SMALL, LARGE = 1 << 18, 1 << 20


@pytest.fixture
def b(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> Builder:
    """A build in small shards, some of them finished."""
    (tmp_path / "out").mkdir()
    b = Builder(tiny_v3, tiny_imatrix, tmp_path / "out" / "m.gguf")
    b.stopped(int(0.8 * N), split_max_size=SMALL)
    assert len(finals(b)) > 2
    return b


def finals(b: Builder) -> list[str]:
    return sorted(p.name for p in b.out.parent.glob("m-*.gguf"))


def beside(b: Builder, folder: Path) -> dict[str, bytes]:
    """The files of a build without a predecessor."""
    folder.mkdir()
    alone = Builder(b.source, b.imatrix, folder / "m.gguf")
    alone.run(alone.ready(split_max_size=LARGE))
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_begun_anew_in_larger_shards(b: Builder, tmp_path: Path) -> None:
    was = finals(b)
    assert [p.name for p in finished_shards(b.out)] == was
    ready = b.ready(split_max_size=LARGE, resume=False)
    assert finals(b) == was  # checking removes nothing
    b.run(ready)
    assert {p.name: p.read_bytes() for p in b.out.parent.iterdir()} == beside(b, tmp_path / "alone")


def test_begun_anew_as_one_file(b: Builder) -> None:
    b.run(b.ready(resume=False))
    assert [p.name for p in b.out.parent.iterdir()] == ["m.gguf"]


def test_they_are_gone_when_the_new_build_is_stopped_too(b: Builder) -> None:
    with pytest.raises(EnoughError):
        b.run(b.ready(split_max_size=LARGE, resume=False), N // 10)
    assert finals(b) == []


def change_weights(path: Path, _folder: Path) -> None:
    """A shard of another model with the same name, tensors and length."""
    raw, start = path.read_bytes(), read_header(path).data_offset
    path.write_bytes(raw[:start] + bytes(byte ^ 0x55 for byte in raw[start:]))


def truncate(path: Path, _folder: Path) -> None:
    os.truncate(path, path.stat().st_size - 32)


def to_link(path: Path, folder: Path) -> None:
    path.symlink_to(shutil.move(path, folder / "elsewhere.gguf"))


def to_text(path: Path, _folder: Path) -> None:
    path.write_text("notes")


@pytest.mark.parametrize("change", [change_weights, truncate, to_link, to_text])
def test_what_is_not_its_own_stays(b: Builder, tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    path = b.out.parent / finals(b)[1]
    change(path, tmp_path)
    is_link, data = path.is_symlink(), path.read_bytes()
    b.run(b.ready(split_max_size=LARGE, resume=False))
    made = [p for p in finals(b) if "-of-00002" in p]
    assert finals(b) == sorted([path.name, *made])
    assert (path.is_symlink(), path.read_bytes()) == (is_link, data)


def test_files_of_other_names_stay(b: Builder) -> None:
    """Shards of other counts and other prefixes, whatever they contain."""
    first = b.out.parent / finals(b)[0]
    others = [first.with_name(n) for n in ("m-00001-of-00099.gguf", "x-00001-of-00003.gguf", f"{first.name}.bak")]
    for path in others:
        shutil.copy(first, path)
    b.run(b.ready(resume=False))
    assert sorted(b.out.parent.iterdir()) == sorted([b.out, *others])


def test_a_journal_that_names_files_elsewhere_removes_nothing(b: Builder, tmp_path: Path) -> None:
    first = b.out.parent / finals(b)[0]
    aside = Path(shutil.copy(first, tmp_path / "aside.gguf"))
    rename_in(b.folder / "journal", lambda files: files[0].__setitem__(0, "../aside.gguf"))
    assert finished_shards(b.out) == []
    b.run(b.ready(split_max_size=LARGE, resume=False))
    assert aside.exists()
    assert first.exists()


def test_a_whole_model_stays(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its build ended between the last name and the removal of its folder."""

    def full(_folder: Path) -> None:
        raise OSError

    monkeypatch.setattr(unfinished, "clear", full)
    b.run(b.ready(split_max_size=SMALL))
    monkeypatch.undo()
    whole = finals(b)
    assert (b.folder / "journal").exists()
    assert whole_files(read_journal(b.out)) == set(whole)  # type: ignore[arg-type]
    assert finished_shards(b.out) == []
    b.run(b.ready(split_max_size=LARGE, resume=False))
    assert set(whole) < set(finals(b))


def test_not_while_another_process_is_at_it(b: Builder) -> None:
    was = finals(b)
    ready = b.ready(split_max_size=LARGE, resume=False)
    held = take(b.out, ())
    try:
        with pytest.raises(ResumeError, match="is being built by process"):
            b.run(ready)
    finally:
        held.close()
    assert finals(b) == was


def test_the_command_says_what_goes(b: Builder, quantkit: Run, tmp_path: Path) -> None:
    was = finals(b)
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: r\narch: [deepseek2]\nfile_type: Q8_0\nrules:\n  - {match: "*", type: Q8_0, why: t}\n')
    common = ("build", b.source, "-o", b.out, "-r", recipe, "--pre", "deepseek-v3", "--restart")
    done = quantkit(*common, "-n")
    assert done.returncode == 0, done.stderr
    first = b.out.parent / was[0]
    n = f"{len(was)} finished shard{'s' * (len(was) != 1)}"
    assert f"{n} of the build that starts over will be removed, first {first}\n" in done.stdout
    assert finals(b) == was
    done = quantkit(*common, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in b.out.parent.iterdir()] == ["m.gguf"]

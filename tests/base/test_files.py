"""Files that get their names only when complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.base.errors import OutputError
from quantkit.base.files import NewFile, write_at
from quantkit.base.folders import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with Folder.hold(tmp_path) as held:
        yield held


def contents(folder: Folder) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.path.iterdir()}


def test_it_has_its_name_only_when_it_is_whole(folder: Folder) -> None:
    (folder.path / "a").write_text("old")
    with NewFile(folder, ".a.new") as new:
        write_at(new.fd, b"new", 0)
        assert contents(folder) == {"a": "old", ".a.new": "new"}
        new.publish(folder, "a")
        assert contents(folder) == {"a": "new"}
    assert contents(folder) == {"a": "new"}


def test_one_that_is_not_published_is_gone(folder: Folder) -> None:
    (folder.path / "a").write_text("old")
    with NewFile(folder, ".a.new") as new:
        write_at(new.fd, b"ne", 0)
    assert contents(folder) == {"a": "old"}


@pytest.mark.parametrize("leftover", ["file", "link"])
def test_a_leftover_of_its_temporary_name_is_replaced(folder: Folder, leftover: str) -> None:
    (folder.path / "precious").write_text("precious")
    if leftover == "link":
        (folder.path / ".a.new").symlink_to("precious")
    else:
        (folder.path / ".a.new").write_text("longer than the new one")
    with NewFile(folder, ".a.new") as new:
        write_at(new.fd, b"new", 0)
        new.publish(folder, "a")
    assert contents(folder) == {"a": "new", "precious": "precious"}


def test_what_came_to_its_name_meanwhile(folder: Folder) -> None:
    with NewFile(folder, ".a.new") as new:
        (folder.path / "a").write_text("another's")
        with pytest.raises(FileExistsError):
            new.publish(folder, "a", replace=False)
    assert contents(folder) == {"a": "another's"}


def test_a_file_that_was_swapped_gets_no_name(folder: Folder) -> None:
    with NewFile(folder, ".a.new") as new:
        os.replace(folder.path / ".a.new", folder.path / "aside")
        (folder.path / ".a.new").write_text("evil")
        with pytest.raises(OutputError) as e:
            new.publish(folder, "a")
    assert str(e.value) == (
        f"{folder.path / '.a.new'}: is a file that somebody else put there while quantkit was writing it; nothing was "
        "taken from it: find out who writes there, and try again"
    )
    assert not (folder.path / "a").exists()


def test_into_another_folder(folder: Folder) -> None:
    with folder.sub("sub", 0o700) as sub:
        with NewFile(folder, "tmp") as new:
            write_at(new.fd, b"new", 0)
            new.publish(sub, "a", durable=False)
        assert os.listdir(folder.path) == ["sub"]
        assert (folder.path / "sub" / "a").read_text() == "new"

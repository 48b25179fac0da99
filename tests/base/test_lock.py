"""Locks between processes: who holds one, waiting for one, and lock files that appear and disappear."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantkit.base.errors import OutputError
from quantkit.base.folders import Folder
from quantkit.base.lock import HeldError, Lock, holder

HOLD = """
import os, sys
from pathlib import Path
from quantkit.base.folders import Folder
from quantkit.base.lock import Lock
folder = Folder.hold(Path(sys.argv[1]))
lock = Lock.of_folder(folder) if sys.argv[2] == "folder" else Lock.of_file(folder, "lock", folder.own)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def another(folder: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(folder), what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        yield process
        process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with Folder.hold(tmp_path) as held:
        yield held


def test_the_lock_of_a_file(folder: Folder) -> None:
    """It names its holder; the kernel releases it when the holder is killed."""
    with another(folder.path, "file") as process:
        with pytest.raises(HeldError) as e:
            Lock.of_file(folder, "lock", folder.own)
        assert e.value.by == str(process.pid)
        assert holder(folder, "lock") == process.pid
        process.kill()
        process.wait()
        with Lock.of_file(folder, "lock", folder.own):
            assert (folder.path / "lock").read_text() == f"{os.getpid()}\n"
            assert holder(folder, "lock") == os.getpid()
    assert holder(folder, "lock") is None


def test_the_lock_of_a_folder(folder: Folder) -> None:
    with another(folder.path, "folder") as process:
        with pytest.raises(HeldError) as e:
            Lock.of_folder(folder)
        assert e.value.by == "unknown"
        assert str(e.value) == f"[Errno {e.value.errno}] process unknown has locked it"
        process.kill()
        process.wait()
        Lock.of_folder(folder).close()
    assert list(folder.path.iterdir()) == []


def test_a_lock_that_says_nothing_of_its_holder(folder: Folder) -> None:
    with Lock.of_file(folder, "lock"):
        assert (folder.path / "lock").read_bytes() == b""
        assert holder(folder, "lock") == 0
        with pytest.raises(HeldError) as e:
            Lock.of_file(folder, "lock")
        assert e.value.by == "unknown"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_filesystem_without_locks(folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Work goes on without a lock for these errors; others are raised."""

    def flock(_fd: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    takes: list[Callable[[], Lock]] = [
        lambda: Lock.of_folder(folder), lambda: Lock.of_file(folder, "lock", folder.own)
    ]  # fmt: skip
    for take in takes:
        if code == errno.EIO:
            with pytest.raises(OSError, match="Input/output error"):
                take()
        else:
            take().close()


def test_it_is_waited_for(folder: Folder) -> None:
    first = Lock.of_file(folder, "lock")
    timer = threading.Timer(0.1, first.close)
    timer.start()
    with Lock.of_file(folder, "lock", patience=30):
        assert first.fd == -1
    timer.join()


def test_one_that_is_removed_while_it_is_waited_for(folder: Folder) -> None:
    """Its holder removes the file and releases it: the waiter then has the lock of the file that exists now."""
    first = Lock.of_file(folder, "lock")

    def go() -> None:
        folder.unlink("lock")
        first.close()

    timer = threading.Timer(0.1, go)
    timer.start()
    with Lock.of_file(folder, "lock", patience=30) as second:
        assert os.fstat(second.fd).st_ino == (folder.path / "lock").stat().st_ino
        assert os.fstat(second.fd).st_nlink == 1
    timer.join()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with Folder.hold(tmp_path / "a") as held:
        (tmp_path / "a").rmdir()
        with pytest.raises(FileNotFoundError):
            Lock.of_file(held, "lock")


def test_what_is_no_lock(folder: Folder) -> None:
    (folder.path / "file").write_text("precious")
    (folder.path / "lock").symlink_to("file")
    with pytest.raises(OutputError, match="lock: is a symbolic link, not a file that quantkit made"):
        Lock.of_file(folder, "lock")
    os.link(folder.path / "file", folder.path / "two")
    with pytest.raises(OutputError, match="two: is a hard link, one of 2 names of a file"):
        Lock.of_file(folder, "two", folder.own)
    assert (folder.path / "file").read_text() == "precious"

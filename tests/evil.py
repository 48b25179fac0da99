"""What somebody else may have put where quantkit works, for the tests of it: see `Scene`."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults_site import Done, Server

#: a user who is nobody's friend; only root can make files of another user
OTHER = 65534
WHO = f"nobody (user {OTHER})"
SECRET = b"ten years of work\n" * 100
#: seconds after which a command is taken for hanging; each takes about one
LIMIT = 60

as_two_users = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")


class Scene:
    """A folder that all users reach, with a file and a folder that are to stay as they are; commands with a limit."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.file, self.kept = folder / "precious.txt", folder / "precious"
        self.file.write_bytes(SECRET)
        self.kept.mkdir()
        (self.kept / "thesis.txt").write_bytes(SECRET)
        (self.kept / ".x.quantkit-part").write_bytes(SECRET)
        self._was = self._precious()

    def _precious(self) -> list[object]:
        found: list[object] = []
        for path in [self.file, *sorted(self.kept.rglob("*"))]:
            info = path.lstat()
            found.append((path, path.read_bytes(), info.st_ino, info.st_mtime_ns, stat.S_IMODE(info.st_mode)))
        return found

    def require_untouched(self) -> None:
        assert self._precious() == self._was

    def run(self, *args: str | Path, user: int | None = None) -> Done:
        """`quantkit ARGS`, as another user if given. What is precious is as it was, and nothing hung."""
        watch: dict[str, Any] = {} if user is None else {"user": user}
        env = {"HOME": str(self.folder), "QUANTKIT_COMMIT_SECONDS": "0.05"}
        process = self.server.start([str(a) for a in args], env, **watch)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            raise AssertionError(f"{args[0]} hung for {LIMIT} s") from None
        said = [(self.server.folder / name).read_text() for name in ("stdout", "stderr")]
        assert "Traceback" not in said[1], said[1]
        self.require_untouched()
        return Done(code, *said)

    def refused(self, code: int, sentence: str, *args: str | Path, user: int | None = None) -> None:
        """`quantkit ARGS` ends with this code and just this sentence."""
        done = self.run(*args, user=user)
        assert (done.code, done.err) == (code, f"error: {sentence}\n"), done.err

    # ------------------------------------------------------------ ways to harm

    def link(self, path: Path) -> None:
        path.symlink_to(self.file)

    def link_to_folder(self, path: Path) -> None:
        path.symlink_to(self.kept)

    def dangling(self, path: Path) -> None:
        path.symlink_to(self.folder / "new file")

    def fifo(self, path: Path) -> None:
        os.mkfifo(path)

    def hard_link(self, path: Path) -> None:
        os.link(self.file, path)
        self._was = self._precious()

    def of_another(self, path: Path) -> None:
        path.write_bytes(SECRET)
        os.chown(path, OTHER, OTHER)


Harm = Callable[[Scene, Path], None]


def open_folder() -> Path:
    """A new folder that others reach too. Skips where they cannot."""
    folder = Path(tempfile.mkdtemp(prefix="evil-"))
    folder.chmod(0o755)
    if any(not p.stat().st_mode & stat.S_IXOTH for p in folder.resolve().parents):
        shutil.rmtree(folder)
        pytest.skip(f"{tempfile.gettempdir()}: other users do not reach it")
    return folder

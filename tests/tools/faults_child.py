"""Processes that run `quantkit` with their system calls watched: forked from one that has everything imported.

    python tests/tools/faults_child.py < requests

A request is a line of JSON: {"args": […], "env": {…}, "stdout": FILE, "stderr": FILE}; with {"user": UID} it is run as
that user, with {"cwd": FOLDER} there; and, to watch what is done in a folder, {"root": FOLDER, "log": FILE, "kill_at":
N, "kill": "before" | "after" | "half"}. The answers are two lines: the process, and its exit status, or minus the
signal. The log is a pickle for each Event, in the order in which they took place; with `kill_at` the process kills
itself at the Nth of them. "plant" is a defect to be found: files are not synced ("data"), only after the journal told
of them ("order"), or names are not ("names").
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from quantkit.base import folders

Result = TypeVar("Result")


class Event(NamedTuple):
    """What a process did to a folder. Files are numbered, since names change."""

    what: str
    """create, write, truncate, mkdir, rename, unlink, rmdir, sync-begin, sync-end"""
    file: int
    """-1 for folders"""
    path: str
    """of a name that is made or removed, of a folder that is synced; the new one of a rename"""
    offset: int = 0
    """of a write; the size, for truncate; the number of the sync"""
    data: bytes = b""
    old: str = ""
    """the name before a rename"""


class Recorder:
    """Wraps the calls of `os` that change a folder. Not seen: files opened with open(), which builds use for reading
    only (but for the cache and for damaged shards)."""

    def __init__(self, root: str, log: str, kill_at: int, kill: str, plant: str) -> None:
        self.root, self.kill_at, self.kill, self.plant = os.path.realpath(root), kill_at, kill, plant
        self.late: list[int] = []
        """files to be synced after the journal"""
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self.lock = threading.RLock()
        self.number = 0
        self.syncs = 0
        self.fds: dict[int, tuple[int, str]] = {}
        self.files: dict[str, int] = {}
        self.real: dict[str, Callable[..., Any]] = {}
        for at, path in enumerate(sorted(str(p) for p in Path(self.root).rglob("*") if p.is_file())):
            self.files[path] = at
        self.next = len(self.files)
        for name in ("open", "close", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "replace", "rename",
                     "unlink", "remove", "mkdir", "rmdir", "copy_file_range", "sendfile"):  # fmt: skip
            self.real[name] = getattr(os, name)
            setattr(os, name, getattr(self, f"_{name}"))
        self.real["rename_to_new"] = folders.rename_to_new
        folders.rename_to_new = self._rename_to_new

    def path_of(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path, if it is in the folder."""
        if isinstance(path, int):
            return None
        text = os.fspath(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(text))
        return text if text == self.root or text.startswith(self.root + "/") else None

    def did(self, event: Event, call: Callable[[], Result], half: Callable[[], Result] | None = None) -> Result:
        """Make a call and note it, or die there."""
        with self.lock:
            self.number += 1
            dies = self.number == self.kill_at
            if dies and self.kill != "after":
                if self.kill == "half" and half is not None:
                    half()
                self.die(event)
            result = call()
            if isinstance(result, int) and event.what == "write":
                event = event._replace(data=event.data[:result])
            self.note(event)
            if dies:
                self.die(event)
            return result

    def note(self, event: Event) -> None:
        self.real["write"](self.log, pickle.dumps(event))

    def die(self, event: Event) -> None:
        self.note(Event("killed", event.file, event.path, old=event.what))
        os.kill(os.getpid(), signal.SIGKILL)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = self.path_of(path, dir_fd)
        if where is None:
            fd: int = self.real["open"](path, flags, mode, dir_fd=dir_fd)
            self.fds.pop(fd, None)  # of a file that was closed in another way
            return fd

        def call() -> int:
            fd: int = self.real["open"](path, flags, mode, dir_fd=dir_fd)
            return fd

        with self.lock:
            if flags & os.O_CREAT and not os.path.lexists(where):
                number = self.next
                fd = self.did(Event("create", number, where), call)
                self.next += 1
                self.files[where] = number
            elif flags & os.O_TRUNC:
                fd = self.did(Event("truncate", self.files[where], where), call)
            else:
                fd = call()
            self.fds[fd] = (self.files.get(where, -1), where)
            return fd

    def _close(self, fd: int) -> None:
        self.fds.pop(fd, None)
        self.real["close"](fd)

    def _written(self, how: str, *args: Any) -> int:
        n: int = self.real[how](*args)
        return n

    def _write(self, fd: int, data: Any) -> int:
        if fd not in self.fds:
            return self._written("write", fd, data)
        with self.lock:
            appends = bool(_flags(fd) & os.O_APPEND)
            at = os.fstat(fd).st_size if appends else os.lseek(fd, 0, os.SEEK_CUR)
            number, path = self.fds[fd]
            raw = bytes(data)
            return self.did(Event("write", number, path, at, raw), lambda: self._written("write", fd, raw),
                            lambda: self._written("write", fd, raw[: len(raw) // 2]))  # fmt: skip

    def _pwrite(self, fd: int, data: Any, at: int) -> int:
        if fd not in self.fds:
            return self._written("pwrite", fd, data, at)
        number, path = self.fds[fd]
        raw = bytes(data)
        return self.did(Event("write", number, path, at, raw), lambda: self._written("pwrite", fd, raw, at),
                        lambda: self._written("pwrite", fd, raw[: len(raw) // 2], at))  # fmt: skip

    def _copied(self, fd: int, at: int, call: Callable[[], int]) -> int:
        """A copy in the kernel is noted as the write that it is."""
        with self.lock:
            n = call()
            if fd in self.fds and n:
                number, path = self.fds[fd]
                self.did(Event("write", number, path, at, os.pread(fd, n, at)), lambda: n)
            return n

    def _copy_file_range(self, src: int, dst: int, count: int, offset_src: int, offset_dst: int) -> int:
        return self._copied(dst, offset_dst, lambda: self._written("copy_file_range", src, dst, count, offset_src,
                                                             offset_dst))  # fmt: skip

    def _sendfile(self, dst: int, src: int, offset: int, count: int) -> int:
        return self._copied(
            dst, os.lseek(dst, 0, os.SEEK_CUR), lambda: self._written("sendfile", dst, src, offset, count)
        )

    def _ftruncate(self, fd: int, size: int) -> None:
        if fd not in self.fds:
            self.real["ftruncate"](fd, size)
            return
        number, path = self.fds[fd]
        self.did(Event("truncate", number, path, size), lambda: self.real["ftruncate"](fd, size))

    def _sync(self, name: str, fd: int) -> None:
        """What was written before it began is on the disk when it has ended; others may write meanwhile."""
        if fd not in self.fds:
            self.real[name](fd)
            return
        number, path = self.fds[fd]
        is_data = path.endswith(".gguf")
        if (self.plant == "data" and is_data) or (self.plant == "names" and number < 0):
            return
        if self.plant == "order" and name == "fdatasync" and is_data:
            self.late.append(fd)
            return
        with self.lock:
            self.syncs += 1
            mine = self.syncs
        self.did(Event("sync-begin", number, path, mine), lambda: None)
        self.real[name](fd)
        self.did(Event("sync-end", number, path, mine), lambda: None)
        if path.endswith("/journal"):
            late, self.late, plant, self.plant = self.late, [], self.plant, ""
            for each in late:
                self._sync(name, each)
            self.plant = plant

    def _fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def _fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def _replace(self, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._renamed("replace", src, dst, src_dir_fd, dst_dir_fd)

    def _rename_to_new(self, name: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        self._renamed("rename_to_new", name, new, src_dir_fd, dst_dir_fd)

    def _renamed(self, how: str, src: Any, dst: Any, src_dir_fd: int | None, dst_dir_fd: int | None) -> None:
        old, new = self.path_of(src, src_dir_fd), self.path_of(dst, dst_dir_fd)

        def call() -> None:
            self.real[how](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        if old is None or new is None:
            call()
            return
        with self.lock:
            number = self.files.get(old, -1)
            self.did(Event("rename", number, new, old=old), call)
            self.files[new] = self.files.pop(old, -1)

    _rename = _replace

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        where = self.path_of(path, dir_fd)
        if where is None:
            self.real["unlink"](path, dir_fd=dir_fd)
            return
        with self.lock:
            event = Event("unlink", self.files.get(where, -1), where)
            self.did(event, lambda: self.real["unlink"](path, dir_fd=dir_fd))
            self.files.pop(where, None)

    _remove = _unlink

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        where = self.path_of(path, dir_fd)
        if where is None:
            self.real["mkdir"](path, mode, dir_fd=dir_fd)
            return
        self.did(Event("mkdir", -1, where), lambda: self.real["mkdir"](path, mode, dir_fd=dir_fd))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        where = self.path_of(path, dir_fd)
        if where is None:
            self.real["rmdir"](path, dir_fd=dir_fd)
            return
        self.did(Event("rmdir", -1, where), lambda: self.real["rmdir"](path, dir_fd=dir_fd))


def _flags(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


def events(log: Path) -> list[Event]:
    """The events of a log; a last one that was not written whole is left out."""
    found = []
    with log.open("rb") as f:
        while True:
            try:
                found.append(pickle.load(f))
            except (EOFError, pickle.UnpicklingError):
                return found


def run(request: dict[str, Any]) -> None:
    """In the forked process: be `quantkit ARGS`."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "user" in request:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    os.environ.update(request["env"])
    if "cwd" in request:
        os.chdir(request["cwd"])
    sys.argv = ["quantkit", *request["args"]]
    if "root" in request:
        Recorder(
            request["root"],
            request["log"],
            request.get("kill_at", 0),
            request.get("kill", "before"),
            request.get("plant", ""),
        )
    from quantkit.cli import main

    status = 1
    try:
        main()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1 if e.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Import what a build needs, once, and answer requests. Another user may not reach what is installed: so all of it
    is read here."""
    import pkgutil
    from importlib import import_module

    import gguf.quants  # noqa: F401
    import numpy as np
    import tokenizers  # noqa: F401
    import tqdm  # noqa: F401

    import quantkit
    from quantkit import kernels
    from quantkit.recipe.named import shipped

    for module in pkgutil.walk_packages(quantkit.__path__, "quantkit."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    kernels.version()
    kernels.is_valid(np.zeros((1, 34), np.uint8), "Q8_0")  # by ggml, which is loaded for it
    shipped()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    import faults_child  # so that what is pickled is of a module that others can import

    faults_child.serve()

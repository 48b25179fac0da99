"""Runs programs that nobody has read, each in its own process with few rights.

`main` runs in a process that `sandbox` starts. It forks for each job. Before the first line of the program runs, the
fork gives up: the network, other processes and signals to them (seccomp); files, except its own folder for writing and
Python's for reading (Landlock, where the kernel has it); and processor time, memory and file sizes beyond the limits.
Modules that several jobs need are imported once.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_POLL = 0.01
_DIE_WITH_PARENT, _SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 1, 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
#: Landlock's rights: execute, read a file and list a folder; the rights that apply to files; all, by version
_READ, _FILE_RIGHTS, _ALL = 0b1101, 0x4007, (0x1FFF, 0x3FFF, 0x7FFF)
#: read by Python, SDL and the dynamic loader
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/fonts", "/etc/localtime", "/dev/urandom")
_WRITABLE = ("/dev/null",)
#: an architecture's number in a seccomp filter, and the system calls refused there
_ARCHITECTURES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62,
            "ptrace": 101, "tkill": 200, "unshare": 272, "setns": 308, "process_vm_readv": 310,
            "process_vm_writev": 311, "bpf": 321, "io_uring_setup": 425, "pidfd_send_signal": 424,
            "clone": 56, "clone3": 435,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "socket": 198, "socketpair": 199, "execve": 221, "execveat": 281, "kill": 129, "ptrace": 117, "tkill": 130,
            "unshare": 97, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280,
            "io_uring_setup": 425, "pidfd_send_signal": 424, "clone": 220, "clone3": 435,
        },
    ),
}  # fmt: skip
_EPERM, _ENOSYS, _THREAD = 1, 38, 0x00010000


def main() -> None:
    """Run the jobs named on standard input, and write how each ended to standard output."""
    asked = json.load(sys.stdin)
    _try(asked["limits"])
    for name in asked["imports"]:
        __import__(name)
    said = [_run(job, asked["limits"]) for job in asked["jobs"]]
    sys.stdout.write(json.dumps(said))


def _try(limits: Mapping[str, Any]) -> None:
    """Exit with a sentence if a process cannot be confined."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            confine(Path("/nonexistent"), limits)
            code = 0
        except OSError as e:
            sys.stderr.write(f"this kernel, or the container, refuses it: {e.strerror or e}\n")
            sys.stderr.flush()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        sys.exit(1)


def _run(job: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        _be(job, limits)
    return _wait(pid, limits["seconds"])


def _wait(pid: int, seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "timed_out": False}
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"code": -int(signal.SIGKILL), "timed_out": True}
        time.sleep(_POLL)


def _be(job: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    """Run the job, in a fork; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(job["folder"])
        for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", _NEW), (2, "stderr", _NEW)):
            os.dup2(os.open(name, flags, 0o600), number)
        confine(Path(job["folder"]), limits)
        os.environ["HOME"] = os.environ["TMPDIR"] = job["folder"]
        sys.argv = ["program.py"]
        _DRIVERS[job["driver"]](job)
        code = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)  # noqa: T201
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def _plain(job: Mapping[str, Any]) -> None:
    runpy.run_path("program.py", run_name="__main__")


def _game(job: Mapping[str, Any]) -> None:
    from .game_recorder import record

    record(job["scenario"])


def _checks(job: Mapping[str, Any]) -> None:
    from .checks import run_checks

    run_checks(job["checks"])


_DRIVERS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {"plain": _plain, "pygame": _game, "checks": _checks}


# ---------------------------------------------------------------- giving up rights


def confine(folder: Path, limits: Mapping[str, Any]) -> None:
    """Give up, for good, every right this process does not need. Raises OSError if the kernel refuses."""
    for what, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_DIE_WITH_PARENT, int(signal.SIGKILL), 0, 0, 0), "pdeathsig")
    _check(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _close_files(libc, folder)
    _close_calls(libc)


def has_landlock() -> bool:
    """Whether the kernel can restrict a process's access to files."""
    return _landlock(ctypes.CDLL(None, use_errno=True)) > 0


def _landlock(libc: Any) -> int:
    """The version of Landlock; 0 or less if there is none."""
    return int(libc.syscall(_LANDLOCK_CREATE, None, 0, 1))


def has_seccomp() -> bool:
    """Whether system calls can be restricted here: Linux on x86-64 or ARM64."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES


def _check(result: int, what: str) -> int:
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, f"{what}: {os.strerror(e)}")
    return result


def _readable() -> list[str]:
    """The folders that Python reads, except any that contains the user's home folder."""
    home = Path(os.environ.get("QUANTKIT_HOME", "/nonexistent"))
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *(p for p in sys.path if os.path.isabs(p))}
    return [p for p in sorted(places) if not (home == Path(p) or home.is_relative_to(p))]


def _close_files(libc: Any, folder: Path) -> None:
    version = _landlock(libc)
    if version < 1:
        return
    every = _ALL[min(version, len(_ALL)) - 1]
    handled = ctypes.c_uint64(every)
    rules = _check(libc.syscall(_LANDLOCK_CREATE, ctypes.byref(handled), 8, 0), "Landlock")
    for rights, paths in ((_READ, (*_SYSTEM, *_readable())), (every, (str(folder), *_WRITABLE))):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            allowed = rights if os.path.isdir(path) else rights & _FILE_RIGHTS
            rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, fd), 12)
            _check(libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), "Landlock")
            os.close(fd)
    _check(libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _close_calls(libc: Any) -> None:
    """Refuse the calls of `_ARCHITECTURES`. clone may only make threads. clone3, whose flags a filter cannot see, fails
    as if it did not exist, so that libraries use clone."""
    number, calls = _ARCHITECTURES[platform.machine()]
    refused = [n for name, n in calls.items() if not name.startswith("clone")]
    code = [
        _op(0x20, 0, 0, 4), _op(0x15, 1, 0, number), _op(0x06, 0, 0, 0x80000000),  # another architecture: killed
        _op(0x20, 0, 0, 0),
        *(op for n in refused for op in (_op(0x15, 0, 1, n), _op(0x06, 0, 0, 0x00050000 | _EPERM))),
        _op(0x15, 0, 1, calls["clone3"]), _op(0x06, 0, 0, 0x00050000 | _ENOSYS),
        _op(0x15, 0, 3, calls["clone"]), _op(0x20, 0, 0, 16), _op(0x45, 1, 0, _THREAD),
        _op(0x06, 0, 0, 0x00050000 | _EPERM), _op(0x06, 0, 0, 0x7FFF0000),
    ]  # fmt: skip
    if platform.machine() == "x86_64":  # x32 calls have other numbers
        code[4:4] = [_op(0x35, 0, 1, 0x40000000), _op(0x06, 0, 0, 0x00050000 | _EPERM)]
    program = _Program(len(code), b"".join(code))
    _check(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0), "seccomp")


def _op(code: int, yes: int, no: int, value: int) -> bytes:
    """An instruction of a filter (struct sock_filter)."""
    return struct.pack("=HBBI", code, yes, no, value)


__all__: Sequence[str] = ["confine", "has_landlock", "has_seccomp", "main"]

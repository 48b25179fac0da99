"""Builds the pinned llama.cpp tools and installs them where toolchain.py finds them.

`install` works in a folder beside `root()` and renames it into place as its last step. So whenever it is
stopped, `root()` is complete or absent, and the next run continues with the interrupted step.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..base.errors import ToolError
from ..base.files import file_sha256
from ..base.folders import Folder
from ..base.lock import HeldError, Lock
from . import toolchain
from .toolchain import (
    CONVERTER,
    CONVERTER_PACKAGES,
    GGML_VERSION,
    INSTALL_COMMAND,
    PACKAGE,
    PACKAGE_VERSION,
    SDIST,
    STAMP,
    TOOLS,
    converter_packages,
    cpu_flags,
    installed,
    root,
    version,
    whole,
)

_CONVERTER_PARTS = (CONVERTER, "conversion", "gguf-py", "LICENSE")
_VENDORED = PurePosixPath("llama_cpp_python-0.3.36/vendor/llama.cpp")
_LOG_LINES_SHOWN = 15
_PROGRESS = re.compile(r"\[\s*(\d+)(?:/(\d+)|%)\]")  # ninja's "[12/147]", make's "[ 8%]"
_CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",  # keeps the build folder's path out of the binaries
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "LLAMA_BUILD_NUMBER": "0",  # otherwise taken from any git checkout that the cache is in
    "LLAMA_BUILD_COMMIT": f"{PACKAGE}-{PACKAGE_VERSION}",
}
_CMAKE_OFF = (
    *(f"LLAMA_{name}" for name in ("CURL", "OPENSSL")),
    *(f"LLAMA_BUILD_{name}" for name in ("TESTS", "EXAMPLES", "SERVER", "APP", "UI")),
    *(f"GGML_BUILD_{name}" for name in ("TESTS", "EXAMPLES")),
)


def install(
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
    jobs: int | None = None,
    force: bool = False,
) -> Path:
    """Download, check, build and install the pinned tools; return `root()`.

    `report` gets a sentence at each step, `progress` (done, total) counts the compile steps, which take nearly
    all of the time (minutes). Without `force`, existing results are kept: an installation, or the steps
    that an interrupted run finished. Raises ToolError; everything done so far is kept for the next run.
    """
    final = root()
    work = final.with_name(f"{final.name}.work")
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final.with_name(f"{final.name}.lock")):
            if whole() and not force:
                if not installed():  # built with another Python
                    _install_converter_packages(converter_packages(final), work, report)
                shutil.rmtree(work, ignore_errors=True)
                report(f"installed in {final}")
                return final
            if missing := toolchain.missing():
                report(f"{final} has no {', '.join(missing)}: an earlier quantkit built it, or something was deleted")
            if force:  # the sdist may stay: its sha256 tells whether it is right
                for path in (work / "llama.cpp", work / "build", work / "staged"):
                    shutil.rmtree(path, ignore_errors=True)
            work.mkdir(exist_ok=True)
            source = _extract(_download(work, report), work, report)
            _build(source, work, report, progress, jobs)
            staged = _stage(source, work, report)
            if final.exists():
                shutil.rmtree(work / "old", ignore_errors=True)
                final.rename(work / "old")
            staged.rename(final)
            shutil.rmtree(work)
    except OSError as e:
        raise ToolError(
            f"the toolchain cannot be installed in {final.parent}: {e.strerror or e}; {_mend(e)}, then run again: "
            f"{INSTALL_COMMAND}"
        ) from e
    report(f"installed in {final}")
    return final


def _mend(e: OSError) -> str:
    other = "set QUANTKIT_CACHE to another folder"
    return f"free some space there (1 GB is needed), or {other}" if e.errno in (errno.ENOSPC, errno.EDQUOT) else other


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep out a second install into the same cache. Raises ToolError if there is one."""
    with Folder.hold(path.parent) as folder:
        try:
            lock = Lock.of_file(folder, path.name, folder.own)
        except HeldError as e:
            raise ToolError(
                f"another install (process {e.by}) holds {path}; when it has ended, run again: {INSTALL_COMMAND}"
            ) from None
        with lock:
            yield


def _download(work: Path, report: Callable[[str], None]) -> Path:
    """Download the sdist to `work` and check its sha256. pip gets the sha256 too, so it runs nothing from a wrong
    file."""
    sdist = work / SDIST
    if sdist.is_file():
        if file_sha256(sdist) == toolchain.SDIST_SHA256:
            report(f"{SDIST} is here already")
            return sdist
        sdist.unlink()
    report(f"downloading {SDIST} (77 MB)")
    requirement = work / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{toolchain.SDIST_SHA256}\n")
    arguments = ["--no-deps", "--no-binary", PACKAGE, "-r", str(requirement), "-d", str(work)]
    _pip(["download", *arguments], f"the download of {SDIST}", work / "download.log")
    if not sdist.is_file():
        raise ToolError(f"pip has left no {SDIST} in {work}; see {work / 'download.log'}")
    if (got := file_sha256(sdist)) != toolchain.SDIST_SHA256:
        sdist.unlink()
        raise ToolError(
            f"{SDIST} has the sha256 {got}, not {toolchain.SDIST_SHA256}: it is not the released file, and was "
            f"deleted; look at the index your pip uses (`pip config list`), then run again: {INSTALL_COMMAND}"
        )
    return sdist


def _extract(sdist: Path, work: Path, report: Callable[[str], None]) -> Path:
    """Extract llama.cpp from the sdist to `work`/llama.cpp: nothing else, and completely or not at all."""
    source = work / "llama.cpp"
    if source.is_dir():
        return source
    report("unpacking llama.cpp")
    partial = work / "unpacking"
    shutil.rmtree(partial, ignore_errors=True)
    prefix = f"{_VENDORED}/"
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(prefix)]
        if hasattr(tarfile, "data_filter"):
            archive.extractall(partial, members, filter="data")
        else:  # a Python without the filter: just as safe here, since the sha256 is that of a file that was reviewed
            archive.extractall(partial, members)
    (partial / _VENDORED).rename(source)
    shutil.rmtree(partial)
    return source


def _build(
    source: Path,
    work: Path,
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
    jobs: int | None,
) -> None:
    """Compile `TOOLS` into `work`/build/bin; cmake and ninja both continue where they were stopped."""
    build, log = work / "build", work / "build.log"
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise ToolError(
            "building llama.cpp needs a C++ compiler, and none of c++, g++, clang++ is on PATH; install one "
            f"(Debian, Ubuntu: `apt-get install g++`), then run: {INSTALL_COMMAND}"
        )
    ninja = shutil.which("ninja")
    if ninja is None and shutil.which("make") is None:
        ninja = _build_tool("ninja", work, report)
    cmake = _build_tool("cmake", work, report)
    options = _CMAKE_OPTIONS | dict.fromkeys(_CMAKE_OFF, "OFF")
    options["GGML_NATIVE"] = "OFF" if "avx2" in cpu_flags() else "ON"  # OFF always asks for AVX2
    configure = [cmake, "-S", str(source), "-B", str(build), *(f"-D{k}={v}" for k, v in options.items())]
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    jobs = jobs or len(os.sched_getaffinity(0))
    report(f"configuring ({'ninja' if ninja else 'make'}, {compiler})")
    if (build / "CMakeCache.txt").is_file() and (build / "build.ninja").is_file() != (ninja is not None):
        shutil.rmtree(build)  # configured for the other generator
    log.unlink(missing_ok=True)
    if _run(configure, log):
        raise ToolError(f"cmake cannot configure llama.cpp:\n{_tail(log)}\nthe whole log is {log}")

    def follow(line: str) -> None:
        if found := _PROGRESS.match(line):
            progress(int(found[1]), int(found[2] or 100))

    report(f"compiling {', '.join(TOOLS)} with {jobs} jobs")
    if _run([cmake, "--build", str(build), "--parallel", str(jobs), "--target", *TOOLS], log, follow):
        raise ToolError(
            f"llama.cpp does not compile:\n{_tail(log)}\nthe whole log is {log}; if the compiler was killed, "
            f"memory was short: run again with fewer jobs: {INSTALL_COMMAND} --jobs 1"
        )


def _build_tool(name: str, work: Path, report: Callable[[str], None]) -> str:
    """Return cmake or ninja: the one on PATH, else from the wheel of that name, installed into `work`."""
    if on_path := shutil.which(name):
        return on_path
    target = work / f"{name}-wheel"
    # In cmake's wheel, bin/cmake is a Python script that works only when the package is properly installed.
    executable = target / ("cmake/data/bin/cmake" if name == "cmake" else f"bin/{name}")
    if not executable.is_file():
        report(f"downloading {name}, which is not on PATH")
        _pip(["install", "--target", str(target), name], f"the download of {name}", work / f"{name}.log")
    if not executable.is_file():
        raise ToolError(
            f"the wheel of {name} has no {executable.relative_to(target)}; put {name} on PATH, "
            f"then run again: {INSTALL_COMMAND}"
        )
    return str(executable)


def _install_converter_packages(target: Path, work: Path, report: Callable[[str], None]) -> None:
    """Install `CONVERTER_PACKAGES` into `target`, completely or not at all; with this environment's version of numpy,
    which torch works with."""
    if target.is_dir():
        return
    report(f"downloading the converter's Python packages ({', '.join(CONVERTER_PACKAGES)})")
    work.mkdir(exist_ok=True)
    partial = work / "packages"
    shutil.rmtree(partial, ignore_errors=True)
    constraint = work / "constraint.txt"
    constraint.write_text(f"numpy=={importlib.metadata.version('numpy')}\n")
    arguments = ["--target", str(partial), "--constraint", str(constraint), *CONVERTER_PACKAGES]
    _pip(["install", *arguments], "the download of the converter's packages", work / "packages.log")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)


def _stage(source: Path, work: Path, report: Callable[[str], None]) -> Path:
    """Put everything for `root()` into `work`/staged, the stamp last."""
    staged, built = work / "staged", work / "build" / "bin"
    _install_converter_packages(converter_packages(staged), work, report)
    report("copying")
    for name in ("bin", "src"):
        shutil.rmtree(staged / name, ignore_errors=True)
        (staged / name).mkdir(parents=True)
    for path in (*(built / tool for tool in TOOLS), *sorted(built.glob("*.so*"))):
        shutil.copy2(path, staged / "bin" / path.name, follow_symlinks=False)
    for name in _CONVERTER_PARTS:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, staged / "src" / name)
    facts = {
        "package": f"{PACKAGE}=={PACKAGE_VERSION}",
        "sha256": toolchain.SDIST_SHA256,
        "ggml": GGML_VERSION,
        "tools": {tool: version(staged / "bin" / tool) for tool in TOOLS},
        "converter_packages": list(CONVERTER_PACKAGES),
    }
    (staged / STAMP).write_text(json.dumps(facts, indent=2) + "\n")
    return staged


def _pip(arguments: Sequence[str], what: str, log: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ToolError(f"{what} needs pip, and this Python has none; run: {sys.executable} -m ensurepip")
    log.unlink(missing_ok=True)
    common = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    if _run([sys.executable, "-m", "pip", *arguments, *common], log):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip said nothing"]
        raise ToolError(
            f"{what} failed: {errors[-1]} (the whole log is {log}); look at the network and at the index your "
            f"pip uses (`pip config list`), then run again: {INSTALL_COMMAND}"
        )


def _run(argv: Sequence[str], log: Path, follow: Callable[[str], None] | None = None) -> int:
    """Run a command, append its output to `log`, and pass each line to `follow`; return its exit status."""
    with (
        log.open("a") as file,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if follow is not None:
                    follow(line)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES_SHOWN:])

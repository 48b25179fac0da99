"""Finds the llama.cpp tools: on PATH, or in the cache, where install.py puts the pinned version.

The pin is the sdist of `llama-cpp-python` (see `SDIST`). It contains all of llama.cpp, so one file
with one sha256 fixes the quantizer, the converter and the ggml whose bytes are the contract. Installed
from it, all under `root()`:

    bin/             the executables in `TOOLS` and their shared libraries, side by side (rpath $ORIGIN)
    src/             convert_hf_to_gguf.py with the `conversion` and `gguf` packages it imports
    python/<tag>/    the converter's own Python packages, for one Python (`cpython-311`), without torch, which
                     the converter takes from the environment that quantkit runs in
    installed.json   the stamp, without which `root()` does not exist
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from quantkit.base.errors import ToolError, did_you_mean

TOOLS = (
    "llama-quantize",
    "llama-imatrix",
    "llama-gguf-split",
    "llama-perplexity",
    "llama-completion",
    "llama-tokenize",
)

PACKAGE = "llama-cpp-python"
PACKAGE_VERSION = "0.3.36"
SDIST = "llama_cpp_python-0.3.36.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
GGML_VERSION = "0.25.3"  # of that sdist
CONVERTER_PACKAGES = ("transformers==4.57.6", "sentencepiece", "protobuf")

INSTALL_COMMAND = "quantkit toolchain install"

STAMP = "installed.json"
CONVERTER = "convert_hf_to_gguf.py"
_OTHER = f"give --llama-quantize the path of another, or run: {INSTALL_COMMAND}"
#: most bytes and seconds of a program's answer
_MOST_SAID, _PATIENCE = 1 << 16, 20
_VERSION_LINE = re.compile(r"^(?:version:|main: build =)\s*(.+)$", re.MULTILINE)


class Located(NamedTuple):
    """An executable, and where it was found."""

    path: Path
    origin: Literal["PATH", "cache"]


# Where things are


def cache_dir() -> Path:
    """Return quantkit's cache: $QUANTKIT_CACHE, else $XDG_CACHE_HOME/quantkit, else ~/.cache/quantkit. Raises
    ToolError if the home folder is needed but unknown."""
    try:
        if own := os.environ.get("QUANTKIT_CACHE"):
            return Path(own).expanduser().absolute()
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg).expanduser().absolute() / "quantkit"
        return Path.home() / ".cache" / "quantkit"
    except RuntimeError:
        raise ToolError(
            "no home folder is known for quantkit's cache; set QUANTKIT_CACHE to a folder of your own"
        ) from None


def root() -> Path:
    """Return the folder of the installed toolchain; it exists only when complete. Raises ToolError as `cache_dir`."""
    return cache_dir() / "toolchain" / f"{PACKAGE}-{PACKAGE_VERSION}"


def find(tool: str, explicit: Path | str | None = None) -> Path:
    """Return the executable to run for `tool`: `explicit` if given, else the one on PATH, else the one in the cache.

    Raises ToolError if `explicit` is not an executable file, or if the tool is found nowhere.
    """
    _check_name(tool)
    if explicit is not None:
        path = Path(explicit).expanduser()
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            problem = "is not executable" if os.path.isfile(path) else "is not there, or no file"
            raise ToolError(f"{tool}: {path} {problem}; give another path or none, and run: {INSTALL_COMMAND}")
        return path.absolute()
    if located := locate(tool):
        return located.path
    if unusable := trouble():
        raise ToolError(f"{tool} is not on PATH, and the cache has none: {unusable}")
    older = " (an earlier quantkit built what is there)" if stamp() is not None else ""
    raise ToolError(f"{tool} is neither on PATH nor in {root() / 'bin'}{older}; to build it, run: {INSTALL_COMMAND}")


def find_quantize(explicit: Path | str | None = None) -> Path:
    """Return the llama-quantize to run. Raises ToolError if there is none, or if its --help does not name
    the option with which quantkit passes the types: then it is another program, or older than 2025."""
    path = find("llama-quantize", explicit)
    option = "--tensor-type-file"
    try:
        said = _said([str(path), "--help"])
    except OSError as e:
        raise ToolError(f"llama-quantize: {path} cannot be run: {e.strerror or e}; {_OTHER}") from None
    if option not in said:
        raise ToolError(f"llama-quantize: {path} is none, or too old: its --help does not name {option}; {_OTHER}")
    return path


def _said(command: Sequence[str]) -> str:
    """Return what a program prints, up to a limit of bytes and seconds. Raises OSError if it cannot be run."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        assert process.stdout is not None

        def end() -> None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(_PATIENCE, end)
        timer.start()
        try:
            return process.stdout.read(_MOST_SAID).decode(errors="replace")
        finally:
            timer.cancel()
            end()


def locate(tool: str) -> Located | None:
    """Return the tool that `find` would take without an explicit path, or None if it is found nowhere."""
    _check_name(tool)
    if on_path := shutil.which(tool):
        return Located(Path(on_path).absolute(), "PATH")
    cached = find_in_cache(tool)
    return Located(cached, "cache") if cached else None


def find_in_cache(tool: str) -> Path | None:
    """Return the installed executable of `tool`, or None."""
    _check_name(tool)
    path = _in_cache("bin", tool)
    return path if path is not None and os.access(path, os.X_OK) else None


def _in_cache(*names: str) -> Path | None:
    """Return an installed file; None if there is none, or the cache cannot be accessed (`trouble` tells why)."""
    try:
        path = root().joinpath(*names)
    except ToolError:
        return None
    return path if os.path.isfile(path) else None


def trouble() -> str | None:
    """Explain why the cache cannot be used, or return None. A cache that does not exist yet is fine."""
    try:
        folder = cache_dir()
    except ToolError as e:
        return str(e)
    try:
        os.stat(root())
    except FileNotFoundError:
        pass
    except OSError as e:
        return f"{folder}: the cache cannot be read: {e.strerror or e}; set QUANTKIT_CACHE to a folder of your own"
    existing = next((p for p in (folder, *folder.parents) if os.path.exists(p)), None)
    if existing is None or not os.access(existing, os.W_OK):
        return f"{folder}: the cache cannot be written to; set QUANTKIT_CACHE to a folder of your own"
    return None


def _check_name(tool: str) -> None:
    if tool not in TOOLS:
        raise ToolError(
            f"{tool!r} is not a tool of this toolchain{did_you_mean(tool, TOOLS)}; "
            "to see them, run: quantkit toolchain list"
        )


def ggml_library() -> Path | None:
    """Return the installed libggml-base.so (ggml `GGML_VERSION`, the byte contract), or None."""
    return _in_cache("bin", "libggml-base.so")


def converter_command() -> tuple[list[str], dict[str, str]]:
    """Return how to run llama.cpp's converter: its first arguments, and what to add to the environment. Raises
    ToolError.

    The environment puts the converter's own packages (transformers, and what it needs) before those of
    the environment that quantkit runs in, which stays unchanged.
    """
    script = root() / "src" / CONVERTER
    if not os.path.isfile(script):
        raise ToolError(f"{CONVERTER} is not installed in {root() / 'src'}; run: {INSTALL_COMMAND}")
    packages = converter_packages(root())
    if not packages.is_dir():
        raise ToolError(
            f"the packages of {CONVERTER} are not installed for this Python "
            f"({sys.implementation.cache_tag}); run: {INSTALL_COMMAND}"
        )
    paths = [str(script.parent / "gguf-py"), str(packages), os.environ.get("PYTHONPATH", "")]
    return [sys.executable, str(script)], {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def converter_packages(base: Path) -> Path:
    """Return the folder below `base` with the converter's own packages for this Python."""
    return base / "python" / str(sys.implementation.cache_tag)


def version(path: Path) -> str:
    """Return the version that the tool at `path` prints, in one line; 'unknown version' if it prints none.

    llama-quantize has no `--version`; it prints its version when it starts on a file, here one that
    cannot exist, since its path is below an executable.
    """
    for arguments in (["--version"], ["--dry-run", f"{path}/none.gguf", "Q8_0"]):
        try:
            said = _said([str(path), *arguments])
        except OSError:
            return "unknown version"
        if found := _VERSION_LINE.search(said):
            return found[1].strip()
        first = next((line.strip() for line in said.splitlines() if line.strip()), "")
        if first and not first.lower().startswith(("usage", "error")):
            return first
        if path.name != "llama-quantize":
            break
    return "unknown version"


def stamp() -> dict[str, object] | None:
    """Return what `install` recorded about its build, or None if there is no (readable) installation."""
    try:
        read = json.loads((root() / STAMP).read_text())
    except (OSError, ValueError, RecursionError, ToolError):
        return None
    return read if isinstance(read, dict) and read.get("sha256") == SDIST_SHA256 else None


def missing() -> list[str]:
    """Return the tools missing from an installation, such as an earlier quantkit's; [] if there is no installation."""
    return [] if stamp() is None else [tool for tool in TOOLS if find_in_cache(tool) is None]


def whole() -> bool:
    """Whether everything that was built is still in the cache: the tools, their ggml, and the converter."""
    files = (("src", CONVERTER), ("bin", "libggml-base.so"))
    return stamp() is not None and not missing() and all(_in_cache(*names) for names in files)


def installed() -> bool:
    """Whether the tools, and the converter with its packages for this Python, are all in the cache."""
    return whole() and os.path.isdir(converter_packages(root()))


def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags as Linux names them ('avx2', 'f16c'; on ARM 'asimd'), empty if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()

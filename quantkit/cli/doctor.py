"""`quantkit doctor`: what this machine has for quantkit, and the one command that mends what it has not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from .files import Command

#: the distributions quantkit is installed with
REQUIRED = (
    "click",
    "gguf",
    "huggingface_hub",
    "libggml-python",
    "ml_dtypes",
    "numpy",
    "pydantic",
    "PyYAML",
    "safetensors",
    "tokenizers",
    "tqdm",
    "xxhash",
)
#: those of the extra `lab`, and what needs them
LAB = {"torch": "imatrix make, dequant --device cuda, convert_hf_to_gguf.py", "scipy": "", "jinja2": "--chat"}
INSTALL_LAB = "pip install 'quantkit[lab]'"
#: those of the extra `pictures`
PICTURES = {"altair": "report, --figure", "squarify": "report", "vl-convert-python": "report, --figure"}
INSTALL_PICTURES = "pip install 'quantkit[pictures]'"
CPU_FEATURES = ("avx2", "avx512f", "f16c", "fma", "neon")

_GIB = 2**30


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check what is installed, and say how to mend what is missing.

    The exit status is 0 if `quantkit build` can run with the native engine, 1 if not. What is only
    missing for other commands is a warning.

    \b
    Example:
      quantkit doctor --json
    """
    import json

    found = examine()
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))
    if not found["ok"]:
        raise click.exceptions.Exit(1)


def examine() -> dict[str, Any]:
    """All that the doctor looks at, as plain data: the keys of `doctor --json`."""
    import platform

    from quantkit.base.memory import memory_sizes
    from quantkit.base.version import __version__
    from quantkit.llama_cpp import toolchain

    from .toolchain import describe

    problems: list[dict[str, str]] = []

    def problem(severity: str, what: str, fix: str) -> None:
        problems.append({"severity": severity, "what": what, "fix": fix})

    packages = {name: _installed_version(name) for name in (*REQUIRED, *LAB, *PICTURES)}
    for name in REQUIRED:
        if packages[name] is None:
            problem("error", f"{name} is not installed", f"pip install {name}")
    extras = {}
    for extra, uses, install in (("lab", LAB, INSTALL_LAB), ("pictures", PICTURES, INSTALL_PICTURES)):
        lacks = [f"{name} ({use})" if use else name for name, use in uses.items() if packages[name] is None]
        extras[extra] = not lacks
        if lacks:
            problem("warning", f"the extra {extra} lacks {' and '.join(lacks)}", install)

    kernels, ggml = _kernels(problem)
    tools = describe()
    absent = [tool["name"] for tool in tools["tools"] if tool["path"] is None]
    if tools["converter"] is None:
        absent.append("convert_hf_to_gguf.py")
    if tools["trouble"]:
        problem("warning", tools["trouble"], "export QUANTKIT_CACHE=FOLDER")
    if absent:
        problem("warning", f"not found: {', '.join(absent)}", toolchain.INSTALL_COMMAND)

    flags = toolchain.cpu_flags()
    return {
        "ok": all(p["severity"] != "error" for p in problems),
        "quantkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "ggml": ggml,
        "toolchain": tools,
        "cpu": {
            "model": _cpu_model(),
            "features": {name: name in flags or (name == "neon" and "asimd" in flags) for name in CPU_FEATURES},
        },
        "kernels": kernels,
        "disk": _disks(),
        "memory": memory_sizes(),
        "problems": problems,
    }


def _installed_version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _kernels(problem: Callable[[str, str, str], None]) -> tuple[dict[str, str], dict[str, str | None]]:
    """The kernel used for each type, and the ggml of the wheel; tells `problem` of what is not there."""
    from quantkit.base.errors import KernelError
    from quantkit.llama_cpp import toolchain

    ggml: dict[str, str | None] = {"path": None, "version": None}
    try:
        from quantkit import kernels
    except ImportError as e:
        problem("error", f"quantkit's kernels cannot be loaded: {e}", "pip install --force-reinstall quantkit")
        return {}, ggml
    try:
        library = kernels.wheel_library()
        ggml = {"path": str(library), "version": _ggml_version(library)}
    except (KernelError, OSError, AttributeError) as e:
        problem("error", f"the ggml of libggml-python: {e}", "pip install --force-reinstall libggml-python")
    active = kernels.active()
    none = [name for name, kernel in active.items() if kernel.startswith("none")]
    try:
        kernels.check_choice()
    except KernelError as e:
        problem("error", str(e), "unset QUANTKIT_KERNELS")
        return active, ggml
    if len(none) == len(active):
        fix = "pip install --force-reinstall libggml-python"
        problem("error", f"no type has a kernel; {none[0]}: {active[none[0]]}", fix)
    elif none:
        problem(
            "warning",
            f"no kernel for {', '.join(none)}: not to be used in a recipe",
            toolchain.INSTALL_COMMAND,
        )
    return active, ggml


def _ggml_version(library: Path) -> str:
    import ctypes

    function = ctypes.CDLL(str(library)).ggml_version
    function.restype = ctypes.c_char_p
    return bytes(function()).decode()


def _cpu_model() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _disks() -> dict[str, dict[str, Any]]:
    """Free bytes where we are and of the cache; without what cannot be looked into."""
    from quantkit.base.errors import ToolError
    from quantkit.llama_cpp import toolchain

    found = {}
    with suppress(OSError):  # a current directory that was removed
        found["here"] = _disk(Path.cwd())
    with suppress(OSError, ToolError):
        found["cache"] = _disk(toolchain.cache_dir())
    return found


def _disk(folder: Path) -> dict[str, Any]:
    """Free bytes of the file system `folder` is on, or would be on once it is made. Raises OSError."""
    import os
    import shutil

    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return {"path": str(folder), "free_nbytes": shutil.disk_usage(existing).free}


def _lines(found: dict[str, Any]) -> list[str]:
    import textwrap

    from quantkit.base.text import columns

    from .toolchain import LABEL, tool_lines

    def gib(nbytes: int | None) -> str:
        return "unknown" if nbytes is None else f"{nbytes / _GIB:.1f} GiB"

    lines = [f"quantkit {found['quantkit']}, Python {found['python']}, {found['platform']}"]
    packages = [(name, version or "not installed") for name, version in found["packages"].items()]
    packages += [
        (f"extra {extra}", "complete" if whole else "not complete") for extra, whole in found["extras"].items()
    ]
    packages.append(("ggml of the wheel", found["ggml"]["version"] or "not found"))
    features, memory = found["cpu"]["features"], found["memory"]
    machine = [
        ("CPU", found["cpu"]["model"]),
        ("", ", ".join(f"{name} {_yes(has)}" for name, has in features.items())),
        ("memory", f"{gib(memory['available_nbytes'])} available of {gib(memory['total_nbytes'])}"),
    ]
    for place, disk in found["disk"].items():
        machine.append((f"free disk, {place}", f"{gib(disk['free_nbytes'])} ({disk['path']})"))
    for title, section in (
        ("packages", columns(packages, least=(LABEL,))),
        ("llama.cpp", tool_lines(found["toolchain"])),
        ("machine", columns(machine, least=(LABEL,))),
    ):
        lines += ["", title, *(f"  {line}" for line in section)]
    lines += ["", "kernels"]
    by_kernel: dict[str, list[str]] = {}
    for name, kernel in found["kernels"].items():
        by_kernel.setdefault("none" if kernel.startswith("none") else kernel, []).append(name)
    for kernel, names in by_kernel.items():
        indent = " " * 22
        lines += textwrap.wrap(" ".join(names), 100, initial_indent=f"  {kernel:20}", subsequent_indent=indent)
    lines.append("")
    for p in found["problems"]:
        lines.append(f"{p['severity']}: {p['what']}; run: {p['fix']}")
    lines.append("builds can run" if found["ok"] else "builds cannot run until the errors above are mended")
    return lines


def _yes(has: bool) -> str:
    return "yes" if has else "no"

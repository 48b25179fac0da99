"""`quantkit toolchain`: build the pinned llama.cpp tools, and show which tools are used."""

from __future__ import annotations

from typing import Any

import click

from .files import Group
from .terminal import bars_file

#: columns of the first column in what this and the doctor list
LABEL = 18


@click.group(cls=Group)
def toolchain() -> None:
    """Build and list the llama.cpp tools.

    quantkit plans and builds without them. They are needed to convert and quantize the stock way, to
    measure perplexity and importance matrices, and for types whose bytes only their ggml gives (IQ1_M).

    \b
    Example:
      quantkit toolchain install
    """


@toolchain.command()
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers to run at once.  [default: one a CPU]")
@click.option("--force", is_flag=True, help="Rebuild what is already installed.")
def install(jobs: int | None, force: bool) -> None:
    """Download, build and install the tools into the cache.

    Compiling takes some minutes and 1 GB of disk. If it is stopped, run it again to continue.
    The cache is $QUANTKIT_CACHE, else $XDG_CACHE_HOME/quantkit, else ~/.cache/quantkit.

    \b
    Example:
      quantkit toolchain install --jobs 4
    """
    from tqdm import tqdm

    from quantkit.llama_cpp import toolchain as tools
    from quantkit.llama_cpp.install import install as install_tools

    bar: tqdm[Any] | None = None

    def report(sentence: str) -> None:
        close()
        click.echo(sentence, err=True)

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, initial=done, unit="step", desc="compiling", dynamic_ncols=True, file=bars_file())
        bar.total = total
        bar.update(done - bar.n)

    def close() -> None:
        nonlocal bar
        if bar is not None:
            bar.close()
            bar = None

    try:
        install_tools(report, progress, jobs=jobs, force=force)
    finally:
        close()
    for tool in tools.TOOLS:
        path = tools.find_in_cache(tool)
        click.echo(f"{tool:18} {tools.version(path) if path else 'missing'}")


@toolchain.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """Show each tool: where it is found (PATH, then cache), and its version.

    \b
    Example:
      quantkit toolchain list --json
    """
    import json

    found = describe()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for line in tool_lines(found):
        click.echo(line)
    if found["trouble"]:
        click.echo(found["trouble"])
    elif not found["installed"]:
        click.echo(f"not all installed in {found['root']}; run: quantkit toolchain install")


def describe() -> dict[str, Any]:
    """What is where, as plain data: the keys of `toolchain list --json`."""
    from quantkit.base.errors import ToolError
    from quantkit.llama_cpp import toolchain as tools

    rows = []
    for tool in tools.TOOLS:
        located = tools.locate(tool)
        rows.append(
            {
                "name": tool,
                "path": str(located.path) if located else None,
                "origin": located.origin if located else None,
                "version": tools.version(located.path) if located else None,
            }
        )
    try:
        converter: str | None = tools.converter_command()[0][-1]
    except ToolError:
        converter = None
    library = tools.ggml_library()
    try:
        root: str | None = str(tools.root())
    except ToolError:
        root = None
    return {
        "root": root,
        "trouble": tools.trouble(),
        "installed": tools.installed(),
        "tools": rows,
        "converter": converter,
        "ggml_library": str(library) if library else None,
        "ggml_version": tools.GGML_VERSION if library else None,
    }


def tool_lines(found: dict[str, Any]) -> list[str]:
    """The text of `describe`: name, origin, version and path, a line each."""
    from quantkit.base.text import columns

    rows = [(t["name"], t["origin"], t["version"], t["path"]) for t in found["tools"]]
    cached = ("cache" if found["converter"] else None, "", found["converter"])
    rows.append(("convert_hf_to_gguf", *cached))
    rows.append(
        (
            "libggml-base",
            "cache" if found["ggml_library"] else None,
            found["ggml_version"],
            found["ggml_library"],
        )
    )
    return columns([(n, o or "-", v or "", p or "not found") for n, o, v, p in rows], least=(LABEL, 5))

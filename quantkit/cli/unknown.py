"""What was probably meant by a command that quantkit does not have: names of llama.cpp's tools, and other verbs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator

import click

_BUILD = "build SOURCE -o OUT.gguf -r RECIPE"
#: what people type -> what does it here
_MEANT = {
    "bf16": "dequant",
    "bundle": "merge",
    "calibrate": "imatrix make",
    "clone": "recipe from-gguf",
    "completion": "the shell's completion: docs/completion.md says how",
    "completions": "the shell's completion: docs/completion.md says how",
    "convert": _BUILD,
    "convert-hf-to-gguf": _BUILD,
    "create": "build",
    "dequantize": "dequant",
    "dump": "inspect",
    "estimate": "plan",
    "export": "recipe export",
    "finetune": "optimize",
    "generate": "eval generate",
    "gguf-dump": "inspect",
    "gguf-split": "split",
    "choose": "which",
    "gpu": "fit",
    "hash": "verify",
    "help": "--help",
    "import": "recipe import",
    "importance": "imatrix make",
    "info": "inspect",
    "install": "toolchain install",
    "join": "merge",
    "kld": "eval compare",
    "layers": "fit",
    "llama-gguf-split": "split",
    "llama-imatrix": "imatrix make",
    "llama-perplexity": "eval compare",
    "llama-quantize": _BUILD,
    "ls": "inspect",
    "make": "build",
    "make-imatrix": "imatrix make",
    "offload": "fit",
    "perplexity": "eval compare",
    "ppl": "eval compare",
    "progress": "status",
    "push": "publish",
    "quant": _BUILD,
    "quantise": _BUILD,
    "quantize": _BUILD,
    "recipes": "recipe list",
    "restart": "build --restart",
    "resume": "build --resume",
    "run": "build",
    "search": "optimize",
    "setup": "toolchain install",
    "shard": "split",
    "size": "sizes table",
    "sweep": "ablate run",
    "tokens": "tokenize",
    "upload": "publish",
    "validate": "verify",
    "version": "--version",
    "vram": "fit",
}


#: the same within a group
_MEANT_IN = {
    "recipe": {
        "check": "lint",
        "validate": "lint",
        "create": "new",
        "compare": "diff",
        "why": "explain",
        "cat": "show",
    },
    "sizes": {"diff": "check", "lock": "update", "write": "update", "show": "table", "list": "table"},
    "imatrix": {"create": "make", "compute": "make", "show": "info", "add": "merge", "combine": "merge"},
    "toolchain": {"update": "install", "build": "install", "show": "list"},
    "cache": {"clean": "prune", "clear": "prune", "list": "show", "info": "show"},
}


def no_such(name: str, group: click.Group, root: click.Command) -> str:
    """The sentence for a command that a group does not have."""
    assert isinstance(root, click.Group)
    says = meant(name, group, root)
    return f"there is no command '{name:.60}'" + (f": {says}" if says else f"; there are {', '.join(group.commands)}")


def too_many(message: str) -> str:
    """What to add to click's message on arguments too many, when they are files: a shell may have made them."""
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", message, re.S)
    if extra is None or not any(os.path.lexists(word) for word in (extra[1], *extra[1].split())):
        return ""
    return "; if the shell made several names of a pattern with *, ? or [ ], put it in quotes"


def meant(name: str, group: click.Group, root: click.Group) -> str:
    """What was perhaps meant by a command that a group does not have; '' for nothing known."""
    from quantkit.base.errors import did_you_mean

    word = re.sub(r"\.(py|exe)$", "", name.lower()).replace("_", "-")
    if group is not root and not os.path.exists(name):
        own = _MEANT_IN.get(str(group.name), {}).get(word)
        if own is not None:
            return f"you want `quantkit {group.name} {own}`"
        if near := did_you_mean(word, group.commands):
            return near.strip(" ()")
        if word in root.commands:
            return f"you want `quantkit {word}`"
    known = _MEANT.get(word)
    if known is not None:
        return f"you want {known}" if ": " in known else f"you want `quantkit {known}`"
    if os.path.exists(name):
        typed = shlex.quote(name)
        return f"it is a file or folder: you want `quantkit inspect {typed}` or `quantkit build {typed} -o OUT.gguf`"
    inside = [path for path in _paths(root) if path.split()[-1] == word]
    if inside:
        return "you want " + " or ".join(f"`quantkit {path}`" for path in inside)
    return did_you_mean(word, root.commands).strip(" ()")


def _paths(group: click.Group, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        yield f"{before}{name}"
        if isinstance(command, click.Group):
            yield from _paths(command, f"{before}{name} ")

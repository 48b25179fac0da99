"""Builds of one checkpoint that stop when a test likes, and journals made to say something else."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_builds import plan_of, rules

from quantkit.building import folder as partial_folder
from quantkit.building import run as builds
from quantkit.building.engines import Work
from quantkit.building.engines.native import NativeEngine
from quantkit.imatrix.matrix import open_imatrix
from quantkit.recipe.load import Recipe

SLAB = 1 << 14
#: values of the checkpoint
N = 3_421_448


def recipe(type_: str = "IQ2_XXS") -> Recipe:
    """The routed experts in this type, the rest in Q4_K."""
    head = "arch: [deepseek2]\nfile_type: Q4_K_M"
    return rules(f'match: "*_exps.weight", type: {type_}', 'match: "*", type: Q4_K', head=head)


class EnoughError(Exception):
    """Raised where a build is to end."""


class Builder:
    """Builds one checkpoint, and can stop when it likes."""

    def __init__(self, source: Path, imatrix: Path, out: Path) -> None:
        self.source, self.imatrix, self.out = source, imatrix, out
        self.folder = partial_folder.folder_of(out)
        self.quantized = 0

    def ready(self, type_: str = "IQ2_XXS", **more: Any) -> builds.Build:
        plan = plan_of(self.source, recipe(type_), self.imatrix)
        return builds.prepare(plan, self.out, open_imatrix(str(self.imatrix)), **more)

    def run(self, ready: builds.Build, stop_after: int | None = None, n_threads: int = 1) -> int:
        """Build; `stop_after` so many values, as an interrupt would. Returns the values kept from before."""
        self.quantized = 0

        class Counting(NativeEngine):
            def run(self, work: Work) -> None:
                super().run(replace(work, progress=count))

        def count(_name: str, n: int) -> None:
            self.quantized += n
            if stop_after is not None and self.quantized >= stop_after:
                raise EnoughError

        return builds.run(ready, Counting(SLAB), n_threads, lambda _name, _n: None)

    def stopped(self, after: int, **more: Any) -> None:
        with pytest.raises(EnoughError):
            self.run(self.ready(**more), after)
        assert self.folder.is_dir()


def edit_head(journal: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a journal's first line says, with a right checksum."""
    line, _, records = journal.read_bytes().partition(b"\n")
    head = json.loads(line[:-9])
    change(head)
    text = json.dumps(head).encode()
    journal.write_bytes(b"%s %08x\n" % (text, zlib.crc32(text)) + records)


def rename_in(journal: Path, change: Callable[[list[list[object]]], None]) -> None:
    """Change the files that a build's journal names."""
    edit_head(journal, lambda head: change(head["files"]))

"""The files behind a value of the command line: the shards of a set, a recipe's base, the folder of a build at work.

What is read is listed as paths. What is written is listed as outputs (quantkit.base.outputs).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .ggufs import as_built

if TYPE_CHECKING:
    from quantkit.base.outputs import Output

#: stands for the lock in the current directory
DEFAULT_LOCK = Path()


# ---------------------------------------------------------------- what is read


def of_gguf(value: str) -> Iterator[Path]:
    """A GGUF and the other shards of its set."""
    from quantkit.gguf.shards import split_name

    path = as_built(Path(value))
    yield path
    parts = split_name(path.name)
    if parts is not None:
        with suppress(OSError):
            for beside in sorted(path.absolute().parent.iterdir()):
                other = split_name(beside.name)
                if other is not None and (other.prefix, other.n_shards) == (parts.prefix, parts.n_shards):
                    yield beside


def of_model(value: str) -> Iterator[Path]:
    """Everything behind a SOURCE: the files of a checkpoint's folder, or of a GGUF."""
    from quantkit.base.outputs import files_of_folder

    path = Path(value)
    with suppress(RuntimeError):  # ~name of nobody
        path = path.expanduser()
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:
        return
    if is_folder:
        yield from files_of_folder(path)
    elif is_there:
        yield from of_gguf(str(path))
    elif value.count("/") == 1 and not value.startswith((".", "~", "/")) and "://" not in value:
        from quantkit.model.hub import downloaded

        found = downloaded(value)
        if found is not None:
            yield from files_of_folder(found)


def of_recipe(value: str) -> Iterable[Path]:
    from quantkit.recipe.load import files_of

    return files_of(value)


def of_recipes(value: str) -> Iterator[Path]:
    """The files of recipes as `quantkit sizes` names them, by globs too."""
    import glob

    yield from of_recipe(value)
    if any(ch in value for ch in "*?["):
        for found in glob.glob(value, recursive=True):
            yield from of_recipe(found)


def of_lock(value: str) -> Iterator[Path]:
    """A sizes lock, and the recipes and models that it names."""
    path = lock_path(Path(value))
    yield path
    yield from named_by_lock(path)


def lock_path(path: Path) -> Path:
    from quantkit.authoring.sizes.compare import default_lock

    return default_lock() if path == DEFAULT_LOCK else path


def named_by_lock(given: Path) -> Iterator[Path]:
    from quantkit.authoring.sizes.compare import is_path
    from quantkit.authoring.sizes.lock import read_lock
    from quantkit.base.errors import QuantkitError

    path = lock_path(given)

    with suppress(QuantkitError):
        matrix = read_lock(path).matrix
        for name in matrix.recipes:
            yield from of_recipes(str(path.parent / name) if is_path(name) else name)
        for name in matrix.models:
            here = path.parent / name
            yield from of_model(str(here) if here.exists() else name)


def of_dequant(value: str) -> Iterator[Path]:
    """The files of a checkpoint, those in folders too: they are carried over."""
    yield from of_model(value)
    for folder, folders, names in os.walk(value):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def of_text(value: str) -> Iterable[Path]:
    """The files of a text: itself, or those of a folder."""
    from quantkit.text.sources import files_of

    return map(Path, files_of(value))


def of_covariance_in(value: str) -> Iterable[Path]:
    """All files of a covariance's folder; or what is no folder."""
    from quantkit.base.outputs import files_of_folder

    folder = Path(value)
    if not os.path.isdir(folder):
        return [folder]
    inside = folder / "held-out"
    return [*files_of_folder(folder), *(files_of_folder(inside) if inside.is_dir() else [])]


def nothing(_: str) -> Iterable[Path]:
    return ()


# ---------------------------------------------------------------- what is written


def of_build(out: Path, one: Output) -> Iterator[Output]:
    """OUT, or shards whose names `prepare` knows and checks, and the folder where they are made."""
    from quantkit.building.folder import folder_of

    yield one._replace(is_later=True, suffix=".partial")
    yield one._replace(path=folder_of(out), option="the unfinished build", is_folder=True, only_compared=True)


def of_unfinished(out: Path, one: Output) -> Iterator[Output]:
    """OUT, and the folder where it is made."""
    from quantkit.building.folder import folder_of

    yield one._replace(suffix=".partial")
    yield one._replace(path=folder_of(out), option="what is unfinished", is_folder=True, only_compared=True)


def of_covariance(folder: Path, one: Output) -> Iterator[Output]:
    """A folder, and the one beside it where it is made."""
    yield from (each._replace(is_folder=True) for each in of_unfinished(folder, one))


def of_cache(folder: Path, one: Output) -> Iterator[Output]:
    """The folders of a cache. One that cannot be used is no error: the build goes on without it and says why."""
    for name in ("objects", "sources", "tmp"):
        yield one._replace(path=folder / name, is_folder=True, only_compared=True)
    yield one._replace(path=folder / "lock", only_compared=True)


def of_study(folder: Path, one: Output) -> Iterator[Output]:
    """The record of a study's files, which every run writes again; the files' names the command knows and checks."""
    from quantkit.lab.studies.record import RECORD

    yield one._replace(path=folder / RECORD, only_compared=True)


def of_demo(folder: Path, one: Output) -> Iterator[Output]:
    """What a demo made before and makes again; that the folder is a demo's its marker says."""
    from quantkit.model import demo

    for inside in (folder, folder / demo.NAME):
        with suppress(OSError):
            for path in sorted(inside.iterdir()):
                if path.suffix != ".yaml" and not (path.is_dir() and not path.is_symlink()):
                    yield one._replace(path=path, replace=True)


def of_update(given: Path, one: Output) -> Iterator[Output]:
    """A sizes lock is read and written by design. What is there and is none is replaced with --force only."""
    from quantkit.authoring.sizes.lock import is_lock

    path = lock_path(given)
    yield one._replace(path=path, replace=one.replace or is_lock(path))


def of_sensitivity(path: Path, one: Output) -> Iterator[Output]:
    """A sensitivity is continued. What is there and is none is replaced with --force only."""
    from quantkit.base.files import open_regular

    first = b""
    with suppress(OSError), open(open_regular(path), "rb") as f:  # not a pipe, whose reading would never end
        first = f.read(64)
    yield one._replace(replace=one.replace or b'"quantkit_sensitivity"' in first)


def as_folder(_: Path, one: Output) -> Iterable[Output]:
    return (one._replace(is_folder=True),)


def as_prefix(_: Path, one: Output) -> Iterable[Output]:
    return (one._replace(is_later=True),)

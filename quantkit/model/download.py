"""What of a repository on the Hub is fetched, and fetched: whole files, each checked by the repository's hash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..base.copying import Opened, copy_range
from ..base.errors import OutputError, SourceError, did_you_mean
from ..base.text import size as size_text
from ..gguf.quant_names import Published, published
from ..hub.repo import Repo
from . import begun

#: of a checkpoint: what building and running need; weights in other formats are not among it
_CHECKPOINT = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".py")
_CHUNK = 1 << 20


class ChoiceError(Exception):
    """A repository with several models, of which none was chosen: a sentence, then a line for each."""


class Found(NamedTuple):
    """A file that is wanted."""

    path: str
    """in the repository"""
    nbytes: int
    there: bool
    """it is in the folder already, with these bytes"""
    cached: Path | None = None
    """its content in Hugging Face's cache, which is copied rather than fetched"""
    part: int = 0
    """bytes of it that an interrupted run has left in the folder"""


def chosen(
    repo: Repo, folder: str = "", recipe: str | None = None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """The files that are wanted, sorted: those in `folder`, or `folder` itself if it is a file; a quantization by its
    name (`recipe`); what matches globs over whole paths (`include`); else all that building needs of a checkpoint, or
    the only GGUF. Raises SourceError where nothing is left, ChoiceError where there is a choice."""
    here = [p for p in sorted(repo.files) if not folder or p == folder or p.startswith(f"{folder}/")]
    if not here:
        raise SourceError(f"{repo.where(folder)}: there is no such file or folder{did_you_mean(folder, repo.files)}")
    models = published({p: repo.files[p].size for p in here})
    if recipe is not None:
        files = _of_recipe(repo, models, recipe)
    elif include:
        globs = [f"{glob}*" if glob.endswith("/") else glob for glob in include]
        files = [p for p in here if any(fnmatchcase(p, glob) for glob in globs)]
        if not files:
            raise SourceError(
                f"{repo.where(folder)}: no file matches {' or '.join(map(repr, include))}{_there(models)}"
            )
    else:
        files = _unasked(repo, folder, here, models)
    left = [p for p in files if not any(fnmatchcase(p, glob) for glob in exclude)]
    if not left:
        raise SourceError(f"{repo.where(folder)}: --exclude leaves none of {len(files):,} files; leave it out")
    return left


def _of_recipe(repo: Repo, models: Sequence[Published], recipe: str) -> list[str]:
    for model in models:
        if model.name.lower() == recipe.lower():
            return _whole(repo, model)
    hint = did_you_mean(recipe, [m.name for m in models])
    raise SourceError(f"{repo.where()}: has no GGUF called {recipe!r:.80}{hint}{_there(models)}")


def _whole(repo: Repo, model: Published) -> list[str]:
    if model.missing:
        raise SourceError(
            f"{repo.where()}: {model.name} lacks {model.missing:,} of its {model.missing + len(model.files):,} shards; "
            "choose another, or try again later"
        )
    return list(model.files)


def _unasked(repo: Repo, folder: str, here: Sequence[str], models: Sequence[Published]) -> list[str]:
    start = len(folder) + 1 if folder else 0
    top = [p for p in here if "/" not in p[start:]]
    if folder in repo.files or (folder and not models):
        return list(here)
    if any(p.endswith(".safetensors") for p in top):
        return [p for p in top if p.lower().endswith(_CHECKPOINT)]
    if len(models) == 1:
        return _whole(repo, models[0])
    if not models:
        raise SourceError(f"{repo.where()}: holds neither a checkpoint nor a GGUF; choose files with --include")
    lines = [
        f"  --recipe {m.name}  ({size_text(m.nbytes)}, {len(m.files):,} file{'s' * (len(m.files) != 1)})"
        for m in models
    ]
    raise ChoiceError("\n".join([f"{repo.where(folder)} holds {len(models):,} models; choose one:", *lines]))


def _there(models: Sequence[Published]) -> str:
    return f"; there are {', '.join(m.name for m in models)}" if models else ""


def models_of(found: Sequence[Found]) -> list[Published]:
    """The GGUFs of models among these files."""
    return published({f.path: f.nbytes for f in found})


def look(
    repo: Repo, paths: Sequence[str], folder: Path, force: bool, progress: Callable[[str, int], None]
) -> list[Found]:
    """What is there already, by its hash; `progress` is told the file, and bytes more. Raises OutputError for what is
    in the way."""
    found, changed = [], begun.changed(repo, paths, folder)
    for path in paths:
        _check_links(folder, path)
        to = folder / path
        size, there = repo.files[path].size, False
        if to.exists():
            there = to.is_file() and to.stat().st_size == size and _has_hash(repo, path, to, progress)
            if not there and (not force or not to.is_file()):
                raise OutputError(f"{to}: exists and is not the repository's; move it away, or replace it with --force")
        cached = None if there else repo.cached_content(path)
        found.append(
            Found(path, size, there, cached, 0 if there or cached or path in changed else _part_bytes(to, size))
        )
    return found


def check_room(found: Sequence[Found], folder: Path) -> None:
    """Raises OutputError where there is too little."""
    need = sum(f.nbytes - f.part for f in found if not f.there)
    near = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(near).free
    if need > free:
        raise OutputError(
            f"{folder}: {need:,} bytes more are needed, but {free:,} are free; free {need - free:,} more, or choose "
            "another place with --to"
        )


def fetch(repo: Repo, found: Sequence[Found], folder: Path, progress: Callable[[str, int], None]) -> None:
    """Get what is not there. `progress` is told the file, and bytes more than its `part`. Raises SourceError,
    OutputError."""
    if missing := [f.path for f in found if not f.there]:
        begun.write(repo, missing, folder)
    for one in found:
        if one.there:
            continue
        _check_links(folder, one.path)
        to, had = folder / one.path, one.part

        def told(done: int, path: str = one.path) -> None:
            nonlocal had
            progress(path, done - had)
            had = done

        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            if not one.part:  # what an older commit has left
                to.with_name(f"{to.name}.part").unlink(missing_ok=True)
            if one.cached is None or not _copied(repo, one, one.cached, to, told):
                repo.fetch(one.path, to, told)
        except OSError as e:
            raise OutputError(
                f"{to}: cannot be written: {e.strerror or e}; mend that, and run the same command again: what came "
                f"is kept"
            ) from None
        told(one.nbytes)
    begun.end(repo, [f.path for f in found], folder)


def _copied(repo: Repo, one: Found, cached: Path, to: Path, told: Callable[[int], None]) -> bool:
    """Whether a file came from the cache, with the repository's hash; if not, nothing is left of it."""
    part, done = to.with_name(f"{to.name}.part"), 0

    def more(n: int) -> None:
        nonlocal done
        done += n
        told(done)

    try:
        with open(cached, "rb") as src, open(part, "wb") as dst:
            copy_range(Opened(src.fileno(), cached), 0, Opened(dst.fileno(), part), 0, one.nbytes, more)
        if _has_hash(repo, one.path, part, lambda path, n: None):
            os.replace(part, to)
            return True
    except SourceError:  # it went, or was cut
        pass
    part.unlink()
    return False


def _check_links(folder: Path, path: str) -> None:
    """No link in the folder leads a file elsewhere."""
    place = folder
    for part in (*path.split("/")[:-1], path.rsplit("/", maxsplit=1)[-1]):
        place = place / part
        for each in (place, place.with_name(f"{place.name}.part")):
            if each.is_symlink():
                raise OutputError(f"{each}: is a symbolic link, which is neither followed nor replaced; remove it")


def _part_bytes(to: Path, most: int) -> int:
    try:
        return min(most, os.stat(to.with_name(f"{to.name}.part")).st_size)
    except OSError:
        return 0


def _has_hash(repo: Repo, path: str, to: Path, progress: Callable[[str, int], None]) -> bool:
    file = repo.files[path]
    digest = file.digest()
    with open(to, "rb") as f:
        while data := f.read(_CHUNK):
            digest.update(data)
            progress(path, len(data))
    return file.expected in (None, digest.hexdigest())

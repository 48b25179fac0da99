"""The files of a model folder without weights, which are copied to the output: tokenizer, code, license.

Only regular files inside the folder are copied. A link could point to anything elsewhere, whose content would then be
shared with the output. One kind of link out of the folder is followed: those of huggingface_hub's cache, where
snapshots/REVISION/NAME points to blobs/HASH beside snapshots/.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..base.errors import SourceError
from ..base.folders import kind

_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class Beside(NamedTuple):
    """A file in a model folder; `name` is its path in the folder, with slashes."""

    name: str
    nbytes: int
    refused: str
    """why it is not copied; '' if it is"""


def files(folder: Path) -> Iterator[Beside]:
    """Yield the files in a folder and below, in order, without hidden ones, which belong to git or the downloader.
    Raises SourceError for what cannot be read."""
    root = os.path.realpath(folder)
    try:
        for above, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            links = [f for f in folders if os.path.islink(os.path.join(above, f))]
            for name in sorted([*names, *links]):
                if not name.startswith("."):
                    path = os.path.join(above, name)
                    yield _look(root, path, os.path.relpath(path, folder))
    except OSError as e:
        raise SourceError(f"{e.filename}: cannot be read: {e.strerror or e}") from None


def _raise(error: OSError) -> None:
    raise error


def _look(root: str, path: str, name: str) -> Beside:
    """Return what `files` yields for a path. Raises OSError."""
    info = os.stat(path, follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        real = os.path.realpath(path)
        if not _is_allowed(root, real):
            return Beside(name, 0, f"is a link to {real}, outside of the model's folder")
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            return Beside(name, 0, f"is a link to the folder {os.path.relpath(real, root)}")
    if not stat.S_ISREG(info.st_mode):
        return Beside(name, 0, f"is {kind(info)}, not a file")
    return Beside(name, info.st_size, "")


def _is_allowed(root: str, real: str) -> bool:
    """Whether a file, by its real path, is in the folder, or is a blob of the snapshot that the folder is or is in."""
    if real.startswith(root.rstrip("/") + "/"):
        return True
    if _BLOB.fullmatch(os.path.basename(real)) is None:
        return False
    above = [Path(root), *Path(root).parents]
    return any(
        snapshots.name == "snapshots" and os.path.dirname(real) == os.path.realpath(snapshots.parent / "blobs")
        for snapshots in above[1:]
    )


def open_to_copy(folder: Path, name: str) -> int:
    """Open a file of the folder for reading, if it may still be copied. Raises SourceError."""
    path = folder / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}; fix that, or move it away") from None
    # check the opened file itself, whatever has its name by now
    real = os.path.realpath(f"/proc/self/fd/{fd}")
    if not stat.S_ISREG(os.fstat(fd).st_mode) or not _is_allowed(os.path.realpath(folder), real):
        os.close(fd)
        raise SourceError(
            f"{path}: has become something else since this run began; put it back, and run the same command again"
        )
    return fd

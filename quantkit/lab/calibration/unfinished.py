"""The folder of what is unfinished, NAME.partial beside the output: held against other runs, of this user, gone when
the output is made. quantkit.building.folder says what is safe in it and what is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...base.errors import (
    ImatrixError,
    InternalCheckError,
    OutputError,
    ResumeError,
    SourceError,
    WeightError,
)
from ...base.folders import Folder
from ...base.outputs import check_replaceable
from ...building import journal
from ...building.folder import LOCK, folder_of, take

#: with files, weights and settings as they are, the same command would end there again
_IN_VAIN = (WeightError, SourceError, InternalCheckError, ImatrixError)


@contextmanager
def unfinished(out: Path, is_kept: Callable[[Path], bool], from_hub: bool = False) -> Iterator[Path]:
    """Hold OUT.partial, a folder to work in, while the body runs. After the body it is gone; where the body raises, it
    stays if `is_kept` says that something in it can be continued, and the exception's `kept` tells that. What is wrong
    with a source is in vain, but for one `from_hub`, which the network may bring next time.

    Raises ResumeError while another process has it; OutputError where it cannot be made, belongs to another user, or is
    an unfinished build."""
    with _raising(out):
        taken = take(out, ())
    folder = taken.folder
    try:
        if folder.look(journal.NAME) is not None:
            raise OutputError(
                f"{folder.path}: is the unfinished build of a GGUF; finish that, move it away, or give another output"
            )
        try:
            yield folder.path
        except BaseException as e:
            in_vain = isinstance(e, _IN_VAIN) and not (from_hub and isinstance(e, SourceError))
            stays = isinstance(e, ResumeError) or (is_kept(folder.path) and not in_vain)
            if not stays:
                _remove(folder_of(out), folder)
            elif not isinstance(e, ResumeError):
                e.kept = (  # type: ignore[attr-defined]
                    f"what is finished is kept in {folder.path}; the same command goes on there"
                )
            raise
        with _raising(out):
            _remove(folder_of(out), folder)
    finally:
        taken.close()


def _remove(path: Path, folder: Folder) -> None:
    """Everything in the folder, and the folder, the lock last."""
    for name in sorted(folder.names(), key=lambda n: n == LOCK):
        folder.remove(name)
    with suppress(OSError):
        os.rmdir(path)


@contextmanager
def _raising(out: Path) -> Iterator[None]:
    """An OSError as an OutputError."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"{folder_of(out)}: {e.strerror or e}; fix that, and run the same command again") from None


def make_folder(path: Path) -> Path:
    """A folder in one of these, which only its owner writes in, whatever the umask. Raises OutputError."""
    try:
        with suppress(FileExistsError):
            path.mkdir(0o755)
    except OSError as e:
        raise OutputError(f"{path}: cannot be made: {e.strerror or e}") from None
    return path


def give(inside: Path, out: Path, replace: bool) -> None:
    """Let a finished file in such a folder have the output's name. Raises OutputError."""
    check_replaceable(out, replace)
    try:
        with Folder.hold(inside.parent) as source, Folder.hold(out.parent) as to:
            source.rename(inside.name, to, out.name, replace)
            to.sync()
    except OSError as e:
        check_replaceable(out, replace)  # something may have come there just now
        raise OutputError(f"{out}: cannot be written: {e.strerror or e}") from None

"""Where a run writes: never over what it reads or writes elsewhere, and over what is there only when asked to.

`check` is the one place where that is decided, for every command; `making` the one way in which files that one run
makes (reports, recipes, locks, manifests, statements, importance matrices) come to be: whole, or not at all.

One rule for names: an output is a new regular file, or replaces one with --force. A symbolic link is refused, wherever
it points: writing through it may hit another folder or disk than was meant, and replacing it loses it. Only a folder to
write into may be given by a link to it.
"""

from __future__ import annotations

import errno
import os
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .errors import OutputError
from .files import NewFile, reserve, write_at
from .folders import Folder

#: bytes of a file's name where the filesystem does not say
_NAME_MAX = 255
#: files of a checkpoint's folder that are other models, not parts of this one
_OTHER_MODELS = (".gguf",)


class Output(NamedTuple):
    """What a run will write."""

    path: Path
    option: str = "the output"
    """how it was given, for messages"""
    replace: bool = False
    """replace a file that is there: --force, or the run's own by design"""
    is_folder: bool = False
    """a folder that the run fills and empties: what it reads, and its other outputs, may not be inside"""
    example: str = "model.gguf"
    """a name to suggest in place of a directory"""
    suffix: str = ""
    """the longest that is added to the name while it is being made"""
    is_later: bool = False
    """what is written is perhaps not this name but others of the same option, checked when they are known"""
    only_compared: bool = False
    """compared with what is read and with the other outputs, no more: what writes there looks itself at what is there,
    and says what to do"""


def check(reads: Iterable[Path], outputs: Sequence[Output]) -> None:
    """Raise OutputError unless all of `outputs` can be written: each is a name that can be, in a folder that is there,
    of no file of `reads` and of no other output, by whatever path; and not taken, or a regular file to replace."""
    read = list(dict.fromkeys(reads))
    of_read = {_identity(path) for path in read}
    taken: dict[object, Output] = {}
    for output in outputs:
        if not output.only_compared:
            check_name(output)
        if output.is_folder:
            _check_folder(output, read)
            continue
        if not output.only_compared:
            _check_place(output)
        if (identity := _identity(output.path)) in of_read:
            raise OutputError(f"{output.path}: is one of the files read and would be overwritten; choose another name")
        other = taken.setdefault(identity, output)
        if other is not output and not (other.is_later and other.option == output.option):
            raise OutputError(
                f"{output.path}: is given to {other.option} and {output.option} both; give each a name of its own"
            )
    for folder in (output for output in outputs if output.is_folder):
        for inner in outputs:
            if inner is not folder and _inside(inner.path, folder.path):
                raise OutputError(
                    f"{inner.path}: {inner.option} is inside {folder.path}, which {folder.option} fills; give another"
                )
    for output in outputs:
        if not (output.is_folder or output.is_later or output.only_compared):
            check_replaceable(output.path, output.replace)


def check_replaceable(path: Path, replace: bool) -> None:
    """Raise OutputError for a name that is taken, unless by a regular file and that is to be replaced."""
    if path.is_symlink():
        named = "" if _leads_in_a_circle(path) else f"give the name it points to, {os.path.realpath(path)}, or "
        raise OutputError(f"{path}: is a symbolic link, which is neither followed nor replaced; {named}remove it")
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; give the name of the file to make")
    if not path.is_file():
        raise OutputError(f"{path}: is not a regular file and will not be replaced; choose another name")
    if not replace:
        raise OutputError(f"{path}: exists; choose another name, or replace it with --force")


def check_folder_link(path: Path) -> None:
    """Raise OutputError for a folder's name that is a link to nothing."""
    if _leads_in_a_circle(path):
        raise OutputError(f"{path}: is a symbolic link that leads back to itself; remove it")
    if os.path.islink(path) and not os.path.exists(path):
        raise OutputError(
            f"{path}: is a symbolic link to {os.path.realpath(path)}, which is not there; make that, or remove the link"
        )


def _leads_in_a_circle(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as e:
        return e.errno == errno.ELOOP
    return False


def check_file_name(text: str, wanted: str, example: str) -> None:
    """Raise OutputError for a text that names a directory, or a stream, where a file is to be made."""
    if text == "-":
        raise OutputError("-: is not a file name; give ./- if that is the name, or leave out the option to print")
    if text.endswith(os.sep) or os.path.basename(text) in (".", ".."):
        raise OutputError(f"{text}: is a directory; give {wanted}, such as {os.path.join(text, example)}")


def files_of_folder(folder: Path) -> list[Path]:
    """The files in a checkpoint's folder that count as read when the checkpoint is: all but other models."""
    try:
        return [p for p in sorted(folder.iterdir()) if p.suffix not in _OTHER_MODELS and not p.is_dir()]
    except OSError:
        return []


def write_text(path: Path, text: str, replace: bool = False) -> None:
    """Write a small UTF-8 file whole or not at all: beside its place under a name of its own, brought to the disk, then
    renamed. Raises OutputError, where a file is there and not to be replaced too."""
    # what is no UTF-8, of a file's name, is written as JSON escapes it
    write_bytes(path, text.encode("utf-8", "backslashreplace"), replace)


def write_bytes(path: Path, data: bytes, replace: bool = False) -> None:
    """The same of a small file that is no text."""
    with making(path, replace) as fd:
        write_at(fd, data, 0)


@contextmanager
def making(path: Path, replace: bool = False, nbytes: int = 0) -> Iterator[int]:
    """A descriptor to write a file by, whole or not at all: the file is beside its place under a name of its own, with
    room for `nbytes` where the filesystem can reserve it, and after the body it is brought to the disk, then renamed.
    Where the body raises, nothing is left. Raises OutputError, for an OSError of the body too."""
    check_replaceable(path, replace)
    # short, whatever the name: that may have 255 bytes itself
    temporary = f".quantkit-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with Folder.hold(path.parent) as folder, NewFile(folder, temporary) as new:
            if nbytes:
                reserve(new.fd, nbytes)
            yield new.fd
            with _at_its_place(path, replace):
                new.publish(folder, path.name, replace)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror or e}") from None


def give_name(source: Folder, name: str, fd: int, to: Folder, path: Path, replace: bool) -> None:
    """Give a finished file, open as `fd`, the output's name `path` in folder `to`, by the rules of
    `check_replaceable`: something may have come there since they were asked. Raises OutputError, OSError."""
    with _at_its_place(path, replace):
        source.give_name(name, fd, to, path.name, replace)


@contextmanager
def _at_its_place(path: Path, replace: bool) -> Iterator[None]:
    check_replaceable(path, replace)
    try:
        yield
    except FileExistsError:  # it came just now
        check_replaceable(path, replace)
        raise


# ---------------------------------------------------------------- one output


def check_name(output: Output) -> None:
    """Raise OutputError for a name that no file can have."""
    path = output.path
    if not path.name or path.name == "..":
        raise OutputError(
            f"{path}: is a directory; give the name of the {'folder' if output.is_folder else 'file'} to make"
        )
    check_length(path, output.suffix)
    try:
        os.lstat(path)
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:  # the path as a whole
            raise OutputError(f"{path}: {e.strerror}; choose another place") from None


def check_length(path: Path, suffix: str = "") -> None:
    """Raise OutputError for a name with more bytes than the filesystem takes, `suffix` added while it is made."""
    most, nbytes = _NAME_MAX, len(os.fsencode(path.name + suffix))
    with suppress(OSError, ValueError):
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    if nbytes > most:
        also = " with what is added while it is made" if suffix else ""
        raise OutputError(
            f"{path.name}: the name has {nbytes:,} bytes{also}, and {most:,} are the most; give a shorter one"
        )


def _check_place(output: Output) -> None:
    path, folder = output.path, output.path.parent
    try:
        os.stat(os.path.join(folder, "."))  # pathlib's questions raise where a folder is closed
    except PermissionError as e:
        raise OutputError(f"{folder}: {e.strerror}; choose another place") from None
    except OSError:
        pass  # what is missing is said below
    try:
        if path.is_dir():
            raise OutputError(
                f"{path}: is a directory; give the name of the file to make, such as {path / output.example}"
            )
        if not folder.is_dir():
            raise OutputError(f"{path}: there is no directory {folder}; create it first")
    except OSError as e:
        raise OutputError(f"{path}: {e.strerror or e}; choose another name") from None
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: no permission to write there")


def _check_folder(output: Output, read: Iterable[Path]) -> None:
    """A link to a folder is that folder; one to nothing is refused, and so is a folder with something in it that is
    read."""
    if not output.only_compared:
        check_folder_link(output.path)
    for path in read:
        if os.path.lexists(path) and _inside(path, output.path):
            raise OutputError(
                f"{output.path}: {output.option} fills it, and {path}, which is read, is in it; move one of the two"
            )


# ---------------------------------------------------------------- two names


def _identity(path: Path) -> object:
    """What two paths that lead to one file have in common, through links, hard links and spellings. What is not there
    yet goes by its name, without regard to case: on some disks that is one file."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return _spelling(path)
    return (info.st_dev, info.st_ino)


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder's, or in it."""
    real = Path(os.path.realpath(path))
    try:
        info = os.stat(folder)
    except (OSError, ValueError):  # not there yet: only what is not there yet can be in it
        inner, outer = _spelling(path), _spelling(folder)
        return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)
    for above in (real, *real.parents):
        with suppress(OSError):
            if os.path.samestat(os.stat(above), info):
                return True
    return False


def _spelling(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()

"""Reads texts from files, folders, JSONL and standard input, in UTF-8."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import TextError
from ..base.files import open_regular
from ..base.first_bytes import ENOUGH, not_the_file

STDIN = "-"
JSONL = (".jsonl", ".ndjson")
#: suffixes of the files that are read in a folder
SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".raw", *JSONL)
#: limit on the bytes of all texts together: llama_tokenize counts bytes and tokens in 32 bits
MOST = 2**31 - 1
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Texts:
    """The texts that were read, in the order given."""

    names: tuple[str, ...]
    """as the user gave them"""
    documents: tuple[str, ...]
    nbytes: int
    """of the documents, in UTF-8"""
    notes: tuple[str, ...]

    @property
    def joined(self) -> str:
        """All documents as one text, without their final line ends, joined by line ends. For one file this equals what
        llama.cpp's tools read with -f; for several, what they read from these files after `cat`."""
        return "\n".join(document.removesuffix("\n") for document in self.documents)


@dataclass(frozen=True)
class Chat:
    """A conversation: the messages of a line of JSONL, and its tools, if any."""

    where: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None


def read_texts(sources: Iterable[str | os.PathLike[str]]) -> Texts:
    """Read the texts of files, of folders (all text files in them and their subfolders, sorted; hidden ones are left
    out), and of standard input ('-'). Each line of a .jsonl file is an object whose `text` is a document. A UTF-8
    byte-order mark is removed. Raises TextError."""
    names = tuple(os.fspath(s) for s in sources)
    documents: list[str] = []
    notes: list[str] = []
    nbytes = 0
    for where, data in _read_all(names):
        text = _decode(where, data, notes)
        found = [text]
        if where.lower().endswith(JSONL):
            found = [_text_of(at, value) for at, value in _lines(where, text)]
        documents += found
        nbytes += len(data) if found == [text] else sum(len(d.encode()) for d in found)
    if not any(documents):
        raise TextError(f"{', '.join(names) or 'the text'}: has 0 bytes of text; give a longer one")
    return Texts(names, tuple(documents), nbytes, tuple(notes))


def read_chats(sources: Iterable[str | os.PathLike[str]]) -> tuple[tuple[str, ...], list[Chat]]:
    """Read conversations from JSONL files, folders and standard input, one object with `messages` per line; returns the
    names and the conversations. Raises TextError."""
    names = tuple(os.fspath(s) for s in sources)
    chats: list[Chat] = []
    for where, data in _read_all(names):
        if where != STDIN and not where.lower().endswith(JSONL):
            raise TextError(f"{where}: is not a .jsonl file; --chat reads lines of JSON, each with `messages`")
        chats += [_chat_of(at, value) for at, value in _lines(where, _decode(where, data, []))]
    if not chats:
        raise TextError(f"{', '.join(names) or 'the text'}: has 0 conversations; give a file with some")
    return names, chats


# ---------------------------------------------------------------- bytes


def _read_all(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read every file that the names stand for."""
    if names.count(STDIN) > 1:
        raise TextError(f"standard input ({STDIN}) is given {names.count(STDIN)} times; it can be read once")
    room = MOST
    for name in names:
        for where in [name] if name == STDIN else files_of(name):
            data = _read(where, room)
            room -= len(data)
            yield where, data


def files_of(name: str) -> list[str]:
    """List the files that a name stands for: itself, or the text files of a folder; none for standard input. Raises
    TextError for a folder without text files."""
    if name == STDIN:
        return []
    path = Path(name)
    if not os.path.isdir(path):
        return [str(path)]
    found: list[str] = []
    n_others = 0
    for folder, folders, inside in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in inside:
            if file.startswith("."):
                continue
            if file.lower().endswith(SUFFIXES):
                found.append(os.path.join(folder, file))
            else:
                n_others += 1
    if not found:
        raise TextError(
            f"{path}: has no text files ({', '.join(SUFFIXES)}); of other names it has {n_others:,}, which can be "
            "given by name"
        )
    return sorted(found, key=lambda f: Path(f).parts)


def _read(where: str, room: int) -> bytes:
    too_much = f"{where}: with it, there are more than {MOST:,} bytes of text, the most that llama.cpp takes; give less"
    if where == STDIN:
        data = sys.stdin.buffer.read(room + 1)
    else:
        try:
            with open(open_regular(Path(where)), "rb") as f:
                if os.fstat(f.fileno()).st_size > room:
                    raise TextError(too_much)
                data = f.read(room + 1)
        except (OSError, ValueError) as e:  # the latter for a NUL in a name
            raise TextError(f"{where}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(data) > room:
        raise TextError(too_much)
    return data


def _decode(where: str, data: bytes, notes: list[str]) -> str:
    shown = "standard input" if where == STDIN else where
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise TextError(
                f"{shown}: is {encoding}, by its first bytes 0x{mark.hex().upper()}; convert it: "
                f"iconv -f {encoding} -t UTF-8"
            )
    if not where.lower().endswith((".html", ".htm")) and (says := not_the_file(data[:ENOUGH])):
        raise TextError(f"{shown}: {says}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise TextError(
            f"{shown}: is not UTF-8: byte 0x{data[e.start]:02X} at {e.start:,} ({e.reason}); convert it, for "
            "example: iconv -f LATIN1 -t UTF-8"
        ) from None
    if "\0" in text:
        raise TextError(
            f"{shown}: is not text: byte 0x00 at {data.index(0):,}, as binary files and UTF-16 have it; give a UTF-8 "
            "text"
        )
    if data.startswith(_BOM):
        notes.append(f"{shown}: its byte-order mark is left out, which llama.cpp would take for text")
        return text[1:]
    return text


# ---------------------------------------------------------------- JSONL


def _lines(where: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the object of each line, with its place."""
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        at = f"{'standard input' if where == STDIN else where}:{n}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise TextError(f"{at}: is not JSON: {str(e)[:100]}; each line of a .jsonl file is one object") from None
        if not isinstance(value, dict):
            raise TextError(f"{at}: is a JSON {type(value).__name__}, not an object; each line of a .jsonl file is one")
        yield at, value


def _text_of(at: str, value: Mapping[str, Any]) -> str:
    text = value.get("text")
    if isinstance(text, str):
        return _whole(at, text)
    if "messages" in value:
        raise TextError(f"{at}: has `messages`, not `text`; with --chat the model's chat template makes a text of them")
    has = ", ".join(f"{key!r:.40}" for key in list(value)[:8]) or "nothing"
    raise TextError(f"{at}: has no `text` that is a string; it has {has}")


def _chat_of(at: str, value: Mapping[str, Any]) -> Chat:
    messages, tools = value.get("messages"), value.get("tools")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise TextError(f"{at}: has no `messages` that is a list of objects, as --chat needs them")
    if tools is not None and not isinstance(tools, list):
        raise TextError(f"{at}: `tools` is no list")
    _whole(at, json.dumps(value, ensure_ascii=False))
    return Chat(at, messages, tools)


def _whole(at: str, text: str) -> str:
    """Check a text and return it. Raises TextError for half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TextError(f"{at}: has half of a surrogate pair, \\u{ord(text[e.start]):04x}; write it as UTF-8") from None
    return text

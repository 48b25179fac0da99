"""Texts from files, folders, JSONL and standard input, and what is refused, by whole sentences."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from quantkit.base.errors import TextError
from quantkit.text.sources import MOST, read_chats, read_texts


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_one_file_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    """One line's end at the end is left out, and no more."""
    for data, text in (("a\nb\n", "a\nb"), ("a\n\n", "a\n"), ("a", "a"), ("a\r\n", "a\r"), (" \n", " ")):
        read = read_texts([put(tmp_path / "f", data)])
        assert (read.joined, read.names, read.nbytes, read.notes) == (text, (str(tmp_path / "f"),), len(data), ())


def test_several_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `cat`, where each file ends with its last line; words are never joined."""
    b, a = put(tmp_path / "b.txt", "bé\n"), put(tmp_path / "a.bin", "a")
    stdin(monkeypatch, b"in\n\n")
    read = read_texts([b, "-", a])
    assert read.joined == "bé\nin\n\na"
    assert read.names == (str(b), "-", str(a))
    assert read.nbytes == 4 + 4 + 1


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.txt", "a.MD", "c/z.txt", "c/a.jsonl", "b/x.rst", "wiki.test.raw"):
        put(tmp_path / name, json.dumps({"text": name}) if name.endswith("jsonl") else name)
    for name in (".hidden.txt", ".git/x.txt", "image.png", "c/.x.md"):
        put(tmp_path / name, b"\xff")
    assert read_texts([tmp_path]).documents == ("a.MD", "b/x.rst", "b.txt", "c/a.jsonl", "c/z.txt",
                                               "wiki.test.raw")  # fmt: skip


def test_jsonl(tmp_path: Path) -> None:
    lines = ['{"text": "a\\nb\\n", "id": 3}', "", '{"text": "\\u00e9\\u2028"}', '{"text": ""}', "  "]
    read = read_texts([put(tmp_path / "x.jsonl", "\n".join(lines))])
    assert read.documents == ("a\nb\n", "é\u2028", "")
    assert read.joined == "a\nb\né\u2028\n"
    assert read.nbytes == 4 + 5


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    f = put(tmp_path / "f", b"\xef\xbb\xbfabc")
    read = read_texts([f])
    assert read.joined == "abc"
    assert read.notes == (f"{f}: its byte-order mark is left out, which llama.cpp would take for text",)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("f.txt", b"", "{}: has 0 bytes of text; give a longer one"),
        ("f.jsonl", b"\n\n", "{}: has 0 bytes of text; give a longer one"),
        (
            "f.txt", "Größe".encode("latin-1"),
            "{}: is not UTF-8: byte 0xF6 at 2 (invalid start byte); convert it, for example: iconv -f LATIN1 "
            "-t UTF-8",
        ),
        (
            "f.txt", b"ab\xe4\xb8",
            "{}: is not UTF-8: byte 0xE4 at 2 (unexpected end of data); convert it, for example: iconv -f LATIN1 "
            "-t UTF-8",
        ),
        (
            "f.txt", "é".encode("utf-16"),
            "{}: is UTF-16, by its first bytes 0xFFFE; convert it: iconv -f UTF-16 -t UTF-8",
        ),
        (
            "f.txt", "ab".encode("utf-16-le"),
            "{}: is not text: byte 0x00 at 1, as binary files and UTF-16 have it; give a UTF-8 text",
        ),
        (
            "f.txt", POINTER,
            "{}: is a Git LFS pointer, not the file; the file itself has 12 bytes: in the repository's folder, run "
            "`git lfs pull`",
        ),
        (
            "f.txt", b"<!DOCTYPE html><p>404",
            "{}: is a web page, not the file: download the file itself, not the page that shows it",
        ),
        (
            "f.jsonl", b'{"text": "a"}\n{"text": 1}', "{}:2: has no `text` that is a string; it has 'text'",
        ),
        (
            "f.jsonl", b'{"messages": []}',
            "{}:1: has `messages`, not `text`; with --chat the model's chat template makes a text of them",
        ),
        (
            "f.jsonl", b'\n{"text": "a"',
            "{}:2: is not JSON: Expecting ',' delimiter: line 1 column 13 (char 12); each line of a .jsonl file is one "
            "object",
        ),
        (
            "f.jsonl", b"[" * 100_000,
            "{}:1: is not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string; "
            "each line of a .jsonl file is one object",
        ),
        ("f.jsonl", b"[1]", "{}:1: is a JSON list, not an object; each line of a .jsonl file is one"),
        ("f.jsonl", b'{"text": "\\ud83d"}', "{}:1: has half of a surrogate pair, \\ud83d; write it as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_text(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    f = put(tmp_path / name, data)
    with pytest.raises(TextError) as e:
        read_texts([f])
    assert str(e.value) == says.format(f)


def test_a_web_page_that_is_called_one(tmp_path: Path) -> None:
    assert read_texts([put(tmp_path / "x.html", "<html>")]).joined == "<html>"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    put(tmp_path / "images" / "a.png", b"")
    stdin(monkeypatch, b"x")
    long = "n" * 300
    for given, says in (
        ([tmp_path / "none"], f"{tmp_path}/none: cannot be read: No such file or directory"),
        ([tmp_path / "pipe"], f"{tmp_path}/pipe: cannot be read: it is a FIFO, not a regular file"),
        (["a\0b"], "a\\x00b: cannot be read: embedded null byte"),
        ([long], f"{long}: cannot be read: File name too long"),
        (["-", "-"], "standard input (-) is given 2 times; it can be read once"),
        (
            [tmp_path / "images"],
            f"{tmp_path}/images: has no text files (.txt, .text, .md, .markdown, .rst, .raw, .jsonl, .ndjson); of "
            "other names it has 1, which can be given by name",
        ),
        ([], "the text: has 0 bytes of text; give a longer one"),
    ):
        with pytest.raises(TextError) as e:
            read_texts(given)
        assert str(e.value) == says


def test_more_than_llama_cpp_can_count(tmp_path: Path) -> None:
    f = put(tmp_path / "f", b"x")
    os.truncate(f, MOST)
    with pytest.raises(TextError) as e:
        read_texts([put(tmp_path / "g", b"x"), f])
    assert str(e.value) == (
        f"{f}: with it, there are more than 2,147,483,647 bytes of text, the most that llama.cpp takes; give less"
    )


# ---------------------------------------------------------------- conversations


def test_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [{"role": "user", "content": "hi"}], [{"role": "user", "content": None}]
    put(tmp_path / "a.jsonl", json.dumps({"messages": one, "tools": [{}]}) + "\n")
    stdin(monkeypatch, json.dumps({"messages": two}).encode())
    names, chats = read_chats([tmp_path / "a.jsonl", "-"])
    assert names == (str(tmp_path / "a.jsonl"), "-")
    assert [(c.where, c.messages, c.tools) for c in chats] == [
        (f"{tmp_path}/a.jsonl:1", one, [{}]), ("standard input:1", two, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("f.txt", "{}", "{}: is not a .jsonl file; --chat reads lines of JSON, each with `messages`"),
        ("f.jsonl", "\n", "{}: has 0 conversations; give a file with some"),
        ("f.jsonl", '{"text": "a"}', "{}:1: has no `messages` that is a list of objects, as --chat needs them"),
        ("f.jsonl", '{"messages": ["a"]}', "{}:1: has no `messages` that is a list of objects, as --chat needs them"),
        ("f.jsonl", '{"messages": [{}], "tools": 1}', "{}:1: `tools` is no list"),
        (
            "f.jsonl", '{"messages": [{"role": "\\udc00"}]}',
            "{}:1: has half of a surrogate pair, \\udc00; write it as UTF-8",
        ),
    ],
)  # fmt: skip
def test_what_is_no_chat(tmp_path: Path, name: str, data: str, says: str) -> None:
    f = put(tmp_path / name, data)
    with pytest.raises(TextError) as e:
        read_chats([f])
    assert str(e.value) == says.format(f)

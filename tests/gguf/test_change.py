"""Changing a number in a header, in place or in a copy: tensor bytes stay, whatever keys there are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import factory
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import OutputError
from quantkit.gguf.change import copy_with, fits_in_place, place_of, set_in_place
from quantkit.gguf.header import I32, KV, STRING, U16, U32, kv, kv_array, read_header

KEY = "tokenizer.ggml.padding_token_id"


def keys(n_before: int, text: str, type_: int | None) -> list[KV]:
    out = [kv("general.architecture", STRING, "deepseek2")]
    out += [kv(f"k{i}", STRING, text * i) for i in range(n_before)] + [kv_array("a", STRING, [text] * 3)]
    if type_ is not None:
        out.append(kv(KEY, type_, 1))
    return [*out, kv("last", STRING, text)]


def file_with(path: Path, kvs: list[KV]) -> Path:
    tensors = {f"t{i}.weight": ((256, 3), "F32", os.urandom(3072)) for i in range(3)}
    return factory.gguf_file(path, tensors, kvs)


def data(path: Path) -> dict[str, str]:
    whole = path.read_bytes()
    return {
        t.name: hashlib.sha256(whole[t.offset : t.offset + t.nbytes]).hexdigest() for t in read_header(path).tensors
    }


@settings(max_examples=30)
@given(st.integers(0, 5), st.text(max_size=20), st.sampled_from([U32, I32]), st.integers(0, 2**31 - 1))
def test_in_place(tmp_path_factory: pytest.TempPathFactory, n: int, text: str, type_: int, value: int) -> None:
    path = file_with(tmp_path_factory.mktemp("f") / "m.gguf", keys(n, text, type_))
    before, at = path.read_bytes(), place_of(read_header(path), KEY)
    assert at is not None
    assert before[at : at + 4] == b"\1\0\0\0"
    assert set_in_place(path, KEY, value) == 1
    after = path.read_bytes()
    assert after == before[:at] + value.to_bytes(4, "little") + before[at + 4 :]
    assert set_in_place(path, KEY, 1) == value
    assert path.read_bytes() == before


@settings(max_examples=30)
@given(st.integers(0, 5), st.text(max_size=20), st.sampled_from([U32, I32, U16, None]))
def test_a_copy(tmp_path_factory: pytest.TempPathFactory, n: int, text: str, type_: int | None) -> None:
    folder = tmp_path_factory.mktemp("f")
    path = file_with(folder / "m.gguf", keys(n, text, type_))
    before = path.read_bytes()
    assert fits_in_place(read_header(path), KEY) == (type_ in (U32, I32))
    copy_with(path, folder / "o.gguf", KEY, 128815)
    assert path.read_bytes() == before
    ours, theirs = read_header(folder / "o.gguf"), read_header(path)
    assert data(folder / "o.gguf") == data(path)
    assert {k.key: k for k in ours.kvs} == {k.key: k for k in theirs.kvs} | {KEY: kv(KEY, U32, 128815)}
    assert [k.key for k in ours.kvs][: len(theirs.kvs)] == [k.key for k in theirs.kvs]
    with pytest.raises(OutputError, match="exists"):
        copy_with(path, folder / "o.gguf", KEY, 1)
    copy_with(path, folder / "o.gguf", KEY, 1, replace=True)


def test_a_file_that_others_see_is_not_changed(tmp_path: Path) -> None:
    path = file_with(tmp_path / "m.gguf", keys(1, "x", U32))
    before = path.read_bytes()
    (tmp_path / "link.gguf").symlink_to(path)
    with pytest.raises(OutputError, match=r"is a symbolic link to .*m\.gguf.*write a mended copy with -o"):
        set_in_place(tmp_path / "link.gguf", KEY, 2)
    (tmp_path / "other.gguf").hardlink_to(path)
    with pytest.raises(OutputError, match=r"has 2 names \(hard links\)"):
        set_in_place(path, KEY, 2)
    (tmp_path / "other.gguf").unlink()
    assert path.read_bytes() == before
    if os.geteuid():
        path.chmod(0o444)
        with pytest.raises(OutputError, match="cannot be changed: Permission denied"):
            set_in_place(path, KEY, 2)

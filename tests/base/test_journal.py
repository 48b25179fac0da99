"""The journal of resumable work: what is read back after any cut or flipped bit; and its documented example."""

from __future__ import annotations

import doctest
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.base import journal
from quantkit.base.errors import OutputError, ResumeError
from quantkit.base.folders import Folder
from quantkit.base.journal import Journal, Ranges, Record, Told, digest, is_file_name, is_there

HEAD = {"model": "ü", "layers": [1, 2]}
#: bytes of a record
SIZE = 40


def parse(said: dict[str, Any]) -> dict[str, Any]:
    return {"model": said["model"], "layers": said["layers"]}


def write(folder: Path, records: list[Record]) -> None:
    with Folder.hold(folder) as held:
        book = Journal.begin(held, "journal", "states", HEAD)
        for record in records:
            book.tell([record])
        book.close()


def read(folder: Path, **more: Any) -> Told[dict[str, Any]] | None:
    with Folder.hold(folder) as held:
        return journal.read(held, "journal", "states", parse, "remove it", **more)


def records(n: int) -> list[Record]:
    return [Record(i, i << 40, 1 + (i << 33), digest(bytes([i]))) for i in range(n)]


def test_the_example() -> None:
    tried = doctest.testmod(journal)
    assert (tried.failed, tried.attempted > 5) == (0, True)


def test_a_journal_comes_back(tmp_path: Path) -> None:
    """With numbers beyond 32 bits, and after it is continued."""
    some = records(4)
    write(tmp_path, some[:2])
    nbytes = (tmp_path / "journal").stat().st_size
    assert read(tmp_path) == Told(HEAD, some[:2], nbytes)
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]
    with (tmp_path / "journal").open("ab") as f:
        f.write(b"torn")
    with Folder.hold(tmp_path) as held:
        told = read(tmp_path)
        assert told == Told(HEAD, some[:2], nbytes)
        book = Journal.go_on(held, "journal", told)
        book.tell(some[2:])
        book.close()
    assert read(tmp_path) == Told(HEAD, some, nbytes + 2 * SIZE)


def test_one_that_begins_with_records_replaces_another(tmp_path: Path) -> None:
    write(tmp_path, records(3))
    with Folder.hold(tmp_path) as held:
        Journal.begin(held, "journal", "states", {**HEAD, "model": "b"}, records(2)).close()
    told = read(tmp_path)
    assert told is not None
    assert (told.head["model"], told.records) == ("b", records(2))


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert read(tmp_path) is None


def test_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    path, some = tmp_path / "journal", records(3)
    write(tmp_path, some)
    whole = path.read_bytes()
    n_head = len(whole) - 3 * SIZE
    for end in range(n_head, len(whole)):
        path.write_bytes(whole[:end])
        n = (end - n_head) // SIZE
        assert read(tmp_path) == Told(HEAD, some[:n], n_head + n * SIZE)
    for end in range(n_head - 1):  # the first line was not completely written: there is nothing to lose
        path.write_bytes(whole[:end])
        assert read(tmp_path) is None


def test_a_flipped_bit_is_never_taken_for_a_record(tmp_path: Path) -> None:
    """Every bit of a journal: one in a record ends it before that record, one in the first line is refused."""
    path, some = tmp_path / "journal", records(4)
    write(tmp_path, some)
    whole = path.read_bytes()
    n_head = len(whole) - 4 * SIZE
    assert read(tmp_path) == Told(HEAD, some, len(whole))
    assert whole.index(b"\n") == n_head - 1
    for bit in range(8 * len(whole)):
        at = bit // 8
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit % 8]) + whole[at + 1 :])
        if at >= n_head:
            sound = (at - n_head) // SIZE
            assert read(tmp_path) == Told(HEAD, some[:sound], n_head + sound * SIZE), bit
        elif at == n_head - 1 and b"\n" not in path.read_bytes():  # then the first line looks incomplete
            assert read(tmp_path) is None, bit
        else:
            with pytest.raises(ResumeError, match="is damaged and cannot be continued; remove it"):
                read(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"quantkit-journal": 99}', "is of journal version 99, this quantkit reads 3; remove it"),
        (b'{"quantkit-journal": 3}', "is damaged and cannot be continued; remove it"),
        (b'{"quantkit-journal": 3, "of": "other", "model": "", "layers": []}', "is damaged and cannot be continued; "
         "remove it"),
        (b'{"quantkit-journal": 3, "of": "states", "model": ""}', "is damaged and cannot be continued; remove it"),
        (b"[]", "is damaged and cannot be continued; remove it"),
        (b"[" * 100_000, "is damaged and cannot be continued; remove it"),
    ],
)  # fmt: skip
def test_first_lines_of_something_else(tmp_path: Path, text: bytes, said: str) -> None:
    """Each with its right checksum."""
    (tmp_path / "journal").write_bytes(b"%s %08x\n" % (text, zlib.crc32(text)))
    with pytest.raises(ResumeError) as e:
        read(tmp_path)
    assert str(e.value) == f"{tmp_path / 'journal'}: {said}"


def test_a_journal_with_another_name_is_not_written_to(tmp_path: Path) -> None:
    write(tmp_path, [])
    os.link(tmp_path / "journal", tmp_path / "other")
    told = read(tmp_path)
    assert told is not None
    with Folder.hold(tmp_path) as held, pytest.raises(OutputError, match="journal: is a hard link, one of 2 names"):
        Journal.go_on(held, "journal", told)
    with pytest.raises(OutputError, match="journal: is a hard link, one of 2 names"):
        read(tmp_path, alone=True)
    with pytest.raises(OutputError, match=r"journal: belongs to .*, not to you"):
        read(tmp_path, owner=os.geteuid() + 1)


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        assert is_there(fd, 3, 4, digest(b"3456"))
        assert not is_there(fd, 3, 4, digest(b"3457"))
        assert not is_there(fd, 8, 4, digest(b"89"[:1]))
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0", "n" * 256])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_file_name(name)
    assert is_file_name(f"m{name}.gguf".replace("/", "").replace("\0", "")[:255])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12))), st.integers(0, 50), st.integers(1, 20))
def test_ranges_are_a_set(added: list[tuple[int, int]], start: int, n: int) -> None:
    ranges, truth = Ranges(), set[int]()
    for r, k in added:
        ranges.add(r, k)
        truth |= set(range(r, r + k))
        assert len(ranges) == len(truth)
    assert ranges.covers(start, n) == (set(range(start, start + n)) <= truth)
    assert all(a < b for a, b in zip(ranges.ends, ranges.starts[1:], strict=False))

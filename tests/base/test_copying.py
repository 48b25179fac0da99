"""Copying byte ranges between files: the result, the method used, and the messages of failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.base import copying
from quantkit.base.copying import Opened, copy_range, pieces, write_at
from quantkit.base.errors import OutputError, SourceError

DATA = os.urandom(300_000)


@pytest.fixture
def src(tmp_path: Path) -> Iterator[Opened]:
    (tmp_path / "src").write_bytes(DATA)
    with open(tmp_path / "src", "rb") as f:
        yield Opened(f.fileno(), tmp_path / "src")


@pytest.fixture
def dst(tmp_path: Path) -> Iterator[Opened]:
    with open(tmp_path / "dst", "wb") as f:
        yield Opened(f.fileno(), tmp_path / "dst")


@pytest.mark.parametrize("ways", [("copy_file_range", "sendfile"), ("sendfile",), ()])
@pytest.mark.parametrize(
    ("src_offset", "dst_offset", "nbytes"),
    [(0, 0, 300_000), (7, 0, 100_000), (4096, 8192, 4096), (5000, 904, 250_000), (299_999, 12345, 1), (5, 5, 0)],
)
def test_the_bytes_arrive_and_nothing_else(
    src: Opened,
    dst: Opened,
    monkeypatch: pytest.MonkeyPatch,
    ways: tuple[str, ...],
    src_offset: int,
    dst_offset: int,
    nbytes: int,
) -> None:
    """On a system with these calls, in pieces that do not divide the range evenly."""
    monkeypatch.setattr(copying, "_IN_KERNEL", {w: copying._IN_KERNEL[w] for w in ways})
    monkeypatch.setattr(copying, "CHUNK", 30_001)
    monkeypatch.setattr(copying, "_BUFFER", 30_001)
    write_at(dst, 0, b"\xaa" * 320_000)
    seen: list[int] = []
    how = copy_range(src, src_offset, dst, dst_offset, nbytes, seen.append)
    want = bytearray(b"\xaa" * 320_000)
    want[dst_offset : dst_offset + nbytes] = DATA[src_offset : src_offset + nbytes]
    assert dst.path.read_bytes() == want
    assert sum(seen) == nbytes
    assert how in {"reflink", "copy_file_range", *ways} | (set() if ways else {"read+write"})
    assert how == "reflink" or len(seen) >= nbytes / 30_001


def test_between_filesystems(src: Opened, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("only one filesystem here")
    path = memory / f"quantkit-test-{os.getpid()}"
    try:
        with path.open("wb") as f:
            how = copy_range(src, 1000, Opened(f.fileno(), path), 50, 200_000)
        assert path.read_bytes() == bytes(50) + DATA[1000:201_000]
        assert how in ("copy_file_range", "sendfile", "read+write")  # what the kernel allows
    finally:
        path.unlink()


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 200), st.integers(1, 16))
def test_pieces_are_the_range_and_whole_blocks_are_aligned(src: int, dst: int, nbytes: int, block: int) -> None:
    cut = pieces(src, dst, nbytes, block)
    at = 0
    for start, n, whole in cut:
        assert start == at
        assert n > 0
        assert not whole or not ((src + start) % block or (dst + start) % block or n % block)
        at += n
    assert at == nbytes
    rest = sum(n for _, n, whole in cut if not whole)
    assert rest < 2 * block or (src - dst) % block


@pytest.mark.parametrize("ways", [("copy_file_range", "sendfile"), ()])
def test_a_source_that_ends_early(
    src: Opened, dst: Opened, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]
) -> None:
    monkeypatch.setattr(copying, "_IN_KERNEL", {w: copying._IN_KERNEL[w] for w in ways})
    seen: list[int] = []
    with pytest.raises(SourceError) as e:
        copy_range(src, 100_000, dst, 0, 200_001, seen.append)
    assert str(e.value) == (
        f"{src.path}: ends at 300,000, where 1 more bytes should follow; it is truncated or was changed "
        "meanwhile: get it again"
    )
    assert sum(seen) == 200_000


def test_a_source_that_cannot_be_read(dst: Opened, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(SourceError) as e:
            copy_range(Opened(fd, tmp_path), 0, dst, 0, 10)
    finally:
        os.close(fd)
    assert str(e.value) == f"{tmp_path}: reading 10 bytes at 0 failed: Is a directory; get the file again"


def test_a_target_that_cannot_be_written(src: Opened, tmp_path: Path) -> None:
    with open(src.path, "rb") as f, pytest.raises(OutputError) as e:
        copy_range(src, 0, Opened(f.fileno(), tmp_path / "dst"), 5, 1000)
    assert str(e.value) == f"{tmp_path / 'dst'}: writing 1,000 bytes at 5 failed: Bad file descriptor"


@pytest.mark.parametrize("ways", [("copy_file_range", "sendfile"), ()])
def test_a_full_disk(src: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]) -> None:
    monkeypatch.setattr(copying, "_IN_KERNEL", {w: copying._IN_KERNEL[w] for w in ways})
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OutputError) as e:
            copy_range(src, 0, Opened(fd, tmp_path / "dst"), 4096, 1000)
    finally:
        os.close(fd)
    assert str(e.value) == (
        f"{tmp_path / 'dst'}: writing 1,000 bytes at 4,096 failed: No space left on device; free 1,000 bytes or "
        "more, or choose another place"
    )

"""A small part of tests/tools/faults.py: a few kills, a few crashes, and a test that its checks can fail."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from faults_child import Event
from faults_kill import kills
from faults_others import WORKS, Work, kills_of
from faults_power import Disk, after_crash, kills_at_calls, planted, power_loss
from faults_site import ONE, SMALL, Done, FaultError, Site, check_said

from quantkit.building.folder import folder_of


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("faults") / "site", SMALL, seed=1)
    yield made
    made.close()


def test_kills(site: Site) -> None:
    row = kills(site, 3)
    assert (row.times, row.failures) == (3, [])


@pytest.mark.parametrize("work", WORKS, ids=[work.name for work in WORKS])
def test_kills_of_other_commands(site: Site, work: Work) -> None:
    row = kills_of(work, site, 3)
    assert (row.times, row.failures) == (3, [])


def test_kills_at_calls(site: Site) -> None:
    row = kills_at_calls(site, 6)
    assert (row.times, row.failures) == (6, [])


def test_power_loss(site: Site) -> None:
    row = power_loss(site, 10)
    assert (row.times, row.failures) == (10, [])


def test_the_loss_of_power_finds_planted_defects(site: Site) -> None:
    row = planted(site, 18)
    assert (row.times, row.failures) == (54, [])


def test_what_the_checks_are_for(site: Site) -> None:
    """A complete name with other bytes, a rerun that quantizes rows the journal had, a traceback."""
    out = site.place()
    assert site.fork(out, ONE, "-q").code == 0
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    with pytest.raises(FaultError, match=r"m\.gguf has its name and is not as it should be"):
        site.check_names(out, ONE)
    out.unlink()

    log = str(site.folder / "log")
    # well after the first rows are recorded
    done = next(
        d for at in range(60, 200, 4)
        if (d := site.fork(out, ONE, "-q", root=str(out.parent), log=log, kill_at=at)).code in (0, -9)
        and site.claimed(out)
    )  # fmt: skip
    assert done.code == -9
    with (folder_of(out) / "m.gguf").open("r+b") as f:
        f.seek(-(os.fstat(f.fileno()).st_size // 2), os.SEEK_END)
        f.write(bytes(os.fstat(f.fileno()).st_size // 2))
        f.seek(0)
        f.write(b"no header")
    with pytest.raises(FaultError, match=r"rerun: kept 0 weights, the journal had [\d,]+"):
        site.check_rerun(out, ONE)
    with pytest.raises(FaultError, match="said: Traceback"):
        check_said(Done(1, "", "Traceback (most recent call last):\n"), 1)
    with pytest.raises(FaultError, match="exit 0, not 7"):
        check_said(Done(0, "", ""), 7)


def test_what_was_synced_is_there_after_a_crash() -> None:
    log = [
        Event("create", 0, "/f/a"),
        Event("write", 0, "/f/a", 0, b"first"),
        Event("sync-begin", 0, "/f/a", 1),
        Event("write", 0, "/f/a", 5, b"later"),
        Event("sync-end", 0, "/f/a", 1),
        Event("sync-begin", -1, "/f", 2),
        Event("sync-end", -1, "/f", 2),
        Event("rename", 0, "/f/b", old="/f/a"),
    ]
    seen = set()
    for seed in range(200):
        disk, unsure = after_crash(Disk({"/f"}), log, random.Random(seed))
        assert unsure == 2
        ((name, _),) = disk.names.items()
        raw = bytes(disk.contents[0])
        assert raw[:5] == b"first"
        seen |= {name, raw[5:]}
    assert {"/f/a", "/f/b", b"", b"later", bytes(5)} < seen

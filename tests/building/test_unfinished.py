"""Builds that end early and resume: the journal, what is kept and what is not, and whose build it is."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import pytest
from conftest import Run
from small_builds import OPTIONS
from stopping import SLAB, Builder, EnoughError, N, recipe

from quantkit.base.errors import InternalCheckError, OutputError, ResumeError, SourceError
from quantkit.base.folders import Folder
from quantkit.base.journal import Journal, Record, Told, digest
from quantkit.building import identity, journal
from quantkit.building import run as builds
from quantkit.building.engines import Work
from quantkit.building.engines.native import NativeEngine
from quantkit.building.folder import read_journal
from quantkit.building.journal import Head
from quantkit.gguf.header import KV, STRING, U32, U64, kv, kv_array
from quantkit.model.open import open_model
from quantkit.model.sources.safetensors_dir import open_checkpoint
from quantkit.planning.plan import make_plan

HEAD = Head("2026-11-22", {"recipe": "r"}, [("m.gguf", 1000)], [("a", 100, 2, 0), ("b", 7, 3, 0)])


@pytest.fixture(scope="module")
def undisturbed(tiny_v3: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    b = Builder(tiny_v3, tiny_imatrix, tmp_path_factory.mktemp("whole") / "m.gguf")
    b.run(b.ready())
    assert not b.folder.exists()
    return b.out.read_bytes()


@pytest.fixture
def b(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> Builder:
    (tmp_path / "out").mkdir()
    return Builder(tiny_v3, tiny_imatrix, tmp_path / "out" / "m.gguf")


# ---------------------------------------------------------------- the journal


def test_a_builds_journal_comes_back(tmp_path: Path) -> None:
    records = [Record(0, 3, 5, digest(b"x")), Record(1, 0, 7, digest(b"y"))]
    with Folder.hold(tmp_path) as held:
        book = journal.begin(held, HEAD)
        book.tell(records[:1])
        book.tell(records[1:])
        book.close()
        found = journal.read(held)
        assert found == Told(HEAD, records, (tmp_path / "journal").stat().st_size)
    assert journal.durable(found) == [5, 7]


def test_a_journal_of_another_version(tmp_path: Path) -> None:
    """Version 2, from before dequant and split shared it, and a future one."""
    for version in (2, 99):
        text = b'{"quantkit-journal": %d, "started": "", "identity": {}, "files": [], "tensors": []}' % version
        (tmp_path / "journal").write_bytes(b"%s %08x\n" % (text, zlib.crc32(text)))
        with Folder.hold(tmp_path) as held, pytest.raises(ResumeError) as e:
            journal.read(held)
        assert str(e.value) == (
            f"{tmp_path / 'journal'}: is of journal version {version}, this quantkit reads 3; start again with "
            "--restart"
        )


@pytest.mark.parametrize("of", ["dequant", "split"])
def test_a_journal_of_other_work(tmp_path: Path, of: str) -> None:
    with Folder.hold(tmp_path) as held:
        Journal.begin(held, "journal", of, HEAD._asdict()).close()
        with pytest.raises(ResumeError, match=r"journal: is damaged and cannot be continued; start again with"):
            journal.read(held)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("after", [1, N // 20, N // 2, int(0.97 * N)])
def test_going_on_gives_the_same_bytes(b: Builder, undisturbed: bytes, after: int) -> None:
    b.stopped(after)
    begun = b.quantized
    ready = b.ready()
    assert ready.begun is not None
    kept = b.run(ready)
    assert kept >= begun - SLAB * 2  # all but the slabs in progress when it ended
    assert kept + b.quantized == ready.plan.n_elements
    assert b.out.read_bytes() == undisturbed
    assert [p.name for p in b.out.parent.iterdir()] == ["m.gguf"]


def test_stopped_again_and_again(b: Builder, undisturbed: bytes) -> None:
    total, rng = 0, random.Random(1)
    for _ in range(12):
        b.stopped(rng.randrange(1, N // 8))
        total += b.quantized
    kept = b.run(b.ready(), n_threads=3)
    assert kept == total
    assert b.out.read_bytes() == undisturbed


def test_restart_begins_anew(b: Builder, undisturbed: bytes) -> None:
    b.stopped(N // 2)
    assert b.run(b.ready(resume=False)) == 0
    assert b.out.read_bytes() == undisturbed


def test_resume_asks_for_a_build_to_go_on_with(b: Builder) -> None:
    with pytest.raises(ResumeError, match=r"m\.gguf: there is no unfinished build to continue; leave out --resume"):
        b.ready(resume=True)


def test_shards_get_their_names_as_they_are_whole(b: Builder, tmp_path: Path) -> None:
    whole = Builder(b.source, b.imatrix, tmp_path / "m.gguf")
    whole.run(whole.ready(split_max_size=1 << 18))
    names = sorted(p.name for p in tmp_path.glob("m-*.gguf"))
    assert len(names) > 3
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    final = sorted(p.name for p in b.out.parent.glob("m-*.gguf"))
    assert 0 < len(final) < len(names)
    for name in final:
        assert (b.out.parent / name).read_bytes() == (tmp_path / name).read_bytes()
        assert not (b.folder / name).exists()
    begun = b.quantized
    assert b.run(b.ready(split_max_size=1 << 18)) >= begun - 2 * SLAB
    assert {n: (b.out.parent / n).read_bytes() for n in names} == {n: (tmp_path / n).read_bytes() for n in names}
    assert sorted(p.name for p in b.out.parent.iterdir()) == names


def test_a_finished_shard_that_was_damaged_is_made_again(b: Builder, tmp_path: Path) -> None:
    whole = Builder(b.source, b.imatrix, tmp_path / "m.gguf")
    whole.run(whole.ready(split_max_size=1 << 18))
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    first = min(b.out.parent.glob("m-*.gguf"))
    with first.open("r+b") as f:
        f.seek(-500, os.SEEK_END)
        f.write(b"\xee" * 100)
    b.run(b.ready(split_max_size=1 << 18))
    for path in b.out.parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_restart_replaces_the_shards_that_are_its_own(b: Builder) -> None:
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    assert list(b.out.parent.glob("m-*.gguf"))
    assert b.run(b.ready("IQ2_XS", split_max_size=1 << 18, resume=False)) == 0
    made = {p.name: p.read_bytes() for p in b.out.parent.iterdir()}
    b.run(b.ready("IQ2_XS", split_max_size=1 << 18, force=True))
    assert {p.name: p.read_bytes() for p in b.out.parent.glob("m-*.gguf") if p.name in made} == made
    stray = b.out.parent / max(made)
    (b.folder).mkdir()
    with pytest.raises(OutputError, match=r"exists; choose another name, or replace it with --force"):
        b.ready("IQ2_XS", split_max_size=1 << 18, resume=False)
    assert stray.read_bytes() == made[stray.name]


def test_older_shards_are_replaced_together_at_the_end(b: Builder) -> None:
    b.run(b.ready("IQ2_XS", split_max_size=1 << 20))
    older = {p.name: p.read_bytes() for p in b.out.parent.iterdir()}
    with pytest.raises(EnoughError):
        b.run(b.ready(split_max_size=1 << 20, force=True), int(0.8 * N))
    assert {p.name: p.read_bytes() for p in b.out.parent.iterdir() if p.is_file()} == older
    b.run(b.ready(split_max_size=1 << 20, force=True))
    newer = {p.name: p.read_bytes() for p in b.out.parent.iterdir()}
    assert not set(newer.values()) & set(older.values())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda b: b.ready("IQ2_XS"), "recipe was r (types "),
        (lambda b: b.ready(split_max_size=1 << 18), "layout was k_b+v_b, one file, is k_b+v_b, shards of at most 262"),
        (lambda b: touch(b.source, "config"), None),
        (lambda b: touch(b.source, "lm_head.weight"), "source model-"),
        (lambda b: bend(b.imatrix), "imatrix was imatrix.gguf (sha256 "),
    ],
    ids=["recipe", "layout", "nothing", "source", "imatrix"],
)  # fmt: skip
def test_a_build_of_something_else_is_refused(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, change: Callable[[Builder], object], names: str | None
) -> None:
    source = Path(shutil.copytree(tiny_v3, tmp_path / "Tiny-V3"))
    imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "imatrix.gguf"))
    b = Builder(source, imatrix, tmp_path / "m.gguf")
    b.stopped(N // 4)
    journal_before = (b.folder / "journal").read_bytes()
    if names is None:
        change(b)
        assert b.ready().begun is not None
        return
    with pytest.raises(ResumeError) as e:  # noqa: PT012
        change(b)
        b.ready()
    assert names in str(e.value)
    assert str(e.value).endswith("; start again with --restart, or give another output")
    assert (b.folder / "journal").read_bytes() == journal_before


def touch(source: Path, tensor: str) -> None:
    path = source / "config.json" if tensor == "config" else factory.shard_of(source, tensor)
    os.utime(path, ns=(1, 1))


def bend(imatrix: Path) -> None:
    raw = bytearray(imatrix.read_bytes())
    raw[-1] ^= 1
    imatrix.write_bytes(raw)


def test_other_kernels_are_refused(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    b.stopped(N // 4)
    monkeypatch.setattr("quantkit.kernels.version", lambda: "quantkit 9.9, kernels 0")
    with pytest.raises(ResumeError, match=r"kernels was quantkit [\d.]+, kernels [0-9a-f]{12}, is quantkit 9\.9"):
        b.ready()


# ---------------------------------------------------------------- damage


def test_rows_that_are_not_what_the_journal_says_are_made_again(b: Builder, undisturbed: bytes) -> None:
    b.stopped(int(0.7 * N))
    begun = b.quantized
    with (b.folder / "m.gguf").open("r+b") as f:
        header = len(b.ready().files[0][1].header)
        f.seek(header + 100)
        f.write(b"\x55")
    kept = b.run(b.ready())
    assert begun - 3 * SLAB <= kept < begun
    assert b.out.read_bytes() == undisturbed


@pytest.mark.parametrize("damage", ["header", "length", "gone", "padding", "journal cut", "journal bit", "no journal"])
def test_damage_to_what_was_kept(b: Builder, undisturbed: bytes, damage: str) -> None:
    b.stopped(int(0.7 * N))
    made, log = b.folder / "m.gguf", b.folder / "journal"
    if damage == "header":
        with made.open("r+b") as f:
            f.write(b"half")
    elif damage == "length":
        os.truncate(made, made.stat().st_size // 2)
    elif damage == "gone":
        made.unlink()
    elif damage == "padding":
        raw = bytearray(made.read_bytes())
        layout = b.ready().files[0][1]
        for p, after in zip(layout.tensors, [*layout.tensors[1:], None], strict=True):
            end = after.offset if after else layout.nbytes
            raw[p.offset + p.planned.nbytes : end] = b"\xff" * (end - p.offset - p.planned.nbytes)
        made.write_bytes(raw)
    elif damage == "journal cut":
        os.truncate(log, log.stat().st_size - 7)
    elif damage == "journal bit":
        raw = bytearray(log.read_bytes())
        raw[-40] ^= 4
        log.write_bytes(raw)
    else:
        log.unlink()
    b.run(b.ready())
    assert b.out.read_bytes() == undisturbed
    assert [p.name for p in b.out.parent.iterdir()] == ["m.gguf"]


def test_a_journal_of_another_run(b: Builder, tmp_path: Path) -> None:
    other = Builder(b.source, b.imatrix, tmp_path / "other.gguf")
    with pytest.raises(EnoughError):
        other.run(other.ready("IQ2_XS"), N // 4)
    b.stopped(N // 4)
    shutil.copy(other.folder / "journal", b.folder / "journal")
    with pytest.raises(ResumeError, match="is an unfinished build of something else: recipe was r"):
        b.ready()


def test_the_metadata_that_changed_is_named(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, quantkit: Run) -> None:
    """general.name is the folder's name: renaming the folder changes the file."""
    source = Path(shutil.copytree(tiny_v3, tmp_path / "Tiny-V3"))
    b = Builder(source, tiny_imatrix, tmp_path / "m.gguf")
    b.stopped(N // 4)
    said = [line for line in quantkit("status", b.out).stdout.splitlines() if line.startswith("  metadata")]
    assert len(said) == 1  # not every key is listed
    b.source = source.rename(tmp_path / "Tiny-V4")
    with pytest.raises(ResumeError) as e:
        b.ready()
    assert str(e.value) == (
        f"{b.folder}: is an unfinished build of something else: metadata general.name was 'Tiny V3', is 'Tiny V4'; "
        "metadata general.version was 'V3', is 'V4'; start again with --restart, or give another output"
    )


def test_differences_of_metadata(tiny_v3: Path) -> None:
    plan = make_plan(open_model(str(tiny_v3), OPTIONS), recipe())

    def of(*kvs: KV) -> dict[str, str]:
        return identity.identity_of(plan, kvs, None, None)

    name, long = kv("general.name", STRING, "a"), kv("general.license", STRING, "x" * 500)
    tokens = kv_array("tokenizer.ggml.tokens", STRING, ["a", "b"])
    was = of(name, long, tokens)
    assert identity.difference(was, of(name, long, tokens)) == ""
    assert identity.difference(was, of(name, tokens)) == (
        f"metadata general.license was '{'x' * 59}… ({identity.short(long.payload)}), is absent"
    )
    others = kv_array("tokenizer.ggml.tokens", STRING, ["a", "c"])
    assert identity.difference(was, of(name, long, others)) == (
        f"metadata tokenizer.ggml.tokens was 2 values ({identity.short(tokens.payload)}), "
        f"is 2 values ({identity.short(others.payload)})"
    )
    # another order, another type of the same value, and a journal without keys: only `metadata` as a whole differs
    as_u64 = of(kv("a", U32, 0)), of(kv("a", U64, 0))
    without = {k: v for k, v in was.items() if not k.startswith("metadata ")}
    for one, two in ((was, of(long, name, tokens)), as_u64, (without, of(name))):
        assert identity.difference(one, two) == f"metadata was {one['metadata']}, is {two['metadata']}"


def test_a_source_that_changes_during_the_build(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_v3, tmp_path / "Tiny-V3"))
    b = Builder(source, tiny_imatrix, tmp_path / "m.gguf")
    ready = b.ready()
    t = open_checkpoint(source).tensors["lm_head.weight"]
    with t.file.open("r+b") as f:
        f.seek(t.offset)
        f.write(b"\x01\x02")
    with pytest.raises(SourceError, match=r"changed during the build: it was written to; put it back as it was"):
        b.run(ready)
    assert not b.out.exists()


def test_nothing_made_of_a_changed_source_is_kept(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    """A source restored with its time has the same identity: only the journal can know better."""
    b = Builder(Path(shutil.copytree(tiny_v3, tmp_path / "Tiny-V3")), tiny_imatrix, tmp_path / "m.gguf")
    ready = b.ready()
    t = open_checkpoint(b.source).tensors["lm_head.weight"]
    before, raw = os.stat(t.file), t.file.read_bytes()
    t.file.write_bytes(raw[: t.offset] + b"\x01\x02" + raw[t.offset + 2 :])
    with pytest.raises(SourceError, match="changed during the build"):
        b.run(ready)
    t.file.write_bytes(raw)
    os.utime(t.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    b.run(b.ready())
    assert b.out.read_bytes() == undisturbed


def test_an_imatrix_that_changes_during_the_build(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "imatrix.gguf"))
    b = Builder(tiny_v3, imatrix, tmp_path / "m.gguf")
    ready = b.ready()
    bend(imatrix)
    with pytest.raises(SourceError, match=r"imatrix\.gguf: changed during the build: it was written to"):
        b.run(ready)
    assert not b.out.exists()


@pytest.mark.parametrize("how", ["link", "folder"])
def test_a_folder_of_another_is_left_alone(b: Builder, tmp_path: Path, how: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("ten years")
    if how == "link":
        b.folder.symlink_to(precious)
    else:
        precious.rename(b.folder)
    what = "is a symbolic link" if how == "link" else r"holds 'thesis\.txt'"
    for resume in (None, False):
        with pytest.raises(
            OutputError, match=rf"m\.gguf\.partial: {what} and is no unfinished build of quantkit; move"
        ):
            b.run(b.ready(resume=resume))
    assert [p.name for p in b.folder.iterdir()] == ["thesis.txt"]


def test_an_unfinished_build_whose_folder_cannot_be_written(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    b.stopped(N // 4)
    (b.folder / "scratch").mkdir(exist_ok=True)

    def refused(*_args: Any, **_more: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refused)
    with pytest.raises(OutputError, match=r"m\.gguf: Permission denied; mend that and build again"):
        b.run(b.ready())


def test_ended_between_the_names_of_shards_that_replace_others(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    b.run(b.ready(split_max_size=1 << 18))
    names = {p.name: p.read_bytes() for p in b.out.parent.iterdir()}
    replace_, given = os.replace, 0

    def once(src: str, dst: str, **folders: int) -> None:
        nonlocal given
        given += 1
        if given == 2:
            raise EnoughError
        replace_(src, dst, **folders)

    ready = b.ready(split_max_size=1 << 18, force=True)
    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(EnoughError):
        b.run(ready)
    monkeypatch.undo()
    ready = b.ready(split_max_size=1 << 18, force=True)
    assert b.run(ready) == ready.plan.n_elements
    assert {p.name: p.read_bytes() for p in b.out.parent.iterdir()} == names


def test_shards_with_names_need_no_room_again(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    assert list(b.out.parent.glob("m-*.gguf"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0))
    assert b.ready(split_max_size=1 << 18).begun is not None  # files without their names have reserved their space


def test_rows_that_no_engine_wrote(b: Builder) -> None:
    class Lazy(NativeEngine):
        def run(self, work: Work) -> None:
            pass

    with pytest.raises(InternalCheckError, match=r"m\.gguf: rows of \d+ tensors were not written, 'output\.weight'"):
        builds.run(b.ready(), Lazy(), 1, lambda _name, _n: None)
    assert list(b.out.parent.iterdir()) == []


def test_a_sync_that_fails_ends_the_build_and_claims_nothing(b: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_COMMIT_SECONDS", "0.01")

    def fdatasync(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(OutputError, match=r"m\.gguf: Input/output error; mend that and build again"):
        b.run(b.ready())
    assert list(b.out.parent.iterdir()) == []


@pytest.mark.parametrize("said", ["x", "0", "-1", "nan", "1e9"])
def test_commit_seconds_are_seconds(b: Builder, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("QUANTKIT_COMMIT_SECONDS", said)
    with pytest.raises(OutputError, match=f"QUANTKIT_COMMIT_SECONDS is '{said}'; give seconds between 0 and 3600"):
        b.run(b.ready())


# ---------------------------------------------------------------- processes


def command(b: Builder, *options: str) -> list[str]:
    args = ["build", b.source, "-o", b.out, "-r", b.out.parent.parent / "r.yaml", "--imatrix", b.imatrix, *options]
    return [sys.executable, "-m", "quantkit", *map(str, args), "--pre", "deepseek-v3"]


@pytest.fixture
def slow(b: Builder, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A build that takes a few seconds."""
    b.source = factory.checkpoint(tmp_path_factory.mktemp("slow") / "S", {**factory.TINY_V3, "vocab_size": 16384})
    b.imatrix = factory.imatrix_for(open_model(str(b.source), OPTIONS), b.source.parent / "imatrix.gguf")
    (b.out.parent.parent / "r.yaml").write_text(
        'name: r\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*", type: IQ4_XS, why: t}\n'
    )
    return b


def wait_for_rows(b: Builder, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        found = read_journal(b.out)
        if found is not None and found.records:
            return
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_and_gone_on_with(slow: Builder, quantkit: Run) -> None:
    env = {"QUANTKIT_COMMIT_SECONDS": "0.02", "QUANTKIT_KERNELS": "ggml"}
    process = subprocess.Popen(command(slow, "-t", "1"), env=os.environ | env, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, cwd=tempfile.gettempdir())  # fmt: skip
    wait_for_rows(slow, process)

    second = subprocess.run(command(slow, "-q"), capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)
    assert (second.returncode, second.stderr) == (
        13, f"error: {slow.out}: is being built by process {process.pid}; wait for it, or give another output\n"
    )  # fmt: skip
    said = quantkit("status", slow.out)
    assert f"process {process.pid} is working on it" in said.stdout

    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = read_journal(slow.out)
    assert found is not None
    cols = {t.name: t.n_cols for t in open_model(str(slow.source), OPTIONS).tensors}
    told = sum(n * cols[t[0]] for n, t in zip(journal.durable(found), found.head.tensors, strict=True))
    facts = json.loads(quantkit("status", slow.out, "--json").stdout)
    assert (facts["state"], facts["process"]) == ("unfinished", None)
    assert facts["durable_bytes"] == sum(
        n * t[2] for n, t in zip(journal.durable(found), found.head.tensors, strict=True)
    )
    assert "no process is working on it: run the same `quantkit build` again" in quantkit("status", slow.out).stdout

    done = subprocess.run(command(slow), capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing the build of" in done.stdout
    assert f"{told:,} of " in done.stdout
    resumed = slow.out.read_bytes()
    slow.out.unlink()
    subprocess.run(command(slow, "-q"), check=True, cwd=tempfile.gettempdir())
    assert slow.out.read_bytes() == resumed
    assert quantkit("status", slow.out).stdout == (
        f"{slow.out}: complete, {len(resumed):,} bytes; `quantkit verify {slow.out}` checks it\n"
    )


def test_status_of_a_strangers_journal(quantkit: Run, tmp_path: Path) -> None:
    """Whatever another user puts into it, each item is shown on one line, or it is called damaged."""
    (tmp_path / "m.gguf.partial").mkdir()
    sound: dict[str, Any] = {
        "quantkit-journal": 3, "of": "build", "started": "now", "identity": {}, "files": [["m.gguf", 1]],
        "tensors": [["t", 1, 1, 0]],
    }  # fmt: skip

    def status(text: str) -> tuple[int, list[str]]:
        line = text.encode()
        (tmp_path / "m.gguf.partial" / "journal").write_bytes(b"%s %08x\n" % (line, zlib.crc32(line)))
        done = quantkit("status", "m.gguf", cwd=tmp_path)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    begun = [
        "unfinished, in m.gguf.partial; begun now; no process is working on it: run the same `quantkit build` again",
        "safely on the disk: 0 of 1 bytes (0.0 %), 0 of 1 tensors complete",
    ]
    assert status(json.dumps(sound)) == (0, begun)
    sound["identity"] = {"model": "a\nerror: b\x1b[2J", "source x\ny": "", "recipe": "r" * 5000}
    code, lines = status(json.dumps(sound))
    assert (code, lines[:3]) == (0, [*begun, r"  model     a\nerror: b\x1b[2J"])
    assert lines[3].startswith("  recipe    rrr")
    assert len(lines[3]) < 2000
    assert lines[4:] == [r"  sources   1 file, x\ny first"]
    damaged = "error: m.gguf.partial/journal: is damaged and cannot be continued; start again with --restart"
    assert status(json.dumps({**sound, "files": [["n" * 256, 1]]})) == (13, [damaged])
    assert status("[" * 100_000) == (13, [damaged])


@pytest.mark.parametrize("out", [".", "/", "..", "a/.."])
def test_status_of_a_folder(quantkit: Run, tmp_path: Path, out: str) -> None:
    done = quantkit("status", out, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, f"error: {out}: is a directory; give the name of the file to make\n")


def test_status_of_nothing(quantkit: Run, tmp_path: Path) -> None:
    done = quantkit("status", tmp_path / "x.gguf")
    assert (done.returncode, done.stderr) == (
        7,
        f"error: {tmp_path / 'x.gguf'}: there is neither such a file nor an unfinished build of it\n",
    )

"""OUT.partial and caches prepared by an attacker: no victim's file is written, nothing hangs, no foreign bytes are
used.

Commands run in forked processes under a limit (evil.Scene), as root and as another user where the tests run as root.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Tools
from evil import OTHER, SECRET, WHO, Harm, Scene, as_two_users, open_folder
from stopping import Builder, EnoughError, N, rename_in

from quantkit.base.errors import OutputError
from quantkit.building import run as builds
from quantkit.building.cache import _TRAILER, MAGIC, Cache
from quantkit.building.engines import Work
from quantkit.building.engines.native import NativeEngine

RULES = (
    "name: r\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n"
    '  - {match: "*_exps.weight", type: IQ2_XXS, why: t}\n  - {match: "*", type: Q4_K, why: t}\n'
)


@pytest.fixture(scope="module")
def sources(tiny_v3: Path, tiny_imatrix: Path) -> Iterator[Path]:
    """A checkpoint, an importance matrix and a recipe that all users can read."""
    folder = open_folder()
    shutil.copytree(tiny_v3, folder / "Tiny-V3")
    shutil.copy(tiny_imatrix, folder / "imatrix.gguf")
    (folder / "r.yaml").write_text(RULES)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def b(scene: Scene, sources: Path) -> Builder:
    (scene.folder / "out").mkdir()
    return Builder(sources / "Tiny-V3", sources / "imatrix.gguf", scene.folder / "out" / "m.gguf")


@pytest.fixture(scope="module")
def right(sources: Path) -> bytes:
    """The file of an undisturbed build."""
    out = sources / "right.gguf"
    b = Builder(sources / "Tiny-V3", sources / "imatrix.gguf", out)
    b.run(b.ready())
    data = out.read_bytes()
    out.unlink()
    return data


def build(b: Builder, *more: str | Path) -> list[str | Path]:
    common: list[str | Path] = ["build", b.source, "-o", b.out, "-r", b.source.parent / "r.yaml", "-q"]
    return [*common, "--imatrix", b.imatrix, "--pre", "deepseek-v3", "-t", "1", *more]


def named(b: Builder, name: str) -> Path:
    return b.folder / name


# ---------------------------------------------------------------- OUT.partial

LOCKS = [
    (Scene.link, "is a symbolic link, not a file that quantkit made"),
    (Scene.dangling, "is a symbolic link, not a file that quantkit made"),
    (Scene.fifo, "is a FIFO, not a file that quantkit made"),
    (Scene.hard_link, "is a hard link, one of 2 names of a file, which writing would change"),
    pytest.param(Scene.of_another, f"belongs to {WHO}, not to you", marks=as_two_users),
]


@pytest.mark.parametrize(("harm", "words"), LOCKS)
def test_a_lock_that_is_not_ours(scene: Scene, b: Builder, harm: Harm, words: str) -> None:
    b.folder.mkdir()
    harm(scene, named(b, "lock"))
    sentence = f"{named(b, 'lock')}: {words}; move it away and try again"
    for more in ((), ("--restart",)):
        scene.refused(7, sentence, *build(b, *more))
    assert not b.out.exists()
    assert not (scene.folder / "new file").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Scene.link, "is a symbolic link, not a file that quantkit made"),
        (Scene.fifo, "is a FIFO, not a file that quantkit made"),
        pytest.param(Scene.of_another, f"belongs to {WHO}, not to you", marks=as_two_users),
    ],
)
def test_a_journal_that_is_not_ours(scene: Scene, b: Builder, right: bytes, harm: Harm, words: str) -> None:
    b.folder.mkdir()
    harm(scene, named(b, "journal"))
    scene.refused(13, f"{named(b, 'journal')}: {words}; start again with --restart", *build(b))
    assert scene.run(*build(b, "--restart")).code == 0
    assert b.out.read_bytes() == right


def test_a_journal_with_another_name(scene: Scene, b: Builder) -> None:
    """A hard link to it: resuming would append to the other file."""
    b.stopped(N // 4)
    os.link(named(b, "journal"), scene.folder / "other")
    before = (scene.folder / "other").read_bytes()
    sentence = "is a hard link, one of 2 names of a file, which writing would change; move it away and try again"
    done = scene.run(*build(b))
    assert done.code == 7
    assert done.err.startswith(f"error: {named(b, 'journal')}: {sentence}\n")
    assert (scene.folder / "other").read_bytes() == before


@pytest.mark.parametrize(
    "harm",
    [Scene.link, Scene.dangling, Scene.fifo, Scene.hard_link, pytest.param(Scene.of_another, marks=as_two_users)],
)
@pytest.mark.parametrize("is_sound", [False, True])
def test_a_data_file_that_is_not_ours(scene: Scene, b: Builder, right: bytes, harm: Harm, is_sound: bool) -> None:
    """Even if it looks exactly like ours: its rows are made again, in a file of our own."""
    b.stopped(N // 2)
    data = named(b, "m.gguf")
    if is_sound:
        scene.file.write_bytes(data.read_bytes())
        scene._was = scene._precious()
    data.unlink()
    harm(scene, data)
    if is_sound and harm is Scene.of_another:
        data.write_bytes(scene.file.read_bytes())
    done = scene.run(*build(b))
    assert (done.code, done.err) == (0, "")
    assert b.out.read_bytes() == right
    assert b.out.stat().st_uid == os.geteuid()
    assert list(b.out.parent.iterdir()) == [b.out]


@pytest.mark.parametrize("harm", [Scene.link_to_folder, Scene.link, Scene.fifo])
def test_a_scratch_folder_that_is_not_ours(scene: Scene, b: Builder, right: bytes, harm: Harm) -> None:
    b.stopped(N // 2)
    harm(scene, named(b, "scratch"))
    assert scene.run(*build(b)).code == 0
    assert b.out.read_bytes() == right


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (Scene.link_to_folder,
         "is a symbolic link and is no unfinished build of quantkit; move it away, or give another output"),
        (Scene.dangling,
         "is a symbolic link and is no unfinished build of quantkit; move it away, or give another output"),
        (Scene.fifo, "is a FIFO; move it away, or give another output"),
    ],
)  # fmt: skip
def test_something_else_in_place_of_the_folder(scene: Scene, b: Builder, harm: Harm, sentence: str) -> None:
    harm(scene, b.folder)
    for more in ((), ("--restart",)):
        scene.refused(7, f"{b.folder}: {sentence}", *build(b, *more))


@as_two_users
def test_a_folder_of_another_user(scene: Scene, b: Builder, right: bytes) -> None:
    """Whether it is empty or holds exactly what we had left there, and vice versa."""
    sentence = f"{b.folder}: belongs to {WHO}, not to you; have it moved away, or give another output"
    b.folder.mkdir()
    os.chown(b.folder, OTHER, OTHER)
    scene.refused(7, sentence, *build(b))
    b.folder.rmdir()
    b.stopped(N // 2)
    os.chown(b.folder, OTHER, OTHER)
    for more in ((), ("-n",), ("--restart",)):
        scene.refused(7, sentence, *build(b, *more))
    os.chown(b.folder, 0, 0)
    os.chown(b.out.parent, OTHER, OTHER)
    said = f"{b.folder}: belongs to root (user 0), not to you; have it moved away, or give another output"
    scene.refused(7, said, *build(b), user=OTHER)
    os.chown(b.out.parent, 0, 0)
    # looking is permitted
    assert scene.run("status", b.out, user=OTHER).code == 0
    assert scene.run(*build(b)).code == 0
    assert b.out.read_bytes() == right


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_nobody_else_may_write_into_the_folder(b: Builder, umask: int) -> None:
    before = os.umask(umask)
    try:
        b.stopped(N // 4)
        assert stat.S_IMODE(b.folder.stat().st_mode) & 0o022 == 0
        b.folder.chmod(0o777)  # as older versions made it
        with pytest.raises(EnoughError):
            b.run(b.ready(), N // 4)
        assert stat.S_IMODE(b.folder.stat().st_mode) & 0o022 == 0
        b.run(b.ready())
    finally:
        os.umask(before)
    assert stat.S_IMODE(b.out.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("to", ["file", "copy", "link", "gone"])
def test_a_data_file_that_is_swapped_while_the_build_runs(scene: Scene, b: Builder, to: str) -> None:
    data = named(b, "m.gguf")

    class Disturbed(NativeEngine):
        def run(self, work: Work) -> None:
            super().run(work)
            data.rename(scene.folder / "aside")
            if to == "file":
                data.write_bytes(SECRET)
            elif to == "copy":
                shutil.copy2(scene.folder / "aside", data)
            elif to == "link":
                data.symlink_to(scene.file)

    what = {"link": "is a symbolic link that somebody else put there", "gone": "is gone"}
    said = what.get(to, "is a file that somebody else put there")
    with pytest.raises(OutputError) as e:
        builds.run(b.ready(), Disturbed(), 1, lambda _name, _n: None)
    assert str(e.value) == (
        f"{data}: {said} while quantkit was writing it; nothing was taken from it: find out who writes there, and try "
        "again"
    )
    assert not os.path.lexists(b.out)
    scene.require_untouched()


@pytest.mark.parametrize("size", [None, 1 << 18])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["a file", "a link"])
def test_what_comes_to_the_outputs_name_while_the_build_runs(
    scene: Scene, b: Builder, what: str, force: bool, size: int | None
) -> None:
    """It is not lost, except a file with --force; the build is kept, and the same command gives it its name later."""
    ready = b.ready(split_max_size=size, force=force)
    path = ready.files[-1][0]

    class Disturbed(NativeEngine):
        def run(self, work: Work) -> None:
            if what == "a file":
                path.write_bytes(SECRET)
            else:
                scene.link(path)
            super().run(work)

    def go() -> None:
        builds.run(ready, Disturbed(), 1, lambda _name, _n: None)

    if what == "a file" and force:
        go()
        assert path.read_bytes() != SECRET
        return
    with pytest.raises(OutputError) as e:
        go()
    assert str(e.value) == (
        f"{path}: exists; choose another name, or replace it with --force"
        if what == "a file"
        else f"{path}: is a symbolic link, which is neither followed nor replaced; give the name it points to, "
        f"{scene.file}, or remove it"
    )
    assert path.read_bytes() == (SECRET if what == "a file" else scene.file.read_bytes())
    scene.require_untouched()
    path.unlink()
    n_values = b.ready(split_max_size=size).plan.n_elements
    assert b.run(b.ready(split_max_size=size)) == n_values  # nothing was made a second time
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_folder_that_is_swapped_while_the_build_runs(scene: Scene, b: Builder, right: bytes) -> None:
    """The build continues where it began; the folder that now has its name is another's, and stays."""

    class Disturbed(NativeEngine):
        def run(self, work: Work) -> None:
            b.folder.rename(scene.folder / "aside")
            b.folder.mkdir()
            named(b, "m.gguf").write_bytes(SECRET)
            super().run(work)

    builds.run(b.ready(), Disturbed(), 1, lambda _name, _n: None)
    assert b.out.read_bytes() == right
    assert named(b, "m.gguf").read_bytes() == SECRET
    assert list((scene.folder / "aside").iterdir()) == []


@pytest.mark.parametrize("harm", [Scene.link, Scene.fifo, pytest.param(Scene.of_another, marks=as_two_users)])
def test_a_finished_shard_that_is_swapped_between_builds(scene: Scene, b: Builder, harm: Harm) -> None:
    """A victim's file under a shard's name is neither padded nor moved, and no one waits for a pipe."""
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    first = min(b.out.parent.glob("m-*.gguf"))
    first.unlink()
    harm(scene, first)
    done = scene.run(*build(b, "--split-max-size", "262144"))
    if harm is Scene.of_another:
        assert done.code == 7
        assert done.err.startswith(f"error: {first}: belongs to {WHO}, not to you; move it away and try again\n")
        assert first.read_bytes() == SECRET
    elif harm is Scene.fifo:
        assert done.code == 7
        assert done.err.startswith(f"error: {first}: is ")
    else:
        assert (done.code == 0 and not first.is_symlink()) or (done.code == 7 and first.is_symlink())


def test_a_finished_shard_with_another_name(scene: Scene, b: Builder, tmp_path: Path) -> None:
    """A hard link to it, such as a backup by `cp -l`, stays unchanged when the shard turns out to be damaged."""
    whole = Builder(b.source, b.imatrix, tmp_path / "m.gguf")
    whole.run(whole.ready(split_max_size=1 << 18))
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    first = min(b.out.parent.glob("m-*.gguf"))
    with first.open("r+b") as f:
        f.seek(-500, os.SEEK_END)
        f.write(b"\xee" * 100)
    os.link(first, scene.folder / "backup")
    before = (scene.folder / "backup").read_bytes()
    b.run(b.ready(split_max_size=1 << 18))
    assert (scene.folder / "backup").read_bytes() == before
    for path in b.out.parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("harm", [Scene.link, Scene.fifo])
def test_finished_shards_of_an_abandoned_build(scene: Scene, b: Builder, harm: Harm) -> None:
    """Someone else's file under a shard's name stays, and no one waits for it."""
    b.stopped(int(0.8 * N), split_max_size=1 << 18)
    first = min(b.out.parent.glob("m-*.gguf"))
    first.unlink()
    harm(scene, first)
    assert scene.run(*build(b, "--restart")).code == 0
    assert sorted(b.out.parent.iterdir()) == sorted([b.out, first])


@pytest.mark.parametrize("harm", [Scene.link, Scene.fifo])
@pytest.mark.parametrize("name", ["lock", "journal"])
def test_status(scene: Scene, b: Builder, name: str, harm: Harm) -> None:
    b.stopped(N // 4)
    named(b, name).unlink()
    harm(scene, named(b, name))
    if name == "lock":
        done = scene.run("status", b.out)
        assert (done.code, done.err) == (0, "")
        assert "no process is working on it" in done.out
    else:
        what = "a FIFO" if harm is Scene.fifo else "a symbolic link"
        sentence = f"{named(b, name)}: is {what}, not a file that quantkit made; start again with --restart"
        scene.refused(13, sentence, "status", b.out)


@pytest.mark.parametrize("name", ["../m.gguf", "a/b", ".", "", "a\0b"])
def test_a_journal_that_names_files_elsewhere(scene: Scene, b: Builder, name: str) -> None:
    b.stopped(N // 4)
    rename_in(named(b, "journal"), lambda files: files[0].__setitem__(0, name))
    sentence = f"{named(b, 'journal')}: is damaged and cannot be continued; start again with --restart"
    scene.refused(13, sentence, "status", b.out)
    scene.refused(13, sentence, *build(b))


@pytest.mark.tools
@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_llama_quantize_where_others_may_write(scene: Scene, b: Builder, right: bytes, tools: Tools, mode: int) -> None:
    """It gets the scratch folder by its descriptor if someone else could take the name."""
    b.out.parent.chmod(mode)
    more = ("--engine", "llama-quantize", "--llama-quantize", tools.quantize)
    done = scene.run(*build(b, *more))
    assert (done.code, done.err) == (0, "")
    assert b.out.read_bytes() == right
    done = scene.run(*build(b, "--engine", "llama-quantize", "--llama-quantize", "/bin/false", "--force"))
    assert done.code == 10
    assert "/proc/" not in done.err


# ---------------------------------------------------------------- caches


@pytest.fixture
def cache(scene: Scene, b: Builder) -> Path:
    """A cache with all tensors of the build."""
    folder = scene.folder / "cache"
    assert scene.run(*build(b, "--cache", folder)).code == 0
    b.out.unlink()
    return folder


def with_cache(scene: Scene, b: Builder, cache: Path, right: bytes, user: int | None = None) -> list[str]:
    """Assert that a build with a cache makes the right file, whatever the cache is; returns its warnings."""
    done = scene.run(*build(b, "--cache", cache), user=user)
    assert done.code == 0, done.err
    assert b.out.read_bytes() == right
    b.out.unlink()
    return [line.removeprefix("warning: ") for line in done.err.splitlines()]


def entry(cache: Path) -> Path:
    return min((cache / "objects").glob("??/*"))


NO_CACHE = "the build goes on without a cache"


@pytest.mark.parametrize("name", ["objects", "sources", "tmp"])
@pytest.mark.parametrize(
    ("harm", "what"),
    [(Scene.link_to_folder, "a symbolic link"), (Scene.dangling, "a symbolic link"), (Scene.fifo, "a FIFO"),
     (Scene.of_another, "a file")],
)  # fmt: skip
def test_a_cache_whose_folders_are_something_else(
    scene: Scene, b: Builder, cache: Path, right: bytes, name: str, harm: Harm, what: str
) -> None:
    if harm is Scene.of_another and os.geteuid() != 0:
        pytest.skip("only root can make files of another user")
    shutil.rmtree(cache / name)
    harm(scene, cache / name)
    said = f"{cache / name}: is {what}, where a cache has a folder; move it away"
    assert with_cache(scene, b, cache, right) == [f"{said}; {NO_CACHE}"]
    if name != "objects":
        scene.refused(7, said, "cache", "prune", cache, "--max-size", "1")


@pytest.mark.parametrize(
    ("harm", "what"), [(Scene.link, "a symbolic link"), (Scene.dangling, "a symbolic link"), (Scene.fifo, "a FIFO")]
)
def test_the_lock_of_a_cache(scene: Scene, b: Builder, cache: Path, right: bytes, harm: Harm, what: str) -> None:
    entry(cache).unlink()
    (cache / "lock").unlink()
    harm(scene, cache / "lock")
    said = f"{cache / 'lock'}: is {what}, not a file that quantkit made; move it away and try again"
    assert with_cache(scene, b, cache, right) == [f"not all of the cache {cache} could be used: {said}"]
    scene.refused(7, said, "cache", "prune", cache, "--max-size", "1")
    assert not (scene.folder / "new file").exists()


def test_a_lock_that_another_process_holds(scene: Scene, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("quantkit.building.cache_folder._PATIENCE", 0.1)
    with (cache / "lock").open() as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"/lock: has been held by another process for 0 seconds; nothing was"):
            Cache(cache, 1).evict()


@pytest.mark.parametrize("harm", [Scene.link, Scene.dangling, Scene.fifo, Scene.link_to_folder])
def test_an_entry_that_is_something_else(scene: Scene, b: Builder, cache: Path, right: bytes, harm: Harm) -> None:
    path = entry(cache)
    path.unlink()
    harm(scene, path)
    what = "a FIFO" if harm is Scene.fifo else "a symbolic link"
    said = f"{path}: is {what}, not a file that quantkit made; move it away and try again"
    assert with_cache(scene, b, cache, right) == [f"not all of the cache {cache} could be used: {said}"]
    # now a file is in its place
    assert with_cache(scene, b, cache, right) == []


@pytest.mark.parametrize("harm", [Scene.link, Scene.fifo])
def test_digests_that_are_something_else(scene: Scene, b: Builder, cache: Path, right: bytes, harm: Harm) -> None:
    path = next((cache / "sources").iterdir())
    path.unlink()
    harm(scene, path)
    what = "a FIFO" if harm is Scene.fifo else "a symbolic link"
    said = f"{path}: is {what}, not a file that quantkit made; move it away and try again"
    assert with_cache(scene, b, cache, right) == [f"not all of the cache {cache} could be used: {said}"]
    assert with_cache(scene, b, cache, right) == []


def test_entries_behind_a_link_are_not_removed(scene: Scene, cache: Path) -> None:
    """Nor are files that do not have an entry's name, such as git's objects."""
    key = "ab" + "0" * 62
    (scene.kept / key).write_bytes(SECRET)
    shutil.rmtree(cache / "objects" / "ab", ignore_errors=True)
    scene.link_to_folder(cache / "objects" / "ab")
    (cache / "objects" / "cd").mkdir(exist_ok=True)
    of_git = cache / "objects" / "cd" / ("1" * 38)
    of_git.write_bytes(SECRET)
    scene._was = scene._precious()
    done = scene.run("cache", "prune", cache, "--max-size", "1")
    assert done.code == 0
    assert done.out.endswith("; 0 are left\n")
    assert (scene.kept / key).exists()
    assert of_git.exists()


def test_a_folder_with_objects_of_something_else(scene: Scene) -> None:
    git = scene.folder / "repo.git"
    (git / "objects" / "ab").mkdir(parents=True)
    for command in (("show",), ("prune", "--max-size", "1")):
        sentence = f"{git}: is no folder of `quantkit build --cache`"
        scene.refused(7, sentence, "cache", command[0], git, *command[1:])
    assert sorted(p.name for p in git.iterdir()) == ["objects"]


def forged(path: Path, owner: int) -> None:
    """Write other bytes under an entry's key, with a valid digest."""
    raw = bytes(byte ^ 0x11 for byte in path.read_bytes()[: -_TRAILER.size])
    path.unlink()
    path.write_bytes(raw + _TRAILER.pack(hashlib.sha256(raw + path.name.encode()).digest(), len(raw), MAGIC))
    os.chown(path, owner, owner)


@as_two_users
def test_foreign_bytes_in_a_cache_that_is_open_to_all(scene: Scene, b: Builder, cache: Path, right: bytes) -> None:
    cache.chmod(0o777)
    path = entry(cache)
    forged(path, OTHER)
    said = f"{path}: belongs to {WHO}, and all may write to {cache}; it is not used"
    assert with_cache(scene, b, cache, right) == [f"not all of the cache {cache} could be used: {said}"]
    for memo in (cache / "sources").iterdir():
        os.chown(memo, OTHER, OTHER)
    warnings = with_cache(scene, b, cache, right)
    assert len(warnings) == 1
    assert warnings[0].endswith(f"belongs to {WHO}, and all may write to {cache}; it is not used")


@as_two_users
def test_a_cache_that_another_user_put_where_all_may(scene: Scene, b: Builder, cache: Path, right: bytes) -> None:
    forged(entry(cache), OTHER)
    os.chown(cache, OTHER, OTHER)
    scene.folder.chmod(0o1777)
    said = f"{cache}: belongs to {WHO}, in a folder where all may make files; give a cache of your own"
    assert with_cache(scene, b, cache, right) == [f"{said}; {NO_CACHE}"]
    link = scene.folder / "link"
    link.symlink_to(scene.kept)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    said = f"{link}: is a symbolic link of {WHO}, in a folder that all may write to; give the folder itself, or another"
    assert with_cache(scene, b, link, right) == [f"{said}; {NO_CACHE}"]


def of_everyone(folder: Path) -> None:
    """Make an output folder that any user may write to."""
    folder.chmod(0o777)


@as_two_users
@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_a_cache_that_two_users_share(scene: Scene, b: Builder, right: bytes, umask: int) -> None:
    """Its folder belongs to a group; both users take each other's entries, and both may add and remove some."""
    cache = scene.folder / "cache"
    cache.mkdir()
    os.chown(cache, 0, OTHER)
    cache.chmod(0o2770)
    of_everyone(b.out.parent)
    before = os.umask(umask)
    try:
        builds.run(b.ready(), NativeEngine(), 1, lambda _name, _n: None, Cache(cache, 1 << 30))
    finally:
        os.umask(before)
    b.out.unlink()
    n = len(Cache(cache, 1).entries())
    done = scene.run(*[a for a in build(b, "--cache", cache) if a != "-q"], user=OTHER)
    assert done.code == 0
    assert "warning" not in done.err
    tensors = len(b.ready(force=True).plan.tensors)
    assert f"cache: {tensors} of {tensors} tensors" in done.out
    assert b.out.read_bytes() == right
    b.out.unlink()
    gone = entry(cache)
    gone.unlink()
    assert with_cache(scene, b, cache, right, user=OTHER) == []
    assert gone.stat().st_uid == OTHER
    assert with_cache(scene, b, cache, right) == []
    done = scene.run("cache", "prune", cache, "--max-size", "1", user=OTHER)
    assert done.code == 0
    assert done.out.startswith(f"{cache}: {n} tensors removed, ")
    assert done.out.endswith(" bytes; 0 are left\n")


@as_two_users
def test_a_cache_that_may_only_be_read(scene: Scene, b: Builder, cache: Path, right: bytes) -> None:
    of_everyone(b.out.parent)
    assert with_cache(scene, b, cache, right, user=OTHER) == []  # everything was there
    path = entry(cache)
    path.unlink()
    said = f"{cache / 'tmp'}: Permission denied, the folder is root (user 0)'s"
    assert with_cache(scene, b, cache, right, user=OTHER) == [f"not all of the cache {cache} could be used: {said}"]
    assert scene.run("cache", "show", cache, user=OTHER).code == 0
    path = entry(cache)
    path.chmod(0o600)
    said = f"{path}: Permission denied"
    assert with_cache(scene, b, cache, right, user=OTHER) == [f"not all of the cache {cache} could be used: {said}"]
    (cache / "objects").chmod(0o700)
    said = f"{cache}: no cache can be made there: Permission denied"
    assert with_cache(scene, b, cache, right, user=OTHER) == [f"{said}; {NO_CACHE}"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_go_by_the_umask(b: Builder, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        builds.run(b.ready(), NativeEngine(), 1, lambda _name, _n: None, Cache(tmp_path / "cache", 1 << 30))
    finally:
        os.umask(before)
    modes = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    found = list((tmp_path / "cache").rglob("*"))
    assert len(found) > 50
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()} == {modes[True]}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {modes[False]}


def test_a_cache_that_is_a_file(scene: Scene, b: Builder, right: bytes) -> None:
    path = scene.folder / "f"
    path.write_bytes(b"x")
    done = with_cache(scene, b, path, right)
    assert done == [f"{path}: no cache can be made there: File exists; {NO_CACHE}"]
    assert path.read_bytes() == b"x"

"""Places of dequant, split, merge and verify that others have prepared, and model folders with links out of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from evil import OTHER, SECRET, WHO, Harm, Scene, as_two_users
from factory import sized_gguf
from stopping import edit_head

from quantkit import dequant
from quantkit.base.errors import OutputError, SourceError
from quantkit.base.journal import temporary_name
from quantkit.dequant import DequantOptions
from quantkit.dequant.beside import files
from quantkit.dequant.decode import Native
from quantkit.dequant.place import PART
from quantkit.dequant.state import STATE
from quantkit.gguf.shards import Limits
from quantkit.gguf.split import open_set, plan_merge, plan_split
from quantkit.gguf.split_writer import write
from quantkit.model.sources.safetensors_dir import open_checkpoint

SHARD_SIZE = 1_000_000


@pytest.fixture
def source(scene: Scene, tiny_v3: Path) -> Path:
    """A checkpoint with a file in a folder below."""
    folder = Path(shutil.copytree(tiny_v3, scene.folder / "Tiny-V3"))
    (folder / "sub").mkdir()
    (folder / "sub" / "code.py").write_text("pass\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


class EnoughError(Exception):
    """Raised where a run is to end."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expected(source: Path, scene: Scene) -> dict[str, bytes]:
    """What an undisturbed run makes."""
    run(source, scene.folder / "right")
    return contents(scene.folder / "right")


def run(source: Path, dst: Path, stop_after: int | None = None) -> None:
    job = dequant.prepare(open_checkpoint(source), dst, DequantOptions(shard_size=SHARD_SIZE))
    done = 0

    def progress(_name: str, n: int) -> None:
        nonlocal done
        done += n
        if stop_after is not None and done > stop_after:
            raise EnoughError

    dequant.run(job, Native(), 1, progress)


def unfinished(source: Path, dst: Path) -> None:
    """Some shards are finished."""
    with pytest.raises(EnoughError):
        run(source, dst, 3 * SHARD_SIZE)
    assert (dst / STATE).exists()


def command(source: Path, dst: Path, *more: str) -> list[str | Path]:
    return ["dequant", source, dst, "--shard-size", str(SHARD_SIZE), "-q", "-t", "1", *more]


# ---------------------------------------------------------------- dequant's directory


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Scene.link, "is a symbolic link, not a file that quantkit made"),
        (Scene.fifo, "is a FIFO, not a file that quantkit made"),
        (Scene.hard_link, "is a hard link, one of 2 names of a file, which writing would change"),
        pytest.param(Scene.of_another, f"belongs to {WHO}, not to you", marks=as_two_users),
    ],
)
def test_a_state_that_is_not_ours(scene: Scene, source: Path, harm: Harm, words: str) -> None:
    dst = scene.folder / "dst"
    dst.mkdir()
    harm(scene, dst / STATE)
    for more in ((), ("--restart",)):
        scene.refused(7, f"{dst / STATE}: {words}; move it away and try again", *command(source, dst, *more))


@pytest.mark.parametrize("harm", [Scene.link, Scene.dangling, Scene.fifo, Scene.hard_link])
def test_temporary_names_that_are_taken(scene: Scene, source: Path, harm: Harm) -> None:
    """Of every shard, of the state, and of what is carried over."""
    right, dst = expected(source, scene), scene.folder / "dst"
    unfinished(source, dst)
    (dst / "sub").mkdir()
    for name in right:
        path = dst / name
        harm(scene, path.with_name(f".{path.name.lstrip('.')}{PART}"))
    harm(scene, dst / temporary_name(STATE))
    done = scene.run(*command(source, dst))
    assert (done.code, done.err) == (0, "")
    assert contents(dst) == right
    assert not (scene.folder / "new file").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_below_that_is_a_link(scene: Scene, source: Path, restart: bool) -> None:
    """What lies behind it, leftovers of ours by their name too, is not removed, and nothing is written there."""
    dst = scene.folder / "dst"
    unfinished(source, dst)
    (scene.kept / "code.py").write_bytes(SECRET)
    scene._was = scene._precious()
    scene.link_to_folder(dst / "sub")
    sentence = f"{dst / 'sub'}: Not a directory; fix that and run the same command again: finished shards are kept"
    scene.refused(7, sentence, *command(source, dst, *(["--restart"] if restart else [])))


@as_two_users
def test_a_folder_below_of_another_user(scene: Scene, source: Path) -> None:
    dst = scene.folder / "dst"
    unfinished(source, dst)
    (dst / "sub").mkdir()
    os.chown(dst / "sub", OTHER, OTHER)
    sentence = f"{dst / 'sub'}: belongs to {WHO}, not to you; move it away and run the same command again"
    scene.refused(7, sentence, *command(source, dst))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Scene.link, "is a symbolic link, not a file that quantkit made"),
        (Scene.fifo, "is a FIFO, not a file that quantkit made"),
        pytest.param(Scene.of_another, f"belongs to {WHO}, not to you", marks=as_two_users),
    ],
)
def test_a_finished_shard_that_is_not_ours(scene: Scene, source: Path, harm: Harm, words: str) -> None:
    dst = scene.folder / "dst"
    unfinished(source, dst)
    first = min(dst.glob("*.safetensors"))
    first.unlink()
    harm(scene, first)
    scene.refused(7, f"{first}: {words}; move it away and try again", *command(source, dst))


@pytest.mark.parametrize("to", ["file", "link", "gone"])
def test_a_shard_that_is_swapped_while_it_is_written(scene: Scene, source: Path, to: str) -> None:
    dst = scene.folder / "dst"
    job = dequant.prepare(open_checkpoint(source), dst, DequantOptions(shard_size=SHARD_SIZE))
    swapped: list[Path] = []

    def progress(_name: str, _n: int) -> None:
        for path in dst.glob(f".model-*{PART}"):
            if not swapped:
                swapped.append(path)
                path.rename(scene.folder / "aside")
                if to == "file":
                    path.write_bytes(SECRET)
                elif to == "link":
                    path.symlink_to(scene.file)

    with pytest.raises(OutputError) as e:
        dequant.run(job, Native(), 1, progress)
    said = {"gone": "is gone", "link": "is a symbolic link that somebody else put there"}
    assert str(e.value) == (
        f"{swapped[0]}: {said.get(to, 'is a file that somebody else put there')} while quantkit was writing it; "
        "nothing was taken from it: find out who writes there, and try again"
    )
    assert not (dst / swapped[0].name.removeprefix(".").removesuffix(PART)).exists()
    scene.require_untouched()


@pytest.mark.parametrize(
    "makes", [["sub//x"], ["/etc/x"], ["../x"], ["a/../../x"], ["sub/"], ["./x"], [""], [7], ["a\0"]]
)
def test_a_state_that_names_files_elsewhere(scene: Scene, source: Path, makes: list[object]) -> None:
    dst = scene.folder / "dst"
    unfinished(source, dst)
    edit_head(dst / STATE, lambda head: head.update(makes=makes))
    sentence = f"{dst / STATE}: is damaged and cannot be continued; remove {dst} to start again"
    scene.refused(13, sentence, *command(source, dst, "--restart"))


# ---------------------------------------------------------------- what dequant copies


def beside(source: Path, dst: Path, scene: Scene) -> tuple[set[str], list[str]]:
    """The names in the output that are not its own, and the warnings."""
    done = scene.run(*command(source, dst))
    assert done.code == 0, done.err
    own = {p.name for p in dst.glob("model*")} | {"config.json"}
    return set(contents(dst)) - own, [line.removeprefix("warning: ") for line in done.err.splitlines()]


def test_links_out_of_the_model_are_not_copied(scene: Scene, source: Path) -> None:
    always = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "sub/code.py"}
    scene.link(source / "id_rsa")
    (source / "sub" / "up").symlink_to("../../precious.txt")
    (source / "dangling").symlink_to("/nonexistent/x")
    scene.link_to_folder(source / "folder")
    (source / "inner").symlink_to("sub")
    (source / "inside.py").symlink_to("sub/code.py")
    os.link(source / "sub" / "code.py", source / "hard.py")
    with (source / "huge").open("wb") as f:
        f.truncate(1 << 28)
    file, folder = scene.file, scene.kept
    names, warnings = beside(source, scene.folder / "dst", scene)
    assert names == always | {"inside.py", "hard.py", "huge"}
    where = "outside of the model's folder; it is not copied"
    assert sorted(warnings) == sorted([
        f"{source / 'id_rsa'}: is a link to {file}, {where}",
        f"{source / 'sub/up'}: is a link to {file}, {where}",
        f"{source / 'dangling'}: is a link to /nonexistent/x, {where}",
        f"{source / 'folder'}: is a link to {folder}, {where}",
        f"{source / 'inner'}: is a link to the folder sub; it is not copied",
    ])  # fmt: skip
    assert (scene.folder / "dst" / "inside.py").read_text() == "pass\n"
    assert not (scene.folder / "dst" / "inside.py").is_symlink()


@pytest.mark.parametrize("name", ["pipe", "sub/pipe", "zero"])
def test_what_is_no_file_beside_the_weights(scene: Scene, source: Path, name: str) -> None:
    """The command refuses it, as every command does, before anything is done; to the library it is not to be copied."""
    if name == "zero":
        (source / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(source / name)
    what = "a device" if name == "zero" else "a FIFO"
    sentence = f"{source / name}: is {what}, not a regular file; write it to a file first"
    scene.refused(4, sentence, *command(source, scene.folder / "dst"))
    assert not (scene.folder / "dst").exists()
    refused = {each.name: each.refused for each in files(source) if each.refused}
    assert refused[name] == (
        "is a link to /dev/zero, outside of the model's folder" if name == "zero" else "is a FIFO, not a file"
    )


@pytest.mark.parametrize(("to", "words"), [("loop", "Too many levels of symbolic links"), ("missing", "No such file")])
def test_a_link_to_nothing_in_the_model(scene: Scene, source: Path, to: str, words: str) -> None:
    (source / "loop").symlink_to(to)
    done = scene.run(*command(source, scene.folder / "dst"))
    assert done.code == 4
    assert done.err.startswith(f"error: {source / 'loop'}: cannot be read: {words}")


def test_many_links_are_counted(scene: Scene, source: Path) -> None:
    for i in range(14):
        scene.link(source / f"link{i:02}")
    warnings = beside(source, scene.folder / "dst", scene)[1]
    assert len(warnings) == 11
    assert warnings[-1] == "and 4 more like these are not copied"


@as_two_users
def test_what_cannot_be_read_is_said_before_the_work(scene: Scene, source: Path) -> None:
    (source / "sub" / "code.py").chmod(0o600)
    place = scene.folder / "place"
    place.mkdir()
    os.chown(place, OTHER, OTHER)
    sentence = f"{source / 'sub' / 'code.py'}: cannot be read: Permission denied; fix that, or move it away"
    scene.refused(4, sentence, *command(source, place / "dst"), user=OTHER)
    assert list(place.iterdir()) == []


def snapshot_of(source: Path, cache: Path) -> Path:
    """A model as huggingface_hub keeps it: snapshots/REVISION of links into blobs/."""
    model = cache / "models--deepseek-ai--DeepSeek-R1"
    snapshot = model / "snapshots" / ("c" * 40)
    (model / "blobs").mkdir(parents=True)
    for i, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = model / "blobs" / f"{i:0{64 if path.suffix == '.safetensors' else 40}x}"
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("by", ["path", "link", "cache elsewhere"])
def test_a_snapshot_of_the_hub(scene: Scene, source: Path, by: str) -> None:
    right = expected(source, scene)
    snapshot = snapshot_of(source, scene.folder / "hub")
    if by == "cache elsewhere":
        (scene.folder / "hub").rename(scene.folder / "disk")
        (scene.folder / "hub").symlink_to("disk")
    given = snapshot
    if by == "link":
        given = scene.folder / "R1"
        given.symlink_to(snapshot)
    done = scene.run(*command(given, scene.folder / "dst"))
    assert (done.code, done.err) == (0, "")
    assert contents(scene.folder / "dst") == right


def test_links_of_a_snapshot_to_something_else(scene: Scene, source: Path) -> None:
    snapshot = snapshot_of(source, scene.folder / "hub")
    blobs = snapshot.parent.parent / "blobs"
    (blobs / "notes.txt").write_bytes(SECRET)
    (snapshot / "notes").symlink_to("../../blobs/notes.txt")
    scene.link(snapshot / "secret")
    scene.link(blobs / ("d" * 40))
    (snapshot / "twice").symlink_to("../../blobs/" + "d" * 40)
    names, warnings = beside(snapshot, scene.folder / "dst", scene)
    assert not {"notes", "secret", "twice"} & names
    assert len(warnings) == 3
    assert all(w.endswith(", outside of the model's folder; it is not copied") for w in warnings)


def test_a_file_that_becomes_a_link_while_the_run_is_at_work(scene: Scene, source: Path) -> None:
    dst = scene.folder / "dst"
    job = dequant.prepare(open_checkpoint(source), dst, DequantOptions())

    def progress(_name: str, _n: int) -> None:
        if not (source / "tokenizer.json").is_symlink():
            (source / "tokenizer.json").unlink()
            (source / "tokenizer.json").symlink_to(scene.file)

    with pytest.raises(SourceError) as e:
        dequant.run(job, Native(), 1, progress)
    assert str(e.value) == (
        f"{source / 'tokenizer.json'}: has become something else since this run began; put it back, and run the same "
        "command again"
    )
    assert not (dst / "tokenizer.json").exists()


# ---------------------------------------------------------------- split, merge, verify


@pytest.fixture
def shards(scene: Scene) -> Path:
    """The first of some shards."""
    found = open_set(sized_gguf(scene.folder / "whole.gguf", [100, 200, 300, 400]))
    write(found, plan_split(found, scene.folder / "s", Limits(1)))
    return scene.folder / "s-00001-of-00004.gguf"


@pytest.mark.parametrize("to", ["file", "link", "copy"])
@pytest.mark.parametrize("what", ["split", "merge"])
def test_what_is_swapped_while_it_is_written(scene: Scene, shards: Path, what: str, to: str) -> None:
    out = scene.folder / "out"
    out.mkdir()
    found = open_set(shards)
    files = plan_split(found, out / "n", Limits(2)) if what == "split" else (plan_merge(found, out / "n.gguf"),)
    swapped: list[Path] = []

    def progress(_n: int) -> None:
        for path in out.glob(".quantkit-shards-*/*.part"):
            if not swapped:
                swapped.append(path)
                path.rename(scene.folder / "aside")
                if to == "file":
                    path.write_bytes(SECRET)
                elif to == "copy":
                    shutil.copy(scene.folder / "aside", path)
                else:
                    path.symlink_to(scene.file)

    with pytest.raises(OutputError) as e:
        write(found, files, progress)
    if to == "link":
        said = f"{swapped[0]}: is a symbolic link, not a file that quantkit made; move it away and try again"
    else:
        said = f"{files[0].path}: its unfinished file was replaced by another; find out who writes there"
    assert str(e.value) == said
    assert list(out.iterdir()) == []
    scene.require_untouched()


def test_a_hidden_folder_that_is_swapped(scene: Scene, shards: Path) -> None:
    """The files are made where they were begun; what has its name now stays as it is."""
    out = scene.folder / "out"
    out.mkdir()
    found = open_set(shards)
    files = plan_split(found, out / "n", Limits(2))
    swapped: list[Path] = []

    def progress(_n: int) -> None:
        for path in out.glob(".quantkit-shards-*"):
            if not swapped:
                swapped.append(path)
                path.rename(scene.folder / "aside")
                path.symlink_to(scene.kept)

    write(found, files, progress)
    made = open_set(files[0].path)
    write(made, [plan_merge(made, scene.folder / "again.gguf")])
    assert (scene.folder / "again.gguf").read_bytes() == (scene.folder / "whole.gguf").read_bytes()
    assert swapped[0].is_symlink()
    scene.require_untouched()


@as_two_users
def test_the_hidden_folder_is_closed_to_others(scene: Scene, shards: Path) -> None:
    out = scene.folder / "out"
    out.mkdir()
    out.chmod(0o777)
    found = open_set(shards)
    modes: list[int] = []
    write(found, plan_split(found, out / "n", Limits(2)), lambda _n: modes.extend(
        p.stat().st_mode & 0o777 for p in out.glob(".quantkit-shards-*")))  # fmt: skip
    assert set(modes) == {0o700}


@pytest.mark.parametrize("harm", [Scene.fifo, Scene.link])
@pytest.mark.parametrize("command", ["merge", "split", "verify"])
def test_inputs_that_are_something_else(scene: Scene, shards: Path, command: str, harm: Harm) -> None:
    """Each of the shards: a pipe is not waited for, and a victim's text is not a GGUF."""
    for no in (1, 2):
        path = scene.folder / f"s-0000{no}-of-00004.gguf"
        path.rename(scene.folder / "aside")
        harm(scene, path)
        options: dict[str, list[str | Path]] = {
            "merge": [scene.folder / "m.gguf"],
            "split": [scene.folder / "n", "--max-tensors", "1"],
            "verify": [],
        }
        done = scene.run(command, shards, *options[command])
        assert done.code in (4, 12), (done.code, done.err, done.out)
        assert path.name in done.err + done.out
        path.unlink()
        (scene.folder / "aside").rename(path)


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("verify HERE/x.gguf", 4, "HERE/x.gguf: cannot be read: Permission denied"),
        ("inspect HERE/config.json", 4, "HERE/config.json: cannot be read: Permission denied"),
        ("plan HERE -r Q8_0", 4, "HERE: cannot be read: Permission denied"),
        ("status HERE/x.gguf", 13, "HERE/x.gguf.partial: cannot be read: Permission denied"),
        ("cache show HERE", 7, "HERE: cannot be read: Permission denied"),
        ("cache prune HERE/c --max-size 1", 7, "HERE/c: cannot be read: Permission denied"),
        ("demo --dir HERE", 7, "HERE: cannot be read: Permission denied; choose another place with --dir"),
        ("demo --dir HERE/d", 7, "HERE/d: cannot be made: Permission denied"),
        ("recipe new HERE/r.yaml", 7, "HERE: Permission denied; choose another place"),
        ("recipe lint --only-recipes HERE/r.yaml", 3, "HERE/r.yaml: cannot be read: Permission denied"),
    ],
)
@as_two_users
def test_a_folder_that_is_closed(scene: Scene, command: str, code: int, sentence: str) -> None:
    here = scene.folder / "closed"
    here.mkdir(mode=0o700)
    done = scene.run(*command.replace("HERE", str(here)).split(), user=OTHER)
    assert (done.code, (done.err + done.out).strip()) == (code, f"error: {sentence.replace('HERE', str(here))}")
    assert list(here.iterdir()) == []

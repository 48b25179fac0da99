"""What a run may write: for every option of every command that writes, found by walking the command line, no input and
no other output of the same run is written over, by whatever name, and nothing that is there without --force."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
from command_tree import commands
from conftest import Run

from quantkit.base.errors import OutputError
from quantkit.cli import cli
from quantkit.cli.files import Command, Read, Written
from quantkit.gguf.shards import shard_name

BASE = """\
name: base
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "*.weight", type: Q4_K, why: "quick to make"}
"""
MINE = """\
name: mine
base: base.yaml
rules:
  - {match: "output.weight", type: Q8_0, why: "so"}
"""
READ = "is one of the files read and would be overwritten; choose another name"
EXISTS = "exists; choose another name, or replace it with --force"


@dataclass(frozen=True)
class Case:
    """A run that works but for what a test puts in the place of one output: its arguments, `$NAME` being paths of
    `World`; the files it reads; how each output is given, by parameter; the parameters of those that are folders."""

    command: str
    args: str
    reads: str
    writes: dict[str, str]
    folders: tuple[str, ...] = ()
    force: bool = True
    grows: tuple[str, ...] = ()
    """the parameters of files that a run adds to, whose content the command checks"""


CASES = [
    Case(
        "build",
        "$v3 -r $mine --imatrix $imatrix --pre deepseek-v3 --engine llama-quantize --llama-quantize $tool -q",
        "$v3/* $mine $base $imatrix $tool",
        {"output": "-o", "attest": "--attest", "cache_dir": "--cache"},
        ("cache_dir",),
    ),
    Case(
        "build",
        "$v3 -r $mine --imatrix $imatrix --pre deepseek-v3 --rounding-policy $policy --covariance $cov -q",
        "$v3/* $mine $base $imatrix $policy $cov/layer-00001.json $cov/layer-00001-attn_output.npy",
        {"output": "-o", "attest": "--attest", "cache_dir": "--cache"},
        ("cache_dir",),
    ),
    Case(
        "build",
        "$v3 -r $mine --imatrix $imatrix --pre deepseek-v3 --rounding feedback --text $text -c 2 -q",
        "$v3/* $mine $base $imatrix $text",
        {"output": "-o", "attest": "--attest", "cache_dir": "--cache"},
        ("cache_dir",),
    ),
    Case(
        "build",
        "$first -r $mine --allow-requantize --imatrix $imatrix -q",
        "$shards/* $mine $base $imatrix",
        {"output": "-o", "attest": "--attest", "cache_dir": "--cache"},
        ("cache_dir",),
    ),
    Case(
        "verify",
        "$first -r $mine -s $v3 --imatrix $imatrix --manifest $manifest --attestation $attestation "
        "--rounding-policy $policy --covariance $cov -q",
        "$shards/* $mine $base $v3/* $imatrix $manifest $attestation $policy $cov/layer-00001.json",
        {"write_manifest": "--write-manifest"},
    ),
    Case("verify", "$first --plan $plan -q", "$shards/* $plan", {"write_manifest": "--write-manifest"}),
    Case("tokenizer check", "$first --fix pad --pad-token 2 -q", "$shards/*", {"output": "-o"}),
    Case("merge", "$first -q", "$shards/*", {"output": ""}),
    Case("ollama", "$first m -q", "$shards/*", {"output": "-o"}),
    Case("split", "$first --max-size 500000 -q", "", {"prefix": ""}),
    Case("dequant", "$v3 -q", "$v3/*", {"output": ""}, ("output",), force=False),
    Case("demo", "-r $mine", "$mine $base", {"folder": "--dir"}, ("folder",), force=False),
    Case("cache prune", "--max-size 1G", "", {"folder": ""}, ("folder",), force=False),
    Case("recipe new", "--from $mine --base $base", "$mine $base", {"path": ""}),
    Case("recipe from-gguf", "$first", "$shards/*", {"output": "-o"}),
    Case(
        "recipe import",
        "$rules --format tensor-types -m $v3 --file-type Q4_K_M",
        "$rules $v3/*",
        {"output": "-o"},
    ),
    Case("recipe export", "$mine --format tensor-types -m $v3", "$mine $base $v3/*", {"output": "-o"}),
    Case("recipe diff", "$mine $base -m $v3", "$mine $base $v3/*", {"page": "--report"}),
    Case(
        "report",
        "$v3 $plan $first $imatrix -r $mine --imatrix $other --pre deepseek-v3 -q",
        "$v3/* $plan $shards/* $imatrix $other $mine $base",
        {"output": "-o", "figures": "--figures"},
        ("figures",),
    ),
    Case("imatrix info", "$imatrix -q", "$imatrix", {"figure": "--figure"}),
    Case(
        "imatrix make",
        "$v3 --pre deepseek-v3 --text $words --shards $recipes -q",
        "$v3/* $words",
        {"output": "-o", "covariance": "--covariance"},
        ("covariance",),
    ),
    Case(
        "imatrix make",
        "$first --text $words -q --engine llama-imatrix --llama-imatrix $tool",
        "$shards/* $words $tool",
        {"output": "-o"},
    ),
    Case("imatrix merge", "$imatrix $other -q", "$imatrix $other", {"output": "-o"}),
    Case("imatrix convert", "$imatrix -q", "$imatrix", {"output": "-o"}),
    Case("sizes update", "-r $mine -m $v3/config.json", "$mine $base $v3/config.json", {"file": ""}),
    Case(
        "sensitivity measure",
        "$v3 --text $text --imatrix $imatrix --shards $recipes -q",
        "$v3/* $text $imatrix",
        {"output": "-o"},
    ),
    Case("sensitivity merge", "$known", "$known", {"output": "-o"}),
    Case(
        "rounding tune",
        "$v3 -r $mine --text $text --choose-text $text --report-text $text --imatrix $imatrix --covariance $cov "
        "--shards $recipes -q",
        "$v3/* $mine $base $text $imatrix $cov/layer-00001.json $cov/layer-00001-attn_output.npy",
        {"output": "-o"},
    ),
    Case(
        "optimize",
        "$v3 --target 1GB -s $known --text $text --choose-text $text --report-text $text --imatrix $imatrix "
        "--shards $recipes --rounding-policy $policy --covariance $cov -q",
        "$v3/* $known $text $imatrix $policy $cov/layer-00001.json",
        {"output": "-o", "report": "--report"},
    ),
    Case(
        "eval generate",
        "$first --prompts $rules --reference $v3 --llama-bin $recipes -q",
        "$shards/* $rules $v3/*",
        {"output": "-o"},
        ("output",),
        force=False,
    ),
    Case("download", "hf://org/repo -q", "", {"folder": "--to"}, ("folder",), force=False),
    Case("eval generate", "$first --rubric $mine -q", "$shards/* $mine", {"output": "-o"}, ("output",), force=False),
    Case("sizes check", "$lock", "$lock $mine $base $v3/config.json", {"output": "-o"}),
    Case(
        "eval compare",
        "$v3 $first -r $mine --imatrix $imatrix --pre deepseek-v3 --text $words --llama-bin $v3 -q "
        "--rounding-policy $policy --covariance $cov --shards $recipes",
        "$v3/* $shards/* $mine $base $imatrix $words $policy $cov/layer-00001.json",
        {"csv_file": "--csv", "output": "-o"},
    ),
    Case(
        "ablate run",
        "$study $v3 --imatrix $imatrix --pre deepseek-v3 --text $words --engine llama.cpp --llama-bin $v3 -q "
        "--rounding-policy $policy --covariance $cov --shards $recipes",
        "$study $v3/* $imatrix $words $policy $cov/layer-00001.json",
        {"results_file": "-o", "cache_dir": "--cache", "files_folder": "--files"},
        ("cache_dir", "files_folder"),
        grows=("results_file",),
    ),
]
IDS = [f"{case.command}-{i}" for i, case in enumerate(CASES)]
#: text that names no file
NO_FILES = {
    "sets", "pre", "pad_token", "sample", "ignored", "device", "name", "file_type", "maps", "tensor", "part", "probes",
    "changed_types", "changed_tensor_types", "changed_output_type", "changed_embedding_type", "changed_metadata",
    "changed_name", "noise", "types", "target", "fit", "locks", "minimum", "llama_args", "study", "repo", "license_",
    "base_model", "revision", "quant", "include", "exclude", "rounding_device",
}  # fmt: skip


@dataclass
class World:
    """Small files of every kind in one folder, and where outputs go."""

    folder: Path
    of: dict[str, Path] = field(default_factory=dict)

    def expand(self, text: str) -> list[str]:
        """Words with $NAME as paths, and those that end in * as the files there."""
        out: list[str] = []
        for word in text.split():
            for name in sorted(self.of, key=len, reverse=True):
                word = word.replace(f"${name}", str(self.of[name]))  # noqa: PLW2901
            out += [str(p) for p in sorted(Path(word[:-2]).iterdir())] if word.endswith("/*") else [word]
        return out

    def state(self) -> dict[Path, tuple[int, int, int]]:
        """Every file, as it is: none may be touched."""
        infos = {p: p.lstat() for p in self.folder.rglob("*")}
        return {p: (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in infos.items()}

    def new(self, name: str) -> Path:
        """A path in a folder that is empty again after every try."""
        return self.of["out"] / name


@pytest.fixture(scope="module")
def world(
    tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path, sound_set: Path, quantkit: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:  # fmt: skip
    w = World(tmp_path_factory.mktemp("world"))
    for name in ("out", "recipes"):
        (w.folder / name).mkdir()
    shutil.copytree(tiny_v3, w.folder / "v3")
    (w.folder / "v3" / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copytree(sound_set, w.folder / "shards")
    files = {
        "out": "out", "recipes": "recipes", "v3": "v3", "shards": "shards",
        "mine": "recipes/mine.yaml", "base": "recipes/base.yaml", "words": "words.txt",
        "imatrix": "imatrix.gguf", "other": "other.gguf", "tool": "llama-quantize", "rules": "rules.txt",
        "plan": "plan.json", "manifest": "manifest.json", "attestation": "attestation.json", "lock": "lock.yaml",
        "text": "text.txt", "known": "known.json", "study": "study.yaml", "policy": "recipes/policy.yaml", "cov": "cov",
    }  # fmt: skip
    w.of = {key: w.folder / name for key, name in files.items()}
    w.of["first"] = min(w.of["shards"].iterdir())
    w.of["text"].write_text("The router stays as it is.\n")
    w.of["known"].write_text('{"quantkit_sensitivity": 2}')
    w.of["mine"].write_text(MINE)
    w.of["base"].write_text(BASE)
    w.of["policy"].write_text("policy: p\nrules: [{role: routed expert, rounding: feedback}]\n")
    shutil.copytree(tiny_covariance, w.of["cov"])
    for name in ("imatrix", "other"):
        shutil.copy(tiny_imatrix, w.of[name])
    w.of["words"].write_text("some words " * 400)
    w.of["study"].write_text("base: Q8_0\naxes: {out: {match: output.weight, types: [Q4_K]}}\n")
    w.of["tool"].write_text("#!/bin/sh\necho --tensor-type-file\n")  # as its --help says
    w.of["tool"].chmod(0o755)
    w.of["rules"].write_text("output.weight=q8_0\n")
    mine, common = str(w.of["mine"]), ("--pre", "deepseek-v3", "-q")
    made = w.folder / "made"
    made.mkdir()
    done = quantkit("build", w.of["v3"], "-o", made / "x.gguf", "-r", mine, *common, "--attest", w.of["attestation"])
    assert done.returncode == 0, done.stderr
    done = quantkit("verify", made / "x.gguf", "-q", "--write-manifest", w.of["manifest"])
    assert done.returncode == 0, done.stderr
    shutil.rmtree(made)
    done = quantkit("plan", w.of["v3"], "-r", mine, "--pre", "deepseek-v3", "--json")
    w.of["plan"].write_text(done.stdout)
    done = quantkit("sizes", "update", w.of["lock"], "-r", mine, "-m", w.of["v3"] / "config.json")
    assert done.returncode == 0, done.stderr
    return w


def refusal(world: World, case: Case, given: dict[str, str], force: bool) -> str:
    """Run a case with outputs as given, by parameter; the sentence of the OutputError. Nothing may have changed."""
    words = case.command.split() + world.expand(case.args)
    words += ["--force"] if force and case.force else []
    for param, text in given.items():
        option = case.writes[param]
        words += [option, text] if option else ["--", text]
    before = world.state()
    with pytest.raises(OutputError) as e:
        cli.main(words, standalone_mode=False)
    assert world.state() == before, words
    return str(e.value)


def test_every_command_checks_its_files_and_every_output_is_tried_here() -> None:
    tried = {(case.command, param) for case in CASES for param in case.writes}
    written = set()
    for name, command in commands():
        assert isinstance(command, Command), f"{name}: its class is not quantkit.cli.files.Command"
        for param in command.params:
            if isinstance(param.type, Written):
                written.add((name, param.name))
            elif isinstance(param.type, click.Path | click.File) or (
                isinstance(param.type, type(click.STRING)) and param.name not in NO_FILES
            ):
                pytest.fail(f"{name} {param.name}: a file has a type of quantkit.cli.files; add other text to NO_FILES")
            has_force = any(p.name == "force" for p in command.params)
            if isinstance(param.type, Written) and not has_force:
                assert any(c.command == name and param.name in c.folders + c.grows for c in CASES), (
                    f"{name} {param.name}"
                )
    assert written == tried


def test_every_file_that_a_command_is_given_is_known_to_be_read() -> None:
    """The cases above give each command every file that it can read: else its row in the matrix is missing."""
    for name, command in commands():
        mine = [case for case in CASES if case.command == name]
        for param in command.params:
            if not mine or not isinstance(param.type, Read):
                continue
            if isinstance(param, click.Option):
                assert any(opt in case.args.split() for case in mine for opt in param.opts), f"{name} {param.name}"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_output_is_an_input(world: World, case: Case) -> None:
    for param in case.writes:
        if param in case.folders:
            continue
        for read in world.expand(case.reads):
            if case.command == "recipe new" and not read.endswith(".yaml"):
                continue
            assert refusal(world, case, others(world, case, param) | {param: read}, True) == f"{read}: {READ}"


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("how", ["dots", "symbolic link", "hard link", "through a link to its folder"])
def test_no_output_is_an_input_by_another_name(world: World, case: Case, how: str) -> None:
    reads = world.expand(case.reads)
    for param in case.writes:
        if param in case.folders or not reads:
            continue
        read = Path(reads[0])
        name, folder = world.new("alias.yaml"), world.new("folder")
        try:
            if how == "dots":
                name = read.parent / ".." / read.parent.name / read.name
            elif how == "symbolic link":
                name.symlink_to(read)
            elif how == "hard link":
                name.hardlink_to(read)
            else:
                folder.symlink_to(read.parent)
                name = folder / read.name
            given = others(world, case, param) | {param: str(name)}
            assert refusal(world, case, given, True) == f"{name}: {READ}"
        finally:
            for path in (world.new("alias.yaml"), folder):
                path.unlink(missing_ok=True)


def others(world: World, case: Case, param: str) -> dict[str, str]:
    """The other outputs of a case, where they may be."""
    return {other: str(world.new(f"{other}.gguf")) for other in case.writes if other != param}


@pytest.mark.parametrize("case", [c for c in CASES if "attest" in c.writes], ids=lambda c: c.command)
def test_no_output_is_another_output(world: World, case: Case) -> None:
    one = str(world.new("one.gguf"))
    both = {"output": one, "attest": one}
    assert refusal(world, case, both, True) == (
        f"{one}: is given to --output and --attest both; give each a name of its own"
    )
    upper = str(world.new("ONE.GGUF"))
    assert refusal(world, case, both | {"attest": upper}, True) == (
        f"{upper}: is given to --output and --attest both; give each a name of its own"
    )
    inside = f"{one}.partial/a.json"
    assert refusal(world, case, {"output": one, "cache_dir": f"{one}.partial"}, True) == (
        f"{one}.partial/objects: --cache is inside {one}.partial, which the unfinished build fills; give another"
    )
    world.new("one.gguf.partial").mkdir()
    try:
        assert refusal(world, case, both | {"attest": inside}, True) == (
            f"{inside}: --attest is inside {one}.partial, which the unfinished build fills; give another"
        )
    finally:
        world.new("one.gguf.partial").rmdir()
    cache = world.new("cache")
    (cache / "objects").mkdir(parents=True)
    try:
        for param, shown in (("output", "--output"), ("attest", "--attest")):
            path = str(cache / "objects" / "x.gguf")
            given = {"output": one, "cache_dir": str(cache)} | {param: path}
            says = f"{path}: {shown} is inside {cache / 'objects'}, which --cache fills; give another"
            assert refusal(world, case, given, True) == says
    finally:
        shutil.rmtree(cache)


def test_the_attestation_is_not_a_shard_of_the_output(world: World) -> None:
    case = Case("build", "$v3 -r $base --pre deepseek-v3 -q --split-max-size 1M", "", CASES[0].writes)
    shard = str(world.new("one-00002-of-00003.gguf"))
    given = {"output": str(world.new("one.gguf")), "attest": shard}
    assert refusal(world, case, given, True) == (
        f"{shard}: is given to --attest and --output both; give each a name of its own"
    )


def test_shards_are_not_split_over_themselves(world: World) -> None:
    (case,) = (c for c in CASES if c.command == "split")
    n = len(list(world.of["shards"].iterdir()))
    prefix = str(world.of["first"]).removesuffix(shard_name("", 0, n))
    assert refusal(world, case, {"prefix": prefix}, True) == f"{world.of['first']}: {READ}"


def test_nothing_that_is_read_is_in_a_folder_that_is_filled(world: World) -> None:
    """The folder of the unfinished build, a cache, the place of a dequantized checkpoint."""
    inside = world.new("o.gguf.partial")
    shutil.copytree(world.of["shards"], inside)
    try:
        source = min(inside.iterdir())
        case = Case("build", f"{source} -r $base -q --allow-requantize", "", {"output": "-o", "cache_dir": "--cache"})
        says = f"{inside}: the unfinished build fills it, and {source}, which is read, is in it; move one of the two"
        assert refusal(world, case, {"output": str(world.new("o.gguf"))}, True) == says
    finally:
        shutil.rmtree(inside)
    cache = world.new("cache")
    (cache / "objects").mkdir(parents=True)
    shutil.copy(world.of["imatrix"], cache / "objects" / "imatrix.gguf")
    try:
        imatrix = cache / "objects" / "imatrix.gguf"
        case = Case("build", f"$v3 -r $base -q --imatrix {imatrix}", "", {"output": "-o", "cache_dir": "--cache"})
        says = f"{cache / 'objects'}: --cache fills it, and {imatrix}, which is read, is in it; move one of the two"
        given = {"output": str(world.new("o.gguf")), "cache_dir": str(cache)}
        assert refusal(world, case, given, True) == says
    finally:
        shutil.rmtree(cache)
    (case,) = (c for c in CASES if c.command == "dequant")
    above = str(world.folder)
    assert f"{above}: DST fills it, and {world.of['v3']}/" in refusal(world, case, {"output": above}, False)


# ---------------------------------------------------------------- one name

ONE = [(case, param) for case in CASES for param in case.writes if param not in case.folders and param != "prefix"]
one_output = pytest.mark.parametrize(
    ("case", "param"), ONE, ids=[f"{c.command} {p} {i}" for i, (c, p) in enumerate(ONE)]
)


@one_output
def test_a_file_is_replaced_with_force_only(world: World, case: Case, param: str) -> None:
    if param in case.grows:
        return
    there = world.new("there.yaml")
    there.write_text("precious")
    try:
        given = others(world, case, param) | {param: str(there)}
        assert refusal(world, case, given, False) == f"{there}: {EXISTS}"
    finally:
        there.unlink()


@one_output
@pytest.mark.parametrize("target", ["a file", "nothing", "a folder"])
def test_a_symbolic_link_is_neither_followed_nor_replaced(world: World, case: Case, param: str, target: str) -> None:
    link, to = world.new("link.yaml"), world.new("target")
    if target == "a file":
        to.write_text("precious")
    elif target == "a folder":
        to.mkdir()
    link.symlink_to(to)
    try:
        says = refusal(world, case, others(world, case, param) | {param: str(link)}, True)
        if target == "a folder":
            assert says.startswith(f"{link}: is a directory; give the name of the file to make, such as {link}/")
        else:
            assert says == (
                f"{link}: is a symbolic link, which is neither followed nor replaced; give the name it points to, "
                f"{to}, or remove it"
            )
    finally:
        link.unlink()
        shutil.rmtree(to) if to.is_dir() else to.unlink(missing_ok=True)


@one_output
def test_what_is_no_file_is_not_replaced(world: World, case: Case, param: str) -> None:
    pipe = world.new("pipe.yaml")
    os.mkfifo(pipe)
    try:
        given = others(world, case, param) | {param: str(pipe)}
        says = f"{pipe}: is not a regular file and will not be replaced; choose another name"
        assert refusal(world, case, given, True) == says
    finally:
        pipe.unlink()


@one_output
def test_names_that_are_no_files_names(world: World, case: Case, param: str) -> None:
    def says(text: str) -> str:
        return refusal(world, case, others(world, case, param) | {param: text}, True)

    for text in ("out/", f"{world.folder}/", f"{world.folder}/..", "."):
        assert says(text).startswith(f"{text}: is a directory; give the name of the file to make, such as ")
    assert re.fullmatch("(--[a-z-]+|[A-Z]+): is empty; give a name", says(""))
    assert re.fullmatch("(--[a-z-]+|[A-Z]+): has a NUL in it, which no file's name has; give another", says("a\0b"))
    assert says("-") == "-: is not a file name; give ./- if that is the name, or leave out the option to print"
    name = "ä" * 126 + ".yaml"
    added = {
        "build": (265, " with what is added while it is made"),
        "merge": (262, " with what is added while it is made"),
        "imatrix make": (265, " with what is added while it is made"),
    }
    n, what = added.get(case.command, (257, "")) if param in ("output", "covariance") else (257, "")
    assert says(str(world.new(name))) == (
        f"{name}: the name has {n} bytes{what}, and 255 are the most; give a shorter one"
    )
    deep = world.new("no") / "x.yaml"
    assert says(str(deep)) == f"{deep}: there is no directory {deep.parent}; create it first"


# ---------------------------------------------------------------- and what works


def test_a_name_of_255_bytes_can_be_written(world: World, quantkit: Run, tmp_path: Path) -> None:
    name = "n" * 250 + ".yaml"
    done = quantkit("recipe", "new", name, "--from", world.of["base"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_report_is_replaced_whole_and_by_the_umask(tmp_path: Path) -> None:
    from quantkit.base.outputs import write_text

    path = tmp_path / "r.txt"
    before = os.umask(0o027)
    try:
        write_text(path, "one\n")
        write_text(path, "two\n", replace=True)
    finally:
        os.umask(before)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("two\n", 0o640)
    with pytest.raises(OutputError, match=EXISTS):
        write_text(path, "three\n")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["two\n"]


def test_a_disk_without_room_leaves_what_was_there(tmp_path: Path) -> None:
    import resource
    import signal

    from quantkit.base.outputs import write_text

    path = tmp_path / "r.txt"
    write_text(path, "old\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OutputError) as e:
            write_text(path, "x" * 5000, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(e.value) == f"{path}: cannot be written: File too large"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.txt", "old\n")]


@pytest.mark.parametrize(
    ("out", "right"),
    [("X-00001-of-00003.gguf", "X.gguf"), ("X-00001-of-00003", "X"), ("a-b-00012-of-00300.gguf", "a-b.gguf")],
)
def test_shards_are_not_numbered_twice(world: World, quantkit: Run, out: str, right: str, tmp_path: Path) -> None:
    says = f"error: {out}: has a shard's number already, and shards are numbered here; give {right}\n"
    args = ("-r", world.of["base"], "--pre", "deepseek-v3", "-q")
    done = quantkit("build", world.of["v3"], "-o", out, *args, "--split-max-size", "1M", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, says)
    done = quantkit("split", world.of["first"], out, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, says)
    assert list(tmp_path.iterdir()) == []


def test_a_report_goes_beside_the_source_and_another_model_there_is_replaced(
    world: World, v3: Path, quantkit: Run
) -> None:
    """What is refused is what is read: a GGUF in the checkpoint's folder is not."""
    (v3 / "old.gguf").write_bytes(b"old")
    args = ("-r", world.of["base"], "--pre", "deepseek-v3", "-q", "--force", "--attest", v3 / "new.json")
    done = quantkit("build", v3, "-o", v3 / "old.gguf", *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert (v3 / "old.gguf").stat().st_size > 10_000
    assert (v3 / "new.json").is_file()


def test_updating_a_lock_is_by_design_and_another_file_is_not_one(world: World, quantkit: Run, tmp_path: Path) -> None:
    lock = tmp_path / "lock.yaml"
    shutil.copy(world.of["lock"], lock)
    args = ("-r", world.of["mine"], "-m", world.of["v3"] / "config.json")
    assert quantkit("sizes", "update", lock, *args).returncode == 0
    lock.write_text(lock.read_text().replace("cells:", "cells: [", 1))  # damaged, but still one
    assert quantkit("sizes", "update", lock, *args).returncode == 0
    hand = tmp_path / "hand.yaml"
    hand.write_text(BASE)
    done = quantkit("sizes", "update", hand, *args)
    assert (done.returncode, done.stderr) == (7, f"error: {hand}: {EXISTS}\n")
    assert hand.read_text() == BASE
    assert quantkit("sizes", "update", hand, *args, "--force").returncode == 0


@pytest.mark.parametrize("is_there", [False, True])
def test_the_summary_of_a_workflow_is_not_the_report(
    world: World, quantkit: Run, tmp_path: Path, is_there: bool
) -> None:
    summary = tmp_path / "summary.md"
    if is_there:
        summary.write_text("before\n")
    env = {"GITHUB_STEP_SUMMARY": str(summary)}
    done = quantkit("sizes", "check", world.of["lock"], "--format", "github", "-o", summary, "--force", env=env)
    assert (done.returncode, done.stderr) == (
        7,
        f"error: {summary}: is given to --output and $GITHUB_STEP_SUMMARY both; give each a name of its own\n",
    )
    assert summary.exists() == is_there
    assert not is_there or summary.read_text() == "before\n"


def test_a_link_to_a_folder_is_that_folder(world: World, quantkit: Run, tmp_path: Path) -> None:
    """For what fills folders: a cache, a dequantized checkpoint. A link to nothing is refused."""
    big = tmp_path / "big"
    big.mkdir()
    for name in ("cache", "dst"):
        (tmp_path / name).symlink_to(big / name)
    says = "is a symbolic link to {}, which is not there; make that, or remove the link\n"
    done = quantkit("dequant", world.of["v3"], "dst", "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "error: dst: " + says.format(big / "dst"))
    args = ("build", world.of["v3"], "-o", "o.gguf", "-r", world.of["base"], "--pre", "deepseek-v3", "-q")
    done = quantkit(*args, "--cache", "cache", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "error: cache: " + says.format(big / "cache"))
    for name in ("cache", "dst"):
        (big / name).mkdir()
    assert quantkit("dequant", world.of["v3"], "dst", "-q", cwd=tmp_path).returncode == 0
    assert quantkit(*args, "--cache", "cache", cwd=tmp_path).returncode == 0
    assert (big / "dst" / "config.json").is_file()
    assert (big / "cache" / "objects").is_dir()


def test_a_demo_writes_through_no_link(quantkit: Run, tmp_path: Path) -> None:
    from quantkit.model.demo import MARKER, NAME

    folder, precious = tmp_path / "d", tmp_path / "precious"
    (folder / NAME).mkdir(parents=True)
    (folder / MARKER).touch()
    precious.write_text("mine")
    for name in ("imatrix.gguf", f"{NAME}/config.json"):
        (folder / name).symlink_to(precious)
        done = quantkit("demo", "--dir", folder, cwd=tmp_path)
        assert done.returncode == 7
        assert done.stderr == (
            f"error: {folder / name}: is a symbolic link, which is neither followed nor replaced; give the name it "
            f"points to, {precious}, or remove it\n"
        )
        (folder / name).unlink()
    assert precious.read_text() == "mine"


def test_a_name_too_long_with_what_dequant_adds(v3: Path, quantkit: Run, tmp_path: Path) -> None:
    name = "n" * 250
    (v3 / name).write_text("x")
    done = quantkit("dequant", v3, tmp_path / "dst", "-q")
    says = f"error: {name}: the name has 265 bytes with what is added while it is made, and 255 are the"
    assert done.returncode == 7
    assert done.stderr == f"{says} most; give a shorter one\n"
    assert not (tmp_path / "dst").exists()

"""What the command line prints, on outputs that are full, closed, of another encoding, or a terminal; and inputs that
are no files."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import factory
import pytest
from command_tree import commands
from conftest import Run
from faults_site import Server

from quantkit.base.errors import QuantkitError
from quantkit.cli import cli
from quantkit.cli.files import Read, Written
from quantkit.gguf.header import STRING, U32, kv, kv_array

QUANTKIT = [sys.executable, "-m", "quantkit"]
#: a run of each command that prints, in a folder with what `place` makes
PRINTS = {
    "plan": "plan deepseek-r1 -r UD-IQ1_S",
    "build": "build m.gguf -o o.gguf -r r.yaml --dry-run",
    "status": "status m.gguf",
    "cache show": "cache show c",
    "cache prune": "cache prune c --max-size 1G",
    "dequant": "dequant v3 dst --dry-run",
    "verify": "verify m.gguf",
    "inspect": "inspect m.gguf",
    "split": "split m.gguf s --dry-run",
    "merge": "merge s-00001-of-00002.gguf o.gguf --dry-run",
    "recipe list": "recipe list",
    "recipe show": "recipe show UD-IQ1_S",
    "recipe lint": "recipe lint UD-IQ1_S",
    "recipe explain": "recipe explain UD-IQ1_S output.weight",
    "recipe diff": "recipe diff UD-IQ1_S UD-IQ1_M",
    "recipe new": "recipe new new.yaml",
    "recipe schema": "recipe schema",
    "recipe from-gguf": "recipe from-gguf q.gguf",
    "recipe import": "recipe import rules.txt --format tensor-types -m deepseek-v2-lite --file-type Q4_K_M",
    "recipe export": "recipe export UD-IQ1_S --format tensor-types -m deepseek-r1",
    "report": "report q.gguf -o r.html",
    "sizes update": "sizes update -r UD-IQ1_S -m deepseek-r1",
    "sizes check": "sizes check",
    "sizes table": "sizes table deepseek-r1",
    "fit": "fit deepseek-r1 -r UD-IQ1_S --vram 24",
    "which": "which deepseek-r1 --vram 24",
    "download": "download --help",
    "ollama": "ollama chat.gguf m",
    "publish": "publish q.gguf me/q --dry-run",
    "run-card": "run-card q.gguf --vram 24",
    "tokenize": "tokenize v3 --pre deepseek-v3 --text words.txt --ctx 16",
    "tokenizer check": "tokenizer check v3",
    "imatrix make": "imatrix make deepseek-r1 --estimate --text-tokens 1M --gpu-tflops 400 --disk 5GB/s",
    "imatrix info": "imatrix info imatrix.gguf",
    "imatrix check": "imatrix check imatrix.gguf --recipe UD-IQ1_S --model deepseek-v2-lite",
    # these print when they have computed, and their help before
    "imatrix merge": "imatrix merge --help",
    "imatrix convert": "imatrix convert --help",
    "eval compare": "eval compare --help",
    "eval generate": "eval generate --help",
    "ablate run": "ablate run --help",
    "ablate show": "ablate show --help",
    "sensitivity measure": "sensitivity measure --help",
    "sensitivity show": "sensitivity show --help",
    "sensitivity merge": "sensitivity merge --help",
    "optimize": "optimize --help",
    "rounding tune": "rounding tune --help",
    "demo": "demo",
    "toolchain install": "toolchain install --help",
    "toolchain list": "toolchain list",
    "doctor": "doctor",
}
EVIL = "\x1b[31mred\x07\r\x9b2J\u202egnp"
RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "*", type: Q8_0, optional: true, why: "so"}
"""


@pytest.fixture(scope="module")
def place(tiny_v3: Path, tiny_imatrix: Path, quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "v3").symlink_to(tiny_v3)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "rules.txt").write_text("output.weight=q8_0\n")
    (folder / "study.yaml").write_text("base: Q8_0\naxes: {out: {match: output.weight, types: [Q4_K]}}\n")
    (folder / "words.txt").write_text("some words " * 40)
    shutil.copy(tiny_imatrix, folder / "imatrix.gguf")
    for name in ("objects", "sources", "tmp"):
        (folder / "c" / name).mkdir(parents=True)
    tensors = {f"t{i}.weight": ((256, 2), "F32", bytes(2048)) for i in range(2)}
    factory.gguf_file(folder / "m.gguf", tensors)
    kvs = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)]
    kvs.append(kv("general.file_type", U32, 7))
    kvs += [kv(f"deepseek2.{key}", U32, n) for key, n in (("attention.head_count", 4), ("embedding_length", 256))]
    factory.gguf_file(folder / "q.gguf", {"output.weight": ((256, 2), "Q8_0", bytes(2 * 8 * 34))}, kvs)
    vocabulary = [kv("tokenizer.ggml.model", STRING, "gpt2"), kv_array("tokenizer.ggml.tokens", STRING, ["a", "b"])]
    vocabulary.append(kv_array("tokenizer.ggml.merges", STRING, ["a b"]))
    factory.gguf_file(folder / "chat.gguf", {"output.weight": ((256, 2), "Q8_0", bytes(2 * 8 * 34))}, kvs + vocabulary)
    for args in ("sizes update -r UD-IQ1_S -m deepseek-r1", "split m.gguf s --max-tensors 1 -q"):
        done = quantkit(*args.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_every_command_is_tried() -> None:
    assert {name for name, _ in commands()} == PRINTS.keys()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.mark.parametrize("command", PRINTS.values(), ids=PRINTS)
def test_a_full_disk_on_standard_output(place: Path, server: Server, tmp_path: Path, command: str) -> None:
    """In a fork of a process that has all imported, since there are so many."""
    shutil.copytree(place, tmp_path / "p", symlinks=True)
    code = server.start(command.split(), {}, stdout="/dev/full", cwd=str(tmp_path / "p")).wait()
    said = (server.folder / "stderr").read_text()
    assert code == 7, said
    assert said.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in said


def test_a_full_disk_and_the_end_of_python(tmp_path: Path) -> None:
    """What is left in a buffer is not tried again."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*QUANTKIT, "recipe", "list"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False
        )
    assert done.returncode == 7
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", ["recipe list", "plan deepseek-r1 -r UD-IQ1_S --json", "--version"])
def test_standard_output_is_closed(command: str, tmp_path: Path) -> None:
    words = " ".join([*QUANTKIT, command])
    done = subprocess.run(["sh", "-c", f"{words} >&-"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (7, "error: standard output cannot be written: it is closed\n")


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "<&- >/dev/null 2>&-"])
def test_a_build_without_standard_error_is_whole(place: Path, tmp_path: Path, closed: str) -> None:
    """Nothing that is printed lands in the model, which would get the number of a closed output."""
    command = " ".join([*QUANTKIT, "build", str(place / "m.gguf"), "-r", str(place / "r.yaml"), "-o"])
    done = subprocess.run(["sh", "-c", f"{command} a.gguf {closed}"], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["sh", "-c", f"{command} b.gguf -q"], cwd=tmp_path, check=False, capture_output=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_an_error_without_standard_error_has_its_exit_code(tmp_path: Path) -> None:
    for closed in ("2>&-", "2>/dev/full"):
        command = " ".join([*QUANTKIT, "inspect", "nothing.gguf", closed])
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 4


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_is_not_utf_8(quantkit: Run, tmp_path: Path, encoding: str) -> None:
    path = factory.gguf_file(
        tmp_path / "m.gguf",
        {"output.weight": ((256, 2), "F32", bytes(2048))},
        [kv("general.architecture", STRING, "deepseek2"), kv("general.name", STRING, "模型 é 😀")],
    )
    env = os.environ | {"PYTHONIOENCODING": encoding}

    def run(*args: str) -> bytes:
        done = subprocess.run(
            [*QUANTKIT, "inspect", str(path), *args], capture_output=True, env=env, cwd=tmp_path, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    assert ("?? é ?" if encoding != "ascii" else "?? ? ?") in run().decode(encoding)
    assert json.loads(run("--json").decode(encoding))["model"] == "模型 é 😀"


def test_the_c_locale(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON", "LANG"))}
    env |= {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [*QUANTKIT, "inspect", "ü.gguf"], capture_output=True, env=env, cwd=tmp_path, check=False, text=True
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: '")
    assert "Traceback" not in done.stderr


def on_a_terminal(*args: str, cwd: Path) -> str:
    """What reaches a terminal that is both standard output and error."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([*QUANTKIT, *args], stdout=theirs, stderr=theirs, stdin=theirs, cwd=cwd) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                got = os.read(ours, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            if not got:
                break
            seen += got
        process.wait()
    os.close(ours)
    return seen.decode()


def is_harmless(text: str) -> bool:
    return all(ch.isprintable() or ch in "\r\n\t\xa0" for ch in text)


def test_nothing_steers_a_terminal(tmp_path: Path) -> None:
    """Not from the keys, names and values of a GGUF, a recipe's title and reasons, file names, or wrong arguments."""
    name = f"m{EVIL}.gguf"
    keys = [kv("general.architecture", STRING, "deepseek2"), kv("general.name", STRING, EVIL), kv("k", STRING, EVIL)]
    factory.gguf_file(tmp_path / name, {"output.weight": ((256, 2), "F32", bytes(2048))}, keys)
    keys[2] = kv(EVIL, STRING, "x")
    factory.gguf_file(tmp_path / "key.gguf", {"output.weight": ((256, 2), "F32", bytes(2048))}, keys)
    factory.gguf_file(tmp_path / "tensor.gguf", {f"{EVIL}.weight": ((256, 2), "F32", bytes(2048))}, keys[:2])
    quoted = json.dumps(EVIL)
    recipe = RECIPE.replace('"so"', quoted).replace("name: r\n", f"name: r\ntitle: {quoted}\ndescription: {quoted}\n")
    (tmp_path / "r.yaml").write_text(recipe)
    runs = [
        ("inspect", name),
        ("inspect", "key.gguf"),
        ("verify", "tensor.gguf"),
        ("plan", name, "-r", "r.yaml"),
        ("plan", name, "-r", "r.yaml", "--json"),
        ("recipe", "explain", "r.yaml", "output.weight", "-m", name),
        ("build", name, "-r", "r.yaml", "-o", f"o{EVIL}.gguf", "-q"),
        ("split", name, f"s{EVIL}", "--dry-run"),
        (EVIL,),
        ("plan", EVIL, "-r", "r.yaml"),
        ("status", "m.gguf", f"--{EVIL}"),
    ]
    for args in runs:
        seen = on_a_terminal(*args, cwd=tmp_path)
        assert is_harmless(seen), (args, seen)
        assert "\rgnp" not in seen
        assert "Traceback" not in seen, seen


def test_json_says_what_the_file_says(quantkit: Run, tmp_path: Path) -> None:
    value = EVIL + "\x7f\u2028\U000e0001"
    keys = [kv("general.architecture", STRING, "deepseek2"), kv("some.key", STRING, value)]
    factory.gguf_file(tmp_path / "m.gguf", {"output.weight": ((256, 2), "F32", bytes(2048))}, keys)
    done = quantkit("inspect", "m.gguf", "--json", cwd=tmp_path)
    assert is_harmless(done.stdout)
    assert {m["key"]: m["value"] for m in json.loads(done.stdout)["metadata"]}["some.key"] == repr(value)


# ---------------------------------------------------------------- inputs that are no files


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "a FIFO"


def a_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as s:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            s.bind(path.name)
        finally:
            os.chdir(here)
    return "a socket"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


#: what stands for the other arguments of a command, so that it is complete
OTHERS = {
    "source": "m.gguf", "output": "o.gguf", "recipe": "r.yaml", "name": "r.yaml", "names": "r.yaml", "model": "m.gguf",
    "vram": "24", "tensor": "output.weight", "before": "r.yaml", "after": "r.yaml", "prefix": "s", "first": "m.gguf",
    "out": "m.gguf", "folder": "c", "max_size": "1G", "file": "rules.txt", "form": "tensor-types", "path": "n.yaml",
    "study_file": "study.yaml", "texts": "rules.txt", "results_file": "rules.txt", "files": "m.gguf",
    "known": "rules.txt", "sources": "m.gguf", "reference": "m.gguf", "models": "m.gguf", "recipes": "r.yaml",
    "covariance": "c", "repo": "me/q",
}  # fmt: skip
SPECIAL = [
    (name, command, param)
    for name, command in commands()
    for param in command.params
    if isinstance(param.type, Read) and param.name is not None
]


def run_with(place: Path, cwd: Path, name: str, command: click.Command, param: click.Parameter, value: str) -> None:
    """Run a command with a value in the place of one parameter, and what it needs besides."""
    takes_rounding = any("--rounding" in p.opts for p in command.params)
    words = [*name.split(), *(("--rounding", "feedback") if param.name == "covariance" and takes_rounding else ())]
    for other in command.params:
        if other is not param and not other.required:
            continue
        given = value if other is param else OTHERS[str(other.name)]
        if other is not param and isinstance(other.type, Read):
            given = str(place / given)
        words += [max(other.opts, key=len), given] if isinstance(other, click.Option) else [given]
    here = Path.cwd()
    os.chdir(cwd)
    try:
        cli.main(words, standalone_mode=False)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [fifo, a_socket, device])
@pytest.mark.parametrize(("name", "command", "param"), SPECIAL, ids=[f"{n} {p.name}" for n, _, p in SPECIAL])
def test_an_input_that_is_no_file_is_refused_at_once(
    place: Path, tmp_path: Path, name: str, command: click.Command, param: click.Parameter, make: Callable[[Path], str]
) -> None:
    path = tmp_path / "it.yaml"
    what = make(path)
    with pytest.raises(QuantkitError) as e:
        run_with(place, tmp_path, name, command, param, str(path))
    assert str(e.value) == f"{path}: is {what}, not a regular file; write it to a file first"


FILES = [(n, c, p) for n, c in commands() for p in c.params if isinstance(p.type, Read | Written)]


@pytest.mark.parametrize("value", ["n" * 300, "n/" * 3000 + "n"], ids=["name", "path"])
@pytest.mark.parametrize(("name", "command", "param"), FILES, ids=[f"{n} {p.name}" for n, _, p in FILES])
def test_a_name_that_no_file_can_have(
    place: Path, tmp_path: Path, name: str, command: click.Command, param: click.Parameter, value: str
) -> None:
    with pytest.raises(QuantkitError) as e:
        run_with(place, tmp_path, name, command, param, value)
    assert re.search(
        r"^n+: the name has 30[58] bytes( with what is added while it is made)?, and 255 are the most; give|"
        r"File name too long|a recipe's file ends in|name has 300 bytes",
        str(e.value),
    ), str(e.value)[-300:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "README.md"])
@pytest.mark.parametrize("command", ["plan v3 -r Q8_0", "inspect v3", "dequant v3 dst", "build v3 -o o.gguf -r Q8_0"])
def test_a_pipe_in_a_checkpoint_is_refused_at_once(v3: Path, quantkit: Run, inside: str, command: str) -> None:
    shutil.rmtree(v3.parent / "dst", ignore_errors=True)
    (v3 / inside).unlink(missing_ok=True)
    os.mkfifo(v3 / inside)
    v3.rename(v3.parent / "v3")
    done = quantkit(*command.split(), cwd=v3.parent, timeout=60)
    assert done.returncode == 4
    assert done.stderr == f"error: v3/{inside}: is a FIFO, not a regular file; write it to a file first\n"


def test_a_pipe_as_the_base_of_a_recipe(quantkit: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.yaml")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("name: r\n", "name: r\nbase: base.yaml\n"))
    done = quantkit("recipe", "lint", "r.yaml", cwd=tmp_path, timeout=60)
    assert done.returncode == 3
    assert "base.yaml: cannot be read: it is a FIFO, not a regular file" in done.stdout

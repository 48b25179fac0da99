"""The command line for people: a build in ten lines, a plan that fits the terminal, changes without a file, names as
people type them, and what is meant by commands that are not there."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import factory
import pytest
from conftest import Run
from gguf import GGUFReader
from test_terminal import QUANTKIT

from quantkit.gguf.header import STRING, U32, kv
from quantkit.gguf.shards import shard_name

RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "output.weight", type: Q8_0, why: "so"}
  - {match: "*", type: Q8_0, why: "all"}
"""
#: it warns, since its first rule changes nothing
WARNS = "warning: r.yaml:5 rules[0].match: changes nothing: r.yaml:6 rules[1] would give its tensors Q8_0 too"
R1 = ("plan", "deepseek-r1", "--recipe", "UD-IQ1_S")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.gguf, a small model; r.yaml; and t.yaml, of one type."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "r.yaml").write_text(RECIPE)
    kvs = [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 2)]
    names = ["output.weight", "token_embd.weight", "blk.0.attn_output.weight", "blk.1.attn_output.weight"]
    tensors: dict[str, tuple[tuple[int, ...], str, bytes]] = {name: ((256, 2), "F32", bytes(2048)) for name in names}
    tensors["blk.0.attn_norm.weight"] = ((256,), "F32", bytes(1024))
    factory.gguf_file(folder / "m.gguf", tensors, kvs)
    return folder


# ---------------------------------------------------------------- ten lines, and all of them


def test_a_build_prints_ten_lines(quantkit: Run, place: Path, tmp_path: Path) -> None:
    args = ("build", place / "m.gguf", "-r", "r.yaml", "-o", tmp_path / "o.gguf", "--dry-run")
    done = quantkit(*args, cwd=place)
    assert done.stdout.splitlines() == [
        "model     m: deepseek2, 2 layers, 2,304 weights",
        "recipe    r",
        "size      3.59 KiB (3,680 bytes)",
        "bits      11.11 a weight",
        "types     Q8_0 68.0 %, F32 32.0 %",
        "imatrix   none",
        WARNS,
        "",
        "dry run: everything was checked, nothing was written",
    ]
    whole = quantkit(*args, "--verbose", cwd=place).stdout
    assert whole.startswith("m (deepseek2, ")
    assert re.search(r"^blk\.\{0-1\}\.attn_output\.weight +2 +256x2 +Q8_0 ", whole, re.M)
    assert f"\n{WARNS}\n" in whole


def test_quiet_leaves_warnings_and_errors(quantkit: Run, place: Path, tmp_path: Path) -> None:
    args = ("build", place / "m.gguf", "-r", "r.yaml", "-o", tmp_path / "o.gguf", "-q")
    done = quantkit(*args, cwd=place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{WARNS}\n")
    again = quantkit(*args, cwd=place)
    assert (again.returncode, again.stdout) == (7, "")
    assert again.stderr.startswith("error: ")


def on_a_terminal_of(columns: int, *args: str, **env: str) -> list[str]:
    """The lines that a terminal of so many columns gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    without = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    with subprocess.Popen([*QUANTKIT, *args], stdout=theirs, stderr=theirs, cwd="/", env=without | env) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                got = os.read(ours, 1 << 16)
            except OSError:
                break
            if not got:
                break
            seen += got
        assert process.wait() == 0
    os.close(ours)
    return seen.decode().splitlines()


@pytest.mark.parametrize(("columns", "env"), [(80, {}), (80, {"TERM": "dumb", "NO_COLOR": "1"}), (132, {}), (40, {})])
def test_a_plan_fits_the_terminal(columns: int, env: dict[str, str]) -> None:
    lines = on_a_terminal_of(columns, *R1, **env)
    assert max(map(len, lines)) <= columns
    names = "blk.{3-60}.ffn_gate_shexp.weight"
    if columns == 80:
        assert f"{names}  58  7168x2048      Q5_K     558.25 MiB     7" in lines
    elif columns == 132:
        assert any(
            re.fullmatch(rf"{re.escape(names)} .* 585,367,552  required +rules\[7\] :36", line) for line in lines
        )
    assert "".join(lines).count("ffn_gate_shexp") == 1 or columns == 40


@pytest.mark.parametrize("columns", [132, 80, 60])
@pytest.mark.parametrize(
    "words",
    [
        "fit deepseek-r1 -r UD-IQ1_S --vram 24,24+80,2x80,16x3090 --ram 64",
        "fit deepseek-r1-distill-qwen-7b -r Q4_K_M --vram 8,16x24",
        "recipe diff UD-IQ1_S UD-IQ1_M",
        "recipe diff Q2_K_XS IQ2_XXS --all",
        "inspect deepseek-r1",
    ],
)
def test_tables_fit_the_terminal(quantkit: Run, words: str, columns: int) -> None:
    """Lines that a shell reads are as long as their longest argument."""
    lines = quantkit(*words.split(), env={"COLUMNS": str(columns)}).stdout.splitlines()
    argument = r"  (-ot '.*'|-c \d+ .*-ot '.*')"
    assert len(lines) > 10
    assert max(len(line) for line in lines if not re.fullmatch(argument, line)) <= columns
    wide = quantkit(*words.split(), env={"COLUMNS": ""}).stdout.splitlines()
    assert max(map(len, wide)) > 60


def test_a_pipe_gets_whole_lines(quantkit: Run) -> None:
    """Unless $COLUMNS says otherwise."""
    done = quantkit(*R1, env={"COLUMNS": ""})
    assert "\nUD-IQ1_S.yaml:25 rules[4]  Q4_K: attention at four bits keeps long chains of thought coherent, for " in (
        done.stdout
    )
    narrow = quantkit(*R1, env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, narrow)) == 80
    assert quantkit(*R1, env={"COLUMNS": "wide"}).stdout == done.stdout


def test_small_models_are_not_zero_gib(quantkit: Run, place: Path) -> None:
    text = quantkit("plan", place / "m.gguf", "-r", "r.yaml", cwd=place).stdout
    assert "GiB" not in text
    assert re.search(r"^type +tensors +elements +% +bytes +KiB +% of file +bits$", text, re.M)
    assert re.search(r"^tensor data  3,200 bytes = 3\.12 KiB = 3\.20 kB, 11\.\d\d BPW$", text, re.M)


# ---------------------------------------------------------------- changes without a file


def types(quantkit: Run, *args: str | Path, cwd: Path | None = None) -> dict[str, str]:
    done = quantkit(*args, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {t["name"]: t["type"] for t in json.loads(done.stdout)["tensors"]}


def test_a_type_on_the_command_line(quantkit: Run) -> None:
    """Before the recipe's rules; the first of several decides; layers as a rule has them."""
    was = types(quantkit, *R1)
    now = types(
        quantkit, *R1, "--type", "blk.*.attn_output.weight@3-5=q8_0",
        "--type", "blk.*.attn_output.weight@moe[:12]=Q6_K", "--type", "output.weight=Q8_0",
    )  # fmt: skip
    changed = {name: type_ for name, type_ in now.items() if type_ != was[name]}
    assert changed == {
        "output.weight": "Q8_0",
        **{f"blk.{i}.attn_output.weight": "Q8_0" for i in (3, 4, 5)},
        **{f"blk.{i}.attn_output.weight": "Q6_K" for i in range(6, 15)},
    }


def test_a_changed_recipe_has_another_name(quantkit: Run) -> None:
    change = ("--type", "output.weight=Q8_0")
    assert json.loads(quantkit(*R1, *change, "--json").stdout)["recipe"] == "UD-IQ1_S-changed"
    assert json.loads(quantkit(*R1, *change, "--name", "mine", "--json").stdout)["recipe"] == "mine"
    assert json.loads(quantkit(*R1, "--json").stdout)["recipe"] == "UD-IQ1_S"


WRONG_TYPES = [
    ("x", "is not GLOB=TYPE or GLOB@LAYERS=TYPE, such as 'blk.*.ffn_down_exps.weight@moe[:6]=IQ2_XXS'"),
    ("=Q4_K", "is not GLOB=TYPE or GLOB@LAYERS=TYPE, such as 'blk.*.ffn_down_exps.weight@moe[:6]=IQ2_XXS'"),
    ("output.weight=Q9_K", "unknown type 'Q9_K' (did you mean Q6_K?)"),
    ("output.weight@12-3=Q4_K", "'12-3' runs backwards; write 3-12"),
    ("blk.*.attn_ouput.weight=Q5_K",
     "'blk.*.attn_ouput.weight' matches no tensor (did you mean blk.*.attn_output.weight?)"),
    ("ffn_down_exps=Q5_K",
     "'ffn_down_exps' matches no tensor, since a glob is for the whole name: write \"*ffn_down_exps*\""),
    (".*attn_out.*=Q5_K",
     "'.*attn_out.*' matches no tensor, since a glob is for the whole name: write \"*attn_out*\""),
    (r"blk\.(3|4)\.attn_output=Q5_K",
     r"'blk\.(3|4)\.attn_output' is a regular expression; a rule takes a glob over the whole name: "
     '"*blk.{3,4}.attn_output*"'),
    ("model.layers.*.mlp.experts.*.down_proj.weight=Q5_K",
     "'model.layers.*.mlp.experts.*.down_proj.weight' matches no tensor: it is a name of the checkpoint, and a rule "
     'takes a GGUF\'s: "blk.*.ffn_down_exps.weight"'),
    ("lm_head=Q5_K",
     "'lm_head' matches no tensor: it is a name of the checkpoint, and a rule takes a GGUF's: \"output.weight\""),
    ("blk.*.attn_norm.weight=Q5_K",
     "'blk.*.attn_norm.weight' names tensors that are never quantized, such as 'blk.0.attn_norm.weight' (norm, stays "
     "F32)"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "says"), WRONG_TYPES, ids=[t for t, _ in WRONG_TYPES])
def test_a_wrong_type_on_the_command_line(quantkit: Run, given: str, says: str) -> None:
    done = quantkit(*R1, "--type", given)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"error: --type {given}: {says}\n")


def test_all_wrong_changes_are_said_at_once(quantkit: Run) -> None:
    done = quantkit(
        *R1, "--type", "x=y", "--override-kv", "foo", "--override-kv", "general.file_type=int:3", "--override-kv",
        "a.b=int:x", "--tensor-type", "(=q4_k", "--name", "",
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr == (
        "error: --type x=y: unknown type 'y'\n"
        "--tensor-type (=q4_k: '(' is not a regular expression: missing ), unterminated subpattern at position 0\n"
        "--override-kv foo: is not KEY=TYPE:VALUE, such as general.author=str:me\n"
        "--override-kv general.file_type=int:3: general.file_type follows from the build and cannot be set\n"
        "--override-kv a.b=int:x: 'x' is not an integer from 0 to 4294967295\n"
        "--name: is empty; give a name\n"
    )


def test_a_type_that_the_file_type_excludes(quantkit: Run) -> None:
    done = quantkit("plan", "deepseek-r1", "-r", "BF16", "--type", "output.weight=Q8_0")
    assert done.returncode == 3
    assert done.stderr == (
        "error: --type output.weight=Q8_0: Q8_0 cannot be had with file_type BF16: llama-quantize then ignores all "
        "rules; give a quantized file_type\n"
    )


def test_a_build_with_changes_is_built_verified_and_attested(quantkit: Run, place: Path, tmp_path: Path) -> None:
    change = ("--type", "blk.*.attn_output.weight@1=Q4_0", "--override-kv", "general.author=str:me me")
    recipe = ("-r", place / "r.yaml", *change)
    done = quantkit("build", place / "m.gguf", "-o", "o.gguf", *recipe, "--attest", "a.json", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = GGUFReader(tmp_path / "o.gguf")
    assert {t.name: t.tensor_type.name for t in made.tensors} == {
        "output.weight": "Q8_0", "token_embd.weight": "Q8_0", "blk.0.attn_norm.weight": "F32",
        "blk.0.attn_output.weight": "Q8_0", "blk.1.attn_output.weight": "Q4_0",
    }  # fmt: skip
    assert made.fields["general.author"].contents() == "me me"
    source = ("--source", place / "m.gguf")
    assert quantkit("verify", "o.gguf", *source, *recipe, cwd=tmp_path).returncode == 0
    assert quantkit("verify", "o.gguf", *source, "-r", place / "r.yaml", cwd=tmp_path).returncode == 1
    done = quantkit("verify", "o.gguf", *source, "--attestation", "a.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "a.json").read_text())["predicate"]["buildDefinition"]["externalParameters"]
    assert said["recipe"]["changes"] == {
        "types": ["blk.*.attn_output.weight@1=Q4_0"], "metadata": ["general.author=str:me me"]
    }  # fmt: skip
    done = quantkit("verify", "o.gguf", "--type", "output.weight=Q8_0", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "Error: --type and the other changes of a recipe need --recipe"
    )  # fmt: skip


def test_a_change_becomes_a_recipe(quantkit: Run, tmp_path: Path) -> None:
    change = ("--type", "blk.*.attn_output.weight@3-5,9=Q5_K", "--override-kv", "general.author=str:me")
    done = quantkit("recipe", "show", "UD-IQ1_S", *change, "--name", "mine")
    (tmp_path / "mine.yaml").write_text(done.stdout)
    assert types(quantkit, "plan", "deepseek-r1", "-r", tmp_path / "mine.yaml") == types(quantkit, *R1, *change)


def test_changes_where_a_recipe_is_read(quantkit: Run) -> None:
    """fit, sizes table, export, explain and diff have them too."""
    change = ("--type", "output.weight=Q8_0")
    more = 984_596_480 - 760_166_400
    whole = 140_350_064_128 + more
    table = json.loads(quantkit("sizes", "table", "deepseek-r1", "-r", "UD-IQ1_S", *change, "--format", "json").stdout)[
        "recipes"
    ]
    assert [(row["recipe"], row["tensor_bytes"]) for row in table] == [("UD-IQ1_S-changed", whole)]
    done = quantkit("fit", "deepseek-r1", "-r", "UD-IQ1_S", "--vram", "24", *change)
    assert done.stdout.startswith(f"deepseek-r1 as UD-IQ1_S-changed: {whole:,} bytes = ")
    done = quantkit("recipe", "export", "UD-IQ1_S", "--format", "custom-q", "-m", "deepseek-r1", *change)
    assert done.stdout.startswith(r"^output\.weight$=q8_0,")
    found = json.loads(quantkit("recipe", "explain", "UD-IQ1_S", "output.weight", *change, "--json").stdout)
    assert (found["type"], found["rule"]) == ("Q8_0", "--type output.weight=Q8_0")
    found = json.loads(quantkit("recipe", "diff", "UD-IQ1_S", *change, "--json").stdout)
    assert (found["before"]["recipe"], found["after"]["recipe"]) == ("UD-IQ1_S", "UD-IQ1_S-changed")
    assert (found["bytes"], [c["name"] for c in found["changes"]]) == (more, ["output.weight"])
    done = quantkit("recipe", "diff", "UD-IQ1_S")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "Error: what A is compared with is missing: give a second recipe or GGUF, or a change of A"
    )  # fmt: skip
    done = quantkit("sizes", "table", "deepseek-r1", "-r", "UD-*", *change, "--name", "x")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "Error: --name is for one recipe, and these are 4")


# ---------------------------------------------------------------- GGUFs and names


def test_diff_takes_ggufs(quantkit: Run, place: Path, tmp_path: Path) -> None:
    base = ("build", place / "m.gguf", "-r", place / "r.yaml", "-q", "-o")
    quantkit(*base, "a.gguf", cwd=tmp_path)
    quantkit(*base, "b.gguf", "--type", "output.weight=Q4_0", "--split-max-size", "1K", cwd=tmp_path)
    for after in ("b.gguf", shard_name("b", 0, 4)):
        found = json.loads(quantkit("recipe", "diff", "a.gguf", after, "--json", cwd=tmp_path).stdout)
        assert (found["before"]["recipe"], found["after"]["recipe"]) == ("a.gguf", "b.gguf")
        assert [(c["name"], c["before"], c["after"], c["bytes"]) for c in found["changes"]] == [
            ("output.weight", "Q8_0", "Q4_0", 2 * 8 * (18 - 34))
        ]
    found = json.loads(quantkit("recipe", "diff", place / "r.yaml", "a.gguf", "--json", cwd=tmp_path).stdout)
    assert (found["model"], found["changes"]) == ("a", [])
    done = quantkit("recipe", "diff", "a.gguf", "b.gguf", "--type", "output.weight=Q4_0", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "Error: --set, --type and the like change a recipe, and b.gguf is a GGUF"
    )  # fmt: skip
    done = quantkit("recipe", "diff", "a.gguf", "c.gguf", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (4, "error: c.gguf: there is no such file\n")
    done = quantkit("recipe", "diff", "a.gguf", "b.gguf", "-m", "deepseek-v2-lite", cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr.startswith("error: deepseek-v2-lite has 'output_norm.weight' (and ")
    assert done.stderr.endswith(" which a lacks: only files with the same tensors can be compared\n")


def test_a_sharded_build_is_found_by_its_name(quantkit: Run, place: Path, tmp_path: Path) -> None:
    quantkit(
        "build",
        place / "m.gguf",
        "-r",
        place / "r.yaml",
        "-q",
        "-o",
        "R 1.gguf",
        "--split-max-size",
        "1K",
        cwd=tmp_path,
    )
    shards = sorted(tmp_path.iterdir())
    nbytes = sum(p.stat().st_size for p in shards)
    n = len(shards)
    assert n == 5
    done = quantkit("status", "R 1.gguf", cwd=tmp_path)
    assert (
        done.stdout == f"R 1.gguf: complete, {n} shards, {nbytes:,} bytes; `quantkit verify 'R 1.gguf'` checks them\n"
    )
    assert quantkit("verify", "R 1.gguf", cwd=tmp_path).stdout.splitlines()[-1].startswith(f"OK: {n} files")
    said = json.loads(quantkit("status", "R 1.gguf", "--json", cwd=tmp_path).stdout)
    assert (said["state"], said["bytes"], len(said["files"])) == ("complete", nbytes, n)
    taken = quantkit("verify", "R 1.gguf", "--write-manifest", shards[2], "--force", cwd=tmp_path)
    assert taken.returncode == 7
    assert "is one of the files read and would be overwritten" in taken.stderr
    shards[1].unlink()
    done = quantkit("status", "R 1.gguf", cwd=tmp_path)
    assert done.stdout == (
        f"R 1.gguf: 4 of 5 shards are there, {shards[1].name} is not, and no build of it is unfinished\n"
    )
    (tmp_path / shard_name("R 1", 0, 9)).write_bytes(b"")
    done = quantkit("verify", "R 1.gguf", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "Error: R 1.gguf: several sets of shards have that name: R 1-00001-of-00005.gguf, R 1-00001-of-00009.gguf; "
        "give the first shard of one"
    )  # fmt: skip
    done = quantkit("status", "R2.gguf", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        7, "error: R2.gguf: there is neither such a file nor an unfinished build of it\n"
    )  # fmt: skip


def test_home_in_an_options_value(quantkit: Run, place: Path, tmp_path: Path) -> None:
    """A shell leaves ~ alone in --option=~/name."""
    home = {"HOME": str(place)}
    done = quantkit("build", "~/m.gguf", "--recipe=~/r.yaml", f"--output={tmp_path}/o.gguf", "-q", env=home)
    assert done.returncode == 0, done.stderr
    assert quantkit("recipe", "lint", "~/r.yaml", "-m", "~/m.gguf", env=home).stdout == f"{WARNS}\n"
    done = quantkit("recipe", "new", "~/new.yaml", env={"HOME": str(tmp_path)})
    assert (tmp_path / "new.yaml").is_file(), done.stderr


def test_a_tokenizer_that_nobody_knows(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    """What asks only for types and sizes does without; --pre and --pad-token are understood everywhere."""
    (tmp_path / "t.txt").write_text("output.weight=q8_0\n")
    runs = [
        ("fit", tiny_v3, "-r", "Q8_0", "--vram", "24"),
        ("sizes", "table", tiny_v3, "-r", "Q8_0"),
        ("recipe", "export", "Q8_0", "--format", "tensor-types", "-m", tiny_v3),
        ("recipe", "import", "t.txt", "--format", "tensor-types", "-m", tiny_v3, "--file-type", "Q8_0"),
        ("recipe", "diff", "Q8_0", "Q6_K", "-m", tiny_v3),
        ("recipe", "explain", "Q8_0", "output.weight", "-m", tiny_v3),
        ("recipe", "lint", "Q8_0", "-m", tiny_v3),
    ]
    for run in runs:
        for pre in ((), ("--pre", "deepseek-v3", "--pad-token", "1")):
            done = quantkit(*run, *pre, cwd=tmp_path)
            assert done.returncode == 0, (run, done.stderr)
        done = quantkit(*run, "--pre", "nobody", cwd=tmp_path)
        assert done.returncode == 4, run
        assert done.stderr.startswith("error: --pre: "), done.stderr


# ---------------------------------------------------------------- commands that are not there

NO_COMMANDS = {
    "convert": "you want `quantkit build SOURCE -o OUT.gguf -r RECIPE`",
    "convert_hf_to_gguf.py": "you want `quantkit build SOURCE -o OUT.gguf -r RECIPE`",
    "quantize": "you want `quantkit build SOURCE -o OUT.gguf -r RECIPE`",
    "llama-quantize": "you want `quantkit build SOURCE -o OUT.gguf -r RECIPE`",
    "lint": "you want `quantkit recipe lint`",
    "version": "you want `quantkit --version`",
    "llama-imatrix": "you want `quantkit imatrix make`",
    "perplexity": "you want `quantkit eval compare`",
    "check": "you want `quantkit sizes check` or `quantkit imatrix check` or `quantkit tokenizer check`",
    "imatrx": "did you mean imatrix?",
    "buidl": "did you mean build?",
    "completion": "you want the shell's completion: docs/completion.md says how",
    "recipe check": "you want `quantkit recipe lint`",
    "recipe verify": "you want `quantkit verify`",
    "recipe explian": "did you mean explain?",
    "cache clear": "you want `quantkit cache prune`",
}


@pytest.mark.parametrize(("typed", "says"), NO_COMMANDS.items(), ids=list(NO_COMMANDS))
def test_a_command_that_is_not_there(quantkit: Run, typed: str, says: str) -> None:
    done = quantkit(*typed.split(), "x", "--y")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"Error: there is no command '{typed.rsplit(maxsplit=1)[-1]}': {says}"


def test_a_model_in_the_place_of_a_command(quantkit: Run, place: Path) -> None:
    done = quantkit("m.gguf", cwd=place)
    assert done.stderr.splitlines()[-1] == (
        "Error: there is no command 'm.gguf': it is a file or folder: you want `quantkit inspect m.gguf` or `quantkit "
        "build m.gguf -o OUT.gguf`"
    )


def test_names_that_the_shell_made_of_a_pattern(quantkit: Run, place: Path) -> None:
    done = quantkit("plan", "deepseek-r1", "-r", "r.yaml", "m.gguf", cwd=place)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "Error: Got unexpected extra argument (m.gguf); if the shell made several names of a pattern with *, ? or "
        "[ ], put it in quotes"
    )  # fmt: skip
    done = quantkit("plan", "deepseek-r1", "nothing", "-r", "UD-IQ1_S", cwd=place)
    assert done.stderr.splitlines()[-1] == "Error: Got unexpected extra argument (nothing)"


def test_a_command_like_none(quantkit: Run) -> None:
    done = quantkit("cache", "xyzzy")
    assert done.stderr.splitlines()[-1] == "Error: there is no command 'xyzzy'; there are show, prune"


def test_every_command_that_is_suggested_is_there() -> None:
    from command_tree import commands

    from quantkit.cli import unknown

    names = {name for name, _ in commands()} | {"--help", "--version", "build --restart", "build --resume"}
    names.add(unknown._BUILD)
    assert {to for to in unknown._MEANT.values() if ": " not in to} <= names
    for group, of in unknown._MEANT_IN.items():
        assert {f"{group} {to}" for to in of.values()} <= names
    assert sys.version_info >= (3, 10)

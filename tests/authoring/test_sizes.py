"""The sizes lock: writing, reading, drift, and its reports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree as Xml

import factory
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from quantkit.authoring.sizes import compare, report
from quantkit.authoring.sizes.lock import Cell, Key, Lock, Matrix, count_of, dump, groups, parse, read_lock, ungroup
from quantkit.base.errors import OutputError, RecipeError, SourceError
from quantkit.cli import cli
from quantkit.gguf.header import STRING, kv
from quantkit.gguf.types import QTYPES
from quantkit.model.families.known import MODELS
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.recipe.named import shipped

ROOT = Path(__file__).parents[2]
#: tensor data of the files published in January 2025, in bytes
PUBLISHED = {
    "UD-IQ1_S": 140_226_135_552,
    "UD-IQ1_M": 168_910_980_608,
    "UD-IQ2_XXS": 196_157_179_392,
    "UD-Q2_K_XL": 226_596_292_096,
}
RECIPE = """\
name: mine
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - match: "blk.*.ffn_down_exps.weight"
    layers: "moe[:1]"
    type: Q6_K
    why: early
  - match: "*.weight"
    type: Q4_K
    why: the rest
"""


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["sizes", *args])


def good(*args: str) -> str:
    done = run(*args)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with recipes/mine.yaml and the config.json of a tiny model of 3 layers."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(factory.TINY_V3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return tmp_path


@pytest.fixture
def locked(place: Path) -> Path:
    """A lock of the recipe on the tiny model, in both layouts."""
    out = good("update", "-r", "recipes/mine.yaml", "-m", "tiny/config.json")
    assert out == "quantkit-sizes.yaml: 2 sizes written\n"
    return place / "quantkit-sizes.yaml"


def change(text: str, by: str, path: Path = Path("recipes/mine.yaml")) -> None:
    was = path.read_text()
    assert text in was
    path.write_text(was.replace(text, by))


ONE_TENSOR = 'rules:\n  - {match: blk.1.attn_q_a.weight, type: Q5_K, why: "a, 50% trial: one tensor"}\n'


# ---------------------------------------------------------------- the lock


def test_the_lock_as_written(locked: Path) -> None:
    catalogue = open_model("tiny/config.json", Options("kv_b"))
    expected = {}
    for t in catalogue.tensors:
        if not t.quantizable:
            expected[t.name] = t.n_elements * 4
        elif t.n_cols % 256:  # attn_output: Q4_K falls back to Q5_0
            expected[t.name] = t.n_elements // 32 * 22
        else:
            expected[t.name] = t.n_elements // 256 * (210 if t.name == "blk.1.ffn_down_exps.weight" else 144)
    cell = read_lock(locked).cells[1]
    assert str(cell.cell) == "recipes/mine.yaml on tiny/config.json (kv_b)"
    assert cell.tensor_bytes == sum(expected.values()) == sum(cell.roles.values())
    assert cell.file_bytes is None
    assert cell.roles["routed expert"] == sum(n for name, n in expected.items() if "_exps" in name)
    assert sum(cell.types.values()) == len(expected)
    text = locked.read_text()
    assert "\n    blk.1.ffn_down_exps.weight: Q6_K\n" in text
    assert (
        "\n    blk.{1-2}.{ffn_down_shexp,ffn_gate_exps,ffn_gate_shexp,ffn_up_exps,ffn_up_shexp}.weight: Q4_K\n" in text
    )
    assert "  recipes: [recipes/mine.yaml]\n  models: [tiny/config.json]\n  layouts: [k_b+v_b, kv_b]\n" in text
    assert yaml.safe_load(text)["cells"][1]["tensor_bytes"] == cell.tensor_bytes


def test_the_same_again_is_the_same_text(locked: Path) -> None:
    was = locked.read_text()
    assert good("update") == "quantkit-sizes.yaml: 2 sizes: 2 as before, 0 moved, 0 new, 0 gone\n"
    assert locked.read_text() == was
    assert good("check") == "2 sizes as in quantkit-sizes.yaml\n"
    assert [p.name for p in locked.parent.iterdir() if p.is_file()] == ["quantkit-sizes.yaml"]


def test_json_by_the_name(place: Path) -> None:
    good("update", "lock.json", "-r", "recipes/mine.yaml", "-m", "tiny/config.json")
    found = json.loads((place / "lock.json").read_text())
    assert found["cells"][0]["cell"]["layout"] == "k_b+v_b"
    assert good("check", "lock.json") == "2 sizes as in lock.json\n"


def test_paths_are_relative_to_the_lock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "data").mkdir()
    good("update", "data/lock.yaml", "-r", "recipes/*.yaml", "-m", "tiny/config.json", "--layout", "kv_b")
    assert read_lock(place / "data/lock.yaml").matrix == Matrix(
        recipes=["../recipes/*.yaml"], models=["../tiny/config.json"], layouts=["kv_b"]
    )
    monkeypatch.chdir(place / "tiny")
    assert good("check", "../data/lock.yaml") == "1 size as in ../data/lock.yaml\n"


def test_a_gguf_has_a_file_size(place: Path, tiny_bf16: Path, quantkit: Run) -> None:
    good("update", "-r", "recipes/mine.yaml", "-m", str(tiny_bf16))
    (cell,) = read_lock(Path("quantkit-sizes.yaml")).cells  # the layout is the file's own: once
    assert cell.cell.layout == "k_b+v_b"
    done = quantkit("build", tiny_bf16, "-o", place / "o.gguf", "--recipe", place / "recipes/mine.yaml")
    assert done.returncode == 0, done.stderr
    assert cell.file_bytes == (place / "o.gguf").stat().st_size


def test_the_default_is_all_on_r1(place: Path) -> None:
    good("update")
    lock = read_lock(Path("quantkit-sizes.yaml"))
    assert lock.matrix == Matrix(recipes=["all"], models=["deepseek-r1"], layouts=["k_b+v_b", "kv_b"])
    found = {c.cell.recipe: c.tensor_bytes for c in lock.cells if c.cell.layout == "kv_b"}
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


def test_all_recipes_on_all_models_in_seconds(place: Path) -> None:
    begin = time.process_time()
    lock = compare.make_lock(Matrix(recipes=["all"], models=["all"]), place)
    assert time.process_time() - begin < 10
    assert {c.cell.recipe for c in lock.cells} == set(shipped())
    shapes = {MODELS[c.cell.model] for c in lock.cells}
    assert {"deepseek-r1", "deepseek-v2", "deepseek-v2-lite"} <= shapes


def test_recipes_of_other_archs_are_left_out(place: Path) -> None:
    (place / "other.yaml").write_text(RECIPE.replace("deepseek2", "llama"))
    good("update", "-r", "other.yaml", "-r", "recipes/mine.yaml", "-m", "tiny/config.json")
    assert {c.cell.recipe for c in read_lock(Path("quantkit-sizes.yaml")).cells} == {"recipes/mine.yaml"}
    done = run("update", "none.yaml", "-r", "other.yaml", "-m", "tiny/config.json")
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception) == "no recipe of other.yaml is for a model of tiny/config.json: nothing to lock"
    assert not Path("none.yaml").exists()


names = st.lists(
    st.tuples(st.integers(0, 70), st.sampled_from(["a.weight", "b.weight", "b.bias", "c", "d_exps.weight"])),
    unique=True,
)


@given(names, st.randoms(use_true_random=False))
def test_groups_and_back(chosen: list[tuple[int, str]], rng: object) -> None:
    types = {f"blk.{i}.{rest}": rng.choice(["Q4_K", "F32"]) for i, rest in chosen}  # type: ignore[attr-defined]
    types |= {"output.weight": "Q6_K", "blk.07.a.weight": "F32", "blk.x": "F16"}
    grouped = groups(types.items())
    assert ungroup(grouped) == types
    assert sum(map(count_of, grouped)) == len(types)


words = st.text(st.characters(codec="utf-8"), min_size=1)


@given(words, words, words, st.booleans())
def test_any_name_survives(recipe: str, model: str, error: str, as_json: bool) -> None:
    cells = [Cell(cell=Key(recipe=recipe, model=model, layout="kv_b"), error=error)]
    cells.append(Cell(cell=Key(recipe=recipe, model=model, layout="k_b+v_b"), types={"F32": 1}, tensors={model: "F32"}))
    lock = Lock(matrix=Matrix(recipes=[recipe, "null", "12", "no"], models=[model]), cells=cells)
    text = dump(lock, as_json)
    if not re.search(r"^(<<<<<<<|=======|>>>>>>>)", text, re.M) and count_of(model) == 1:
        assert parse(text, "f") == lock


# ---------------------------------------------------------------- drift


def test_one_tensor_is_named(locked: Path) -> None:
    change("rules:\n", ONE_TENSOR)
    shape = next(t for t in open_model("tiny/config.json").tensors if t.name == "blk.1.attn_q_a.weight")
    delta = shape.n_elements // 256 * (176 - 144)
    done = run("check")
    assert done.exit_code == 1
    before = read_lock(locked).cells[0]
    share = 100 * delta / before.tensor_bytes
    attention = before.roles["attention"]
    assert done.output.startswith(
        "recipes/mine.yaml on tiny/config.json (k_b+v_b): moved: "
        f"{before.tensor_bytes:,} -> {before.tensor_bytes + delta:,} bytes (+{delta:,}, +{share:.3f} %)\n"
        f"  attention: {attention:,} -> {attention + delta:,} bytes (+{delta:,})\n"
        f"  blk.1.attn_q_a.weight: Q4_K -> Q5_K, +{delta:,} bytes, by mine.yaml:5 rules[0]\n"
        "\n"
        "recipes/mine.yaml on tiny/config.json (kv_b): moved: "
    )
    assert done.output.endswith(
        "\n2 of 2 sizes drifted from quantkit-sizes.yaml; if it was meant, run `quantkit sizes update` "
        "and commit the lock\n"
    )
    assert good("update") == "quantkit-sizes.yaml: 2 sizes: 0 as before, 2 moved, 0 new, 0 gone\n"
    assert good("check").startswith("2 sizes as in ")


def test_layers_of_one_change_are_one_line(locked: Path) -> None:
    change("moe[:1]", "moe[2:]")
    change("why: early", "why: late\n    optional: true")
    output = run("check").output
    assert len(re.findall(r"^  blk\.1\.ffn_down_exps\.weight: Q6_K -> Q4_K, -[\d,]+ bytes", output, re.M)) == 2
    change("moe[2:]", "moe")
    assert re.search(r"^  blk\.2\.ffn_down_exps\.weight: Q4_K -> Q6_K, \+", run("check").output, re.M)
    change('"blk.*.ffn_down_exps.weight"', '"blk.*.ffn_{gate,up}_exps.weight"')
    assert "  blk.{1-2}.ffn_gate_exps.weight: Q4_K -> Q6_K, +" in run("check").output


def test_a_change_of_type_alone_is_a_drift(locked: Path) -> None:
    assert QTYPES["Q4_K"].bits == QTYPES["Q4_0"].bits
    change("rules:\n", ONE_TENSOR.replace("Q5_K", "Q4_0"))
    done = run("check")
    assert done.exit_code == 1
    assert " MB as before, otherwise made up\n" in done.output
    assert "  blk.1.attn_q_a.weight: Q4_K -> Q4_0, 0 bytes, by mine.yaml:5 rules[0]\n" in done.output
    assert run("check", "--tolerance", "0.1%").exit_code == 0


def test_tolerance_is_a_share_of_the_bytes_before(locked: Path) -> None:
    change("rules:\n", ONE_TENSOR)
    lock = read_lock(locked)
    (first, _) = compare.compare(lock, locked).changes
    assert first.before is not None
    exact = Fraction(first.delta, first.before.tensor_bytes)
    assert compare.compare(lock, locked, exact).changes[0].status == "tolerated"
    assert compare.compare(lock, locked, exact * Fraction(999_999, 1_000_000)).changes[0].status == "moved"
    text = good("check", "--tolerance", "5%")
    assert ": tolerated: " in text
    assert text.endswith("\n2 sizes as in quantkit-sizes.yaml, 2 within the tolerance of 5 %\n")


@pytest.mark.parametrize("value", ["-1%", "101%", "x", "1e-3", "0.1%%", ""])
def test_wrong_tolerance(value: str) -> None:
    done = run("check", f"--tolerance={value}")
    assert done.exit_code == 2
    assert "is not a percentage from 0 to 100, such as 0.1%" in done.output


def test_new_and_vanished_recipes(place: Path) -> None:
    good("update", "-r", "recipes/*.yaml", "-m", "tiny/config.json", "--layout", "kv_b")
    Path("recipes/mine.yaml").rename("recipes/yours.yaml")
    done = run("check", "--tolerance", "50%")
    assert done.exit_code == 1
    found = read_lock(Path("quantkit-sizes.yaml")).cells[0].tensor_bytes
    assert (
        f"recipes/yours.yaml on tiny/config.json (kv_b): new: {found:,} bytes = {found / 2**20:.2f} MiB = "
        in done.output
    )
    assert (
        f"recipes/mine.yaml on tiny/config.json (kv_b): vanished: {found:,} bytes = {found / 2**20:.2f} MiB = "
        in done.output
    )
    assert "2 of 2 sizes drifted" in done.output
    assert good("update") == "quantkit-sizes.yaml: 1 size: 0 as before, 0 moved, 1 new, 1 gone\n"


def test_a_recipe_that_no_longer_works(locked: Path) -> None:
    change("ffn_down_exps", "ffn_down_expss")
    done = run("check")
    assert done.exit_code == 1
    what = "rules[0].match: 'blk.*.ffn_down_expss.weight' matches no tensor (did you mean blk.*.ffn_down_exps.weight?)"
    assert f"(kv_b): cannot be planned\n  mine.yaml:5 {what} (it could be planned before)\n" in done.output
    done = run("update")
    assert done.exit_code == 0
    assert (
        f"warning: recipes/mine.yaml on tiny/config.json (kv_b) cannot be planned, and is locked so: mine.yaml {what}"
        in (done.output)
    )
    # a comment moves the line, but is no drift
    change("name: mine", "# a comment\nname: mine")
    assert good("check").startswith("2 sizes as in ")
    change("ffn_down_expss", "ffn_down_exps")
    assert "(kv_b): can be planned now\n  it could not be planned before: mine.yaml rules[0]" in run("check").output


def test_another_shape_of_the_model(locked: Path) -> None:
    config = json.loads(Path("tiny/config.json").read_text())
    Path("tiny/config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    output = run("check").output
    assert re.search(r"^  the model has [\d,]+ elements, and had [\d,]+$", output, re.M)
    assert re.search(r"^  embedding: [\d,]+ -> [\d,]+ bytes \(\+18,432\)$", output, re.M)
    Path("tiny/config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    output = run("check").output
    assert re.search(
        r"^  blk\.3\.ffn_up_exps\.weight: new, Q4_K, \+[\d,]+ bytes, by mine\.yaml:9 rules\[1\]$", output, re.M
    )
    assert re.search(
        r"^  blk\.3\.attn_norm\.weight: new, F32, \+1,024 bytes, by no rule: never quantized$", output, re.M
    )
    Path("tiny/config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "  blk.2.ffn_up_exps.weight: vanished, was Q4_K\n" in run("check").output


def test_a_change_of_metadata_alone(place: Path) -> None:
    def model(name: str) -> None:
        keys = [kv("general.architecture", STRING, "deepseek2"), kv("general.name", STRING, name)]
        factory.gguf_file(place / "m.gguf", {"output.weight": ((256, 2), "F32", bytes(2048))}, keys)

    Path("recipes/mine.yaml").write_text(
        RECIPE.replace('"blk.*.ffn_down_exps.weight"', "blk.*").replace("why: early", "why: e\n    optional: true")
    )
    model("short")
    good("update", "-r", "recipes/mine.yaml", "-m", "m.gguf")
    (cell,) = read_lock(Path("quantkit-sizes.yaml")).cells
    assert (cell.tensor_bytes, cell.cell.layout) == (2 * 144, "as is")
    model("a good deal longer, by fifty bytes or thereabouts, all in all")
    done = run("check")
    assert done.exit_code == 1
    assert ": moved: 288 bytes as before, otherwise made up\n" in done.output
    m = re.search(r"^  the file: ([\d,]+) bytes before, ([\d,]+) bytes now$", done.output, re.M)
    assert m
    assert int(m[1].replace(",", "")) == cell.file_bytes
    assert int(m[2].replace(",", "")) > int(m[1].replace(",", ""))


# ---------------------------------------------------------------- a lock that is not right


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("version: 1", "version: 9", ":2: version: input should be 1"),
        ("matrix:", "matrixx:", ":2: matrix: field required"),
        (
            "tensor_bytes: ",
            "tensor_bytes: 1",
            ":13: recipes/mine.yaml on tiny/config.json (k_b+v_b): the roles add up to ",
        ),
        ("tensor_bytes: ", "tensor_bytes: x", ":11: cells[0].tensor_bytes: input should be a valid integer"),
        ("blk.{1-2}.", "blk.{1-3}.", ":14: recipes/mine.yaml on tiny/config.json (k_b+v_b): "),
        ("blk.{1-2}.", "blk.{1-99999999}.", ":14: recipes/mine.yaml on tiny/config.json (k_b+v_b): "),
        ("token_embd.weight: Q4_K", "token_embd.weight: Q4_KK", ": unknown type 'Q4_KK' (did you mean Q4_K?)"),
        ("token_embd.weight: Q4_K", "token_embd.weight: Q6_K", "tensors of Q4_K are listed, but "),
        ("layout: kv_b}", "layout: k_b+v_b}", " occurs twice"),
        ("layouts: [k_b+v_b, ", "layouts: [kb, ", ":6: unknown layout 'kb' (did you mean kv_b?)"),
        ("cells:", "cells: &a", ""),
        ("cells:\n", "cells:\n<<<<<<< HEAD\n", ":8: holds an unresolved merge conflict"),
        ("cells:\n", "cells: [\n", "not valid YAML: "),
        ("version: 1", "version: 1\nversion: 1", ":3: 'version' occurs twice"),
        ("matrix:", "[1]: 2\nmatrix:", ":3: a key must be text"),
    ],
)
def test_damaged_locks(locked: Path, old: str, new: str, error: str) -> None:
    change(old, new, locked)
    done = run("check")
    if not error:  # an anchor that nothing refers to
        assert done.exit_code == 0
        return
    assert isinstance(done.exception, SourceError)
    message = str(done.exception)
    assert message.startswith("quantkit-sizes.yaml:")
    assert error in message
    assert "\n" not in message
    # update refuses it too, unless told what to write
    assert isinstance(run("update").exception, SourceError)
    good("update", "-r", "recipes/mine.yaml", "-m", "tiny/config.json")
    assert good("check").startswith("2 sizes as in ")


@pytest.mark.parametrize(
    "text", ["", "[]", "a", "a: &x [1]\nb: *x", "[" * 300_000, "- " * 300_000, "\x00", "a: \x07", "%YAML 9\n---\n"]
)
def test_hostile_locks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock.yaml"
    path.write_text(text)
    with pytest.raises(SourceError, match=r"lock\.yaml:(\d+:)? "):
        read_lock(path)


def test_missing_and_unreadable_locks(place: Path) -> None:
    done = run("check")
    assert str(done.exception) == (
        "quantkit-sizes.yaml: there is no such sizes lock; make it with `quantkit sizes update quantkit-sizes.yaml`"
    )
    Path("latin").write_bytes(b"\xe9")
    assert str(run("check", "latin").exception).startswith("latin: is not UTF-8 text: ")
    assert str(run("check", "tiny").exception) == "tiny: cannot be read: Is a directory"
    done = run("update", "tiny", "-r", "recipes/mine.yaml", "-m", "tiny/config.json")
    assert str(done.exception) == (
        "tiny: is a directory; give the name of the file to make, such as tiny/quantkit-sizes.yaml"
    )
    done = run("update", "no/such.yaml", "-r", "recipes/mine.yaml", "-m", "tiny/config.json")
    assert isinstance(done.exception, OutputError)
    assert str(done.exception) == "no/such.yaml: there is no directory no; create it first"


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ("UD-IQ1", "no shipped recipe is called 'UD-IQ1' (did you mean UD-IQ1_S?); there are "),
        ("XX-*", "no shipped recipe matches 'XX-*'; there are "),
        ("no/*.yaml", "no file in . matches 'no/*.yaml'"),
        ("no.yaml", "no.yaml: cannot be read: No such file or directory"),
    ],
)
def test_wrong_recipes(place: Path, recipe: str, error: str) -> None:
    done = run("update", "-r", recipe, "-m", "tiny/config.json")
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception).startswith(error)
    assert not Path("quantkit-sizes.yaml").exists()


def test_globs_of_shipped_recipes(place: Path) -> None:
    assert compare.expand_recipes(["ud-iq1_*", "UD-iq1_s"], place) == [n for n in shipped() if n.startswith("UD-IQ1_")]
    assert compare.expand_recipes(["all"], place) == list(shipped())


# ---------------------------------------------------------------- forms of the report


def unescaped(text: str, codes: Mapping[str, str]) -> str:
    for code, char in codes.items():
        text = text.replace(code, char)
    return text.replace("%25", "%")


def workflow_command(line: str) -> tuple[str, dict[str, str], str]:
    """A line as GitHub's runner reads it: (command, properties, message)."""
    m = re.fullmatch(r"::([a-z]+)(?: (.*?))?::(.*)", line)
    assert m, line
    pairs = [pair.split("=", 1) for pair in m[2].split(",")] if m[2] else []
    data = {"%0D": "\r", "%0A": "\n"}
    return m[1], {k: unescaped(v, data | {"%3A": ":", "%2C": ","}) for k, v in pairs}, unescaped(m[3], data)


@given(words, words)
def test_workflow_commands_carry_any_text(title: str, message: str) -> None:
    line = report.command("error", {"file": "a", "title": title}, message)
    assert workflow_command(line.replace("\x85", "").replace("\u2028", "")) is not None
    assert "\n" not in line
    assert "\r" not in line
    head, _, rest = line.removeprefix("::error ").partition("::")
    assert head.count(",") == 1
    assert unescaped(rest, {"%0D": "\r", "%0A": "\n"}) == message
    assert unescaped(head.split(",")[1][6:], {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ","}) == title


def test_github(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("before\n")
    change("rules:\n", ONE_TENSOR)
    done = run("check", "--format", "github")
    assert done.exit_code == 1
    first, second, verdict = done.output.splitlines()
    kind, properties, message = workflow_command(first)
    assert kind == "error"
    assert properties == {
        "file": "recipes/mine.yaml",
        "line": "5",
        "title": "sizes: recipes/mine.yaml on tiny/config.json (k_b+v_b)",
    }
    assert re.search(r"^blk\.1\.attn_q_a\.weight: Q4_K -> Q5_K, ", message, re.M)
    assert workflow_command(second)[1]["line"] == "5"
    assert verdict.startswith("2 of 2 sizes drifted")
    summary = Path("summary.md").read_text()
    assert summary.startswith("before\n### quantkit sizes\n")
    assert "| recipes/mine.yaml | tiny/config.json | kv_b | moved | " in summary
    assert run("check", "--format", "github", "--tolerance", "5%").output.startswith(
        "::warning file=recipes/mine.yaml,line=5,"
    )


def test_github_without_a_rule(place: Path) -> None:
    good("update", "-r", "recipes/*.yaml", "-m", "tiny/config.json", "--layout", "kv_b")
    Path("recipes/mine.yaml").rename("recipes/yours.yaml")
    new, vanished, _ = run("check", "--format", "github").output.splitlines()
    assert workflow_command(new)[1]["file"] == "recipes/yours.yaml"
    assert workflow_command(vanished)[1]["file"] == "quantkit-sizes.yaml"


def test_github_says_what_it_does_not_show() -> None:
    keys = [Key(recipe=f"r{i}", model="m", layout="kv_b") for i in range(12)]
    changes = tuple(compare.Change(k, compare.ChangeStatus.VANISHED, Cell(cell=k), None, (), "gone", "") for k in keys)
    *commands, hidden, _ = report.github(compare.Comparison("f", Fraction(0), changes)).splitlines()
    assert [workflow_command(c)[1]["title"] for c in commands] == [f"sizes: {k}" for k in keys]
    assert hidden == "GitHub shows 10 annotations a step: 2 more are in this log and the summary"


#: the schema of Ant's JUnit task (JUnit.xsd), which CI systems read: element -> (required attributes, optional
#: attributes, children in order)
SCHEMA: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": (set(), set(), ["testsuite"]),
    "testsuite": (
        {"name", "timestamp", "hostname", "tests", "failures", "errors", "time", "package", "id"},
        {"skipped"},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": ({"name", "classname", "time"}, set(), ["error", "failure"]),
    "error": ({"type"}, {"message"}, []),
    "failure": ({"type"}, {"message"}, []),
    "system-out": (set(), set(), []),
    "system-err": (set(), set(), []),
}


def validate_junit(e: Xml.Element) -> None:
    required, optional, children = SCHEMA[e.tag]
    assert required <= set(e.keys()) <= required | optional, e.tag
    at = [children.index(child.tag) for child in e]
    assert at == sorted(at), e.tag
    for child in e:
        validate_junit(child)
    for name in set(e.keys()) & {"tests", "failures", "errors", "skipped", "id", "time"}:
        assert re.fullmatch(r"\d+", e.attrib[name])
    if e.tag == "testsuite":
        assert [c.tag for c in e].count("properties") == 1
        assert [c.tag for c in e][-2:] == ["system-out", "system-err"]
        assert int(e.attrib["tests"]) == len(e.findall("testcase"))
        assert int(e.attrib["errors"]) == len(e.findall("testcase/error"))
        assert int(e.attrib["failures"]) == len(e.findall("testcase/failure"))
        datetime.strptime(e.attrib["timestamp"], "%Y-%m-%dT%H:%M:%S")
    for name in set(e.keys()) & {"name", "classname", "package", "hostname"}:  # xs:token
        assert e.attrib[name] == " ".join(e.attrib[name].split()) != ""


def test_junit(locked: Path) -> None:
    change("rules:\n", ONE_TENSOR)
    done = run("check", "--format", "junit", "-o", "report.xml")
    assert done.exit_code == 1
    assert done.output == run("check").output
    root = Xml.parse("report.xml").getroot()
    validate_junit(root)
    cases = root.findall("testsuite/testcase")
    assert [(c.attrib["classname"], c.attrib["name"]) for c in cases] == [
        ("sizes.recipes/mine.yaml", "tiny/config.json (k_b+v_b)"),
        ("sizes.recipes/mine.yaml", "tiny/config.json (kv_b)"),
    ]
    failure = cases[0].find("failure")
    assert failure is not None
    assert failure.text is not None
    assert failure.attrib["message"].startswith("moved: ")
    assert "blk.1.attn_q_a.weight: Q4_K -> Q5_K" in failure.text
    good("update")
    root = Xml.fromstring(good("check", "--format", "junit"))
    validate_junit(root)
    assert root.find("testsuite/testcase/failure") is None


def test_junit_of_names_that_xml_cannot_hold() -> None:
    key = Key(recipe="a\x01<b>", model="m\ufffe &", layout="kv_b")
    changes = (compare.Change(key, compare.ChangeStatus.VANISHED, Cell(cell=key), None, (), "gone \x00", ""),)
    text = report.junit(compare.Comparison("f", Fraction(0), changes), "2025-01-27T12:00:00")
    root = Xml.fromstring(text)
    validate_junit(root)
    assert root.find("testsuite/testcase").attrib["classname"] == "sizes.a\ufffd<b>"  # type: ignore[union-attr]


def test_json_report(locked: Path) -> None:
    change("rules:\n", ONE_TENSOR)
    found = json.loads(run("check", "--format", "json").output)
    assert (found["lock"], found["drifted"], found["tolerance_percent"]) == ("quantkit-sizes.yaml", 2, 0)
    cell = found["cells"][0]
    assert cell["delta_bytes"] == cell["after"]["tensor_bytes"] - cell["before"]["tensor_bytes"] > 0
    assert cell["moves"] == [
        {
            "tensors": "blk.1.attn_q_a.weight",
            "n": 1,
            "before": "Q4_K",
            "after": "Q5_K",
            "nbytes": cell["delta_bytes"],
            "rule": "mine.yaml:5 rules[0]",
        }
    ]


def test_markdown(locked: Path) -> None:
    change("rules:\n", ONE_TENSOR)
    done = run("check", "--format", "markdown", "-o", "report.md")
    assert done.exit_code == 1
    lines = Path("report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {9}
    assert "**`recipes/mine.yaml on tiny/config.json (kv_b)`**" in lines


# ---------------------------------------------------------------- the size table


def test_table(place: Path) -> None:
    lines = good("table", "deepseek-r1", "--layout", "kv_b").splitlines()
    rows = {line.split()[0]: line.split()[-5:] for line in lines[4:]}
    assert rows.keys() >= PUBLISHED.keys()
    for name, nbytes in PUBLISHED.items():
        assert rows[name][:3] == [f"{nbytes:,}", f"{nbytes / 2**30:.2f}", f"{nbytes / 1e9:.2f}"]
    assert rows["UD-IQ1_S"][3:] == ["1.67", "1.58"]  # the published name states the experts' bits
    sorted_bytes = [int(r[0].replace(",", "")) for r in rows.values()]
    assert sorted_bytes == sorted(sorted_bytes)
    assert lines[2].endswith("bits of routed experts")


def test_table_has_the_recipes_for_any_arch(place: Path) -> None:
    found = json.loads(good("table", "deepseek-r1", "--format", "json"))
    assert {row["recipe"] for row in found["recipes"]} == set(shipped())
    # also by their aliases, each once
    some = json.loads(good("table", "deepseek-r1", "-r", "Q4_K", "-r", "15", "-r", "q5_k", "--format", "json"))
    assert [(row["recipe"], row["tensor_bytes"]) for row in some["recipes"]] == [
        ("Q4_K_M", 404_488_847_360),
        ("Q5_K_M", 475_423_236_096),
    ]


def test_table_of_some(place: Path) -> None:
    found = json.loads(good("table", "tiny/config.json", "-r", "recipes/mine.yaml", "--format", "json"))
    assert found["model"] == "tiny"
    (row,) = found["recipes"]
    assert row["role"] == "routed expert"
    # six equal matrices of experts, one of them in Q6_K
    assert row["bits"] == round((5 * 4.5 + 6.5625) / 6, 4)
    assert good("table", "deepseek-r1", "-r", "UD-IQ1_?", "--format", "markdown").count("\n") == 4


def test_table_of_a_dense_model(place: Path) -> None:
    config = {**factory.TINY_V3, "n_routed_experts": None, "n_shared_experts": None}
    Path("tiny/config.json").write_text(json.dumps(config))
    Path("dense.yaml").write_text(RECIPE.replace("ffn_down_exps", "ffn_down").replace("moe[:1]", "dense[:1]"))
    lines = good("table", "tiny/config.json", "-r", "dense.yaml").splitlines()
    assert lines[2].endswith("  bits of the ffn")
    # three layers of three equal matrices, one of them in Q6_K
    assert lines[4].endswith(f"  {(8 * 4.5 + 6.5625) / 9:.2f}")


def test_table_says_what_cannot_be_planned(place: Path) -> None:
    change("ffn_down_exps", "ffn_down_expss")
    output = good("table", "tiny/config.json", "-r", "recipes/mine.yaml")
    assert "note: recipes/mine.yaml cannot be planned: mine.yaml:5 rules[0].match: " in output
    change("deepseek2", "llama")
    done = run("table", "tiny/config.json", "-r", "recipes/mine.yaml")
    assert str(done.exception) == "tiny is a deepseek2, and no recipe of recipes/mine.yaml is for that"


# ---------------------------------------------------------------- as a user, and in CI


def test_exit_codes(quantkit: Run, locked: Path) -> None:
    assert quantkit("sizes", "check", cwd=locked.parent).returncode == 0
    change("rules:\n", ONE_TENSOR)
    done = quantkit("sizes", "check", cwd=locked.parent)
    assert (done.returncode, done.stderr) == (1, "")
    os.unlink(locked)
    assert quantkit("sizes", "check", cwd=locked.parent).returncode == 4


def test_the_action_runs_commands_that_exist() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    steps = action["runs"]["steps"]
    assert all(("uses" in s) != ("run" in s) and ("run" not in s or s["shell"] == "bash") for s in steps)
    run_line = steps[-1]["run"]
    options = {o for p in cli.commands["sizes"].commands["check"].params for o in p.opts}  # type: ignore[attr-defined]
    assert run_line.startswith("quantkit sizes check ")
    assert set(re.findall(r"--[a-z]+", run_line)) <= options
    # inputs reach the shell as variables, never as part of the script
    assert not any("${{" in s.get("run", "") for s in steps)
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(action["inputs"])


@pytest.mark.parametrize("inputs", [("sub dir", ""), (".", "sub dir/a lock.yaml"), ("sub dir", "a lock.yaml")])
def test_the_action_runs(locked: Path, inputs: tuple[str, str]) -> None:
    """Run its last step, with the inputs as GitHub's runner passes them."""
    root = locked.parent
    (root / "sub dir").mkdir()
    for name in ("recipes", "tiny"):
        (root / name).rename(root / "sub dir" / name)
    (root / ".git").mkdir()
    folder, file = inputs
    locked.rename(root / "sub dir" / ("a lock.yaml" if file else locked.name))
    step = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"][-1]
    bin_ = root / "bin"
    bin_.mkdir()
    (bin_ / "quantkit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m quantkit "$@"\n')
    (bin_ / "quantkit").chmod(0o755)
    change("rules:\n", ONE_TENSOR, root / "sub dir" / "recipes" / "mine.yaml")
    values = {"working-directory": folder, "file": file, "tolerance": ""}

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda m: values[m[1]], text)

    env = {k: filled(v) for k, v in step["env"].items()} | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=root / filled(step["working-directory"]), env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert workflow_command(done.stdout.splitlines()[0])[1]["file"] == "sub dir/recipes/mine.yaml"


# ---------------------------------------------------------------- what cannot be read, in a report

FAULT = "mine.yaml:7 rules[0].type: unknown type 'Q9_K' (did you mean Q6_K?)"


@pytest.fixture
def broken(locked: Path) -> Path:
    """A lock of two recipes, one of which is no longer readable, in a folder of a repository."""
    Path("recipes/other.yaml").write_text(RECIPE.replace("mine", "other"))
    good("update", "-r", "recipes/*.yaml", "-m", "tiny/config.json", "--layout", "kv_b")
    change("type: Q6_K", "type: Q9_K")
    return locked


def test_a_broken_recipe_is_in_the_text(broken: Path) -> None:
    done = run("check")
    assert done.stdout == (
        f"recipes/mine.yaml: cannot be read\n  {FAULT}\n\n"
        "1 size as in quantkit-sizes.yaml; 1 size not compared: recipes/mine.yaml cannot be read\n"
    )
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception) == "recipes/mine.yaml cannot be read: see the report"


def test_a_broken_recipe_is_annotated(broken: Path) -> None:
    """The annotation's path starts at the repository's root, wherever the command runs."""
    root = broken.parent
    first = root / "sub: a, 50%" / "deep"
    first.mkdir(parents=True)
    for name in ("recipes", "tiny", "quantkit-sizes.yaml"):
        (root / name).rename(first / name)
    os.chdir(first)
    here = "recipes/mine.yaml"
    for path in (first, root / "none"):  # no repository around
        with pytest.MonkeyPatch.context() as m:
            m.setenv("GITHUB_WORKSPACE", str(path))
            assert annotation("check", "--format", "github") == here
    (root / ".git").mkdir()
    there = f"sub: a, 50%/deep/{here}"
    assert annotation("check", "--format", "github") == there
    with pytest.MonkeyPatch.context() as m:
        m.setenv("GITHUB_WORKSPACE", str(root / "sub: a, 50%"))
        assert annotation("check", "--format", "github") == f"deep/{here}"
    os.chdir(root)
    assert annotation("check", str(first / "quantkit-sizes.yaml"), "--format", "github") == there


def annotation(*args: str) -> str:
    """The file of the first annotation, which must be about FAULT."""
    done = run(*args)
    assert done.exit_code != 0
    kind, properties, message = workflow_command(done.stdout.splitlines()[0])
    assert (kind, message) == ("error", FAULT)
    assert properties["line"] == "7"
    assert properties["title"] == "sizes: recipes/mine.yaml"
    assert isinstance(done.exception, RecipeError)
    return properties["file"]


def test_every_fault_of_a_broken_recipe_is_annotated(broken: Path, quantkit: Run) -> None:
    change("file_type: Q4_K_M", "file_typ: Q4_K_M")
    done = quantkit("sizes", "check", "--format", "github", cwd=broken.parent)
    found = [workflow_command(line) for line in done.stdout.splitlines() if line.startswith("::")]
    assert [(f[1]["file"], f[1]["line"], f[2].partition(": ")[0]) for f in found] == [
        ("recipes/mine.yaml", "7", "mine.yaml:7 rules[0].type"),
        ("recipes/mine.yaml", "3", "mine.yaml:3 file_typ"),
        ("recipes/mine.yaml", "1", "mine.yaml:1 file_type"),
    ]
    assert (done.returncode, done.stderr) == (3, "error: recipes/mine.yaml cannot be read: see the report\n")


def test_a_base_in_pieces_is_annotated_in_its_own_file(place: Path) -> None:
    Path("recipes/on.yaml").write_text("name: on it\nbase: mine.yaml\n")
    good("update", "-r", "recipes/on.yaml", "-m", "tiny/config.json", "--layout", "kv_b")
    change("type: Q6_K", "type: Q5_K")
    first = workflow_command(run("check", "--format", "github").stdout.splitlines()[0])
    assert (first[1]["file"], first[1]["line"]) == ("recipes/mine.yaml", "5")
    change("type: Q5_K", "type: Q9_K")
    first = workflow_command(run("check", "--format", "github").stdout.splitlines()[0])
    assert (first[1]["file"], first[1]["line"], first[2]) == ("recipes/mine.yaml", "7", FAULT)


def test_a_rule_of_a_shipped_base_is_annotated_where_a_file_is(place: Path) -> None:
    Path("recipes/on.yaml").write_text("name: on it\nbase: UD-IQ1_S\nvars: {d: Q6_K}\nrules:\n"
                                       "  - {match: 'blk.0.ffn_*', type: $d, why: w}\n")  # fmt: skip
    good("update", "-r", "recipes/on.yaml", "-m", "tiny/config.json", "--layout", "kv_b")
    change("blk.0.ffn_*", "blk.0.ffn_up*", Path("recipes/on.yaml"))
    first = workflow_command(run("check", "--format", "github").stdout.splitlines()[0])
    assert (first[1]["file"], first[1]["line"]) == ("recipes/on.yaml", "1")


def test_a_broken_recipe_in_junit_markdown_and_json(broken: Path) -> None:
    change("file_type: Q4_K_M", "file_typ: Q4_K_M")
    assert isinstance(run("check", "--format", "junit", "-o", "r.xml").exception, RecipeError)
    root = Xml.parse("r.xml").getroot()
    validate_junit(root)
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.attrib["tests"], suite.attrib["errors"], suite.attrib["failures"]) == ("2", "1", "0")
    case = suite.find("testcase")
    assert case is not None
    assert (case.attrib["classname"], case.attrib["name"]) == ("sizes.recipes/mine.yaml", "can be read")
    error = case.find("error")
    assert error is not None
    assert error.text is not None
    assert error.attrib["type"] == "RecipeError"
    assert FAULT in error.text.split("\n")
    done = run("check", "--format", "markdown")
    assert "**`recipes/mine.yaml`** cannot be read\n\n" in done.stdout
    assert f"- `{FAULT}`\n" in done.stdout
    found = json.loads(run("check", "--format", "json").stdout)
    assert found["not_compared"] == 1
    assert [(b["what"], b["file"]) for b in found["broken"]] == [("recipes/mine.yaml", "recipes/mine.yaml")]
    assert FAULT in found["broken"][0]["error"].split("\n")


def test_a_model_or_a_lock_that_cannot_be_read_is_reported(locked: Path) -> None:
    Path("tiny/config.json").write_text("{")
    done = run("check", "--format", "github")
    kind, properties, message = workflow_command(done.stdout.splitlines()[0])
    assert (kind, properties["file"]) == ("error", "quantkit-sizes.yaml")
    assert message.startswith("tiny/config.json: is not valid JSON")
    assert isinstance(done.exception, SourceError)
    locked.write_text("version: 1\nmatrix: [\n")
    done = run("check", "--format", "github")
    kind, properties, message = workflow_command(done.stdout.splitlines()[0])
    assert (properties["file"], properties["line"]) == ("quantkit-sizes.yaml", "3")
    assert str(done.exception) == message
    run("check", "--format", "junit", "-o", "r.xml")
    validate_junit(Xml.parse("r.xml").getroot())
    text = run("check")
    assert (text.stdout, str(text.exception)) == ("", message)


def test_a_lock_with_a_byte_order_mark(locked: Path) -> None:
    locked.write_bytes(b"\xef\xbb\xbf" + locked.read_bytes().replace(b"\n", b"\r\n"))
    good("check")


def test_the_hooks() -> None:
    hooks = {h["id"]: h for h in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    assert hooks["quantkit-sizes"]["entry"] == "quantkit sizes check"
    assert hooks["quantkit-sizes"]["pass_filenames"] is False
    assert hooks["quantkit-recipe-lint"]["entry"] == "quantkit recipe lint --only-recipes"
    for hook in hooks.values():
        assert {"name", "language", "files"} <= hook.keys()
        assert re.search(hook["files"], "recipes/a.yaml")

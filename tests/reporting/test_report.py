"""`quantkit report`: pages match the JSON of commands, for every kind of input; other inputs are refused; hostile
text."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import click
import factory
import pytest
from absent import without
from conftest import Run
from reports import HOSTILE, SHOWN, Node, check_alone, coverage, evaluation, optimized, read, scored, sensitivity

from quantkit.base.errors import QuantkitError, SourceError
from quantkit.cli import cli
from quantkit.gguf.header import STRING, U32, kv

MODEL = "deepseek-v2-lite"


@pytest.fixture(scope="module")
def plan_json(quantkit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A printed plan."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    done = quantkit("plan", MODEL, "-r", "Q4_K_M", "--json")
    assert done.returncode == 0, done.stderr
    path.write_text(done.stdout)
    return path


def here(cwd: Path, *args: str | Path) -> None:
    """Run the command in this process, which has imported everything."""
    before = Path.cwd()
    os.chdir(cwd)
    try:
        cli.main([*map(str, args)], standalone_mode=False)
    finally:
        os.chdir(before)


def report(*args: str | Path, cwd: Path) -> Node:
    here(cwd, "report", *args, "-o", "r.html", "-q")
    page = read(cwd / "r.html")
    check_alone(page)
    return page


def figure(page: Node, title: str) -> Node:
    (found,) = (f for f in page.all("figure") if f.all("h3")[0].text == title)
    return found


def labels(node: Node) -> list[str]:
    """The label of each mark."""
    marks = [g for g in node.all("g") if "role-mark" in g.attrs.get("class", "").split()]
    return [p.attrs["aria-label"] for g in marks for p in g.all(role="graphics-symbol") if "aria-label" in p.attrs]


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


# ---------------------------------------------------------------- what is on a page


def test_a_plan_says_of_every_tensor_what_its_json_says(plan_json: Path, quantkit: Run, tmp_path: Path) -> None:
    page = report(plan_json, cwd=tmp_path)
    tensors = json.loads(plan_json.read_text())["tensors"]
    title = f"{MODEL} as Q4_K_M"
    assert [h.text for h in page.all("h2")] == [title]
    of_layers = figure(page, f"Types of {title}, by layer")
    rows = of_layers.rows()
    assert [r[:3] for r in rows] == [[t["name"], t["role"], t["type"]] for t in tensors]
    head = [th.text for th in of_layers.all("th")]
    assert head == ["tensor", "role", "type", "asked", "bytes", "rule", "why", "importance matrix"]
    assert [r[4] for r in rows] == [f"{t['bytes']:,}" for t in tensors]
    assert [r[5:7] for r in rows] == [[t["rule"], t["why"]] for t in tensors]
    said = labels(of_layers.all(class_="chart")[0])
    assert {s.split("\n")[0] for s in said} == {t["name"] for t in tensors}
    one = next(t for t in tensors if t["name"] == "blk.3.ffn_down_exps.weight")
    assert (one["type"], one["requested"]) == ("Q5_0", "Q4_K")
    assert (
        f"blk.3.ffn_down_exps.weight\nQ5_0, asked for Q4_K, {one['bytes']:,} bytes, routed expert\n"
        f"rule: {one['rule']}\nwhy: {one['why']}\nimportance matrix: optional" in said
    )
    # the treemap has each twice, for wide and for narrow screens
    of_bytes = figure(page, f"Bytes of {title}")
    said = labels(of_bytes)
    assert f"{one['name']}\n{one['type']}, {one['bytes']:,} bytes, routed expert" in said
    assert len(said) == 2 * len(set(said))
    by_role = {r[0]: int(r[2].replace(",", "")) for r in of_bytes.rows()}
    assert sum(by_role.values()) == sum(t["bytes"] for t in tensors)


def test_a_model_with_a_recipe_has_a_ladder_and_gpus_their_line(quantkit: Run, tmp_path: Path) -> None:
    page = report(MODEL, "-r", "Q4_K_M", "--fit", "12", cwd=tmp_path)
    of_size = figure(page, f"Recipes of {MODEL} by size")
    said = json.loads(quantkit("fit", MODEL, "-r", "Q4_K_M", "--vram", "12", "--json").stdout)
    rows = {r[0]: r for r in of_size.rows()}
    assert rows["Q4_K_M"][1] == f"{said['tensor_bytes']:,}"
    whole = said["answers"][0]["whole_layers"]["n_layers"]
    split = said["answers"][0]["experts_in_ram"]["n_layers"]
    assert rows["Q4_K_M"][5] == (
        "all layers fit" if whole == said["layers"]
        else f"{whole} of {said['layers']} whole layers fit; or all but the routed experts, with those of {split}"
    )  # fmt: skip
    sizes = json.loads(quantkit("sizes", "table", MODEL, "--format", "json").stdout)["recipes"]
    known = {r["recipe"]: r["tensor_bytes"] for r in sizes}
    assert {name: int(r[1].replace(",", "")) for name, r in rows.items()}.items() <= known.items()
    assert "12 GiB of VRAM: 11.00 GiB" in labels(of_size)
    assert "The line is 12 GiB of VRAM, 11.00 GiB; 1 GiB of each GPU is kept free" in of_size.text
    # those far above the line are in the table, not among the bars
    assert any(label.startswith("Q2_K_XS\n") for label in labels(of_size))


def test_two_recipes_side_by_side(quantkit: Run, tmp_path: Path) -> None:
    page = report(MODEL, "-r", "Q4_K_M", "-r", "Q5_K_M", cwd=tmp_path)
    done = quantkit("recipe", "diff", "Q4_K_M", "Q5_K_M", "-m", MODEL, "--report", "d.html", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    other = read(tmp_path / "d.html")
    check_alone(other)
    write(tmp_path / "diff.json", said)
    third = report("diff.json", "--force", cwd=tmp_path)
    for one in (page, other, third):
        changes = figure(one, "What changes from Q4_K_M to Q5_K_M")
        assert [[r[0], r[2], r[3], r[4]] for r in changes.rows()] == [
            [c["name"], c["before"], c["after"], f"{c['bytes']:+,}"] for c in said["changes"]
        ]
        assert len(labels(changes)) == len(said["changes"])
        roles = figure(one, "Q4_K_M and Q5_K_M by role")
        assert [r[:4] for r in roles.rows()] == [
            [r["role"], f"{r['before']:,}", f"{r['after']:,}", f"{r['after'] - r['before']:+,}"] for r in said["roles"]
        ]
    assert [h.text for h in page.all("h2")] == [
        "Q4_K_M and Q5_K_M side by side", f"{MODEL} as Q4_K_M", f"{MODEL} as Q5_K_M", "By size",
    ]  # fmt: skip


def test_a_gguf_and_its_shards(sound_set: Path, quantkit: Run, tmp_path: Path) -> None:
    first = min(sound_set.iterdir())
    page = report(first, cwd=tmp_path)
    said = json.loads(quantkit("inspect", first, "--json").stdout)
    rows = figure(page, f"Types of {first.name}, by layer").rows()
    assert [r[:4] for r in rows] == [[t["name"], t["role"], t["type"], f"{t['bytes']:,}"] for t in said["tensors"]]
    assert f"and {len(list(sound_set.iterdir())) - 1} more" in page.all("dl")[0].text


def test_tokens_of_an_importance_matrix(tiny_v3: Path, tiny_imatrix: Path, quantkit: Run, tmp_path: Path) -> None:
    args = (tiny_v3, "-r", "UD-IQ1_S", "--pre", "deepseek-v3", "--imatrix", tiny_imatrix)
    page = report(*args, cwd=tmp_path)
    said = json.loads(quantkit("imatrix", "info", tiny_imatrix, "--json", "-q").stdout)
    stacked = [t for t in said["tensors"] if t["matrices"] > 1]
    found = [f for f in page.all("figure") if f.all("h3")[0].text == "Experts that the text reached"]
    by_kind = {t["kind"].removesuffix(".weight") for t in stacked}
    assert {k for f in found for k in f.all("p")[0].text.partition(":")[0].split(", ")} == by_kind
    one = stacked[0]
    (mine,) = (f for f in found if one["kind"].removesuffix(".weight") in f.all("p")[0].text)
    assert [str(one["layer"]), *(f"{n:,}" for n in one["counts"])] in mine.rows()
    (data,) = mine.all("script")
    grid = json.loads(data.text)
    assert grid["names"] == ["layer", "expert", "tokens"]
    assert grid["counts"][grid["rows"].index(str(one["layer"]))] == one["counts"]
    assert sum(map(len, grid["counts"])) == len(mine.all(class_="mark-rect")[0].all("path"))
    layers = next(f for f in page.all("figure") if f.all("h3")[0].text.startswith("Types of"))
    low, high = min(one["counts"]), max(one["counts"])
    tokens = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    assert any(s.startswith(f"{one['name']}\n") and s.endswith(f"\ntokens seen: {tokens}") for s in labels(layers))


def test_a_matrix_without_experts_has_no_figure_and_says_so(quantkit: Run, tmp_path: Path) -> None:
    said = coverage(2, 4)
    for t in said["tensors"]:
        t.update(matrices=1, counts=[5])
    page = report(write(tmp_path / "i.json", said), cwd=tmp_path)
    assert "No figure: none of its entries counts experts." in page.text
    said["count_unit"] = "chunks"
    page = report(write(tmp_path / "i.json", said), "--force", cwd=tmp_path)
    assert "No figure: a .dat has no counts of experts." in page.text


def test_size_against_kld(quantkit: Run, tmp_path: Path) -> None:
    scores = [scored("big", 3 << 30, 0.02), scored("small", 1 << 30, 0.5), scored("worse", 3 << 30, 0.6)]
    page = report(write(tmp_path / "e.json", evaluation(*scores)), cwd=tmp_path)
    found = figure(page, "Size against KLD beside R1")
    rows = found.rows()
    assert [(r[0], r[4], r[5], r[7]) for r in rows] == [
        ("small", "0.50000", "0.05000", "yes"), ("big", "0.02000", "0.00200", "yes"),
        ("worse", "0.60000", "0.06000", ""),
    ]  # fmt: skip
    assert "big\n3,221,225,472 bytes = 3.00 GiB, 3.221 BPW\nmean KLD 0.02000 ± 0.00200" in labels(found)


def test_predicted_against_measured(quantkit: Run, tmp_path: Path) -> None:
    page = report(write(tmp_path / "o.json", optimized()), cwd=tmp_path)
    found = figure(page, "Predicted against measured KLD")
    assert [r[:3] + r[4:6] for r in found.rows()] == [
        ["fitted on", "the recipe", "best", "0.09000", "0.10000"],
        ["reported", "the recipe", "best", "0.09000", "0.10000"],
        ["reported", "uniform", "Q2_K", "0.27000", "0.30000"],
    ]
    assert "the recipe: best (reported)\npredicted 0.09000\nmeasured 0.10000 ± 0.01000" in labels(found)
    assert "Note: a note" in page.text


def test_errors_and_sensitivities(plan_json: Path, quantkit: Run, tmp_path: Path) -> None:
    names = {"routed expert": [f"blk.{i}.ffn_down_exps.weight" for i in (1, 2)], "output": ["output.weight"]}
    page = report(plan_json, write(tmp_path / "s.json", sensitivity(names)), cwd=tmp_path)
    found = figure(page, "Sensitivity of m")
    assert [r[:5] for r in found.rows()] == [
        ["g0", "routed expert", "10", "0.5", "0.4 to 0.6"], ["g1", "output", "10", "1.5", "0.4 to 0.6"],
    ]  # fmt: skip
    assert "output.weight\ngroup g1\nα 1.5, 95 % from 0.4 to 0.6\nβ 0.1\nbelow the noise floor" in labels(found)
    assert [r[:3] for r in figure(page, "Damage and bytes by role").rows()] == [
        ["routed expert", "25.0 %", "50.0 %"], ["output", "25.0 %", "50.0 %"],
    ]  # fmt: skip
    types = {t["name"]: t["type"] for t in json.loads(plan_json.read_text())["tensors"]}
    known = {"Q4_K": "0.004", "Q6_K": "0.0003"}
    wanted = [n for of in names.values() for n in of if types[n] in known]
    errors = figure(page, f"Errors of {MODEL} as Q4_K_M, by layer")
    assert wanted
    assert sorted((r[0], r[3]) for r in errors.rows()) == sorted((n, known[types[n]]) for n in wanted)
    layers = figure(page, f"Types of {MODEL} as Q4_K_M, by layer")
    for n in wanted:
        assert any(
            s.startswith(f"{n}\n") and f"\nrelative squared error: {known[types[n]]}" in s for s in labels(layers)
        )


def test_the_results_of_a_study(quantkit: Run, tmp_path: Path) -> None:
    from quantkit.lab.evaluation.scores import Scored
    from quantkit.lab.studies.results import Result, Results

    about = {"source": "s", "text": "t", "model": "M", "texts": ["wiki.txt"], "n_chunks": 2, "n_ctx": 512}
    with Results(tmp_path / "s.db") as results:
        for i, (name, nbytes, kld) in enumerate(
            [("base", 1 << 30, 0.4), ("down=Q3_K", 2 << 30, 0.1), ("x", 2 << 30, 0.2)]
        ):
            of = Scored(**scored(name, nbytes, kld))
            results.put(str(i), Result("study", name, {}, of, b"\0" * 16, "", about))
        results.put("f", Result("study", "bad", {}, None, b"", "no such type\nmore", about))
    page = report("s.db", cwd=tmp_path)
    found = figure(page, "study: size against KLD")
    assert [(r[0], r[7]) for r in found.rows()] == [("base", "yes"), ("down=Q3_K", "yes"), ("x", "")]
    assert "M, 2 chunks of wiki.txt." in found.text
    assert "Failed: bad: no such type" in page.text
    shown = json.loads(quantkit("ablate", "show", "s.db", "--json", cwd=tmp_path).stdout)
    again = report(write(tmp_path / "s.json", shown), "--force", cwd=tmp_path)
    assert figure(again, "study: size against KLD").rows() == found.rows()


def test_figures_as_files(quantkit: Run, tmp_path: Path) -> None:
    scores = write(tmp_path / "e.json", evaluation(scored("a", 1 << 30, 0.5)))
    matrix = write(tmp_path / "i.json", coverage(2, 4))
    done = quantkit("report", scores, matrix, scores, "-o", "r.html", "--figures", "f", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    n = (tmp_path / "r.html").stat().st_size
    assert done.stdout == f"r.html: 3 figures, {n:,} bytes\nf: 6 files\n"
    names = {f"{name}.{kind}" for name in ("front", "front-2", "coverage") for kind in ("svg", "png")}
    assert {p.name for p in (tmp_path / "f").iterdir()} == names
    for path in (tmp_path / "f").iterdir():
        data = path.read_bytes()
        if path.suffix == ".png":
            assert data.startswith(b"\x89PNG")
        else:
            assert Xml.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
            assert b"var(" not in data
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()}
    (tmp_path / "r.html").unlink()
    done = quantkit("report", scores, "-o", "r.html", "--figures", "f", cwd=tmp_path)
    says = "error: f/front.svg: exists; choose another name, or replace it with --force\n"
    assert (done.returncode, done.stderr) == (7, says)
    assert not (tmp_path / "r.html").exists()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()} == before
    done = quantkit("report", scores, "-o", "r.html", "--figures", "e.json", cwd=tmp_path)
    says = "error: e.json: is not a directory; give another name for the figures\n"
    assert (done.returncode, done.stderr) == (7, says)


def test_the_same_input_gives_the_same_page(plan_json: Path, quantkit: Run, tmp_path: Path) -> None:
    report(plan_json, cwd=tmp_path)
    first = (tmp_path / "r.html").read_bytes()
    report(plan_json, "--force", cwd=tmp_path)
    assert (tmp_path / "r.html").read_bytes() == first


# ---------------------------------------------------------------- what is no input

NO = (
    "give a GGUF, an importance matrix, the file of a study or a sensitivity, what plan, eval, optimize, recipe diff, "
    "inspect, fit, which or sizes table printed as JSON, or a model with --recipe"
)


def refused(folder: Path, *args: str | Path) -> str:
    """The error message; asserts that nothing was made."""
    before = sorted(folder.iterdir())
    with pytest.raises((QuantkitError, click.UsageError)) as e:
        here(folder, "report", *args, "-o", "r.html", "--figures", "figs", "-q")
    assert sorted(folder.iterdir()) == before
    assert not isinstance(e.value, QuantkitError) or type(e.value) is SourceError
    return str(e.value)


def test_files_of_other_kinds(quantkit: Run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    (tmp_path / "b.json").write_text('{"a": 1}')
    (tmp_path / "c.json").write_text('{"quantkit_plan": 7}')
    (tmp_path / "d.txt").write_text("words")
    (tmp_path / "e.bin").write_bytes(b"\x00\xffwords")
    sqlite3.connect(tmp_path / "f.db").executescript("create table t (a)").connection.close()
    other = "is JSON, but of none of the commands whose --json can be drawn"
    none = "is neither a GGUF, an importance matrix, results of a study nor JSON"
    for name in ("a.json", "b.json"):
        assert refused(tmp_path, name) == f"{name}: {other}; {NO}"
    assert refused(tmp_path, "c.json") == (
        "c.json: is the JSON of a plan of version 7, and this quantkit knows version 1; make it again"
    )
    said = refused(tmp_path, "d.txt")
    assert said == f"d.txt: {none} (Expecting value: line 1 column 1 (char 0)); {NO}"
    assert refused(tmp_path, "e.bin") == f"e.bin: {none}; {NO}"
    assert refused(tmp_path, "f.db") == (
        "f.db: is not a file of results: it holds other tables than results; give another name"
    )


def test_a_model_needs_a_recipe_and_a_recipe_a_model(plan_json: Path, quantkit: Run, tmp_path: Path) -> None:
    said = refused(tmp_path, MODEL)
    assert said == (f"{MODEL} is not a GGUF, so --recipe must say which types it gets")
    said = refused(tmp_path, plan_json, "-r", "Q4_K_M")
    assert said == ("--recipe needs a model to plan: its name, config.json, checkpoint, or one GGUF")
    said = refused(tmp_path, plan_json, "--fit", "80x")
    assert said.startswith("--fit ")
    assert "nothing.gguf: there is no such file" in refused(tmp_path, "nothing.gguf")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x.pop("tensors"), "KeyError 'tensors'"),
        (lambda x: x["tensors"][0].pop("bytes"), "KeyError 'bytes'"),
        (lambda x: x["tensors"][0].update(bytes="7"), "the tensor 'output.weight' has no sizes"),
        (lambda x: x["tensors"][0].update(bytes=-7), "the tensor 'output.weight' has no sizes"),
        (lambda x: x["tensors"][0].update(type=None), "the tensor 'output.weight' has no type or role"),
        (lambda x: x["totals"].update(bpw=float("inf")), "inf is not a finite number"),
        (lambda x: x.update(warnings=3), "'int' object is not iterable"),
    ],
)  # fmt: skip
def test_a_damaged_plan(plan_json: Path, quantkit: Run, tmp_path: Path, change: Any, why: str) -> None:
    said = json.loads(plan_json.read_text())
    change(said)
    write(tmp_path / "p.json", said)
    says = f"p.json: is damaged, or not a plan: {why}; make it again"
    assert refused(tmp_path, "p.json") == says


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (evaluation(scored("a", 1, 0.5)), "an evaluation"), (optimized(), "an optimized recipe"),
        (coverage(2, 4), "an importance matrix"), (sensitivity({"output": ["output.weight"]}), "a sensitivity"),
        ({"quantkit_ablate": 1, "results": [], "effects": [], "front": []}, "a study"),
        ({"before": {}, "after": {}, "changes": [], "roles": []}, "a comparison of recipes"),
        ({"stored": {}, "metadata": [], "tensors": []}, "a GGUF"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_nothing_in_damaged_json_is_a_traceback(made: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """With every key removed, and every value replaced by another kind: a page, or one sentence."""
    from quantkit.reporting import documents
    from quantkit.reporting.sections import sections_of

    path = tmp_path / "x.json"
    for key in made:
        for value in (None, "gone", -1, [1], {"a": [None]}, 3.5):
            said = {k: (value if k == key else v) for k, v in made.items()}
            if value is None:
                del said[key]
            write(path, said)
            said_no = ""
            try:
                document = documents.read(str(path), 100, lambda _n: None)
                assert document is not None
                sections_of([document])
            except SourceError as e:
                said_no = str(e)
            ends = (
                f"(damaged, or not {kind}: .*; make it again$|JSON, but of none|no sensitivity|of another|the JSON of)"
            )
            assert not said_no or re.match(rf"{re.escape(str(path))}: is {ends}", said_no)


@pytest.mark.parametrize("name", ["squarify", "vl_convert"])
def test_without_the_extra(plan_json: Path, quantkit: Run, tmp_path: Path, name: str) -> None:
    env = without(tmp_path / "site", name)
    says = f"error: {name}, which draws pictures, is not installed; run: pip install 'quantkit[pictures]'\n"
    done = quantkit("report", plan_json, "-o", tmp_path / "r.html", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (10, "", says)
    done = quantkit("recipe", "diff", "Q4_K_M", "Q5_K_M", "-m", MODEL, "--report", tmp_path / "r.html", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (10, "", says)
    assert not (tmp_path / "r.html").exists()


# ---------------------------------------------------------------- hostile text


def hostile_plan(plan_json: Path) -> dict[str, Any]:
    """A plan in which all text is hostile: names, roles, types, rules, reasons."""
    said: dict[str, Any] = json.loads(plan_json.read_text())
    for i, t in enumerate(said["tensors"]):
        bad = HOSTILE[i % len(HOSTILE)]
        t.update(rule=bad, why=bad, imatrix=bad, requested=bad)
        if i % 3 == 0:
            t.update(name=f"blk.{i % 7}.{bad}{i}", role=f"role {bad}", type=f"{bad}{i % 5}")
    for key in ("model", "arch", "layout", "recipe"):
        said[key] = "".join(HOSTILE)
    said["warnings"] = said["notes"] = list(HOSTILE)
    said["totals"]["types"] = dict.fromkeys(HOSTILE, 1)
    return said


def test_hostile_text_is_text(plan_json: Path, quantkit: Run, tmp_path: Path) -> None:
    write(tmp_path / "p.json", hostile_plan(plan_json))
    scores = [scored(bad, (i + 1) << 30, 0.5 / (i + 1)) for i, bad in enumerate(HOSTILE)]
    said = evaluation(*scores)
    said["texts"] = list(HOSTILE)
    said["reference"]["name"] = HOSTILE[0]
    write(tmp_path / "<script>alert(1)<.json", said)
    matrix = coverage(2, 4, tuple(f"{bad}_exps" for bad in HOSTILE[:2]))
    matrix.update(file=HOSTILE[1], datasets=list(HOSTILE))
    write(tmp_path / "i.json", matrix)
    write(tmp_path / "o.json", optimized() | {"notes": list(HOSTILE)})
    write(tmp_path / "s.json", sensitivity({bad: [f"blk.1.{bad}"] for bad in HOSTILE}) | {"model": HOSTILE[0]})
    names = ("p.json", "<script>alert(1)<.json", "i.json", "o.json", "s.json")
    page = report(*names, "--figures", "figs", cwd=tmp_path)
    text = page.text
    for bad in HOSTILE:
        assert bad in text or bad == HOSTILE[5]
    assert SHOWN in text
    raw = (tmp_path / "r.html").read_text("utf-8")
    assert all(ch.isprintable() or ch == "\n" for ch in raw)
    assert raw.count("<script") == 1 + raw.count('<script type="application/json"')
    assert "<title>p.json, &lt;script&gt;alert(1)&lt;.json, i.json and 2 more</title>" in raw
    made = sorted(p.name for p in (tmp_path / "figs").iterdir())
    assert all(re.fullmatch(r"[a-z]+(-\d+)?\.(svg|png)", name) for name in made), made
    for path in (tmp_path / "figs").glob("*.svg"):
        tree = Xml.fromstring(path.read_bytes())
        tags = {e.tag.rpartition("}")[2] for e in tree.iter()}
        assert tags <= {"svg", "g", "path", "text", "rect", "defs", "clipPath", "linearGradient", "stop", "line"}, tags
        assert not [k for e in tree.iter() for k in e.attrib if k.startswith("on") or k.endswith("href")]


def test_a_hostile_gguf(quantkit: Run, tmp_path: Path) -> None:
    tensors = {f"blk.0.{bad[:40]}.weight": ((256, 2), "F32", bytes(2048)) for bad in HOSTILE[:4]}
    kvs = [kv("general.architecture", STRING, "llama"), kv("llama.block_count", U32, 1)]
    kvs.append(kv("general.name", STRING, HOSTILE[0]))
    factory.gguf_file(tmp_path / "m.gguf", tensors, kvs)
    page = report("m.gguf", cwd=tmp_path)
    assert {r[0] for r in figure(page, "Types of m.gguf, by layer").rows()} == set(tensors)

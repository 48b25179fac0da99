"""What an author asks of a recipe: lint in whole messages, explain rule by rule, diff in bytes, schema, starters."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import Run

from quantkit import authoring, recipe_docs, report
from quantkit.catalogue import Catalogue
from quantkit.errors import RecipeError
from quantkit.models import open_model
from quantkit.plan import Plan, make_plan
from quantkit.recipe import Recipe, load, parse, shipped

BROKEN = Path(__file__).parent / "data" / "broken"
EXPECTED = (BROKEN / "expected.txt").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def r1() -> Catalogue:
    return open_model("deepseek-r1")


def lint(name: str | Path, *models: Catalogue) -> list[str]:
    return [f"{f.severity}: {f.message}" for f in authoring.lint(str(name), {}, lambda _recipe: list(models))]


# ---------------------------------------------------------------- lint


@pytest.mark.parametrize("file", sorted(BROKEN.glob("*.yaml")), ids=lambda p: p.stem)
def test_broken_recipes(file: Path, r1: Catalogue) -> None:
    """A file a mistake; expected.txt has what lint says of each, whole."""
    assert sorted(lint(file, r1)) == [line for line in EXPECTED if line.split(": ")[1].startswith(f"{file.name}:")]


def test_there_are_enough_broken_recipes() -> None:
    assert len(list(BROKEN.glob("*.yaml"))) >= 20
    assert {line.split(": ")[1].split(":")[0] for line in EXPECTED} == {f.name for f in BROKEN.glob("*.yaml")}


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_sound(name: str, r1: Catalogue) -> None:
    assert lint(name, r1) == []


def test_lint_of_what_cannot_be_read(tmp_path: Path) -> None:
    assert lint(tmp_path / "gone.yaml") == [f"error: {tmp_path}/gone.yaml: cannot be read: No such file or directory"]


def test_lint_exits(quantkit: Run) -> None:
    """Errors 3; warnings alone 0, or 1 with --strict; one bad file does not hide the next."""
    warned = BROKEN / "changes-nothing.yaml"
    assert quantkit("recipe", "lint", warned).returncode == 0
    assert quantkit("recipe", "lint", warned, "--strict").returncode == 1
    done = quantkit("recipe", "lint", BROKEN / "no-arch.yaml", "UD-IQ1_S", BROKEN / "unknown-type.yaml")
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "error: no-arch.yaml:1 arch: is missing",
        "UD-IQ1_S: fine on deepseek-r1",
        "error: unknown-type.yaml:7 rules[0].type: unknown type 'IQ2_XSS' (did you mean IQ2_XS?)",
    ]
    as_json = json.loads(quantkit("recipe", "lint", warned, "--json").stdout)
    assert [(f["severity"], f["model"]) for f in as_json] == [("warning", "deepseek-r1")]


def test_a_rule_may_repeat_what_follows_in_part(r1: Catalogue) -> None:
    """Only a rule that changes no tensor at all is idle."""
    text = (
        "name: r\narch: [deepseek2]\nfile_type: Q2_K\nrules:\n"
        '  - {match: "blk.*.ffn_*_exps.weight", type: Q2_K, why: a}\n'
        '  - {match: "blk.*.ffn_down*.weight", type: Q3_K, why: b}\n'
        '  - {match: "*.weight", type: Q2_K, why: c}\n'
    )
    assert make_plan(r1, parse(text, "r.yaml")).warnings == ()


def test_a_rule_that_says_what_the_mixture_says(r1: Catalogue) -> None:
    text = (
        "name: r\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: mixture Q4_K_M\nrules:\n"
        "  - {match: output.weight, type: Q6_K, why: logits}\n"
    )
    assert make_plan(r1, parse(text, "r.yaml")).warnings == (
        "r.yaml:6 rules[0].match: changes nothing: r.yaml:4 otherwise would give its tensors Q6_K too",
    )


# ---------------------------------------------------------------- explain


def steps(plan: Plan, name: str) -> list[tuple[str, str]]:
    return [(s.place, s.outcome) for s in authoring.explain(plan, name).steps]


def test_explain_walks_every_rule(r1: Catalogue) -> None:
    plan = make_plan(r1, load("UD-IQ1_S"))
    every = steps(plan, "blk.9.ffn_down_exps.weight")
    assert len(every) == 11
    assert every[-2:] == [
        ("UD-IQ1_S.yaml:43 rules[9]", "another layer: moe[:6] is 3-8 here"),
        (
            "UD-IQ1_S.yaml:47 rules[10]",
            "takes it: 97 % of all weights; each token uses 8 of 256 experts, and errors of single experts average out",
        ),
    ]
    assert {outcome for _, outcome in every[:-2]} == {"another name"}
    assert steps(plan, "blk.8.ffn_down_exps.weight")[-1][1] == "matches too, but an earlier rule has taken it"
    assert authoring.explain(plan, "blk.8.ffn_down_exps.weight").verdict == (
        "rows of 2048 divide into blocks of 256",
        "3,758,096,384 weights x 2.0625 bits = 968,884,224 bytes",
        "needs an importance matrix",
    )


def test_explain_agrees_with_the_plan(r1: Catalogue) -> None:
    """For every tensor: at most one rule takes it, and that is the plan's."""
    for recipe in ("UD-IQ1_S", "Q2_K_L"):
        plan = make_plan(r1, load(recipe))
        for t in plan.tensors[::7]:
            takers = [p for p, outcome in steps(plan, t.tensor.name) if outcome.startswith("takes it")]
            assert takers == ([t.rule] if t.rule else [])


def test_explain_a_fallback_and_a_mixture(r1: Catalogue) -> None:
    e = authoring.explain(make_plan(r1, load("Q4_K_M")), "blk.0.attn_k_b.weight")
    assert [(s.match, s.type, s.outcome) for s in e.steps] == [
        ("mixture Q4_K_M", "Q4_K", "takes it: llama-quantize's own choice")
    ]
    assert e.planned.type == "Q5_0"
    assert e.verdict[0] == "rows of 128 do not divide into blocks of 256: Q5_0 in place of Q4_K"


def test_explain_what_is_never_quantized(r1: Catalogue) -> None:
    e = authoring.explain(make_plan(r1, load("UD-IQ1_S")), "blk.3.ffn_gate_inp.weight")
    assert e.steps == ()
    assert report.explanation_text(e).splitlines() == [
        "blk.3.ffn_gate_inp.weight  7168x256, router, layer 3",
        "",
        "-> F32",
        "   stays F32: never quantized: norms, router and biases are small and sensitive; no rule is asked",
    ]


def test_explain_of_no_tensor(r1: Catalogue) -> None:
    with pytest.raises(RecipeError) as e:
        authoring.explain(make_plan(r1, load("UD-IQ1_S")), "blk.3.ffn_down_expert.weight")
    assert str(e.value) == (
        "deepseek-r1 (k_b+v_b) has no tensor 'blk.3.ffn_down_expert.weight' (did you mean blk.3.ffn_down_exps.weight?)"
    )


# ---------------------------------------------------------------- diff


def test_diff_in_bytes(r1: Catalogue) -> None:
    a, b = make_plan(r1, load("UD-IQ1_S")), make_plan(r1, load("UD-IQ1_M"))
    d = authoring.diff(a, b)
    assert len(d.changes) == 58
    assert {c.role for c in d.changes} == {"routed expert"}
    total = b.tensor_bytes - a.tensor_bytes
    assert sum(c.nbytes for c in d.changes) == sum(r.after - r.before for r in d.roles) == total == 28_684_845_056
    assert sum(r.before for r in d.roles) == a.tensor_bytes
    text = report.difference_text(d)
    assert "blk.{3-5}.ffn_down_exps.weight    3  IQ2_XXS   Q3_K       +1,937,768,448" in text
    made = d.to_json()
    assert made["bytes"] == total
    assert made["changes"][0] == {
        "name": "blk.3.ffn_down_exps.weight",
        "role": "routed expert",
        "before": "IQ2_XXS",
        "after": "Q3_K",
        "bytes": 645_922_816,
        "rule_before": "UD-IQ1_S.yaml:43 rules[9]",
        "rule_after": "UD-IQ1_M.yaml:43 rules[9]",
    }


def test_diff_of_the_same(r1: Catalogue) -> None:
    plan = make_plan(r1, load("Q6_K"))
    d = authoring.diff(plan, plan)
    assert d.changes == ()
    assert "the same type for every tensor" in report.difference_text(d)


# ---------------------------------------------------------------- schema, page, starters


def as_editor(text: str) -> object:
    """A recipe's values as a YAML language server sees them."""
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(recipe_docs.schema())
    return jsonschema.Draft202012Validator(recipe_docs.schema())


@pytest.mark.parametrize("name", shipped())
def test_the_schema_takes_what_is_shipped(name: str, validator: jsonschema.Draft202012Validator) -> None:
    assert list(validator.iter_errors(as_editor(shipped()[name]))) == []


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("unknown-key", []),
        ("unknown-key-in-rule", ["rules", 0]),
        ("unknown-type", ["rules", 0, "type"]),
        ("mixture-as-type", ["rules", 0, "type"]),
        ("unknown-file-type", ["file_type"]),
        ("unknown-layer-list", ["rules", 0, "layers"]),
        ("no-reason", ["rules", 0]),
        ("unknown-mixture", ["otherwise"]),
        ("untyped-metadata", ["metadata", "general.author"]),
        ("variable-of-no-type", ["vars", "down"]),
        ("no-arch", []),
        ("not-a-mapping", []),
    ],
)
def test_the_schema_finds_mistakes(
    file: str, path: list[str | int], validator: jsonschema.Draft202012Validator
) -> None:
    text = (BROKEN / f"{file}.yaml").read_text("utf-8")
    assert path in [list(e.absolute_path) for e in validator.iter_errors(as_editor(text))]


def test_the_files_made_from_the_schema_are_current() -> None:
    folder = files("quantkit.recipes")
    made = json.dumps(recipe_docs.schema(), indent=1) + "\n"
    assert folder.joinpath("recipe.schema.json").read_text("utf-8") == made
    assert folder.joinpath("README.md").read_text("utf-8") == recipe_docs.page()


def test_the_page_tells_the_truth_of_r1(r1: Catalogue) -> None:
    groups = {k: report.ranges(v) for k, v in r1.layer_groups().items()}
    assert {k: groups[k] for k in ("all", "dense", "moe")} == {"all": "0-60", "dense": "0-2", "moe": "3-60"}
    assert groups["more_bits"].startswith("0-6,9,12,")
    assert groups["more_bits"].endswith(",51,53-60")


@pytest.mark.parametrize("base", shipped())
def test_starters_are_sound(base: str, tmp_path: Path, r1: Catalogue) -> None:
    """A starter on any recipe, and a copy of any, lint without an error; the copy plans as its origin."""
    if load(base).file_type in ("F32", "F16", "BF16"):
        return
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_docs.starter("mine", base, path.name, "recipe.schema.json", "deepseek-r1"), "utf-8")
    assert lint(path, r1) == []
    path.write_text(recipe_docs.copy_of(base, "mine", "recipe.schema.json"), "utf-8")
    assert lint(path, r1) == []
    assert load(str(path)).name == "mine"
    assert types(load(str(path)), r1) == types(load(base), r1)


def types(recipe: Recipe, c: Catalogue) -> list[str]:
    return [t.type for t in make_plan(c, recipe).tensors]


def test_resolved_plans_alike(tmp_path: Path, r1: Catalogue) -> None:
    text = (
        "name: mine\nbase: UD-IQ1_S\nvars: {down: Q2_K}\nmetadata: {general.author: 'str:a: b', x.y: bool:true}\n"
        'rules:\n  - {match: "blk.*.ffn_down_exps.weight", layers: "moe[:2]", type: $down, why: "early: two"}\n'
    )
    recipe = parse(text, "mine.yaml", {"down": "Q3_K"})
    again = parse(recipe_docs.resolved(recipe), "resolved.yaml")
    assert types(again, r1) == types(recipe, r1)
    assert (again.rules, again.metadata, again.arch) == (recipe.rules, recipe.metadata, recipe.arch)
    assert (again.file_type, again.imatrix, again.base) == ("IQ1_S", "required", None)


# ---------------------------------------------------------------- the commands


def test_list_and_show(quantkit: Run) -> None:
    listed = json.loads(quantkit("recipe", "list", "--json").stdout)
    assert [r["name"] for r in listed] == list(shipped())
    assert quantkit("recipe", "show", "ud-iq1_s").stdout == shipped()["UD-IQ1_S"]
    assert quantkit("recipe", "show", "IQ3_XS").stdout == shipped()["IQ3_XS"]
    done = quantkit("recipe", "show", "UD-IQ1_S", "--set", "down=Q2_K")
    assert (done.returncode, done.stderr) == (
        3,
        "error: --set down: UD-IQ1_S has no variable 'down'; it has none\n",
    )


def test_new_lint_explain_diff_plan(quantkit: Run, tmp_path: Path) -> None:
    """As a first-time author would."""
    done = quantkit("recipe", "new", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "mine.yaml written; next: quantkit recipe lint mine.yaml\n")
    first = (tmp_path / "mine.yaml").read_text("utf-8").splitlines()[0]
    schema = Path(first.removeprefix("# yaml-language-server: $schema="))
    assert json.loads(schema.read_text("utf-8")) == recipe_docs.schema()
    assert quantkit("recipe", "lint", "mine.yaml", "--strict", cwd=tmp_path).returncode == 0
    explained = quantkit(
        "recipe", "explain", "mine.yaml", "blk.3.ffn_down_exps.weight", "--set", "down=Q3_K", cwd=tmp_path
    )
    assert "-> Q3_K\n" in explained.stdout
    d = json.loads(quantkit("recipe", "diff", "UD-IQ1_S", "mine.yaml", "--json", cwd=tmp_path).stdout)
    assert {c["after"] for c in d["changes"]} == {"Q6_K"}
    plan = quantkit("plan", "deepseek-r1", "-r", "mine.yaml", "--set", "down=Q3_K", "--json", cwd=tmp_path)
    by_name = {t["name"]: t for t in json.loads(plan.stdout)["tensors"]}
    assert by_name["blk.7.ffn_down_exps.weight"]["type"] == "Q3_K"
    assert by_name["blk.7.ffn_down_exps.weight"]["rule"] == "mine.yaml:10 rules[0]"
    assert by_name["blk.8.ffn_down_exps.weight"]["rule"] == "UD-IQ1_S.yaml:43 rules[9]"


def test_new_keeps_what_is_there(quantkit: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: precious\n")
    done = quantkit("recipe", "new", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        7,
        "error: mine.yaml: exists; choose another name, or replace it with --force\n",
    )
    assert (tmp_path / "mine.yaml").read_text() == "name: precious\n"
    done = quantkit("recipe", "new", "mine.txt", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "error: mine.txt: a recipe's file ends in .yaml\n")
    done = quantkit("recipe", "new", "other.yaml", "--base", "UD-IQ1", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: no shipped recipe is called 'UD-IQ1' (did you mean UD-IQ1_S?)")
    assert not (tmp_path / "other.yaml").exists()

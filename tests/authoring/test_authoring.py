"""A recipe author's tools: lint with whole messages, explain rule by rule, diff in bytes, schema, starters."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import Run

from quantkit.authoring import report, review
from quantkit.base.errors import RecipeError
from quantkit.cli import cli
from quantkit.model.catalogue import Catalogue, ranges
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe import docs
from quantkit.recipe.load import Recipe, load, parse
from quantkit.recipe.named import shipped, text_of
from quantkit.recipe.schema import looks_like_recipe

BROKEN = Path(__file__).parent.parent / "data" / "broken"
EXPECTED = (BROKEN / "expected.txt").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def r1() -> Catalogue:
    return open_model("deepseek-r1")


def lint(name: str | Path, *models: Catalogue) -> list[str]:
    return [f"{f.severity}: {f.message}" for f in review.lint(str(name), {}, lambda _recipe: list(models))]


# ---------------------------------------------------------------- lint


@pytest.mark.parametrize("file", sorted(BROKEN.glob("*.yaml")), ids=lambda p: p.stem)
def test_broken_recipes(file: Path, r1: Catalogue) -> None:
    """One mistake per file; expected.txt has lint's complete output for each."""
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
    """Errors give 3; warnings alone 0, or 1 with --strict; one bad file does not hide the next."""
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
    return [(s.place, s.outcome) for s in review.explain(plan, name).steps]


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
    assert review.explain(plan, "blk.8.ffn_down_exps.weight").verdict == (
        "rows of 2048 divide into blocks of 256",
        "3,758,096,384 weights x 2.0625 bits = 968,884,224 bytes",
        "needs an importance matrix",
    )


def test_explain_agrees_with_the_plan(r1: Catalogue) -> None:
    """For every tensor, at most one rule takes it, and it is the plan's."""
    for recipe in ("UD-IQ1_S", "Q2_K_L"):
        plan = make_plan(r1, load(recipe))
        for t in plan.tensors[::7]:
            takers = [p for p, outcome in steps(plan, t.tensor.name) if outcome.startswith("takes it")]
            assert takers == ([t.rule] if t.rule else [])


def test_explain_a_fallback_and_a_mixture(r1: Catalogue) -> None:
    e = review.explain(make_plan(r1, load("Q4_K_M")), "blk.0.attn_k_b.weight")
    assert [(s.match, s.type, s.outcome) for s in e.steps] == [
        ("mixture Q4_K_M", "Q4_K", "takes it: llama-quantize's own choice")
    ]
    assert e.planned.type == "Q5_0"
    assert e.verdict[0] == "rows of 128 do not divide into blocks of 256: Q5_0 in place of Q4_K"


def test_explain_what_is_never_quantized(r1: Catalogue) -> None:
    e = review.explain(make_plan(r1, load("UD-IQ1_S")), "blk.3.ffn_gate_inp.weight")
    assert e.steps == ()
    assert report.explanation_text(e).splitlines() == [
        "blk.3.ffn_gate_inp.weight  7168x256, router, layer 3",
        "",
        "-> F32",
        "   stays F32: never quantized: norms, router and biases are small and sensitive; no rule is asked",
    ]


def test_explain_of_no_tensor(r1: Catalogue) -> None:
    with pytest.raises(RecipeError) as e:
        review.explain(make_plan(r1, load("UD-IQ1_S")), "blk.3.ffn_down_expert.weight")
    assert str(e.value) == (
        "deepseek-r1 (k_b+v_b) has no tensor 'blk.3.ffn_down_expert.weight' (did you mean blk.3.ffn_down_exps.weight?)"
    )


# ---------------------------------------------------------------- diff


def test_diff_in_bytes(r1: Catalogue) -> None:
    a, b = make_plan(r1, load("UD-IQ1_S")), make_plan(r1, load("UD-IQ1_M"))
    d = review.diff(a, b)
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
    d = review.diff(plan, plan)
    assert d.changes == ()
    assert "the same type for every tensor" in report.difference_text(d)


# ---------------------------------------------------------------- schema, page, starters


def as_editor(text: str) -> object:
    """A recipe's values as a YAML language server sees them."""
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(docs.schema())
    return jsonschema.Draft202012Validator(docs.schema())


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
    made = json.dumps(docs.schema(), indent=1) + "\n"
    assert folder.joinpath("recipe.schema.json").read_text("utf-8") == made
    assert folder.joinpath("README.md").read_text("utf-8") == docs.page()


def test_the_page_tells_the_truth_of_r1(r1: Catalogue) -> None:
    groups = {k: ranges(v) for k, v in r1.layer_groups().items()}
    assert {k: groups[k] for k in ("all", "dense", "moe")} == {"all": "0-60", "dense": "0-2", "moe": "3-60"}
    assert groups["more_bits"].startswith("0-6,9,12,")
    assert groups["more_bits"].endswith(",51,53-60")


@pytest.mark.parametrize("base", shipped())
def test_starters_are_sound(base: str, tmp_path: Path, r1: Catalogue) -> None:
    """A starter on any recipe, and a copy of any recipe, lint without an error; the copy plans like the original."""
    if load(base).file_type in ("F32", "F16", "BF16"):
        return
    path = tmp_path / "mine.yaml"
    path.write_text(docs.starter(path, base, "deepseek-r1"), "utf-8")
    assert lint(path, r1) == []
    path.write_text(docs.copy_of(base, path), "utf-8")
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
    again = parse(docs.resolved(recipe), "resolved.yaml")
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
    """The steps of a first-time author."""
    done = quantkit("recipe", "new", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "mine.yaml written; next: quantkit recipe lint mine.yaml\n")
    first = (tmp_path / "mine.yaml").read_text("utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert json.loads(quantkit("recipe", "schema", cwd=tmp_path).stdout) == docs.schema()
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
    assert by_name["blk.7.ffn_down_exps.weight"]["rule"] == "mine.yaml:11 rules[0]"
    assert by_name["blk.8.ffn_down_exps.weight"]["rule"] == "UD-IQ1_S.yaml:43 rules[9]"


def new(*args: str | Path) -> None:
    done = CliRunner().invoke(cli, ["recipe", "new", *map(str, args)])
    assert done.exit_code == 0, done.output


def test_new_writes_no_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe goes into a repository that others check out in other places."""
    home = tmp_path / "home"
    for folder in ("mine", "theirs"):
        (home / folder).mkdir(parents=True)
    (home / "theirs" / "low.yaml").write_text(text_of("UD-IQ1_S").replace("name: UD-IQ1_S", "name: low"))
    monkeypatch.chdir(home)
    new("mine/a.yaml", "--base", "theirs/low.yaml")
    new("mine/b.yaml", "--base", home / "theirs" / "low.yaml")
    new("theirs/c.yaml", "--from", "mine/a.yaml")
    new("mine/d.yaml", "--from", home / "theirs" / "low.yaml")
    for path in home.rglob("*.yaml"):
        assert str(tmp_path) not in path.read_text(), path
    moved = home.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    bases = {p.name: load(str(p)).base for p in sorted(moved.rglob("*.yaml"))}
    assert bases == {"a.yaml": "../theirs/low.yaml", "b.yaml": "../theirs/low.yaml", "c.yaml": "low.yaml",
                     "d.yaml": None, "low.yaml": None}  # fmt: skip


def test_new_names_the_next_command_as_a_shell_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, typed in (("-a.yaml", "./-a.yaml"), ("a b.yaml", "'a b.yaml'")):
        done = CliRunner().invoke(cli, ["recipe", "new", "--", name])
        assert done.output == f"{name} written; next: quantkit recipe lint {typed}\n"


def test_new_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    for name in ("yes", "1e3", "null", "a b", "a'b", "~"):
        new(tmp_path / f"{name}.yaml")
        assert load(str(tmp_path / f"{name}.yaml")).name == name
        new(tmp_path / f"{name}.yaml", "--from", "Q4_K_M", "--force")
        assert load(str(tmp_path / f"{name}.yaml")).name == name


def test_new_from_a_recipe_whose_name_is_not_on_its_own_line(tmp_path: Path) -> None:
    origin = tmp_path / "flow.yaml"
    origin.write_text("{name: f, arch: [deepseek2], file_type: Q4_K_M, otherwise: mixture Q4_K_M}\n")
    done = CliRunner().invoke(cli, ["recipe", "new", str(tmp_path / "a.yaml"), "--from", str(origin)])
    assert str(done.exception) == ("flow.yaml:1 name: cannot be copied: write its name on a line of its own first")
    origin.write_text('\ufeff"name": f\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: mixture Q4_K_M\n')
    new(tmp_path / "a.yaml", "--from", origin)
    assert load(str(tmp_path / "a.yaml")).name == "a"


# ---------------------------------------------------------------- recipes among other YAML

FOREIGN = {
    "empty.yaml": "",
    "docker-compose.yml": "name: web\nservices:\n  app: &app\n    image: x\n  b: {<<: *app}\nvolumes: {}\n",
    "workflow.yaml": "name: CI\non: [push]\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps: [{run: make}]\n",
    "action.yml": "name: a\ndescription: b\ninputs: {}\nruns:\n  using: composite\n",
    "k8s.yaml": "apiVersion: v1\nkind: Role\nmetadata:\n  name: r\nrules:\n- verbs: [get]\n---\nkind: B\n---\n",
    "route.yaml": "kind: IngressRoute\nspec:\n  routes:\n  - match: Host(`a`)\n    kind: Rule\n",
    "mkdocs.yml": "site_name: d\nmarkdown_extensions:\n- x:\n    f: !!python/name:pymdownx.superfences.fence\n",
    "snapcraft.yaml": "name: s\nbase: core22\ntitle: S\ndescription: d\nversion: '1'\ngrade: devel\nparts: {}\nx: 1\n",
    "lima.yaml": "arch: x86_64\nbase: template.yaml\nimages: []\nmounts: []\ncpus: 4\nmemory: 4GiB\n",
    "semgrep.yml": "rules:\n- id: a\n  pattern: b\n  message: c\n",
    "taskfile.yml": "version: '3'\nvars: {a: b}\ntasks: {}\n",
    "playbook.yml": "- hosts: all\n  vars: {}\n  tasks: []\n",
    "quants.yaml": "model: r1\nimatrix: i.dat\nquants: [Q4_K_M]\n",
    "mlflow.yaml": "{name: a, rules: [{id: b, type: c}], x: 1, y: 2}\n",
    "not yaml.yaml": "a: [\n\t- {{ template }}\n%",
    "lock.yaml": "version: 1\nmatrix: {recipes: [all]}\ncells: []\n",
    "huge.yaml": "rules:\n" + "  - match: x\n" * 100_000,
}


def lint_of(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["recipe", "lint", *map(str, args)])


@pytest.mark.parametrize("name", FOREIGN)
def test_yaml_of_others_is_passed_over(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FOREIGN[name])
    done = lint_of("--only-recipes", path)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "1 file is no recipe, passed over\n")
    assert lint_of(path).exit_code == RecipeError.exit_code  # a file that is named as a recipe must be one


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\x00name: x")
    assert lint_of("--only-recipes", tmp_path / "a.yaml").exit_code == 0


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_is_taken_for_one(name: str, tmp_path: Path) -> None:
    text = "".join(line for line in shipped()[name].splitlines(keepends=True) if not line.startswith("#"))
    assert looks_like_recipe(text)
    assert looks_like_recipe(shipped()[name])
    assert looks_like_recipe(docs.starter(tmp_path / "a.yaml", name, "deepseek-r1").partition("title")[2])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: a\narch: [deepseek2]\nfile_type: Q4_K_M\nrulez:\n  - {match: x, type: Q4_K, why: y}\n",
         "error: a.yaml:4 rulez: unknown key 'rulez' (did you mean rules?)"),
        ("name: a\nbase: UD-IQ1_S\nvars: [", "error: a.yaml:3 not valid YAML"),
        ("rules:\n  - match: x\n    type: Q4_K\n", "error: a.yaml:1 name: is missing"),
        ("{name: a, rules: [{match: x, type: Q9}]}", "error: a.yaml:1 rules[0].type: unknown type 'Q9'"),
        ("# yaml-language-server: $schema=../recipes/recipe.schema.json\nnam: a\n",
         "error: a.yaml:2 name: is missing\nerror: a.yaml:2 nam: unknown key"),
        ("name: a\nbase: &b UD-IQ1_S\narch: *b\n", "error: a.yaml:3 not valid YAML: '*b' is an alias"),
    ],
)  # fmt: skip
def test_a_faulty_recipe_is_a_recipe(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("jobs: {}\n")
    done = lint_of("--only-recipes", tmp_path / "a.yaml", tmp_path / "b.yaml", "UD-IQ1_S")
    assert done.exit_code == RecipeError.exit_code
    assert done.stdout.startswith(what)
    assert done.stdout.endswith("UD-IQ1_S: fine on deepseek-r1\n")


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

"""Rounding in plans: set by a recipe, its rules, a policy or the command line; and fallbacks to ggml's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import factory
import pytest
from conftest import Run
from small_builds import OPTIONS, plan_of

from quantkit.authoring import interchange, review
from quantkit.base.errors import RecipeError, SourceError
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, make_plan
from quantkit.planning.report import plan_text
from quantkit.planning.rounding import check_covariance, with_covariance
from quantkit.recipe.load import Recipe, Rounding, files_of, load, parse
from quantkit.rounding.covariance import HOW_TO_MAKE, Covariances

HEAD = "name: r\narch: [deepseek2]\nfile_type: Q4_K_M\n"
RULES = """\
rules:
  - {match: "*_exps.weight", type: Q2_K, why: t}
  - {match: "*_shexp.weight", type: Q4_K, rounding: ggml, why: t}
  - {match: "blk.*.{attn_k_b,attn_output}.weight", type: Q8_0, why: t}
  - {match: "*", type: Q4_K, why: t}
"""
DOWN, GATE, SHARED = (f"blk.1.ffn_{x}.weight" for x in ("down_exps", "gate_exps", "gate_shexp"))


def plan(tiny_v3: Path, recipe: Recipe, covariance: Path | None = None) -> Plan:
    made = plan_of(tiny_v3, recipe, None)
    return made if covariance is None else with_covariance(made, Covariances(covariance))


def by(made: Plan) -> dict[str, str]:
    assert made.rounding is not None
    return {name: choice.rounding for name, choice in made.rounding.choices.items()}


def test_nothing_is_said_where_ggml_rounds_all(tiny_v3: Path) -> None:
    """A plan's text and JSON do not change by a byte."""
    plain = plan(tiny_v3, parse(HEAD + RULES, "r.yaml"))
    said = plan(tiny_v3, parse(HEAD + "rounding: ggml\n" + RULES, "r.yaml"))
    assert plain.rounding is said.rounding is None
    assert "rounding" not in json.dumps(plain.to_json(1))
    assert plan_text(replace(said, recipe=plain.recipe), []).count("rounding") == 0


def test_a_recipe_and_its_rules(tiny_v3: Path) -> None:
    made = plan(tiny_v3, parse(HEAD + "rounding: feedback\n" + RULES, "r.yaml"))
    methods = by(made)
    assert methods[DOWN] == methods[GATE] == "feedback"
    assert SHARED not in methods
    assert "blk.1.ffn_gate_inp.weight" not in methods  # never quantized
    some = {t["name"]: t.get("rounding") for t in made.to_json(1)["tensors"]}
    assert some[GATE] == {"by": "feedback", "why": "r.yaml:4 rounding"}
    assert some[SHARED] is None
    only = RULES.replace("type: Q2_K", "type: Q2_K, rounding: coarse")
    rounding = plan(tiny_v3, parse(HEAD + only, "r.yaml")).rounding
    assert rounding is not None
    assert {c.rounding for c in rounding.choices.values()} == {"coarse"}
    assert {n.split(".")[2] for n in rounding.choices} == {"ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"}
    assert rounding.choices[GATE].why == "r.yaml:5 rules[0]"


def test_the_command_line_comes_before_the_recipe_and_its_rules(tiny_v3: Path) -> None:
    recipe = parse(HEAD + "rounding: feedback\n" + RULES, "r.yaml")
    assert plan(tiny_v3, recipe.with_rounding(Rounding("ggml"))).rounding is None
    coarse = by(plan(tiny_v3, recipe.with_rounding(Rounding("coarse", said_by="--rounding"))))
    assert coarse[SHARED] == coarse[GATE] == "coarse"


def test_a_policy_of_a_recipe_lies_beside_it(tiny_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("policy: p\ndamp: 0.05\nrules: [{role: routed expert, rounding: feedback+gain}]\n")
    base = tmp_path / "base.yaml"
    base.write_text(HEAD + "rounding: {policy: p.yaml}\n" + RULES)
    (tmp_path / "deep").mkdir()
    above = tmp_path / "deep" / "r.yaml"
    above.write_text("name: r\nbase: ../base.yaml\n")
    for path in (base, above):
        made = plan(tiny_v3, load(str(path)))
        assert set(by(made).values()) == {"feedback+gain"}
        assert made.rounding is not None
        assert made.rounding.choices[GATE].damp == 0.05
        assert (tmp_path / "p.yaml").resolve() in [file.resolve() for file in files_of(str(path))]
    (tmp_path / "p.yaml").write_text("policy: p\nrules: [{role: nothing, rounding: ggml}]\n")
    with pytest.raises(RecipeError) as e:
        plan(tiny_v3, load(str(base)))
    assert str(e.value) == (
        "base.yaml:4 rounding: p.yaml:2 rules[0].role: unknown role 'nothing'; there are embedding, output, attention, "
        "dense ffn, shared expert, routed expert, router, norm, other"
    )


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("feedbak", "unknown rounding 'feedbak' (did you mean feedback?); there are ggml, coarse, feedback, "
         "feedback+gain"),
        ("{polcy: x}", "should be a name or {policy: NAME or FILE}, such as {policy: deepseek-v3}"),
        ("[]", "should be one of ggml, coarse, feedback, feedback+gain, or {policy: NAME or FILE}, not []"),
    ],
)  # fmt: skip
def test_a_recipe_that_says_something_else(said: str, says: str) -> None:
    with pytest.raises(RecipeError) as e:
        parse(f"{HEAD}rounding: {said}\n{RULES}", "r.yaml")
    assert str(e.value) == f"r.yaml:4 rounding: {says}"


def test_a_rule_for_rounding_alone_changes_something(tiny_v3: Path) -> None:
    recipe = parse(HEAD + RULES.replace("rules:\n", 'rules:\n  - {match: "blk.1.*_exps.weight", type: Q2_K, '
                                        "rounding: feedback, why: t}\n"), "r.yaml")  # fmt: skip
    made = plan(tiny_v3, recipe)
    assert made.warnings == ()
    assert set(by(made)) == {f"blk.1.ffn_{x}_exps.weight" for x in ("down", "gate", "up")}


def test_what_falls_back_is_said_with_counts(tiny_v3: Path, tiny_covariance: Path) -> None:
    made = plan(tiny_v3, parse(HEAD + "rounding: feedback\n" + RULES, "r.yaml"), tiny_covariance)
    assert made.to_json(1)["warnings"] == [
        "2 tensors stay as ggml rounds them: the covariance has none of their inputs: output.weight, token_embd.weight",
        "4 of 8 matrices of 2 tensors stay as ggml rounds them: they saw fewer tokens than they have columns (2 of "
        f"them none): '{DOWN}' 1-2 and others",
    ]
    some = {t["name"]: t.get("rounding") for t in made.to_json(1)["tensors"]}
    assert some[DOWN] == {
        "by": "feedback", "why": "r.yaml:4 rounding", "matrices": 4, "ggml_matrices": 2,
        "falls_back": "2 saw fewer tokens than they have columns",
    }  # fmt: skip
    assert some["output.weight"]["by"] == "ggml"
    text = plan_text(made, [], True)
    assert "feedback, 2 of 4 ggml" in text
    assert made.rounding is not None
    assert [line for line in made.rounding.listed() if "_exps" in line] == [
        "feedback blk.{1-2}.ffn_down_exps.weight but 1-2",
        "feedback blk.{1-2}.ffn_gate_exps.weight",
        "feedback blk.{1-2}.ffn_up_exps.weight",
    ]


def test_other_types_keep_their_rounding(tiny_v3: Path, tiny_covariance: Path) -> None:
    made = plan(tiny_v3, parse(HEAD + "rounding: feedback\n" + RULES, "r.yaml"), tiny_covariance)
    other = made.with_types({"*_up_exps.weight": "Q4_K", "blk.1.attn_output.weight": "F16"})
    assert other.rounding is not None
    assert made.rounding is not None
    assert other.rounding.covariance is made.rounding.covariance
    assert other.rounding.of("blk.1.ffn_up_exps.weight") is not None
    assert "blk.1.attn_output.weight" not in other.rounding.choices  # each value alone


def test_without_a_covariance_nothing_is_built(tiny_v3: Path) -> None:
    made = plan(tiny_v3, parse(HEAD + RULES.replace("type: Q2_K", "type: Q2_K, rounding: feedback"), "r.yaml"))
    with pytest.raises(SourceError) as e:
        check_covariance(made)
    assert str(e.value) == (
        f"'{DOWN}' and 5 more tensors are to be rounded by feedback (r.yaml:5 rules[0]), which needs a covariance of "
        f"their inputs: give --covariance DIR; {HOW_TO_MAKE}"
    )
    assert HOW_TO_MAKE == "make one with: quantkit imatrix make MODEL --text F -o imatrix.gguf --covariance DIR"


def test_a_covariance_of_another_model(tiny_v3: Path, tmp_path: Path) -> None:
    recipe = parse(HEAD + "rounding: feedback\n" + RULES, "r.yaml")
    folder = factory.covariance_for(open_model(str(tiny_v3), OPTIONS), tmp_path / "cov")
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace("blk.", "blk.7"))
    with pytest.raises(SourceError) as e:
        plan(tiny_v3, recipe, folder)
    assert str(e.value) == (
        f"{folder}: has nothing for 'output.weight', nor for any other tensor that is to be rounded by it; it is of "
        "another model"
    )


def test_explain_and_diff(tiny_v3: Path) -> None:
    model = open_model(str(tiny_v3), OPTIONS)
    a = make_plan(model, parse(HEAD + RULES, "r.yaml"))
    b = make_plan(model, parse(HEAD + "rounding: feedback\n" + RULES, "r.yaml"))
    assert review.explain(b, GATE).verdict[-1] == (
        "rounded by feedback, where the covariance of its inputs allows it: r.yaml:4 rounding"
    )
    assert review.explain(b, SHARED).verdict[-1] == "rounded as ggml does it"
    assert len(review.explain(a, GATE).verdict) == 3
    found = review.diff(a, b).roundings()
    assert found is not None
    assert found[0] == []
    assert "feedback blk.{1-2}.ffn_gate_exps.weight" in found[1]
    assert review.diff(a, a).roundings() is None
    says = "how 29 tensors are rounded is left out: other tools round as ggml does"
    assert [says in interchange.export(plan, "tensor-types").notes for plan in (a, b)] == [False, True]


def test_on_the_command_line(tiny_v3: Path, tiny_covariance: Path, tmp_path: Path, quantkit: Run) -> None:
    (tmp_path / "r.yaml").write_text(HEAD + RULES)
    common = ("plan", tiny_v3, "--pre", "deepseek-v3", "-r", tmp_path / "r.yaml")
    plain = quantkit(*common)
    done = quantkit(*common, "--rounding", "feedback", "--covariance", tiny_covariance)
    assert done.returncode == 0
    assert "note: rounded otherwise than by ggml: 33 tensors by feedback (damp 0.01, search)" in (done.stdout)
    assert "rounding" not in plain.stdout
    both = quantkit(*common, "--rounding", "feedback", "--rounding-policy", "x")
    assert (both.returncode, both.stderr.splitlines()[-1]) == (
        2, "Error: --rounding and --rounding-policy both say how to round; give one"
    )  # fmt: skip
    idle = quantkit(*common, "--covariance", tiny_covariance)
    assert (idle.returncode, idle.stderr.splitlines()[-1]) == (
        2, "Error: --covariance needs a rounding to use it: give --rounding feedback, --rounding-policy, or a recipe "
        "that says how to round",
    )  # fmt: skip

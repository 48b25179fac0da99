"""Policies: what they choose, and what is wrong with them, in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_builds import OPTIONS

from quantkit import kernels
from quantkit.base.errors import RecipeError
from quantkit.model.open import open_model
from quantkit.recipe.schema import ROUNDINGS
from quantkit.rounding.policy import FEEDBACK_TYPES, METHODS, Choice, feasible, load, parse, shipped

TEXT = """\
policy: mine
damp: 0.02
search: false
measured: {date: 2026-11-28, model: tiny, text: some}
rules:
  - {match: "blk.*.ffn_{gate,up}_exps.weight", types: [Q2_K, IQ1_S], rounding: feedback+gain, why: "KLD x 0.81",
     figures: {kld: 0.81}}
  - {role: attention, rounding: coarse}
  - {role: routed expert, types: [Q2_K], rounding: ggml, why: "no better"}
"""


def test_the_first_rule_decides(tiny_v3: Path) -> None:
    policy = parse(TEXT, "mine.yaml")
    by_name = {t.name: t for t in open_model(str(tiny_v3), OPTIONS).tensors}

    def choose(name: str, type_: str = "Q2_K") -> Choice:
        return policy.choose(by_name[name], type_)

    assert choose("blk.1.ffn_up_exps.weight") == Choice(
        "feedback+gain", "policy mine rules[0]: KLD x 0.81", 0.02, False
    )
    assert choose("blk.1.attn_output.weight") == Choice("coarse", "policy mine rules[1]", 0.02, False)
    assert choose("blk.1.ffn_down_exps.weight").is_ggml
    assert choose("blk.1.ffn_up_exps.weight", "Q4_K") == Choice("ggml", "policy mine has no rule for it", 0.02, False)
    both = choose("blk.1.ffn_up_exps.weight")
    assert (both.method, both.gain, both.is_ggml) == ("feedback", True, False)
    assert (policy.name, policy.digest, policy.text) == ("mine", "00ad5485cd83", TEXT)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("coarse", "corse", "p.yaml:8 rules[1].rounding: unknown rounding 'corse' (did you mean coarse?); there are "
         "ggml, coarse, feedback, feedback+gain"),
        ("role: attention", "role: attn", "p.yaml:8 rules[1].role: unknown role 'attn' (did you mean attention?); "
         "there are embedding, output, attention, dense ffn, shared expert, routed expert, router, norm, other"),
        ("IQ1_S]", "IQ1_X]", "p.yaml:6 rules[0].types[1]: unknown type 'IQ1_X' (did you mean IQ1_S?)"),
        ("damp: 0.02", "damp: 2", "p.yaml:2 damp: '2' is not a share of the mean diagonal above 0 and at most 1, such "
         "as 0.01"),
        ("search: false", "serch: false", "p.yaml:3 serch: unknown key 'serch' (did you mean search?); known are "
         "policy, title, damp, search, measured, rules"),
        (TEXT, "[]", "p.yaml:1 a policy is a mapping with policy and rules"),
        (TEXT, "policy: x\nrules: []\n", "p.yaml:2 rules: is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_its_place(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(RecipeError) as e:
        parse(TEXT.replace(old, new), "p.yaml")
    assert str(e.value) == says


def test_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TEXT)
    assert load("mine.yaml", tmp_path).name == load(str(tmp_path / "mine.yaml")).name == "mine"
    for name in shipped():
        assert load(name).text == shipped()[name]
    with pytest.raises(RecipeError) as e:
        load("deepsek-v9")
    assert str(e.value).startswith("no policy of rounding is called 'deepsek-v9'")
    assert str(e.value).endswith("; one of your own is given as a path ending in .yaml")
    with pytest.raises(RecipeError) as e:
        load("gone.yaml", tmp_path)
    assert str(e.value) == "gone.yaml: cannot be read: No such file or directory"


def test_methods_and_types_are_those_there_are() -> None:
    """The command line's, the recipe's and the policy's words; and the types that the kernels have feedback for."""
    from command_tree import commands

    for name in ("plan", "build", "verify"):
        (option,) = [p for n, c in commands() if n == name for p in c.params if p.name == "rounding"]
        assert tuple(option.type.choices) == METHODS == ROUNDINGS  # type: ignore[attr-defined]
    for types in kernels.FEEDBACK.values():
        assert types == FEEDBACK_TYPES


def test_feedback_for_a_type_without_is_coarse() -> None:
    assert feasible(Choice("feedback", "w"), "Q4_K") == Choice("feedback", "w")
    assert feasible(Choice("feedback+gain", "w"), "TQ1_0") == Choice("coarse", "w; TQ1_0 has no feedback+gain")
    assert feasible(Choice("ggml", "w"), "TQ1_0") == Choice("ggml", "w")

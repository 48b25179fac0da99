"""Patterns of other tools in place of a glob: regular expressions and whole lines, each answered with the right form;
and layers as people write them."""

from __future__ import annotations

import json
import re

import pytest
from test_recipe import HEAD, refused

from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.rules import match_rules
from quantkit.recipe.docs import schema
from quantkit.recipe.foreign import as_glob, not_a_glob
from quantkit.recipe.load import parse
from quantkit.recipe.selectors import matcher

NAMES = [t.name for t in open_model("deepseek-v2-lite", Options()).tensors]
SAME = [
    "ffn_down_exps", r"\.ffn_down_exps\.", r"blk\.(3|4|5)\.ffn_(up|gate)_exps", r"^blk\.\d\.attn_output\.weight$",
    r"blk\.[0-3]\.", ".*attn.*", "ffn_.*_exps", r"attn_[^k]", "(?:attn|ffn)_norm", r"^output\.weight$", "shexp|attn_q",
    r"blk\.1\d\.", "^token", r"weight$", r"a.+p", r"\w_exps",
]  # fmt: skip


@pytest.mark.parametrize("regex", SAME)
def test_a_regex_as_a_glob_matches_the_same(regex: str) -> None:
    glob = as_glob(regex)
    assert glob is not None
    found = [name for name in NAMES if matcher(glob).match(name)]
    assert found == [name for name in NAMES if re.search(regex, name)]
    assert found


@pytest.mark.parametrize(
    "regex", [r"blk\.[0-9]+\.", "a{2}", "(ab)?c", "^a|b", "(a", "a)", r"\bx", "[[:alpha:]]", "a*", "\\"]
)
def test_a_regex_that_no_glob_is(regex: str) -> None:
    assert as_glob(regex) is None


@pytest.mark.parametrize("glob", ["blk.*.attn_output.weight", "*", "blk.[0-9].x", "blk.[!3].x", "{a,b}?.[^c]", "a-b_c"])
def test_a_glob_is_none_of_these(glob: str) -> None:
    assert not_a_glob(glob) == ""


WRONG = [
    (r"^blk\.\d+\.ffn_down",
     r"'^blk\.\d+\.ffn_down' is a regular expression; a rule takes a glob over the whole name: \"blk.*.ffn_down*\""),
    ("blk.(3|4).x",
     "'blk.(3|4).x' is a regular expression; a rule takes a glob over the whole name: \"*blk?{3,4}?x*\""),
    ("^(a", "'^(a' is a regular expression; a rule takes a glob over the whole name, such as "
     '"blk.*.ffn_down_exps.weight"'),
    ("ffn_down_exps=q4_k",
     "'ffn_down_exps=q4_k' is a line NAME=TYPE of another tool; write match: \"*ffn_down_exps*\" and type: q4_k"),
    (r"blk\..*\.attn_k_b=q8_0",
     r"'blk\..*\.attn_k_b=q8_0' is a line NAME=TYPE of another tool; write match: "
     '"*blk.*.attn_k_b*" and type: q8_0'),
    ("blk.*.x.weight=Q4_K",
     "'blk.*.x.weight=Q4_K' is a line NAME=TYPE of another tool; write match: \"blk.*.x.weight\" and type: Q4_K"),
    ("a==b", "'a==b' has a '=', which no tensor's name has; write the glob alone"),
]  # fmt: skip


@pytest.mark.parametrize(("match", "says"), WRONG, ids=[m for m, _ in WRONG])
def test_what_is_no_glob_is_said(match: str, says: str) -> None:
    text = HEAD + f"  - {{match: {json.dumps(match)}, type: Q4_K, why: t}}\n"
    assert refused(text) == f"r.yaml:5 rules[0].match: {says}".replace('\\"', '"')


# ---------------------------------------------------------------- layers

R1 = open_model("deepseek-r1", Options())
LAYERS = {
    "3-12": range(3, 13),
    "7": [7],
    "[3, 5]": [3, 5],
    "[3-5, 9]": [3, 4, 5, 9],
    '"3-5,9"': [3, 4, 5, 9],
    "3 - 5": [3, 4, 5],
    "3–5": [3, 4, 5],
    "[58-70]": [58, 59, 60],
    "moe[:2]": [3, 4],
}


@pytest.mark.parametrize(("written", "layers"), LAYERS.items(), ids=list(LAYERS))
def test_layers_as_people_write_them(written: str, layers: list[int]) -> None:
    text = HEAD + f'  - match: "blk.*.attn_output.weight"\n    layers: {written}\n    type: Q4_K\n    why: t\n'
    rule = match_rules(R1, parse(text, "r.yaml"))[0]
    assert rule.names == {f"blk.{i}.attn_output.weight" for i in layers}


A_LIST = "a list of layers is of numbers, such as [3, 5] or [3-5, 9]; a slice stands alone: moe[:6]"
NO_CHOICE = (
    "is not a choice of layers; write numbers, such as 3-12 or [3, 5], or a list of layers with a Python slice, such "
    "as "
    "moe, moe[:6] or all[-1]"
)
WRONG_LAYERS = {
    "12-3": "'12-3' runs backwards; write 3-12",
    "0-9999": "'0-9999' is more than 4,096 layers",
    "[]": A_LIST,
    "[moe, 3]": A_LIST,
    "[3, [4]]": A_LIST,
    "3:12": f"'3:12' {NO_CHOICE}",
    "3..12": f"'3..12' {NO_CHOICE}",
    "-3": f"'-3' {NO_CHOICE}",
    "3-": f"'3-' {NO_CHOICE}",
}


@pytest.mark.parametrize(("written", "says"), WRONG_LAYERS.items(), ids=list(WRONG_LAYERS))
def test_layers_that_are_none(written: str, says: str) -> None:
    text = HEAD + f'  - match: "*"\n    layers: {written}\n    type: Q4_K\n    why: t\n'
    assert refused(text) == f"r.yaml:6 rules[0].layers: {says}"


def test_the_schema_takes_layers_as_yaml_reads_them() -> None:
    """An editor checks what a YAML parser gives it: numbers, not text."""
    of = schema()["$defs"]["Rule"]["properties"]["layers"]["anyOf"]
    patterns = [re.compile(one["pattern"]) for one in of if one.get("type") == "string"]
    for text in ("3-12", "3-5, 9", "moe[:6]", "all"):
        assert any(p.search(text) for p in patterns)
    assert not any(p.search(text) for p in patterns for text in ("12:3", "some", "3-"))
    assert {"type": "integer", "minimum": 0} in of
    assert next(one for one in of if one.get("type") == "array")["items"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 0,
    }

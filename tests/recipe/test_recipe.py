"""Recipes: which are read, which are refused and with which message, and the meaning of patterns and layer lists."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import RecipeError
from quantkit.gguf.types import FILE_TYPES, QTYPES
from quantkit.model.families.known import MODELS
from quantkit.model.families.options import LAYOUTS, Options
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan, must_have_weights
from quantkit.recipe.load import Recipe, load, parse, parse_sets
from quantkit.recipe.named import mixture_recipe, shipped
from quantkit.recipe.schema import Rule
from quantkit.recipe.selectors import LAYER_GROUPS, expand_braces, glob_regex, matcher, parse_layers, pick_layers

HEAD = "name: r\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n"
GOOD = HEAD + '  - {match: "*.weight", type: Q4_K, why: t}\n'


def refused(text: str, file: str = "r.yaml") -> str:
    """The error message for a text."""
    with pytest.raises(RecipeError) as e:
        parse(text, file)
    assert e.value.exit_code == 3
    return str(e.value)


# ---------------------------------------------------------------- what is read

FULL = """\
# a comment
name: Mine
title: My first
description: >-
  Two lines
  as one
arch: [deepseek2, llama]
file_type: IQ1_S
imatrix: required
rules:
  - match: "blk.*.ffn_down_exps.weight"
    layers: "moe[:6]"
    type: iq2_xxs
    why: early
    optional: true
  - {match: '*', type: Q4_K, why: 2025-01-27}
"""


def test_a_whole_recipe() -> None:
    recipe = parse(FULL, "mine.yaml")
    assert (recipe.name, recipe.title, recipe.description) == ("Mine", "My first", "Two lines as one")
    assert (recipe.arch, recipe.file_type, recipe.imatrix) == (("deepseek2", "llama"), "IQ1_S", "required")
    assert (recipe.mixture, recipe.base, recipe.variables, recipe.metadata) == (None, None, {}, ())
    assert recipe.rules == (
        Rule(match="blk.*.ffn_down_exps.weight", layers="moe[:6]", type="IQ2_XXS", why="early", optional=True),
        Rule(match="*", type="Q4_K", why="2025-01-27"),
    )


def test_what_may_be_left_out() -> None:
    recipe = parse(GOOD, "r.yaml")
    assert (recipe.title, recipe.description, recipe.imatrix) == ("", "", "optional")
    assert recipe.rules == (Rule(match="*.weight", type="Q4_K", why="t"),)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "mine.yaml:2"),
        (("name",), "mine.yaml:2 name"),
        (("description",), "mine.yaml:4 description"),
        (("arch", 1), "mine.yaml:7 arch[1]"),
        (("rules",), "mine.yaml:10 rules"),
        (("rules", 0), "mine.yaml:11 rules[0]"),
        (("rules", 0, "why"), "mine.yaml:14 rules[0].why"),
        (("rules", 1, "type"), "mine.yaml:16 rules[1].type"),
        (("rules", 1, "layers"), "mine.yaml:16 rules[1].layers"),
        (("nowhere",), "mine.yaml:2 nowhere"),
    ],
)
def test_places(path: tuple[str | int, ...], place: str) -> None:
    """Keys that are absent are reported at the place they belong to."""
    assert parse(FULL, "mine.yaml").place(*path) == place


def test_scalars_are_text_as_written() -> None:
    text = HEAD.replace("name: r", "name: 1.58") + "  - {match: 0x10, type: Q4_K, why: 12:30}\n"
    recipe = parse(text, "r.yaml")
    assert (recipe.name, recipe.rules[0].match, recipe.rules[0].why) == ("1.58", "0x10", "12:30")


# ---------------------------------------------------------------- what is refused

KNOWN = (
    "name, title, description, base, arch, file_type, imatrix, imatrix_policy, rounding, vars, metadata, otherwise, "
    "rules"
)
KNOWN_IN_RULES = "match, layers, type, why, rounding, optional"
ALIAS = "is an alias, which recipes do without; a pattern that begins with * needs quotes"
ALL_MISSING = "\n".join(f"r.yaml:1 {key}: is missing" for key in ("name", "arch", "file_type", "rules"))

BROKEN = {
    # not a recipe at all
    "empty": ("", "r.yaml:1 the recipe is empty"),
    "comment only": ("# nothing\n", "r.yaml:1 the recipe is empty"),
    "null": ("~\n", "r.yaml:1 a recipe is a mapping with name, arch, file_type and rules"),
    "list": ("- name: r\n", "r.yaml:1 a recipe is a mapping with name, arch, file_type and rules"),
    "text": ("UD-IQ1_S\n", "r.yaml:1 a recipe is a mapping with name, arch, file_type and rules"),
    "nothing in it": ("{}\n", ALL_MISSING),
    # YAML
    "unclosed": ("name: [r\narch: x\n", "r.yaml:2 not valid YAML: expected ',' or ']', but got ':'"),
    "tab": ("name: r\n\tarch: x\n", "r.yaml:2 not valid YAML: found character '\\t' that cannot start any token"),
    "colon": ("name: a: b\n", "r.yaml:1 not valid YAML: mapping values are not allowed here"),
    "two documents": (GOOD + "---\n" + GOOD, "r.yaml:6 not valid YAML: but found another document"),
    "star without quotes": (
        HEAD + "  - match: *.weight\n",
        "r.yaml:5 not valid YAML: expected alphabetic or numeric character, but found '.'; "
        "a pattern that begins with * needs quotes",
    ),
    "star and name without quotes": (
        HEAD + "  - {match: *exps, type: Q4_K, why: t}\n",
        f"r.yaml:5 not valid YAML: '*exps' {ALIAS}",
    ),
    "NUL": ("name: r\narch: \0\n", "r.yaml:2 not valid YAML: the character '\\x00' is not allowed"),
    "escape character": ("name: r\n\n\x1b[31m\n", "r.yaml:3 not valid YAML: the character '\\x1b' is not allowed"),
    "brackets without end": ("name: " + "[" * 5000, "r.yaml: nested too deeply for a recipe"),
    "mappings without end": ("x: " + "{a: " * 5000, "r.yaml: nested too deeply for a recipe"),
    "lists without end": ("- " * 5000, "r.yaml: nested too deeply for a recipe"),
    "eight deep": (
        "name:\n  - - - - - - - x\n",
        "r.yaml:2 name[0][0][0][0][0][0]: nested too deeply for a recipe",
    ),
    # tags and aliases
    "python object": (
        "name: !!python/object/apply:os.system [true]\n",
        "r.yaml:1 name: has the tag !!python/object/apply:os.system, which recipes do without",
    ),
    "python object in a rule": (
        HEAD + '  - match: "*"\n    type: !!python/name:os.system\n',
        "r.yaml:6 rules[0].type: has the tag !!python/name:os.system, which recipes do without",
    ),
    "tag of one's own": ("name: !secret r\n", "r.yaml:1 name: has the tag !secret, which recipes do without"),
    "a number that is none": ("name: !!int r\n", "r.yaml:1 name: has the tag !!int, which recipes do without"),
    "a set": ("!!set {name}\n", "r.yaml:1: has the tag !!set, which recipes do without"),
    "a list of pairs": ("rules: !!omap []\n", "r.yaml:1 rules: has the tag !!omap, which recipes do without"),
    "alias": (
        "name: &n r\ntitle: *n\n",
        f"r.yaml:2 not valid YAML: '*n' {ALIAS}",
    ),
    "alias of itself": (
        "&a [*a]\n",
        f"r.yaml:1 not valid YAML: '*a' {ALIAS}",
    ),
    "merge key": (GOOD + "<<: {title: x}\n", f"r.yaml:6 <<: unknown key '<<'; known are {KNOWN}"),
    # keys
    "twice": (GOOD + "name: again\n", "r.yaml:6 name: occurs twice"),
    "twice in a rule": (
        HEAD + '  - match: "*"\n    type: Q4_K\n    why: t\n    type: Q6_K\n',
        "r.yaml:8 rules[0].type: occurs twice",
    ),
    "a list as key": (HEAD + "  - {[match]: x}\n", "r.yaml:5 rules[0]: a key must be text"),
    "unknown key": (
        GOOD + "filetype: Q2_K\n",
        f"r.yaml:6 filetype: unknown key 'filetype' (did you mean file_type?); known are {KNOWN}",
    ),
    "unknown key, nothing near": (GOOD + "x: 1\n", f"r.yaml:6 x: unknown key 'x'; known are {KNOWN}"),
    "unknown key in a rule": (
        HEAD + '  - match: "*"\n    type: Q4_K\n    why: t\n    layer: all\n',
        f"r.yaml:8 rules[0].layer: unknown key 'layer' (did you mean layers?); known are {KNOWN_IN_RULES}",
    ),
    "several mistakes": (
        HEAD.replace("Q4_K_M", "Q4") + '  - {match: "*", typ: Q4_K}\n',
        "r.yaml:3 file_type: unknown file type 'Q4' (did you mean Q4_1?)\n"
        "r.yaml:5 rules[0].type: is missing\n"
        "r.yaml:5 rules[0].why: is missing\n"
        f"r.yaml:5 rules[0].typ: unknown key 'typ' (did you mean type?); known are {KNOWN_IN_RULES}",
    ),
    # values
    "arch as text": (GOOD.replace("[deepseek2]", "deepseek2"), "r.yaml:2 arch: should be a list, not 'deepseek2'"),
    "arch empty": (GOOD.replace("[deepseek2]", "[]"), "r.yaml:2 arch: is empty"),
    "arch of numbers": (GOOD.replace("[deepseek2]", "[a, true]"), "r.yaml:2 arch[1]: should be text, not True"),
    "name empty": (GOOD.replace("name: r", "name: ''"), "r.yaml:1 name: is empty"),
    "name null": (GOOD.replace("name: r", "name:"), "r.yaml:1 name: should be text, not None"),
    "file type": (
        GOOD.replace("Q4_K_M", "q4_km"),
        "r.yaml:3 file_type: unknown file type 'q4_km' (did you mean Q4_K_M?)",
    ),
    "imatrix": (GOOD + "imatrix: require\n", "r.yaml:6 imatrix: should be 'required' or 'optional', not 'require'"),
    "no rules": (HEAD + "  []\n", "r.yaml:4 rules: is empty"),
    "rules as mapping": (
        HEAD + '  "*": Q4_K\n',
        "r.yaml:4 rules: should be a list, not {'*': 'Q4_K'}",
    ),
    "a rule as text": (GOOD + '  - "*.bias"\n', "r.yaml:6 rules[1]: should be a mapping, not '*.bias'"),
    "unknown type": (
        HEAD + '  - match: "*"\n    type: IQ1_X\n    why: t\n',
        "r.yaml:6 rules[0].type: unknown type 'IQ1_X' (did you mean IQ1_S?)",
    ),
    "a mixture as type": (
        HEAD + '  - {match: "*", type: Q4_K_M, why: t}\n',
        "r.yaml:5 rules[0].type: unknown type 'Q4_K_M' (did you mean Q4_K?)",
    ),
    "an integer type": (
        HEAD + '  - {match: "*", type: i32, why: t}\n',
        "r.yaml:5 rules[0].type: I32 is not a type to quantize to",
    ),
    "no why": (HEAD + '  - {match: "*", type: Q4_K}\n', "r.yaml:5 rules[0].why: is missing"),
    "why empty": (HEAD + '  - {match: "*", type: Q4_K, why: ""}\n', "r.yaml:5 rules[0].why: is empty"),
    "why true": (HEAD + '  - {match: "*", type: Q4_K, why: yes}\n', "r.yaml:5 rules[0].why: should be text, not True"),
    "optional": (
        HEAD + '  - {match: "*", type: Q4_K, why: t, optional: maybe}\n',
        "r.yaml:5 rules[0].optional: should be true or false, not 'maybe'",
    ),
    "a float file_type": (
        HEAD.replace("Q4_K_M", "BF16")
        + '  - {match: "a*", type: BF16, why: t}\n  - {match: "*", type: Q4_K, why: t}\n',
        "r.yaml:6 rules[1].type: Q4_K cannot be had with file_type BF16: llama-quantize then ignores all rules; "
        "give a quantized file_type",
    ),
    # patterns
    "match empty": (HEAD + '  - {match: "", type: Q4_K, why: t}\n', "r.yaml:5 rules[0].match: is empty"),
    "brace": (
        HEAD + '  - {match: "blk.*.ffn_{gate,up.weight", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].match: 'blk.*.ffn_{gate,up.weight' has a brace without its partner",
    ),
    "bracket": (
        HEAD + '  - {match: "blk.[0-9.*", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].match: 'blk.[0-9.*' has a '[' without its ']'",
    ),
    "backward range": (
        HEAD + '  - {match: "blk.[9-0].*", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].match: 'blk.[9-0].*' has a set with the empty range 9-0",
    ),
    "too many alternatives": (
        HEAD + '  - {match: "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].match: '{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}' has more than 256 alternatives",
    ),
    "too long": (
        HEAD + f'  - {{match: "{"ab" * 501}", type: Q4_K, why: t}}\n',
        f"r.yaml:5 rules[0].match: '{'ab' * 30}…' is longer than 1,000 characters",
    ),
    # layers
    "unknown layers": (
        HEAD + '  - {match: "*", layers: "more", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].layers: unknown layer list 'more' (did you mean moe?); there are all, dense, moe, more_bits",
    ),
    "layers of numbers": (
        HEAD + '  - {match: "*", layers: "5-3", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].layers: '5-3' runs backwards; write 3-5",
    ),
    "a slice of words": (
        HEAD + '  - {match: "*", layers: "moe[first]", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].layers: '[first]' is not a Python slice or index, such as [:6], [6:] or [-1]",
    ),
    "a step of nothing": (
        HEAD + '  - {match: "*", layers: "moe[::0]", type: Q4_K, why: t}\n',
        "r.yaml:5 rules[0].layers: '[::0]' has a step of 0",
    ),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_recipes(text: str, message: str) -> None:
    assert refused(text) == message


def test_the_message_names_the_file() -> None:
    assert refused("- x\n", "UD-IQ9.yaml").startswith("UD-IQ9.yaml:1 ")


@pytest.mark.parametrize("fan", [2, 9, 10_000])
def test_a_small_file_cannot_become_a_large_one(fan: int) -> None:
    """The billion laughs, and fewer levels with more of them: refused at the first alias."""
    levels = ["a0: &a0 [lol, lol]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * fan)}]" for i in range(1, 5)]
    assert refused("\n".join(levels) + "\n") == f"r.yaml:2 not valid YAML: '*a0' {ALIAS}"


@pytest.mark.parametrize("file_type", [n for n in FILE_TYPES if n in ("F32", "F16", "BF16")])
def test_a_recipe_may_be_all_of_one_float(file_type: str) -> None:
    text = HEAD.replace("Q4_K_M", file_type) + f'  - {{match: "*", type: {file_type}, why: t}}\n'
    assert parse(text, "r.yaml").file_type == file_type


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_recipe_or_an_error_of_ours(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text, "r.yaml")


YAML_TOKENS = st.sampled_from(
    ["name", "rules", ":", " ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "*", "&a", "*a", "!!int", "!x", "'", '"',
     "|", ">", "#", "? ", "%", "@", "~", "1e3", "0x_", "2020-13-45", "1:99", "true", "<<", "=", "\t", "\ufeff"]
)  # fmt: skip


@given(st.lists(YAML_TOKENS, max_size=25).map("".join))
@settings(max_examples=500, deadline=None)
def test_any_yaml_is_a_recipe_or_an_error_of_ours(text: str) -> None:
    """This includes timestamps, integers and tags that make PyYAML itself fail."""
    for whole in (text, GOOD + text, HEAD + "  - {match: " + text + ", type: Q4_K, why: t}\n"):
        try:
            made = parse(whole, "r.yaml")
        except RecipeError:
            continue
        assert made.arch == ("deepseek2",)


# ---------------------------------------------------------------- files


def test_load_by_name_in_any_case() -> None:
    assert load("UD-IQ1_S") == load("ud-iq1_s")
    assert load("UD-IQ1_S").name == "UD-IQ1_S"
    assert load("UD-IQ1_S").place("name") == "UD-IQ1_S.yaml:3 name"


def test_load_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    (tmp_path / "mine.yml").write_text(GOOD)
    (tmp_path / "mine").write_text(GOOD)
    assert load(str(tmp_path / "mine.yaml")).name == "r"
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "mine.yml", "./mine", "mine"):
        assert load(name).place("name") == f"{Path(name).name}:1 name"
    # a file with a shipped recipe's name does not hide that recipe, and is given by its path
    (tmp_path / "UD-IQ1_S").write_text(GOOD)
    assert load("UD-IQ1_S").name == "UD-IQ1_S"
    assert load(str(tmp_path / "UD-IQ1_S")).name == "r"


def unloadable(name: str | Path) -> str:
    with pytest.raises(RecipeError) as e:
        load(str(name))
    return str(e.value)


def test_load_of_no_such_recipe() -> None:
    there_are = "`quantkit recipe list` shows them; a recipe of your own is given as a path ending in .yaml"
    assert unloadable("UD_IQ1S") == f"no shipped recipe is called 'UD_IQ1S' (did you mean UD-IQ1_S?); {there_are}"
    assert unloadable("mine") == f"no shipped recipe is called 'mine'; {there_are}"
    assert unloadable("") == f"no shipped recipe is called ''; {there_are}"


def test_load_of_unreadable_files(tmp_path: Path) -> None:
    gone = tmp_path / "gone.yaml"
    assert unloadable(gone) == f"{gone}: cannot be read: No such file or directory"
    for name in ("gone.yaml", "gone.yml", "gone/UD-IQ1_S"):
        assert unloadable(name) == f"{name}: cannot be read: No such file or directory"
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert unloadable(folder) == f"{folder}: cannot be read: Is a directory"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9 au lait\n")
    assert unloadable(latin) == f"{latin}: is not UTF-8 text: invalid continuation byte at byte 9"
    wide = tmp_path / "wide.yaml"
    wide.write_bytes("name: r\n".encode("utf-16-le"))
    assert unloadable(wide) == (
        f"{wide}: is not UTF-8 text: a NUL, as in a binary file or UTF-16 without a mark at byte 1"
    )
    wide.write_bytes(b"\xff\xfen\0a")
    assert unloadable(wide) == f"{wide}: is not UTF-8 text: truncated data at byte 4"


def test_what_is_no_recipe_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert unloadable("folder") == "folder: is a directory; give a recipe in it, such as folder/recipe.yaml"
    assert unloadable("a\0.yaml") == "a\\x00.yaml: cannot be read: a name cannot hold a NUL"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_a_recipe(encoding: str, tmp_path: Path) -> None:
    text = "name: r\r\narch: [deepseek2]\r\nfile_type: Q4_K_M\r\notherwise: mixture Q4_K_M\r\n"
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode(encoding))
    assert load(str(path)) == parse(text, "r.yaml")
    (tmp_path / "on.yaml").write_bytes("name: b\nbase: r.yaml\n".encode(encoding))
    assert load(str(tmp_path / "on.yaml")).file_type == "Q4_K_M"
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as f:
        f.truncate((1 << 20) + 1)
    assert unloadable(huge) == f"{huge}: has more bytes than a recipe may have (1,048,576)"
    (tmp_path / "bad.yaml").write_text("- x\n")
    assert unloadable(tmp_path / "bad.yaml") == (
        "bad.yaml:1 a recipe is a mapping with name, arch, file_type and rules"
    )


def test_load_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_text(GOOD, "utf-8-sig")
    assert load(str(tmp_path / "bom.yaml")).name == "r"


# ---------------------------------------------------------------- the shipped ones

DYNAMIC = ("UD-IQ1_M", "UD-IQ1_S", "UD-IQ2_XXS", "UD-Q2_K_XL")
BASIC = ("Q2_K_L", "Q2_K_XS", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
NAIVE = ("NAIVE-IQ1_M", "NAIVE-IQ1_S", "NAIVE-IQ2_XXS")
FILES = tuple(sorted((*DYNAMIC, *BASIC, *NAIVE)))


def test_which_are_shipped() -> None:
    """The recipe files, then every mixture that has no file."""
    assert tuple(shipped()) == (*FILES, *(name for name in FILE_TYPES if name not in FILES))


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes(name: str) -> None:
    recipe = load(name)
    assert isinstance(recipe, Recipe)
    assert recipe == parse(shipped()[name], f"{name}.yaml")
    assert recipe.name == name
    assert len(recipe.title) > 10
    lines = shipped()[name].splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert lines[1].endswith(f": quantkit plan deepseek-r1 --recipe {name}")


@pytest.mark.parametrize("model", sorted({v: k for k, v in MODELS.items()}.values()))
def test_shipped_recipes_on_every_family(model: str) -> None:
    """On every family and in either layout, no rule fails, is idle or warns; the bytes follow from the types."""
    for layout in LAYOUTS:
        c = open_model(model, Options(layout))
        for name in shipped():
            recipe = load(name)
            if c.arch in recipe.arch:
                plan = make_plan(c, recipe)
                assert plan.warnings == (), name
                assert 1.5 < plan.bpw < 32.1


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_recipes(name: str) -> None:
    recipe = load(name)
    assert recipe.title.startswith("DeepSeek-R1 dynamic ")
    assert recipe.arch == ("deepseek2",)
    assert recipe.imatrix == "required"
    assert len({rule.why for rule in recipe.rules}) >= len(recipe.rules) - 1
    for rule in recipe.rules:
        assert len(rule.why) > 20
        assert not rule.optional
    bits = QTYPES[recipe.rules[-1].type].bits
    assert bits == {"UD-IQ1_M": 1.5625, "UD-IQ1_S": 1.5625, "UD-IQ2_XXS": 2.0625, "UD-Q2_K_XL": 2.625}[name]


@pytest.mark.parametrize("name", FILE_TYPES)
def test_a_mixture_requires_an_imatrix_where_llama_quantize_does(name: str) -> None:
    """Without one, some tensor could not be made; if it is `optional`, no tensor needs it."""
    text = mixture_recipe(name).replace("imatrix: required", "imatrix: optional")
    plan = make_plan(open_model("deepseek-v2-lite"), parse(text, "r.yaml"))
    needy = any(must_have_weights(t.tensor.name, t.requested, name) for t in plan.tensors)
    assert load(name).imatrix == ("required" if needy else "optional")


# ---------------------------------------------------------------- patterns

PATTERNS = [
    ("output.weight", "output.weight", True),
    ("output.weight", "blk.0.attn_output.weight", False),
    ("output.weight", "output_weight", False),
    ("output", "output.weight", False),
    ("*output.weight", "blk.0.attn_output.weight", True),
    ("blk.*.ffn_down.weight", "blk.3.ffn_down.weight", True),
    ("blk.*.ffn_down.weight", "blk.3.ffn_down_exps.weight", False),
    ("blk.*.weight", "blk.3.a.b.c.weight", True),
    ("blk.?.attn_q.weight", "blk.3.attn_q.weight", True),
    ("blk.?.attn_q.weight", "blk.13.attn_q.weight", False),
    ("blk.1[0-3].*", "blk.12.x", True),
    ("blk.1[0-3].*", "blk.14.x", False),
    ("blk.[!0-2].*", "blk.3.x", True),
    ("blk.[!0-2].*", "blk.1.x", False),
    ("blk.[^0-2].*", "blk.3.x", True),
    ("[]]", "]", True),
    ("[!]]", "]", False),
    ("[!]]", "a", True),
    ("[a-]", "-", True),
    ("[-a]", "-", True),
    ("[a^]", "^", True),
    ("[a-a]", "a", True),
    ("[a-a]", "-", False),
    ("[\\]", "\\", True),
    ("a+b", "a+b", True),
    ("a+b", "aab", False),
    ("(a|b)", "a", False),
    ("a$", "a$", True),
    ("ffn_{gate,up}_exps", "ffn_up_exps", True),
    ("ffn_{gate,up}_exps", "ffn_down_exps", False),
    ("ffn_{gate,up}_exps", "ffn_gate,up_exps", False),
    ("x{a,{b,c}d}y", "xcdy", True),
    ("x{a,{b,c}d}y", "xcy", False),
    ("x{,_b}", "x", True),
    ("x{a}", "xa", True),
    ("a,b", "a,b", True),
    ("{a,b}{c,d}", "bc", True),
    ("{a,b*}", "a", True),
    ("{a,b*}", "ax", False),
    ("*", "", True),
    ("*", "two\nlines", True),
    ("a?b", "a\nb", True),
    ("a", "a\n", False),
    ("A", "a", False),
]


@pytest.mark.parametrize(("pattern", "name", "matches"), PATTERNS)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert bool(matcher(pattern).match(name)) == matches


def naive_expand(pattern: str) -> list[str]:
    """Expand alternatives, outermost first (the product's code goes innermost first)."""
    depth, start = 0, -1
    for i, ch in enumerate(pattern):
        if ch == "{":
            start, depth = (i if depth == 0 else start), depth + 1
        elif ch == "}":
            depth -= 1
            if depth < 0:
                raise ValueError
            if depth == 0:
                choices, at, level = [""], pattern[start + 1 : i], 0
                for c in at:
                    level += (c == "{") - (c == "}")
                    if c == "," and level == 0:
                        choices.append("")
                    else:
                        choices[-1] += c
                inner = [x for choice in choices for x in naive_expand(choice)]
                return [pattern[:start] + a + b for a, b in product(inner, naive_expand(pattern[i + 1 :]))]
    if depth:
        raise ValueError
    return [pattern]


def naive_match(pattern: str, name: str) -> bool:
    """Match a brace-free glob character by character, trying every possibility."""
    if not pattern:
        return not name
    ch, rest = pattern[0], pattern[1:]
    if ch == "*":
        return any(naive_match(rest, name[i:]) for i in range(len(name) + 1))
    if ch == "[":
        inverse = rest[:1] in ("!", "^")
        body = rest[1:] if inverse else rest
        end = body.index("]", 1)
        members: set[str] = set()
        text = body[:end]
        while text:
            if len(text) >= 3 and text[1] == "-":
                span = range(ord(text[0]), ord(text[2]) + 1)
                if not span:
                    raise ValueError
                members |= {chr(c) for c in span}
                text = text[3:]
            else:
                members.add(text[0])
                text = text[1:]
        rest = body[end + 1 :]
        return bool(name) and (name[0] in members) != inverse and naive_match(rest, name[1:])
    return bool(name) and (ch == "?" or ch == name[0]) and naive_match(rest, name[1:])


def naive_is_valid(pattern: str) -> bool:
    """Whether every set has an end and no range is empty."""
    while "[" in pattern:
        try:
            naive_match(pattern[pattern.index("[") :], "x")
            body = pattern[pattern.index("[") + 1 :]
            skip = 2 if body[:1] in ("!", "^") else 1
            pattern = body[body.index("]", skip) + 1 :]
        except ValueError:
            return False
    return True


RAW = st.text(alphabet="aab..**?[]{},-!^\\&~|+$(\n", min_size=1, max_size=12)
SETS = st.builds(
    "[{}{}]".format, st.sampled_from(["", "", "!", "^"]), st.text("abc.-]^!\\&~|[*?\n", min_size=1, max_size=4)
)
PIECES = st.one_of(st.sampled_from(["*", "*", "?", "a", "b"]), st.text("ab.-,^!\\+$(|\n", max_size=2), SETS)


def few_alternatives(pattern: str) -> bool:
    return pattern != "" and pattern.count(",") <= 6


NESTED = st.recursive(
    PIECES,
    lambda inner: st.lists(st.lists(inner, max_size=2).map("".join), min_size=1, max_size=3).map(
        lambda choices: "{" + ",".join(choices) + "}"
    ),
    max_leaves=5,
)


@settings(max_examples=1500, deadline=None)
@given(
    pattern=st.one_of(RAW, st.lists(NESTED, min_size=1, max_size=6).map("".join).filter(few_alternatives)),
    names=st.lists(st.text(alphabet="aab.-],!^\\&|+$(\n", max_size=7), min_size=1, max_size=8),
)
def test_patterns_match_as_a_naive_matcher_does(pattern: str, names: list[str]) -> None:
    try:
        alternatives = naive_expand(pattern)
        valid = all(naive_is_valid(a) for a in alternatives)
    except ValueError:
        valid = False
    if not valid:
        with pytest.raises(ValueError, match="has a"):
            matcher(pattern)
        return
    assert expand_braces(pattern) == alternatives
    compiled = matcher(pattern)
    for name in [*names, pattern]:
        assert bool(compiled.match(name)) == any(naive_match(a, name) for a in alternatives), (pattern, name)


@given(st.text(max_size=20).filter(lambda s: not set("*?[]{}") & set(s)))
def test_a_plain_name_matches_itself_and_nothing_longer(name: str) -> None:
    compiled = re.compile(glob_regex(name))
    assert compiled.match(name)
    assert not compiled.match(name + "x")
    assert not compiled.match("x" + name)


def test_no_pattern_takes_long() -> None:
    """As the regular expression .*a.*a.*a… this would take practically forever."""
    assert not Rule(match="*a" * 30 + "*b", type="Q4_K", why="t").matcher().match("a" * 20_000)
    assert Rule(match="*a" * 30 + "*b", type="Q4_K", why="t").matcher().match("a" * 20_000 + "b")


@pytest.mark.parametrize(("n", "fine"), [(256, True), (257, False)])
def test_at_most_256_alternatives(n: int, fine: bool) -> None:
    pattern = "{" + ",".join(str(i) for i in range(n)) + "}"
    if fine:
        assert expand_braces(pattern) == [str(i) for i in range(n)]
    else:
        with pytest.raises(ValueError, match=r"^'\{0,1,2,.*' has more than 256 alternatives$"):
            expand_braces(pattern)


def test_alternatives_come_in_order() -> None:
    assert expand_braces("a{b,c}d{e,f}") == ["abde", "abdf", "acde", "acdf"]


# ---------------------------------------------------------------- layers

GROUPS = {"all": range(61), "dense": range(3), "moe": range(3, 61), "more_bits": (0, 1, 6, 9, 60)}


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", set(range(61))),
        ("dense", {0, 1, 2}),
        ("moe[:6]", {3, 4, 5, 6, 7, 8}),
        ("moe[6:]", set(range(9, 61))),
        ("moe[0]", {3}),
        ("moe[-1]", {60}),
        ("all[-2]", {59}),
        ("moe[::29]", {3, 32}),
        ("dense[::-1]", {0, 1, 2}),
        ("more_bits[1:3]", {1, 6}),
        (" moe [ : 3 ] ", {3, 4, 5}),
        ("dense[3]", set()),
        ("dense[-4]", set()),
        ("dense[5:]", set()),
        ("dense[:0]", set()),
    ],
)
def test_layers(text: str, layers: set[int]) -> None:
    assert pick_layers(text, GROUPS) == layers


NUMBER = st.none() | st.integers(-80, 80)


@given(
    group=st.sampled_from(LAYER_GROUPS),
    start=NUMBER,
    stop=NUMBER,
    step=NUMBER,
    two=st.booleans(),
    space=st.sampled_from(["", " "]),
)
def test_slices_are_pythons(
    group: str, start: int | None, stop: int | None, step: int | None, two: bool, space: str
) -> None:
    numbers = [start, stop] if two else [start, stop, step]
    text = f"{group}[{f'{space}:{space}'.join('' if n is None else str(n) for n in numbers)}]"
    if not two and step == 0:
        with pytest.raises(ValueError, match=r"has a step of 0$"):
            parse_layers(text)
        return
    expected = GROUPS[group][start:stop] if two else GROUPS[group][start:stop:step]
    assert pick_layers(text, GROUPS) == frozenset(expected)


@given(group=st.sampled_from(LAYER_GROUPS), index=st.integers(-80, 80))
def test_indices_are_pythons(group: str, index: int) -> None:
    layers = list(GROUPS[group])
    expected = {layers[index]} if -len(layers) <= index < len(layers) else set()
    assert pick_layers(f"{group}[{index}]", GROUPS) == expected


@pytest.mark.parametrize(
    "text",
    ["", "moe[", "moe]", "moe[]", "moe[1,2]", "moe[1:x]", "moe[:::]", "moe[1.5]", "moe[1:2][0]", "moe[1_0]", "moe[0x1]",
     "MOE", "moe[9999999]", "moe x", "3,", "[:3]", "moe[--1]", "all[:6]; x"],
)  # fmt: skip
def test_what_is_no_layer_list(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a |is not a choice of layers|unknown layer list"):
        parse_layers(text)


@given(st.text(alphabet="almoedns_[]:+-0123456789 ", max_size=14))
def test_any_layers_are_a_list_or_an_error(text: str) -> None:
    message = ""
    try:
        group, index = parse_layers(text)
        assert group in LAYER_GROUPS
        assert index is None or isinstance(index, int | slice | frozenset)
    except ValueError as e:
        message = str(e)
    said = ("layer list", "choice of layers", "slice or index", "step of 0", "runs backwards", "more than 4,096 layers")
    assert message == "" or any(words in message for words in said)


# ---------------------------------------------------------------- base, vars, metadata

DERIVED = """\
name: mine
base: UD-IQ1_S
vars:
  down: Q2_K
rules:
  - {match: "blk.*.ffn_down_exps.weight", layers: "moe[:2]", type: $down, why: early}
"""


def test_base_appends_its_rules() -> None:
    recipe, base = parse(DERIVED, "mine.yaml"), load("UD-IQ1_S")
    assert recipe.rules[1:] == base.rules
    assert (recipe.n_own, recipe.base, recipe.rules[0].type) == (1, "UD-IQ1_S", "Q2_K")
    assert (recipe.arch, recipe.file_type, recipe.imatrix) == (base.arch, base.file_type, base.imatrix)
    assert (recipe.name, recipe.title) == ("mine", "")
    assert recipe.place("rules", 0, "type") == "mine.yaml:6 rules[0].type"
    assert recipe.place("rules", 1, "type") == "UD-IQ1_S.yaml:13 rules[0].type"
    assert recipe.place("arch") == "UD-IQ1_S.yaml:8 arch"
    assert recipe.place("vars", "down") == "mine.yaml:4 vars.down"


def test_own_keys_win_over_the_bases(tmp_path: Path) -> None:
    """A base is also found beside the recipe, wherever that is."""
    (tmp_path / "below.yaml").write_text(
        "name: below\narch: [deepseek2, llama]\nfile_type: Q4_K_M\nimatrix: required\notherwise: mixture Q4_K_M\n"
        "vars: {down: Q2_K, up: Q3_K}\nmetadata: {general.author: str:a, general.url: str:u}\nrules:\n"
        '  - {match: "*down*", type: $down, why: t}\n  - {match: "*up*", type: $up, why: t}\n'
    )
    (tmp_path / "above.yaml").write_text(
        "name: above\nbase: below.yaml\narch: [deepseek2]\nfile_type: Q2_K\nimatrix: optional\n"
        "otherwise: mixture Q2_K\nvars: {down: Q6_K}\nmetadata: {general.author: str:b}\n"
    )
    recipe = load(str(tmp_path / "above.yaml"), {"up": "iq3_s"})
    assert (recipe.arch, recipe.file_type, recipe.imatrix, recipe.mixture) == (
        ("deepseek2",),
        "Q2_K",
        "optional",
        "Q2_K",
    )
    assert [r.type for r in recipe.rules] == ["Q6_K", "IQ3_S"]
    assert [o.text for o in recipe.metadata] == ["general.author=str:b", "general.url=str:u"]
    assert recipe.place("rules", 0) == "below.yaml:9 rules[0]"


def test_what_a_base_has_may_be_overridden() -> None:
    """Rules that are taken completely by earlier ones are errors in the recipe itself, but not in its base."""
    text = DERIVED.replace(', layers: "moe[:2]"', "")
    plan = make_plan(open_model("deepseek-r1"), parse(text, "mine.yaml"))
    assert plan.warnings == ()
    assert {t.type for t in plan.tensors if "ffn_down_exps" in t.tensor.name} == {"Q2_K"}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"dwn": "Q2_K"},
            "--set dwn: mine has no variable 'dwn' (did you mean down?); it has down",
        ),
        ({"down": "Q2"}, "--set down: unknown type 'Q2' (did you mean Q2_K?)"),
        ({"down": "I8"}, "--set down: I8 is not a type to quantize to"),
    ],
)
def test_sets_that_are_wrong(sets: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as e:
        parse(DERIVED, "mine.yaml", sets)
    assert str(e.value) == message


@pytest.mark.parametrize("value", ["down", "=Q2_K", "down="])
def test_a_set_is_a_name_and_a_type(value: str) -> None:
    with pytest.raises(RecipeError) as e:
        parse_sets(["up=Q3_K", value])
    assert str(e.value) == f"--set {value}: is not NAME=TYPE, such as down=Q2_K"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("split.no: int:1", "split.no: split.no follows from the build and cannot be set"),
        ("split.count: int:3", "split.count: split.count follows from the build and cannot be set"),
        ("'a b': str:x", "a b: 'a b' is not a metadata key, such as general.name"),
        ("a.b: int:-1", "a.b: '-1' is not an integer from 0 to 4294967295"),
        ("a.b: int:4294967296", "a.b: '4294967296' is not an integer from 0 to 4294967295"),
        ("a.b: bool:yes", "a.b: 'yes' is not true or false"),
        ("a.b: float:1e39", "a.b: '1e39' is not a number that float32 holds"),
        ("a.b: float:x", "a.b: 'x' is not a number that float32 holds"),
        ("a.b: i32:1", "a.b: 'i32:1' is not TYPE:VALUE with the type str, int, float or bool, such as str:i32:1"),
        (f"a.b: str:{'x' * 128}", f"a.b: '{'x' * 60}…' is 128 bytes; llama-quantize takes 127"),
    ],
)  # fmt: skip
def test_metadata_that_is_wrong(line: str, message: str) -> None:
    assert refused(f"name: r\nbase: UD-IQ1_S\nmetadata:\n  {line}\n") == f"r.yaml:4 metadata.{message}"

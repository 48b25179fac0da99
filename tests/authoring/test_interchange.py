"""Rules for other tools and from them: round trips change nothing, and losses are reported."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Run, Tools
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.authoring.clone import Head, write
from quantkit.authoring.interchange import FORMATS, Imported, export, import_rules
from quantkit.base.errors import QuantkitError, RecipeError
from quantkit.cli import cli
from quantkit.gguf.header import read_header
from quantkit.gguf.types import QTYPES
from quantkit.llama_cpp import toolchain
from quantkit.llama_cpp.tensor_types import ggml_name
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.mixtures import BASE_TYPES
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe.load import load, parse

R1 = open_model("deepseek-r1")
LITE = open_model("deepseek-v2-lite", Options("kv_b"))
MIXED = (
    "name: mixed\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: mixture Q4_K_M\nrules:\n"
    '  - {match: "*_exps.weight", layers: "moe[::2]", type: IQ4_NL, why: every other}\n'
)


def types_of(plan: Plan) -> dict[str, str]:
    return {t.tensor.name: t.type for t in plan.tensors}


def read(text: str, form: str = "tensor-types", c: Catalogue = LITE, **options: Any) -> Imported:
    return import_rules(text, form, c, "r", "rules.txt", **options)


def imported(text: str, form: str = "tensor-types", c: Catalogue = LITE, **options: Any) -> dict[str, str]:
    return types_of(make_plan(c, parse(read(text, form, c, **options).text, "r.yaml")))


def refusal(text: str, form: str = "tensor-types", **options: Any) -> str:
    with pytest.raises(QuantkitError) as e:
        read(text, form, **options)
    assert isinstance(e.value, RecipeError)
    return str(e.value)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("recipe", ["UD-IQ1_S", "UD-IQ1_M", "UD-IQ2_XXS", "UD-Q2_K_XL", "mixed"])
@pytest.mark.parametrize("model", ["deepseek-r1 k_b+v_b", "deepseek-r1 kv_b", "deepseek-v2-lite kv_b"])
def test_there_and_back(form: str, recipe: str, model: str) -> None:
    name, layout = model.split()
    c = open_model(name, Options(layout))
    plan = make_plan(c, parse(MIXED, "m.yaml") if recipe == "mixed" else load(recipe))
    made = read(export(plan, form).text, form, c)
    assert made.notes == ()
    assert types_of(make_plan(c, parse(made.text, "r.yaml"))) == types_of(plan)
    assert (made.proof.n_tensors, made.proof.nbytes) == (len(c.tensors), plan.tensor_bytes)


NAMES = [t.name for t in LITE.tensors if t.quantizable]
ANY = ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "F16", "BF16", "MXFP4"]


@settings(max_examples=15, deadline=None)
@given(types=st.lists(st.sampled_from(ANY), min_size=len(NAMES), max_size=len(NAMES)), form=st.sampled_from(FORMATS))
def test_any_types_there_and_back(types: list[str], form: str) -> None:
    wanted = dict(zip(NAMES, types, strict=True))
    plan = make_plan(LITE, parse(write(LITE, wanted, Head("r", "Q8_0", False)), "r.yaml"))
    got = imported(export(plan, form).text, form)
    assert {n: got[n] for n in NAMES} == wanted


@pytest.mark.tools
def test_llama_quantize_does_what_the_exported_file_says(
    tools: Tools, quantkit: Run, tiny_bf16: Path, tmp_path: Path
) -> None:
    recipe, rules, out = tmp_path / "m.yaml", tmp_path / "types.txt", tmp_path / "out.gguf"
    recipe.write_text(MIXED)
    done = quantkit("recipe", "export", recipe, "--format", "tensor-types", "--model", tiny_bf16, "-o", rules)
    assert done.returncode == 0, done.stderr
    # Q2_K, so that tensors not covered by the rules would be noticed
    subprocess.run([tools.quantize, "--tensor-type-file", rules, tiny_bf16, out, "Q2_K", "2"], check=True,
                   capture_output=True)  # fmt: skip
    plan = make_plan(open_model(str(tiny_bf16)), parse(MIXED, "m.yaml"))
    assert {t.name: t.type for t in read_header(out).tensors} == types_of(plan)
    assert len(set(types_of(plan).values())) > 3


@pytest.mark.tools
@pytest.mark.parametrize(
    "rules",
    [
        "ffn_down_shexp=q8_0",  # moves the counters of the mixture
        "attn_(q|K)=Q5_0 exps=q4_0\n\nffn_down_exps=q8_0",  # capitals, and a rule that comes too late
        r"blk\.(?!0)\d+\.attn_output=iq4_nl output=q6_K ffn_gate_inp=q8_0",
        "weight=q6_k",
    ],
)
def test_imported_rules_give_what_llama_quantize_gives(
    tools: Tools, tiny_bf16: Path, tmp_path: Path, rules: str
) -> None:
    """Real patterns, not lists of names, with a mixture for the rest, give the same types."""
    path, out = tmp_path / "rules.txt", tmp_path / "out.gguf"
    path.write_text(rules)
    subprocess.run([tools.quantize, "--tensor-type-file", path, tiny_bf16, out, "Q3_K_M", "2"], check=True,
                   capture_output=True)  # fmt: skip
    c = open_model(str(tiny_bf16))
    assert imported(rules, c=c, file_type="Q3_K_M") == {t.name: t.type for t in read_header(out).tensors}


# ---------------------------------------------------------------- export


def test_the_texts() -> None:
    plan = make_plan(R1, load("UD-IQ1_S"))
    lines = export(plan, "tensor-types").text.splitlines()
    assert len(lines) == 725
    assert r"^blk\.3\.ffn_down_exps\.weight$=iq2_xxs" in lines
    rules = export(plan, "custom-q").text.strip().split(",")
    assert len(rules) == 18
    assert r"^blk\.[3-8]\.ffn_down_exps\.weight$=iq2_xxs" in rules
    assert r"^blk\.(9|[1-5][0-9]|60)\.ffn_down_exps\.weight$=iq1_s" in rules
    assert r"^token_embd\.weight$=q4_K" in rules
    text = export(plan, "thireus").text
    assert text.startswith(
        "## UD-IQ1_S: DeepSeek-R1 dynamic 1.58-bit\n# Model: deepseek-r1 (deepseek2, layout k_b+v_b)\n"
    )
    assert "\n## never quantized\n" in text
    assert "\n^blk\\.([3-9]|[1-5][0-9]|60)\\.exp_probs_b\\.bias$=f32\n" in text
    patterns = [line.partition("=")[0] for line in text.splitlines() if line and not line.startswith("#")]
    for t in R1.tensors:
        assert sum(bool(re.search(p, t.name)) for p in patterns) == 1, t.name


def test_what_a_format_cannot_say() -> None:
    assert export(make_plan(R1, load("UD-IQ1_S")), "tensor-types").notes == (
        "the file is for deepseek-r1 (layout k_b+v_b) only: its layers are written out",
        "the reasons of the recipe's 11 rules are left out",
        "the type that the rows allow, not the one the recipe asks for, is given to 61 tensors, the first "
        "blk.0.attn_k_b.weight Q6_K -> Q8_0",
        "the recipe requires an importance matrix: give llama-quantize --imatrix FILE",
        "general.file_type is no part of the file: give llama-quantize IQ1_S as its type",
    )
    bf16 = 'name: b\narch: [deepseek2]\nfile_type: BF16\nrules:\n  - {match: "*", type: BF16, why: all}\n'
    assert export(make_plan(LITE, parse(bf16, "b.yaml")), "custom-q").notes[-1] == (
        "with BF16 as its type llama-quantize ignores every rule: give it Q8_0, and --override-kv "
        "general.file_type=int:32"
    )


def test_types_that_ik_llama_does_not_have() -> None:
    tq = 'name: t\narch: [deepseek2]\nfile_type: TQ1_0\nrules:\n  - {match: "*", type: TQ1_0, why: all}\n'
    plan = make_plan(R1, parse(tq, "t.yaml"))
    assert "=tq1_0\n" in export(plan, "tensor-types").text
    for form in ("custom-q", "thireus"):
        with pytest.raises(RecipeError) as e:
            export(plan, form)
        assert str(e.value) == (
            "'output.weight' is TQ1_0, which is not among the types of ik_llama.cpp; give it another type, or export "
            "as tensor-types"
        )


@pytest.mark.parametrize(
    ("name", "form", "bad"),
    [
        ("Big.weight", "tensor-types", "'B'"),
        ("a b.weight", "tensor-types", "' '"),
        ("a=b.weight", "thireus", "'='"),
        ("a,b.weight", "custom-q", "','"),
    ],
)
def test_names_that_cannot_be_written(name: str, form: str, bad: str) -> None:
    plan = make_plan(R1, load("UD-Q2_K_XL"))
    tensors = [t._replace(tensor=t.tensor._replace(name=name)) if i == 0 else t for i, t in enumerate(plan.tensors)]
    with pytest.raises(RecipeError, match=f"^'{name}': .* has no way to write a name with {bad}$"):
        export(Plan(plan.catalogue, plan.recipe, tuple(tensors), ()), form)


@pytest.mark.tools
def test_types_are_written_as_ggml_writes_them() -> None:
    """ik_llama.cpp compared them case-sensitively for a long time."""
    lib = ctypes.CDLL(str(toolchain.ggml_library()))
    lib.ggml_type_name.restype = ctypes.c_char_p
    for t in QTYPES.values():
        assert ggml_name(t.name) == lib.ggml_type_name(t.id).decode()


# ---------------------------------------------------------------- import

#: the lines of a published recipe for DeepSeek-V3-0324, verbatim: not anchored, attn_kv_b beside attn_k_b and
#: attn_v_b, norms as f32
PUBLISHED = r"""
## Model head & embeddings
token_embd\.weight=q8_0
output\.weight=q8_0
output_norm\.weight=f32
blk\.([0-9]|[1-5][0-9]|60)\.attn_k_b\.weight=q8_0
blk\.([0-9]|[1-5][0-9]|60)\.attn_v_b\.weight=q8_0
blk\.([0-9]|[1-5][0-9]|60)\.attn_kv_a_mqa\.weight=q8_0
blk\.([0-9]|[1-5][0-9]|60)\.attn_output\.weight=q6_K
  # a comment, indented
blk\.([0-9]|[1-5][0-9]|60)\.attn_q_b\.weight=q8_0
blk\.([0-9]|[1-5][0-9]|60)\.attn_kv_b\.weight=q8_0
blk\.([0-9]|[1-5][0-9]|60)\.attn_q_a\.weight=q8_0
blk\.[0-2]\.ffn_(gate|up|down)\.weight=q8_0
blk\.([3-9]|[1-5][0-9]|60)\.ffn_gate_inp\.weight=f32
blk\.([3-9]|[1-5][0-9]|60)\.exp_probs_b\.bias=f32
blk\.([3-9]|[1-5][0-9]|60)\.ffn_(down|up|gate)_shexp\.weight=q8_0
blk\.(39|4[0-2]|3[2-7])\.ffn_down_exps\.weight=iq4_ks
blk\.([3-9]|[1-5][0-9]|60)\.ffn_(down|up|gate)_exps\.weight=iq3_xxs
"""


def test_a_published_recipe() -> None:
    made = read(PUBLISHED, "thireus", R1, renamed={"IQ4_KS": "iq4_xs"})
    got = types_of(make_plan(R1, parse(made.text, "r.yaml")))
    assert got["blk.39.ffn_down_exps.weight"] == "IQ4_XS"
    assert got["blk.38.ffn_down_exps.weight"] == "IQ3_XXS"
    assert got["blk.3.attn_output.weight"] == "Q8_0"  # output\.weight is not anchored
    assert list(made.warnings) == [
        r"rules.txt:12: 'blk\.([0-9]|[1-5][0-9]|60)\.attn_kv_b\.weight' matches no tensor of this model",
    ]
    assert list(made.notes) == [
        r"rules.txt:9: 'blk\.([0-9]|[1-5][0-9]|60)\.attn_output\.weight': 61 of the 61 it matches are taken before, "
        "by rules.txt:4",
        r"rules.txt:19: 'blk\.([3-9]|[1-5][0-9]|60)\.ffn_(down|up|gate)_exps\.weight': 10 of the 174 it matches are "
        "taken before, by rules.txt:18",
    ]
    recipe = parse(made.text, "r.yaml")
    assert (recipe.imatrix, recipe.file_type) == ("required", "IQ3_XXS")
    assert ("blk.{3[2-79],4[0-2]}.ffn_down_exps.weight", "IQ4_XS") in [(r.match, r.type) for r in recipe.rules]


def test_a_type_that_ggml_does_not_have_is_named_with_its_line() -> None:
    for type_ in (
        "iq4_ks",
        "iq2_k",
        "iq4_kss",
        "q4_0_r8",
        "iq1_s_r4",
        "q8_KV",
        "iq5_k_r4",
        "q6_0",
        "q8_k_r8",
        "IQ2_KL",
    ):
        assert refusal(f"# first\nblk=q8_0\nffn_.*={type_}\n", "thireus") == (
            f"rules.txt:3: {type_} is a type of ik_llama.cpp that ggml does not have; say what to take for it with "
            f"--map {type_}=TYPE, such as one of similar size"
        )


@pytest.mark.parametrize(
    ("text", "form", "what"),
    [
        ("blk=q4_k\nx", "tensor-types", "rules.txt:2: 'x' is not pattern=type"),
        ("a=q4_k note", "tensor-types", "rules.txt:1: 'note' is not pattern=type"),
        ("a=q8_0\nblk\u200b=q8_0", "custom-q",
         "rules.txt:2: 'blk\\u200b=q8_0' has the invisible character U+200B; take it out"),
        ("=q4_k", "tensor-types", "rules.txt:1: '=q4_k' is not pattern=type"),
        ("a=", "thireus", "rules.txt:1: 'a=' is not pattern=type"),
        ("a=q8_0,b=q9_0", "custom-q", "rules.txt:1 rule 2: unknown type 'q9_0' (did you mean Q8_0?)"),
        ("a=i32", "tensor-types", "rules.txt:1: unknown type 'i32' (did you mean F32?)"),
        ("a(b=q8_0", "thireus",
         "rules.txt:1: 'a(b' is not a regular expression: missing ), unterminated subpattern at position 1"),
        ("(?i)A=q8_0", "thireus", "rules.txt:1: '(?i)A' has '(?', which quantkit does not read; write it out"),
        ("(?<!b)a=q8_0", "thireus", "rules.txt:1: '(?<!b)a' has '(?', which quantkit does not read; write it out"),
        ("[[:digit:]]=q8_0", "thireus",
         "rules.txt:1: '[[:digit:]]' has '[:', which quantkit does not read; write it out"),
        ("a++=q8_0", "thireus", "rules.txt:1: 'a++' has '++', which quantkit does not read; write it out"),
        ("", "tensor-types", "rules.txt: has no rule pattern=type"),
        ("# all gone\n", "thireus", "rules.txt: has no rule pattern=type"),
        ("x" * 1001 + "=q8_0", "thireus", f"rules.txt:1: '{'x' * 60}…' is longer than 1,000 characters"),
        ("exps=q8_0", "thireus",
         "rules.txt: no line matches 'output.weight' (and 190 more); say with --file-type what llama-quantize was "
         "given as its type, such as Q4_K_M"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_read(text: str, form: str, what: str) -> None:
    assert refusal(text, form) == what


def test_escaped_signs_are_no_foreign_ones() -> None:
    assert imported(r"\(\?i\)|a\++|\[:|.=q8_0")["output.weight"] == "Q8_0"


def test_a_type_that_has_no_fallback() -> None:
    tensors = tuple(t._replace(shape=(96, 2)) if t.name == "output.weight" else t for t in LITE.tensors)
    with pytest.raises(RecipeError) as e:
        read("blk=q8_0\n.=nvfp4", c=replace(LITE, tensors=tensors))
    assert str(e.value) == (
        "rules.txt:2: 'output.weight': NVFP4 needs rows of 64s, these have 96, and it has no fallback"
    )


def test_a_float_for_the_rest() -> None:
    assert refusal("a=q8_0", file_type="F16") == (
        "with F16 as its type llama-quantize ignores every rule; give a quantized one"
    )


def test_what_lines_did_is_said() -> None:
    text = "\\S+_exps=q8_0\nattn_NORM=q8_0\noutput_norm=f32\nnothing=q8_0\nffn_up_exps=q4_0\nffn_down_exps=q8_0\n"
    made = read(text, file_type="Q4_K_M")
    assert list(made.warnings) == [
        "rules.txt:1: '\\S+_exps' matches no tensor of this model",
        "rules.txt:2: 'attn_NORM' is ignored: llama-quantize never quantizes what it matches (27 tensors, F32)",
        "rules.txt:4: 'nothing' matches no tensor of this model",
    ]
    assert list(made.notes) == [
        "rules.txt:1: '\\S+_exps' is read as llama-quantize does, in lower case: '\\s+_exps'",
        "rules.txt:2: 'attn_NORM' is read as llama-quantize does, in lower case: 'attn_norm'",
        "no line matches 217 tensors: llama-quantize's choice for Q4_K_M",
        "another type than asked, since rows do not divide into its blocks: 1 tensor, the first blk.0.ffn_down.weight "
        "Q6_K -> Q8_0",
    ]
    assert parse(made.text, "r.yaml").file_type == "Q4_K_M"


def test_custom_q_as_it_is_typed() -> None:
    text = '"exps=iq4_nl,weight=Q8_0"\n'
    got = imported(text, "custom-q")
    assert {t for n, t in got.items() if "_exps" in n} == {"IQ4_NL"}
    assert {t for n, t in got.items() if n in NAMES and "_exps" not in n} == {"Q8_0"}


#: rules of a model card, as its author wrote them in a script
CARD = r"""#!/usr/bin/env bash

custom="
# Attention (the GPU's) [0-26]
blk\..*\.attn_kv_b\.weight=q8_0,
blk\..*\.attn_.*=iq4_nl   # the rest

# Routed experts
blk\..*\.ffn_down_exps\.weight=q5_0, blk\..*\.ffn_.*=q4_0
.*=q8_0,
"

custom=$(
  echo "$custom" | grep -v '^#' | \
  sed -Ez 's:\n+:,:g;s:,$::;s:^,::'
)

./build/bin/llama-quantize --custom-q "$custom" --imatrix /m.dat /in.gguf /out.gguf Q4_K 24
"""
RULES = CARD[CARD.index("\n# Att") : CARD.index('"\n\ncustom=$')]
PLAIN = (
    r"blk\..*\.attn_kv_b\.weight=q8_0,blk\..*\.attn_.*=iq4_nl,"
    r"blk\..*\.ffn_down_exps\.weight=q5_0,blk\..*\.ffn_.*=q4_0,.*=q8_0"
)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("custom-q", CARD),
        ("custom-q", RULES),
        ("custom-q", f"```bash\n{RULES}```\n"),
        ("custom-q", f'--custom-q "{PLAIN}"'),
        ("custom-q", f"--custom-q={PLAIN}"),
        ("custom-q", f"llama-quantize --custom-q '{PLAIN},' --imatrix a.dat in out Q4_K"),
        ("custom-q", f"\u201c{PLAIN}\u201d"),
        ("custom-q", PLAIN.replace(",", ",\\\n")),
        ("custom-q", PLAIN.replace("attn_", "at\\\ntn_")),
        ("thireus", RULES),
        ("thireus", CARD),
        ("thireus", PLAIN.replace(",", "\n\ufeff")),
        ("tensor-types", RULES),
        ("tensor-types", "--tensor-type " + PLAIN.replace(",", " --tensor-type ")),
        ("tensor-types", '--tensor-type "' + PLAIN.replace(",", '" \\\n  --tensor-type "') + '"'),
    ],
)
def test_rules_as_model_cards_print_them(form: str, text: str) -> None:
    assert imported(text, form) == imported(PLAIN, "custom-q")
    got = imported(text, form)
    assert [got[f"blk.3.{n}.weight"] for n in ("attn_kv_b", "attn_q", "ffn_down_exps", "ffn_up_exps")] == [
        *("Q8_0", "IQ4_NL", "Q5_0", "Q4_0"),
    ]
    assert read(text, form).warnings == ()


def test_lines_keep_their_numbers() -> None:
    assert refusal(CARD.replace("=q5_0", "=q9_9"), "custom-q").startswith("rules.txt:9 rule 1: unknown type 'q9_9'")
    assert refusal("a=q8_0\n\nb=q8_0,\\\nc=q9_9", "custom-q").startswith("rules.txt:3 rule 2: unknown type 'q9_9'")


def test_comments_are_none_to_llama_quantize() -> None:
    assert read("# all\n.=q8_0").notes == (
        "the comments are passed over; llama-quantize itself refuses a file that has them",
    )
    assert read("# all\n.=q8_0", "custom-q").notes == ()


@pytest.mark.parametrize("file_type", sorted(set(BASE_TYPES) - {"F32", "F16", "BF16"}))
def test_a_rule_for_nothing_leaves_the_mixture(file_type: str) -> None:
    text = f"name: m\narch: [deepseek2]\nfile_type: {file_type}\nimatrix: required\notherwise: mixture {file_type}\n"
    plan = make_plan(LITE, parse(text + "rules: []\n", "m.yaml"))
    assert imported("nothing=q8_0", file_type=file_type, has_imatrix=True) == types_of(plan)


# ---------------------------------------------------------------- the commands


def test_the_commands(quantkit: Run, tmp_path: Path) -> None:
    rules, recipe = tmp_path / "r1.recipe", tmp_path / "r1.yaml"
    args = ["--format", "thireus", "--model", "deepseek-r1", "--layout", "kv_b"]
    done = quantkit("recipe", "export", "UD-IQ1_S", *args, "-o", rules)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("note: the file is for deepseek-r1 (layout kv_b) only")
    rules.write_text(rules.read_text().replace("=iq2_xxs", "=iq2_ks"))
    done = quantkit("recipe", "import", rules, *args)
    assert (done.returncode, done.stdout) == (3, "")
    assert "r1.recipe:" in done.stderr
    assert "--map iq2_ks=TYPE" in done.stderr
    done = quantkit("recipe", "import", rules, *args, "--map", "iq2_ks=iq2_xxs", "-o", recipe)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "round trip: 1,025 tensors, 140,226,135,552 bytes, all equal\n"
    c = open_model("deepseek-r1", Options("kv_b"))
    assert types_of(make_plan(c, load(str(recipe)))) == types_of(make_plan(c, load("UD-IQ1_S")))


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (["--file-type", "Q4_KM"], 2, "unknown file type 'Q4_KM' (did you mean Q4_K_M?)"),
        (["--map", "iq4_ks"], 2, "'iq4_ks' is not TYPE=TYPE, such as iq4_ks=IQ4_XS"),
        (["--map", "iq4_ks=IQ5_X"], 9, "unknown type 'IQ5_X' (did you mean "),
    ],
)
def test_options_that_are_wrong(quantkit: Run, tmp_path: Path, options: list[str], code: int, what: str) -> None:
    rules = tmp_path / "r.txt"
    rules.write_text("a=q8_0")
    done = quantkit("recipe", "import", rules, "--format", "tensor-types", "--model", "deepseek-v2-lite", *options)
    assert done.returncode == code
    assert what in done.stderr


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_first_rule(form: str, encoding: str, tmp_path: Path) -> None:
    rules, recipe = tmp_path / "r.txt", tmp_path / "r.yaml"
    rules.write_bytes("blk\\..*\\.attn_kv_b=q8_0\r\nattn=q5_0\r\n.=q4_0\r\n".encode(encoding))
    options = ["--format", form, "-m", "deepseek-v2-lite", "--layout", "kv_b", "-o", str(recipe)]
    done = CliRunner().invoke(cli, ["recipe", "import", str(rules), *options])
    assert (done.exit_code, "warning" in done.output) == (0, False), done.output
    got = types_of(make_plan(LITE, load(str(recipe))))
    assert (got["blk.0.attn_kv_b.weight"], got["blk.0.attn_q.weight"], got["output.weight"]) == ("Q8_0", "Q5_0", "Q4_0")


def test_a_line_that_does_nothing_is_a_warning(tmp_path: Path) -> None:
    rules = tmp_path / "r.txt"
    rules.write_text("blk.99=q8_0\n.=q4_0\n")
    options = ["recipe", "import", str(rules), "--format", "thireus", "-m", "deepseek-v2-lite"]
    done = CliRunner().invoke(cli, options)
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == "warning: r.txt:1: 'blk.99' matches no tensor of this model"
    assert json.loads(CliRunner().invoke(cli, [*options, "--json"]).stdout)["warnings"] == [
        "r.txt:1: 'blk.99' matches no tensor of this model"
    ]


def test_utf_16_without_its_mark(tmp_path: Path) -> None:
    rules = tmp_path / "r.txt"
    rules.write_bytes("blk=q8_0".encode("utf-16-le"))
    done = CliRunner().invoke(cli, ["recipe", "import", str(rules), "--format", "thireus", "-m", "deepseek-r1"])
    assert str(done.exception) == (
        f"{rules}: is not UTF-8 text: a NUL, as in a binary file or UTF-16 without a mark at byte 1"
    )


def test_a_file_that_is_no_text(quantkit: Run, tmp_path: Path) -> None:
    rules = tmp_path / "r.txt"
    rules.write_bytes(b"a=q8_0\n\xff")
    done = quantkit("recipe", "import", rules, "--format", "tensor-types", "--model", "deepseek-v2-lite")
    assert (done.returncode, done.stderr) == (
        3, f"error: {rules}: is not UTF-8 text: invalid start byte at byte 7\n"
    )  # fmt: skip

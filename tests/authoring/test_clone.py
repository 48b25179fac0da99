"""Recipes cloned from files: compact, and reproducing every tensor's type and bytes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run, Tools
from factory import gguf_file
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.authoring.clone import Head, alternatives, clone, prove, slug, write
from quantkit.base.errors import RecipeError
from quantkit.gguf.header import KV, STRING, U32, header_bytes, kv, pad, read_header
from quantkit.gguf.types import FILE_TYPES, QTYPES, fitting_type
from quantkit.model.catalogue import Catalogue, MlaLayout, Role, Tensor, layer_of
from quantkit.model.families.options import Options
from quantkit.model.open import from_gguf, open_model
from quantkit.model.sources.gguf_file import open_gguf
from quantkit.planning.mixtures import facts, mixture_types
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load, parse

R1 = open_model("deepseek-r1")
LITE = open_model("deepseek-v2-lite")


def as_file(c: Catalogue, types: dict[str, str], file_type: int | None = 15) -> Catalogue:
    """The model as a GGUF with these types."""
    kvs = tuple(i for i in c.kvs if i.key != "general.file_type")
    if file_type is not None:
        kvs = (*kvs, kv("general.file_type", U32, file_type))
    return replace(
        c, kvs=kvs, tensors=tuple(t._replace(source_type=types.get(t.name, t.source_type)) for t in c.tensors)
    )


def mixture(c: Catalogue, name: str, imatrix: bool = False, version: str = "current") -> dict[str, str]:
    quantizable = [t for t in c.tensors if t.quantizable]
    asked = mixture_types(name, c.tensors, facts(c, imatrix, version))
    return {t.name: fitting_type(QTYPES[a], t.n_cols).name for t, a in zip(quantizable, asked, strict=True)}


def rules(text: str) -> list[tuple[str, str | None, str]]:
    return [(r.match, r.layers, r.type) for r in parse(text, "r.yaml").rules]


# ---------------------------------------------------------------- compact


@pytest.mark.parametrize("layout", ["k_b+v_b", "kv_b"])
@pytest.mark.parametrize("name", ["UD-IQ1_S", "UD-IQ1_M", "UD-IQ2_XXS", "UD-Q2_K_XL"])
def test_a_clone_of_a_shipped_recipes_file_is_as_short_as_the_recipe(name: str, layout: str) -> None:
    c = open_model("deepseek-r1", Options(layout))
    recipe = load(name)
    plan = make_plan(c, recipe)
    types = {t.tensor.name: t.type for t in plan.tensors if t.tensor.quantizable}
    file = as_file(c, types, FILE_TYPES[recipe.file_type])
    made = clone(replace(file, kvs=(*file.kvs, kv("quantize.imatrix.file", STRING, "i"))), "f.gguf", "f")
    got = parse(made.text, "f.yaml")
    assert len(got.rules) <= len(recipe.rules)
    assert (got.file_type, got.imatrix, list(got.arch)) == (recipe.file_type, "required", ["deepseek2"])
    assert (made.proof.n_tensors, made.proof.nbytes) == (len(c.tensors), plan.tensor_bytes)
    assert {t.tensor.name: t.type for t in make_plan(c, got).tensors} == {t.tensor.name: t.type for t in plan.tensors}


def test_the_text() -> None:
    plan = make_plan(R1, load("UD-IQ1_S"))
    made = clone(
        as_file(R1, {t.tensor.name: t.type for t in plan.tensors}, 24), "d/R1-IQ1-00001-of-00003.gguf",
        "R1-IQ1-00001-of-00003",
    )  # fmt: skip
    assert made.notes == ()
    assert str(made.proof) == "round trip: 1,086 tensors, 140,350,064,128 bytes, all equal"
    lines = made.text.splitlines()
    assert lines[:11] == [
        "# cloned from d/R1-IQ1-00001-of-00003.gguf by quantkit recipe from-gguf",
        "name: R1-IQ1",
        "title: deepseek-r1",
        "description: The types of R1-IQ1.",
        "arch: [deepseek2]",
        "file_type: IQ1_S",
        "imatrix: required",
        "rules:",
        '  - match: "token_embd.weight"',
        "    type: Q4_K",
        '    why: "cloned: embedding, 1 tensor"',
    ]
    assert lines[-7:] == [
        '  - match: "blk.*.ffn_down_exps.weight"',
        '    layers: "moe[:6]"',
        "    type: IQ2_XXS",
        '    why: "cloned: routed expert, 6 tensors"',
        '  - match: "blk.*.ffn_{down,gate,up}_exps.weight"',
        "    type: IQ1_S",
        '    why: "cloned: routed expert, 168 tensors"',
    ]


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        (range(3, 9), ("blk.*.ffn_down_exps.weight", "moe[:6]", "Q6_K")),
        (range(55, 61), ("blk.*.ffn_down_exps.weight", "moe[52:]", "Q6_K")),
        (range(10, 20), ("blk.*.ffn_down_exps.weight", "moe[7:17]", "Q6_K")),
        (range(4, 61, 3), ("blk.*.ffn_down_exps.weight", "moe[1:56:3]", "Q6_K")),
        ([3], ("blk.*.ffn_down_exps.weight", "moe[0]", "Q6_K")),
        ([60], ("blk.*.ffn_down_exps.weight", "moe[-1]", "Q6_K")),
        ([37], ("blk.37.ffn_down_exps.weight", None, "Q6_K")),
        ([3, 60], ("blk.{3,60}.ffn_down_exps.weight", None, "Q6_K")),
        ([5, 7, 8, 9, 40], ("blk.{[57-9],40}.ffn_down_exps.weight", None, "Q6_K")),
        (R1.layer_groups()["more_bits"], ("blk.*.ffn_down_exps.weight", "more_bits", "Q6_K")),
    ],
)
def test_exceptions_take_the_simplest_selector(layers: Sequence[int], rule: tuple[str, str | None, str]) -> None:
    types = {t.name: "Q4_K" for t in R1.tensors if t.quantizable}
    types |= {f"blk.{n}.ffn_down_exps.weight": "Q6_K" for n in layers if n >= 3}
    types |= {f"blk.{n}.attn_k_b.weight": "Q5_0" for n in range(61)}
    text = write(R1, types, Head("r", "Q4_K_M", False))
    prove(text, R1, types)
    assert [r for r in rules(text) if r[2] == "Q6_K"] == [rule]
    assert len(rules(text)) == 8


def test_families_with_alike_exceptions_share_them() -> None:
    types = {t.name: "Q4_0" for t in R1.tensors if t.quantizable}
    types |= {f"blk.{n}.ffn_{w}_exps.weight": "Q8_0" for n in (9, 17, 33) for w in ("gate", "up")}
    text = write(R1, types, Head("r", "Q4_0", False))
    assert [r for r in rules(text) if r[2] == "Q8_0"] == [("blk.{9,17,33}.ffn_{gate,up}_exps.weight", None, "Q8_0")]
    assert prove(text, R1, types).n_tensors == 1086


@given(st.sets(st.integers(0, 4095)))
def test_alternatives_match_their_numbers_and_no_other(numbers: set[int]) -> None:
    pattern = re.compile("|".join(alternatives(numbers)) or "(?!)")
    assert {n for n in range(5000) if pattern.fullmatch(str(n))} == numbers


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (range(61), ["[0-9]", "[1-5][0-9]", "60"]),
        (range(3, 61), ["[3-9]", "[1-5][0-9]", "60"]),
        ([3], ["3"]),
        ([0, 1, 2, 7], ["[0-27]"]),
        (range(8, 12), ["[89]", "1[01]"]),
        ([11, 21, 31, 42], ["[1-3]1", "42"]),
    ],
)
def test_alternatives_are_short(numbers: Sequence[int], words: list[str]) -> None:
    assert alternatives(numbers) == words


# ---------------------------------------------------------------- exact

#: types whose blocks divide all rows of V2-Lite
ANY = [t.name for t in QTYPES.values() if t.block <= 32 and t.name not in ("F64", "I8", "I16", "I32", "I64")]
NAMES = [t.name for t in LITE.tensors if t.quantizable]


@settings(max_examples=15, deadline=None)
@given(types=st.lists(st.sampled_from(ANY), min_size=len(NAMES), max_size=len(NAMES)))
def test_any_types_come_back(types: list[str]) -> None:
    """Even senseless types, different for each tensor."""
    made = clone(as_file(LITE, dict(zip(NAMES, types, strict=True))), "x.gguf", "x")
    assert made.proof.n_tensors == len(LITE.tensors)
    recipe = parse(made.text, "x.yaml")
    assert {t.tensor.name: t.type for t in make_plan(LITE, recipe).tensors if t.tensor.quantizable} == dict(
        zip(NAMES, types, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_types_of_families_with_exceptions_come_back(data: st.DataObject) -> None:
    """Realistic types: one per family, with other types in slices of layers."""
    types = {n: data.draw(st.sampled_from(ANY[:8])) for n in {re.sub(r"\d+", "*", n) for n in NAMES}}
    given_ = {n: types[re.sub(r"\d+", "*", n)] for n in NAMES}
    for _ in range(data.draw(st.integers(0, 4))):
        family = data.draw(st.sampled_from(["ffn_down_exps", "ffn_gate_exps", "attn_kv_a_mqa", "attn_output"]))
        first, last = sorted((data.draw(st.integers(0, 27)), data.draw(st.integers(0, 27))))
        step, other = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(ANY))
        for n in range(first, last, step):
            if f"blk.{n}.{family}.weight" in given_:
                given_[f"blk.{n}.{family}.weight"] = other
    made = clone(as_file(LITE, given_), "x.gguf", "x")
    assert made.proof.n_tensors == len(LITE.tensors)


def tiny(names: Sequence[str], types: Sequence[str]) -> Catalogue:
    """A model of these tensors, 256 x 2 each."""
    tensors = tuple(
        Tensor(n, (256, 2), Role.OTHER, layer_of(n), n.endswith("weight"), t) for n, t in zip(names, types, strict=True)
    )
    return Catalogue("tiny", "llama", MlaLayout.AS_IS, 12, (), (), tensors, (), True)


def test_names_that_end_alike_are_kept_apart() -> None:
    """A glob's star also matches dots: blk.*.b.weight must not match blk.0.a.b.weight."""
    names = ["blk.0.b.weight", "blk.11.b.weight", "blk.0.a.b.weight", "blk.3.a.b.weight", "v.blk.0.b.weight",
             "v.blk.1.b.weight"]  # fmt: skip
    c = tiny(names, ["Q8_0", "Q8_0", "Q4_0", "Q4_0", "F16", "Q5_0"])
    made = clone(c, "x.gguf", "x")
    assert made.proof.n_tensors == 6
    assert ("v.blk.1.b.weight", None, "Q5_0") in rules(made.text)


def test_names_that_only_a_question_mark_can_tell() -> None:
    c = tiny(["a*b.weight", 'q"uote\\.weight', "br{a,b}[c].weight"], ["Q8_0", "Q4_0", "F16"])
    assert clone(c, "x.gguf", "x").proof.n_tensors == 3


def test_names_that_a_recipe_cannot_tell_apart() -> None:
    with pytest.raises(RecipeError) as e:
        clone(tiny(["a*b.weight", "a?b.weight"], ["Q8_0", "Q4_0"]), "x.gguf", "x")
    assert str(e.value) == (
        "the round trip fails, since a recipe cannot tell some of these names apart: the recipe:12 rules[1].match: "
        "all 2 tensors it matches are already taken by the recipe:9 rules[0]"
    )


def test_the_proof_finds_a_difference() -> None:
    types = mixture(LITE, "Q4_K_M")
    text = write(LITE, types, Head("r", "Q4_K_M", False)).replace("type: Q6_K", "type: Q8_0", 1)
    with pytest.raises(RecipeError, match=r"the round trip fails: 'output\.weight' is Q6_K of 172,032,000 bytes"):
        prove(text, LITE, types)


# ---------------------------------------------------------------- what is said


def test_a_mixture_is_recognized() -> None:
    for name, imatrix, version, said in [
        ("Q3_K_M", False, "current", "those of llama.cpp's mixture Q3_K_M."),
        ("IQ3_XXS", True, "current", "those of llama.cpp's mixture IQ3_XXS, with an importance matrix."),
    ]:
        made = clone(as_file(R1, mixture(R1, name, imatrix, version), FILE_TYPES[name]), "x.gguf", "x")
        assert said in made.text
    kv_b = open_model("deepseek-r1", Options("kv_b"))
    made = clone(as_file(kv_b, mixture(kv_b, "Q4_K_M", version="2025")), "x.gguf", "x")
    assert "llama.cpp's mixture Q4_K_M of 2025." in made.text
    types = mixture(R1, "Q4_K_M") | {"output.weight": "Q8_0"}
    assert "mixture" not in clone(as_file(R1, types), "x.gguf", "x").text


@pytest.mark.parametrize(
    ("number", "types", "file_type", "note"),
    [
        (None, {}, "Q4_K_M", ["general.file_type is missing; the recipe says Q4_K_M, after its commonest type"]),
        (1234, {}, "Q4_K_M",
         ["general.file_type is 1234, which has no name; the recipe says Q4_K_M, after its commonest type"]),
        (32, {}, "Q4_K_M",
         ["general.file_type is 32 (BF16), with which llama-quantize ignores every rule; the recipe "
                            "says Q4_K_M, after its commonest type"]),
        (14, {}, "Q4_K_S", []),
        (32, dict.fromkeys(NAMES, "BF16"), "BF16", []),
        (1, dict.fromkeys(NAMES, "F16") | {"output.weight": "F32"}, "Q8_0",
         ["general.file_type is 1 (F16), with which llama-quantize ignores every rule; the recipe says Q8_0, after its "
          "commonest type"]),
    ],
)  # fmt: skip
def test_the_file_type(number: int | None, types: dict[str, str], file_type: str, note: list[str]) -> None:
    made = clone(as_file(LITE, mixture(LITE, "Q4_K_M") | types, number), "x.gguf", "x")
    assert parse(made.text, "x.yaml").file_type == file_type
    assert list(made.notes) == note


def test_the_importance_matrix() -> None:
    def of(c: Catalogue) -> str:
        return parse(clone(c, "x.gguf", "x").text, "x.yaml").imatrix

    plain = as_file(LITE, mixture(LITE, "Q4_K_M"))
    assert of(plain) == "optional"
    assert of(replace(plain, kvs=(*plain.kvs, kv("quantize.imatrix.file", STRING, "i.dat")))) == "required"
    assert of(as_file(LITE, mixture(LITE, "IQ2_XXS", True), 19)) == "required"
    assert of(as_file(LITE, mixture(LITE, "Q2_K_S", True), 21)) == "required"


def test_tensors_that_are_never_quantized_but_are_not_f32() -> None:
    types = mixture(LITE, "Q4_K_M") | {f"blk.{n}.ffn_gate_inp.weight": "Q8_0" for n in range(1, 27)}
    made = clone(as_file(LITE, types | {"output_norm.weight": "F16"}), "x.gguf", "x")
    assert made.notes == (
        "not F32, though llama-quantize never quantizes the like: 27 tensors (blk.*.ffn_gate_inp.weight Q8_0, "
        "output_norm.weight F16); a recipe cannot ask for that, and a build from a checkpoint gives what its "
        "conversion gives",
    )


def test_types_that_no_recipe_can_ask_for() -> None:
    with pytest.raises(RecipeError) as e:
        clone(tiny(["a.weight"], ["I32"]), "x.gguf", "x")
    assert str(e.value) == "'a.weight' is I32, which is not a type to quantize to; a recipe cannot ask for it"
    with pytest.raises(RecipeError) as e:
        clone(tiny(["a.bias"], ["F32"]), "x.gguf", "x")
    assert str(e.value) == "x.gguf: of its 1 tensor none can be quantized"


def test_hyperparameters_that_are_no_numbers() -> None:
    c = tiny(["a.weight"], ["Q8_0"])
    assert (
        clone(replace(c, kvs=(kv("llama.attention.head_count", STRING, "many"),)), "x.gguf", "x").proof.n_tensors == 1
    )


@pytest.mark.parametrize(
    ("stem", "name"), [("R1 (new)", "R1-new"), ("Модель 7B", "Модель-7B"), ("..", "cloned"), ("a/b: c", "a-b-c")]
)
def test_names_fit_into_file_names(stem: str, name: str) -> None:
    assert slug(stem) == name


@pytest.mark.parametrize("title", ["yes", "# no: comment", "tab\there", "quote ' and \"", "🙂 é", "12", "null", "- x"])
def test_any_title_survives_yaml(title: str) -> None:
    c = replace(tiny(["a.weight"], ["Q8_0"]), model=title)
    assert parse(clone(c, "x\ny.gguf", "x", name=title).text, "x.yaml").title == title


# ---------------------------------------------------------------- against llama-quantize


@pytest.mark.tools
@pytest.mark.parametrize(
    ("file_type", "imatrix"),
    [("Q2_K", True), ("Q3_K_M", False), ("Q4_K_M", False), ("IQ4_XS", True), ("Q5_K_S", False)],
)
def test_files_of_llama_quantize_are_reproduced(
    tools: Tools, quantkit: Run, tiny_bf16: Path, tiny_imatrix: Path, tmp_path: Path, file_type: str, imatrix: bool
) -> None:
    """Clone a file and build it again from the BF16 file: every tensor's type and bytes are equal."""
    theirs, recipe, ours = tmp_path / "theirs.gguf", tmp_path / "clone.yaml", tmp_path / "ours.gguf"
    weights = ["--imatrix", str(tiny_imatrix)] if imatrix else []
    subprocess.run([tools.quantize, *weights, tiny_bf16, theirs, file_type, "2"], check=True, capture_output=True)
    done = quantkit("recipe", "from-gguf", theirs, "-o", recipe)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.fullmatch(r"round trip: [\d,]+ tensors, [\d,]+ bytes, all equal\n", done.stderr)
    assert f"llama.cpp's mixture {file_type}." in recipe.read_text()
    done = quantkit("build", tiny_bf16, "-r", recipe, "-o", ours, *weights)
    assert done.returncode == 0, done.stderr
    assert contents(ours) == contents(theirs)


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    blob = path.read_bytes()
    return {t.name: (t.type, blob[t.offset : t.offset + t.nbytes]) for t in read_header(path).tensors}


# ---------------------------------------------------------------- the command


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return gguf_file(tmp_path / "Small.gguf", {"output.weight": ((32, 2), "Q8_0", bytes(68))})


def test_the_command(quantkit: Run, small: Path, tmp_path: Path) -> None:
    done = quantkit("recipe", "from-gguf", small, "--name", "mine")
    assert done.returncode == 0
    assert done.stderr == (
        "note: general.file_type is missing; the recipe says Q8_0, after its commonest type\n"
        "round trip: 1 tensor, 68 bytes, all equal\n"
    )
    assert done.stdout == (
        f"# cloned from {small} by quantkit recipe from-gguf\n"
        "name: mine\n"
        "title: Small\n"
        "description: The types of Small; they are those of llama.cpp's mixture Q8_0.\n"
        "arch: [deepseek2]\n"
        "file_type: Q8_0\n"
        "imatrix: optional\n"
        "rules:\n"
        '  - match: "output.weight"\n'
        "    type: Q8_0\n"
        '    why: "cloned: output, 1 tensor"\n'
    )
    out = tmp_path / "s.yaml"
    done = quantkit("recipe", "from-gguf", small, "-o", out, "--json")
    made = json.loads(done.stdout)
    assert made["recipe"] == out.read_text()
    assert made["round_trip"] == {"tensors": 1, "bytes": 68, "equal": True}
    assert len(made["notes"]) == 1


def test_nothing_is_overwritten_unasked(quantkit: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.yaml"
    out.write_text("mine")
    done = quantkit("recipe", "from-gguf", small, "-o", out)
    assert (done.returncode, out.read_text()) == (7, "mine")
    assert done.stderr == f"error: {out}: exists; choose another name, or replace it with --force\n"
    assert quantkit("recipe", "from-gguf", small, "-o", out, "--force").returncode == 0
    assert out.read_text().startswith("# cloned")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Small.gguf", "s.yaml"]


def test_a_split_file_is_cloned_whole(tmp_path: Path) -> None:
    def shard(no: int, keys: list[KV]) -> Path:
        path = tmp_path / f"m-{no:05d}-of-00002.gguf"
        head = header_bytes([*keys, kv("split.no", U32, no - 1), kv("split.count", U32, 2)],
                            [(f"blk.{no - 1}.ffn_up.weight", (256, 4), "Q6_K", 0)])  # fmt: skip
        path.write_bytes(head + bytes(pad(840)))
        return path

    shard(2, [])
    first = shard(1, [kv("general.architecture", STRING, "llama"), kv("general.file_type", U32, 18)])
    file = open_gguf(first)
    made = clone(from_gguf(file), str(first), file.stem)
    assert "name: m\n" in made.text
    assert rules(made.text) == [("blk.*.ffn_up.weight", None, "Q6_K")]
    assert (made.proof.n_tensors, made.proof.nbytes) == (2, 1680)

"""Plans: the published sizes to the byte, the JSON interface, lint, and the effect of an importance matrix."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import factory
import pytest
import small_builds

from quantkit.base.errors import ImatrixError, RecipeError, UnsupportedError
from quantkit.gguf.types import QTYPES
from quantkit.model import families
from quantkit.model.catalogue import Catalogue, Role, Tensor, output_order
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.file_layout import lay_out, output_kvs
from quantkit.planning.plan import Plan, Planned, check_imatrix, imatrix_status, make_plan
from quantkit.planning.report import plan_text
from quantkit.recipe.load import load
from quantkit.recipe.named import shipped

PUBLISHED = json.loads((Path(__file__).parent.parent / "data" / "published_quants.json").read_text("utf-8"))["files"]
RECIPES = [f["recipe"] for f in PUBLISHED]


@lru_cache
def r1(layout: str = "kv_b") -> Catalogue:
    return open_model("deepseek-r1", Options(layout=layout))


@lru_cache
def r1_plan(recipe: str, layout: str = "kv_b") -> Plan:
    return make_plan(r1(layout), load(recipe))


def tiny(config: Mapping[str, Any] = factory.TINY_V3, layout: str = "k_b+v_b") -> Catalogue:
    return families.build("Tiny", config, Options(layout=layout))


#: rules[i] is on line 5 + i
rules = partial(small_builds.rules, head="arch: [deepseek2]\nfile_type: Q4_K_M")
EVERYTHING = 'match: "*", type: Q4_K'


# ---------------------------------------------------------------- published sizes


@pytest.mark.parametrize("file", PUBLISHED, ids=RECIPES)
def test_tensor_bytes_of_the_published_files(file: dict[str, Any]) -> None:
    plan = r1_plan(file["recipe"])
    assert plan.tensor_bytes == file["tensor_bytes"]
    assert len(plan.tensors) == file["tensors"] == 1025
    assert plan.n_elements == 671_026_419_200
    assert plan.warnings == ()
    assert not any(t.fell_back for t in plan.tensors)


@pytest.mark.parametrize(
    ("recipe", "nbytes"),
    [
        ("UD-IQ1_S", 140_226_135_552),
        ("UD-IQ1_M", 168_910_980_608),
        ("UD-IQ2_XXS", 196_157_179_392),
        ("UD-Q2_K_XL", 226_596_292_096),
    ],
)
def test_tensor_bytes_written_out(recipe: str, nbytes: int) -> None:
    assert r1_plan(recipe).tensor_bytes == nbytes


@pytest.mark.parametrize("file", [f for f in PUBLISHED if f["types"]], ids=lambda f: f["recipe"])
def test_types_of_the_published_files(file: dict[str, Any]) -> None:
    """As logs count them, and in the order of ggml's ids."""
    types = r1_plan(file["recipe"]).types()
    assert types == file["types"]
    assert list(types) == sorted(types, key=lambda n: QTYPES[n].id)
    assert sum(types.values()) == 1025


@pytest.mark.parametrize("file", [f for f in PUBLISHED if f["bpw"]], ids=lambda f: f["recipe"])
def test_bits_per_weight_of_the_published_files(file: dict[str, Any]) -> None:
    digits = len(str(file["bpw"]).partition(".")[2])
    assert round(r1_plan(file["recipe"]).bpw, digits) == file["bpw"]


def layer_bytes(plan: Plan) -> dict[int, int]:
    out: dict[int, int] = defaultdict(int)
    for t in plan.tensors:
        if t.tensor.layer is not None:
            out[t.tensor.layer] += t.nbytes
    return dict(out)


@pytest.mark.parametrize("file", [f for f in PUBLISHED if f["layer_bytes"]], ids=lambda f: f["recipe"])
def test_layers_of_the_published_files(file: dict[str, Any]) -> None:
    expected: dict[int, int] = {}
    for span, nbytes in file["layer_bytes"].items():
        first, last = (int(n) for n in span.split("-"))
        expected |= dict.fromkeys(range(first, last + 1), nbytes)
    assert layer_bytes(r1_plan(file["recipe"])) == expected


@pytest.mark.parametrize("file", PUBLISHED, ids=RECIPES)
def test_rounded_sizes_of_the_published_files(file: dict[str, Any]) -> None:
    """What file lists and logs give in GiB, MiB and GB. The header adds five to six MiB of tokenizer."""
    plan = r1_plan(file["recipe"])
    if file["tensor_gib"]:
        digits = len(str(file["tensor_gib"]).partition(".")[2])
        assert round(plan.tensor_bytes / 2**30, digits) == file["tensor_gib"]
    if file["layers_gib"]:
        assert round(sum(layer_bytes(plan).values()) / 2**30, 3) == file["layers_gib"]
    if file["files_mib"]:
        assert 5 < file["files_mib"] - plan.tensor_bytes / 2**20 < 6
    if file["shards_gb"]:
        shards = lay_out(plan, output_kvs(plan, None), 50_000_000_000)
        assert [f.nbytes / 1e9 for f in shards] == pytest.approx(file["shards_gb"], abs=0.06)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_current_layout(recipe: str) -> None:
    """attn_k_b and attn_v_b instead of attn_kv_b; rows of 128 cannot be Q6_K."""
    old, new = r1_plan(recipe), r1_plan(recipe, "k_b+v_b")
    assert len(new.tensors) == 1086
    assert new.n_elements == old.n_elements
    assert new.types() == {**old.types(), "Q8_0": 61}
    assert {t.tensor.name for t in new.tensors if t.fell_back} == {f"blk.{i}.attn_k_b.weight" for i in range(61)}
    n_k_b = 128 * 512 * 128
    assert new.tensor_bytes - old.tensor_bytes == 61 * (n_k_b // 32 * 34 - n_k_b // 256 * 210)


def test_the_types_of_the_most_dynamic_recipe() -> None:
    """UD-IQ1_S, tensor by tensor where layers differ."""
    types = {t.tensor.name: t.type for t in r1_plan("UD-IQ1_S").tensors}
    for layer in range(3, 61):
        down = "IQ2_XXS" if layer < 9 else "IQ1_S"
        assert types[f"blk.{layer}.ffn_down_exps.weight"] == down
        assert types[f"blk.{layer}.ffn_gate_exps.weight"] == types[f"blk.{layer}.ffn_up_exps.weight"] == "IQ1_S"
        assert types[f"blk.{layer}.ffn_gate_inp.weight"] == "F32"
        assert types[f"blk.{layer}.ffn_down_shexp.weight"] == "Q6_K"
    for layer in range(3):
        assert types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"
        assert types[f"blk.{layer}.ffn_gate.weight"] == "Q4_K"
    assert (types["token_embd.weight"], types["output.weight"], types["output_norm.weight"]) == ("Q4_K", "Q6_K", "F32")


# ---------------------------------------------------------------- JSON


def test_json_has_the_promised_structure() -> None:
    plan = r1_plan("UD-IQ1_S")
    made = json.loads(json.dumps(plan.to_json(140_231_000_000)))
    assert list(made)[:8] == [
        "quantkit_plan",
        "model",
        "arch",
        "layout",
        "recipe",
        "mixture_version",
        "tensors",
        "totals",
    ]
    assert made["quantkit_plan"] == 1
    assert [made[k] for k in ("model", "arch", "layout", "recipe")] == ["deepseek-r1", "deepseek2", "kv_b", "UD-IQ1_S"]
    assert made["totals"] == {
        "tensors": 1025,
        "elements": 671_026_419_200,
        "tensor_bytes": 140_226_135_552,
        "file_bytes": 140_231_000_000,
        "bpw": 1.6718,
        "types": {"F32": 361, "Q4_K": 190, "Q5_K": 116, "Q6_K": 184, "IQ2_XXS": 6, "IQ1_S": 168},
    }
    promised = ["name", "shape", "type", "requested", "bytes", "rule", "why"]
    assert all(list(t)[:7] == promised for t in made["tensors"])
    assert sum(t["bytes"] for t in made["tensors"]) == made["totals"]["tensor_bytes"]
    by_name = {t["name"]: t for t in made["tensors"]}
    assert by_name["blk.3.ffn_down_exps.weight"] == {
        "name": "blk.3.ffn_down_exps.weight",
        "shape": [2048, 7168, 256],
        "type": "IQ2_XXS",
        "requested": "IQ2_XXS",
        "bytes": 2048 // 256 * 66 * 7168 * 256,
        "rule": load("UD-IQ1_S").place("rules", 9),
        "why": "early down_proj is the most sensitive of the routed experts",
        "role": "routed expert",
        "imatrix": "required",
    }
    assert by_name["blk.60.exp_probs_b.bias"] == {
        "name": "blk.60.exp_probs_b.bias",
        "shape": [256],
        "type": "F32",
        "requested": "F32",
        "bytes": 1024,
        "rule": "",
        "why": "never quantized: norms, router and biases are small and sensitive",
        "role": "router",
        "imatrix": "not used",
    }
    assert made["metadata_complete"] is False
    assert made["warnings"] == []
    assert made["notes"] == ["left out: 1 multi-token-prediction layer (MTP), as llama.cpp does"]


def test_json_lines_lead_to_the_rule() -> None:
    """The line in `rule` is where that rule begins in the shipped file."""
    text = shipped()["UD-IQ1_S"].splitlines()
    for t in r1_plan("UD-IQ1_S").tensors:
        if t.rule:
            place, index = t.rule.split(" ")
            line = int(place.removeprefix("UD-IQ1_S.yaml:"))
            assert text[line - 1].startswith("  - match: ")
            n = int(index.removeprefix("rules[").removesuffix("]"))
            assert sum(s.startswith("  - match: ") for s in text[: line - 1]) == n


def test_tensors_are_in_the_order_of_the_file() -> None:
    names = [t.tensor.name for t in r1_plan("UD-IQ1_S").tensors]
    assert names == sorted(names, key=output_order)
    assert names[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_kv_a_mqa.weight"]
    assert names[-1] == "blk.60.ffn_up_shexp.weight"


def test_a_plan_without_weights_is_the_same_twice() -> None:
    assert make_plan(tiny(), rules(EVERYTHING)) == make_plan(tiny(), rules(EVERYTHING))


# ---------------------------------------------------------------- what a rule decides


def planned(plan: Plan, name: str) -> Planned:
    return next(t for t in plan.tensors if t.tensor.name == name)


def test_the_first_rule_that_matches_wins() -> None:
    plan = make_plan(
        tiny(),
        rules(
            'match: "output.weight", type: Q6_K',
            'match: "blk.*.ffn_down_exps.weight", layers: "moe[:1]", type: Q3_K',
            'match: "blk.*_exps.weight", type: Q2_K',
            EVERYTHING,
        ),
    )
    got = {n: (planned(plan, n).type, planned(plan, n).rule) for n in (
        "output.weight", "blk.1.ffn_down_exps.weight", "blk.2.ffn_down_exps.weight", "blk.1.ffn_up_exps.weight",
        "blk.1.attn_q_a.weight", "output_norm.weight",
    )}  # fmt: skip
    assert got == {
        "output.weight": ("Q6_K", "r.yaml:5 rules[0]"),
        "blk.1.ffn_down_exps.weight": ("Q3_K", "r.yaml:6 rules[1]"),
        "blk.2.ffn_down_exps.weight": ("Q2_K", "r.yaml:7 rules[2]"),
        "blk.1.ffn_up_exps.weight": ("Q2_K", "r.yaml:7 rules[2]"),
        "blk.1.attn_q_a.weight": ("Q4_K", "r.yaml:8 rules[3]"),
        "output_norm.weight": ("F32", ""),
    }


def test_layers_take_no_tensor_without_a_layer() -> None:
    plan = make_plan(tiny(), rules('match: "*", layers: all, type: Q6_K', 'match: "*", type: Q8_0'))
    assert {t.tensor.name for t in plan.tensors if t.requested == "Q8_0"} == {"output.weight", "token_embd.weight"}


@pytest.mark.parametrize(
    ("asked", "given", "nbytes"),
    [("Q6_K", "Q8_0", 34), ("Q4_K", "Q5_0", 22), ("IQ1_S", "IQ4_NL", 18), ("Q2_K", "Q4_0", 18), ("Q8_0", "Q8_0", 34)],
)
def test_the_fallback_of_a_shape_is_shown(asked: str, given: str, nbytes: int) -> None:
    recipe = rules(f'match: "*attn_k_b.weight", type: {asked}', 'match: "*", type: Q8_0')
    t = planned(make_plan(tiny(), recipe), "blk.2.attn_k_b.weight")
    assert t.tensor.shape == (64, 256, 2)
    assert (t.requested, t.type, t.nbytes) == (asked, given, 2 * nbytes * 256 * 2)
    assert t.fell_back == (asked != given)
    assert t.why == ("t" if asked == given else f"t ({asked} needs rows of 256s, these have 64: {given})")
    assert t.rule == "r.yaml:5 rules[0]"


def test_fallbacks_are_noted_for_people() -> None:
    text = plan_text(r1_plan("UD-IQ1_S", "k_b+v_b"), [])
    assert (
        "\nnote: 61 tensors get another type than asked, since the rows do not divide into its blocks: "
        "blk.*.attn_k_b.weight Q6_K -> Q8_0"
    ) in text
    (line,) = [line for line in text.splitlines() if "attn_k_b" in line and "note" not in line]
    assert line.split()[:-1] == [
        "blk.{0-60}.attn_k_b.weight", "61", "128x512x128", "Q8_0", "Q6_K", f"{61 * 128 * 512 * 128 // 32 * 34:,}",
        "not", "used", "rules[3]",
    ]  # fmt: skip


def test_rows_that_divide_by_nothing_become_f16() -> None:
    odd = dict(factory.TINY_V3, moe_intermediate_size=100)
    t = planned(make_plan(tiny(odd), rules(EVERYTHING)), "blk.1.ffn_down_exps.weight")
    assert (t.requested, t.type, t.nbytes) == ("Q4_K", "F16", 2 * 100 * 256 * 4)
    assert t.why == "t (Q4_K needs rows of 256s, these have 100: F16)"


def test_a_type_without_a_fallback_is_an_error() -> None:
    odd = dict(factory.TINY_V3, moe_intermediate_size=96)
    with pytest.raises(RecipeError) as e:
        make_plan(tiny(odd), rules('match: "*", type: NVFP4'))
    assert str(e.value) == (
        "r.yaml:5 rules[0].type: 'blk.1.ffn_down_exps.weight': NVFP4 needs rows of 64s, these have 96, and it has no "
        "fallback; give it another type in a rule before"
    )


def test_sizes_follow_from_types() -> None:
    plan = make_plan(tiny(), rules(EVERYTHING))
    for t in plan.tensors:
        assert t.nbytes == t.tensor.n_elements // QTYPES[t.type].block * QTYPES[t.type].block_bytes
    assert plan.tensor_bytes == sum(t.nbytes for t in plan.tensors)
    assert plan.bpw == 8 * plan.tensor_bytes / plan.n_elements


# ---------------------------------------------------------------- lint

NO_FIT = {
    "matches nothing": (
        ['match: "blk.*.ffn_donw_exps.weight", type: Q2_K', EVERYTHING],
        "r.yaml:5 rules[0].match: 'blk.*.ffn_donw_exps.weight' matches no tensor "
        "(did you mean blk.*.ffn_down_exps.weight?)",
    ),
    "matches nothing, nothing near": (
        ['match: "zzz", type: Q2_K', EVERYTHING],
        "r.yaml:5 rules[0].match: 'zzz' matches no tensor",
    ),
    "a name without its layer": (
        ['match: "ffn_down_exps.weight", type: Q2_K', EVERYTHING],
        "r.yaml:5 rules[0].match: 'ffn_down_exps.weight' matches no tensor (did you mean blk.*.ffn_down_exps.weight?)",
    ),
    "not in these layers": (
        ['match: "blk.*.ffn_down.weight", layers: moe, type: Q2_K', EVERYTHING],
        "r.yaml:5 rules[0].match: 'blk.*.ffn_down.weight' matches no tensor in the layers moe (it does in others)",
    ),
    "shadowed": (
        ['match: "blk.*", type: Q6_K', 'match: "blk.*.attn_output.weight", type: Q4_K', EVERYTHING],
        "r.yaml:6 rules[1].match: all 3 tensors it matches are already taken by r.yaml:5 rules[0]",
    ),
    "no such name, in no layers": (
        ['match: "zzz", layers: "moe[6:]", type: Q2_K', EVERYTHING],
        "r.yaml:5 rules[0].match: 'zzz' matches no tensor",
    ),
    "the same twice": (
        ['match: "blk.2.attn_q_?.*", type: Q6_K', 'match: "blk.2.attn_q_?.*", type: Q5_K', EVERYTHING],
        "r.yaml:6 rules[1].match: all 2 tensors it matches are already taken by r.yaml:5 rules[0]",
    ),
    "one wrong, after one that is optional": (
        ['match: "zzz", optional: true, type: Q2_K', 'match: "yyy", type: Q2_K', EVERYTHING],
        "r.yaml:6 rules[1].match: 'yyy' matches no tensor",
    ),
    "one tensor shadowed": (
        [EVERYTHING, 'match: "output.weight", type: Q6_K'],
        "r.yaml:6 rules[1].match: the only tensor it matches is already taken by r.yaml:5 rules[0]",
    ),
    "shadowed by several": (
        ['match: "*_exps.weight", type: Q6_K', 'match: "*attn*", type: Q6_K',
         'match: "blk.*.{attn_q_a,ffn_up_exps}.*", type: Q4_K', EVERYTHING],
        "r.yaml:7 rules[2].match: all 5 tensors it matches are already taken by r.yaml:5 rules[0], r.yaml:6 rules[1]",
    ),
    "shadowed, with a slice of its own": (
        ['match: "*_exps.weight", type: Q6_K', 'match: "*_exps.weight", layers: "moe[:1]", type: Q4_K', EVERYTHING],
        "r.yaml:6 rules[1].match: all 3 tensors it matches are already taken by r.yaml:5 rules[0]",
    ),
    "never quantized": (
        ['match: "blk.*.ffn_gate_inp.weight", type: Q8_0', EVERYTHING],
        "r.yaml:5 rules[0].match: 'blk.*.ffn_gate_inp.weight' names tensors that are never quantized, such as "
        "'blk.1.ffn_gate_inp.weight' (router, stays F32)",
    ),
    "never quantized, though optional": (
        ['match: "output_norm.weight", optional: true, type: Q8_0', EVERYTHING],
        "r.yaml:5 rules[0].match: 'output_norm.weight' names tensors that are never quantized, such as "
        "'output_norm.weight' (norm, stays F32)",
    ),
    "never quantized, one alternative": (
        ['match: "blk.*.{attn_q_a,attn_norm}.weight", type: Q8_0', EVERYTHING],
        "r.yaml:5 rules[0].match: 'blk.*.attn_norm.weight' names tensors that are never quantized, such as "
        "'blk.0.attn_norm.weight' (norm, stays F32)",
    ),
    "a bias": (
        ['match: "*.bias", type: Q8_0', EVERYTHING],
        "r.yaml:5 rules[0].match: '*.bias' names tensors that are never quantized, such as 'blk.1.exp_probs_b.bias' "
        "(router, stays F32)",
    ),
    "no rule for some": (
        ['match: "blk.*", type: Q8_0'],
        "r.yaml:4 rules: no rule gives a type to 'output.weight' (and 1 more); add a rule that matches it, such as a "
        'last one with match: "*.weight"',
    ),
    "no rule for one": (
        ['match: "{blk.*,output.weight}", type: Q8_0'],
        "r.yaml:4 rules: no rule gives a type to 'token_embd.weight'; add a rule that matches it, such as a last one "
        'with match: "*.weight"',
    ),
    "all at once": (
        ['match: "zzz", type: Q2_K', EVERYTHING, 'match: "output.weight", type: Q6_K', 'match: "*_norm.*", type: Q6_K'],
        "r.yaml:5 rules[0].match: 'zzz' matches no tensor\n"
        "r.yaml:7 rules[2].match: the only tensor it matches is already taken by r.yaml:6 rules[1]\n"
        "r.yaml:8 rules[3].match: '*_norm.*' names tensors that are never quantized, such as 'output_norm.weight' "
        "(norm, stays F32)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), NO_FIT.values(), ids=NO_FIT.keys())
def test_rules_that_cannot_work(lines: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as e:
        make_plan(tiny(), rules(*lines))
    assert str(e.value) == message
    assert e.value.exit_code == 3


def test_a_recipe_for_another_arch() -> None:
    recipe = rules(EVERYTHING, head="arch: [llama, qwen2]\nfile_type: Q4_K_M")
    with pytest.raises(UnsupportedError) as e:
        make_plan(tiny(), recipe)
    assert str(e.value) == "r.yaml:2 arch: the recipe is for llama, qwen2, but Tiny is a deepseek2"
    assert e.value.exit_code == 5


WARNED = {
    "takes no layer": (
        ['match: "*_exps.weight", layers: "moe[6:]", type: Q2_K', EVERYTHING],
        ["r.yaml:5 rules[0].layers: 'moe[6:]' selects none of this model's 3 layers; the rule is unused"],
    ),
    "leaves nothing": (
        ['match: "*_exps.weight", layers: "moe[:6]", type: Q2_K', 'match: "*_exps.weight", type: Q3_K', EVERYTHING],
        ["r.yaml:6 rules[1].match: on a model of 3 layers, r.yaml:5 rules[0] takes all it matches"],
    ),
    "two leave nothing": (
        ['match: "*_exps.weight", layers: "all[:2]", type: Q2_K',
         'match: "*_exps.weight", layers: "all[2:9]", type: Q2_K', 'match: "*_down_exps.weight", type: Q3_K',
         EVERYTHING],
        ["r.yaml:7 rules[2].match: on a model of 3 layers, r.yaml:5 rules[0], r.yaml:6 rules[1] take all it matches"],
    ),
    "optional": (
        ['match: "zzz", optional: true, type: Q2_K',
         'match: "*_exps.weight", layers: "moe[6:]", optional: true, type: Q2_K', EVERYTHING,
         'match: "output.weight", optional: true, type: Q6_K'],
        [],
    ),
    "nothing to warn of": (['match: "*_exps.weight", layers: "moe[1:]", type: Q2_K', EVERYTHING], []),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "warnings"), WARNED.values(), ids=WARNED.keys())
def test_what_only_the_models_size_is_to_blame_for(lines: list[str], warnings: list[str]) -> None:
    assert list(make_plan(tiny(), rules(*lines)).warnings) == warnings


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("config", [factory.TINY_V3, factory.TINY_V2], ids=["V3", "V2-Lite"])
def test_shipped_recipes_fit_small_siblings(recipe: str, config: Mapping[str, Any]) -> None:
    """With at most a warning that the slice of the first layers takes all there are."""
    made = load(recipe)
    plan = make_plan(tiny(config), made)
    sliced = next(i for i, rule in enumerate(made.rules) if rule.layers)
    later = [
        f"{made.place('rules', sliced + 1, 'match')}: on a model of 3 layers, {made.place('rules', sliced)} takes "
        "all it matches"
    ]
    assert list(plan.warnings) == ([] if recipe == "UD-IQ1_S" else later)


# ---------------------------------------------------------------- importance matrices


class Weights:
    """An importance matrix with entries of these sizes: name -> values."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def fits(self, name: str, n_cols: int, n_mats: int) -> bool:
        return self.sizes[name] == n_cols * n_mats


def tensor(name: str, *shape: int) -> Tensor:
    role = {"token_embd.weight": "embedding", "output.weight": "output"}.get(name, "routed expert")
    return Tensor(name, shape, Role(role), None, True, "BF16")


EXPS, EMBD, OUT = "blk.3.ffn_down_exps.weight", "token_embd.weight", "output.weight"
FITS = {EXPS: 256 * 4, EMBD: 256, OUT: 256}
WRONG = {EXPS: 256, EMBD: 255, OUT: 255}
NONE: dict[str, int] = {}

STATUS = [
    # name, type, entries (None: no matrix given), recipe requires one, status
    (EXPS, "Q8_0", None, True, "not used"),
    (EXPS, "BF16", FITS, True, "not used"),
    (EXPS, "Q8_0", FITS, True, "not used"),
    (EXPS, "Q8_0", NONE, True, "not used"),
    (EXPS, "BF16", WRONG, True, "not used"),
    # an entry that does not fit is refused for every type, as in llama-quantize
    (EXPS, "Q8_0", WRONG, True, "wrong size"),
    (EXPS, "F16", WRONG, False, "wrong size"),
    (EXPS, "Q4_K", None, False, "optional"),
    (EXPS, "Q4_K", None, True, "required"),
    (EXPS, "IQ1_S", None, False, "required"),
    (EXPS, "IQ2_XXS", None, True, "required"),
    (EXPS, "Q4_K", FITS, False, "used"),
    (EXPS, "IQ1_S", FITS, True, "used"),
    (EXPS, "Q4_K", NONE, True, "missing"),
    (EXPS, "IQ3_S", NONE, False, "missing"),
    (EXPS, "IQ3_XXS", NONE, False, "needed"),
    (EXPS, "IQ1_M", NONE, True, "needed"),
    (EXPS, "Q4_K", WRONG, False, "wrong size"),
    (EXPS, "IQ1_S", WRONG, False, "wrong size"),
    (OUT, "Q6_K", None, False, "optional"),
    (OUT, "IQ3_XXS", None, False, "optional"),
    (OUT, "IQ2_XS", None, False, "required"),
    (OUT, "IQ2_S", NONE, False, "missing"),
    (OUT, "IQ2_XS", NONE, False, "needed"),
    (OUT, "Q6_K", WRONG, False, "wrong size"),
    (OUT, "Q6_K", FITS, False, "used"),
    (EMBD, "Q4_K", None, True, "required"),
    (EMBD, "IQ1_M", NONE, False, "missing"),
    (EMBD, "IQ1_S", NONE, False, "needed"),
    (EMBD, "Q4_K", FITS, False, "used"),
    # llama-quantize ignores an entry for token_embd that does not fit
    (EMBD, "Q4_K", WRONG, False, "missing"),
    (EMBD, "Q8_0", WRONG, False, "not used"),
    (EMBD, "IQ2_XXS", WRONG, False, "needed"),
]


@pytest.mark.parametrize(("name", "given", "entries", "required", "status"), STATUS)
def test_imatrix_status(name: str, given: str, entries: dict[str, int] | None, required: bool, status: str) -> None:
    t = tensor(name, 256, 512, 4) if name == EXPS else tensor(name, 256, 384)
    imatrix = "required" if required else "optional"
    recipe = rules(EVERYTHING, head=f"arch: [deepseek2]\nfile_type: Q4_K_M\nimatrix: {imatrix}")
    assert imatrix_status(t, given, recipe, None if entries is None else Weights(entries)) == status


@pytest.mark.parametrize(
    ("file_type", "name", "without", "no_entry"),
    [
        ("Q2_K", EXPS, "optional", "missing"),
        ("Q2_K_S", EXPS, "required", "needed"),
        ("Q2_K_S", OUT, "optional", "missing"),
        ("Q2_K_S", EMBD, "optional", "missing"),
    ],
)
def test_q2_k_needs_weights_in_a_q2_k_s_file(file_type: str, name: str, without: str, no_entry: str) -> None:
    """The one exception of tensor_requires_imatrix (src/llama-quant.cpp)."""
    recipe = rules(EVERYTHING, head=f"arch: [deepseek2]\nfile_type: {file_type}")
    assert imatrix_status(tensor(name, 256, 512, 4), "Q2_K", recipe, None) == without
    assert imatrix_status(tensor(name, 256, 512, 4), "Q2_K", recipe, Weights(NONE)) == no_entry


def refused(plan: Plan, given: bool) -> str:
    with pytest.raises(ImatrixError) as e:
        check_imatrix(plan, given)
    assert e.value.exit_code == 6
    return str(e.value)


def entries_for(catalogue: Catalogue, **changes: int | None) -> Weights:
    """Entries of the right size for all tensors in layers, with these changes (None: no entry)."""
    sizes = {t.name: t.n_cols * (t.shape[2] if len(t.shape) > 2 else 1) for t in catalogue.tensors if t.quantizable}
    for name in (EMBD, OUT):
        sizes.pop(name)
    for key, size in changes.items():
        name = key.replace("__", ".") + ".weight"
        assert name in sizes
        if size is None:
            sizes.pop(name)
        else:
            sizes[name] = size
    return Weights(sizes)


def test_a_required_imatrix_must_be_given() -> None:
    assert refused(make_plan(tiny(), load("UD-Q2_K_XL")), given=False) == (
        "the recipe UD-Q2_K_XL requires an importance matrix; give one with --imatrix FILE "
        "(llama-imatrix makes them, and published quantizations often come with theirs)"
    )


def test_types_that_need_an_imatrix_must_have_one() -> None:
    one = rules('match: "blk.2.ffn_up_exps.weight", type: IQ2_XXS', EVERYTHING)
    assert refused(make_plan(tiny(), one), given=False) == (
        "'blk.2.ffn_up_exps.weight' as IQ2_XXS needs an importance matrix; give one with --imatrix FILE"
    )
    two = rules('match: "blk.2.ffn_{up,gate}_exps.weight", type: IQ1_M', EVERYTHING)
    assert refused(make_plan(tiny(), two), given=False) == (
        "'blk.2.ffn_gate_exps.weight' as IQ1_M needs an importance matrix, as does 1 more; give one with --imatrix FILE"
    )
    three = rules('match: "blk.2.*_exps.weight", type: IQ2_S', EVERYTHING)
    assert refused(make_plan(tiny(), three), given=False) == (
        "'blk.2.ffn_down_exps.weight' as IQ2_S needs an importance matrix, as do 2 more; give one with --imatrix FILE"
    )


def test_types_that_need_none_do_without() -> None:
    plan = make_plan(tiny(), rules('match: "blk.2.*_exps.weight", type: IQ3_S', EVERYTHING))
    assert {t.imatrix_status for t in plan.tensors} == {"optional", "not used"}
    check_imatrix(plan, given=False)


def test_an_imatrix_that_lacks_entries() -> None:
    recipe = rules('match: "*_exps.weight", type: IQ1_S', EVERYTHING)
    plan = make_plan(tiny(), recipe, entries_for(tiny(), blk__1__ffn_up_exps=None))
    assert planned(plan, "blk.1.ffn_up_exps.weight").imatrix_status == "needed"
    assert refused(plan, given=True) == (
        "the importance matrix has no entry for 1 tensor that must have one, the first 'blk.1.ffn_up_exps.weight' as "
        "IQ1_S (4 x 256 values); is it of this model and layout?"
    )
    plan = make_plan(tiny(), recipe, Weights({}))
    assert refused(plan, given=True) == (
        "the importance matrix has no entry for 6 tensors that must have one, the first 'blk.1.ffn_down_exps.weight' "
        "as IQ1_S (4 x 256 values); is it of this model and layout?"
    )


def test_an_imatrix_of_another_model() -> None:
    recipe = rules('match: "*_exps.weight", type: IQ1_S', EVERYTHING)
    plan = make_plan(tiny(), recipe, entries_for(tiny(), blk__2__ffn_up_exps=512, blk__0__attn_q_a=1))
    assert planned(plan, "blk.0.attn_q_a.weight").imatrix_status == "wrong size"
    assert refused(plan, given=True) == (
        "the importance matrix has an entry of the wrong size for 2 tensors, the first "
        "'blk.0.attn_q_a.weight' as Q4_K (1 x 256 values); is it of this model and layout?"
    )


def test_an_imatrix_that_fits() -> None:
    catalogue = tiny()
    plan = make_plan(catalogue, load("UD-IQ1_S"), entries_for(catalogue, blk__0__attn_output=None))
    check_imatrix(plan, given=True)
    status = {t.tensor.name: t.imatrix_status for t in plan.tensors}
    # attn_k_b fell back to Q8_0, which has no use for it
    assert [n for n, s in status.items() if s == "missing"] == [OUT, EMBD, "blk.0.attn_output.weight"]
    assert status["blk.1.attn_k_b.weight"] == "not used"
    assert status["blk.1.ffn_up_exps.weight"] == "used"
    assert set(status.values()) == {"used", "missing", "not used"}

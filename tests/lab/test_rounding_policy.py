"""Variants that are rounded by feedback held against built files; probes, choices and policies of a small model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import making
import numpy as np
import pytest
from conftest import Run
from random_tokens import Tokens
from small_builds import OPTIONS

import quantkit as qk
from quantkit.base.errors import RecipeError, SourceError
from quantkit.forward.model import Model
from quantkit.forward.stream import Options
from quantkit.lab.evaluation.evaluate import EvalOptions, evaluate, of_file, of_plan
from quantkit.lab.evaluation.rounded import Blocks, Rounded
from quantkit.lab.evaluation.scores import interval, ratio_interval
from quantkit.lab.rounding_policy.groups import RoundedGroup, rounded_groups
from quantkit.lab.rounding_policy.policy_text import policy_text
from quantkit.lab.rounding_policy.report import tuned_json, tuned_text
from quantkit.lab.rounding_policy.tuning import Probed, Tuned, TuneOptions, chosen, tune
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, make_plan, with_values
from quantkit.recipe.load import parse
from quantkit.recipe.named import SCHEMA_LINE
from quantkit.rounding.covariance import Covariances
from quantkit.rounding.policy import Choice
from quantkit.rounding.policy import parse as parse_policy

ONE = Options(n_threads=1)
RECIPE = """\
name: small
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "{token_embd,output}.weight", type: Q8_0, why: so}
  - {match: "blk.*.ffn_*_exps.weight", type: Q2_K, why: so}
  - {match: "blk.*.attn_*.weight", type: Q4_K, optional: true, why: so}
  - {match: "*", type: Q4_K, why: so}
"""


def tokens(seed: int, n: int = 4) -> Tokens:
    return Tokens(np.random.default_rng(seed).integers(0, 384, (n, 32)).astype(np.int32))


@pytest.fixture(scope="module")
def reference(tiny_v3: Path) -> Model:
    return Model(open_model(str(tiny_v3), OPTIONS))


@pytest.fixture(scope="module")
def covariance(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Second moments of more tokens than tiny_v3 has columns; of experts' ffn_down not all."""
    folder = tmp_path_factory.mktemp("moments")
    file = making.some_text(folder / "text.txt", 1200)
    making.make(tiny_v3, file, folder / "imatrix.gguf", n_chunks=40, covariance=folder / "cov")
    return folder / "cov"


def plan_of(reference: Model, rounding: str | None = None, covariance: Path | None = None) -> Plan:
    recipe = parse(f"{SCHEMA_LINE}\n{RECIPE}", "small.yaml")
    return qk.plan(reference.catalogue, recipe, rounding=rounding, covariance=covariance)


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize("rounding", ["feedback", "coarse", "feedback+gain"])
def test_never_built_equals_built(reference: Model, covariance: Path, rounding: str, tmp_path: Path) -> None:
    """Rounded in memory and rounded in a file: the same predictions, to the bit, and the same size; not ggml's."""
    plan = plan_of(reference, rounding, covariance)
    qk.build(plan, tmp_path / "built.gguf", threads=1)
    built = of_file(open_model(str(tmp_path / "built.gguf")), "built")
    stock = of_plan(reference, plan_of(reference), "stock")
    several = [built, of_plan(reference, plan, "in memory"), stock]
    a, b, c = evaluate(reference, several, tokens(1), EvalOptions(forward=ONE)).candidates
    assert a.file_bytes == b.file_bytes == (tmp_path / "built.gguf").stat().st_size
    assert (a.mean_kld, a.ppl, a.kld_max, a.same_top) == (b.mean_kld, b.ppl, b.kld_max, b.same_top)
    assert a.mean_kld != c.mean_kld
    assert several[1].is_rounded
    assert not stock.is_rounded


def test_a_plan_without_its_covariance_is_refused(reference: Model) -> None:
    with pytest.raises(SourceError, match="needs a covariance of their inputs: give --covariance DIR"):
        of_plan(reference, plan_of(reference, "feedback"), "none")


def test_whole_matrices_are_kept_and_told_apart(reference: Model, covariance: Path) -> None:
    """What was made once is not made again; another choice, type or importance is another matrix; parts are not
    kept."""
    blocks = Blocks(Covariances(covariance))
    tensor = reference.weights.tensors["blk.0.ffn_gate.weight"]
    rows = reference.weights.rows(tensor.name, np.arange(tensor.n_rows))
    feedback = Choice("feedback", "because")
    ones = np.ones(tensor.n_cols, np.float32)

    def made(n: int = tensor.n_rows, choice: Choice = feedback, qtype: str = "Q2_K", imatrix: bool = False):  # type: ignore[no-untyped-def]
        return blocks.quantize(tensor, 0, rows[:n], qtype, ones if imatrix else None, choice)

    first = made()
    assert made(choice=Choice("feedback", "for another reason")) is first
    for other in (made(choice=Choice("feedback+gain", "")), made(qtype="Q4_K"), made(imatrix=True)):
        assert other is not first
    part = made(4)
    assert made(4) is not part
    np.testing.assert_array_equal(part, first[:4])
    small = Blocks(Covariances(covariance), first.nbytes - 1)
    again = small.quantize(tensor, 0, rows, "Q2_K", None, feedback)
    assert small.quantize(tensor, 0, rows, "Q2_K", None, feedback) is not again


def test_variants_share_what_is_rounded_alike(reference: Model, covariance: Path) -> None:
    blocks = Blocks(Covariances(covariance))
    a, b = (Rounded(blocks, {"blk.0.ffn_gate.weight": Choice("feedback", why)}) for why in ("one", "other"))
    assert a.key("blk.0.ffn_gate.weight", "Q2_K") == b.key("blk.0.ffn_gate.weight", "Q2_K") is not None
    gain = Rounded(blocks, {"blk.0.ffn_gate.weight": Choice("feedback+gain", "")})
    assert gain.key("blk.0.ffn_gate.weight", "Q2_K") != a.key("blk.0.ffn_gate.weight", "Q2_K")
    stock = Rounded(blocks, {"blk.0.ffn_gate.weight": Choice("ggml", ""), "output.weight": Choice("feedback", "")})
    assert stock.key("blk.0.ffn_gate.weight", "Q2_K") is None
    assert stock.key("output.weight", "Q8_0") is None  # which has no second moments


# ---------------------------------------------------------------- choosing


GROUP = RoundedGroup("ffn_down", "Q2_K", ("blk.0.ffn_down.weight",), ("blk.*.ffn_down.weight",), 1, ())


def probed(**klds: list[float]) -> Probed:
    named = {name.replace("_gain", "+gain"): np.array(values) for name, values in klds.items()}
    return chosen(replace(GROUP, methods=tuple(named)), named, 0.95)


@pytest.mark.parametrize(
    ("klds", "best"),
    [
        ({"ggml": [1, 2, 3], "feedback": [0.9, 1.8, 2.7]}, "feedback"),
        ({"ggml": [1, 2, 3], "feedback": [0.9, 2.1, 3]}, "ggml"),  # it cannot be told
        ({"ggml": [1, 2, 3], "feedback": [1.1, 2.2, 3.3]}, "ggml"),
        ({"ggml": [1, 2, 3], "coarse": [0.9, 1.8, 2.7], "feedback": [0.9, 1.8, 2.7]}, "coarse"),  # the simpler
        ({"ggml": [1, 2, 3], "coarse": [1.1, 2, 3], "feedback": [0.9, 1.8, 2.7]}, "feedback"),
        ({"ggml": [1, 2, 3], "feedback": [0.9, 1.8, 2.7], "feedback_gain": [1, 1, 3]}, "feedback"),
        ({"ggml": [1, 2, 3], "feedback": [0.9, 1.8, 2.7], "feedback_gain": [0.8, 1.7, 2.6]}, "feedback+gain"),
        ({"ggml": [1.0], "feedback": [0.1]}, "ggml"),  # one chunk has no interval
    ],
)  # fmt: skip
def test_the_simplest_that_none_is_measurably_better_than(klds: dict[str, list[float]], best: str) -> None:
    assert probed(**klds).chosen == best


def test_a_ratio_has_the_interval_of_its_chunks() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 6.0, 8.0])
    assert ratio_interval(a, b) == (0.5, 0.5)
    low, high = ratio_interval(a[::-1].copy(), b)
    assert 0 < low < 0.5 < high
    assert ratio_interval(a[:1], b[:1]) == (0, np.inf)
    assert interval(a - a) == (0, 0)


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def tuned(reference: Model, covariance: Path) -> Tuned:
    opts = TuneOptions(("feedback", "feedback+gain"), forward=ONE)
    return tune([plan_of(reference)], Covariances(covariance), (tokens(2), tokens(3)), opts)


def test_groups_are_of_what_has_second_moments(reference: Model, covariance: Path) -> None:
    groups = {g.name: g for g in rounded_groups([plan_of(reference)], Covariances(covariance))}
    names = {name for g in groups.values() for name in g.tensors}
    assert "token_embd.weight" not in names
    assert groups["ffn_gate_up_exps Q2_K"].match == "blk.*.{ffn_gate_exps,ffn_up_exps}.weight"
    assert groups["ffn_gate_up_exps Q2_K"].methods == ("ggml", "feedback", "feedback+gain")  # rows of one super-block
    assert groups["ffn_down Q4_K"].methods == ("ggml", "coarse", "feedback", "feedback+gain")  # of two
    only = rounded_groups([plan_of(reference)], Covariances(covariance), ("coarse",))
    assert {g.name for g in only} == {"ffn_down Q4_K"}


def test_probes_whole_files_and_the_policy(tuned: Tuned, reference: Model, covariance: Path) -> None:
    assert {(w.how, w.text) for w in tuned.whole} == {
        (how, text) for how in ("ggml", "feedback", "tuned") for text in ("choose", "report")
    }
    assert len({w.scored.file_bytes for w in tuned.whole}) == 1
    for p in tuned.probed:
        assert all(len(values) == 4 and (values > 0).all() for values in p.by_chunk.values())
    # a probe is a variant of which one group is quantized
    p = next(p for p in tuned.probed if p.group.name == "ffn_down Q4_K")
    types = dict.fromkeys(p.group.tensors, "Q4_K")
    alone = plan_of(reference).with_types({n: types.get(n, "BF16") for n in types})
    assert alone["blk.0.ffn_down.weight"].type == "Q4_K"
    text = policy_text(tuned, "small", "2026-11-28")
    policy = parse_policy(text, "small.yaml")
    plan = plan_of(reference)
    for t in plan.tensors:
        assert policy.choose(t.tensor, t.type).rounding == tuned.choice(t.tensor.name, t.type)
    assert policy.file.measured["date"] == "2026-11-28"
    assert policy.file.measured["report"] == "4 chunks of 32 tokens of random"
    # what it makes is what was measured
    whole = next(w for w in tuned.whole if (w.how, w.text) == ("tuned", "report"))
    (Path(covariance) / ".." / "small.yaml").write_text(text)
    again = of_plan(reference, plan_of(reference, str(covariance.parent / "small.yaml"), covariance), "again")
    (found,) = evaluate(reference, [again], tokens(3), EvalOptions(forward=ONE)).candidates
    assert found.mean_kld == whole.scored.mean_kld


def test_what_is_said(tuned: Tuned) -> None:
    text = tuned_text(tuned)
    assert "text to choose: 4 chunks of 32 tokens of random" in text
    assert text.count("chosen") >= len(tuned.probed)
    said = json.loads(json.dumps(tuned_json(tuned, "the policy")))
    assert said["quantkit_rounding"] == 1
    assert {g["chosen"] for g in said["groups"]} <= {"ggml", "feedback", "feedback+gain"}


def test_what_cannot_be_tuned(reference: Model, covariance: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown rounding 'best'; there are ggml, coarse, feedback, feedback\+gain"):
        tune([plan_of(reference)], Covariances(covariance), (tokens(2), None), TuneOptions(("best",)))
    bf16 = parse(
        f'{SCHEMA_LINE}\nname: b\narch: [any]\nfile_type: BF16\nrules: [{{match: "*", type: BF16, why: a}}]', "b"
    )
    plan = with_values(make_plan(reference.catalogue, bf16), None)
    with pytest.raises(SourceError, match="has second moments for none of the tensors that b quantizes with a method"):
        tune([plan], Covariances(covariance), (tokens(2), None))


# ---------------------------------------------------------------- the command line


def test_the_commands(quantkit: Run, tiny_v3: Path, covariance: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    text = making.some_text(tmp_path / "text.txt", 200, seed=9)
    common = ("--pre", "deepseek-v3", "--text", text, "-c", "32", "--chunks", "3", "--threads", "1", "-q")
    given = ("-r", tmp_path / "small.yaml", "--covariance", covariance)
    out = tmp_path / "policy.yaml"
    done = quantkit("rounding", "tune", tiny_v3, *given, *common, "-o", out, "--method", "feedback", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert out.read_text() == said["policy"]
    policy = parse_policy(out.read_text(), "policy.yaml")
    assert policy.name == "policy"
    plan = qk.plan(qk.open_model(tiny_v3, pre="deepseek-v3"), tmp_path / "small.yaml")
    only_feedback = TuneOptions(("feedback",), forward=ONE)
    made = qk.tune_rounding(plan, covariance, text, n_ctx=32, n_chunks=3, options=only_feedback)
    assert made.policy("policy", policy.file.measured["date"]) == said["policy"]
    again = quantkit("rounding", "tune", tiny_v3, *given, *common, "-o", out)
    assert again.returncode == 7, again.stderr
    assert "policy.yaml: exists; choose another name, or replace it with --force" in again.stderr
    none = quantkit("rounding", "tune", tiny_v3, *given, "--pre", "deepseek-v3", "-q")
    assert none.returncode == 2
    assert "give --text, or --choose-text and --report-text" in none.stderr

    both = quantkit("eval", tiny_v3, *given, *common, "--rounding", "feedback", "--json")
    assert both.returncode == 0, both.stderr
    a, b = json.loads(both.stdout)["candidates"]
    assert (a["name"], b["name"]) == ("small", "small, feedback")
    assert a["file_bytes"] < b["file_bytes"] < a["file_bytes"] + 4096  # the header says how it was rounded
    assert a["mean_kld"] != b["mean_kld"]
    idle = quantkit("eval", tiny_v3, *given, *common)
    assert idle.returncode == 2
    assert "--covariance needs a rounding to use it" in idle.stderr

    (tmp_path / "study.yaml").write_text("base: small.yaml\naxes: {how: {roundings: [feedback, ggml]}}\n")
    study = ("ablate", "run", tmp_path / "study.yaml", tiny_v3, *common, "-o", tmp_path / "study.db")
    lacking = quantkit(*study)
    assert lacking.returncode == 1
    assert (
        "warning: how=feedback: 'output.weight' and 34 more tensors are to be rounded by feedback (study: axes.how), "
        "which needs a covariance of their inputs: give --covariance DIR; make one with: quantkit imatrix make MODEL "
        "--text F -o imatrix.gguf --covariance DIR"
    ) in lacking.stderr
    done = quantkit(*study, "--covariance", covariance)
    assert done.returncode == 0, done.stderr
    shown = json.loads(quantkit("ablate", "show", tmp_path / "study.db", "--json").stdout)
    by = {r["variant"]: r["scores"] for r in shown["results"] if r["scores"]}
    assert by.keys() == {"base", "how=feedback"}  # ggml's is the base again
    assert by["base"]["mean_kld"] == a["mean_kld"]
    assert by["how=feedback"]["mean_kld"] == b["mean_kld"]

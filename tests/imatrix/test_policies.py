"""Policies for gaps in an importance matrix: the values to the bit, and the bytes of both engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import factory
import numpy as np
import numpy.typing as npt
import pytest
from checking import check
from conftest import Run, Tools
from factory import gguf_imatrix
from small_builds import OPTIONS, build, plan_of, rules

from quantkit.base.errors import ImatrixError, ResumeError
from quantkit.building import run as builds
from quantkit.building.cache import Cache
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.building.engines.native import NativeEngine
from quantkit.gguf.header import decode, read_header
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.policies import Completed, parse_policy
from quantkit.model.open import open_model
from quantkit.planning import report
from quantkit.planning.plan import with_values
from quantkit.recipe.load import load, parse

F32 = np.float32
Array = npt.NDArray[np.float32]
Entries = dict[str, tuple[Array, Array]]
GATE, UP, DOWN = (f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down"))
COLS, MATS = 64, 4


# ---------------------------------------------------------------- how a chain is written


@pytest.mark.parametrize(
    "text", ["fail", "ones", "sibling,prior", "sibling,shrink:50,ones", "raise:Q4_K,prior,fail", "kv_b,sibling"]
)
def test_a_chain_is_read_and_written_alike(text: str) -> None:
    assert parse_policy(text).text == text


def test_blanks_and_small_letters_are_forgiven() -> None:
    assert parse_policy(" sibling , raise:q4_k, shrink:007").text == "sibling,raise:Q4_K,shrink:7"


KNOWN = "fail, ones, sibling, prior, shrink:K, raise:TYPE, kv_b, several in a row with commas, as in sibling,prior"
WRONG = {
    "": f"'' is not a policy for an importance matrix; known are {KNOWN}",
    "siblings": f"'siblings' is not a policy for an importance matrix (did you mean sibling?); known are {KNOWN}",
    "sibling,,prior": f"'' is not a policy for an importance matrix; known are {KNOWN}",
    "shrink": "'shrink' should be written shrink:K",
    "prior:5": "'prior:5' should be written prior",
    "raise:": "'raise:' should be written raise:TYPE",
    "shrink:0": "'shrink:0': K is a number of tokens from 1 to 1,000,000,000, as in shrink:50",
    "shrink:-5": "'shrink:-5': K is a number of tokens from 1 to 1,000,000,000, as in shrink:50",
    "shrink:99999999999999999999": (
        "'shrink:99999999999999999999': K is a number of tokens from 1 to 1,000,000,000, as in shrink:50"
    ),
    "raise:Q4_KM": "'raise:Q4_KM': unknown type 'Q4_KM' (did you mean Q4_K?)",
    "raise:I32": "'raise:I32': I32 is not a type to quantize to",
    "ones,prior": "'ones,prior': ones ends a chain; what follows it would never be asked",
    "fail,ones": "'fail,ones': fail ends a chain; what follows it would never be asked",
    "prior,sibling,prior": "'prior,sibling,prior' has prior twice",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_what_is_no_chain(text: str, message: str) -> None:
    with pytest.raises(ValueError) as e:  # noqa: PT011
        parse_policy(text)
    assert str(e.value) == message


# ---------------------------------------------------------------- values


def entries(**seen: tuple[float, ...]) -> Entries:
    """Entries of gate and up, or of the tensors named: random sums, with these counts."""
    rng = np.random.default_rng(5)
    out: Entries = {}
    for stem, counts in seen.items():
        values = rng.lognormal(0, 1, (len(counts), COLS)).astype(F32)
        values[np.array(counts) == 0] = 0
        out[f"blk.1.{stem}.weight"] = (values, np.array(counts, F32)[:, None])
    return out


def completed(path: Path, of: Entries, policy: str, shapes: Mapping[str, tuple[int, int]] | None = None) -> Completed:
    found = open_imatrix(str(gguf_imatrix(path, of)))
    return Completed(found, parse_policy(policy), shapes or {GATE: (COLS, MATS), UP: (COLS, MATS)})


def rows(c: Completed, name: str = UP) -> Array:
    n_cols, n_mats = c.shapes[name]
    return np.stack([c.weights(name, m, n_cols) for m in range(n_mats)])


def means(of: Entries, name: str) -> Array:
    values, counts = of[name]
    with np.errstate(all="ignore"):
        return (values / counts).astype(F32)


def test_a_sibling_gives_an_exact_copy(tmp_path: Path) -> None:
    of = entries(ffn_gate_exps=(7, 9, 0, 3), ffn_up_exps=(5, 0, 0, 2))
    c = completed(tmp_path / "x", of, "sibling,ones")
    expected = means(of, UP)
    expected[1] = means(of, GATE)[1]
    expected[2] = 1  # neither saw it
    assert (rows(c) == expected).all()
    assert c.origin(UP).counts() == {"ones": 1, "own": 2, "sibling": 1}
    # in the other direction there is nothing to take
    assert c.origin(GATE).counts() == {"ones": 1, "own": 3}


def test_a_sibling_gives_a_whole_entry(tmp_path: Path) -> None:
    of = entries(ffn_gate_exps=(7, 9, 4, 3))
    c = completed(tmp_path / "x", of, "sibling")
    assert UP in c
    assert c.fits(UP, COLS, MATS)
    assert (rows(c) == means(of, GATE)).all()
    assert DOWN not in completed(tmp_path / "y", of, "sibling", {DOWN: (COLS, MATS)})


@pytest.mark.parametrize(
    ("giver", "taker"),
    [
        ("attn_q_a", "attn_kv_a_mqa"), ("attn_kv_a_mqa", "attn_q_a"), ("attn_q", "attn_kv_a_mqa"), ("attn_q", "attn_v"),
        ("ffn_gate", "ffn_up"), ("ffn_up_shexp", "ffn_gate_shexp"), ("ffn_gate_inp", "ffn_up_shexp"),
    ],
)  # fmt: skip
def test_tensors_with_the_same_input(tmp_path: Path, giver: str, taker: str) -> None:
    name = f"blk.1.{taker}.weight"
    of = entries(**{giver: (7,)})
    c = completed(tmp_path / "x", of, "sibling", {name: (COLS, 1)})
    assert (rows(c, name)[0] == means(of, f"blk.1.{giver}.weight")[0]).all()


@pytest.mark.parametrize(
    ("giver", "taker"),
    [("attn_q_a", "attn_q_b"), ("ffn_up", "ffn_down"), ("attn_k_b", "attn_v_b"), ("ffn_up_shexp", "ffn_up_exps")],
)
def test_tensors_of_another_input_give_nothing(tmp_path: Path, giver: str, taker: str) -> None:
    name = f"blk.1.{taker}.weight"
    assert name not in completed(tmp_path / "x", entries(**{giver: (7,)}), "sibling", {name: (COLS, 1)})
    assert f"blk.2.{giver}.weight" not in completed(
        tmp_path / "y", entries(**{giver: (7,)}), "sibling", {f"blk.2.{giver}.weight": (COLS, 1)}
    )


def test_a_sibling_of_another_size_gives_nothing(tmp_path: Path) -> None:
    of = entries(ffn_gate_exps=(7, 9, 4))
    assert UP not in completed(tmp_path / "x", of, "sibling")


def test_prior_is_the_mean_of_the_experts_that_were_seen(tmp_path: Path) -> None:
    of = entries(ffn_up_exps=(5, 0, 0, 2))
    c = completed(tmp_path / "x", of, "prior")
    own = means(of, UP)
    expected = own.copy()
    expected[1] = expected[2] = ((own[0].astype(np.float64) + own[3]) / 2).astype(F32)
    assert (rows(c) == expected).all()
    assert c.origin(UP).counts() == {"own": 2, "prior": 2}


def test_the_first_that_can_give_data_wins(tmp_path: Path) -> None:
    of = entries(ffn_gate_exps=(7, 9, 0, 3), ffn_up_exps=(5, 0, 0, 2))
    assert completed(tmp_path / "x", of, "sibling,prior").origin(UP).sources == ("own", "sibling", "prior", "own")
    assert completed(tmp_path / "y", of, "prior,sibling").origin(UP).sources == ("own", "prior", "prior", "own")
    # values that a sibling gave count as data for the mean
    c, own = completed(tmp_path / "z", of, "sibling,prior"), means(of, UP)
    mean = (own[0].astype(np.float64) + means(of, GATE)[1] + own[3]) / 3
    assert (c.weights(UP, 2, COLS) == mean.astype(F32)).all()


def test_shrink_draws_every_expert_towards_the_mean(tmp_path: Path) -> None:
    of = entries(ffn_up_exps=(5, 0, 400, 2))
    c = completed(tmp_path / "x", of, "shrink:50")
    own, counts = means(of, UP).astype(np.float64), (5, 0, 400, 2)
    mean = (own[0] + own[2] + own[3]) / 3
    expected = np.stack([(n * own[m] + 50 * mean) / (n + 50) if n else mean for m, n in enumerate(counts)])
    assert (rows(c) == expected.astype(F32)).all()
    assert c.origin(UP).counts() == {"shrink": 4}


def test_shrink_leaves_what_are_no_experts(tmp_path: Path) -> None:
    of = entries(attn_k_b=(5, 9))
    c = completed(tmp_path / "x", of, "shrink:50", {"blk.1.attn_k_b.weight": (COLS, 2)})
    assert (rows(c, "blk.1.attn_k_b.weight") == means(of, "blk.1.attn_k_b.weight")).all()
    assert not c.origin("blk.1.attn_k_b.weight").is_filled


def test_an_expert_of_zeros_is_missing_but_for_fail_and_ones(tmp_path: Path) -> None:
    of = entries(ffn_gate_exps=(7, 9, 4, 3), ffn_up_exps=(5, 6, 4, 2))
    of[UP][0][1] = 0
    own, gate = means(of, UP), means(of, GATE)
    for policy, second in {
        "fail": own[1], "ones": own[1], "sibling": gate[1], "prior": own[[0, 2, 3]].astype(np.float64).mean(0),
        "raise:Q4_K": np.ones(COLS), "raise:Q4_K,sibling": gate[1],
    }.items():  # fmt: skip
        got = rows(completed(tmp_path / policy.replace(":", ""), of, policy))
        assert np.allclose(got[1], second, rtol=1e-7, atol=0), policy
        assert (got[[0, 2, 3]] == own[[0, 2, 3]]).all()


def test_ones_are_as_llama_quantize_has_them(tmp_path: Path) -> None:
    of = entries(ffn_up_exps=(5, 0, 0, 2))
    as_read = open_imatrix(str(gguf_imatrix(tmp_path / "y", of)))
    got = rows(completed(tmp_path / "x", of, "ones"))
    assert (got == np.stack([as_read.weights(UP, m, COLS) for m in range(MATS)])).all()
    assert (got[[1, 2]] == 1).all()


def legacy(path: Path, values: Array, policy: str) -> Completed:
    factory.legacy_imatrix(path, {UP: (7, values.ravel() * 7)})
    return Completed(open_imatrix(str(path)), parse_policy(policy), {UP: (COLS, MATS)})


def test_the_older_format_writes_experts_never_seen_as_ones(tmp_path: Path) -> None:
    values = means(entries(ffn_up_exps=(5, 3, 8, 2)), UP)
    values[2] = 1
    c = legacy(tmp_path / "x.dat", values, "prior")
    assert c.origin(UP).sources == ("own", "own", "prior", "own")
    assert legacy(tmp_path / "y.dat", values, "fail").origin(UP).unseen == (2,)
    # llama-imatrix makes no matrix of only ones: it is deliberate
    assert legacy(tmp_path / "z.dat", np.ones((MATS, COLS), F32), "prior").origin(UP).sources == ("own",) * MATS


def test_shrink_needs_the_tokens_of_each_expert(tmp_path: Path) -> None:
    c = legacy(tmp_path / "x.dat", means(entries(ffn_up_exps=(5, 3, 8, 2)), UP), "shrink:50")
    with pytest.raises(ImatrixError) as e:
        c.weights(UP, 0, COLS)
    assert str(e.value) == (
        f"{tmp_path / 'x.dat'}: the policy shrink:50 needs the number of tokens that each expert saw, but the entry of "
        f"'{UP}' has one count for all 4, as all have in the older .dat format; use prior, or a matrix in the GGUF "
        "format that llama-imatrix made"
    )


def test_kv_b_serves_v_b_only_when_asked(tmp_path: Path) -> None:
    of = entries(attn_kv_b=(9,))
    names = {x: f"blk.1.attn_{x}.weight" for x in ("k_b", "v_b")}
    shapes = {name: (COLS, 2) for name in names.values()}
    assert names["v_b"] not in completed(tmp_path / "x", of, "sibling", shapes)
    c = completed(tmp_path / "y", of, "kv_b", shapes)
    assert names["k_b"] not in c
    assert (rows(c, names["v_b"]) == means(of, "blk.1.attn_kv_b.weight")[0]).all()
    assert c.origin(names["v_b"]).counts() == {"kv_b": 2}


# ---------------------------------------------------------------- plans


def entries_of(model: Path, change: Callable[[Entries], Any]) -> Entries:
    """An entry for each tensor in the layers, modified by `change`. Sums differ from tensor to tensor."""
    rng = np.random.default_rng(3)
    out: Entries = {}
    for t in open_model(str(model), OPTIONS).tensors:
        if t.quantizable and t.layer is not None:
            n_mats = t.shape[2] if len(t.shape) > 2 else 1
            out[t.name] = (rng.lognormal(0, 1, (n_mats, t.shape[0])).astype(F32), np.full((n_mats, 1), 7, F32))
    change(out)
    return out


def plant(of: Entries) -> None:
    """UP has not seen expert 1; DOWN not expert 3, and its expert 2 only one token. attn_q_a has no entry."""
    for name, expert in ((UP, 1), (DOWN, 3)):
        of[name][0][expert] = of[name][1][expert] = 0
    of[DOWN][1][2] = 1
    del of["blk.1.attn_q_a.weight"]


@pytest.fixture(scope="module")
def gappy(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_imatrix(tmp_path_factory.mktemp("gappy") / "imatrix.gguf", entries_of(tiny_v3, plant))


#: types that use weights, of two sizes
RECIPE = rules('match: "*_exps.weight", type: IQ2_XXS', 'match: "*", type: Q4_K', optional=True)


def refusal(plan: Any, imatrix: Path) -> str:
    with pytest.raises(ImatrixError) as e:
        with_values(plan, open_imatrix(str(imatrix)))
    return str(e.value)


CHOICES = (
    "sibling (a copy from the tensor with the same input: gate and up, q_a and kv_a_mqa), prior (the mean of the "
    "tensor's other experts), shrink:K (that mean, and every expert's values drawn towards it by K tokens), raise:TYPE "
    "(at least TYPE for the whole tensor, whose experts cannot differ in type), ones (all columns alike, as "
    "llama-quantize has it without a word); or make the matrix from more text"
)


def test_experts_never_seen_end_a_build(tiny_v3: Path, gappy: Path) -> None:
    assert refusal(plan_of(tiny_v3, RECIPE, gappy), gappy) == (
        f"the importance matrix never saw 2 experts in 2 tensors: {DOWN} expert 3; {UP} expert 1; say with "
        f"--imatrix-policy what stands in for them: {CHOICES}"
    )
    assert refusal(plan_of(tiny_v3, RECIPE, gappy, policy="sibling"), gappy) == (
        f"the importance matrix never saw 1 expert in 1 tensor: {DOWN} expert 3, and sibling gives it nothing; say "
        f"with --imatrix-policy what stands in for it: {CHOICES}"
    )


def test_a_type_without_use_for_the_matrix_needs_no_policy(tiny_v3: Path, gappy: Path) -> None:
    plan = plan_of(tiny_v3, rules('match: "*", type: Q8_0'), gappy)
    assert with_values(plan, open_imatrix(str(gappy))).gaps == ()


def test_the_plan_tells_where_values_come_from(tiny_v3: Path, gappy: Path) -> None:
    plan = with_values(plan_of(tiny_v3, RECIPE, gappy, policy="sibling,prior"), open_imatrix(str(gappy)))
    assert plan.applied == "sibling,prior: prior for 1 expert in 1 tensor, sibling for 2 matrices in 2 tensors"
    tensors = {t["name"]: t for t in plan.to_json(None)["tensors"]}
    assert plan.to_json(None)["imatrix_policy"] == "sibling,prior"
    assert tensors[UP]["imatrix_values"] == {"own": 3, "sibling": 1}
    assert tensors[DOWN]["imatrix_values"] == {"own": 3, "prior": 1}
    assert tensors["blk.1.attn_q_a.weight"]["imatrix_values"] == {"sibling": 1}
    assert tensors["blk.1.attn_q_a.weight"]["imatrix"] == "used"
    assert [n for n, t in tensors.items() if "imatrix_values" in t] == [
        "blk.1.attn_q_a.weight", DOWN, UP
    ]  # fmt: skip
    shown = report.plan_text(plan, [("o.gguf", 1)])
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("blk.")}
    assert " used, 1 sibling of 4 " in lines[UP]
    assert " used, 1 prior of 4 " in lines[DOWN]
    assert " used, 1 sibling " in lines["blk.1.attn_q_a.weight"]
    assert f"note: where the importance matrix lacks data, by the policy {plan.applied}" in shown


def test_raise_gives_the_whole_tensor_more_bits(tiny_v3: Path, gappy: Path) -> None:
    plan = with_values(plan_of(tiny_v3, RECIPE, gappy, policy="raise:Q6_K"), open_imatrix(str(gappy)))
    up, gate, q_a = plan[UP], plan[GATE], plan["blk.1.attn_q_a.weight"]
    assert (up.type, gate.type, q_a.type) == ("Q6_K", "IQ2_XXS", "Q6_K")
    assert up.why == "t; Q6_K by the policy raise:Q6_K, since the importance matrix lacks data"
    assert not up.fell_back
    assert plan.raised == {UP, DOWN, "blk.1.attn_q_a.weight"}
    assert plan.applied == "raise:Q6_K: ones for 2 experts in 2 tensors, 3 tensors raised to Q6_K"
    # a limit below what it already has raises nothing
    low = with_values(plan_of(tiny_v3, RECIPE, gappy, policy="raise:Q2_K,ones"), open_imatrix(str(gappy)))
    assert low["blk.1.attn_q_a.weight"].type == "Q4_K"
    assert low[UP].type == "Q2_K"


def test_raise_leaves_embedding_and_output(tiny_v3: Path, gappy: Path) -> None:
    plan = plan_of(tiny_v3, RECIPE, gappy, policy="raise:Q8_0")
    assert (plan["token_embd.weight"].type, plan["output.weight"].type) == ("Q4_K", "Q4_K")


def test_a_recipe_may_say_it_and_the_command_line_comes_first(tiny_v3: Path, gappy: Path) -> None:
    text = "name: r\nbase: UD-IQ1_S\nimatrix_policy: sibling, prior\n"
    recipe = parse(text, "r.yaml", None, Path())
    assert recipe.imatrix_policy == "sibling,prior"
    assert plan_of(tiny_v3, recipe, gappy).policy.text == "sibling,prior"
    assert plan_of(tiny_v3, recipe, gappy, policy="ones").policy.text == "ones"
    assert plan_of(tiny_v3, load("UD-IQ1_S"), gappy).policy.text == "fail"


# ---------------------------------------------------------------- builds

POLICIES = ["ones", "sibling,prior", "shrink:50", "raise:IQ3_XXS", "sibling,shrink:3,ones"]


@pytest.mark.tools
@pytest.mark.parametrize("policy", POLICIES)
def test_both_engines_give_the_same_bytes(
    tools: Tools, tiny_v3: Path, gappy: Path, tmp_path: Path, policy: str
) -> None:
    plan = plan_of(tiny_v3, RECIPE, gappy, policy=policy)
    ours = build(plan, tmp_path / "ours.gguf", gappy)
    theirs = build(plan, tmp_path / "theirs.gguf", gappy, engine=LlamaQuantizeEngine(tools.quantize))
    assert ours.read_bytes() == theirs.read_bytes()
    verdict = check(ours, with_values(plan, open_imatrix(str(gappy))), gappy)
    assert verdict.ok, verdict.text(10)


@pytest.mark.tools
def test_both_engines_from_a_gguf(tools: Tools, tiny_bf16: Path, gappy: Path, tmp_path: Path) -> None:
    """Not in a single run of llama-quantize, which would record the name of a temporary file."""
    plan = plan_of(tiny_bf16, RECIPE, gappy, policy="sibling,prior")
    ours = build(plan, tmp_path / "ours.gguf", gappy)
    theirs = build(plan, tmp_path / "theirs.gguf", gappy, engine=LlamaQuantizeEngine(tools.quantize))
    assert ours.read_bytes() == theirs.read_bytes()


def recorded(path: Path) -> str | None:
    return next((str(decode(kv)) for kv in read_header(path).kvs if kv.key == "quantkit.imatrix.policy"), None)


def test_the_file_says_what_was_done_and_nothing_where_nothing_was(
    tiny_v3: Path, tiny_imatrix: Path, gappy: Path, tmp_path: Path
) -> None:
    plan = plan_of(tiny_v3, RECIPE, gappy, policy="sibling,prior")
    made = build(plan, tmp_path / "a.gguf", gappy)
    assert recorded(made) == "sibling,prior: prior for 1 expert in 1 tensor, sibling for 2 matrices in 2 tensors"
    assert recorded(build(plan_of(tiny_v3, RECIPE, gappy, policy="ones"), tmp_path / "b.gguf", gappy)) is None
    whole = build(plan_of(tiny_v3, RECIPE, tiny_imatrix, policy="sibling,prior"), tmp_path / "c.gguf", tiny_imatrix)
    plain = build(plan_of(tiny_v3, RECIPE, tiny_imatrix), tmp_path / "d.gguf", tiny_imatrix)
    assert whole.read_bytes() == plain.read_bytes()
    # quantized again without a matrix, the key would no longer be true
    again = plan_of(made, rules('match: "*", type: Q8_0'), None)
    requantized = build(again, tmp_path / "e.gguf", allow_requantize=True)
    assert recorded(requantized) is None
    assert check(requantized, again, sample=None).ok


def test_an_unfinished_build_goes_on_with_the_same_policy_only(tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "o.gguf", open_imatrix(str(gappy))

    def stop(name: str, _n: int) -> None:
        if name == UP:
            raise KeyboardInterrupt

    ready = builds.prepare(plan_of(tiny_v3, RECIPE, gappy, policy="sibling,prior"), out, weights)
    with pytest.raises(KeyboardInterrupt):
        builds.run(ready, NativeEngine(), 1, stop)
    with pytest.raises(ResumeError, match=r"imatrix was imatrix\.gguf \(sha256 \w+\), policy sibling,prior, is "):
        builds.prepare(plan_of(tiny_v3, RECIPE, gappy, policy="ones"), out, weights)
    again = builds.prepare(plan_of(tiny_v3, RECIPE, gappy, policy="sibling,prior"), out, weights)
    assert builds.run(again, NativeEngine(), 1, lambda _name, _n: None) > 0
    assert check(out, again.plan, gappy).ok


def test_the_cache_tells_policies_apart(tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    cache, weights, made = Cache(tmp_path / "cache", 10**9), open_imatrix(str(gappy)), {}
    for policy in ("ones", "sibling,prior"):
        ready = builds.prepare(plan_of(tiny_v3, RECIPE, gappy, policy=policy), tmp_path / f"{policy}.gguf", weights)
        builds.run(ready, NativeEngine(), 1, lambda _name, _n: None, cache)
        made[policy] = len(ready.plan.tensors) - cache.n_found
        cold = build(plan_of(tiny_v3, RECIPE, gappy, policy=policy), tmp_path / "cold.gguf", gappy)
        assert cold.read_bytes() == ready.files[0][0].read_bytes()
        cold.unlink()
    # only the entries with changed values: UP, DOWN, attn_q_a
    assert made["sibling,prior"] == 3


# ---------------------------------------------------------------- verify, and the command line


def test_verify_finds_the_values_of_another_policy(tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    weights = open_imatrix(str(gappy))
    made = build(plan_of(tiny_v3, RECIPE, gappy, policy="sibling,prior"), tmp_path / "o.gguf", gappy)
    other = with_values(plan_of(tiny_v3, RECIPE, gappy, policy="ones"), weights)
    verdict = check(made, other, gappy)
    assert not verdict.ok
    assert {f.tensor for f in verdict.findings.kept() if f.kind == "row"} == {UP, DOWN, "blk.1.attn_q_a.weight"}
    assert [f.text for f in verdict.findings.kept() if f.kind == "metadata"] == [
        "key 'quantkit.imatrix.policy' is not in the plan"
    ]


def test_from_the_command_line(quantkit: Run, tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "o.gguf", tmp_path / "r.yaml"
    recipe.write_text("name: r\nbase: UD-IQ1_S\n")
    common = ("--recipe", recipe, "--pre", "deepseek-v3", "--imatrix", gappy)
    refused = quantkit("build", tiny_v3, "-o", out, *common, "-q")
    assert refused.returncode == 6
    assert refused.stderr.startswith(
        f"error: the importance matrix never saw 2 experts in 2 tensors: {DOWN} expert 3; {UP} expert 1; say with "
    )
    policy, statement = ("--imatrix-policy", "sibling,prior"), tmp_path / "o.json"
    done = quantkit("build", tiny_v3, "-o", out, *common, "-q", *policy, "--attest", statement)
    assert (done.returncode, done.stderr) == (0, "")
    verify = ("verify", out, "--source", tiny_v3, *common)
    said = quantkit(*verify, "--sample", "all")
    assert said.returncode == 0, said.stdout + said.stderr
    assert (
        "the policy for what the importance matrix lacks, sibling,prior, was taken from the file itself: give "
        "--imatrix-policy to check it too"
    ) in said.stdout
    attested = ("verify", out, "--source", tiny_v3, "--imatrix", gappy, "--attestation", statement)
    said = quantkit(*attested)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "was taken from the file itself" not in said.stdout
    other = quantkit(*attested, "--imatrix-policy", "ones")
    assert other.returncode == 2
    assert (
        "--imatrix-policy ones contradicts the attestation, which records --imatrix-policy sibling,prior; "
        "leave it out, or verify without --attestation"
    ) in " ".join(other.stderr.split())
    wrong = quantkit(*verify, "--sample", "none", "--imatrix-policy", "ones")
    assert wrong.returncode != 0
    assert "key 'quantkit.imatrix.policy' is not in the plan" in wrong.stdout


def test_usage(quantkit: Run, tiny_v3: Path) -> None:
    done = quantkit("plan", "deepseek-r1", "--recipe", "UD-IQ1_S", "--imatrix-policy", "ones")
    assert done.returncode == 2
    assert "--imatrix-policy needs --imatrix FILE: it says what stands in for what FILE lacks" in done.stderr
    done = quantkit("plan", "deepseek-r1", "--recipe", "UD-IQ1_S", "--imatrix", "x", "--imatrix-policy", "onse")
    assert done.returncode == 2
    assert "'onse' is not a policy for an importance matrix (did you mean ones?)" in done.stderr.replace("\n", " ")

"""The knapsack held against brute force; problems, targets and recipes of a small model; the command end to end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.base.errors import RecipeError, SourceError, TextError, UnsupportedError
from quantkit.base.files import file_sha256
from quantkit.gguf.types import QTYPES
from quantkit.imatrix.matrix import Imatrix, open_imatrix
from quantkit.lab.allocation.baselines import Baseline, baselines, file_bytes
from quantkit.lab.allocation.damage import Probe, Sensitivity
from quantkit.lab.allocation.groups import groups_of
from quantkit.lab.allocation.knapsack import Item, Monotone, Option, solve
from quantkit.lab.allocation.optimize import OptimizeOptions, Optimizer, optimize
from quantkit.lab.allocation.problem import MINIMUM, Constraints, make_problem, padded
from quantkit.lab.allocation.supported import Corner, least
from quantkit.lab.allocation.targets import parse_fit, parse_target
from quantkit.lab.allocation.weight_errors import TYPES, Usable
from quantkit.lab.evaluation.parts import parse_part, part
from quantkit.lab.identity import of_model
from quantkit.model.catalogue import Catalogue
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.planning.rounding import with_covariance
from quantkit.recipe.load import Rounding, load, parse
from quantkit.rounding.covariance import Covariances
from quantkit.text.chunking import Chunks

# ---------------------------------------------------------------- the knapsack

OPTIONS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000), st.integers(1, 8)), min_size=1, max_size=4)


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[list[Item], int, list[Monotone]]:
    n = draw(st.integers(1, 5))
    items = [
        Item(str(i), tuple(Option(str(j), 32 * b, d / 7, v) for j, (b, d, v) in enumerate(draw(OPTIONS))))
        for i in range(n)
    ]
    pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=2))
    return items, draw(st.integers(0, 32 * 40 * n)), [Monotone(a, b) for a, b in pairs if a != b]


def brute_force(items: list[Item], budget: int, monotone: list[Monotone]) -> float | None:
    best = None
    for picked in itertools.product(*(item.options for item in items)):
        if sum(o.nbytes for o in picked) > budget:
            continue
        if any(picked[m.first].level < picked[m.then].level for m in monotone):
            continue
        damage = sum(o.damage for o in picked)
        best = damage if best is None else min(best, damage)
    return best


@settings(max_examples=150, deadline=None)
@given(knapsacks())
def test_the_knapsack_is_solved_to_the_optimum(given_: tuple[list[Item], int, list[Monotone]]) -> None:
    items, budget, monotone = given_
    best, found = brute_force(items, budget, monotone), solve(items, budget, monotone)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    picked = [item.options[j] for item, j in zip(items, found.chosen, strict=True)]
    assert found.nbytes == sum(o.nbytes for o in picked) <= budget
    assert found.damage == pytest.approx(sum(o.damage for o in picked))
    assert found.damage == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert found.gap <= 1e-6
    assert all(picked[m.first].level >= picked[m.then].level for m in monotone)


def test_no_byte_over_a_large_budget() -> None:
    """Sizes as of R1, where a solver's tolerance is many bytes."""
    random = np.random.default_rng(5)
    items = [
        Item(
            str(i),
            tuple(
                Option(q.name, q.row_bytes(7168) * 2048 * 256, float(w * 4**-q.bits), q.bits)
                for q in (QTYPES[t] for t in TYPES)
            ),
        )
        for i, w in enumerate(random.lognormal(0, 2, 60))
    ]
    least = sum(min(o.nbytes for o in item.options) for item in items)
    for budget in (least, least + 1, 2 * least - 1, 3 * least + 17):
        found = solve(items, budget)
        assert found is not None
        assert found.nbytes <= budget
    assert solve(items, least - 1) is None


# ---------------------------------------------------------------- a small model


@pytest.fixture(scope="module")
def model(tiny_v3: Path) -> Catalogue:
    return open_model(str(tiny_v3), Options(pre="deepseek-v3"))


@pytest.fixture(scope="module")
def imatrix(tiny_imatrix: Path) -> Imatrix:
    return open_imatrix(str(tiny_imatrix))


def synthetic(model: Catalogue, imatrix: Imatrix | None, alpha: Mapping[str, float], by: str = "kind") -> Sensitivity:
    """A sensitivity as if it had been measured: errors of 4^-bits, damage α times the error, by role."""
    groups = groups_of(model, by, 2)
    usable, tensors = Usable(imatrix), {t.name: t for t in model.tensors}
    errors = {}
    for g in groups:
        for name in g.tensors:
            named = {usable.type_of(tensors[name], t) for t in TYPES} - {None}
            errors[name] = {t: 4.0 ** -QTYPES[t].bits for t in named if t}
    probes = tuple(Probe(g.name, "Q3_K", 0.01, "t", tuple([alpha.get(g.role, 0.1) * 0.01] * 3)) for g in groups)
    return Sensitivity(
        model.model, model.arch, of_model(model), "" if imatrix is None else file_sha256(imatrix.path)[:16], groups,
        errors, probes, {"t": "made up"}, "", {t.name: t.n_elements for t in model.tensors},
    )  # fmt: skip


def best(model: Catalogue, imatrix: Imatrix | None, target: str, **constraints: object) -> dict[str, str]:
    """Types by tensor of the best recipe, which has been checked to be within the target, and to come back."""
    known = synthetic(model, imatrix, {"attention": 5.0, "embedding": 1.0})
    opts = OptimizeOptions(Constraints(**constraints), gamma=1.0)  # type: ignore[arg-type]
    made = optimize(model, known, parse_target(target), imatrix, None, opts)
    assert made.file_bytes <= made.budget
    plan = make_plan(model, parse(made.text, "best.yaml"), imatrix)
    assert file_bytes(plan, imatrix) == made.file_bytes
    assert {t.tensor.name: t.type for t in plan.tensors} == {t.tensor.name: t.type for t in made.plan.tensors}
    return {t.tensor.name: t.type for t in plan.tensors if t.tensor.quantizable}


def largest(model: Catalogue, imatrix: Imatrix | None) -> int:
    return file_bytes(make_plan(model, load("Q8_0")), imatrix)


def test_the_budget_is_exact(model: Catalogue, imatrix: Imatrix) -> None:
    """With room for one type everywhere and not a byte more that type is found; with a byte less it is not."""
    flat = {t: 1.0 for t in MINIMUM}
    known = synthetic(model, imatrix, {**flat, "routed expert": 1.0})
    constraints = Constraints(types=("Q4_K", "Q8_0"), minimum={})
    whole = file_bytes(make_plan(model, load("Q8_0"), imatrix), imatrix)
    made = optimize(model, known, parse_target(f"{whole}B"), imatrix, None, OptimizeOptions(constraints, gamma=1.0))
    assert made.file_bytes == whole == made.budget
    assert {t.type for t in made.plan.tensors if t.tensor.quantizable} == {"Q8_0"}
    less = optimize(model, known, parse_target(f"{whole - 1}B"), imatrix, None, OptimizeOptions(constraints, gamma=1.0))
    assert less.file_bytes < whole


def test_the_header_of_a_rounded_file_is_in_the_budget(
    model: Catalogue, imatrix: Imatrix, tiny_covariance: Path
) -> None:
    known = synthetic(model, imatrix, {**{t: 1.0 for t in MINIMUM}, "routed expert": 1.0})
    constraints, covariance = Constraints(types=("Q4_K", "Q8_0"), minimum={}), Covariances(tiny_covariance)
    rounding = Rounding("feedback", said_by="a test")
    opts = OptimizeOptions(constraints, gamma=1.0, rounding=rounding, covariance=covariance)
    plan = with_covariance(make_plan(model, load("Q8_0").with_rounding(rounding), imatrix), covariance)
    whole = file_bytes(plan, imatrix)
    assert whole > file_bytes(make_plan(model, load("Q8_0"), imatrix), imatrix)
    made = optimize(model, known, parse_target(f"{whole}B"), imatrix, None, opts)
    assert made.file_bytes == whole == made.budget
    assert {t.type for t in made.plan.tensors if t.tensor.quantizable} == {"Q8_0"}
    assert parse(made.text, "best.yaml").rounding == Rounding("feedback", said_by="best.yaml:9 rounding")
    less = optimize(model, known, parse_target(f"{whole - 1}B"), imatrix, None, opts)
    assert less.file_bytes < whole


POLICY = """
policy: by-type
rules:
  - {role: attention, types: [Q4_K, Q6_K], rounding: feedback+gain}
  - {role: attention, types: [Q5_K, IQ4_XS], rounding: coarse}
  - {match: "blk.*.ffn_{gate,up}_exps.weight", types: [IQ1_S, IQ2_XXS, Q3_K], rounding: feedback}
  - {match: "blk.*.ffn_down_exps.weight", types: [IQ2_XXS, Q2_K, Q8_0], rounding: feedback}
"""


@pytest.mark.parametrize("share", [0.36, 0.43, 0.5])
def test_what_a_policy_writes_depends_on_types_and_is_in_the_budget(
    model: Catalogue, imatrix: Imatrix, tiny_covariance: Path, share: float
) -> None:
    known, target = synthetic(model, imatrix, {"attention": 5.0}), int(share * largest(model, imatrix))
    rounding = Rounding("", "by-type.yaml", text=POLICY, said_by="a test")
    opts = OptimizeOptions(gamma=1.0, rounding=rounding, covariance=Covariances(tiny_covariance))
    made = optimize(model, known, parse_target(f"{target}B"), imatrix, None, opts)
    assert made.file_bytes == file_bytes(made.plan, imatrix) <= target
    assert made.text.splitlines()[8] == 'rounding: {policy: "by-type.yaml"}'


def test_bits_a_weight_are_bits_a_weight(model: Catalogue, imatrix: Imatrix) -> None:
    known = synthetic(model, imatrix, {})
    made = optimize(model, known, parse_target("4.5bpw"), imatrix, None, OptimizeOptions(gamma=1.0))
    assert 4.4 < made.plan.bpw <= 4.5


def test_what_matters_more_gets_more_bits(model: Catalogue, imatrix: Imatrix) -> None:
    types = best(model, imatrix, f"{largest(model, imatrix) * 2 // 3}B")
    attention = min(QTYPES[t].bits for n, t in types.items() if "attn_q_b" in n)
    experts = max(QTYPES[t].bits for n, t in types.items() if "_exps" in n)
    assert attention > experts


def test_gate_and_up_of_a_layer_are_alike_tensor_by_tensor_too(model: Catalogue, imatrix: Imatrix) -> None:
    for per_tensor in (False, True):
        types = best(model, imatrix, f"{largest(model, imatrix) // 2}B", per_tensor=per_tensor)
        pairs = [(n, n.replace("ffn_gate", "ffn_up")) for n in types if "ffn_gate" in n]
        assert len(pairs) == 5
        assert all(types[a] == types[b] for a, b in pairs)


def test_locked_tensors_have_their_types(model: Catalogue, imatrix: Imatrix) -> None:
    locks = (("blk.*.attn_q_b.weight", "Q3_K"), ("output.weight", "q8_0"))
    types = best(model, imatrix, f"{largest(model, imatrix) * 2 // 3}B", locks=locks)
    assert {types[n] for n in types if "attn_q_b" in n} == {"Q3_K"}
    assert types["output.weight"] == "Q8_0"


def test_minimum_types_hold_and_can_be_switched_off(model: Catalogue, imatrix: Imatrix) -> None:
    """A model whose attention does not matter: it is crushed only where that is allowed."""
    known = synthetic(model, imatrix, {"attention": 1e-9, "routed expert": 10.0})
    target = parse_target(f"{largest(model, imatrix) * 2 // 3}B")
    for minimum, bits in ((MINIMUM, QTYPES["IQ3_XXS"].bits), ({}, QTYPES["IQ1_S"].bits)):
        opts = OptimizeOptions(Constraints(minimum=minimum), gamma=1.0)
        made = optimize(model, known, target, imatrix, None, opts)
        found = [t.type for t in made.plan.tensors if "attn_q_b.weight" in t.tensor.name]
        assert {QTYPES[t].bits for t in found} == {bits}


def test_monotone_in_depth(model: Catalogue, imatrix: Imatrix) -> None:
    """Later layers that matter more get more bits, unless earlier ones may not have fewer."""
    known = synthetic(model, imatrix, {})
    probes = [p if "[0-1]" not in p.group else p._replace(by_chunk=(1e-7,) * 3) for p in known.probes]
    known = Sensitivity(**{**{f: getattr(known, f) for f in known.__dataclass_fields__}, "probes": tuple(probes)})
    target = parse_target(f"{largest(model, imatrix) * 2 // 3}B")
    for monotone in (False, True):
        opts = OptimizeOptions(Constraints(monotone=monotone), gamma=1.0)
        made = optimize(model, known, target, imatrix, None, opts)
        first, last = (QTYPES[made.plan[f"blk.{i}.attn_q_b.weight"].type].bits for i in (0, 2))
        assert (first >= last) is monotone


def test_types_of_a_backend(model: Catalogue, imatrix: Imatrix) -> None:
    types = best(model, imatrix, f"{largest(model, imatrix) // 2}B", backend="cpu")
    assert all(t.startswith("Q") or t in ("IQ4_NL", "IQ4_XS") for t in types.values())


def test_without_an_imatrix_no_type_that_needs_it(model: Catalogue) -> None:
    types = best(model, None, f"{largest(model, None) // 2}B", minimum={})
    assert not any(QTYPES[t].needs_imatrix for t in types.values())


def test_rows_that_a_type_does_not_fit_are_priced_as_they_fall_back(model: Catalogue, imatrix: Imatrix) -> None:
    usable = Usable(imatrix)
    tensor = next(t for t in model.tensors if t.n_cols % 256 and t.quantizable)
    assert usable.type_of(tensor, "Q4_K") == "Q5_0"
    assert padded(tensor, "Q5_0") == tensor.n_rows * tensor.n_cols // 32 * 22


def test_the_recipe_is_compact_and_says_why(model: Catalogue, imatrix: Imatrix) -> None:
    known = synthetic(model, imatrix, {"attention": 5.0})
    target = parse_target(f"{largest(model, imatrix) // 2}B")
    made = optimize(model, known, target, imatrix, None, OptimizeOptions(gamma=1.0, name="mine"))
    recipe = parse(made.text, "mine.yaml")
    assert recipe.name == "mine"
    assert recipe.imatrix == "required"
    assert len(recipe.rules) <= len(known.groups)
    assert made.plan.warnings == ()
    for rule in recipe.rules:
        assert rule.why.startswith("predicted ")
        assert " of the damage for " in rule.why
    assert next(r for r in recipe.rules if "token_embd" in r.match).why.count("%") == 2


# ---------------------------------------------------------------- how damages combine


def two_probes(group: str, alpha: float, beta: float) -> tuple[Probe, ...]:
    """KLDs that α·e + β·√e gives."""
    return tuple(
        Probe(group, t, e, "t", (alpha * e + beta * e**0.5,) * 3) for t, e in (("Q3_K", 0.04), ("Q4_K", 0.0025))
    )


def test_smooth_errors_add_up_and_flips_as_their_squares(model: Catalogue, imatrix: Imatrix) -> None:
    known = synthetic(model, imatrix, {})
    probes = tuple(p for i, g in enumerate(known.groups) for p in two_probes(g.name, 1.0 + i, 0.1 * i))
    known = Sensitivity(**{**{f: getattr(known, f) for f in known.__dataclass_fields__}, "probes": probes})
    problem = make_problem(model, known, Usable(imatrix), Constraints())
    types = {t.tensor.name: t.type for t in make_plan(model, load("Q8_0")).tensors}
    errors = [known.error_of(g, types) for g in known.groups]
    smooth = sum((1 + i) * e for i, e in enumerate(errors))
    flips = [0.1 * i * e**0.5 for i, e in enumerate(errors)]
    assert problem.predict(types, 0.5) == pytest.approx(smooth + sum(f * f for f in flips) ** 0.5)
    assert problem.predict(types, 1.0) == pytest.approx(smooth + sum(flips))


def test_two_numbers_of_a_group_are_found_again() -> None:
    for alpha, beta in ((2.0, 0.3), (2.0, 0.0), (0.0, 0.3)):
        known = Sensitivity("m", "a", "", "", (), {}, two_probes("g", alpha, beta))
        a = known.alpha("g")
        assert (a.value, a.beta, a.misfit) == pytest.approx((alpha, beta, 0), abs=1e-9)
        assert known.damage("g", 0.01) == pytest.approx(alpha * 0.01 + beta * 0.1)
    one = Sensitivity("m", "a", "", "", (), {}, two_probes("g", 2.0, 0.3)[:1])
    assert (one.alpha("g").value, one.alpha("g").beta) == pytest.approx((3.5, 0))
    assert np.isnan(one.damage("h", 0.1))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=4),
        min_size=2,
        max_size=4,
    ),
    st.integers(0, 40),
)
def test_the_least_of_a_sum_and_a_root_is_found(table: list[list[tuple[int, int, int]]], budget: int) -> None:
    """A + √F over all choices, by brute force and by corners."""
    sums = {}
    for picked in itertools.product(*(range(len(row)) for row in table)):
        n, a, f = (sum(row[j][k] for row, j in zip(table, picked, strict=True)) for k in range(3))
        if n <= budget:
            sums[picked] = (a, f)

    def at(smooth: float, flips: float) -> Corner | None:
        items = [Item("", tuple(Option("", n, smooth * a + flips * f) for n, a, f in row)) for row in table]
        found = solve(items, budget)
        return None if found is None else Corner(found.chosen, *sums[found.chosen], (smooth, flips), found.gap)

    best = least(at, 0.5, 50)
    assert (best is None) == (not sums)
    if best is not None:
        assert best.corner.value(0.5) == pytest.approx(min(a + f**0.5 for a, f in sums.values()), rel=1e-4, abs=1e-3)


# ---------------------------------------------------------------- targets, parts, baselines


def test_targets() -> None:
    assert parse_target("131GiB").nbytes == 131 * 2**30
    assert parse_target("14517920B").nbytes == 14_517_920
    assert parse_target("140.5 GB").nbytes == 140_500_000_000
    assert parse_target("1.67bpw").bpw == Fraction(167, 100)
    with pytest.raises(RecipeError) as e:
        parse_target("big")
    assert str(e.value) == (
        "--target big: is not a size; give 131GiB, 140GB, 14517920B or bits per weight such as 1.67bpw"
    )
    with pytest.raises(RecipeError, match=r"^--fit 'two': no GPU|^--fit 'two' is not VRAM in GiB"):
        parse_fit("two")


def test_what_fits_on_gpus_is_whole(model: Catalogue, imatrix: Imatrix) -> None:
    """All layers and their cache are within the room; a GPU too small for any choice is said."""
    from quantkit.planning import fit

    known = synthetic(model, imatrix, {})
    whole = largest(model, imatrix)
    cache = sum(fit.cache_bytes(model, 256, "f16"))
    room = parse_fit("1", reserve=2**30 - whole // 2 - cache, context=256)
    made = optimize(model, known, room, imatrix, None, OptimizeOptions(gamma=1.0))
    placed = fit.weigh(model, make_plan(model, parse(made.text, "r"), imatrix), 256, "f16")
    found = fit.whole_layers(placed, [whole // 2 + cache])
    assert found.output
    assert found.n_layers == 3
    assert found.used[0] > 0.9 * (whole // 2 + cache)
    with pytest.raises(UnsupportedError, match="no types that are allowed make Tiny-V3 so small"):
        optimize(model, known, parse_fit("1", reserve=2**30 - 1000, context=256), imatrix, None, OptimizeOptions())


def chunks(n: int) -> Chunks:
    tokens = np.arange(n * 8, dtype=np.int32).reshape(n, 8) % 384
    return Chunks(tokens, tokens, ("text",), 1, n * 8, None, "")


def test_parts_of_a_text_do_not_overlap() -> None:
    whole = chunks(10)
    thirds = [part(whole, k, 3) for k in (1, 2, 3)]
    assert np.concatenate([t.tokens for t in thirds]).tolist() == whole.tokens.tolist()
    some = part(whole, 3, 3, 2)
    assert some.tokens.tolist() == whole.tokens[[6, 8]].tolist()
    assert some.names == ("text (part 3/3)",)
    with pytest.raises(TextError) as e:
        part(chunks(2), 1, 3)
    assert str(e.value) == ("text: 2 chunks of 8 tokens have no part 1 of 3; give a longer text or a smaller --ctx")
    assert parse_part("2/3") == (2, 3)
    with pytest.raises(TextError) as e:
        parse_part("4/3")
    assert str(e.value) == "--part 4/3: is not a part such as 1/3, the first of three"


def test_a_baseline_between_two_is_interpolated_linearly_in_bytes(model: Catalogue) -> None:
    small, large = make_plan(model, load("Q4_0")), make_plan(model, load("Q8_0"))
    between = Baseline("stock", (small, large), (100, 200), 1)
    kld, how = between.at(125, [0.4, 0.2])
    assert kld == pytest.approx(0.35)
    assert how == "between Q4_0 and Q8_0, linear in bytes"
    alone = Baseline("stock", (small,), (101,), 0)
    assert alone.at(100, [0.4]) == (0.4, "Q4_0, +1.00 % bytes")


def test_baselines_of_a_size(model: Catalogue, imatrix: Imatrix) -> None:
    target = file_bytes(make_plan(model, load("UD-IQ1_S"), imatrix), imatrix)
    found = {b.kind: b for b in baselines(model, imatrix, target)}
    assert [p.recipe.name for p in found["UD"].plans] == ["UD-IQ1_S"]
    for kind in ("stock", "uniform"):
        sizes = found[kind].nbytes
        if len(sizes) == 1:
            assert abs(sizes[0] / target - 1) <= 0.005
        else:
            assert sizes[0] < target < sizes[1]
        larger = found[kind].next_larger
        assert larger is not None
        assert sizes[larger] >= 0.995 * target


# ---------------------------------------------------------------- what is refused


def refused(model: Catalogue, imatrix: Imatrix | None, known: Sensitivity, target: str, **constraints: object) -> str:
    opts = OptimizeOptions(Constraints(**constraints))  # type: ignore[arg-type]
    with pytest.raises((SourceError, RecipeError, UnsupportedError)) as e:
        optimize(model, known, parse_target(target), imatrix, None, opts)
    return str(e.value)


def test_what_cannot_be_is_said(model: Catalogue, imatrix: Imatrix) -> None:
    known = synthetic(model, imatrix, {})
    other = Sensitivity(**{**{f: getattr(known, f) for f in known.__dataclass_fields__}, "source": "x"})
    assert refused(model, imatrix, other, "1GB") == (
        "the sensitivity is of another model or other files (Tiny-V3) than Tiny-V3; measure this one with quantkit "
        "sensitivity"
    )
    assert refused(model, None, known, "1GB") == (
        "the sensitivity was measured with an importance matrix; give the same to both commands"
    )
    assert refused(model, imatrix, known, "1000B").startswith(
        "1000B: no types that are allowed make Tiny-V3 so small; the least is "
    )
    assert refused(model, imatrix, known, "1GB", locks=(("blk.*.atn_q_b.weight", "Q4_K"),)) == (
        "--lock blk.*.atn_q_b.weight=Q4_K: 'blk.*.atn_q_b.weight' matches no tensor (did you mean "
        "blk.2.attn_q_b.weight?)"
    )
    assert refused(model, imatrix, known, "1GB", locks=(("output.weight", "IQ2_XXS"),)) == (
        "--lock: 'output.weight' cannot be IQ2_XXS: its rows have 256 values, and there is no importance for it"
    )
    assert refused(model, imatrix, known, "1GB", minimum={"atention": "Q4_K"}) == (
        "--minimum atention=Q4_K: there is no role 'atention' (did you mean attention?)"
    )
    assert refused(model, imatrix, known, "1GB", types=("Q9_K",)) == (
        "--types: unknown type 'Q9_K' (did you mean Q6_K?)"
    )


# ---------------------------------------------------------------- measured


TEXT = " ".join(f"The router of layer {i} and the norms stay as they are, {i * 7} times." for i in range(120))


def test_the_command_end_to_end(quantkit: Run, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """Probe, solve, refine, compare; plan, build and verify take the recipe, at the bytes that were said."""
    text, known, recipe = tmp_path / "text.txt", tmp_path / "s.json", tmp_path / "best.yaml"
    text.write_text(TEXT)
    common = ["--pre", "deepseek-v3", "--imatrix", tiny_imatrix, "--text", text, "-c", "64", "--chunks", "2", "-t", "1"]
    done = quantkit("sensitivity", tiny_v3, *common, "-o", known, "--bands", "1", "--groups", "role", "-q")
    assert done.returncode == 0, done.stderr
    assert "noise floor: " in done.stdout
    target = file_bytes(
        make_plan(
            open_model(str(tiny_v3), Options(pre="deepseek-v3")), load("UD-IQ1_S"), open_imatrix(str(tiny_imatrix))
        ),
        open_imatrix(str(tiny_imatrix)),
    )
    args = ["optimize", tiny_v3, "-s", known, "--target", f"{target}B", *common, "-q", "--refine", "2"]
    done = quantkit(*args, "-o", recipe, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["file_bytes"] <= target
    assert said["recipe"] == recipe.read_text()
    assert [m["what"] for m in said["chosen_from"]] == ["solution", "neighbour", "neighbour"]
    assert said["report"][0]["what"] == "solution"
    assert {v["kind"] for v in said["versus"]} == {"UD", "stock", "uniform"}
    assert all(m["predicted"] > 0 and m["mean_kld"] > 0 for m in said["report"])
    least = min(said["chosen_from"], key=lambda m: m["mean_kld"])
    assert said["file_bytes"] == least["file_bytes"]
    out = tmp_path / "best.gguf"
    of = [tiny_v3, "-r", recipe, "--imatrix", tiny_imatrix, "--pre", "deepseek-v3"]
    planned = json.loads(quantkit("plan", *of, "--json").stdout)
    assert planned["totals"]["file_bytes"] == said["file_bytes"]
    assert quantkit("build", *of, "-o", out, "-q").returncode == 0
    assert out.stat().st_size == said["file_bytes"]
    checked = quantkit(
        "verify", out, "-r", recipe, "-s", tiny_v3, "--imatrix", tiny_imatrix, "--pre", "deepseek-v3", "-q"
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    again = quantkit(*args, "-o", recipe)
    assert again.returncode == 7
    assert again.stderr == f"error: {recipe}: exists; choose another name, or replace it with --force\n"


def test_a_rounded_recipe_end_to_end(
    quantkit: Run, model: Catalogue, imatrix: Imatrix, tiny_v3: Path, tiny_imatrix: Path, tiny_covariance: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Solved, measured and built within the bytes of a file that says nothing of rounding."""
    text, known, recipe = tmp_path / "text.txt", tmp_path / "s.json", tmp_path / "made" / "best.yaml"
    recipe.parent.mkdir()
    text.write_text(TEXT)
    known.write_text(json.dumps(synthetic(model, imatrix, {"attention": 5.0}).to_json()))
    (tmp_path / "policy.yaml").write_text(POLICY)
    target = file_bytes(make_plan(model, load("UD-IQ1_S"), imatrix), imatrix)
    source = [tiny_v3, "--imatrix", tiny_imatrix, "--pre", "deepseek-v3"]
    args = ["optimize", *source, "-s", known, "--target", f"{target}B", "--no-compare", "-q", "-o", recipe]
    measured = ["--text", text, "-c", "64", "--chunks", "1", "--refine", "1", "-t", "1"]
    for how in (["--rounding", "feedback", *measured], ["--rounding-policy", tmp_path / "policy.yaml", "--force"]):
        done = quantkit(*args, *how, "--covariance", tiny_covariance, "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        out = tmp_path / "best.gguf"
        built = quantkit("build", *source, "-r", recipe, "--covariance", tiny_covariance, "-o", out, "-q", "--force")
        assert built.returncode == 0, built.stderr
        assert out.stat().st_size == said["file_bytes"] <= target
    for given_, wrong in (
        (["--rounding", "feedback"],
         "--rounding needs --covariance DIR, since the bytes of the file depend on it; make one with: quantkit imatrix "
         "make MODEL --text F -o imatrix.gguf --covariance DIR"),
        (["--covariance", tiny_covariance],
         "--covariance needs a rounding to use it: give --rounding feedback, or --rounding-policy"),
    ):  # fmt: skip
        done = quantkit(*args, *given_, "--force")
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"Error: {wrong}")


def test_wrong_usage(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    known = tmp_path / "s.json"
    known.write_text("{}")
    done = quantkit("optimize", tiny_v3, "-s", known, "--target", "1GB", "--fit", "24")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "Error: give one of --target and --fit")
    done = quantkit("optimize", tiny_v3, "-s", known, "--target", "1GB", "--pre", "deepseek-v3")
    assert (done.returncode, done.stderr) == (
        4, f"error: {known}: is no sensitivity; make it with quantkit sensitivity\n"
    )  # fmt: skip


def test_a_plan_of_any_recipe_is_predicted(model: Catalogue, imatrix: Imatrix) -> None:
    """Types whose errors were not sampled are sampled then."""
    known = synthetic(model, imatrix, {})
    run = Optimizer(model, known, parse_target("1GB"), imatrix, OptimizeOptions())
    plan = make_plan(model, load("Q4_0"), imatrix)
    assert "Q4_0" not in known.errors["output.weight"]
    assert run.predict(plan, 1.0) > run.predict(make_plan(model, load("Q8_0"), imatrix), 1.0) > 0

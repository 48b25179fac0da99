"""What rounding costs: counts by hand on a tiny model, rates of this machine, and `quantkit plan --estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import factory
import pytest
from conftest import Run
from small_builds import OPTIONS

from quantkit.lab.calibration.inputs import covariance_bytes
from quantkit.lab.rounding_policy.cost import (
    WIDTHS,
    RoundingWork,
    RowRate,
    cost_of,
    measured_factor,
    measured_rows,
    rounding_work,
)
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import parse
from quantkit.rounding.policy import Choice

RECIPE = """\
name: r
arch: [deepseek2]
file_type: Q4_K_M
rounding: feedback
rules:
  - {match: "*ffn_down_exps.weight", type: Q2_K, why: t}
  - {match: "*shexp.weight", type: Q4_K, rounding: ggml, why: t}
  - {match: "*_exps.weight", type: IQ1_S, why: t}
  - {match: "*", type: Q4_K, why: t}
"""


@pytest.fixture(scope="module")
def work(tiny_v3: Path) -> RoundingWork:
    plan = make_plan(open_model(str(tiny_v3), OPTIONS), parse(RECIPE, "r.yaml"), None)
    return rounding_work(plan)


def test_counts_by_hand(work: RoundingWork, tiny_v3: Path) -> None:
    c = factory.TINY_V3
    d, inner, n, layers = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"], 2
    by = {(r.type, r.n_cols): r.n_values for r in work.rows}
    assert by["Q2_K", inner] == layers * n * inner * d
    assert by["IQ1_S", d] == 2 * layers * n * inner * d  # gate and up
    assert set(work.kinds) >= {("Q2_K", "feedback"), ("IQ1_S", "feedback"), ("Q4_K", "feedback")}
    model = open_model(str(tiny_v3), OPTIONS)
    assert work.covariance_bytes == covariance_bytes(model)
    assert 0 < work.layer_bytes < work.covariance_bytes
    assert work.expert_columns == inner
    # the dense layer's gate and up, of the MoE layers' gate and up one for all experts each, and every expert's down
    rounded = sum(r.n_values for r in work.rows)
    assert work.n_values == rounded
    assert sum(work.factors.values()) >= layers * n + 2 * layers + 2
    assert work.factor_operations() == sum(4 * n**3 // 3 * k for n, k in work.factors.items())


def test_cost_is_counts_times_rates(work: RoundingWork) -> None:
    rates = {kind: RowRate(1.0, 10.0, 0.5) for kind in work.kinds}
    cost = cost_of(work, rates, 2.0)
    assert cost.ggml == work.n_values
    assert cost.rows == sum(r.n_values * (10 + 0.5 * r.n_cols) for r in work.rows)
    assert cost.factors == work.factor_operations() / 2
    assert cost.total == cost.rows + cost.factors


def test_more_threads_may_make_more_factors_at_once(work: RoundingWork) -> None:
    assert work.memory(4) > work.memory(1)


@pytest.mark.parametrize(("type_", "rounding"), [("Q4_K", "feedback"), ("Q2_K", "feedback+gain"), ("TQ1_0", "coarse")])
def test_rates_are_of_work_that_was_done(type_: str, rounding: str) -> None:
    """Feedback does all that ggml's rounding does, and more; a wider row costs more a weight."""
    rate = measured_rows(type_, Choice(rounding, ""))
    assert 0 < rate.ggml < rate.at(WIDTHS[0]) < rate.at(WIDTHS[1])
    assert measured_factor() > 1e6


def test_r1_from_its_name(quantkit: Run) -> None:
    args = ("plan", "deepseek-r1", "-r", "UD-IQ1_S", "--rounding", "feedback", "--estimate", "--text-tokens", "1M")
    done = quantkit(*args, "--gpu-tflops", "400", "--disk", "5GB/s", "--json", "-t", "16")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["weights"] == 669_065_609_216
    assert {(r["type"], r["columns"]) for r in said["rows"]} >= {("IQ1_S", 7168), ("IQ1_S", 2048), ("IQ2_XXS", 2048)}
    assert said["factors"]["2048"] >= 58 * 256
    assert said["covariance_bytes"] == 177_077_345_280
    assert said["core_seconds"]["total"] == pytest.approx(
        said["core_seconds"]["rows"] + said["factor_operations"] / said["factor_rate"]
    )
    assert said["gpu_hours"] == pytest.approx(said["pass"]["flop"] / 400e12 / 3600)
    assert said["core_hours"] == pytest.approx(said["core_seconds"]["total"] / 3600)
    assert said["threads"] == 16


def test_in_words(tiny_v3: Path, tmp_path: Path, quantkit: Run) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = quantkit("plan", tiny_v3, "-r", tmp_path / "r.yaml", "--pre", "deepseek-v3", "--estimate", "-t", "1")
    assert done.returncode == 0, done.stderr
    for words in ("core-hours", "memory: ", "disk: ", "IQ1_S feedback", "second moments: 999,936 tokens"):
        assert words in done.stdout
    assert "GPU-hours" not in done.stdout


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--estimate", "--rounding", "ggml"], "--estimate is of a rounding other than ggml's"),
        (["--text-tokens", "1M"], "--text-tokens needs --estimate"),
        (["-t", "2"], "--threads needs --estimate"),
    ],
)
def test_options_that_have_no_use(more: list[str], says: str, quantkit: Run) -> None:
    done = quantkit("plan", "deepseek-r1", "-r", "UD-IQ1_S", *more)
    assert done.returncode == 2
    assert says in done.stderr

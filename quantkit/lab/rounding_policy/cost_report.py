"""What rounding costs, in words and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from ...base.text import table
from ..calibration.estimate import Rates, Times, Work
from ..calibration.estimate_report import bytes_text, duration, flop_text
from .cost import RoundingCost, RoundingWork, RowRate, Rows


class Estimate(NamedTuple):
    """All that an estimate says."""

    work: RoundingWork
    rates: dict[tuple[str, str], RowRate]
    factor_rate: float
    """operations in a second of one thread"""
    cost: RoundingCost
    the_pass: Work
    pass_rates: Rates
    pass_times: Times
    n_threads: int
    gpu: bool
    """the pass's rate was given, for a GPU"""

    @property
    def gpu_hours(self) -> float | None:
        """Of the pass; None where no GPU was told of. Rounding itself is done by the CPU."""
        return self.pass_times.computing / 3600 if self.gpu else None

    @property
    def core_hours(self) -> float:
        """Of rounding, and of the pass where the CPU computes it."""
        own = 0.0 if self.gpu else self.pass_times.computing * self.n_threads / 3600
        return self.cost.total / 3600 + own


def cost_json(found: Estimate) -> dict[str, Any]:
    """Counts, rates and hours."""
    work = found.work
    return {
        "quantkit_rounding_estimate": 1,
        "model": found.the_pass.model,
        "rows": [_row_json(r, found.rates[r.type, r.choice.rounding]) for r in work.rows],
        "weights": work.n_values,
        "factors": {str(n): count for n, count in sorted(work.factors.items())},
        "factor_operations": work.factor_operations(),
        "factor_rate": found.factor_rate,
        "core_seconds": {**asdict(found.cost), "total": found.cost.total},
        "core_hours": found.core_hours,
        "gpu_hours": found.gpu_hours,
        "threads": found.n_threads,
        "memory": work.memory(found.n_threads),
        "covariance_bytes": work.covariance_bytes,
        "layer_bytes": work.layer_bytes,
        "pass": {
            **asdict(found.the_pass),
            "flop": found.the_pass.flop,
            "rates": asdict(found.pass_rates),
            "seconds": {**asdict(found.pass_times), "total": found.pass_times.total},
            "moments_memory": work.full_bytes,
        },
    }


def _row_json(row: Rows, rate: RowRate) -> dict[str, Any]:
    return {
        "type": row.type, "rounding": row.choice.rounding, "columns": row.n_cols, "weights": row.n_values,
        "nanoseconds_a_weight": 1e9 * rate.at(row.n_cols), "ggml_nanoseconds_a_weight": 1e9 * rate.ggml,
    }  # fmt: skip


def cost_text(found: Estimate) -> str:
    """For people."""
    work, cost, rates, the_pass = found.work, found.cost, found.rates, found.the_pass
    rows = [
        [
            f"{r.type} {r.choice.rounding}", f"{r.n_cols:,}", _giga(r.n_values),
            f"{1e9 * rates[r.type, r.choice.rounding].ggml:.1f}",
            f"{1e9 * rates[r.type, r.choice.rounding].at(r.n_cols):,.0f}",
            _hours(r.n_values * rates[r.type, r.choice.rounding].at(r.n_cols)),
        ]
        for r in sorted(work.rows, key=lambda r: -r.n_values)
    ]  # fmt: skip
    lines = [
        f"{the_pass.model}: {_giga(work.n_values)} weights rounded otherwise than by ggml",
        "",
        table(rows, ["rows", "columns", "weights", "ggml ns", "ns a weight", "core-hours"], range(1, 6)),
        "",
    ]
    n_factors = sum(work.factors.values())
    lines += [
        f"rows: {_hours(cost.rows)} core-hours ({_hours(cost.ggml)} where ggml's bytes are wanted)",
        f"factors: {n_factors:,} of {min(work.factors):,} to {max(work.factors):,} columns, "
        f"{flop_text(work.factor_operations())} at {flop_text(found.factor_rate)}/s a thread: {_hours(cost.factors)} "
        "core-hours",
    ]
    computed = duration(found.pass_times.computing)
    by = "a GPU of the rate given" if found.gpu else f"{found.n_threads} threads here"
    lines.append(
        f"second moments: {the_pass.n_tokens:,} tokens, {flop_text(the_pass.flop)}, {computed} on {by} at "
        f"{flop_text(found.pass_rates.flop)}/s; reading {bytes_text(the_pass.bytes_read)}: "
        f"{duration(found.pass_times.reading)}"
    )
    if work.expert_columns and the_pass.n_experts:
        each = the_pass.n_tokens * the_pass.n_used * the_pass.n_moe_layers / the_pass.n_experts
        few = ": fewer, so most experts' ffn_down stay ggml's" if each < work.expert_columns else ""
        lines.append(f"tokens a routed expert sees: {each:,.0f}; its ffn_down has {work.expert_columns:,} columns{few}")
    gpu = "" if found.gpu_hours is None else f", {found.gpu_hours:.2g} GPU-hours"
    wall = cost.total / found.n_threads + found.pass_times.total
    lines += [
        f"together {found.core_hours:,.1f} core-hours{gpu}; {duration(wall)} here, with {found.n_threads} "
        f"thread{'s' * (found.n_threads != 1)}",
        f"memory: {bytes_text(work.memory(found.n_threads))} to round; {bytes_text(work.full_bytes)} of second "
        f"moments, {bytes_text(the_pass.largest)} of weights and {bytes_text(the_pass.hidden_bytes)} of hidden states "
        "(files where --memory is less) to compute them",
        f"disk: {bytes_text(work.covariance_bytes)} of covariance (imatrix make --covariance), or "
        f"{bytes_text(work.layer_bytes)} for one layer at a time (build --text), and "
        f"{bytes_text(the_pass.hidden_bytes)} for what the pass keeps",
    ]
    return "\n".join(lines)


def _giga(n: int) -> str:
    return f"{n / 1e9:.1f} G" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f}" if seconds >= 36 else f"{seconds / 3600:.2g}"

"""Studies as tables: plans and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...base.text import in_unit, table, unit_of
from ..evaluation.scores import interval_text
from .findings import comparable, effects, front
from .results import Result
from .study import Study, Variant


def plan_text(study: Study, every: Sequence[Variant], n_passes: int) -> str:
    """The variants with their exact sizes. `n_passes` is 0 if files are measured."""
    rows: list[list[str]] = []
    unit = unit_of(max((v.file_bytes for v in every if v.plan is not None), default=0))
    for v in every:
        if v.plan is None:
            rows.append([v.name, "", "", "", v.trouble.split("\n")[0]])
        else:
            rows.append([v.name, f"{v.file_bytes:,}", in_unit(v.file_bytes, unit), f"{v.plan.bpw:.3f}", ""])
    able = sum(v.plan is not None for v in every)
    head = f"{study.name}: {able:,} variants of {study.given.base}, {study.given.design}; " + (
        f"{n_passes:,} pass{'es' * (n_passes != 1)} over the text" if n_passes else "measured by llama-perplexity"
    )
    return f"{head}\n\n" + table(rows, ["variant", "bytes", unit, "BPW", ""], (1, 2, 3))


def plan_json(study: Study, every: Sequence[Variant], n_passes: int) -> dict[str, Any]:
    """The same as `plan_text`, as plain data."""
    made = [
        {
            "variant": v.name, "levels": dict(v.levels), "file_bytes": v.file_bytes if v.plan is not None else None,
            "bpw": None if v.plan is None else v.plan.bpw, "trouble": v.trouble or None,
        }
        for v in every
    ]  # fmt: skip
    return {"quantkit_ablate_plan": 1, "study": study.name, "n_passes": n_passes, "variants": made}


def show_text(found: Sequence[Result]) -> str:
    """The results in a file, grouped by what can be compared."""
    parts = [f"{of.about}\n\n{results_text(of.results)}" for of in comparable(found)]
    return "\n\n\n".join(parts) or "no results"


def show_json(found: Sequence[Result]) -> dict[str, Any]:
    """The same as `show_text`, as plain data."""
    out: dict[str, Any] = {"quantkit_ablate": 1, "results": [], "effects": [], "front": []}
    for of in comparable(found):
        about = {
            "study": of.study,
            "model": of.model,
            "texts": list(of.texts),
            "n_chunks": of.n_chunks,
            "engine": of.engine,
        }
        out["results"] += [
            {
                "study": r.study, "variant": r.variant, "levels": dict(r.levels), "trouble": r.trouble or None,
                "scores": None if r.scores is None else asdict(r.scores), "provenance": dict(r.provenance),
            }
            for r in of.results
        ]  # fmt: skip
        out["effects"] += [{**about, **e.to_json()} for e in effects(of.results)]
        out["front"] += [{**about, **p._asdict()} for p in front(of.results)]
    return out


def results_text(found: Sequence[Result]) -> str:
    """The figures of variants measured on one text, the effects of levels, and the front of size against damage."""
    failed: list[str] = []
    on_front = {p.name for p in front(found)}
    rows: list[list[str]] = []
    for r in sorted(found, key=lambda r: r.scores.file_bytes if r.scores else 0):
        s = r.scores
        if s is None:
            failed.append(f"failed: {r.variant}: {r.trouble.splitlines()[0]}")
            continue
        rows.append(
            [
                r.variant, f"{s.file_bytes:,}", f"{s.bpw:.3f}", f"{s.ppl_ratio:.4f}", f"{s.mean_kld:.5f}",
                f"{s.mean_kld_se:.5f}", f"{s.kld_99:.4f}", f"{100 * s.same_top:.2f} %",
                "*" if r.variant in on_front else "",
            ]
        )  # fmt: skip
    head = ["variant", "bytes", "BPW", "PPL ratio", "mean KLD", "±", "99 %", "same top", "front"]
    text = table(rows, head, range(1, 8)) if rows else "no variant has a result"
    if failed:
        text += "\n\n" + "\n".join(failed)
    of_levels = effects(found)
    if of_levels:
        more = [
            [e.axis, e.level, f"{e.difference:+.5f}", interval_text(e.low, e.high), f"{e.bytes_difference:+,}"]
            for e in of_levels
        ]
        text += "\n\nWhat each level changes, all else alike:\n\n"
        text += table(more, ["axis", "level", "mean KLD", "95 % interval", "bytes"], (2, 4))
    return text

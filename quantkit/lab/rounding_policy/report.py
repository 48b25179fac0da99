"""What was tuned for people, and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...base.text import table
from ...rounding.policy import GGML
from ..evaluation.scores import finite
from .policy_text import ratio_text
from .tuning import Ratio, Tuned


def tuned_text(made: Tuned) -> str:
    """A table of groups and methods, and one of whole files."""
    lines = [
        f"{made.model}: {len(made.probed):,} groups, second moments of {made.n_tokens:,} tokens; mean KLD of each "
        "group alone, all else as it is; [95 % interval over chunks]",
        *(f"text to {what}: {about}" for what, about in made.texts.items()),
        "",
    ]
    rows = []
    for p in made.probed:
        for method in p.group.methods:
            beside = "" if method == GGML else ratio_text(p.ratio(method))
            first = [p.group.kind, p.group.type, f"{len(p.group.tensors)}"] if method == GGML else ["", "", ""]
            rows.append([*first, method, f"{p.kld(method):.5f}", beside, "chosen" if method == p.chosen else ""])
    lines.append(table(rows, ["tensors", "type", "n", "rounding", "mean KLD", "x ggml's", ""], (2, 4)))
    if made.whole:
        rows = []
        for w in made.whole:
            s = w.scored
            rows.append(
                [
                    w.recipe, w.how, w.text, f"{s.file_bytes:,}", f"{s.mean_kld:.5f} ± {s.mean_kld_se:.5f}",
                    "" if w.how == "ggml" else ratio_text(w.ratio), f"{100 * s.same_top:.2f} %",
                ]
            )  # fmt: skip
        head = ["recipe", "rounding", "text to", "bytes", "mean KLD", "x ggml's", "same top"]
        lines += ["", "Whole files:", "", table(rows, head, (3,))]
    return "\n".join(lines)


def tuned_json(made: Tuned, policy: str) -> dict[str, Any]:
    """Plain values."""
    return {
        "quantkit_rounding": 1,
        "model": made.model,
        "arch": made.arch,
        "covariance": made.covariance,
        "calibration_tokens": made.n_tokens,
        "texts": dict(made.texts),
        "policy": policy,
        "groups": [
            {
                "kind": p.group.kind,
                "type": p.group.type,
                "match": p.group.match,
                "tensors": list(p.group.tensors),
                "chosen": p.chosen,
                "methods": {
                    m: {"mean_kld": p.kld(m), "by_chunk": p.by_chunk[m].tolist(), "ratio": _ratio(p.ratio(m))}
                    for m in p.group.methods
                },
            }
            for p in made.probed
        ],
        "whole": [
            {"recipe": w.recipe, "rounding": w.how, "text": w.text, **asdict(w.scored), "ratio": _ratio(w.ratio)}
            for w in made.whole
        ],
    }


def _ratio(ratio: Ratio) -> dict[str, float | None]:
    return {"value": ratio.value, "low": finite(ratio.low), "high": finite(ratio.high)}

"""An optimized recipe as readable text, and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .optimized import Measured, Optimized


def optimized_text(made: Optimized) -> str:
    """Size, prediction, measurements and comparison, in Markdown."""
    lines = [
        f"{made.plan.recipe.name}: {made.file_bytes:,} bytes of {made.budget:,}, {made.plan.bpw:.4f} bits a weight; "
        f"no choice of types is predicted to be better by more than {100 * made.gap:.2g} %",
        f"predicted mean KLD {made.predicted:.4f}, exponent {made.gamma:.2f}",
    ]
    lines += [f"note: {note}" for note in made.notes]
    if made.fit:
        lines += ["", "The exponent was fitted on solutions for other sizes:", "", *_rows(made.fit)]
    if made.chosen_from:
        lines += ["", "Chosen from, on the text to choose on:", "", *_rows(made.chosen_from)]
    if made.report:
        lines += ["", "On the text to report:", "", *_rows(made.report)]
    for v in made.versus:
        lines.append("")
        better = "better than" if v.ratio < 1 else "worse than"
        if v.pair is not None and v.pair.low <= 0 <= v.pair.high:
            better = "not to be told from"
        lines.append(f"{v.kind} ({v.how}): KLD {v.kld:.4f}; the recipe has {v.ratio:.2f} x that: {better} it")
        if v.larger is not None and v.pair is None:
            name, nbytes, kld = v.larger
            lines.append(f"the next larger one, {name} with {nbytes:,} bytes: KLD {kld:.4f}")
    return "\n".join(lines)


def _rows(every: tuple[Measured, ...]) -> list[str]:
    out = [
        "| what | name | bytes | bpw | mean KLD | 99 % | same top | predicted | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in every:
        s = m.scored
        out.append(
            f"| {m.what} | {s.name} | {s.file_bytes:,} | {s.bpw:.3f} | {s.mean_kld:.4f} ± {s.mean_kld_se:.4f} | "
            f"{s.kld_99:.2f} | {100 * s.same_top:.1f} % | {m.predicted:.4f} | {100 * m.off:+.0f} % |"
        )
    return out


def optimized_json(made: Optimized) -> dict[str, Any]:
    """Plain values."""

    def of(every: tuple[Measured, ...]) -> list[dict[str, Any]]:
        return [{"what": m.what, **asdict(m.scored), "predicted": m.predicted, "off": m.off} for m in every]

    return {
        "quantkit_optimize": 1,
        "recipe": made.text,
        "file_bytes": made.file_bytes,
        "budget": made.budget,
        "bpw": made.plan.bpw,
        "gap": made.gap,
        "exponent": made.gamma,
        "predicted": made.predicted,
        "fit": of(made.fit),
        "chosen_from": of(made.chosen_from),
        "report": of(made.report),
        "versus": [asdict(v) for v in made.versus],
        "notes": list(made.notes),
    }

"""What was tuned as a policy's file."""

from __future__ import annotations

from ...base.version import __version__
from ...rounding.policy import GGML, parse
from .tuning import TUNED, Probed, Ratio, Tuned


def policy_text(made: Tuned, name: str, date: str) -> str:
    """A policy in YAML, of which every rule says what was measured. `date` is the day, 2026-11-28."""
    lines = [
        "# Made by quantkit rounding tune: of each kind of tensors and type the simplest rounding that no other is",
        "# measurably better than. KLD is of a model of which only these tensors are quantized.",
        f"policy: {_quoted(name)}",
        f"title: {_quoted(f'{made.model}, by KLD on a text that nothing was calibrated on')}",
        f"damp: {made.options.damp:g}",
        f"search: {'true' if made.options.search else 'false'}",
        "measured:",
        f"  date: {_quoted(date)}",
        f"  model: {_quoted(made.model)}",
        f"  quantkit: {_quoted(__version__)}",
        f"  calibration: {_quoted(f'{made.n_tokens:,} tokens')}",
    ]
    lines += [f"  {what}: {_quoted(about)}" for what, about in made.texts.items()]
    whole = [w for w in made.whole if w.how == TUNED and w.text == list(made.texts)[-1]]
    lines += [
        f"  {_quoted(w.recipe)}: {_quoted(f'mean KLD {w.scored.mean_kld:.5f}, {ratio_text(w.ratio)} of stock')}"
        for w in whole
    ]
    lines.append("rules:")
    for p in made.probed:
        lines += _rule(p)
    text = "\n".join(lines) + "\n"
    parse(text, f"{name}.yaml")  # it is what `quantkit build` will read
    return text


def _rule(p: Probed) -> list[str]:
    lines = [
        f"  - match: {_quoted(p.group.match)}",
        f"    types: [{p.group.type}]",
        f"    rounding: {p.chosen}",
        f"    why: {_quoted(_why(p))}",
        "    figures:",
    ]
    for method in p.group.methods:
        beside = "" if method == GGML else f", {ratio_text(p.ratio(method))} of ggml's"
        lines.append(f"      {_quoted(method)}: {_quoted(f'KLD {p.kld(method):.5f}{beside}')}")
    return lines


def _why(p: Probed) -> str:
    if p.chosen == GGML:
        return "no other is measurably better"
    return f"KLD x {ratio_text(p.ratio(p.chosen))} of ggml's"


def ratio_text(ratio: Ratio) -> str:
    """0.81 [0.79, 0.84]"""
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'

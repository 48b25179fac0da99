"""An evaluation as tables: Markdown for people, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict

from ...base.text import in_unit, unit_of
from .scores import Evaluation, Scored, interval_text


def markdown(found: Evaluation) -> str:
    """Tables of candidates and of pairs, headed by the reference and the texts."""
    lines = [
        f"Reference {found.reference}: PPL {found.reference_ppl:.4f}; {found.n_tokens:,} tokens scored, "
        f"{found.n_chunks:,} chunk{'s' * (found.n_chunks != 1)} of {found.n_ctx:,}, of {', '.join(found.texts)}; "
        f"engine {found.engine}",
    ]
    if found.noise_kld is not None:
        lines.append(f"Noise floor: the reference against itself has a mean KLD of {found.noise_kld:.6f}")
    with_agreement = any(c.agree_32 is not None for c in found.candidates)
    unit = unit_of(max((c.file_bytes for c in found.candidates), default=0))
    head = [
        "candidate", "bytes", unit, "BPW", "PPL", "PPL ratio", "mean KLD", "median", "90 %", "95 %", "99 %", "99.9 %",
        "max", "RMS Δp", "same top",
    ]  # fmt: skip
    rows = [_row(c, unit) for c in found.candidates]
    if with_agreement:
        head += ["alike for 32", "first difference"]
        for row, c in zip(rows, found.candidates, strict=True):
            row += [_percent(c.agree_32), "" if c.first_difference_32 is None else f"{c.first_difference_32:.1f}"]
    if any(c.tool_mean_kld is not None for c in found.candidates):
        head += ["mean KLD, the tool's", "PPL, the tool's"]
        for row, c in zip(rows, found.candidates, strict=True):
            row += ["" if v is None else f"{v:.6f}" for v in (c.tool_mean_kld, c.tool_ppl)]
        lines.append(
            "The tool's: as llama-perplexity --kl-divergence prints it, with the candidate's logits in full; the "
            "others are of its files, whose codes of 16 bits are rounded by up to 0.000123 and end 16 below the "
            "largest logit"
        )
    lines += ["", *_table(head, rows)]
    if found.pairs:
        lines += ["", "Differences of mean KLD, 95 % interval over chunks:", ""]
        lines += _table(
            ["a", "b", "b - a", "interval", "bytes b / a", ""],
            [
                [p.a, p.b, f"{p.difference:+.5f}", interval_text(p.low, p.high), f"{p.bytes_ratio:.4f}", p.verdict]
                for p in found.pairs
            ],
        )
    return "\n".join(lines)


def _row(c: Scored, unit: str) -> list[str]:
    return [
        c.name, f"{c.file_bytes:,}", in_unit(c.file_bytes, unit), f"{c.bpw:.3f}", f"{c.ppl:.4f} ± {c.ppl_se:.4f}",
        f"{c.ppl_ratio:.4f}", f"{c.mean_kld:.5f} ± {c.mean_kld_se:.5f}",
        *(f"{v:.5f}" for v in (c.median_kld, c.kld_90, c.kld_95, c.kld_99, c.kld_999, c.kld_max)),
        _percent(c.rms_dp), f"{_percent(c.same_top)} ± {100 * c.same_top_se:.2f}",
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up as plain text."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in cells]
    return [f"| {' | '.join(line)} |" for line in (lines[0], ["-" * w for w in widths], *lines[1:])]


def csv_text(found: Evaluation) -> str:
    """One line per candidate, with all figures in full precision."""
    out = io.StringIO()
    fields = list(Scored.__dataclass_fields__)
    writer = csv.DictWriter(out, fields)
    writer.writeheader()
    writer.writerows(asdict(c) for c in found.candidates)
    return out.getvalue()

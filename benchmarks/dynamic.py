"""Dynamic recipes beside naive ones (all layers alike) and llama.cpp's mixtures of the same bytes, on small models.

    python benchmarks/dynamic.py JUDGE TINY --chunks 32

Each is a folder with a checkpoint in fp8/, imatrix/imatrix.gguf and a text in text/ (seen.txt, else valid.txt).
Figures are of chunks of 256 tokens, evenly spread over the last third of the text, on which nothing was chosen. Where
nothing has the dynamic recipe's bytes within 0.5 %, the ones below and above are measured, and KLD is interpolated
linearly in bytes, chunk by chunk; intervals are of a paired bootstrap over chunks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import quantkit as qk
from quantkit import text
from quantkit.base.text import markdown_table
from quantkit.forward.model import Model
from quantkit.forward.stream import Options
from quantkit.lab.allocation.baselines import Baseline, baselines, file_bytes
from quantkit.lab.evaluation.evaluate import of_plan, score_tokens
from quantkit.lab.evaluation.parts import part
from quantkit.lab.evaluation.scores import F64, Scored, interval, score
from quantkit.planning.plan import Plan

CTX = 256
DYNAMIC = ("UD-IQ1_S", "UD-IQ1_M", "UD-IQ2_XXS", "UD-Q2_K_XL")
NAIVE = ("NAIVE-IQ1_S", "NAIVE-IQ1_M", "NAIVE-IQ2_XXS")
KINDS = {"uniform": "naive", "stock": "stock"}


def types_of(plan: Plan) -> tuple[str, ...]:
    return tuple(t.type for t in plan.tensors)


class Bench:
    """A model's plans, each measured once, all in one pass."""

    def __init__(self, folder: Path, n_chunks: int) -> None:
        catalogue = qk.open_model(folder / "fp8", pre="deepseek-v3")
        imatrix = qk.open_imatrix(folder / "imatrix" / "imatrix.gguf")
        words = next(p for n in ("seen.txt", "valid.txt") if (p := folder / "text" / n).exists())
        self.chunks = part(text.chunks(catalogue, [words], CTX), 3, 3, n_chunks)
        self.imatrix = imatrix
        self.dynamic = [qk.plan(catalogue, name, imatrix) for name in DYNAMIC]
        self.others: list[list[Baseline]] = [
            [b for b in baselines(catalogue, imatrix, file_bytes(d, imatrix)) if b.kind in KINDS] for d in self.dynamic
        ]
        naive = [qk.plan(catalogue, name, imatrix) for name in NAIVE]
        every = [*self.dynamic, *naive, *(p for of in self.others for b in of for p in b.plans)]
        plans = {types_of(p): p for p in reversed(every)}
        self.naive = naive
        reference = Model(catalogue)
        candidates = [of_plan(reference, p, p.recipe.name) for p in plans.values()]
        tokens = score_tokens(
            reference, [c.model for c in candidates], self.chunks, Options(n_threads=1), lambda what, n, of: None
        )
        self.reference_nll = tokens[0].nll
        self.found: dict[tuple[str, ...], tuple[Scored, F64]] = {}
        for key, c, t in zip(plans, candidates, tokens[1:], strict=True):
            self.found[key] = score(c.name, (file_bytes(plans[key], imatrix), c.bpw), t, tokens[0].nll), t.kld.mean(-1)

    def of(self, plan: Plan) -> tuple[Scored, F64]:
        return self.found[types_of(plan)]

    def row(self, what: str, plan: Plan, against: F64 | None = None) -> list[str]:
        s, by_chunk = self.of(plan)
        return [
            what, plan.recipe.name, f"{s.file_bytes:,}", f"{s.bpw:.3f}", f"{s.mean_kld:.4f} ± {s.mean_kld_se:.4f}",
            f"{s.kld_99:.3f}", f"{s.ppl_ratio:.4f}", f"{100 * s.same_top:.1f} %",
            *(("", "", "") if against is None else beside(against, by_chunk)),
        ]  # fmt: skip

    def rows(self) -> list[list[str]]:
        out = []
        for plan, others in zip(self.dynamic, self.others, strict=True):
            mine, by_chunk = self.of(plan)
            out.append(self.row("dynamic", plan))
            for b in others:
                klds = [self.of(p)[1] for p in b.plans]
                if len(klds) == 1:
                    out.append(self.row(f"{KINDS[b.kind]}, same bytes", b.plans[0], by_chunk))
                    continue
                low, high = b.nbytes
                share = (mine.file_bytes - low) / (high - low)
                at = klds[0] + share * (klds[1] - klds[0])
                between = f"between {b.plans[0].recipe.name} ({low:,}) and {b.plans[1].recipe.name} ({high:,})"
                out.append(
                    [
                        f"{KINDS[b.kind]}, same bytes", between, f"{mine.file_bytes:,}", "", f"{at.mean():.4f}", "", "",
                        "", *beside(by_chunk, at),
                    ]
                )  # fmt: skip
                if b.kind == "stock" and b.next_larger is not None:
                    out.append(self.row("stock, next larger", b.plans[b.next_larger], by_chunk))
        return [*out, *(self.row("naive, as published", p) for p in self.naive)]


def beside(mine: F64, other: F64) -> tuple[str, str, str]:
    """How many times the KLD it has, the difference with its interval, and what that says."""
    low, high = interval(other - mine)
    verdict = "dynamic is better" if low > 0 else "dynamic is worse" if high < 0 else "cannot tell"
    return (
        f"{other.mean() / mine.mean():.2f}", f"{(other - mine).mean():+.4f} [{low:+.4f}, {high:+.4f}]", verdict,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--chunks", type=int, default=32)
    given = parser.parse_args(arguments)
    head = ["", "recipe", "bytes", "BPW", "mean KLD", "99 %", "PPL ratio", "same top", "×", "less dynamic's", ""]
    for folder in given.models:
        bench = Bench(folder, given.chunks)
        n = bench.chunks.n_chunks
        print(
            f"\n## {folder.name}: {n} chunks of {CTX} tokens, {n * (CTX // 2 - 1):,} scored, {bench.chunks.names[0]}\n"
        )
        print(markdown_table(bench.rows(), head, (2, 3, 4, 5, 6, 7, 8)), flush=True)


if __name__ == "__main__":
    main()

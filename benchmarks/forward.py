"""The pass against llama-perplexity on the same file and text: KL divergence, perplexities, processor time.

    python benchmarks/forward.py MODEL.gguf TEXT [--ctx 256] [--chunks 8] [--rounds 2] [--dtype f32]

Runs both in turn (A B A B), each on one thread, and takes the median of the processor seconds, loading included. Then
the same model is written with its weights as F32, and run by llama-perplexity with keys and values in F32, too: what is
left of the difference is not llama.cpp's rounding of activations. Asserts what quantkit claims: for a file of BF16 a
mean KLD of at most 1e-4 and 99.5 % same top tokens; for any file at most 1e-4 when nothing is rounded.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import small_builds
from passing import EXACT, Agreement, Saved, logits_of, perplexity

from quantkit.forward.model import Model
from quantkit.forward.stream import Options
from quantkit.llama_cpp import toolchain
from quantkit.model.families.options import Options as ModelOptions
from quantkit.model.open import open_model
from quantkit.text import chunks

MOST_KLD, LEAST_TOP = 1e-4, 0.995
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What it gives, processor seconds of this process and its children, and seconds."""

    def used() -> float:
        each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in each)

    before, start = used(), time.monotonic()
    made = work()
    return made, used() - before, time.monotonic() - start


def line(name: str, found: Agreement) -> None:
    print(
        f"{name:36}  mean KLD {found.kld:.2e}  same top {100 * found.same_top:.2f} %  "
        f"PPL {found.ppl:.4f}, llama.cpp {found.ppl_theirs:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    tool = toolchain.find("llama-perplexity")
    more = ("--chunks", str(args.chunks))
    catalogue = open_model(str(args.model))
    cut = chunks(catalogue, [args.text], args.ctx, args.chunks)
    with tempfile.TemporaryDirectory(prefix="quantkit-forward-") as name:
        folder = Path(name)

        def theirs() -> Saved:
            return perplexity(tool, args.model, args.text, folder / "logits", args.ctx, *more)

        def ours() -> torch.Tensor:
            options = Options(n_threads=1, dtype=args.dtype)
            return logits_of(Model(open_model(str(args.model))), cut.tokens, options, args.ctx // 2)

        seconds: dict[str, list[float]] = {"quantkit": [], "llama.cpp": []}
        for _ in range(args.rounds):
            logits, used, _ = timed(ours)
            seconds["quantkit"].append(used)
            saved, used, _ = timed(theirs)
            seconds["llama.cpp"].append(used)
        assert (saved.tokens == cut.text_tokens).all(), "the tokens are not llama.cpp's"
        types = sorted({t.source_type for t in catalogue.tensors if t.quantizable})
        print(f"{args.model.name}: {', '.join(types)}; {cut.tokens.size:,} tokens, {args.ctx} a chunk; {args.dtype}")
        as_it_is = saved.compared(logits)
        line("as llama-perplexity runs it", as_it_is)
        plan = small_builds.plan_of(args.model, small_builds.uniform("F32", "F32"), None, ModelOptions())
        plain = small_builds.build(plan, folder / "f32.gguf", allow_requantize=True, n_threads=1)
        exact = perplexity(tool, plain, args.text, folder / "exact", args.ctx, *more, *EXACT).compared(logits)
        line("weights, keys and values as F32", exact)
        ours_s, theirs_s = (statistics.median(s) for s in seconds.values())
        print(
            f"processor seconds, median of {args.rounds}: quantkit {ours_s:.1f}, llama.cpp {theirs_s:.1f}, ratio "
            f"{ours_s / theirs_s:.2f}"
        )
        if args.dtype == "f32":
            assert abs(exact.kld) <= MOST_KLD
            if set(types) <= {"BF16", "F16", "F32"}:
                assert as_it_is.kld <= MOST_KLD
                assert as_it_is.same_top >= LEAST_TOP


if __name__ == "__main__":
    main()

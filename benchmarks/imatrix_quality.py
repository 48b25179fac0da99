"""Is a file built with quantkit's importance matrix as good as one built with llama-imatrix's?

    python benchmarks/imatrix_quality.py MODEL theirs.gguf CALIBRATION TEXT... [--recipe UD-IQ1_S] [--ctx 256] \
        [--chunks 60]

Makes the importance matrix of the calibration text that llama-imatrix made `theirs.gguf` of, builds a GGUF with each,
and measures both with llama-perplexity, one thread, against the BF16 file: mean KL divergence with its standard error,
and the difference of the two with the standard error of the differences of chunks. Fails where a difference is beyond
three of its standard errors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from imatrix_policies import apart, difference, measure, perplexity

import quantkit as qk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--recipe", default="UD-IQ1_S")
    parser.add_argument("--pre")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=0, help="of each text; 0: all")
    parser.add_argument("--threads", type=int, default=1, help="of the builds and the importance matrix")
    args = parser.parse_args()
    model = qk.open_model(args.model, pre=args.pre)
    far = []
    with tempfile.TemporaryDirectory(prefix="quantkit-quality-") as name:
        folder = Path(name)
        ours, reference = folder / "ours.gguf", folder / "bf16.gguf"
        options = qk.imatrix.ImatrixOptions(threads=args.threads)
        made = qk.imatrix.make(model, [args.calibration], ours, args.ctx, options=options)
        print(f"{args.calibration.name}: {made.n_chunks} chunks of {args.ctx} tokens", flush=True)
        qk.build(qk.plan(model, "BF16"), reference, threads=args.threads)
        for number, matrix in enumerate((args.theirs, ours)):
            plan = qk.plan(model, args.recipe, matrix)
            qk.build(plan, folder / f"{number}.gguf", threads=args.threads)
        print(f"| text | {args.recipe}, llama-imatrix's | {args.recipe}, quantkit's | difference |")
        print("|---|---|---|---|", flush=True)
        for text in args.texts:
            base = folder / "base.kld"
            perplexity(reference, text, base, args, compare=False)
            theirs_kld, ours_kld = (measure(folder / f"{i}.gguf", text, base, args) for i in range(2))
            cells = " | ".join(f"{k.mean:.4f} ± {k.error:.4f}" for k in (theirs_kld, ours_kld))
            print(f"| {text.name} | {cells} | {difference(ours_kld, theirs_kld)} |", flush=True)
            by, error = apart(ours_kld, theirs_kld)
            far += [text.name] if abs(by) > 3 * error else []
    if far:
        raise SystemExit(f"NOT within noise: {', '.join(far)}")


if __name__ == "__main__":
    main()

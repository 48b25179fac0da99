"""Second moments of a quantized prefix beside those of the reference's: does rounding gain by it?

    python benchmarks/rounding_sequential.py judge/fp8 --pre deepseek-v3 -c 256 --imatrix imatrix.gguf \
        --text calib.txt --report seen.txt --report valid.txt --recipes UD-IQ1_S UD-Q2_K_XL

`feedback` rounds every layer under H of the inputs that it has in the reference; `sequential` under H of those that it
has once all layers before it (and token_embd) are rounded, so that a layer may make good what the ones before it did.
Within a layer the inputs are those of its own unrounded matrices. The same text, tokens, damping and search for both.
Printed: KLD of both against the reference's own weights, over stock's, and the ratio of the two, with 95 % intervals by
paired bootstrap over chunks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rounding import planned, ratio

import quantkit as qk
from quantkit import text
from quantkit.base.text import markdown_head, markdown_row
from quantkit.forward.model import Model
from quantkit.forward.stream import Options, Pass
from quantkit.lab.calibration.covariance import Covariance
from quantkit.lab.evaluation.evaluate import of_plan, score_tokens
from quantkit.lab.evaluation.parts import part
from quantkit.lab.evaluation.rounded import Blocks, Rounded
from quantkit.lab.rounding_policy.groups import rounded_groups
from quantkit.planning.plan import Plan
from quantkit.rounding.covariance import Covariances
from quantkit.rounding.policy import Choice

I32 = npt.NDArray[np.int32]


def collect(model: Model, tokens: I32, folder: Path, forward: Options, layers: range) -> None:
    """Second moments of some layers, computed with this model up to the last of them."""
    names = {t.name for t in model.catalogue.tensors if t.layer in layers}
    steps = Pass([model], tokens, forward, [Covariance(model.catalogue, folder, names=names)]).steps()
    for n_done in steps:
        if n_done == layers.stop:
            steps.close()
            return


def choices(plan: Plan, folder: Path, choice: Choice) -> dict[str, Choice]:
    groups = rounded_groups([plan], Covariances(folder))
    return {name: choice for group in groups if "feedback" in group.methods for name in group.tensors}


def sequential(reference: Model, plan: Plan, tokens: I32, folder: Path, forward: Options, choice: Choice) -> None:
    """The folder of a recipe: layer after layer, each behind the rounded ones before it."""
    n_layers = reference.family.n_layers
    for number in range(n_layers):
        model = reference
        if number:
            rounding = Rounded(Blocks(Covariances(folder)), choices(plan, folder, choice))
            model = of_plan(reference, plan, f"before {number}", rounding).model
            change = model.change
            types = {n: t for n, t in change.types.items() if _before(plan, n, number)}  # type: ignore[union-attr]
            change.types.clear()  # type: ignore[union-attr]
            change.types.update(types)  # type: ignore[union-attr]
        collect(model, tokens, folder, forward, range(number, number + 1))


def _before(plan: Plan, name: str, number: int) -> bool:
    layer = plan[name].tensor.layer
    return name == "token_embd.weight" if layer is None else layer < number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pre", default=None)
    parser.add_argument("-c", "--ctx", type=int, default=256)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="of the second moments")
    parser.add_argument("--text-chunks", type=int, default=None)
    parser.add_argument("--report", type=Path, action="append", required=True)
    parser.add_argument("--chunks", type=int, default=20, help="of each text to report")
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--damp", type=float, nargs="+", default=[0.01])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    catalogue = qk.open_model(args.model, **({"pre": args.pre} if args.pre else {}))
    imatrix, forward, reference = qk.open_imatrix(args.imatrix), Options(n_threads=args.threads), Model(catalogue)
    tokens = text.chunks(catalogue, [args.text], args.ctx, args.text_chunks).tokens
    reports = {p.stem: part(text.chunks(catalogue, [p], args.ctx), 1, 1, args.chunks) for p in args.report}
    print(f"{catalogue.model}: second moments of {tokens.size:,} tokens\n")
    head = [
        "recipe",
        "damping",
        *(f"{t}: {c}" for t in reports for c in ("stock KLD", "feedback", "sequential", "sequential / feedback")),
    ]
    print(markdown_head(head), flush=True)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "reference"
        plain.mkdir()
        collect(reference, tokens, plain, forward, range(reference.family.n_layers))
        for recipe in args.recipes:
            plan = planned(catalogue, imatrix, recipe)
            for damp in args.damp:
                choice = Choice("feedback", "", damp, True)
                folder = Path(scratch) / f"{recipe}-{damp:g}"
                folder.mkdir()
                sequential(reference, plan, tokens, folder, forward, choice)
                found = [of_plan(reference, plan, "stock", None)]
                for name, moments in (("feedback", plain), ("sequential", folder)):
                    rounding = Rounded(Blocks(Covariances(moments)), choices(plan, moments, choice))
                    found.append(of_plan(reference, plan, name, rounding))
                assert len({c.file_bytes for c in found}) == 1, "files are not of equal size"
                row = [recipe, f"{damp:g}"]
                for chunks in reports.values():
                    scored = score_tokens(reference, [c.model for c in found], chunks, forward, lambda *_: None)[1:]
                    stock, plain_kld, seq = (t.kld.mean(-1) for t in scored)
                    row += [f"{stock.mean():.5f}", ratio(plain_kld, stock), ratio(seq, stock), ratio(seq, plain_kld)]
                print(markdown_row(row), flush=True)
    print(f"\n{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()

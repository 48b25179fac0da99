"""What an optimized recipe is worth at the bytes of others, on small models that were really trained.

    python benchmarks/optimize.py JUDGE TINY [--chunks 16] [--probe-chunks 8] [--confirm]
    python benchmarks/optimize.py - --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text F --calibration F --bands 3

JUDGE and TINY are folders with a checkpoint in fp8/, imatrix/imatrix.gguf and a text in text/. The text is cut into
chunks of 256 tokens: the sensitivity is measured on the first third, the exponent is fitted and neighbours are chosen
on the second, every figure of the tables is of the last. Bytes are those of quantkit's own files, which hold the
imatrix's path. A GGUF of any arch that is computed is compared with stock mixtures; its importance matrix is made of
another text.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import quantkit as qk
from quantkit import text
from quantkit.base.errors import QuantkitError
from quantkit.forward.stream import Options
from quantkit.gguf.header import pad
from quantkit.gguf.types import INTEGER_TYPES, QTYPES
from quantkit.imatrix.matrix import Imatrix
from quantkit.lab.allocation.baselines import baselines, file_bytes
from quantkit.lab.allocation.damage import Probe, Sensitivity
from quantkit.lab.allocation.groups import Group
from quantkit.lab.allocation.knapsack import Item, Option, solve
from quantkit.lab.allocation.optimize import OptimizeOptions, Optimizer
from quantkit.lab.allocation.optimized import Optimized
from quantkit.lab.allocation.problem import Constraints
from quantkit.lab.allocation.sensitivity import ProbeOptions, sensitivity
from quantkit.lab.allocation.supported import Corner, least
from quantkit.lab.allocation.targets import parse_target
from quantkit.lab.calibration.make_imatrix import MakeOptions, make_imatrix
from quantkit.lab.evaluation.parts import part
from quantkit.lab.evaluation.scores import compare
from quantkit.llama_cpp import toolchain
from quantkit.model.catalogue import Catalogue
from quantkit.planning.plan import Plan
from quantkit.text.chunking import Chunks

CTX = 256
FORWARD = Options(n_threads=1)
CONFIRMED, TRIES = ("optimized", "it", "stock"), 5


@dataclass
class Model:
    """A model with its importance matrix, its texts and what was measured."""

    name: str
    text: Path
    catalogue: Catalogue
    imatrix: Imatrix
    chunks: Chunks
    known: Sensitivity


def opened(name: str, folder: Path, file: str) -> tuple[str, Catalogue, Imatrix, Path]:
    """A folder with a checkpoint."""
    catalogue = qk.open_model(folder / "fp8", pre="deepseek-v3")
    return name, catalogue, qk.open_imatrix(folder / "imatrix" / "imatrix.gguf"), folder / "text" / file


def opened_gguf(
    file: Path, path: Path, calibration: Path, n_chunks: int, out: Path
) -> tuple[str, Catalogue, Imatrix, Path]:
    """A GGUF, with an importance matrix that is made of so many chunks of another text."""
    catalogue = qk.open_model(file)
    if not out.exists():
        chunks = part(text.chunks(catalogue, [calibration], CTX), 1, 1, n_chunks)
        make_imatrix(catalogue, chunks, out, MakeOptions(forward=FORWARD))
    return file.stem, catalogue, qk.open_imatrix(out), path


def prepare(given: tuple[str, Catalogue, Imatrix, Path], n_probe: int, n_bands: int, out: Path) -> Model:
    name, catalogue, imatrix, path = given
    chunks = text.chunks(catalogue, [path], CTX)
    start, cpu = time.monotonic(), time.process_time()
    known = sensitivity(
        catalogue, part(chunks, 1, 3, n_probe), imatrix, out, ProbeOptions(n_bands=n_bands, forward=FORWARD)
    )
    print(
        f"\n## {name}: {len(known.groups)} groups, {len(known.probes)} probes on {n_probe} chunks in "
        f"{time.process_time() - cpu:.0f} s of processor time ({time.monotonic() - start:.0f} s); "
        f"noise floor {known.floor:.5f}\n",
        flush=True,
    )
    return Model(name, path, catalogue, imatrix, chunks, known)


def unscaled(known: Sensitivity) -> Sensitivity:
    """The control: every tensor's relative error counts alike, whatever it does."""
    groups = tuple(Group(n, g.role, n, 0, (n,), known.sizes[n]) for g in known.groups for n in g.tensors)
    probes = tuple(Probe(g.name, "Q2_K", 1.0, "", (1.0,)) for g in groups)
    return replace(known, groups=groups, probes=probes)


@dataclass
class Row:
    what: str
    target: str
    plan: Plan
    predicted: float
    against: str = ""
    wanted: float | None = None


def optimized(
    model: Model, target: int, about: str, constraints: Constraints, refine: int, choose: Chunks
) -> Optimized:
    opts = OptimizeOptions(constraints, refine, name=about, forward=FORWARD)
    run = Optimizer(model.catalogue, model.known, parse_target(f"{target}B"), model.imatrix, opts)
    gamma, fit = run.fit_gamma(choose)
    chosen, gap = run.best(gamma)
    if refine:
        chosen, _ = run.refine(chosen, gamma, choose)
    made = run.finish(chosen, gamma, gap)
    off = max(abs(m.off) for m in fit)
    print(
        f"{about}: exponent {gamma:.2f}, fitted within {100 * off:.0f} %; gap {gap:.1e}; {made.file_bytes:,} bytes",
        flush=True,
    )
    assert made.file_bytes <= target, "over the budget"
    return made


def rows_of(model: Model, recipe: str, wanted: float | None, given: argparse.Namespace) -> Iterator[Row]:
    catalogue, imatrix = model.catalogue, model.imatrix
    ud = qk.plan(catalogue, recipe, imatrix)
    target = file_bytes(ud, imatrix)
    choose = part(model.chunks, 2, 3, given.choose_chunks)
    free = Constraints(per_tensor=given.per_tensor)
    best = optimized(model, target, f"{model.name}-{recipe}-bytes", free, given.refine, choose)
    run = Optimizer(catalogue, model.known, parse_target(f"{target}B"), imatrix, OptimizeOptions())
    yield Row("optimized", recipe, best.plan, best.predicted, recipe, wanted)
    names = [t.name for t in catalogue.tensors if t.name in ("token_embd.weight", "output.weight")]
    types = {n: ud[n].type for n in names}
    locked = Constraints(locks=tuple(types.items()))
    opts = OptimizeOptions(locked, name=f"{recipe}-locked")
    some = Optimizer(catalogue, model.known, parse_target(f"{target}B"), imatrix, opts)
    chosen, gap = some.best(best.gamma)
    made = some.finish(chosen, best.gamma, gap)
    yield Row("optimized, embedding and output as there", recipe, made.plan, made.predicted, recipe)
    control = Constraints(minimum={}, per_tensor=True)
    opts = OptimizeOptions(control, name=f"{recipe}-unscaled")
    flat = Optimizer(catalogue, unscaled(model.known), parse_target(f"{target}B"), imatrix, opts)
    chosen, gap = flat.best(1.0)
    made = flat.finish(chosen, 1.0, gap)
    yield Row("control: unscaled errors", recipe, made.plan, run.predict(made.plan, best.gamma))
    yield Row("it", recipe, ud, run.predict(ud, best.gamma))
    for b in baselines(catalogue, imatrix, target):
        if b.kind == "stock" and recipe.startswith("UD-"):
            at = b.next_larger if b.next_larger is not None else -1
            plan = b.plans[at]
            yield Row("stock", recipe, plan, run.predict(plan, best.gamma), "", None)


def table(model: Model, rows: list[Row], n_report: int) -> None:
    report = part(model.chunks, 3, 3, n_report)
    run = Optimizer(model.catalogue, model.known, parse_target("1GB"), model.imatrix, OptimizeOptions(forward=FORWARD))
    scored, tokens = run.measure([(r.what, r.plan) for r in rows], report, "report")
    print(f"\nreported on {n_report} chunks of the last third; KLD against the source's weights ± its standard error\n")
    print("| at the bytes of | what | bytes | mean KLD | same top | predicted | off | × it | × stock |")
    print("|---|---|---|---|---|---|---|---|---|")
    misses = []
    for r, s, t in zip(rows, scored, tokens, strict=True):
        it = next(i for i, o in enumerate(rows) if o.what == "it" and o.target == r.target)
        stock = next((i for i, o in enumerate(rows) if o.what == "stock" and o.target == r.target), None)
        off = r.predicted / s.mean_kld - 1
        ratio = s.mean_kld / scored[it].mean_kld
        by_stock = "" if stock is None else f"{s.mean_kld / scored[stock].mean_kld:.2f}"
        name = {"it": r.target, "stock": f"stock {r.plan.recipe.name}"}.get(r.what, r.what)
        print(
            f"| {r.target} | {name} | {s.file_bytes:,} | {s.mean_kld:.4f} ± {s.mean_kld_se:.4f} | "
            f"{100 * s.same_top:.1f} % | {r.predicted:.4f} | {100 * off:+.0f} % | {ratio:.2f} | {by_stock} |"
        )
        if r.what != "optimized":
            continue
        pair = compare(replace(s, name=r.what), scored[it], t.kld, tokens[it].kld)
        paired = f"{pair.difference:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
        print(f"| | {r.target} less this, paired | | {paired} | | | | | {pair.verdict} |")
        if r.wanted is not None and ratio > r.wanted:
            misses.append(f"{model.name} at {r.target}: {ratio:.2f} x it, {r.wanted} was wanted")
        if stock is not None and s.mean_kld > 0.5 * scored[stock].mean_kld:
            misses.append(f"{model.name} at {r.target}: {by_stock} x {rows[stock].plan.recipe.name}, 0.5 was wanted")
        if abs(off) > 0.25:
            misses.append(f"{model.name} at {r.target}: predicted {100 * off:+.0f} % off, 25 % was wanted")
    print("\n" + ("\n".join(f"MISSED: {m}" for m in misses) or "nothing was missed"), flush=True)


# ---------------------------------------------------------------- confirmed by llama-perplexity


def confirm(model: Model, plans: list[tuple[str, str, Plan]], n_chunks: int, folder: Path) -> None:
    """KLD of built files by llama-perplexity, on the last third of the text by its bytes."""
    tool = toolchain.find("llama-perplexity")
    raw = model.text.read_bytes()
    last = folder / "last-third.txt"
    last.write_bytes(raw[2 * len(raw) // 3 :])
    bf16 = "name: bf16\narch: [any]\nfile_type: BF16\nimatrix: optional\notherwise: mixture BF16\n"
    base = folder / "bf16.gguf"
    qk.build(qk.plan(model.catalogue, qk.load_recipe(bf16)), base, threads=1, force=True)
    common: list[str | Path] = ["-f", str(last), "-c", str(CTX), "-t", "1", "--chunks", str(n_chunks)]
    logits = folder / "logits"
    subprocess.run([tool, "-m", base, *common, "--kl-divergence-base", logits], check=True, capture_output=True)
    print(f"\nbuilt files by llama-perplexity, {n_chunks} chunks of the last third\n")
    print("| at the bytes of | file | bytes | mean KLD |\n|---|---|---|---|")
    for target, name, plan in plans:
        out = folder / "out.gguf"
        made = qk.build(plan, out, threads=1, force=True)
        command: list[str | Path] = [tool, "-m", out, *common, "--kl-divergence-base", logits, "--kl-divergence"]
        found = None
        for _ in range(TRIES):  # it can end with code 0 and its summary cut off
            done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            found = found or re.search(r"Mean +KLD: +(\S+ ± +\S+)", done.stdout)
            if found:
                break
        print(f"| {target} | {name} | {made.nbytes:,} | {found[1] if found else 'not printed'} |", flush=True)


# ---------------------------------------------------------------- how long R1 takes


def r1() -> None:
    """A made-up sensitivity of R1's 1,086 tensors, 20 types each: seconds of the whole search."""
    catalogue = qk.open_model("deepseek-r1")
    names = [n for n, q in QTYPES.items() if n not in INTEGER_TYPES and not q.is_float][:20]
    random = np.random.default_rng(0)
    rows: list[list[tuple[str, int, float, float]]] = []
    for t in catalogue.tensors:
        alpha, beta = random.lognormal(0, 2, 2) * np.sqrt(t.n_elements / 1e10)
        fit = [(n, QTYPES[n]) for n in names if t.n_cols % QTYPES[n].block == 0]
        errors = [float(4**-q.bits * np.exp(random.normal(0, 0.1))) for _, q in fit]
        sizes = [pad(q.row_bytes(t.n_cols) * t.n_rows) for _, q in fit]
        rows.append([(n, b, alpha * e, beta**2 * e) for (n, _), b, e in zip(fit, sizes, errors, strict=True)])
    budget = 131 << 30

    def at(smooth: float, flips: float) -> Corner | None:
        items = [Item("", tuple(Option(n, b, smooth * x + flips * y) for n, b, x, y in row)) for row in rows]
        found = solve(items, budget, (), 12.5)
        if found is None:
            return None
        picked = [row[j] for row, j in zip(rows, found.chosen, strict=True)]
        return Corner(found.chosen, sum(p[2] for p in picked), sum(p[3] for p in picked), (smooth, flips), found.gap)

    start = time.monotonic()
    best = least(at, 0.5, 50)
    assert best is not None
    nbytes = sum(row[j][1] for row, j in zip(rows, best.corner.chosen, strict=True))
    assert nbytes <= budget
    print(
        f"R1: {len(rows):,} tensors, {sum(map(len, rows)):,} options: {time.monotonic() - start:.0f} s, "
        f"{budget - nbytes:,} bytes below 131 GiB, gap {best.gap:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("judge", type=Path, nargs="?", help="- for none")
    parser.add_argument("tiny", type=Path, nargs="?")
    parser.add_argument("--probe-chunks", type=int, default=8)
    parser.add_argument("--choose-chunks", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=16, help="to report on")
    parser.add_argument("--bands", type=int, default=5, help="of depth: these models have 5 and 6 layers")
    parser.add_argument("--refine", type=int, default=6)
    parser.add_argument("--per-tensor", action="store_true", help="tensors of a group may differ")
    parser.add_argument("--keep", type=Path, help="a folder for sensitivities and recipes; a second run goes on there")
    parser.add_argument("--confirm", action="store_true", help="build files and measure them with llama-perplexity")
    parser.add_argument("--gguf", type=Path, help="a GGUF, to be compared with stock mixtures")
    parser.add_argument("--text", type=Path, help="for the GGUF: cut in three as the others")
    parser.add_argument("--calibration", type=Path, help="for the GGUF: another text, for its importance matrix")
    parser.add_argument("--calibration-chunks", type=int, default=32)
    parser.add_argument(
        "--bytes-of", default="Q2_K,Q3_K_M,Q4_K_M", help="for the GGUF: recipes whose bytes are to be used"
    )
    parser.add_argument("--r1", action="store_true", help="time the search on R1's tensors, and nothing else")
    args = parser.parse_args()
    if args.gguf is not None and None in (args.text, args.calibration):
        parser.error("--gguf needs --text and --calibration")
    if args.r1:
        r1()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        todo: list[tuple[tuple[str, Catalogue, Imatrix, Path], dict[str, float | None]]] = []
        if args.judge is not None and str(args.judge) != "-":
            wanted: dict[str, float | None] = {"UD-IQ1_S": 0.75, "UD-IQ2_XXS": 0.75, "UD-Q2_K_XL": 0.75}
            todo.append((opened("judge", args.judge, "seen.txt"), wanted))
        if args.tiny is not None:
            todo.append((opened("tiny-deepseek", args.tiny, "valid.txt"), {"UD-IQ1_S": 0.45}))
        if args.gguf is not None:
            made = folder / f"{args.gguf.stem}.imatrix.gguf"
            given = opened_gguf(args.gguf, args.text, args.calibration, args.calibration_chunks, made)
            todo.append((given, dict.fromkeys(args.bytes_of.split(","))))
        for given, at in todo:
            try:
                model = prepare(given, args.probe_chunks, args.bands, folder / f"{given[0]}.json")
                rows = [r for recipe, least in at.items() for r in rows_of(model, recipe, least, args)]
                for r in rows:
                    if args.keep and r.what.startswith("optimized"):
                        (folder / f"{r.plan.recipe.name}.yaml").write_text(r.plan.recipe.text)
                table(model, rows, args.chunks)
                if args.confirm:
                    some = [(r.target, r.what, r.plan) for r in rows if r.what in CONFIRMED]
                    confirm(model, some, args.chunks, Path(temporary))
            except QuantkitError as e:
                print(f"{given[0]}: {e}")


if __name__ == "__main__":
    main()

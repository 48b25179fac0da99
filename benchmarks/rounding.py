"""What rounding with error feedback is worth in ggml's formats: output error of matrices, slope, KLD of models.

    quantkit imatrix make judge/fp8 -c 256 --text calib.txt -o imatrix.gguf --covariance weighted/ --fisher
    quantkit imatrix make judge/fp8 -c 256 --text choose.txt -o other.gguf --covariance held-out/
    python benchmarks/rounding.py judge/fp8 --pre deepseek-v3 -c 256 --imatrix imatrix.gguf --covariance weighted/ \
        --held-out held-out/ --choose choose.txt --report report.txt --report seen.txt \
        --types IQ1_S IQ2_XXS Q2_K --whole UD-IQ1_S UD-Q2_K_XL "UD-IQ1_S:routed expert" --want UD-IQ1_S=0.74

Three texts that share nothing: one to calibrate (of the second moments), one to choose on, one to report (several may
be given). KLD is against the model's own weights, with 95 % intervals of ratios by paired bootstrap over chunks. `gap`
is the ratio on the report text less that on the text to choose on: what was won by choosing.

`--types`: one kind of tensors at a time, all of it at that type, all else as it is. `--whole`: recipes, or with a colon
the tensors of one role of a recipe (`Q2_K:body` is all but the embedding and the output), all else as it is.
The output error is tr((w - q) H (w - q)^T) / tr(w H w^T), the slope tr(w H q^T) / tr(w H w^T), with H of --held-out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import quantkit as qk
from quantkit import kernels, text
from quantkit.base.text import markdown_head, markdown_row
from quantkit.forward.layer import Key
from quantkit.forward.model import Model, Quantized
from quantkit.forward.stream import Options
from quantkit.imatrix.matrix import Imatrix
from quantkit.lab.allocation.groups import kind_of
from quantkit.lab.evaluation.evaluate import of_plan, score_tokens
from quantkit.lab.evaluation.parts import part
from quantkit.lab.evaluation.rounded import Blocks, Rounded
from quantkit.lab.evaluation.scores import F64, ratio_interval
from quantkit.lab.rounding_policy.groups import RoundedGroup, rounded_groups
from quantkit.model.catalogue import Catalogue, Tensor
from quantkit.planning.plan import ImatrixStatus, Plan, make_plan, with_values
from quantkit.recipe.load import parse
from quantkit.recipe.named import SCHEMA_LINE
from quantkit.rounding.covariance import Covariances, Moments
from quantkit.rounding.policy import GGML, Choice, load
from quantkit.text.chunking import Chunks

STOCK = Choice(GGML, "")


@dataclass
class Setting:
    """A model, its second moments and texts."""

    catalogue: Catalogue
    reference: Model
    imatrix: Imatrix | None
    blocks: Blocks
    held_out: Moments | None
    texts: dict[str, Chunks]
    """choose first"""
    ways: dict[str, Choice]
    per_pass: int
    forward: Options


def ways(damp: float, names: Sequence[str]) -> dict[str, Choice]:
    """Ways of rounding by their names in tables."""
    every = {
        "coarse": Choice("coarse", "", damp, False),
        "feedback": Choice("feedback", "", damp, False),
        "feedback, search": Choice("feedback", "", damp, True),
        "feedback, gain": Choice("feedback+gain", "", damp, False),
        "feedback, search, gain": Choice("feedback+gain", "", damp, True),
    }
    return {name: every[name] for name in names or every}


def uniform(catalogue: Catalogue, imatrix: Imatrix | None, type_: str) -> Plan:
    """All layers at one type."""
    rules = f'  - {{match: "blk.*.weight", type: {type_}, why: all layers alike}}\n'
    head = f"{SCHEMA_LINE}\nname: all-{type_}\narch: [any]\nfile_type: Q2_K\nimatrix: optional\n"
    return planned(catalogue, imatrix, f"{head}otherwise: mixture Q2_K\nrules:\n{rules}")


def planned(catalogue: Catalogue, imatrix: Imatrix | None, recipe: str) -> Plan:
    made = parse(recipe, "uniform.yaml") if "\n" in recipe else qk.load_recipe(recipe)
    return with_values(make_plan(catalogue, made, imatrix), imatrix)


# ---------------------------------------------------------------- what is measured


def measure(s: Setting, models: Sequence[tuple[str, Model]], chunks: Chunks) -> dict[str, F64]:
    """Mean KLD of each chunk, by name."""
    out: dict[str, F64] = {}
    for at in range(0, len(models), s.per_pass):
        some = models[at : at + s.per_pass]
        scored = score_tokens(s.reference, [m for _, m in some], chunks, s.forward, lambda *_: None)[1:]
        out.update({name: t.kld.mean(-1) for (name, _), t in zip(some, scored, strict=True)})
    return out


def importance_of(plan: Plan) -> Any:
    return plan.weights


def changed(s: Setting, plan: Plan, names: Sequence[str], choice: Choice, label: str) -> Model:
    """The reference, of which some tensors are at a plan's types."""
    types = {n: plan[n].type for n in names}
    used = {t.tensor.name for t in plan.tensors if t.imatrix_status is ImatrixStatus.USED}
    change = Quantized(
        types, None if plan.weights is None else _Used(plan.weights, used), plan.recipe.name,
        Rounded(s.blocks, dict.fromkeys(names, choice)),
    )  # fmt: skip
    return s.reference.variant(label, change)


class _Used:
    def __init__(self, weights: Any, used: set[str]) -> None:
        self._weights, self._used = weights, used

    def __contains__(self, name: str) -> bool:
        return name in self._used

    def weights(self, name: str, mat: int, n_cols: int) -> Any:
        return self._weights.weights(name, mat, n_cols)


def output_error(s: Setting, group: RoundedGroup, model: Model) -> tuple[float, float]:
    """Relative output error under the held-out second moments, and the slope, of all matrices of a group."""
    assert s.held_out is not None
    lost, same, all_ = 0.0, 0.0, 0.0
    for name in group.tensors:
        tensor: Tensor = model.weights.tensors[name]
        n_mats = tensor.n_rows // tensor.shape[1] if len(tensor.shape) > 2 else 1
        for mat in range(n_mats):
            w = model.weights.matrix(Key(name, mat))
            assert model.change is not None
            q = model.change.apply(tensor, mat, w)
            h = s.held_out.mean(name, mat, tensor.n_cols)
            wh = w @ h
            all_ += float((wh * w).sum(dtype=np.float64))
            same += float((wh * q).sum(dtype=np.float64))
            lost += float((((w - q) @ h) * (w - q)).sum(dtype=np.float64))
    return lost / all_, same / all_


def ratio(a: F64, b: F64) -> str:
    low, high = ratio_interval(a, b)
    return f"{a.mean() / b.mean():.3f} [{low:.3f}, {high:.3f}]"


# ---------------------------------------------------------------- tables


def kinds(s: Setting, types: Sequence[str], only: Sequence[str]) -> None:
    """One kind of tensors at a time."""
    first, *others = s.texts
    head = ["tensors", "type", "rounding", "output error", "x stock", "slope", f"KLD, {first}", "x stock"]
    print(markdown_head([*head, *(c for o in others for c in (f"KLD, {o}", "x stock", "gap"))]))
    for type_ in types:
        plan = uniform(s.catalogue, s.imatrix, type_)
        for group in rounded_groups([plan], s.blocks.source):
            if group.type != type_ or (only and group.kind not in only):
                continue
            some = {
                label: c for label, c in {"stock": STOCK, **s.ways}.items() if c.rounding in group.methods
            }  # fmt: skip
            models = [(label, changed(s, plan, group.tensors, c, label)) for label, c in some.items()]
            found = {name: measure(s, models, chunks) for name, chunks in s.texts.items()}
            errors = {label: output_error(s, group, m) for label, m in models} if s.held_out else {}
            for label in some:
                row = [group.kind, type_, label]
                if errors:
                    e, slope = errors[label]
                    row += [f"{e:.5f}", f"{e / errors['stock'][0]:.3f}", f"{slope:.4f}"]
                else:
                    row += ["", "", ""]
                print(markdown_row([*row, *cells(found, label)]), flush=True)


def cells(found: Mapping[str, Mapping[str, F64]], label: str) -> Iterator[str]:
    """KLD and ratio of each text, and from the second on the gap to the first."""
    at_first = 0.0
    for i, by in enumerate(found.values()):
        mine, stock = by[label], by["stock"]
        value = mine.mean() / stock.mean()
        yield f"{mine.mean():.5f}"
        yield ratio(mine, stock) if label != "stock" else ""
        if i:
            yield f"{value - at_first:+.3f}" if label != "stock" else ""
        else:
            at_first = value


def wholes(s: Setting, specs: Sequence[str], wanted: Mapping[str, float], policies: Mapping[str, Any]) -> None:
    """Recipes, or a part of them."""
    first, *others = s.texts
    head = ["recipe", "rounding", "bytes", f"KLD, {first}", "x stock"]
    print("\n" + markdown_head([*head, *(c for o in others for c in (f"KLD, {o}", "x stock", "gap"))]))
    misses = []
    for spec in specs:
        recipe, _, role = spec.partition(":")
        plan = planned(s.catalogue, s.imatrix, recipe)
        names = [t.tensor.name for t in plan.tensors if t.tensor.quantizable and _takes(t.tensor, role)]
        sizes: dict[str, int] = {}
        models: list[tuple[str, Model]] = []
        for label, choose in _choices(s, plan, names, policies):
            if role:
                change = changed(s, plan, names, STOCK, label).change
                assert isinstance(change, Quantized)
                change = Quantized(change.types, change.importance, change.label, Rounded(s.blocks, choose))
                models.append((label, s.reference.variant(label, change)))
            else:
                candidate = of_plan(s.reference, plan, label, Rounded(s.blocks, choose))
                models.append((label, candidate.model))
                sizes[label] = candidate.file_bytes
        assert len(set(sizes.values())) <= 1, "files are not of equal size"
        start = time.monotonic()
        found = {name: measure(s, models, chunks) for name, chunks in s.texts.items()}
        for label, _ in models:
            print(markdown_row([spec, label, f"{sizes.get(label, 0):,}", *cells(found, label)]), flush=True)
        best = {o: min(found[o][label].mean() / found[o]["stock"].mean() for label, _ in models) for o in others}
        for o, value in best.items():
            if spec in wanted and value > wanted[spec]:
                misses.append(f"{spec} on {o}: {value:.3f} x stock at best, {wanted[spec]} was wanted")
        _ = start
    print("\n" + ("\n".join(f"MISSED: {m}" for m in misses) or "nothing was missed"), flush=True)


def _choices(
    s: Setting, plan: Plan, names: Sequence[str], policies: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Choice]]]:
    able = {(n, g.type): g.methods for g in rounded_groups([plan], s.blocks.source) for n in g.tensors}
    for label, way in {"stock": STOCK, **s.ways}.items():
        yield label, {n: way for n in names if way.rounding in able.get((n, plan[n].type), ())}
    for label, policy in policies.items():
        yield label, {n: policy.choose(plan[n].tensor, plan[n].type) for n in names if (n, plan[n].type) in able}


def _takes(tensor: Tensor, role: str) -> bool:
    if role in ("", "body"):
        return not role or tensor.layer is not None
    return role in (str(tensor.role), kind_of(tensor, "kind"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pre", default=None)
    parser.add_argument("-c", "--ctx", type=int, default=256)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--choose", type=Path, required=True)
    parser.add_argument("--report", type=Path, action="append", required=True)
    parser.add_argument("--chunks", type=int, default=16, help="of each text")
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--whole", nargs="*", default=[])
    parser.add_argument("--want", nargs="*", default=[], metavar="RECIPE=RATIO")
    parser.add_argument("--ways", nargs="*", default=[])
    parser.add_argument("--policy", nargs="*", default=[], help="measured beside the ways")
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--per-pass", type=int, default=16, help="variants in a pass")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    catalogue = qk.open_model(args.model, **({"pre": args.pre} if args.pre else {}))
    files = {"choose": args.choose, **{f"report {p.stem}": p for p in args.report}}
    texts = {
        name: part(text.chunks(catalogue, [path], args.ctx), 1, 1, args.chunks) for name, path in files.items()
    }  # fmt: skip
    setting = Setting(
        catalogue, Model(catalogue), None if args.imatrix is None else qk.open_imatrix(args.imatrix),
        Blocks(Covariances(args.covariance)),
        None if args.held_out is None else Moments(Covariances(args.held_out)), texts, ways(args.damp, args.ways),
        args.per_pass, Options(n_threads=args.threads),
    )  # fmt: skip
    n = Covariances(args.covariance).n_tokens
    print(f"{catalogue.model}: second moments of {n:,} tokens, damping {args.damp:g}; kernels {kernels.feedback_set()}")
    for name, chunks in texts.items():
        print(f"{name}: {chunks.n_chunks} chunks of {chunks.n_ctx} tokens")
    print()
    start, cpu = time.monotonic(), time.process_time()
    if args.types:
        kinds(setting, args.types, args.kinds)
    if args.whole:
        wanted = {name: float(value) for name, _, value in (w.rpartition("=") for w in args.want)}
        wholes(setting, args.whole, wanted, {f"policy {Path(p).stem}": load(p) for p in args.policy})
    print(f"\n{time.process_time() - cpu:.0f} s of processor time, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Turns documents into sections of a page: chooses their figures, and combines what several say of the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..base.text import GIB
from ..base.text import size as size_text
from ..pictures.coverage import coverage
from ..pictures.figure import Figure, Scale, type_scale
from ..pictures.ladder import Budget, Rung, from_size_table, ladder, with_fit
from ..pictures.layers import More, error_map, type_map
from ..pictures.measured import pareto, predicted
from ..pictures.page import Section
from ..pictures.sensitivity import sensitivity
from ..pictures.side_by_side import side_by_side
from ..pictures.treemap import treemap
from ..planning.plan import make_plan
from ..recipe.load import load
from . import documents as docs
from .documents import Document


class Asked(NamedTuple):
    """The GPUs to compare the ladder with."""

    gpus: str
    context: int


def sections_of(every: Sequence[Document], asked: Asked | None = None) -> list[Section]:
    """Make a section for each document, and the ladder. Raises SourceError for a damaged document, ToolError."""
    more = _more(every)
    scale = type_scale([t for d in every if d.kind in (docs.PLAN, docs.GGUF) for t in _of(d, _checked)])
    out = []
    for d in every:
        if d.kind in _MAKERS:
            try:
                out.append(_MAKERS[d.kind](d, scale, more))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
                docs.damaged(d.name, d.kind, e)
    ladders = _ladder(every, asked)
    if ladders is not None:
        out.append(ladders)
    return out


def _of(d: Document, get: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Get a part of a document. Raises SourceError if it is missing or invalid."""
    try:
        return get(d.data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        docs.damaged(d.name, d.kind, e)


def _checked(x: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The checked tensors of a plan or a GGUF. Raises ValueError, KeyError, TypeError."""
    for t in x["tensors"]:
        if not isinstance(t["bytes"], int) or t["bytes"] < 0 or not all(isinstance(n, int) for n in t["shape"]):
            raise ValueError(f"the tensor {t['name']!r:.80} has no sizes")
        if not all(isinstance(t[key], str) for key in ("name", "role", "type")):
            raise ValueError(f"the tensor {t['name']!r:.80} has no type or role")
    found: Sequence[Mapping[str, Any]] = x["tensors"]
    return found


def _more(every: Sequence[Document]) -> More:
    """The errors of all sensitivities, and the tokens of the importance matrix if there is exactly one."""
    errors: dict[str, dict[str, float]] = {}
    tokens: dict[str, Sequence[int]] = {}
    matrices = [d for d in every if d.kind == docs.IMATRIX]
    for d in every:
        if d.kind == docs.SENSITIVITY:
            for name, of in _of(d, lambda x: {n: dict(by) for n, by in x.get("errors", {}).items()}).items():
                errors.setdefault(name, {}).update(of)
    for d in matrices if len(matrices) == 1 else ():
        if _of(d, lambda x: x["count_unit"]) == "tokens":
            tokens = _of(d, lambda x: {t["name"]: t["counts"] for t in x["tensors"]})
    return More(errors, tokens)


# ---------------------------------------------------------------- a document


def _plan(d: Document, scale: Scale, more: More) -> Section:
    x = d.data
    totals, title = x["totals"], f"{x['model']} as {x['recipe']}"
    facts = [
        ("architecture", f"{x['arch']}, layout {x['layout']}"),
        ("tensor data", f"{size_text(totals['tensor_bytes'])}, {totals['bpw']:.2f} bits a weight"),
        ("types", ", ".join(f"{name}: {n:,}" for name, n in totals["types"].items())),
    ]
    notes = [f"Warning: {w}" for w in x["warnings"]] + [f"Note: {n}" for n in x["notes"]]
    return Section(title, facts, list(_tensors(x["tensors"], scale, more, title)), notes)


def _gguf(d: Document, scale: Scale, more: More) -> Section:
    x = d.data
    facts = [
        ("file", f"{x['files'][0]}" + (f" and {len(x['files']) - 1} more" if len(x["files"]) > 1 else "")),
        ("model", f"{x['model']}: {x['arch']}, layout {x['layout']}, {x['layers']} layers"),
        ("tensor data", size_text(sum(t["bytes"] for t in x["tensors"]))),
        ("types", ", ".join(f"{name}: {of['tensors']:,}" for name, of in x["stored"].items())),
    ]
    title = Path(d.name).name or d.name
    return Section(title, facts, list(_tensors(x["tensors"], scale, more, title)), [f"Note: {n}" for n in x["notes"]])


def _tensors(tensors: Sequence[Mapping[str, Any]], scale: Scale, more: More, name: str) -> Iterator[Figure]:
    yield treemap(tensors, scale, f"Bytes of {name}")
    yield type_map(tensors, scale, f"Types of {name}, by layer", more)
    errors = error_map(tensors, more.errors, f"Errors of {name}, by layer")
    if errors is not None:
        yield errors


def _imatrix(d: Document, _scale: Scale, _more: More) -> Section:
    x = d.data
    figures = coverage(x)
    chunks = f"{x['chunks']:,}" + (f" of {x['chunk_size']:,} tokens" if x["chunk_size"] else "")
    facts = [
        ("file", x["file"]), ("entries", f"{x['entries']:,}"), ("chunks", chunks),
        ("datasets", ", ".join(x["datasets"]) or "none named"),
    ]  # fmt: skip
    notes = []
    if not figures:
        why = "a .dat has no counts of experts" if x["count_unit"] != "tokens" else "none of its entries counts experts"
        notes = [f"No figure: {why}."]
    return Section(f"Importance matrix {Path(x['file']).name}", facts, figures, notes)


def _study(d: Document, _scale: Scale, _more: More) -> Section:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    failed = []
    for r in d.data["results"]:
        p = r["provenance"]
        if r["scores"] is None:
            failed.append(f"Failed: {r['variant']}: {(r['trouble'] or '').splitlines()[0]}")
            continue
        key = (r["study"], p.get("model", ""), tuple(p.get("texts", ())), p.get("n_chunks", 0))
        groups.setdefault(key, []).append({**r["scores"], "name": r["variant"]})
    fronts: dict[tuple[Any, ...], list[str]] = {}
    for f in d.data["front"]:
        fronts.setdefault((f["study"], f["model"], tuple(f["texts"]), f["n_chunks"]), []).append(f["name"])
    figures = []
    for key, scores in groups.items():
        study, model, texts, n_chunks = key
        about = f"{model}, {n_chunks:,} chunks of {', '.join(texts)}."
        figures.append(pareto(scores, fronts.get(key, []), f"{study}: size against KLD", about))
    return Section(f"Study {Path(d.name).name}", [], [f for f in figures if f is not None], failed)


def _evaluation(d: Document, _scale: Scale, _more: More) -> Section:
    from ..lab.evaluation.scores import unbeaten

    x = d.data
    candidates, reference = x["candidates"], x["reference"]
    front = [c[0] for c in unbeaten((c["name"], c["file_bytes"], c["mean_kld"]) for c in candidates)]
    texts = ", ".join(x["texts"])
    facts = [
        ("reference", f"{reference['name']}, perplexity {reference['ppl']:.4f}"),
        ("text", f"{reference['n_tokens']:,} tokens scored, {x['n_chunks']:,} chunks of {x['n_ctx']:,}, of {texts}"),
    ]
    figure = pareto(
        candidates, front, f"Size against KLD beside {reference['name']}", f"{x['n_chunks']:,} chunks of {texts}."
    )
    return Section(f"Evaluation {Path(d.name).name}", facts, [figure] if figure else [])


def _sensitivity(d: Document, _scale: Scale, _more: More) -> Section:
    x = d.data
    facts = [
        ("groups", f"{len(x['groups']):,}"),
        ("probes", f"{len(x['probes']):,}"),
        *(("text", t) for t in x["texts"].values()),
    ]
    return Section(f"Sensitivity {Path(d.name).name}", facts, sensitivity(x))


def _optimized(d: Document, _scale: Scale, _more: More) -> Section:
    x = d.data
    facts = [
        ("file", f"{x['file_bytes']:,} bytes of {x['budget']:,}, {x['bpw']:.4f} bits a weight"),
        ("predicted mean KLD", f"{x['predicted']:.4f}, exponent {x['exponent']:.2f}"),
    ]
    figure = predicted({k: x[k] for k in ("fit", "chosen_from", "report")}, "Predicted against measured KLD")
    front: list[Figure | None] = []
    if x["report"]:
        from ..lab.evaluation.scores import unbeaten

        named = [{**m, "name": f"{m['what']}: {m['name']}"} for m in x["report"]]
        best = [c[0] for c in unbeaten((c["name"], c["file_bytes"], c["mean_kld"]) for c in named)]
        front = [pareto(named, best, "Size against KLD, on the text to report", "")]
    figures = [f for f in (figure, *front) if f is not None]
    notes = [f"Note: {n}" for n in x["notes"]] + ([] if figures else ["No figure: nothing was measured."])
    return Section(f"Optimized recipe {Path(d.name).name}", facts, figures, notes)


def _difference(d: Document, _scale: Scale, _more: More) -> Section:
    x = d.data
    notes = [] if x["changes"] else ["No tensor differs."]
    title = f"{x['before']['recipe']} and {x['after']['recipe']} side by side"
    return Section(title, [("model", f"{x['model']}, layout {x['layout']}")], side_by_side(x), notes)


def _which(d: Document, _scale: Scale, _more: More) -> Section:
    x = d.data
    machine = x["machine"]
    rungs = [
        Rung(
            c["name"], c["tensor_bytes"], float(c["bpw"]), c["name"] == x["best"], x["cache_bytes"],
            c["runs"] in ("in VRAM", "in RAM", "in memory"), f"{c['runs']}; quality: {c['quality']['text']}",
        )
        for c in x["choices"]
    ]  # fmt: skip
    there = machine["unified_bytes"] or sum(machine["gib"]) * GIB or machine["ram_bytes"]
    what = "unified memory" if machine["unified_bytes"] else "VRAM" if machine["gib"] else "RAM"
    budget = Budget(what, there, f"bars have the KV cache of {x['ctx']:,} tokens")
    title = f"Which quantization of {x['model']}, with {machine['text']}"
    best = next((c for c in x["choices"] if c["name"] == x["best"]), None)
    facts = [("machine", machine["text"]), ("order", x["rule"])]
    if best is not None:
        facts.insert(1, ("best", f"{best['name']}: {best['runs']}, llama.cpp's flags {' '.join(best['flags'])}"))
    sources = list(dict.fromkeys(c["quality"]["source"] for c in x["choices"] if c["quality"]["source"]))
    notes = [f"Quality: {source}." for source in sources] + [f"Note: {n}" for n in x["notes"]]
    return Section(title, facts, [ladder(rungs, title, budget)], notes)


_MAKERS: dict[str, Callable[[Document, Scale, More], Section]] = {
    docs.PLAN: _plan, docs.GGUF: _gguf, docs.IMATRIX: _imatrix, docs.STUDY: _study, docs.EVAL: _evaluation,
    docs.SENSITIVITY: _sensitivity, docs.OPTIMIZED: _optimized, docs.DIFF: _difference,
    docs.WHICH: _which,
}  # fmt: skip


# ---------------------------------------------------------------- the ladder


def _ladder(every: Sequence[Document], asked: Asked | None) -> Section | None:
    """The page's recipes and GGUFs by size, with the recipes of its size tables. None if there is only one."""
    rungs: dict[str, Rung] = {}
    catalogue_of = {}
    for d in every:
        if d.kind == docs.SIZES:
            for rung in _of(d, lambda x: from_size_table(x, ())):
                rungs.setdefault(rung.name, rung)
    for d in every:
        if d.kind in (docs.PLAN, docs.GGUF, docs.FIT):
            rung = _of(d, lambda x, d=d: _rung(d, x))  # type: ignore[misc]
            rungs[rung.name] = rung
            catalogue_of[rung.name] = d
    budget = None
    if asked is not None:
        fitted = dict(_fitted(rungs.values(), catalogue_of, asked))
        rungs.update({name: with_fit(rungs[name], fit) for name, fit in fitted.items()})
        budget = _budget(asked, fitted)
    fits = [d for d in every if d.kind == docs.FIT]
    for d in fits:
        rungs.update({(r := _of(d, lambda x, d=d: with_fit(_rung(d, x), x))).name: r})  # type: ignore[misc]
        budget = budget or _of(d, _budget_of)
    if len(rungs) < 2 and budget is None:
        return None
    models = {d.data.get("model") for d in every if d.kind in (docs.PLAN, docs.GGUF, docs.SIZES, docs.FIT)}
    title = f"Recipes of {models.pop()} by size" if len(models) == 1 else "Recipes and files by size"
    return Section("By size", [], [ladder(list(rungs.values()), title, budget)])


def _rung(d: Document, x: Mapping[str, Any]) -> Rung:
    if d.kind == docs.PLAN:
        return Rung(x["recipe"], x["totals"]["tensor_bytes"], float(x["totals"]["bpw"]), True)
    if d.kind == docs.FIT:
        return Rung(x["recipe"] or x["model"], x["tensor_bytes"], None, True)
    nbytes = sum(t["bytes"] for t in x["tensors"])
    return Rung(Path(d.name).name, nbytes, 8 * nbytes / x["elements"] if x["elements"] else None, True)


def _fitted(
    rungs: Iterable[Rung], documents: Mapping[str, Document], asked: Asked
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Compute the fit of every rung whose tensors are known."""
    known = next((d.catalogue for d in documents.values() if d.catalogue is not None and d.plan is not None), None)
    for rung in list(rungs):
        d = documents.get(rung.name)
        if d is not None and d.catalogue is not None:
            yield rung.name, docs.fit_of(d.catalogue, d.plan, asked.gpus, asked.context)
        elif d is None and known is not None:
            yield rung.name, docs.fit_of(known, make_plan(known, load(rung.name)), asked.gpus, asked.context)


def _budget(asked: Asked, fitted: Mapping[str, Mapping[str, Any]]) -> Budget:
    if fitted:
        about = f"1 GiB of each GPU is kept free, and bars have the KV cache of {asked.context:,} tokens"
        return _budget_of(next(iter(fitted.values())), about)
    from ..planning.gpus import parse_gpus

    gpus = parse_gpus(asked.gpus)
    about = "1 GiB of each GPU is kept free; what the KV cache takes is not known from these files"
    return Budget(f"{gpus.text} GiB of VRAM", sum(gpus.gib) * GIB - len(gpus.gib) * GIB, about)


def _budget_of(fit: Mapping[str, Any], about: str = "bars have the KV cache") -> Budget:
    answer = fit["answers"][0]
    kept = len(answer["gib"]) * GIB if "1 GiB" in about else 0
    return Budget(f"{answer['vram']} GiB of VRAM", sum(answer["gib"]) * GIB - kept, about)

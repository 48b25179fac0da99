"""The choice of a quantization as readable text, and as JSON for scripts and reports. Returns text, never prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...base.text import command_lines, fitting_columns, in_unit, short_size, unit_of, wrapped
from ...planning.fit import PlacedBytes
from .candidates import Kind, Memory
from .choice import Choice, Machine, Runs, best

#: columns shown, for decreasing width: name, GiB, BPW, runs, layers on GPU, RAM, quality
_COLUMNS = (range(7), (0, 1, 3, 4, 5, 6), (0, 1, 3, 4, 6), (0, 1, 3, 4), (0, 3))


@dataclass(frozen=True)
class Answer:
    """The question and its answer. `choices` are in order, best first."""

    model: str
    machine: Machine
    memory: Memory
    choices: tuple[Choice, ...]
    rule: str
    notes: tuple[str, ...] = ()
    repository: str = ""


def which_text(a: Answer, width: int | None = None) -> str:
    """The answer in lines of at most `width` characters, except for flags, which cannot be broken."""
    w = a.choices[0].candidate.weights
    about = (
        f"{a.model} with {a.machine.text}; KV cache of {a.memory.context:,} tokens in {a.memory.cache_type}: "
        f"{short_size(_cache(w))}"
    )
    parts = [wrapped(about, width)]
    unit = unit_of(max(c.candidate.weights.tensor_bytes for c in a.choices))
    sources = list(dict.fromkeys(c.quality.source for c in a.choices if c.quality.source))
    head = ["quant", unit, "BPW", "runs", "layers on GPU", f"RAM {unit}", "quality"]
    if not a.machine.gpus.gib:
        head[5] = f"needs {unit}"
    rows = [_row(c, unit, sources) for c in a.choices]
    parts.append(fitting_columns(rows, head, _COLUMNS, (1, 2, 5), width))
    found = best(a.choices)
    if found is None:
        nothing = "none of them fits: even from disk the KV cache needs memory; take a shorter --ctx or more memory"
        parts.append(wrapped(nothing, width))
    else:
        parts.append(f"{_advice(found, a, width)}\n{command_lines(found.flags, width)}")
    lines = [f"[{i}] {source}" for i, source in enumerate(sources, 1)]
    if any(c.candidate.like for c in a.choices):
        lines.append(
            "~ only the size of a published file is known: its layers are taken to be as large as those of the recipe "
            "of its name, or nearest in size, scaled; `quantkit fit FILE` reads them"
        )
    lines.append(f"order: {a.rule}")
    lines += [f"note: {note}" for note in a.notes]
    parts.append("\n".join(wrapped(line, width) for line in lines))
    return "\n\n".join(parts)


def _row(c: Choice, unit: str, sources: Sequence[str]) -> list[str]:
    k = c.candidate
    mark = "~" if k.like else ""
    cited = f" [{sources.index(c.quality.source) + 1}]" if c.quality.source else ""
    layers = c.layers_text
    return [
        k.name,
        in_unit(k.weights.tensor_bytes, unit, 2),
        f"{k.bpw:.2f}",
        str(c.runs),
        f"{mark}{layers}" if layers[0].isdigit() or " of " in layers else layers,
        in_unit(c.ram, unit, 1),
        c.quality.text + cited,
    ]


def _advice(c: Choice, a: Answer, width: int | None) -> str:
    k = c.candidate
    where = {
        Runs.VRAM: "all of it on the GPU" + "s" * (len(a.machine.gpus.gib) > 1),
        Runs.MEMORY: "all of it in memory",
        Runs.RAM: "all of it in RAM",
        Runs.BOTH: f"{c.layers_text} on the GPU" + "s" * (len(a.machine.gpus.gib) > 1)
        + f", {short_size(c.ram)} in RAM",
        Runs.DISK: "more than memory has is read from disk for each token, which is slow; the fewest bytes are best",
        Runs.NOT: "",
    }[c.runs]  # fmt: skip
    get = {
        Kind.RECIPE: f"quantkit build SOURCE -o OUT.gguf -r {k.name} makes it",
        Kind.FILE: "it is here",
        Kind.PUBLISHED: f"hf://{a.repository}/{k.files[0]}" if k.files else "",
    }[k.kind]
    return wrapped(f"best: {k.name}: {where}; {get}", width)


def _cache(w: PlacedBytes) -> int:
    return sum(x.cache for x in w.layers)


def which_json(a: Answer) -> dict[str, Any]:
    """The answer as plain data, sizes in bytes."""
    w = a.choices[0].candidate.weights
    found = best(a.choices)
    return {
        "quantkit_which": 1,
        "model": a.model,
        "layers": w.n_layers,
        "moe_layers": sum(1 for x in w.layers if x.experts),
        "ctx": a.memory.context,
        "cache_type": a.memory.cache_type,
        "cache_bytes": _cache(w),
        "machine": {
            "text": a.machine.text,
            "gib": list(a.machine.gpus.gib),
            "ram_bytes": a.machine.ram,
            "unified_bytes": a.machine.unified,
            "reserve_bytes": a.machine.reserve,
        },
        "repository": a.repository or None,
        "rule": a.rule,
        "best": None if found is None else found.candidate.name,
        "choices": [_choice_json(c) for c in a.choices],
        "notes": list(a.notes),
    }


def _choice_json(c: Choice) -> dict[str, Any]:
    k = c.candidate
    return {
        "name": k.name,
        "kind": str(k.kind),
        "title": k.title,
        "tensor_bytes": k.weights.tensor_bytes,
        "bpw": k.bpw,
        "runs": str(c.runs),
        "layers_on_gpu": c.n_layers,
        "only_experts_in_ram": c.only_experts,
        "gpu_bytes": list(c.used),
        "ram_bytes": c.ram,
        "flags": list(c.flags),
        "quality": {"text": c.quality.text, "source": c.quality.source or None, "mean_kld": c.quality.mean_kld},
        "files": list(k.files),
        "layers_like": k.like or None,
    }

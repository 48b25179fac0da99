"""How much of a model fits on the GPUs: by the published rule, by real bytes of layers, and with experts in RAM.

What llama.cpp does, and this module follows (src/llama-model.cpp, load_tensors; src/llama-kv-cache.cpp):
- `-ngl n` offloads the last n of N + 1 layers. The output head counts as the last layer, so it goes
  first, and n = N + 1 offloads everything. token_embd stays in RAM.
- `-ts a,b` puts the first a of these n layers on the first GPU and the next b on the second. With whole numbers
  that add up to n the split is exact. No layer spans two GPUs.
- The KV cache of a layer is where the layer is; the context is padded to 256 tokens. With MLA (k_b+v_b) a token
  has one K of kv_lora_rank + rope values, and V is a view of it; otherwise heads x (key + value) values.
- `-ot REGEX=CPU` keeps tensors in RAM whatever `-ngl` says.

The published rule is the one of the R1 dynamic quants' guide of January 2025, in whole GB:
layers = VRAM / size x layers - 4, between 0 and all.
"""

from __future__ import annotations

import re
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from ..base.errors import UnsupportedError
from ..base.text import GIB
from ..gguf.header import ARRAY, decode
from ..gguf.types import QTYPES, STORED_TYPES
from ..model.catalogue import Catalogue
from .gpus import Gpus
from .plan import Plan

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
ALL_EXPERTS = r"blk\..*\.ffn_.*_exps\."
_PAD = 256
_EXPERTS = re.compile(r"\.ffn_\w+_(?:ch)?exps\.")
_INPUT = ("token_embd.", "per_layer_token_embd.")


class Layer(NamedTuple):
    """What a layer takes, in bytes. The output head is the last layer, with nothing in `experts` and `cache`."""

    rest: int
    """attention, norms, router, shared experts or dense ffn"""
    experts: int
    """routed experts"""
    cache: int
    """its KV cache"""

    @property
    def total(self) -> int:
        return self.rest + self.experts + self.cache


@dataclass(frozen=True)
class PlacedBytes:
    """A model's bytes by layer."""

    model: str
    recipe: str
    layers: tuple[Layer, ...]
    """the model's layers in order, then the output head"""
    input: int
    """token_embd and the like, always in RAM"""
    tensor_bytes: int
    """of the file"""

    @property
    def n_layers(self) -> int:
        return len(self.layers) - 1


class Fit(NamedTuple):
    """One way to use the GPUs."""

    n_layers: int
    """layers of the model on GPUs; with experts in RAM: those with their experts on GPUs"""
    output: bool
    """whether the output head is on a GPU"""
    used: tuple[int, ...]
    """bytes on each GPU, the reserve not counted"""
    ram: int
    """bytes of weights and KV cache that stay in RAM"""
    flags: tuple[str, ...]
    """arguments of llama.cpp's tools"""


class Answer(NamedTuple):
    """What fits on some GPUs."""

    gpus: Gpus
    rule: int
    """layers by the published rule"""
    whole: Fit
    """whole layers"""
    split: Fit | None
    """all but routed experts on the GPUs, with as many layers' experts as fit; None: it does not fit, or
    the model has no experts"""
    note: str


# ---------------------------------------------------------------- a model's bytes by layer


def has_mla_cache(catalogue: Catalogue) -> bool:
    """Whether the cache holds only K, and V is a view of it (k_b+v_b): then both have the same type."""
    return any(item.key == f"{catalogue.arch}.attention.key_length_mla" for item in catalogue.kvs)


def cache_bytes(catalogue: Catalogue, context: int, cache_type: str, value_type: str | None = None) -> list[int]:
    """Return the bytes of KV cache of each layer, for one sequence of `context` tokens. `value_type`: the type of V, if
    it differs from that of K. Raises UnsupportedError if the metadata lacks what is needed, or if the type's blocks do
    not divide a head."""
    arch = catalogue.arch
    kvs = {item.key.removeprefix(f"{arch}."): item for item in catalogue.kvs}
    n = catalogue.n_layers

    def numbers(key: str) -> list[int] | None:
        if key not in kvs:
            return None
        value = decode(kvs[key])
        values = list(value) if kvs[key].type == ARRAY else [value] * n
        if len(values) < n or not all(isinstance(v, int) and 0 <= v < 1 << 24 for v in values):
            raise UnsupportedError(f"{catalogue.model}: {arch}.{key} is {value!r:.60}, not a number for {n} layers")
        return values[:n]

    heads, width = numbers("attention.head_count"), numbers("embedding_length")
    if heads is None or width is None:
        missing = "attention.head_count" if heads is None else "embedding_length"
        raise UnsupportedError(f"{catalogue.model}: the metadata has no {arch}.{missing}, so its KV cache is not known")
    heads_kv = numbers("attention.head_count_kv") or heads
    per_head = [w // h if h else 0 for w, h in zip(width, heads, strict=True)]
    key_length = numbers("attention.key_length") or per_head
    value_length = [0] * n if has_mla_cache(catalogue) else numbers("attention.value_length") or per_head
    types = [QTYPES[name.upper()] for name in (cache_type, value_type or cache_type)]
    for name, qtype, lengths in zip((cache_type, value_type), types, (key_length, value_length), strict=True):
        odd = next((v for v in lengths if v % qtype.block), None)
        if odd is not None:
            raise UnsupportedError(
                f"{catalogue.model}: a {name or cache_type} cache has blocks of {qtype.block} values, which do not "
                f"divide a head of {odd}; take --cache-type f16"
            )
    tokens = -(-context // _PAD) * _PAD
    return [
        h * tokens * (types[0].row_bytes(k) + types[1].row_bytes(v))
        for h, k, v in zip(heads_kv, key_length, value_length, strict=True)
    ]


def weigh(
    catalogue: Catalogue, plan: Plan | None, context: int, cache_type: str, value_type: str | None = None
) -> PlacedBytes:
    """Return the bytes by layer: of a plan, or without one, of a GGUF as it is. Raises UnsupportedError."""
    if plan is not None:
        sizes = [(t.tensor, t.nbytes) for t in plan.tensors]
    else:
        sizes = [(t, STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows) for t in catalogue.tensors]
    n = catalogue.n_layers
    rest, experts, input_, head = [0] * n, [0] * n, 0, 0
    for t, nbytes in sizes:
        if t.layer is not None and t.layer < n:
            (experts if _EXPERTS.search(t.name) else rest)[t.layer] += nbytes
        elif t.name.startswith("output"):
            head += nbytes
        else:
            input_ += nbytes
    if not any(t.name == "output.weight" for t, _ in sizes):  # tied: llama.cpp loads token_embd twice
        head += sum(nbytes for t, nbytes in sizes if t.name == "token_embd.weight")
    cache = cache_bytes(catalogue, context, cache_type, value_type)
    layers = [Layer(*each) for each in zip(rest, experts, cache, strict=True)]
    return PlacedBytes(
        catalogue.model,
        plan.recipe.name if plan else "",
        (*layers, Layer(head, 0, 0)),
        input_,
        sum(nbytes for _, nbytes in sizes),
    )


# ---------------------------------------------------------------- the published rule


def published_rule(vram_gb: int, size_gb: int, n_layers: int) -> int:
    """Return how many layers to offload: VRAM / size x layers - 4, rounded down, between 0 and all. Computed with whole
    numbers, so that 24 / 183 x 61 is exactly 8."""
    return max(0, min(n_layers, vram_gb * n_layers // size_gb - 4))


def published_size(tensor_bytes: int) -> int:
    """The whole number of GB that names a published quantization: GiB, rounded up (131 for R1's 1.58-bit)."""
    return -(-tensor_bytes // GIB)


def _odd_cell(w: PlacedBytes, gpus: Gpus) -> str:
    """Return a note for the one cell of the published table that does not follow its own rule, else ''."""
    is_r1 = w.n_layers == 61 and w.recipe == "UD-Q2_K_XL" and published_size(w.tensor_bytes) == 212
    if not is_r1 or gpus.gib != (80, 80):
        return ""
    return "the published guide says 32 layers there; its own rule gives 42"


# ---------------------------------------------------------------- whole layers


def _evenly(fit: Callable[[Sequence[int]], Fit | None], room: Sequence[int]) -> Fit | None:
    """Return the fit into `room` that fills the GPUs as evenly as possible with the same number of layers: it
    finds the smallest percentage of the room that still holds as many."""
    best = fit(room)
    low, high = 0, 100  # more layers fit at `high` than at `low`
    while best is not None and best.output and high - low > 1 and len(room) > 1:
        middle = (low + high) // 2
        found = fit([r * middle // 100 for r in room])
        if found is not None and (found.n_layers, found.output) == (best.n_layers, best.output):
            best, high = found, middle
        else:
            low = middle
    return best


def whole_layers(w: PlacedBytes, room: Sequence[int]) -> Fit:
    """Fit as many layers as possible, from the end, into `room` bytes on each GPU, in the GPUs' order."""
    counts, used = [0] * len(room), [0] * len(room)
    at = len(w.layers)
    for gpu in reversed(range(len(room))):
        while at and used[gpu] + w.layers[at - 1].total <= room[gpu]:
            at -= 1
            used[gpu] += w.layers[at].total
            counts[gpu] += 1
    n = sum(counts)
    ram = w.input + sum(x.total for x in w.layers[:at])
    return Fit(max(n - 1, 0), n > 0, tuple(used), ram, ("-ngl", str(n), *_tensor_split(counts)))


def _tensor_split(counts: Sequence[int]) -> tuple[str, ...]:
    return ("-ts", ",".join(map(str, counts))) if len(counts) > 1 and any(counts) else ()


# ---------------------------------------------------------------- experts in RAM


def experts_in_ram(w: PlacedBytes, room: Sequence[int]) -> Fit | None:
    """Put all layers on the GPUs without their routed experts, then add the experts of as many whole layers as fit.
    Layers are assigned to the GPUs in order, so that the most experts fit. None if not even the rest fits."""
    if not any(x.experts for x in w.layers):
        return None
    # best[i]: the most layers with experts when the GPUs so far hold the layers before i, and where each GPU starts
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    end = len(w.layers)
    for gpu, space in enumerate(room):
        last = gpu == len(room) - 1
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for begin, (n, begins) in best.items():
            for stop, more in _dealt(w.layers, begin, space):
                found = (n + more, (*begins, begin))
                if (not last or stop == end) and (stop not in reached or found[0] > reached[stop][0]):
                    reached[stop] = found
        best = reached
    if end not in best:
        return None
    starts = [*best[end][1], end]
    on_gpu: set[int] = set()
    used: list[int] = []
    for gpu, space in enumerate(room):
        layers = range(starts[gpu], starts[gpu + 1])
        base = sum(w.layers[i].rest + w.layers[i].cache for i in layers)
        for size, negative in sorted((w.layers[i].experts, -i) for i in layers if w.layers[i].experts):
            if base + size > space:
                break
            base += size
            on_gpu.add(-negative)
        used.append(base)
    experts = [i for i, x in enumerate(w.layers) if x.experts]
    off = [i for i in experts if i not in on_gpu]
    flags = ["-ngl", str(max(99, end)), *_tensor_split([b - a for a, b in pairwise(starts)])]
    if off:
        pattern = ALL_EXPERTS if off == experts else rf"blk\.{numbers_regex(off)}\.ffn_.*_exps\."
        flags += ["-ot", f"{pattern}=CPU"]
    ram = w.input + sum(w.layers[i].experts for i in off)
    return Fit(len(on_gpu), True, tuple(used), ram, tuple(flags))


def _dealt(layers: Sequence[Layer], begin: int, space: int) -> Iterable[tuple[int, int]]:
    """Yield (end, layers whose experts fit too) for each end where the layers from `begin` fit without experts."""
    base = 0
    sizes: list[int] = []
    yield begin, 0
    for stop in range(begin, len(layers)):
        base += layers[stop].rest + layers[stop].cache
        if base > space:
            return
        if layers[stop].experts:
            insort(sizes, layers[stop].experts)
        left, n = space - base, 0
        for size in sizes:
            left -= size
            if left < 0:
                break
            n += 1
        yield stop + 1, n


def numbers_regex(numbers: Iterable[int]) -> str:
    """Return a regular expression that matches exactly these numbers: (?:[3-9]|[1-4][0-9]|5[0-2]). It has no commas,
    since llama.cpp's -ot splits at them."""
    endings: dict[str, list[int]] = {}
    for n in sorted(set(numbers)):
        endings.setdefault(str(n)[:-1], []).append(n % 10)
    by_endings: dict[tuple[tuple[int, ...], str], list[int]] = {}
    out: list[tuple[int, str]] = []
    for tens, ones in endings.items():
        if tens:
            by_endings.setdefault((tuple(ones), tens[:-1]), []).append(int(tens[-1]))
        else:
            out.append((0, _digits(ones)))
    for (endings_, hundreds), tens_ in by_endings.items():
        out.append((int(f"{hundreds}{tens_[0]}"), f"{hundreds}{_digits(tens_)}{_digits(endings_)}"))
    alternatives = [text for _, text in sorted(out)]
    return alternatives[0] if len(alternatives) == 1 else f"(?:{'|'.join(alternatives)})"


def _digits(digits: Sequence[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    text = ""
    for _, run in groupby(enumerate(digits), lambda pair: pair[1] - pair[0]):
        span = [d for _, d in run]
        text += "".join(map(str, span)) if len(span) < 3 else f"{span[0]}-{span[-1]}"
    return f"[{text}]"


# ---------------------------------------------------------------- together


def answer(w: PlacedBytes, gpus: Gpus, reserve: int, common: Sequence[str]) -> Answer:
    """Work out what fits on the GPUs when `reserve` bytes of each are kept for compute buffers. `common`: flags that
    come before all others, such as the context's."""
    room = [g * GIB - reserve for g in gpus.gib]
    rule = published_rule(sum(gpus.gib), published_size(w.tensor_bytes), w.n_layers)
    whole = _evenly(lambda r: whole_layers(w, r), room)
    split = _evenly(lambda r: experts_in_ram(w, r), room)
    assert whole is not None
    whole = whole._replace(flags=(*common, *whole.flags))
    if split is not None:
        split = split._replace(flags=(*common, *split.flags))
    return Answer(gpus, rule, whole, split, _odd_cell(w, gpus))


def to_json(w: PlacedBytes, answers: Sequence[Answer], ram: int | None) -> dict[str, Any]:
    """Return the answers as plain values, sizes in bytes. `ram`: bytes of RAM, or None if not given."""

    def fit(f: Fit | None) -> dict[str, Any] | None:
        if f is None:
            return None
        fits = None if ram is None else f.ram <= ram
        return {**f._asdict(), "used": list(f.used), "flags": list(f.flags), "fits_ram": fits}

    return {
        "model": w.model,
        "recipe": w.recipe or None,
        "layers": w.n_layers,
        "tensor_bytes": w.tensor_bytes,
        "cache_bytes": sum(x.cache for x in w.layers),
        "ram_bytes": ram,
        "answers": [
            {
                "vram": a.gpus.text,
                "gib": list(a.gpus.gib),
                "published_rule_layers": a.rule,
                "note": a.note or None,
                "whole_layers": fit(a.whole),
                "experts_in_ram": fit(a.split),
            }
            for a in answers
        ],
    }

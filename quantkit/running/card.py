"""Collects everything needed to run a GGUF, from its headers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import QuantkitError
from ..base.text import short_size, size
from ..model.catalogue import Catalogue
from ..planning.fit import PlacedBytes, weigh
from ..text.chat import render
from ..text.encoding import Tokenizer
from ..text.sources import Chat
from ..text.vocabulary import vocabulary_of
from .advice import CacheTypes, Sampling, cache_types, is_deepseek, sampling
from .placement import Placement, total
from .programs import Line, Run, lines

#: placeholder for the user's text in the prompt format
_PROMPT = "{prompt}"


@dataclass(frozen=True)
class Wishes:
    """The user's requests; None leaves a choice to the published advice."""

    context: int
    cache_type: str | None
    value_type: str | None
    temp: float | None
    seed: int
    ram: int | None


@dataclass(frozen=True)
class Prompt:
    """The prompt format, for programs that do not apply the template themselves."""

    text: str
    """with {prompt} for the user's text; without the beginning-of-text token if programs add it"""
    adds_bos: bool
    """programs add the beginning-of-text token themselves (tokenizer.ggml.add_bos_token)"""
    bos: str
    note: str


@dataclass(frozen=True)
class Setup:
    """One choice of hardware, and the command lines for it."""

    placement: Placement
    lines: tuple[Line, ...]
    fits_ram: bool | None
    """None if the amount of RAM is unknown"""


@dataclass(frozen=True)
class Card:
    """The content of `quantkit run-card`."""

    weights: PlacedBytes
    context: int
    cache: CacheTypes
    sampling: Sampling
    prompt: Prompt | None
    setups: tuple[Setup, ...]
    notes: tuple[str, ...]


def make_card(
    catalogue: Catalogue, path: str, wishes: Wishes, places: Sequence[Callable[[PlacedBytes], Placement]]
) -> Card:
    """Make the card of the GGUF at `path`, for each choice of hardware. Raises UnsupportedError."""
    notes = list(catalogue.notes)
    cache, note = cache_types(catalogue, wishes.cache_type, wishes.value_type)
    notes += [note] if note else []
    weights = weigh(catalogue, None, wishes.context, cache.key, cache.value)
    thinks, prompt = False, None
    try:
        tokenizer = Tokenizer(vocabulary_of(catalogue))
        thinks = "</think>" in (tokenizer.vocabulary.chat_template or "")
        prompt = _prompt(tokenizer)
    except QuantkitError as e:
        notes.append(f"the prompt format is not shown: {e}")
    how = sampling(catalogue, thinks, wishes.temp, wishes.seed)
    if prompt is not None and prompt.note:
        notes.append(prompt.note)
    setups = []
    for place in places:
        placement = place(weights)
        run = Run(path, wishes.context, cache, how, placement, is_deepseek(catalogue))
        setups.append(Setup(placement, lines(run), None if wishes.ram is None else placement.ram <= wishes.ram))
    return Card(weights, wishes.context, cache, how, prompt, tuple(setups), tuple(notes))


def _prompt(tokenizer: Tokenizer) -> Prompt:
    """Find the prompt format by the model's own template. Raises TextError."""
    text = render(tokenizer, [Chat("a prompt", [{"role": "user", "content": _PROMPT}], None)], reply=True)[0]
    bos = tokenizer.vocabulary.tokens[tokenizer.bos] if tokenizer.bos is not None else ""
    if not (tokenizer.add_bos and bos and text.startswith(bos)):
        return Prompt(text, tokenizer.add_bos, bos, "")
    note = (
        f"the template writes {bos}, and programs add it too (tokenizer.ggml.add_bos_token): the format above is "
        "without it; with it, a prompt would have two"
    )
    return Prompt(text.removeprefix(bos), True, bos, note)


# ---------------------------------------------------------------- as text and as JSON


def card_text(card: Card, ram: int | None) -> str:
    """A card as readable text."""
    w, c, s = card.weights, card.cache, card.sampling
    value = "V is a view of K" if c.value is None else f"V in {c.value}"
    cache_bytes = sum(x.cache for x in w.layers)
    temp = "" if s.temp is None else f"temperature {s.temp:g}, "
    parts = [
        f"{w.model}: {size(w.tensor_bytes)}, {w.n_layers} layers and the output head\n"
        f"KV cache of {card.context:,} tokens: K in {c.key}, {value}, {short_size(cache_bytes)}\n"
        f"sampling: {temp}min-p {s.min_p:g}, seed {s.seed} ({s.why})"
    ]
    if card.prompt is not None:
        shown = card.prompt.text.replace("\n", "\\n")
        parts.append(f"prompt:  {shown}")
    for setup in card.setups:
        parts.append(_setup_text(setup, w, ram))
    parts += ["\n".join(f"note: {note}" for note in card.notes)] if card.notes else []
    return "\n\n".join(parts)


def _setup_text(setup: Setup, w: PlacedBytes, ram: int | None) -> str:
    p = setup.placement
    out = [f"{p.title}: {p.said}"]
    if p.rule is not None:
        out.append(f"  published rule: {p.rule} of {w.n_layers} layers" + f" ({p.note})" * bool(p.note))
    on = f"GPU {' + '.join(map(short_size, p.used))}, " if p.used else ""
    over = ""
    if ram is not None and p.ram > ram:
        over = f", {short_size(p.ram - ram)} more than there is: read from disk (mmap) as needed"
    out.append(f"  expected memory: {on}RAM {short_size(p.ram)}{over}")
    out += [f"  {line.program}:\n    {line.shell}" for line in setup.lines]
    return "\n".join(out)


def card_json(card: Card) -> dict[str, Any]:
    """A card as plain values, sizes in bytes."""
    p = card.prompt
    return {
        "model": card.weights.model,
        "layers": card.weights.n_layers,
        "tensor_bytes": card.weights.tensor_bytes,
        "total_bytes": total(card.weights),
        "context": card.context,
        "cache": {"k": card.cache.key, "v": card.cache.value, "bytes": sum(x.cache for x in card.weights.layers)},
        "sampling": {"temp": card.sampling.temp, "min_p": card.sampling.min_p, "seed": card.sampling.seed,
                     "why": card.sampling.why},
        "prompt": None if p is None else {"text": p.text, "adds_bos": p.adds_bos, "bos": p.bos},
        "setups": [
            {
                "hardware": s.placement.title, "said": s.placement.said, "note": s.placement.note or None,
                "published_rule_layers": s.placement.rule, "gpu_bytes": list(s.placement.used),
                "ram_bytes": s.placement.ram, "fits_ram": s.fits_ram,
                "lines": [{"program": x.program, "argv": list(x.argv), "shell": x.shell} for x in s.lines],
            }
            for s in card.setups
        ],
        "notes": list(card.notes),
    }  # fmt: skip

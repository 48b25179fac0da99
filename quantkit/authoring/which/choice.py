"""How each candidate would run on a machine, and how candidates are ranked.

quantkit.planning.fit computes the memory. Best is what fits completely on the GPUs, then what fits on GPUs and in RAM,
then what must be read from disk again and again (llama.cpp maps the file), which is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...base.text import GIB, TextEnum
from ...planning.fit import Fit, answer, whole_layers
from ...planning.gpus import Gpus
from .candidates import Candidate
from .quality import UNKNOWN, Quality

NO_GPUS = Gpus("", ())


class Runs(TextEnum):
    """Where the weights are while it runs, best first."""

    VRAM = "in VRAM"
    MEMORY = "in memory"
    """unified memory, which CPU and GPU share"""
    RAM = "in RAM"
    BOTH = "VRAM + RAM"
    DISK = "from disk"
    NOT = "does not fit"


_RANK = {Runs.VRAM: 0, Runs.MEMORY: 0, Runs.RAM: 0, Runs.BOTH: 1, Runs.DISK: 2, Runs.NOT: 3}
RULE = (
    "what fits wholly comes first, then VRAM + RAM, then what is read from disk; among these more bits a weight first "
    "(from disk, fewer bytes first)"
)
RULE_KLD = RULE.replace("more bits a weight", "where each is measured less KLD, else more bits a weight")
RULE_NO_RAM = RULE.replace("(from disk, fewer bytes first)", "(VRAM + RAM, since --ram is not said, less RAM first)")


class Machine(NamedTuple):
    """The memory of a machine."""

    gpus: Gpus = NO_GPUS
    ram: int | None = None
    """bytes; None: unknown"""
    unified: int | None = None
    """bytes that CPU and GPU share; if set, the others are not"""
    reserve: int = GIB
    """bytes kept free on each GPU, or of the unified memory"""

    @property
    def text(self) -> str:
        """24 GiB of VRAM and 64 GiB of RAM."""
        if self.unified is not None:
            return f"{self.unified / GIB:,.4g} GiB of unified memory"
        parts = [f"{self.gpus.text} GiB of VRAM"] if self.gpus.gib else []
        parts += [f"{self.ram / GIB:,.4g} GiB of RAM"] if self.ram is not None else []
        return " and ".join(parts)


class Choice(NamedTuple):
    """How a candidate runs on the machine."""

    candidate: Candidate
    runs: Runs
    n_layers: int
    """layers wholly on GPUs"""
    only_experts: bool
    """all other layers are on the GPUs, except for their routed experts"""
    used: tuple[int, ...]
    """bytes on each GPU"""
    ram: int
    """bytes in RAM, or read from disk"""
    flags: tuple[str, ...]
    quality: Quality = UNKNOWN

    @property
    def layers_text(self) -> str:
        """all, 10 of 61, experts of 6 of 58, all but experts, none."""
        w = self.candidate.weights
        if self.only_experts:
            n_moe = sum(1 for x in w.layers if x.experts)
            some = f"experts of {self.n_layers} of {n_moe}" if self.n_layers else "all but experts"
            return "all" if self.n_layers == n_moe else some
        return "all" if self.n_layers == w.n_layers else f"{self.n_layers} of {w.n_layers}" if self.n_layers else "none"


def place(candidate: Candidate, machine: Machine, common: Sequence[str]) -> Choice:
    """Place a candidate on a machine. `common`: flags of llama.cpp that come before all others."""
    w = candidate.weights
    if machine.unified is not None:
        return _unified(candidate, machine, machine.unified, common)
    if not machine.gpus.gib:
        f = whole_layers(w, ())
        cache = sum(x.cache for x in w.layers)
        return _choice(candidate, _in_ram(f.ram, cache, machine.ram, Runs.RAM), f, (*common, *f.flags))
    found = answer(w, machine.gpus, machine.reserve, common)
    if found.whole.output and found.whole.n_layers == w.n_layers:
        return _choice(candidate, Runs.VRAM, found.whole, found.whole.flags)
    if found.split is not None and found.split.n_layers == sum(1 for x in w.layers if x.experts):
        return _choice(candidate, Runs.VRAM, found.split, found.split.flags, found.split)
    both = [f for f in (found.split, found.whole) if f is not None]
    fits = next((f for f in both if machine.ram is not None and f.ram <= machine.ram), both[0])
    left = len(w.layers) - found.whole.n_layers - found.whole.output
    cache = 0 if fits is found.split else sum(x.cache for x in w.layers[:left])
    return _choice(candidate, _in_ram(fits.ram, cache, machine.ram, Runs.BOTH), fits, fits.flags, found.split)


def _in_ram(nbytes: int, cache: int, ram: int | None, runs: Runs) -> Runs:
    """How `nbytes` in RAM would run; `cache` of them are KV cache, which cannot be read from disk."""
    if ram is None or nbytes <= ram:
        return runs
    return Runs.DISK if cache <= ram else Runs.NOT


def _unified(candidate: Candidate, machine: Machine, memory: int, common: Sequence[str]) -> Choice:
    w = candidate.weights
    room = memory - machine.reserve
    cache = sum(x.cache for x in w.layers)
    everything = w.input + sum(x.total for x in w.layers)
    if everything <= room:
        f = whole_layers(w, (everything,))._replace(ram=everything)
        return _choice(candidate, Runs.MEMORY, f, (*common, *f.flags))
    f = whole_layers(w, ())
    return _choice(candidate, Runs.DISK if cache <= room else Runs.NOT, f, (*common, *f.flags))


def _choice(candidate: Candidate, runs: Runs, f: Fit, flags: tuple[str, ...], split: Fit | None = None) -> Choice:
    return Choice(candidate, runs, f.n_layers, f is split, f.used, f.ram, flags)


def ordered(choices: Sequence[Choice], machine: Machine) -> tuple[list[Choice], str]:
    """Sort choices, best first; returns them and the rule of the order in words."""
    unknown_ram = machine.ram is None and bool(machine.gpus.gib)
    measured = {
        rank: all(c.quality.mean_kld is not None for c in choices if _RANK[c.runs] == rank) for rank in range(4)
    }

    def key(c: Choice) -> tuple[float, ...]:
        rank, nbytes = _RANK[c.runs], c.candidate.weights.tensor_bytes
        if c.runs in (Runs.DISK, Runs.NOT):
            return (rank, nbytes)
        if c.runs == Runs.BOTH and unknown_ram:
            return (rank, c.ram)
        if measured[rank]:
            return (rank, c.quality.mean_kld or 0.0, nbytes)
        return (rank, -c.candidate.bpw, nbytes)

    any_measured = any(c.quality.mean_kld is not None for c in choices)
    rule = RULE_NO_RAM if unknown_ram else RULE_KLD if any_measured else RULE
    return sorted(choices, key=lambda c: (*key(c), 0.0)), rule


def best(choices: Sequence[Choice]) -> Choice | None:
    """The first choice, unless nothing fits."""
    return choices[0] if choices and choices[0].runs != Runs.NOT else None

"""Places a model's bytes on GPUs and in RAM by quantkit.planning.fit, as the flags that run-card prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..planning.fit import Answer, Fit, PlacedBytes, answer
from ..planning.gpus import Gpus

#: share of unified memory that Metal gives the GPU by default (iogpu.wired_limit_mb)
_METAL_SHARE = (3, 4)
_GIB = 1 << 30


@dataclass(frozen=True)
class Placement:
    """Layers and experts on GPUs and in RAM, for one choice of hardware."""

    title: str
    rule: int | None
    """layers on GPUs by the published rule; None without GPUs"""
    n_gpu_layers: int
    tensor_split: tuple[int, ...]
    n_cpu_moe: int
    """number of first layers whose experts stay in RAM; 0 if `override` is used, or if all experts are on GPUs"""
    override: str
    """-ot's REGEX=CPU, if the layers whose experts stay in RAM are not the first ones"""
    used: tuple[int, ...]
    """bytes on each GPU, without the reserve"""
    ram: int
    said: str
    note: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of llama.cpp's tools."""
        out = ["-ngl", str(self.n_gpu_layers)]
        if self.tensor_split:
            out += ["-ts", ",".join(map(str, self.tensor_split))]
        if self.n_cpu_moe:
            out += ["--n-cpu-moe", str(self.n_cpu_moe)]
        if self.override:
            out += ["-ot", self.override]
        return tuple(out)


def without_gpus(w: PlacedBytes) -> Placement:
    """Place everything in RAM."""
    ram = w.input + sum(x.total for x in w.layers)
    return Placement("no GPU", None, 0, (), 0, "", (), ram, "all in RAM; --vram places layers on GPUs")


def on_gpus(w: PlacedBytes, gpus: Gpus, reserve: int) -> Placement:
    """Place a model on GPUs: completely if it fits; else all but routed experts, plus the experts of as many layers as
    fit; else as many whole layers as fit."""
    found = answer(w, gpus, reserve, ())
    n_experts = sum(1 for x in w.layers if x.experts)
    whole = found.whole
    title = f"{gpus.text} GiB of VRAM"
    if whole.output and whole.n_layers == w.n_layers:
        return _placed(w, title, found, whole, "all layers on the GPU" + "s" * (len(gpus.gib) > 1))
    if found.split is None:
        return _placed(w, title, found, whole, f"{whole.n_layers} of {w.n_layers} layers on GPUs")
    said = f"all but routed experts on GPUs, and the experts of {found.split.n_layers} of {n_experts} layers"
    return _placed(w, title, found, found.split, said)


def in_unified_memory(w: PlacedBytes, nbytes: int, reserve: int) -> Placement:
    """Place a model in memory shared by processor and GPU, of which Metal gives the GPU three quarters."""
    share = nbytes * _METAL_SHARE[0] // _METAL_SHARE[1] // _GIB
    title = f"{nbytes / _GIB:.4g} GiB of unified memory"
    found = answer(w, Gpus(str(share), (share,)), min(reserve, share * _GIB), ())
    whole = found.whole
    said = "all layers on the GPU" if whole.n_layers == w.n_layers and whole.output else (
        f"{whole.n_layers} of {w.n_layers} layers on the GPU"
    )  # fmt: skip
    mb = nbytes // (1 << 20) - 8192
    note = f"Metal gives the GPU about 3/4 of it, {share} GiB"
    if said != "all layers on the GPU" and mb > share * 1024:
        note += f"; `sudo sysctl iogpu.wired_limit_mb={mb}` gives it more, until the next start"
    return replace(_placed(w, title, found, whole, said), note=note)


def _placed(w: PlacedBytes, title: str, found: Answer, fit: Fit, said: str) -> Placement:
    flags = dict(zip(fit.flags[::2], fit.flags[1::2], strict=True))
    override = flags.get("-ot", "")
    first = _first_layers(w, override)
    split = tuple(int(n) for n in flags["-ts"].split(",")) if "-ts" in flags else ()
    return Placement(
        title, found.rule, int(flags["-ngl"]), split, first or 0, "" if first else override, fit.used, fit.ram, said,
        found.note,
    )  # fmt: skip


def _first_layers(w: PlacedBytes, override: str) -> int | None:
    """The number of first layers whose experts an -ot keeps in RAM; None if they are not the first ones."""
    if not override:
        return None
    pattern = re.compile(override.removesuffix("=CPU"))
    experts = [i for i, x in enumerate(w.layers) if x.experts]
    off = [i for i in experts if pattern.search(f"blk.{i}.ffn_up_exps.weight")]
    return off[-1] + 1 if off and off == experts[: len(off)] else None


def total(w: PlacedBytes) -> int:
    """Bytes of weights and KV cache."""
    return w.input + sum(x.total for x in w.layers)

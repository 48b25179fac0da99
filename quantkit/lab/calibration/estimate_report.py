"""An estimate in words, for people."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ...base.files import read_at
from ...base.text import table
from ...model.catalogue import Catalogue
from .estimate import Rates, Times, Work

_ASSUMED = 1e9
_SAMPLE, _PIECE = 1 << 28, 1 << 24


def estimate_text(work: Work, rates: Rates, times: Times, sources: tuple[str, str, str]) -> str:
    """What a pass takes. `sources` say where the rates of computing, of the disk and of decoding come from."""
    flop, disk, decode = sources
    rows = [
        ["computing", f"{flop_text(work.flop)}", f"{flop_text(rates.flop)}/s, {flop}", duration(times.computing)],
        ["reading", bytes_text(work.bytes_read), f"{bytes_text(rates.disk)}/s, {disk}",
         duration(work.bytes_read / rates.disk)],
        ["to float32", bytes_text(work.bytes_read), f"{bytes_text(rates.decode)}/s, {decode}",
         duration(work.bytes_read / rates.decode)],
        ["writing", bytes_text(round(times.writing * rates.disk)), f"{bytes_text(rates.disk)}/s",
         duration(times.writing)],
    ]  # fmt: skip
    lines = [
        f"{work.model}: {work.n_tokens:,} tokens, {work.n_chunks:,} chunks of {work.n_ctx:,}, through {work.n_layers} "
        "layers, in one pass",
        f"{_count(work.n_parameters)} weights in matrices, {_count(work.n_active)} of them for each token",
    ]
    if work.n_experts:
        lines.append(
            f"{work.n_experts:,} experts; {work.n_experts_used:,.0f} are read, where tokens choose evenly: "
            f"{_per_expert(work):,.0f} tokens each"
        )
    lines += ["", table(rows, ["", "amount", "rate", "time"], (1, 3)), ""]
    lines.append(f"together {duration(times.total)}: reading, converting and computing overlap, the longest counts")
    lines += [
        f"memory: hidden states {bytes_text(work.hidden_bytes)} (files where --memory is less, on the CPU), weights at "
        f"once {bytes_text(work.largest)} as float32",
        f"disk: {bytes_text(work.hidden_bytes)} for what is kept between layers, {bytes_text(work.sums_bytes)} for "
        "sums and the file" + (f", {bytes_text(work.covariance_bytes)} of covariance" if work.covariance_bytes else ""),
    ]
    if work.fisher_disk:
        lines.append(
            f"backwards: {bytes_text(work.fisher_memory)} of memory for the largest layer, "
            f"{bytes_text(work.fisher_disk)} on the disk for hidden states after all layers and second moments"
        )
    return "\n".join(lines)


def _per_expert(work: Work) -> float:
    return work.n_tokens * work.n_used * work.n_moe_layers / work.n_experts


def read_rate(catalogue: Catalogue) -> tuple[float, str]:
    """Bytes a second that the disk under a model gives, and how that is known."""
    if catalogue.source is None:
        return _ASSUMED, "assumed; --disk 5GB/s gives another"
    file: Path = max(catalogue.source.files, key=lambda f: f.stat().st_size)
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        start, at = time.perf_counter(), 0
        while at < _SAMPLE and (piece := read_at(fd, _PIECE, at)):
            at += len(piece)
        return max(at, 1) / (time.perf_counter() - start), "measured here"
    finally:
        os.close(fd)


def duration(seconds: float) -> str:
    """In the unit that a person would take."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} G" if n >= 1e9 else f"{n / 1e6:.1f} M"


def bytes_text(n: float) -> str:
    """In decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1e3:.1f} kB"


def flop_text(n: float) -> str:
    """In decimal units."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1e9:.2f} GFLOP"

"""Reads every byte of a file once: finds block scales that are NaN or Inf, and computes SHA-256 of files and tensors.

The positions of the float16 scales in each type's blocks are from ggml/src/ggml-common.h. The forbidden values are
those that ggml_validate_row_data refuses when a model is loaded with --check-tensors.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError
from ..base.workers import share_out
from ..gguf.types import IK_TYPES, QType
from .gguf import Gguf, Info, read_into
from .verdict import KEPT_EACH, Finding, Findings, Progress

_CHUNK = 1 << 23
U8 = npt.NDArray[np.uint8]

#: type -> byte positions of its float16 scales (d, then dmin or m) in a block
F16_SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q1_0": (0,), "Q2_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "F16": (0,),
}  # fmt: skip
#: IQ1_M spreads its float16 over the high nibbles of four u16; the exponent is in the last of them
_IQ1_M_EXPONENT = 55
#: mask of float16's exponent bits, in its high byte; all set: NaN or Inf
_F16_EXPONENT = 0x7C


def bad_blocks(raw: U8, qt: QType) -> npt.NDArray[np.int64]:
    """Indices of the blocks in `raw`, uint8 [n x block_bytes], whose scale (for float types: value) is NaN or Inf."""
    if qt.name in IK_TYPES:  # only their size is known
        return np.empty(0, np.int64)
    blocks = raw.reshape(-1, qt.block_bytes)
    bad = np.zeros(len(blocks), bool)
    if qt.name in F16_SCALES:
        for at in F16_SCALES[qt.name]:
            bad |= (blocks[:, at + 1] & _F16_EXPONENT) == _F16_EXPONENT
    elif qt.name == "IQ1_M":
        # bits 12-15 of the scale are bits 12-15 of the last u16, bits 8-11 those of the third: the exponent is 10-14
        bad = ((blocks[:, _IQ1_M_EXPONENT] & 0x70) == 0x70) & ((blocks[:, _IQ1_M_EXPONENT - 2] & 0xC0) == 0xC0)
    elif qt.name == "MXFP4":  # E8M0: 255 is NaN
        bad = blocks[:, 0] == 0xFF
    elif qt.name == "BF16":
        bad = ((blocks[:, 1] & 0x7F) == 0x7F) & (blocks[:, 0] >= 0x80)
    elif qt.name in ("F32", "F64"):
        bad = ~np.isfinite(np.ascontiguousarray(raw).view("<f4" if qt.name == "F32" else "<f8"))
    # NVFP4: every byte is a scale to ggml; the integer types have none
    return np.flatnonzero(bad)


def zero_blocks(raw: U8, qt: QType) -> npt.NDArray[np.bool_] | None:
    """Which blocks in `raw`, uint8 [n x block_bytes], have only scales of 0, and so only weights of 0; None for types
    whose scales do not show it."""
    blocks = raw.reshape(-1, qt.block_bytes)
    zero: npt.NDArray[np.bool_]
    if qt.name == "IQ1_M":  # the high nibbles of four u16, without the sign
        zero = ((blocks[:, 49] | blocks[:, 51] | blocks[:, 53]) & 0xF0 | blocks[:, 55] & 0x70) == 0
        return zero
    if qt.name not in F16_SCALES or qt.is_float:
        return None
    zero = np.ones(len(blocks), bool)
    for at in F16_SCALES[qt.name]:
        zero &= (blocks[:, at] | blocks[:, at + 1] & 0x7F) == 0
    return zero


class Empty:
    """Records, from any thread, which matrices of a tensor have a block with a non-zero scale."""

    def __init__(self) -> None:
        self._full: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}
        self._n_bytes: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def see(self, g: Gguf, info: Info, at: int, raw: U8) -> None:
        """Record `raw`, whole blocks of a tensor from its byte `at` on."""
        if len(info.shape) < 2 or info.type.row_extra:
            return
        zero = zero_blocks(raw, info.type)
        if zero is None:
            return
        per_matrix = info.shape[0] // info.type.block * info.shape[1]
        first = at // info.type.block_bytes
        starts = np.arange(first // per_matrix, (first + len(zero) - 1) // per_matrix + 1)
        full = ~np.logical_and.reduceat(zero, np.maximum(starts * per_matrix - first, 0))
        with self._lock:
            seen = self._full.setdefault((g.name, info.name), np.zeros(info.n_rows // info.shape[1], bool))
            seen[starts] |= full
            self._n_bytes[g.name, info.name] += len(raw)

    def matrices(self, files: Sequence[Gguf]) -> list[tuple[Info, list[int]]]:
        """The tensors, of those seen completely, that have all-zero matrices, and the indices of these."""
        out = []
        for g in files:
            for info in g.tensors:
                full = self._full.get((g.name, info.name))
                if full is not None and self._n_bytes[g.name, info.name] == info.nbytes and not full.all():
                    out.append((info, np.flatnonzero(~full).tolist()))
        return out


@dataclass
class Digests:
    """SHA-256 of files by name, and of tensors by (file, name)."""

    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[tuple[str, str], str] = field(default_factory=dict)


class _Chunk(NamedTuple):
    g: Gguf
    info: Info
    at: int
    """of the tensor's bytes"""
    nbytes: int


def scan(
    files: Sequence[Gguf], findings: Findings, n_threads: int, progress: Progress, hashing: bool, empty: Empty
) -> Digests:
    """Check the scales of every block of every tensor, report zero scales to `empty`, and with `hashing` compute
    digests on the way. Uses a few chunks of 8 MiB per thread. Raises SourceError if a file cannot be read."""
    digests = Digests()
    if hashing:
        progress.start("hashes and scales", sum(g.nbytes for g in files), "B")
        share_out(files, min(n_threads, max(1, len(files))), lambda: _Hasher(findings, progress, digests, empty).do)
    else:
        progress.start("scales", sum(c.nbytes for g in files for c in _chunks(g)), "B")
        jobs = (c for g in files for c in _chunks(g))

        def make() -> Callable[[_Chunk], None]:
            buffer = np.empty(_CHUNK + 256, np.uint8)

            def do(c: _Chunk) -> None:
                raw = buffer[: c.nbytes]
                _read(c.g, c.info.start + c.at, raw)
                _check(c.g, c.info, c.at, raw, findings)
                empty.see(c.g, c.info, c.at, raw)
                progress.advance(c.nbytes)

            return do

        share_out(jobs, n_threads, make)
    return digests


def _apart(g: Gguf) -> Iterator[Info]:
    """The tensors in the order of their data, without those that overlap an earlier one, so that no byte is read twice,
    whatever the header claims."""
    end = 0
    for t in sorted(g.tensors, key=lambda t: (t.start, t.end)):
        if t.start >= end:
            yield t
            end = t.end


def _chunks(g: Gguf) -> Iterator[_Chunk]:
    for t in _apart(g):
        there = max(0, min(t.end, g.nbytes) - t.start)
        there -= there % t.type.block_bytes
        step = _CHUNK // t.type.block_bytes * t.type.block_bytes
        for at in range(0, there, step):
            yield _Chunk(g, t, at, min(step, there - at))


def _read(g: Gguf, at: int, out: U8) -> None:
    """Fill `out` with the bytes of a file. Raises SourceError."""
    try:
        fd = os.open(g.path, os.O_RDONLY)
        try:
            done = read_into(fd, at, out)
        finally:
            os.close(fd)
    except OSError as e:
        raise SourceError(f"{g.path}: cannot be read at {at:,}: {e.strerror or e}") from None
    if done < len(out):
        raise SourceError(f"{g.path}: ends at {at + done:,}; it has changed since it was opened")


def _check(g: Gguf, info: Info, at: int, raw: U8, findings: Findings) -> None:
    bad = bad_blocks(raw, info.type)
    per_row = info.shape[0] // info.type.block
    for i, n in enumerate(bad[: KEPT_EACH + 1]):
        block = at // info.type.block_bytes + int(n)
        row, in_row = divmod(block, per_row)
        value = bytes(raw[int(n) * info.type.block_bytes :][: min(info.type.block_bytes, 4)]).hex()
        what = f"column {in_row:,}" if info.type.block == 1 else f"block {in_row:,}"
        finding = Finding(
            "scale", g.name, f"{info.place(row)}, {what}: NaN or Inf in {info.type.name}", info.name,
            info.start + block * info.type.block_bytes, row, in_row, found=value if info.type.block == 1 else "",
        )  # fmt: skip
        findings.add(finding, 1 if i < KEPT_EACH else len(bad) - KEPT_EACH)


class _Hasher:
    """Processes whole files: each byte is read once, for the file's hash, the tensor's hash and the scales."""

    def __init__(self, findings: Findings, progress: Progress, digests: Digests, empty: Empty) -> None:
        self.findings, self.progress, self.digests, self.empty = findings, progress, digests, empty
        self.buffer = np.empty(_CHUNK + 256, np.uint8)

    def do(self, g: Gguf) -> None:
        whole = hashlib.sha256()
        at = 0
        with ThreadPoolExecutor(2, "hash") as pool:
            for t in _apart(g):
                if t.end > g.nbytes:
                    continue  # truncated: already a finding, and no manifest is made of it
                self._through(g, at, t.start, [whole], pool)
                own = hashlib.sha256()
                self._through(g, t.start, t.end, [whole, own], pool, t)
                self.digests.tensors[g.name, t.name] = own.hexdigest()
                at = t.end
            self._through(g, at, g.nbytes, [whole], pool)
        self.digests.files[g.name] = whole.hexdigest()

    def _through(
        self, g: Gguf, begin: int, end: int, hashes: list[Any], pool: ThreadPoolExecutor, info: Info | None = None
    ) -> None:
        size = info.type.block_bytes if info else 1
        for at in range(begin, end, _CHUNK // size * size):
            raw = self.buffer[: min(_CHUNK // size * size, end - at)]
            _read(g, at, raw)
            running = [pool.submit(h.update, raw) for h in hashes]
            if info is not None:
                _check(g, info, at - begin, raw, self.findings)
                self.empty.see(g, info, at - begin, raw)
            for future in running:
                future.result()
            self.progress.advance(len(raw))

"""What a pass over a model costs, from its catalogue alone: operations, bytes read, memory, disk.

Counted is what the pass does (quantkit.forward): two operations for each weight that meets a token, attention within a
chunk, two for each value of a second moment. Norms, softmax and routing are not counted; they are below one percent.
Times are counts over rates; reading and computing overlap, so the longer of them counts.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np

from ... import kernels
from ...base.errors import SourceError
from ...forward.hparams import Hparams
from ...gguf.types import QTYPES
from ...model.catalogue import Catalogue, Source, Tensor
from ...model.families.known import MODELS
from ...model.families.known import config as known_config
from .fisher_work import fisher_bytes, fisher_flop, hidden_bytes, memory_bytes, n_batches
from .inputs import covariance_bytes, is_matrix, planned

#: seconds between two states that are kept, where hidden states are large
KEEP_SECONDS = 300.0
#: hidden states larger than this are large
LARGE_STATE = 1 << 30
_FP8_BLOCK = 128 * 128


@dataclass(frozen=True)
class Work:
    """What one pass over a text takes."""

    model: str
    n_tokens: int
    n_ctx: int
    n_layers: int
    n_parameters: int
    """weights of all matrices of layers"""
    n_active: int
    """of them, those that meet a token"""
    flop_weights: int
    flop_attention: int
    flop_covariance: int
    n_experts: int
    """routed, of all layers"""
    n_moe_layers: int
    n_used: int
    """experts that a token chooses in a layer"""
    n_experts_used: float
    """of them, those that some token chooses and that are read, if tokens choose evenly"""
    bytes_read: int
    """stored bytes of weights"""
    largest: int
    """bytes of the weights that are in memory at once, as float32: those at work and the next"""
    hidden_bytes: int
    """hidden states, and as much again for what a layer adds to them"""
    sums_bytes: int
    """the sums of an importance matrix while it is made, and the file"""
    covariance_bytes: int
    flop_fisher: int = 0
    """each layer once more and backwards, and second moments of all matrices"""
    fisher_memory: int = 0
    """bytes of memory that the way back takes at least: routed experts share second moments and are read one by one"""
    fisher_disk: int = 0
    """bytes of hidden states of all layers, gradients and those second moments, at least"""

    @property
    def flop(self) -> int:
        return self.flop_weights + self.flop_attention + self.flop_covariance + self.flop_fisher

    @property
    def n_chunks(self) -> int:
        return ceil(self.n_tokens / self.n_ctx)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    flop: float
    disk: float
    """bytes"""
    decode: float
    """stored bytes that all threads that read make float32"""


@dataclass(frozen=True)
class Times:
    """Seconds that a pass takes."""

    computing: float
    reading: float
    """from the disk and made float32, whichever is longer: they overlap too"""
    writing: float
    """what is kept between layers, and a covariance"""

    @property
    def total(self) -> float:
        return max(self.computing, self.reading) + self.writing


def work_of(
    catalogue: Catalogue, n_tokens: int, n_ctx: int, *, fp8: bool = False, head: bool = False,
    covariance: bool | None = None, fisher: bool = False,
) -> Work:  # fmt: skip
    """The work of a pass over `n_tokens` in chunks of `n_ctx`. Of a catalogue without weights, `fp8` says how they are
    stored; `head` counts the logits of all tokens; `covariance` second moments, True with a matrix for each expert's
    ffn_down, False with one a layer; `fisher` also those weighted by gradients. Raises SourceError for a catalogue
    without the numbers."""
    hp = Hparams(catalogue)
    matrices = [t for t in catalogue.tensors if t.layer is not None and is_matrix(t)]
    if not matrices:
        raise SourceError(f"{catalogue.model}: has no matrices in layers; there is nothing to compute")
    n_experts = hp.int_("expert_count", 0, least=0)
    n_used = hp.int_("expert_used_count", 0, least=0)
    share = n_used / n_experts if n_experts else 0.0
    # of tokens that choose evenly, an expert is missed by all with this chance
    seen = 1 - (1 - share) ** n_tokens if n_experts else 0.0
    output = next((t for t in catalogue.tensors if t.name == "output.weight"), None)
    output = output or next(t for t in catalogue.tensors if t.name == "token_embd.weight")
    n_active = sum(t.n_elements * n_used // n_experts if is_routed(t) else t.n_elements for t in matrices)
    head_active = output.n_elements if head else 0
    own = [covariance_bytes(catalogue, covariance)] if covariance is not None else []
    sums = sum((t.n_cols * (prod(t.shape[2:]) or 1) + prod(t.shape[2:])) for t in matrices)
    n_embd = hp.int_("embedding_length")
    layers = [t for t in catalogue.tensors if t.layer is not None]
    read = sum(stored_bytes(catalogue.source, t, fp8) * (seen if is_routed(t) else 1) for t in layers)
    embedding = next(t for t in catalogue.tensors if t.name == "token_embd.weight")
    rows = min(n_tokens, embedding.n_rows)
    read += stored_bytes(catalogue.source, embedding, fp8) * rows / embedding.n_rows
    read += stored_bytes(catalogue.source, output, fp8) if head else 0
    routed = [t for t in matrices if is_routed(t)]
    flop_weights = 2 * (n_active + head_active) * n_tokens
    flop_attention = attention_flop(hp, n_ctx) * n_tokens * len({t.layer for t in matrices})
    more = {}
    if fisher:
        both = 2 * (flop_weights + 2 * output.n_elements * n_tokens) + 3 * flop_attention
        more = {
            "flop_fisher": both + fisher_flop(catalogue, n_tokens, share),
            "fisher_memory": memory_bytes(catalogue, n_tokens, n_ctx, False, False),
            "fisher_disk": hidden_bytes(catalogue, n_tokens) + fisher_bytes(catalogue, False),
        }
        # experts that are not kept are read for each batch, forth and back; the rest once for all batches
        read_routed = sum(stored_bytes(catalogue.source, t, fp8) * seen for t in layers if is_routed(t))
        read += read - read_routed + 2 * n_batches(n_tokens, n_ctx) * read_routed
    return Work(
        model=catalogue.model,
        n_tokens=n_tokens,
        n_ctx=n_ctx,
        n_layers=len({t.layer for t in matrices}),
        n_parameters=sum(t.n_elements for t in matrices),
        n_active=n_active,
        flop_weights=flop_weights,
        flop_attention=flop_attention,
        flop_covariance=0 if covariance is None else _moments(catalogue, covariance, share, n_tokens),
        n_experts=n_experts * len({t.layer for t in routed}),
        n_moe_layers=len({t.layer for t in routed}),
        n_used=n_used,
        n_experts_used=n_experts * len({t.layer for t in routed}) * seen,
        bytes_read=round(read),
        largest=4 * _largest(matrices, n_experts),
        hidden_bytes=2 * 4 * n_embd * n_tokens,
        sums_bytes=2 * 8 * sums + 2 * 4 * sums,
        covariance_bytes=sum(own),
        **more,
    )


def is_routed(tensor: Tensor) -> bool:
    """Whether it is of routed experts."""
    return "_exps." in tensor.name


def attention_flop(hp: Hparams, n_ctx: int) -> int:
    """Operations of attention for a token in a layer, on average: with (n_ctx + 1) / 2 tokens, itself among them."""
    n_heads = hp.int_("attention.head_count")
    if "attention.kv_lora_rank" in hp and "attention.key_length_mla" in hp:  # absorbed: the latent is key and value
        latent = hp.int_("attention.kv_lora_rank")
        per_pair = 2 * (latent + hp.int_("rope.dimension_count")) + 2 * latent
    else:
        key = hp.int_("attention.key_length", hp.int_("embedding_length") // n_heads)
        per_pair = 2 * key + 2 * hp.int_("attention.value_length", key)
    return n_heads * per_pair * (n_ctx + 1) // 2


def _moments(catalogue: Catalogue, own_experts: bool, share: float, n_tokens: int) -> int:
    """Operations of X^T X: 2 n_cols^2 for each input."""
    total = 0.0
    for p in planned(catalogue, own_experts):
        inputs = n_tokens * share * p.all_mats if _routed_input(p.names[0]) else n_tokens * p.n_mats
        total += 2 * p.n_cols**2 * inputs
    return round(total)


def _routed_input(name: str) -> bool:
    return name.endswith(".ffn_down_exps.weight")


def _largest(matrices: list[Tensor], n_experts: int) -> int:
    """Values in memory at once: a layer's attention or an expert, and what is read meanwhile."""
    most = 0
    for layer in {t.layer for t in matrices}:
        attention = sum(t.n_elements for t in matrices if t.layer == layer and ".attn_" in t.name)
        dense = sum(t.n_elements for t in matrices if t.layer == layer and ".ffn_" in t.name and not is_routed(t))
        expert = sum(t.n_elements // n_experts for t in matrices if t.layer == layer and is_routed(t))
        most = max(most, attention + dense, dense + expert, 2 * expert)
    return most


def stored_bytes(source: Source | None, tensor: Tensor, fp8: bool = False) -> int:
    """Bytes of a tensor where the weights are; without them, as a checkpoint has them: in FP8 with scales, or as
    `source_type` says."""
    if source is not None:
        total = 0.0
        for part in tensor.parts:
            stored = source.tensor(part.source)
            total += stored.nbytes * part.n_rows / max(1, prod(stored.shape[:-1]))
        return round(total)
    if fp8 and tensor.quantizable and tensor.layer is not None:
        return tensor.n_elements + 4 * ceil(tensor.n_elements / _FP8_BLOCK)
    return QTYPES[tensor.source_type].row_bytes(tensor.n_cols) * tensor.n_rows


def times_of(work: Work, rates: Rates) -> Times:
    """Seconds of a pass at these rates."""
    computing = work.flop / rates.flop
    reading = max(work.bytes_read / rates.disk, work.bytes_read / rates.decode)
    state = work.hidden_bytes // 2
    n_states = work.n_layers
    if state > LARGE_STATE:
        n_states = min(n_states, ceil(max(computing, reading) / KEEP_SECONDS))
    return Times(computing, reading, (n_states * state + work.covariance_bytes + work.fisher_disk) / rates.disk)


def measured_flop(n_threads: int, seconds: float = 0.5) -> float:
    """Operations in a second of float32 matrix products on `n_threads` idle processors: those in a second of processor
    time, times the threads."""
    n = 1024
    a, b = np.ones((n, n), np.float32), np.ones((n, n), np.float32)
    np.matmul(a, b)
    start, count = time.process_time(), 0
    while (took := time.process_time() - start) < seconds:
        np.matmul(a, b)
        count += 1
    return n_threads * 2 * n**3 * count / took


def measured_decode(fp8: bool) -> float:
    """Stored bytes in a second of processor time that one thread makes float32: of FP8 with scales, or of BF16."""
    n_rows, n_cols = 1024, 4096
    out = np.empty((n_rows, n_cols), np.float32)
    scale = np.ones((n_rows // 128, n_cols // 128), np.float32)
    stored = np.zeros((n_rows, n_cols if fp8 else 2 * n_cols), np.uint8)
    start, count = time.thread_time(), 0
    while (took := time.thread_time() - start) < 0.25:  # what others have to do here does not count
        if fp8:
            kernels.e4m3_to_f32(stored, scale, 0, (128, 128), out, True)
        else:
            kernels.float_to_f32(stored, "BF16", out, False)
        kernels.first_nonfinite(out)
        count += 1
    return stored.nbytes * count / took


def is_fp8(source: str, catalogue: Catalogue) -> bool:
    """Whether a model's checkpoint is stored as FP8, by its weights, or by its config where there are none."""
    if catalogue.source is not None:
        return any(catalogue.source.tensor(p.source).dtype == "F8_E4M3" for t in catalogue.tensors for p in t.parts)
    if source.lower() in MODELS:
        return "quantization_config" in known_config(source.lower())
    try:
        return "quantization_config" in json.loads(Path(source).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False

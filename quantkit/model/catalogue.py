"""What the output holds: its tensors by GGUF name, and the source rows that each is made from. Pure data.

A `Catalogue` is built from headers, or from config.json alone (quantkit.model.families), so a 671 B model
can be planned without its weights. Shapes of output tensors are in GGUF (ne) order, fastest
dimension first; shapes of source tensors are row-major, as stored in their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..base.text import TextEnum
from ..gguf.header import KV


class MlaLayout(TextEnum):
    """How the tensors of multi-head latent attention are stored."""

    K_B_V_B = "k_b+v_b"
    """attn_k_b and attn_v_b: llama.cpp's current layout"""
    KV_B = "kv_b"
    """attn_kv_b: the layout of early 2025"""
    AS_IS = "as is"
    """neither: no MLA, or not known"""


class Role(TextEnum):
    """What a tensor does in the model; tables list roles in this order."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION = "attention"
    DENSE_FFN = "dense ffn"
    SHARED_EXPERT = "shared expert"
    ROUTED_EXPERT = "routed expert"
    ROUTER = "router"
    NORM = "norm"
    OTHER = "other"


ROLES = tuple(Role)


class Part(NamedTuple):
    """Consecutive rows of an output tensor, and their source: `n_rows` rows of the 2-D (or
    1-D) source tensor `source`, from row `row` on. If `transposed`, the output rows are the
    columns of that rectangle. If `interleave` is k > 1, the rows are interleaved from k equal
    runs of source rows: the first row of each run, then the second of each, and so on."""

    source: str
    shape: tuple[int, ...]
    row: int
    n_rows: int
    transposed: bool = False
    interleave: int = 1

    @property
    def out_rows(self) -> int:
        """How many rows of the output tensor this part provides."""
        return self.shape[-1] if self.transposed else self.n_rows

    def source_row(self, row: int) -> int:
        """Return the source row that becomes row `row` of a part that is not transposed."""
        run, at = row % self.interleave, row // self.interleave
        return self.row + run * (self.n_rows // self.interleave) + at


class Tensor(NamedTuple):
    """A tensor of the output file."""

    name: str
    shape: tuple[int, ...]
    """ne order: shape[0] values in a row"""
    role: Role
    layer: int | None
    quantizable: bool
    """False for norms, router, biases: like llama-quantize, a build keeps their `source_type`"""
    source_type: str
    """the ggml type before quantization: the source GGUF's, or that of the BF16 file a converter would write"""
    parts: tuple[Part, ...] = ()

    def __repr__(self) -> str:
        """Leave out the parts, of which some tensors have hundreds."""
        shape = "x".join(map(str, self.shape))
        return f"Tensor({self.name!r}, {shape}, {self.role}, {self.source_type}, {len(self.parts)} parts)"

    @property
    def n_cols(self) -> int:
        return self.shape[0]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[1:])

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


class SourceTensor(NamedTuple):
    """A tensor as stored in a checkpoint file."""

    name: str
    dtype: str
    """safetensors' name (F8_E4M3, BF16, F16, F32, …) or a ggml type's"""
    shape: tuple[int, ...]
    """row-major"""
    file: Path
    offset: int
    """offset of its first byte from the start of the file"""
    nbytes: int


#: the dtype of a tensor that an index lists but whose header is not available; its shape is ()
UNREAD = "unread"


class Source(Protocol):
    """Where the weights are: their stored bytes, and the scales of FP8 weights."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def block(self) -> tuple[int, int]: ...
    def tensor(self, name: str) -> SourceTensor: ...
    def read(self, tensor: SourceTensor, start: int, out: npt.NDArray[np.uint8]) -> None: ...
    def will_need(self, tensor: SourceTensor, start: int, nbytes: int) -> None: ...
    def scale(self, name: str) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Catalogue:
    """The output's tensors, sorted as llama-quantize sorts them, and facts about the model."""

    model: str
    arch: str
    layout: MlaLayout
    """k_b+v_b (current, 1086 tensors for R1), kv_b (2025, 1025), or 'as is' for a GGUF source"""
    n_layers: int
    dense_layers: tuple[int, ...]
    moe_layers: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    kvs: tuple[KV, ...]
    """metadata of a BF16 GGUF of the model, including general.file_type"""
    kvs_complete: bool
    """False when built from a config alone: the tokenizer is unknown, and missing from file sizes"""
    source: Source | None = None
    notes: tuple[str, ...] = field(default=())
    headers: Source | None = None
    """set instead of `source` if headers are known but weights cannot be read"""
    lacks: str = ""
    """why they cannot be read, and what to do: one sentence"""
    partial: str = ""
    """which parts of the given source are missing; also one of the notes"""
    commit: str = ""
    """commit of the repository on the Hub it was read from: 40 hex digits"""

    def layer_groups(self) -> Mapping[str, tuple[int, ...]]:
        """Return the layer numbers of each named group that a recipe's `layers` may slice."""
        n = self.n_layers
        # use_more_bits of src/llama-quant.cpp, with its integer division
        more = tuple(i for i in range(n) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2)
        every = tuple(range(n))
        return {"all": every, "dense": self.dense_layers, "moe": self.moe_layers, "more_bits": more}


_FAMILY = re.compile(r"^blk\.\d+\.")
_BLOCK = re.compile(r"blk\.\s*([+-]?\d+)\.")


def layer_of(name: str) -> int | None:
    """Return the layer number in a GGUF tensor name (blk.N.…), or None."""
    m = _BLOCK.match(name)
    return int(m.group(1)) if m else None


def family_of(name: str) -> str:
    """Return a tensor's name with * for its layer: blk.*.attn_q_a.weight."""
    return _FAMILY.sub("blk.*.", name)


def ranges(numbers: Iterable[int]) -> str:
    """Return 3,4,5,8 as '3-5,8'."""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def output_order(name: str) -> tuple[int, bytes]:
    """Return the sort key of llama-quantize's output order: layer (none first), then the name's bytes.
    Source: src/llama-model-loader.h, weight_name_comparer."""
    layer = layer_of(name)
    return (-1 if layer is None else layer, name.encode())


#: name parts of tensors that llama-quantize never quantizes (src/llama-quant.cpp, tensor_allows_quantization)
_NEVER = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)


#: further ones in glm5-next
_NEVER_IN_GLM5_NEXT = (
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
)


def is_quantizable(name: str, shape: tuple[int, ...], arch: str = "") -> bool:
    """Whether llama-quantize would quantize a tensor with this name and (ne) shape at all, in a model of this arch."""
    n_dims = max((i + 1 for i, n in enumerate(shape) if n > 1), default=1)
    if n_dims < 2 or not name.endswith("weight"):
        return False
    if name in ("position_embd.weight", "token_types.weight"):
        return False
    return not any(part in name for part in (*_NEVER, *(_NEVER_IN_GLM5_NEXT if arch == "glm5-next" else ())))


_ROLE_OF = (
    (re.compile(r"token_embd\.|per_layer_token_embd\."), Role.EMBEDDING),
    (re.compile(r"output\.weight$"), Role.OUTPUT),
    (re.compile(r".*_norm\.(weight|bias)$"), Role.NORM),
    (re.compile(r".*\.(ffn_gate_inp|exp_probs_b)"), Role.ROUTER),
    (re.compile(r".*\.ffn_\w+_exps\."), Role.ROUTED_EXPERT),
    (re.compile(r".*\.ffn_\w+_shexp\."), Role.SHARED_EXPERT),
    (re.compile(r".*\.ffn_"), Role.DENSE_FFN),
    (re.compile(r".*\.attn_"), Role.ATTENTION),
)


def role_of(name: str) -> Role:
    """Return what a tensor does, judged by its GGUF name."""
    return next((role for pattern, role in _ROLE_OF if pattern.match(name)), Role.OTHER)

"""llama.cpp's own mixtures (Q4_K_M, IQ2_XS, …): the type that llama-quantize itself chooses for every tensor.

Source: src/llama-quant.cpp, llama_tensor_get_type_impl and tensor_get_category, of llama-cpp-python
0.3.36. The choice depends on the tensor's name, its position among tensors of its kind (counted in
output order), and a few numbers of the model. `version="2025"` gives what llama-quantize
gave from January 2025 to March 2026, when it did not yet count `attn_kv_b` as a value projection.

The result is the type asked for; the plan decides whether a tensor's rows allow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..base.errors import RecipeError, did_you_mean
from ..gguf.header import decode
from ..gguf.types import QTYPES, file_type
from ..model.catalogue import Catalogue, Tensor

#: file type -> the type of tensors that no special rule covers (llama_ftype_get_default_type)
BASE_TYPES: dict[str, str] = {
    "F32": "F32", "F16": "F16", "BF16": "BF16",
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
    "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S", "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS", "TQ1_0": "TQ1_0", "TQ2_0": "TQ2_0", "MXFP4_MOE": "MXFP4",
}  # fmt: skip

_LOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_Q5_OUTPUT = _LOW | {"IQ3_XXS"}
_EIGHT_EXPERTS_Q5_OUTPUT = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"}
)


#: number of layers by which llama.cpp recognizes a 70 B model (LLM_TYPE_70B in src/models); llama: with grouped heads
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
#: parts of names of the tensors that are Q8_0 in glm5-next
_GLM5_NEXT_Q8 = ("attn_q_a", "attn_q_b", "nextn.eh_proj")


@dataclass(frozen=True)
class Facts:
    """The numbers of a model that llama-quantize's choice depends on."""

    arch: str
    n_layers: int
    n_experts: int
    n_gqa: int
    """query heads for each key/value head; MLA runs with one key/value head"""
    is_70b: bool
    tied: bool
    """there is no output.weight: token_embd also serves as the output"""
    has_imatrix: bool
    version: str = "current"


def facts(catalogue: Catalogue, has_imatrix: bool, version: str = "current") -> Facts:
    """Read the facts from a catalogue's metadata."""
    numbers = {item.key: decode(item) for item in catalogue.kvs if item.key.startswith(f"{catalogue.arch}.")}

    def number(key: str) -> int:
        value = numbers.get(f"{catalogue.arch}.{key}", 0)
        if isinstance(value, list):  # a number for each layer
            value = value[0] if value else 0
        return value if isinstance(value, int) else 0

    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    n_70b = _LAYERS_OF_70B.get(catalogue.arch)
    return Facts(
        arch=catalogue.arch,
        n_layers=number("block_count") or catalogue.n_layers,
        n_experts=number("expert_count"),
        n_gqa=heads // kv_heads if kv_heads else 0,
        is_70b=number("block_count") == n_70b and (catalogue.arch != "llama" or heads != kv_heads),
        tied=not any(t.name == "output.weight" for t in catalogue.tensors),
        has_imatrix=has_imatrix,
        version=version,
    )


@lru_cache(maxsize=1 << 16)
def category(name: str, version: str = "current") -> str:
    """Return the kind that llama-quantize sorts a tensor into by its name; `v` covers everything value-like."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    for part, kind in (
        ("attn_qkv.weight", "qkv"),
        ("attn_kv_b.weight", "v" if version == "current" else "other"),
        ("attn_v.weight", "v"),
        ("attn_k.weight", "k"),
        ("attn_q.weight", "q"),
        ("attn_output.weight", "attn_output"),
        ("ffn_up", "ffn_up"),
        ("ffn_gate", "ffn_gate"),
        ("ffn_down", "ffn_down"),
    ):
        if part in name:
            return kind
    return "other"


def use_more_bits(i: int, n: int) -> bool:
    """Whether layer i of n is among those that the _M mixtures give more bits."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def mixture_types(name: str, tensors: Sequence[Tensor], f: Facts) -> Iterator[str]:
    """Yield the type asked for under file type `name`, for each quantizable tensor in output order.
    Raises RecipeError for an unknown mixture."""
    known = file_type(name)
    if known is None:
        raise RecipeError(
            f"unknown mixture '{name}'{did_you_mean(name, BASE_TYPES)}; there are {', '.join(BASE_TYPES)}"
        )
    chooser = _Chooser(known, f, tensors)
    for t in tensors:
        if t.quantizable:
            yield chooser.choose(t)


class _Chooser:
    """llama-quantize's state while it goes through the tensors."""

    def __init__(self, ft: str, f: Facts, tensors: Sequence[Tensor]) -> None:
        self.ft = ft
        self.f = f
        self.base = BASE_TYPES[ft]
        self.falcon = f.arch == "falcon"
        self.n_v = sum(category(t.name, f.version) in ("v", "qkv") for t in tensors)
        self.seen = {"v": 0, "ffn_down": 0, "ffn_gate": 0, "ffn_up": 0}

    def choose(self, t: Tensor) -> str:
        if self.base in ("F32", "F16", "BF16"):
            return self.base
        kind = category(t.name, self.f.version)
        if self.f.arch == "glm5-next" and any(part in t.name for part in _GLM5_NEXT_Q8):
            return "Q8_0"
        if kind == "output" or (self.f.tied and kind == "embedding"):
            return self._output(t)
        if self.ft == "MXFP4_MOE":
            # in bailingmoe3 the projections of MLA have three dimensions too
            expert = self.f.arch != "bailingmoe3" or kind in ("ffn_up", "ffn_gate", "ffn_down")
            return "MXFP4" if expert and len(t.shape) > 2 and t.shape[2] > 1 else "Q8_0"
        if kind == "embedding":
            return self._embedding()
        if self.ft in _LOW:
            return self._low(kind)
        if kind in ("v", "qkv"):
            return self._value()
        if kind in ("k", "q"):
            return self._key_or_query(kind)
        if kind == "ffn_down":
            return self._down(self._layer(t, kind))
        if kind == "attn_output":
            return self._attn_output()
        if kind in ("ffn_gate", "ffn_up"):
            i, n = self._layer(t, kind), self.f.n_layers
            return "IQ3_XXS" if self.ft == "IQ3_XS" and n // 8 <= i < 7 * n // 8 else self.base
        return self.base

    def _layer(self, t: Tensor, kind: str) -> int:
        """Return the layer as llama-quantize sees it: taken from the name in models with experts, otherwise counted."""
        i = self.seen[kind]
        self.seen[kind] += 1
        return t.layer if self.f.n_experts > 1 and t.layer is not None else i

    def _output(self, t: Tensor) -> str:
        if self.ft == "MXFP4_MOE" or self.falcon or t.n_cols % QTYPES[self.base].block:
            return "Q8_0"
        if self.ft in _Q5_OUTPUT:
            return "Q5_K"
        return self.base if self.base == "Q8_0" else "Q6_K"

    def _embedding(self) -> str:
        if self.ft in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if self.ft in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if self.ft in ("TQ1_0", "TQ2_0") else self.base

    def _low(self, kind: str) -> str:
        """IQ1 and IQ2 mixtures."""
        better = "IQ3_S" if self.ft in ("IQ2_S", "IQ2_M") else "Q2_K"
        if kind in ("v", "qkv"):
            self.seen["v"] += 1
            return "Q4_K" if self.f.n_gqa >= 4 or self.f.n_experts >= 4 else better
        if kind == "k" and self.f.n_experts == 8:
            return "Q4_K"
        if kind == "ffn_down":
            # always a plain count, which includes the tensors of shared experts
            early = self.seen[kind] < self.f.n_layers // 8
            self.seen[kind] += 1
            return better if early else self.base
        if kind == "attn_output":
            if self.f.n_experts == 8:
                return "Q5_K"
            if self.ft in ("IQ1_S", "IQ1_M"):
                return "IQ2_XXS"
            return "IQ3_S" if self.ft in ("IQ2_S", "IQ2_M") else self.base
        return self.base

    def _value(self) -> str:
        i, gqa = self.seen["v"], self.f.n_gqa >= 4
        self.seen["v"] += 1
        new = self.base
        if self.ft == "Q2_K":
            new = "Q4_K" if gqa else "Q3_K"
        elif self.ft in ("Q2_K_S", "IQ3_XS", "IQ3_S") and gqa:
            new = "Q4_K"
        elif self.ft == "IQ3_XXS":
            new = "Q4_K" if gqa else "IQ3_XXS" if self.f.has_imatrix else "IQ3_S"
        elif self.ft == "IQ3_M":
            new = "Q4_K"
        elif self.ft == "Q3_K_M":
            new = "Q5_K" if i < 2 else "Q4_K"
        elif self.ft == "Q3_K_L" or (self.ft in ("IQ4_NL", "IQ4_XS") and gqa):
            new = "Q5_K"
        elif self.ft in ("Q4_K_M", "Q5_K_M") and use_more_bits(i, self.n_v):
            new = "Q6_K"
        elif self.ft == "Q4_K_S" and i < 4:
            new = "Q5_K"
        if self.f.is_70b and new in ("Q3_K", "Q4_K"):
            new = "Q5_K"
        return "Q8_0" if self.f.n_experts == 8 else new

    def _key_or_query(self, kind: str) -> str:
        if kind == "k" and self.f.n_experts == 8:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.ft, self.base)

    def _down(self, i: int) -> str:
        n = self.f.n_layers
        early = i < n // 8
        if self.ft == "Q2_K":
            return "Q3_K"
        if self.ft == "Q2_K_S":
            return "Q4_K" if early else self.base
        if self.ft == "IQ3_XXS" and not self.f.has_imatrix:
            return "Q4_K" if early else "Q3_K"
        if self.ft == "Q3_K_M":
            if i < n // 16:
                return "Q5_K"
            return "Q4_K" if not self.falcon or use_more_bits(i, n) else "Q3_K"
        if self.ft == "IQ3_M" and (early or (self.f.n_experts == 8 and use_more_bits(i, n))):
            return "Q4_K"
        if self.ft == "Q3_K_L":
            return "Q4_K" if self.falcon else "Q5_K"
        if self.ft == "Q4_K_M" and self.falcon:
            return "Q6_K" if i < n // 16 else "Q5_K" if use_more_bits(i, n) else "Q4_K"
        if self.ft in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if use_more_bits(i, n) else self.base
        if self.ft in ("IQ4_NL", "IQ4_XS") and early and not self.f.has_imatrix:
            return "Q5_K"
        if self.ft == "Q4_K_S" and early and not self.falcon:
            return "Q5_K"
        if self.ft in ("Q4_0", "Q5_0") and self.f.has_imatrix and early:
            return "Q4_1" if self.ft == "Q4_0" else "Q5_1"
        return self.base

    def _attn_output(self) -> str:
        if self.falcon:
            return "Q4_K" if self.ft == "Q3_K_L" else self.base
        if self.f.n_experts == 8:
            return "Q5_K" if self.ft in _EIGHT_EXPERTS_Q5_OUTPUT else self.base
        return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(
            self.ft, self.base
        )

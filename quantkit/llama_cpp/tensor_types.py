"""Tensor types in llama-quantize's notation: --tensor-type-file, one line `regex=type` per rule."""

from __future__ import annotations

import re
from collections.abc import Iterable


def ggml_name(type_: str) -> str:
    """Return a type as ggml_type_name writes it: q4_K, iq2_xxs, bf16."""
    return re.sub(r"^(q\d)_k$", r"\1_K", type_.lower())


def escape(name: str) -> str:
    """Return a regex that matches only this name."""
    return re.sub(r"([.\\+*?\[\]^$(){}|])", r"\\\1", name)


def tensor_type_file(types: Iterable[tuple[str, str]]) -> str:
    """Return the file for tensors by name and type, one anchored rule each. It covers every tensor, so
    llama-quantize's own mixture and its counters decide nothing."""
    return "\n".join(f"^{escape(name)}$={type_.lower()}" for name, type_ in types) + "\n"

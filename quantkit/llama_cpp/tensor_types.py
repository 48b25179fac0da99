"""Types of tensors in llama-quantize's words: --tensor-type-file, a line `regex=type` for each rule."""

from __future__ import annotations

import re
from collections.abc import Iterable


def ggml_name(type_: str) -> str:
    """A type as ggml_type_name writes it: q4_K, iq2_xxs, bf16."""
    return re.sub(r"^(q\d)_k$", r"\1_K", type_.lower())


def escape(name: str) -> str:
    """A name as a regex that matches it alone."""
    return re.sub(r"([.\\+*?\[\]^$(){}|])", r"\\\1", name)


def tensor_type_file(types: Iterable[tuple[str, str]]) -> str:
    """The file for tensors by name and type, one anchored rule for each: total, so that llama-quantize's own mixture
    and its counters decide nothing."""
    return "\n".join(f"^{escape(name)}$={type_.lower()}" for name, type_ in types) + "\n"

"""llama.cpp's arch `qwen2`: the graph of llama with pairs half a head apart, and biases on q, k and v."""

from __future__ import annotations

from .llama import Llama


class Qwen2(Llama):
    """See quantkit.forward.layer.Family."""

    neox = True
    has_factors = False

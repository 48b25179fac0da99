"""Models known by name, for planning without a download: their config.json is shipped with quantkit."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

#: name -> name of its config; releases of the same shape share one
MODELS = {
    "deepseek-r1": "deepseek-r1",
    "deepseek-r1-zero": "deepseek-r1",
    "deepseek-r1-0528": "deepseek-r1",
    "deepseek-v3": "deepseek-r1",
    "deepseek-v3-0324": "deepseek-r1",
    "deepseek-v3.1": "deepseek-r1",
    "deepseek-v2": "deepseek-v2",
    "deepseek-v2.5": "deepseek-v2",
    "deepseek-v2-lite": "deepseek-v2-lite",
    "deepseek-r1-distill-llama-8b": "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-llama-70b": "deepseek-r1-distill-llama-70b",
    "deepseek-r1-distill-qwen-1.5b": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-7b": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-14b": "deepseek-r1-distill-qwen-14b",
    "deepseek-r1-distill-qwen-32b": "deepseek-r1-distill-qwen-32b",
    "kimi-k2": "kimi-k2",
}


def config(name: str) -> dict[str, Any]:
    """Return the config.json of a known model."""
    text = files("quantkit.model.families").joinpath("configs").joinpath(f"{MODELS[name]}.json").read_text("utf-8")
    value: dict[str, Any] = json.loads(text)
    return value


#: general.architecture -> the model on which recipes for this arch are tried
REFERENCES = {
    "deepseek2": "deepseek-r1",
    "llama": "deepseek-r1-distill-llama-8b",
    "qwen2": "deepseek-r1-distill-qwen-7b",
}

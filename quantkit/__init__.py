"""quantkit: dynamic mixed-precision GGUFs of DeepSeek-V3/R1, planned to the byte and built in one pass.

    import quantkit as qk
    plan = qk.plan(qk.open_model("deepseek-r1"), qk.load_recipe("UD-IQ1_S"))
    plan.tensor_bytes, plan.bpw, plan["blk.3.ffn_down_exps.weight"].type

`__all__` is what is public, with docs/api.md as its page. Nothing is imported before it is used; __init__.pyi has the
types.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from quantkit.base.version import __version__

__all__ = [
    "BuildOptions",
    "BuildResult",
    "Catalogue",
    "DamageError",
    "Finding",
    "Imatrix",
    "ImatrixError",
    "InternalCheckError",
    "KernelError",
    "OutputError",
    "Plan",
    "Planned",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "SourceError",
    "Tensor",
    "ToolError",
    "UnsupportedError",
    "Verdict",
    "WeightError",
    "__version__",
    "build",
    "dequantize",
    "load_recipe",
    "open_imatrix",
    "open_model",
    "plan",
    "quantize",
    "verify",
]

#: where what is not in quantkit.api or quantkit.base.errors comes from
_HOMES = {
    "Catalogue": "model.catalogue",
    "Tensor": "model.catalogue",
    "Imatrix": "model.imatrix",
    "Plan": "planning.plan",
    "Planned": "planning.plan",
    "Recipe": "recipe.load",
    "Finding": "verifying.verdict",
    "Verdict": "verifying.verdict",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    home = _HOMES.get(name, "base.errors" if name.endswith("Error") else "api")
    return getattr(import_module(f"quantkit.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

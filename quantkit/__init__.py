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
    "Check",
    "DamageError",
    "Evaluation",
    "Finding",
    "Imatrix",
    "ImatrixError",
    "InternalCheckError",
    "KernelError",
    "Optimized",
    "OutputError",
    "Plan",
    "Planned",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "Sensitivity",
    "SourceError",
    "Study",
    "StudyOptions",
    "StudyResults",
    "Tensor",
    "TextError",
    "ToolError",
    "TuneOptions",
    "Tuned",
    "UnsupportedError",
    "Verdict",
    "WeightError",
    "__version__",
    "build",
    "check_imatrix",
    "dequantize",
    "evaluate",
    "fetched_weights",
    "forward",
    "imatrix",
    "load_recipe",
    "open_imatrix",
    "open_model",
    "optimize",
    "plan",
    "quantize",
    "run_study",
    "second_moments",
    "sensitivity",
    "text",
    "tune_rounding",
    "verify",
]

#: where what is not in quantkit.api or quantkit.base.errors comes from
_HOMES = {
    "Catalogue": "model.catalogue",
    "Check": "planning.imatrix_check",
    "Tensor": "model.catalogue",
    "Imatrix": "imatrix.matrix",
    "Plan": "planning.plan",
    "Planned": "planning.plan",
    "Recipe": "recipe.load",
    "Optimized": "lab.allocation.optimized",
    "Sensitivity": "lab.allocation.damage",
    "Finding": "verifying.verdict",
    "Verdict": "verifying.verdict",
    "Evaluation": "lab.evaluation.scores",
    "evaluate": "lab.scripting",
    "fetched_weights": "lab.scripting",
    "run_study": "lab.scripting",
    "Study": "lab.scripting",
    "StudyOptions": "lab.scripting",
    "StudyResults": "lab.scripting",
    "second_moments": "lab.scripting",
    "tune_rounding": "lab.scripting",
    "TuneOptions": "lab.rounding_policy.tuning",
    "Tuned": "lab.rounding_policy.tuning",
}
#: rooms that are public as they are: modules
_ROOMS = ("forward", "imatrix", "text")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    if name in _ROOMS:
        return import_module(f"quantkit.{name}")
    home = _HOMES.get(name, "base.errors" if name.endswith("Error") else "api")
    return getattr(import_module(f"quantkit.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

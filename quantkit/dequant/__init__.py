"""FP8 checkpoints to floats: a Hugging Face checkpoint in, the same one in BF16, F16 or F32 out.

    weight.float() * scale of its block -> the dtype asked for, one rounding each

`plan` says what the output is, to the byte, from headers alone; `decode` has the arithmetic, native
and through torch, with the same bytes; `run` moves the data and can go on after an interruption.
Tensors that are not FP8 keep their dtype and bytes, as DeepSeek's own fp8_cast_bf16.py has it.
"""

from .plan import DequantOptions, DequantPlan, plan_dequant
from .run import Job, prepare, run

__all__ = ["DequantOptions", "DequantPlan", "Job", "plan_dequant", "prepare", "run"]

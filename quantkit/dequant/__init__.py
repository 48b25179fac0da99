"""FP8 checkpoints to floats: reads a Hugging Face checkpoint, writes the same one in BF16, F16 or F32.

    weight.float() * scale of its block -> the dtype asked for, rounded once

`plan` works out the output, to the byte, from headers alone; `decode` has the arithmetic, native
and in torch, with the same bytes; `run` moves the data and can resume after an interruption.
Tensors that are not FP8 keep their dtype and bytes, as in DeepSeek's own fp8_cast_bf16.py.
"""

from .plan import DequantOptions, DequantPlan, plan_dequant
from .run import Job, prepare, run

__all__ = ["DequantOptions", "DequantPlan", "Job", "plan_dequant", "prepare", "run"]

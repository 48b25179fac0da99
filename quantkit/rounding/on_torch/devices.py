"""Devices by name."""

from __future__ import annotations

import torch

from ...base.errors import KernelError
from ..options import Device

#: torch on the CPU: to try it where there is no GPU
ON_CPU = "torch"


def find(name: str) -> Device | None:
    """The device that is called cuda, cuda:1, torch (torch on the CPU), or auto: cuda where there is one, else None,
    which is the CPU's own kernels. Raises KernelError for one that is not here."""
    if name == "auto":
        return find("cuda") if torch.cuda.is_available() else None
    if name == ON_CPU:
        return Device("cpu", f"the CPU by torch {torch.__version__}")
    if not torch.cuda.is_available():
        lacks = f"is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "has no CUDA"
        raise KernelError(f"torch {torch.__version__} {lacks}; rows are rounded on the CPU without --rounding-device")
    device = torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise KernelError(
            f"device '{name:.40}' is not here: torch finds {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return Device(name, f"{torch.cuda.get_device_name(device)} by torch {torch.__version__}")

"""--rounding-device: where rows are rounded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from quantkit.rounding.options import Device


def a_device(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Raises BadParameter for what is not called cpu, auto, torch, cuda or cuda:1."""
    if not re.fullmatch(r"cpu|auto|torch|cuda(:[0-9]{1,2})?", value):
        raise click.BadParameter(f"'{value:.40}' is not a device that rounds rows: cpu, cuda, cuda:1, auto, torch")
    return value


def device_called(name: str) -> Device | None:
    """The device of that name; None for the CPU's own kernels. Raises UnsupportedError without torch, KernelError for
    a device that is not here."""
    if name == "cpu":
        return None
    from quantkit.lab import require_torch

    require_torch()
    from quantkit.rounding.on_torch.devices import find

    return find(name)

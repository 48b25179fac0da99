"""Where models are computed, and how weights get there."""

from __future__ import annotations

import torch

from ..base.errors import KernelError

DEVICES = ("cpu", "cuda")


class Transfer:
    """Puts tensors on a device, from any thread. What the device computes meanwhile does not wait: the copies to a GPU
    have a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def put(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same values, when they are there; `values` may be overwritten then."""
        if self._stream is None:
            return values.to(self._device, dtype)
        with torch.cuda.stream(self._stream):
            out = values.to(self._device, non_blocking=True).to(dtype)
            arrived = self._stream.record_event()
        arrived.synchronize()
        return out

    def used_here(self, tensor: torch.Tensor) -> None:
        """Note that the device's present stream uses a tensor that was put there: its memory, which belongs to the
        stream of copies, is not used again before that is done."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))


def device_of(name: str) -> torch.device:
    """The device to compute on. Raises KernelError where torch has it not."""
    if name.split(":", maxsplit=1)[0] not in DEVICES:
        raise KernelError(f"device '{name:.40}' is not one that models are computed on: cpu, cuda, cuda:1, …")
    if name.startswith("cuda") and not torch.cuda.is_available():
        lacks = f"is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "has no CUDA"
        raise KernelError(f"torch {torch.__version__} {lacks}; leave out --device {name}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise KernelError(f"device '{name:.40}' is not one that models are computed on: cpu, cuda, cuda:1, …") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KernelError(
            f"device '{name:.40}' is not here: torch finds {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return device

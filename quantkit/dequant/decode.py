"""FP8 rows to rows of BF16, F16 or F32: float32(code) * scale of its block, then rounded to nearest even.

Two decoders, the same bytes: `native` a few rows at a time in the nearest cache, and `Torch` on a
torch device. Both say only whether every value is finite in the output's dtype; `refuse` then finds
the one that is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..base.errors import InternalCheckError, KernelError, WeightError
from ..model.catalogue import SourceTensor

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: the smallest magnitude that rounds to infinity: half a step above the largest finite value
OVERFLOW = {"F32": np.inf, "F16": 65520.0, "BF16": 2.0**128 - 2.0**119}


class Decoder(Protocol):
    """Rows of an FP8 weight to a dtype: see `native`."""

    @property
    def slab_values(self) -> int:
        """Values to give it at once."""

    def __call__(self, stored: U8, row: int, scale: F32, block: tuple[int, int], dtype: str, out: U8) -> bool: ...


class Native:
    """quantkit's own kernel where the processor can run it, else ggml."""

    slab_values = 1 << 20

    def __call__(self, stored: U8, row: int, scale: F32, block: tuple[int, int], dtype: str, out: U8) -> bool:
        """Fill `out`, uint8 [n_rows, bytes of a row], with rows row… of a weight.

        stored: uint8 [n_rows, n_cols], E4M3 codes; scale: float32 [ceil(rows/block[0]), ceil(n_cols/block[1])], of
        the whole weight; dtype: a key of OVERFLOW. False, with `out` unfinished, where a value is not finite.
        """
        first = np.array([row], np.uint64)
        rows = kernels.StoredRows(stored, "F8_E4M3", stored.shape[1], first, scale, block, False)
        if kernels.quantize_stored(rows, dtype, None, out):
            return True
        values = np.empty(stored.shape, np.float32)
        kernels.e4m3_to_f32(stored, scale, row, block, values, False)
        if _unfit(values, dtype) is not None:
            return False
        kernels.quantize(values, dtype, out=out)
        return True


class Torch:
    """torch on any of its devices, from the extra `lab`. Raises KernelError where there is no torch, or it has not
    that device, or not the memory."""

    #: an expert of R1 is 14.7 M values; larger than `Native`'s, for the calls
    slab_values = 1 << 23

    def __init__(self, device: str) -> None:
        try:
            import torch
        except ModuleNotFoundError:
            raise KernelError(
                f"torch, which computes on {device}, is not installed; run: pip install 'quantkit[lab]', or leave out "
                f"--device {device}: the bytes are the same"
            ) from None

        self._dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if device.startswith("cuda") and not torch.cuda.is_available():
            lacks = f"is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "has no CUDA"
            raise KernelError(f"torch {torch.__version__} {lacks}; leave out --device {device}: the bytes are the same")
        self.device = torch.device(device)

    def __call__(self, stored: U8, row: int, scale: F32, block: tuple[int, int], dtype: str, out: U8) -> bool:
        """As `Native`."""
        import torch

        try:
            made = self._product(stored, row, scale, block).to(self._dtypes[dtype])
            if not bool(torch.isfinite(made).all()):
                return False
            torch.from_numpy(out).copy_(made.view(torch.uint8))
        except RuntimeError as e:
            raise KernelError(
                f"torch on {self.device}: {str(e).splitlines()[0]:.200}; use fewer threads, or leave out --device"
            ) from None
        return True

    def _product(self, stored: U8, row: int, scale: F32, block: tuple[int, int]) -> torch.Tensor:
        """float32 [n_rows, n_cols] on the device."""
        import torch

        n_rows, n_cols = stored.shape
        weight = torch.from_numpy(stored).to(self.device).view(torch.float8_e4m3fn).to(torch.float32)
        first, last = row // block[0], (row + n_rows - 1) // block[0]
        of_rows = torch.arange(row, row + n_rows, device=self.device) // block[0] - first
        scales = torch.from_numpy(scale[first : last + 1]).to(self.device)
        columns = scales.repeat_interleave(min(block[1], n_cols), 1)[:, :n_cols]
        weight *= columns[of_rows]
        return weight


def refuse(tensor: SourceTensor, stored: U8, row: int, scale: F32, block: tuple[int, int], dtype: str) -> None:
    """Raise WeightError for the first value of rows row… that is not finite in the dtype."""
    values = np.empty(stored.shape, np.float32)
    kernels.e4m3_to_f32(stored, scale, row, block, values, False)
    at = _unfit(values, dtype)
    if at is None:
        raise InternalCheckError(f"'{tensor.name}', rows from {row}: refused, but every value fits {dtype}")
    code, s = stored[at], scale[(row + at[0]) // block[0], at[1] // block[1]]
    what = f"{tensor.file}: '{tensor.name}', row {row + at[0]}, column {at[1]}"
    if np.isfinite(values[at]):
        raise WeightError(
            f"{what}: {values[at]:.6g} is out of the range of {dtype}, which ends at "
            f"{65504 if dtype == 'F16' else 3.38953139e38:,}; choose another --dtype"
        )
    raise WeightError(
        f"{what} is {values[at]} (code 0x{code:02x} with the scale {s:.6g}); the checkpoint is damaged, download that "
        "shard again"
    )


def _unfit(values: F32, dtype: str) -> tuple[int, int] | None:
    """Row and column of the first value of float32 [n_rows, n_cols] that is not finite in the dtype."""
    unfit = ~(np.abs(values) < OVERFLOW[dtype])
    at = int(unfit.argmax())
    return divmod(at, values.shape[1]) if unfit.flat[at] else None

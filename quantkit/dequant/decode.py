"""FP8 rows to rows of BF16, F16 or F32: float32(code) * scale of its block, then rounded to nearest, ties to even.

There are two decoders with the same bytes and the same errors: `Native`, a few rows at a time in the nearest cache, and
`Torch`, on a torch device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..base.errors import KernelError, WeightError
from ..model.catalogue import SourceTensor

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class Fp8Rows(NamedTuple):
    """Rows row… of a weight with E4M3 codes."""

    tensor: SourceTensor
    row: int
    stored: U8
    """the codes, [n_rows, n_cols]"""
    scale: F32
    """scales of the whole weight, [ceil(rows/block[0]), ceil(n_cols/block[1])]"""
    block: tuple[int, int]

    def refusal(self, row: int, column: int, value: float, dtype: str) -> WeightError:
        """Return the error for a value that is not finite in the dtype: the float32 product at that row of these rows
        and that column."""
        code, s = self.stored[row, column], self.scale[(self.row + row) // self.block[0], column // self.block[1]]
        what = f"{self.tensor.file}: '{self.tensor.name}', row {self.row + row}, column {column}"
        if np.isfinite(value):
            return WeightError(
                f"{what}: {value:.6g} is out of the range of {dtype}, which ends at "
                f"{65504 if dtype == 'F16' else 3.38953139e38:,}; choose another --dtype"
            )
        return WeightError(
            f"{what} is {value} (code 0x{code:02x} with the scale {s:.6g}); the checkpoint is damaged, download that "
            "shard again"
        )


class Decoder(Protocol):
    """Decodes rows of an FP8 weight to a dtype: see `Native`."""

    @property
    def slab_values(self) -> int:
        """How many values to pass at once."""

    def __call__(self, rows: Fp8Rows, dtype: str, out: U8) -> None: ...


class Native:
    """Decodes with quantkit's own kernel if the processor can run it, else with ggml."""

    slab_values = 1 << 20

    def __call__(self, rows: Fp8Rows, dtype: str, out: U8) -> None:
        """Fill `out`, uint8 [n_rows, bytes of a row], with the rows as BF16, F16 or F32. Raises WeightError for the
        first value that is not finite in the dtype."""
        first = np.array([rows.row], np.uint64)
        stored = kernels.StoredRows(
            rows.stored, "F8_E4M3", rows.stored.shape[1], first, rows.scale, rows.block, round_bf16=False
        )
        try:
            if kernels.can_quantize_stored(stored.dtype, dtype):
                kernels.quantize_stored(stored, dtype, None, out)
            else:
                kernels.quantize(stored.decode(), dtype, out=out)
        except kernels.UnfitWeightError as e:
            raise rows.refusal(e.row, e.column, e.value, dtype) from None


class Torch:
    """Decodes with torch, of the extra `lab`, on any of its devices. Raises KernelError if torch is missing, lacks the
    device, or runs out of memory."""

    #: larger than `Native`'s, since each call costs more; an expert of R1 is 14.7 M values
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

    def __call__(self, rows: Fp8Rows, dtype: str, out: U8) -> None:
        """Do what `Native` does."""
        import torch

        try:
            product = self._product(rows)
            made = product.to(self._dtypes[dtype])
            finite = torch.isfinite(made)
            if not bool(finite.all()):
                row, column = torch.nonzero(~finite)[0].tolist()
                raise rows.refusal(row, column, float(product[row, column]), dtype)
            torch.from_numpy(out).copy_(made.view(torch.uint8))
        except RuntimeError as e:
            raise KernelError(
                f"torch on {self.device}: {str(e).splitlines()[0]:.200}; use fewer threads, or leave out --device"
            ) from None

    def _product(self, rows: Fp8Rows) -> torch.Tensor:
        """Return the products, float32 [n_rows, n_cols], on the device."""
        import torch

        (n_rows, n_cols), block = rows.stored.shape, rows.block
        weight = torch.from_numpy(rows.stored).to(self.device).view(torch.float8_e4m3fn).to(torch.float32)
        first, last = rows.row // block[0], (rows.row + n_rows - 1) // block[0]
        of_rows = torch.arange(rows.row, rows.row + n_rows, device=self.device) // block[0] - first
        scales = torch.from_numpy(rows.scale[first : last + 1]).to(self.device)
        columns = scales.repeat_interleave(min(block[1], n_cols), 1)[:, :n_cols]
        weight *= columns[of_rows]
        return weight

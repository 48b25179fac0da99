import numpy as np
import numpy.typing as npt

def e4m3_to_f32(
    src: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float32],
    row0: int,
    block_rows: int,
    block_cols: int,
    round_bf16: bool,
    out: npt.NDArray[np.float32],
    set: str = "",
) -> None: ...
def bf16_to_f32(src: npt.NDArray[np.uint16], out: npt.NDArray[np.float32], set: str = "") -> None: ...
def f16_to_f32(src: npt.NDArray[np.uint16], round_bf16: bool, out: npt.NDArray[np.float32], set: str = "") -> None: ...
def f32_to_f32(src: npt.NDArray[np.float32], round_bf16: bool, out: npt.NDArray[np.float32], set: str = "") -> None: ...
def first_nonfinite(x: npt.NDArray[np.float32], set: str = "") -> int: ...
def kernel_sets() -> list[tuple[str, list[str]]]: ...
def quantize(
    set: str,
    type: str,
    rows: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint8],
) -> None: ...
def quantize_rows(
    set: str,
    type: str,
    dtype: str,
    stored: npt.NDArray[np.uint8],
    n_cols: int,
    round_bf16: bool,
    first_rows: npt.NDArray[np.uint64],
    scale: npt.NDArray[np.float32] | None,
    block_rows: int,
    block_cols: int,
    importance: npt.NDArray[np.float32] | None,
    largest_weight: float,
    largest_product: float,
    out: npt.NDArray[np.uint8],
) -> bool: ...
def set_codebook(name: str, values: npt.NDArray[np.int8]) -> None: ...

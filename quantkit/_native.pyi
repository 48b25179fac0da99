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
) -> bool:
    """Whether every weight and importance is within the limits; where not, `out` is unfinished."""

def set_codebook(name: str, values: npt.NDArray[np.int8]) -> None: ...
def feedback_sets() -> list[tuple[str, list[str]]]: ...
def feedback_quantize(
    set: str,
    type: str,
    rows: npt.NDArray[np.float32],
    u: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    search: bool,
    out: npt.NDArray[np.uint8],
) -> bool:
    """False where a row's errors grew beyond float32."""

def feedback_pass_on(
    set: str,
    x: npt.NDArray[np.float32],
    column: int,
    values: npt.NDArray[np.float32],
    u: npt.NDArray[np.float32],
) -> None: ...
def feedback_factor(
    set: str, h: npt.NDArray[np.float32], damp: float, exponent: int, u: npt.NDArray[np.float32]
) -> int:
    """The column at which h is not positive definite, with `u` unfinished; or n."""

def feedback_products(
    set: str,
    w: npt.NDArray[np.float32],
    q: npt.NDArray[np.float32],
    h: npt.NDArray[np.float32],
    out: npt.NDArray[np.float64],
) -> None: ...

"""Rows quantized from their stored form: the same blocks and refusals as for the same rows decoded first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from quantkit import kernels
from quantkit.base.errors import KernelError, QuantkitError, WeightError
from quantkit.kernels import F32, U8, StoredRows
from quantkit.kernels import own as own_kernels

TYPES = sorted(set().union(*kernels.OWN.values()))
ONES = np.ones(512, np.float32)

pytestmark = pytest.mark.skipif(not TYPES, reason="this processor has none of quantkit's own kernels")


def dealt(values: F32, n_runs: int = 1) -> StoredRows:
    """float32 rows as dealt by a source from this many runs, which begin at rows 100, 200 … of its matrix."""
    runs = [values[i::n_runs] for i in range(n_runs)]
    stored = np.ascontiguousarray(np.concatenate(runs)).view(np.uint8)
    first = np.array([100 * (i + 1) for i in range(n_runs)], np.uint64)
    return StoredRows(stored, "F32", values.shape[1], first, None, (1, 1), False)


def fp8(codes: U8, scale: F32) -> StoredRows:
    return StoredRows(codes, "F8_E4M3", codes.shape[1], np.zeros(1, np.uint64), scale, (128, 128), True)


def rows_with(value: float, at: tuple[int, int] = (5, 300), like: float = 0.5) -> F32:
    rows = np.full((7, 512), like, np.float32)
    rows[at] = value
    return rows


class Refused(NamedTuple):
    name: str
    rows: StoredRows
    imatrix: F32 | None
    error: type[QuantkitError]
    message: str


SCALE = np.ones((1, 4), np.float32)
CODES = np.full((7, 512), 0x38, np.uint8)
NAN_CODE = CODES.copy()
NAN_CODE[6, 511] = 0xFF
REFUSED = {
    "NaN": Refused("Q4_K", dealt(rows_with(np.nan)), None, kernels.UnfitWeightError, "row 5, column 300 is nan"),
    "Inf, the first of two": Refused(
        "Q8_0", dealt(np.minimum(rows_with(-np.inf), rows_with(-np.inf, (6, 0)))), None, kernels.UnfitWeightError,
        "row 5, column 300 is -inf",
    ),
    "NaN, rows dealt from three runs": Refused(
        "Q4_K", dealt(rows_with(np.nan), 3), None, kernels.UnfitWeightError, "row 5, column 300 is nan"
    ),
    "FP8's NaN": Refused(
        "Q4_K", fp8(NAN_CODE, SCALE), None, kernels.UnfitWeightError, "row 6, column 511 is nan"
    ),
    "FP8 with an infinite product": Refused(
        "BF16", fp8(CODES, SCALE * np.float32(np.inf)), None, kernels.UnfitWeightError, "row 0, column 0 is inf"
    ),
    "no bfloat16": Refused(
        "BF16", dealt(rows_with(3.4e38)), None, kernels.UnfitWeightError,
        "weights out of the range of BF16: one would be stored as Inf",
    ),
    "no float16": Refused(
        "F16", dealt(rows_with(65520)), None, kernels.UnfitWeightError,
        "weights out of the range of F16: one would be stored as Inf",
    ),
    "a scale that is none": Refused(
        "Q4_K", dealt(rows_with(1e10)), None, WeightError,
        "weights out of the range of Q4_K: a block's scale is not valid",
    ),
    "larger than a grid": Refused(
        "IQ2_XXS", dealt(rows_with(1e10)), ONES, WeightError, "weights out of the range of IQ2_XXS: up to 1e+10"
    ),
    "sums that overflow": Refused(
        "IQ1_S", dealt(rows_with(1e6)), ONES * np.float32(1e30), WeightError,
        "weights of up to 1e+06 with an importance of up to 1e+30 overflow the search of IQ1_S; is the importance "
        "matrix damaged?",
    ),
    "no importance": Refused(
        "IQ2_XXS", dealt(rows_with(1)), None, KernelError,
        "IQ2_XXS cannot be quantized without an importance matrix",
    ),
    "a negative importance": Refused(
        "Q4_K", dealt(rows_with(1)), -ONES, KernelError, "the imatrix holds values that are NaN, Inf or negative"
    ),
    "a negative importance that is not used": Refused(
        "Q8_0", dealt(rows_with(1)), -ONES, KernelError, "the imatrix holds values that are NaN, Inf or negative"
    ),
}  # fmt: skip


def blocks_for(r: Refused) -> U8:
    return np.empty(
        (len(r.rows.stored), kernels.quantize(np.ones((1, 512), np.float32), r.name, ONES).shape[1]), np.uint8
    )


@pytest.mark.parametrize("r", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("kernel", list(kernels.OWN))
def test_a_refusal_is_that_of_the_decoded_rows(r: Refused, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if r.name not in kernels.OWN[kernel]:
        pytest.skip(f"no {kernel} kernel for {r.name}")
    monkeypatch.setenv("QUANTKIT_KERNELS", kernel)
    assert kernels.can_quantize_stored(r.rows.dtype, r.name)
    said: list[Any] = []
    for quantize in (
        lambda: kernels.quantize_stored(r.rows, r.name, r.imatrix, blocks_for(r)),
        lambda: kernels.quantize(r.rows.decode(), r.name, r.imatrix),
    ):
        with pytest.raises(r.error) as e:
            quantize()
        assert type(e.value) is r.error
        said.append((str(e.value), getattr(e.value, "row", None), getattr(e.value, "column", None)))
    assert said[0][0] == r.message
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_the_largest_that_a_float_stores_is_not_refused(name: str) -> None:
    least = {"F16": np.float32(65520), "BF16": np.float32(2.0**128 - 2.0**119)}[name]
    rows = dealt(rows_with(float(np.nextafter(least, np.float32(0)))))
    out = np.empty((7, 1024), np.uint8)
    kernels.quantize_stored(rows, name, None, out)
    assert out.tobytes() == kernels.quantize(rows.decode(), name, kernel="ggml").tobytes()
    with pytest.raises(kernels.UnfitWeightError) as e:
        kernels.quantize_stored(dealt(rows_with(float(least))), name, None, out)
    assert (e.value.row, e.value.column, e.value.value) == (5, 300, float(least))


@pytest.mark.parametrize("n_runs", [1, 2, 3, 9])
def test_decoded_rows_are_in_the_order_of_the_output(n_runs: int) -> None:
    values = np.arange(7 * 512, dtype=np.float32).reshape(7, 512)
    rows = dealt(values, min(n_runs, 7))
    assert np.array_equal(rows.decode(), values)
    out = np.empty((7, 2048), np.uint8)
    kernels.quantize_stored(rows, "F32", None, out)
    assert out.tobytes() == values.tobytes()


def test_where_there_is_no_kernel_that_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dealt(rows_with(1))
    assert kernels.can_quantize_stored("BF16", "Q8_0")
    assert not kernels.can_quantize_stored("Q8_0", "Q8_0")
    assert not kernels.can_quantize_stored("F32", "TQ1_0")
    with pytest.raises(KernelError) as e:
        kernels.quantize_stored(rows, "TQ1_0", None, np.empty((7, 108), np.uint8))
    assert str(e.value) == "no kernel takes stored F32 to TQ1_0 in one pass; decode the rows first"
    monkeypatch.setenv("QUANTKIT_KERNELS", "ggml")
    assert not kernels.can_quantize_stored("BF16", "Q8_0")
    monkeypatch.delenv("QUANTKIT_KERNELS")
    monkeypatch.setattr(own_kernels, "OWN", {})
    assert not kernels.can_quantize_stored("BF16", "Q8_0")

"""Checks on arrays before their pointers are used; arrays are never converted."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.errors import KernelError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def describe(array: npt.NDArray[Any]) -> str:
    """Return an array's dtype, shape and order, for messages."""
    order = "" if array.flags.c_contiguous else ", not C-ordered"
    return f"{array.dtype} {list(array.shape)}{order}"


def require(name: str, array: npt.NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless the array is exactly this: conversion would make a copy, and ggml checks nothing."""
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise KernelError(f"{name} must be C-ordered {np.dtype(dtype)} {list(shape)}, not {describe(array)}")

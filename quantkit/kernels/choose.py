"""Choosing the kernel for a type: the best that keeps the byte contract, or the one asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..base.errors import KernelError, did_you_mean
from ..gguf.types import INTEGER_TYPES, QTYPES, QType
from . import ggml, own

KERNELS = ("avx512", "avx2", "neon", "ggml", "ggml-pinned")
#: types for which the wheel's ggml gives other bytes than the contract
DIFFERS_IN_WHEEL = frozenset({"IQ1_M"})
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
_ARCHITECTURES: Mapping[str, tuple[str, ...]] = {"avx512": _X86, "avx2": _X86, "neon": _ARM}


def select(qt: QType, kernel: str | None = None) -> str:
    """Return the name of the kernel that quantizes to this type: the one asked for; else the one in QUANTKIT_KERNELS,
    if it has the type; else the best that keeps the byte contract. Raises KernelError."""
    if kernel is not None:
        _require_known(kernel)
        if kernel not in ("ggml", "ggml-pinned") and qt.name not in own.OWN[kernel]:
            raise KernelError(f"the kernels '{kernel}' have none for {qt.name}")
        return kernel
    forced = os.environ.get("QUANTKIT_KERNELS") or None
    if forced is not None:
        _require_known(forced)
        if forced in ("ggml", "ggml-pinned") or qt.name in own.OWN[forced]:
            return forced
    else:
        for name, types in own.OWN.items():
            if qt.name in types:
                return name
    if qt.name not in DIFFERS_IN_WHEEL:
        return "ggml"
    if not ggml.has_pinned():
        raise KernelError(
            f"{qt.name} needs the ggml of the pinned llama.cpp, since the wheel's gives other bytes for it; "
            "run: quantkit toolchain install"
        )
    return "ggml-pinned"


def check_choice() -> None:
    """Raise KernelError, before any work, if QUANTKIT_KERNELS names kernels that are not available here."""
    forced = os.environ.get("QUANTKIT_KERNELS") or None
    if forced is not None:
        try:
            _require_known(forced)
        except KernelError as e:
            raise KernelError(f"QUANTKIT_KERNELS: {e}") from None


def _require_known(kernel: str) -> None:
    machine = os.uname().machine
    here = [name for name in KERNELS if machine in _ARCHITECTURES.get(name, (machine,))]
    if kernel not in KERNELS:
        raise KernelError(
            f"unknown kernels '{kernel:.40}'{did_you_mean(kernel, here)}; on {machine} there are {', '.join(here)}"
        )
    if kernel not in here:
        raise KernelError(f"the kernels '{kernel}' are not for {machine}, where there are {', '.join(here)}")
    if kernel == "ggml-pinned":
        ggml.pinned_library()
    if kernel not in ("ggml", "ggml-pinned", *own.OWN):
        raise KernelError(
            f"this processor cannot run the kernels '{kernel}'; it can run {', '.join((*own.OWN, 'ggml'))}"
        )


def active() -> dict[str, str]:
    """Return type name -> the kernel now used for it, with its version; 'none: …' if there is none."""
    out = {}
    for name, qt in QTYPES.items():
        if name in INTEGER_TYPES:
            continue
        try:
            kernel = select(qt)
            out[name] = kernel if kernel in own.OWN else f"{kernel} {ggml.library(kernel).version}"
        except KernelError as e:
            out[name] = f"none: {e}"
    return out

"""quantkit's own kernels, in the extension module: which exist, and the tables they need."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np

from .. import _native
from ..base.version import __version__
from ..gguf.types import QType

#: quantkit's own kernel sets that this processor can run, best first -> the types of each
OWN: Mapping[str, frozenset[str]] = {name: frozenset(types) for name, types in _native.kernel_sets()}

#: types whose levels come from a table -> the class of gguf.quants that holds it
CODEBOOKS: Mapping[str, str] = {
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_S", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_S": "IQ3_S", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip


@cache
def version() -> str:
    """Return quantkit's version with a digest of its compiled kernels: equal versions make equal bytes."""
    assert _native.__file__ is not None
    digest = hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:12]
    return f"quantkit {__version__}, kernels {digest}"


@cache
def set_codebook(name: str) -> None:
    """Pass a table of levels to quantkit's own kernels: int8 [entries, values per entry], in ggml's order."""
    table = getattr(import_module("gguf.quants"), name)
    if hasattr(table, "kvalues"):
        values = np.array([table.kvalues], np.int8)
    else:
        table.init_grid()
        values = table.grid.reshape(-1, table.grid.shape[-1]).astype(np.int8)
    _native.set_codebook(name, values)


def prepare(qt: QType) -> None:
    """Set up what quantkit's own kernels need before the first use of a type."""
    if qt.name in CODEBOOKS:
        set_codebook(CODEBOOKS[qt.name])

"""Importance matrices: files of llama-imatrix in both formats, read as llama-quantize reads them, written, added up,
converted and looked into. Imports gguf, pictures and base.

The functions are the commands of `quantkit imatrix` without the command line, and public as `quantkit.imatrix`. Modules
of this room are named otherwise than the functions, whose names an import of a module would take.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coverage import Coverage
    from .matrix import Imatrix

__all__ = ["ImatrixOptions", "convert", "info", "make", "merge", "read"]

Name = str | os.PathLike[str]
#: what stands above this room, and is public with it: the forward pass is needed for it
_OF_LAB = ("ImatrixOptions", "make")


def __getattr__(name: str) -> Any:
    if name not in _OF_LAB:
        raise AttributeError(f"module 'quantkit.imatrix' has no attribute {name!r}")
    return getattr(import_module("quantkit.lab.calibration.making"), name)


def read(path: Name) -> Imatrix:
    """An importance matrix, GGUF or .dat. Its values stay in the file until they are asked for: `weights` are what the
    quantizer gets, `sums` what the file has. Raises ImatrixError."""
    from .matrix import open_imatrix

    return open_imatrix(os.fspath(path))


def info(path: Imatrix | Name, *, min_tokens: int = 100) -> Coverage:
    """What each tensor and each expert saw: counts, their spread, how concentrated the sums are. All values are read,
    one entry at a time. Raises ImatrixError."""
    from .coverage import cover

    return cover(_opened(path), min_tokens)


def merge(
    paths: Sequence[Imatrix | Name], out: Name, *, chunk_size: int | None = None, output_format: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Write the sum of importance matrices of one model to `out`. Returns what is lost or assumed, a sentence each.

    `chunk_size`: tokens of a chunk of the result, and of a .dat, which does not say it; the first file's that does
    unless given. `output_format` is "gguf" or "dat", as `out` ends unless given. `force` replaces a file that is there.
    Raises ImatrixError where the files are not of one model, or one comes twice; OutputError."""
    from .converting import is_dat
    from .merging import merge as add

    target, matrices = Path(out), [_opened(path) for path in paths]
    return add(matrices, target, as_dat=is_dat(target, output_format), chunk_size=chunk_size, replace=force)


def convert(
    path: Imatrix | Name, out: Name, *, chunk_size: int | None = None, output_format: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Write an importance matrix to `out`, as a .dat or a GGUF: what the quantizer gets stays the same to the bit.
    Returns what is lost or assumed, a sentence each. The rest is as for `merge`; `chunk_size` is for a .dat. Raises
    ImatrixError, OutputError."""
    from .converting import convert as write
    from .converting import is_dat

    target = Path(out)
    return write(_opened(path), target, as_dat=is_dat(target, output_format), chunk_size=chunk_size, replace=force)


def _opened(path: Imatrix | Name) -> Imatrix:
    from .matrix import Imatrix

    return path if isinstance(path, Imatrix) else read(path)

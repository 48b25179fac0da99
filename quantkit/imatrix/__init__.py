"""Importance matrices: files of llama-imatrix in both formats, read as llama-quantize reads them, written, merged,
converted and examined. Imports gguf, pictures and base.

The functions are the commands of `quantkit imatrix` without the command line, public as `quantkit.imatrix`. No module
of this room may have a function's name, since importing the module would replace the function.
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
#: names from the room above, which are public here too: they need the forward pass
_OF_LAB = ("ImatrixOptions", "make")


def __getattr__(name: str) -> Any:
    if name not in _OF_LAB:
        raise AttributeError(f"module 'quantkit.imatrix' has no attribute {name!r}")
    return getattr(import_module("quantkit.lab.calibration.making"), name)


def read(path: Name) -> Imatrix:
    """Open an importance matrix, GGUF or .dat. Its values are read only when asked for: `weights` returns what the
    quantizer gets, `sums` what the file holds. Raises ImatrixError."""
    from .matrix import open_imatrix

    return open_imatrix(os.fspath(path))


def info(path: Imatrix | Name, *, min_tokens: int = 100) -> Coverage:
    """Return what each tensor and each expert saw: counts, their spread, how concentrated the sums are. Reads all
    values, one entry at a time. Raises ImatrixError."""
    from .coverage import cover

    return cover(_opened(path), min_tokens)


def merge(
    paths: Sequence[Imatrix | Name], out: Name, *, chunk_size: int | None = None, output_format: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Write the sum of importance matrices of one model to `out`. Returns what is lost or assumed, one sentence each.

    `chunk_size`: tokens in a chunk of the result, and of a .dat, which does not record it; by default that of the first
    file that does. `output_format`: "gguf" or "dat"; by default from the ending of `out`. `force` replaces an existing
    file. Raises ImatrixError if the files are of different models or one comes twice; OutputError."""
    from .converting import is_dat
    from .merging import merge as add

    target, matrices = Path(out), [_opened(path) for path in paths]
    return add(matrices, target, as_dat=is_dat(target, output_format), chunk_size=chunk_size, replace=force)


def convert(
    path: Imatrix | Name, out: Name, *, chunk_size: int | None = None, output_format: str | None = None,
    force: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Write an importance matrix to `out`, as a .dat or a GGUF. What the quantizer gets stays the same to the bit.
    Returns what is lost or assumed, one sentence each. Parameters are as for `merge`, but `chunk_size` is only for a
    .dat as input. Raises ImatrixError, OutputError."""
    from .converting import convert as write
    from .converting import is_dat

    target = Path(out)
    return write(_opened(path), target, as_dat=is_dat(target, output_format), chunk_size=chunk_size, replace=force)


def _opened(path: Imatrix | Name) -> Imatrix:
    from .matrix import Imatrix

    return path if isinstance(path, Imatrix) else read(path)

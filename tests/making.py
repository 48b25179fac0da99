"""What tests of making importance matrices share: a small text, and runs in this process on one thread."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from small_builds import OPTIONS

from quantkit import text
from quantkit.forward.stream import Options
from quantkit.imatrix.matrix import Imatrix
from quantkit.lab.calibration.make_imatrix import Made, MakeOptions, make_imatrix
from quantkit.model.open import open_model
from quantkit.text.chunking import Chunks

CTX = 32


def some_text(path: Path, n_words: int = 400, seed: int = 3) -> Path:
    """Words of random letters."""
    rng = random.Random(seed)
    path.write_text(" ".join("".join(rng.choices("abcdefgh ijkl", k=6)) for _ in range(n_words)))
    return path


def chunks_of(model: Path, file: Path, n_chunks: int | None = None, n_ctx: int = CTX) -> Chunks:
    return text.chunks(open_model(str(model), OPTIONS), [file], n_ctx, n_chunks)


def make(model: Path, file: Path, out: Path, n_chunks: int | None = 4, progress: Any = None, **options: Any) -> Made:
    """A run in this process, of chunks of CTX tokens."""
    opts = replace(MakeOptions(forward=Options(n_threads=1)), **options)
    more = (progress,) if progress else ()
    return make_imatrix(open_model(str(model), OPTIONS), chunks_of(model, file, n_chunks), out, opts, *more)


def means(matrix: Imatrix, name: str) -> np.ndarray:
    """float64 [n_mats, n_cols]: mean squared inputs."""
    s = matrix.sums(name)
    return s.in_sum2.astype(np.float64) / np.maximum(s.counts, 1)[:, None]

"""What tests of importance matrices share: an open one's facts and shapes for writing it again, and its values."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.imatrix.matrix import Imatrix
from quantkit.imatrix.write import Facts, Shape

F32 = np.float32
#: keys that every file has
OWN = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


def facts_of(im: Imatrix) -> Facts:
    more = tuple(item for item in im.contents.kvs if item.key not in OWN)
    return Facts(im.datasets, im.n_chunks, im.chunk_size, more)


def shapes_of(im: Imatrix) -> list[Shape]:
    return [
        Shape(name, e.n_mats, e.n_cols, e.sum_offset is not None, e.stats[1] if e.stats else 0)
        for name, e in im.entries.items()
    ]


def values(im: Imatrix, name: str) -> npt.NDArray[Any]:
    """All that the quantizer gets for a tensor."""
    return im.weights(name, 0, im.entries[name].n_values)


def llama_imatrix(tool: Path, model: Path, out: Path, *args: str | Path) -> Path:
    """A run of the stock tool, on one thread."""
    command = [tool, "-m", model, "-o", out, "-t", "1", *args]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert out.is_file(), (done.stdout + done.stderr)[-2000:]
    return out


def of_random_text(tool: Path, model: Path, out: Path, ctx: int, chunks: int) -> Path:
    """An importance matrix of text that the name of `out` is the seed of."""
    rng, text = random.Random(out.stem), out.with_suffix(".txt")
    text.write_text(" ".join("".join(rng.choices("abcdefgh ijkl", k=6)) for _ in range(900)))
    how = ["-c", str(ctx), "-b", str(ctx), "--chunks", str(chunks), "--no-ppl"]
    return llama_imatrix(tool, model, out, "-f", text, *how)

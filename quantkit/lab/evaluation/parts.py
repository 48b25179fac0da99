"""Splits a text into parts that do not overlap: one to probe, one to choose on, one to report on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from ...base.errors import TextError
from ...text.chunking import Chunks

_PART = re.compile(r"([0-9]{1,3})/([0-9]{1,3})")


def part(chunks: Chunks, number: int, of: int, most: int | None = None) -> Chunks:
    """Return part `number` (from 1) of `of` equal runs of chunks, thinned evenly to at most `most` chunks. Raises
    TextError for a part without chunks."""
    first, stop = chunks.n_chunks * (number - 1) // of, chunks.n_chunks * number // of
    if stop <= first:
        raise TextError(
            f"{', '.join(chunks.names)}: {chunks.n_chunks:,} chunks of {chunks.n_ctx:,} tokens have no part "
            f"{number} of {of}; give a longer text or a smaller --ctx"
        )
    n = stop - first if most is None else min(most, stop - first)
    picked = first + np.arange(n) * (stop - first) // n
    names = tuple(chunks.names) if of == 1 else tuple(f"{name} (part {number}/{of})" for name in chunks.names)
    return replace(chunks, tokens=chunks.tokens[picked], text_tokens=chunks.text_tokens[picked], names=names)


def parse_part(text: str) -> tuple[int, int]:
    """Parse "1/3" into (1, 3). Raises TextError."""
    m = _PART.fullmatch(text.strip())
    if m is None or not 1 <= int(m[1]) <= int(m[2]):
        raise TextError(f"--part {text}: is not a part such as 1/3, the first of three")
    return int(m[1]), int(m[2])

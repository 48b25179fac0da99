"""llama-perplexity's files of log probabilities (--save-all-logits), read token by token.

`_logits_`, i32 n_ctx, n_vocab, n_chunk, i32 tokens [n_chunk * n_ctx]; then for each chunk n_ctx - 1 - n_ctx / 2 rows of
u16 [2 * ((n_vocab + 1) / 2) + 4]: two float32, scale and least log probability, then codes; log p = scale * code +
least. Source: tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError

_MAGIC = b"_logits_"
_HEAD = len(_MAGIC) + 12
_MOST = 1 << 24


class LogitsFile:
    """A complete file of log probabilities. Raises SourceError for a file of another kind, or one that is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as f:
                head = f.read(_HEAD)
                if len(head) < _HEAD or head[:8] != _MAGIC:
                    raise SourceError(f"{path}: is not a file of llama-perplexity --save-all-logits")
                self.n_ctx, self.n_vocab, self.n_chunks = (int(n) for n in np.frombuffer(head, "<i4", 3, 8))
                if not (2 <= self.n_ctx <= _MOST and 1 <= self.n_vocab <= _MOST and 1 <= self.n_chunks <= _MOST):
                    raise SourceError(
                        f"{path}: says {self.n_chunks:,} chunks of {self.n_ctx:,} tokens of {self.n_vocab:,}: damaged"
                    )
                n_tokens = self.n_chunks * self.n_ctx
                self._codes_at = _HEAD + 4 * n_tokens
                due = self._codes_at + 2 * self.n_chunks * self.n_scored * self._n_row
                if size != due:
                    raise SourceError(
                        f"{path}: has {size:,} bytes of {due:,}; llama-perplexity did not finish it: run it again"
                    )
                tokens = np.frombuffer(f.read(4 * n_tokens), "<i4").astype(np.int32)
        except OSError as e:
            raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
        self.tokens = tokens.reshape(self.n_chunks, self.n_ctx)
        """int32 [n_chunks, n_ctx], in the order of the text"""

    @property
    def n_scored(self) -> int:
        """Rows per chunk: the predictions of its second half."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """int32 [n_chunks, n_scored]: the tokens to be predicted."""
        return self.tokens[:, self.n_ctx // 2 + 1 :]

    @property
    def _n_row(self) -> int:
        return 2 * ((self.n_vocab + 1) // 2) + 4

    def log_probs(self, chunk: int) -> npt.NDArray[np.float32]:
        """float32 [n_scored, n_vocab] of a chunk, as llama-perplexity computes them from the codes."""
        n = self.n_scored * self._n_row
        with self.path.open("rb") as f:
            f.seek(self._codes_at + 2 * chunk * n)
            raw = f.read(2 * n)
        if len(raw) != 2 * n:
            raise SourceError(f"{self.path}: has changed since it was opened")
        rows = np.frombuffer(raw, "<u2").reshape(self.n_scored, self._n_row)
        scale, least = np.ascontiguousarray(rows[:, :4]).view("<f4").T
        codes = rows[:, 4 : 4 + self.n_vocab].astype(np.float32)
        out: npt.NDArray[np.float32] = codes * scale[:, None] + least[:, None]
        return out


def expected_bytes(n_ctx: int, n_vocab: int, n_chunks: int) -> int:
    """Size in bytes of a complete file."""
    return _HEAD + 4 * n_chunks * n_ctx + 2 * n_chunks * (n_ctx - 1 - n_ctx // 2) * (2 * ((n_vocab + 1) // 2) + 4)


def size_of(path: Path) -> int:
    """Current size of a file in bytes; 0 if it cannot be read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0

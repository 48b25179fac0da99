"""Words to tokens by a SentencePiece vocabulary, as in llama.cpp (src/llama-vocab.cpp, llm_tokenizer_spm_session). Of
all adjacent pairs that form a token, the one with the highest score is joined, the leftmost of equals, until there is
none. Symbols that are no tokens then become byte tokens.

llama.cpp treats a whole text as one word. No join ever crosses two characters that no token has side by side, so the
text is cut there: the tokens are the same, and words repeat, so they can be cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from ..base.errors import UnsupportedError
from .vocabulary import Vocabulary

#: stands for a space
SPACE = "▁"


class SpmWords:
    """The words of texts, and their tokens. Raises UnsupportedError for a vocabulary without tokens for bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        v = vocabulary
        self._ids = {token: i for i, token in enumerate(v.tokens)}
        self._scores = v.scores or (0.0,) * len(v.tokens)
        self._beside = {token[i : i + 2] for token in v.tokens for i in range(len(token) - 1)}
        self._bytes: list[int] = []
        for byte in range(256):
            i = self._ids.get(f"<0x{byte:02X}>", self._ids.get(chr(byte)) if byte < 128 else None)
            if i is None:
                raise UnsupportedError(
                    f"{v.where}: its SentencePiece vocabulary has no token for the byte 0x{byte:02X}, and llama.cpp "
                    "would stop at a text that needs it"
                )
            self._bytes.append(i)

    def words(self, text: str) -> Iterator[str]:
        """Cut the text between characters that no token has side by side."""
        beside, start = self._beside, 0
        for i in range(1, len(text)):
            if text[i - 1 : i + 1] not in beside:
                yield text[start:i]
                start = i
        if text:
            yield text[start:]

    def of(self, word: str) -> tuple[int, ...]:
        """The tokens of a word."""
        n, ids, scores = len(word), self._ids, self._scores
        ends = [i + 1 for i in range(n)]  # end of the symbol that begins here; 0 if it was joined to its left
        before = [i - 1 for i in range(n)]  # where the symbol to the left begins
        queue: list[tuple[float, int, int, int]] = []

        def pair(left: int, right: int) -> tuple[float, int, int, int] | None:
            i = ids.get(word[left : ends[right]])
            return None if i is None else (-scores[i], left, right, ends[right])

        for i in range(1, n):
            if (found := pair(i - 1, i)) is not None:
                queue.append(found)
        heapify(queue)
        while queue:
            _, left, right, end = heappop(queue)
            if not ends[left] or not ends[right] or ends[left] != right or ends[right] != end:
                continue
            ends[left], ends[right] = end, 0
            if end < n:
                before[end] = left
            for a, b in ((before[left], left), (left, end)):
                if a >= 0 and b < n and (found := pair(a, b)) is not None:
                    heappush(queue, found)
        out: list[int] = []
        at = 0
        while at < n:
            symbol = word[at : ends[at]]
            i = ids.get(symbol, -1)
            out += [i] if i >= 0 else [self._bytes[b] for b in symbol.encode()]
            at = ends[at]
        return tuple(out)

"""Scores texts that other models wrote under a reference, token by token, by the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ...base.errors import SourceError
from ...forward.model import Model
from ...forward.stream import Options, Pass, Progress
from ...text.encoding import Tokenizer
from ...text.vocabulary import vocabulary_of

F64 = npt.NDArray[np.float64]
#: positions whose probabilities are computed at a time
_ROWS = 256


def log_probs_of(
    reference: Model,
    texts: Sequence[tuple[str, str]],
    forward: Options,
    progress: Progress = lambda what, n_done, n_total: None,
) -> list[F64]:
    """For each prompt and its continuation, return the log probability of each token of the continuation: [n tokens],
    empty for an empty text. The reference's tokenizer defines the tokens. Raises SourceError, UnsupportedError."""
    tokenizer = Tokenizer(vocabulary_of(reference.catalogue))
    starts, rows = [], []
    for prompt, text in texts:
        before = tokenizer.encode(prompt, parse_special=True)
        if tokenizer.add_eos and len(before):
            before = before[:-1]
        after = tokenizer.encode(text, add_special=False, parse_special=True)
        if not len(before):
            raise SourceError(f"{reference.name}: a prompt has no token, so what comes first has no likelihood")
        starts.append(len(before))
        rows.append(np.concatenate([before, after]))
    out = [np.zeros(len(row) - start) for row, start in zip(rows, starts, strict=True)]
    of = [i for i in range(len(rows)) if len(out[i])]
    if not of:
        return out
    tokens = np.zeros((len(of), max(len(rows[i]) for i in of)), np.int32)  # padding affects no token before it
    for at, i in enumerate(of):
        tokens[at, : len(rows[i])] = rows[i]
    first = min(starts[i] for i in of) - 1

    def on_logits(chunk: int, number: int, logits: torch.Tensor) -> None:
        i = of[chunk]
        begin, end = starts[i] - 1, len(rows[i]) - 1
        targets = torch.from_numpy(rows[i][begin + 1 : end + 1].astype(np.int64)).to(logits.device)
        mine = logits[begin - first : end - first]
        for at in range(0, len(mine), _ROWS):
            some = torch.log_softmax(mine[at : at + _ROWS].double(), -1)
            picked = some.gather(1, targets[at : at + _ROWS, None])[:, 0]
            out[i][at : at + _ROWS] = picked.cpu().numpy()

    Pass([reference], tokens, forward, on_logits=on_logits, logits_from=first, progress=progress).run()
    return out

"""Passes for tests, and what llama.cpp and transformers make of the same tokens."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quantkit.forward.model import Model
from quantkit.forward.stream import Options, Pass
from quantkit.model.families.options import Options as ModelOptions
from quantkit.model.open import open_model

Tokens = npt.NDArray[np.integer[Any]]

ONE_THREAD = Options(n_threads=1)


def model_of(path: Path, layout: str | None = None, name: str = "") -> Model:
    options = ModelOptions(pre="deepseek-v3", layout=layout) if layout else ModelOptions(pre="deepseek-v3")
    return Model(open_model(str(path), None if path.suffix == ".gguf" else options), name)


def random_tokens(n_vocab: int, n_chunks: int = 3, n_ctx: int = 48, seed: int = 3) -> Tokens:
    return np.random.default_rng(seed).integers(0, n_vocab, (n_chunks, n_ctx))


def logits_of(
    models: Model | Sequence[Model], tokens: Tokens, options: Options = ONE_THREAD, first: int = 0, **more: Any
) -> torch.Tensor:
    """float32 [n_models, n_chunks, n_ctx - first, n_vocab]; without the first axis for one model."""
    several = [models] if isinstance(models, Model) else list(models)
    found: dict[tuple[int, int], torch.Tensor] = {}

    def see(chunk: int, model: int, logits: torch.Tensor) -> None:
        found[model, chunk] = logits.clone()

    Pass(several, tokens, options, on_logits=see, logits_from=first, **more).run()
    n_chunks = len(tokens)
    assert len(found) == len(several) * n_chunks
    out = torch.stack([torch.stack([found[m, c] for c in range(n_chunks)]) for m in range(len(several))])
    return out[0] if isinstance(models, Model) else out


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of logits: the norm of the difference by the norm of theirs."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


class Agreement(NamedTuple):
    """How near logits are to others."""

    kld: float
    """mean over positions of the divergence from theirs, in nats"""
    same_top: float
    ppl: float
    ppl_theirs: float


class Saved(NamedTuple):
    """What llama-perplexity --save-all-logits wrote: of the second half of each chunk but its last token."""

    tokens: npt.NDArray[np.int32]
    """[n_chunks, n_ctx]"""
    log_probs: torch.Tensor
    """float64 [n_chunks, n positions, n_vocab], rounded to 16 bits between the largest and 16 below"""

    @classmethod
    def read(cls, path: Path) -> Saved:
        raw = path.read_bytes()
        assert raw[:8] == b"_logits_"
        n_ctx, n_vocab, n_chunks = (int(n) for n in np.frombuffer(raw, np.int32, 3, 8))
        tokens = np.frombuffer(raw, np.int32, n_chunks * n_ctx, 20).reshape(n_chunks, n_ctx)
        width = 2 * ((n_vocab + 1) // 2) + 4
        rows = np.frombuffer(raw, np.uint16, offset=20 + 4 * n_chunks * n_ctx)
        rows = rows.reshape(n_chunks, n_ctx - 1 - n_ctx // 2, width)
        scale, least = (rows[..., i : i + 2].copy().view(np.float32).astype(np.float64) for i in (0, 2))
        return cls(tokens, torch.from_numpy(scale * rows[..., 4 : 4 + n_vocab] + least))

    @property
    def first(self) -> int:
        """The position of a chunk whose logits are the first that were saved."""
        return int(self.tokens.shape[1]) // 2

    def compared(self, logits: torch.Tensor) -> Agreement:
        """With ours, float32 [n_chunks, n_ctx - first, n_vocab]."""
        ours, theirs = torch.log_softmax(logits[:, :-1].double(), -1), self.log_probs
        following = torch.from_numpy(self.tokens[:, self.first + 1 :].astype(np.int64))[..., None]
        # those that are less likely than e^-16 were saved as if they were not, so llama-perplexity leaves them out, too
        kld = (theirs.exp() * (theirs - ours) * (theirs > -16)).sum(-1).mean()
        same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
        ppl, ppl_theirs = (x.gather(-1, following).mean().neg().exp() for x in (ours, theirs))
        return Agreement(float(kld), float(same), float(ppl), float(ppl_theirs))


def perplexity(tool: Path, model: Path, text: Path, out: Path, n_ctx: int = 128, *more: str) -> Saved:
    """Run llama-perplexity on one thread, and read the logits that it saves."""
    command = [tool, "-m", model, "-f", text, "-c", n_ctx, "-t", 1, "--save-all-logits", out, *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Saved.read(out)


#: llama.cpp in full precision: neither keys and values as F16, nor flash attention
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")

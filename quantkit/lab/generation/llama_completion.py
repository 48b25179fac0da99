"""Lets a GGUF write texts by llama.cpp's own llama-completion, one process per output."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ...base.errors import ToolError
from ...llama_cpp import programs
from .prompts import Prompt

#: what llama-completion prints after a text: if the model ended it, and always
_ENDED, _LAST = b" [end of text]\n", b"\n\n"


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; anything else is llama.cpp's default (top-k 40, top-p 0.95)."""

    temp: float = 0.6
    min_p: float = 0.05
    n_predict: int = 2048


@dataclass(frozen=True)
class Output:
    """A text that a model wrote."""

    prompt: str
    """where the prompt comes from"""
    seed: int
    text: str
    """with special tokens spelled out, except one that ends the text"""
    ended: bool
    """whether the model ended it itself, before `n_predict` tokens"""
    seconds: float


@dataclass(frozen=True)
class Runner:
    """llama-completion with a model. `more` are the user's own arguments, such as -ngl 99."""

    binary: Path
    model: Path
    sampling: Sampling
    n_threads: int
    more: tuple[str, ...] = ()

    def __call__(self, prompt: Prompt, seed: int, n_tokens: int | None = None, last: tuple[str, ...] = ()) -> Output:
        """Let the model continue a prompt of `n_tokens` tokens (None: unknown). `last` are the spellings of tokens that
        end an output. Raises ToolError."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="quantkit-generate-") as folder:
            words = Path(folder) / "prompt"
            words.write_bytes(prompt.text.encode())
            said = programs.run(self._command(words, prompt, seed, n_tokens), self.model)
        text, ended = _parts(said)
        if ended:
            text = next((text.removesuffix(t) for t in last if text.endswith(t)), text)
        return Output(prompt.where, seed, text, ended, time.monotonic() - began)

    def _command(self, words: Path, prompt: Prompt, seed: int, n_tokens: int | None) -> list[str]:
        s = self.sampling
        n = n_tokens if n_tokens is not None else len(prompt.text.encode())  # every token has at least a byte
        return [
            str(self.binary), "-m", str(self.model), "-bf", str(words), "--no-escape", "-no-cnv", "--no-display-prompt",
            "--special", "--simple-io", "--no-warmup", "-s", str(seed), "--temp", repr(s.temp), "--min-p",
            repr(s.min_p), "-n", str(s.n_predict), "-c", str(-(-(n + s.n_predict + 16) // 256) * 256), "-t",
            str(self.n_threads), *self.more,
        ]  # fmt: skip


def _parts(said: bytes) -> tuple[str, bool]:
    """Split the output into its text, and whether the model ended it."""
    if not said.endswith(_LAST):
        raise ToolError("llama-completion's output is cut off: it does not end in an empty line; is the disk full?")
    text = said.removesuffix(_LAST)
    ended = text.endswith(_ENDED)
    return text.removesuffix(_ENDED).decode("utf-8", "replace"), ended

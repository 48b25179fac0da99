"""The same comparison by the stock tool: llama-perplexity writes log probabilities, and quantkit reads them.

The reference is run twice; the difference between the two runs is the noise floor. Log probabilities in these files are
16-bit codes. The tool's own figures (--kl-divergence) compare the reference's codes with the candidate's full logits,
which the tool never writes to a file. So the reference's perplexity matches the tool's in every digit, while figures
that involve the candidate differ because of its codes: they are rounded by up to 16 / 65535 / 2 = 1.22e-4 nats, and
logits more than 16 below the largest are raised to that. Each candidate is therefore run a second time for the tool's
own figures (`tool_mean_kld`, `tool_ppl`), which are reported beside the ones computed here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...base.errors import SourceError, ToolError
from ...gguf.types import STORED_TYPES
from ...llama_cpp import programs
from ...model.open import open_model
from .logits_file import LogitsFile, expected_bytes, size_of
from .scores import LEAST, STOCK, Evaluation, Scored, Tokens, check_ctx, pairs_of, score

_TRIES = 3
#: with fewer tokens the tool prints no summary
_LEAST_TOKENS = 100
#: the lines of its summary that are read, and the last one
_SAID = {
    "ppl": "Mean PPL(Q)  ", "reference_ppl": "Mean PPL(base)  ", "mean_kld": "Mean    KLD:", "last": "Same top p:",
}  # fmt: skip


class File(NamedTuple):
    """A GGUF to run, with its size and bits per weight."""

    name: str
    path: Path
    file_bytes: int
    bpw: float


def gguf_file(path: str, name: str) -> File:
    """Open a GGUF, single or split. Raises SourceError for anything else, and for one without a tokenizer."""
    refused = SourceError(f"{path}: llama.cpp runs GGUFs; make one with quantkit build, or leave out --engine")
    if Path(path).is_dir():
        raise refused
    opened = open_model(path)
    source = opened.source
    if source is None:
        raise refused
    if not any(item.key == "tokenizer.ggml.tokens" for item in opened.kvs):
        raise SourceError(
            f"{path}: has no tokenizer, which llama.cpp needs; give a GGUF with one, or leave out --engine"
        )
    bits = sum(8 * STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows for t in opened.tensors)
    n = sum(t.n_elements for t in opened.tensors)
    return File(name, Path(path), sum(f.stat().st_size for f in source.files), bits / n)


@dataclass(frozen=True)
class Tool:
    """How llama-perplexity is run."""

    binary: Path
    n_ctx: int
    n_chunks: int
    n_vocab: int
    n_threads: int
    more: tuple[str, ...] = ()
    """further arguments, such as -ngl 99"""
    figures: bool = True
    """whether candidates are run a second time, for the tool's own figures"""


class Printed(NamedTuple):
    """The figures that llama-perplexity --kl-divergence prints."""

    ppl: float
    reference_ppl: float
    mean_kld: float


class Stock(AbstractContextManager["Stock"]):
    """llama-perplexity on one text: the reference, twice, then each candidate against it.

    `folder` holds temporary files of log probabilities (two at a time). Raises ToolError, SourceError, TextError."""

    def __init__(
        self, reference: File, words: str, tool: Tool, n_candidates: int,
        progress: Callable[[str, int, int], None] = lambda what, n_done, n_total: None, folder: Path | None = None,
    ) -> None:  # fmt: skip
        check_ctx(tool.n_ctx)
        self._place = tempfile.TemporaryDirectory(dir=folder, prefix="quantkit-eval-")
        try:
            self._here = Path(self._place.name)
            text = self._here / "text.txt"
            text.write_text(words, encoding="utf-8", newline="")
            self._run = _Runs(tool, text, progress, 2 + n_candidates * (2 if tool.figures else 1))
            self.base = self._run(reference, self._here / "reference")
            again = self._run(reference, self._here / "candidate")
            theirs, mine = _scored(self.base, again)
            self.noise = float(mine.kld.mean())
            self.reference_ppl = float(np.exp(theirs.nll.mean()))
            again.path.unlink()
        except BaseException:
            self._place.cleanup()
            raise

    def measure(self, one: File) -> tuple[Scored, Tokens]:
        """Return a candidate's figures, and its scores token by token."""
        found = self._run(one, self._here / "candidate")
        try:
            theirs, mine = _scored(self.base, found)
        finally:
            found.path.unlink()
        scored = score(one.name, (one.file_bytes, one.bpw), mine, theirs.nll)
        if self._run.tool.figures and mine.kld.size >= _LEAST_TOKENS:
            said = self._run.printed(one, self.base.path)
            scored = replace(scored, tool_ppl=said.ppl, tool_mean_kld=said.mean_kld)
        return scored, mine

    def __exit__(self, *_: object) -> None:
        self._place.cleanup()


def evaluate_files(
    reference: File,
    candidates: Sequence[File],
    text: tuple[str, tuple[str, ...]],
    tool: Tool,
    progress: Callable[[str, int, int], None] = lambda what, n_done, n_total: None,
    folder: Path | None = None,
) -> Evaluation:
    """Compare files. `text` is the text and the names of its sources. Raises what `Stock` raises."""
    with Stock(reference, text[0], tool, len(candidates), progress, folder) as stock:
        measured = [stock.measure(one) for one in candidates]
        return Evaluation(
            reference.name, stock.reference_ppl, stock.base.n_chunks, stock.base.n_ctx, text[1],
            tuple(s for s, _ in measured), pairs_of([s for s, _ in measured], [t.kld for _, t in measured]),
            STOCK, stock.noise,
        )  # fmt: skip


def _scored(base: LogitsFile, other: LogitsFile) -> tuple[Tokens, Tokens]:
    """Scores of both, token by token."""
    if base.n_vocab != other.n_vocab or not np.array_equal(base.tokens, other.tokens):
        raise SourceError(
            f"{other.path.name}: its tokens are not the reference's; the two files have other vocabularies"
        )
    shape = (base.n_chunks, base.n_scored)
    theirs, mine = (Tokens(*(np.zeros(shape) for _ in range(4))) for _ in range(2))
    for chunk in range(base.n_chunks):
        p, q = (f.log_probs(chunk).astype(np.float64) for f in (base, other))
        at = base.targets[chunk].astype(np.int64)[:, None]
        theirs.nll[chunk], mine.nll[chunk] = (-np.take_along_axis(f, at, 1)[:, 0] for f in (p, q))
        mine.kld[chunk] = np.where(p > LEAST, np.exp(p) * (p - q), 0).sum(-1)
        mine.dp[chunk] = np.exp(-mine.nll[chunk]) - np.exp(-theirs.nll[chunk])
        mine.same_top[chunk] = p.argmax(-1) == q.argmax(-1)
    return theirs, mine


class _Runs:
    """Runs of llama-perplexity, one after the other. The size of the output file shows the progress of each."""

    def __init__(self, tool: Tool, words: Path, progress: Callable[[str, int, int], None], n_runs: int) -> None:
        self.tool, self.words, self.progress, self.n_runs = tool, words, progress, n_runs
        self._n_done = 0

    def __call__(self, file: File, out: Path) -> LogitsFile:
        for attempt in range(_TRIES):
            try:
                made = self._once(file, out)
                break
            except SourceError:  # the tool can exit with code 0 before it has written everything
                if attempt + 1 == _TRIES:
                    raise
        self._n_done += 1
        return made

    def _once(self, file: File, out: Path) -> LogitsFile:
        command = [*self._command(file), "--save-all-logits", str(out)]
        t = self.tool
        due = expected_bytes(t.n_ctx, t.n_vocab, t.n_chunks)

        def look() -> None:
            done = self._n_done * due + min(due, size_of(out))
            self.progress(file.name, done, self.n_runs * due)

        programs.run(command, file.path, look)
        return LogitsFile(out)

    def _command(self, file: File) -> list[str]:
        t = self.tool
        return [
            str(t.binary), "-m", str(file.path), "-f", str(self.words), "-c", str(t.n_ctx), "--chunks", str(t.n_chunks),
            "-t", str(t.n_threads), *t.more,
        ]  # fmt: skip

    def printed(self, file: File, base: Path) -> Printed:
        """Return the tool's own figures for a candidate against the reference's file. Raises ToolError."""
        due = expected_bytes(self.tool.n_ctx, self.tool.n_vocab, self.tool.n_chunks)
        self.progress(f"{file.name}, the tool's own figures", self._n_done * due, self.n_runs * due)
        command = [*self._command(file), "--kl-divergence", "--kl-divergence-base", str(base)]
        for _ in range(_TRIES):
            said = figures_of(programs.run(command, file.path).decode("utf-8", "replace"))
            if said is not None:
                self._n_done += 1
                return said
        raise ToolError(
            f"llama-perplexity --kl-divergence on {file.path}: its summary is cut off, or another version's; leave out "
            "its own figures with --no-tool-figures"
        )


def figures_of(text: str) -> Printed | None:
    """Read the figures of a printed summary; None if one of its lines is missing."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        for name, words in _SAID.items():
            if line.startswith(words):
                try:
                    found[name] = float(line.partition(":")[2].split("±")[0])
                except ValueError:
                    return None
    return Printed(*(found[name] for name in Printed._fields)) if len(found) == len(_SAID) else None

"""Lets quantized models write texts, and finds what is broken in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.text import markdown_table
from ...model.catalogue import Catalogue
from ...text.encoding import Tokenizer
from ...text.vocabulary import ENDS
from .degeneration import Diagnosis, Likelihood, faults_of, likelihood, repeated_share, repetition, thinking
from .llama_completion import Output, Runner, Sampling
from .prompts import Prompt, tokenizer_of

F64 = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Written:
    """An output and what was found in it."""

    output: Output
    diagnosis: Diagnosis


@dataclass(frozen=True)
class Texts:
    """The outputs of one model: every prompt with every seed."""

    name: str
    file_bytes: int
    written: tuple[Written, ...]

    @property
    def faults(self) -> dict[str, int]:
        """How many outputs have each fault; faults that none has are left out."""
        return dict(Counter(fault for w in self.written for fault in w.diagnosis.faults))


@dataclass(frozen=True)
class Generated:
    """The outputs of several models, and how they were made."""

    sampling: Sampling
    seeds: tuple[int, ...]
    reference: str | None
    models: tuple[Texts, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "quantkit_generate": 1,
            "sampling": asdict(self.sampling),
            "seeds": list(self.seeds),
            "reference": self.reference,
            "models": [
                {
                    "name": m.name,
                    "file_bytes": m.file_bytes,
                    "n_outputs": len(m.written),
                    "faults": m.faults,
                    "outputs": [{**asdict(w.output), **asdict(w.diagnosis)} for w in m.written],
                }
                for m in self.models
            ],
        }


@dataclass(frozen=True)
class Writer:
    """A model that answers prompts, with its tokenizer if that can be rebuilt."""

    name: str
    file_bytes: int
    runner: Runner
    tokenizer: Tokenizer | None

    def write(self, prompt: Prompt, seed: int) -> Output:
        """Answer a prompt. Raises ToolError."""
        t = self.tokenizer
        if t is None:
            return self.runner(prompt, seed, None, tuple(ENDS))
        eos = () if t.eos is None else (t.vocabulary.tokens[t.eos],)
        return self.runner(prompt, seed, len(t.encode(prompt.text, parse_special=True)), (*eos, *ENDS))


def writer_of(catalogue: Catalogue, name: str, file_bytes: int, runner: Runner) -> Writer:
    """The writer for an open model."""
    return Writer(name, file_bytes, runner, tokenizer_of(catalogue))


def write_all(
    writers: Sequence[Writer],
    prompts: Sequence[Sequence[Prompt]],
    seeds: Sequence[int],
    progress: Progress,
    keep: Callable[[str, int, Output], None] = lambda model, number, output: None,
) -> list[list[Output]]:
    """Let each model answer each of its prompts with each seed, and return the outputs in that order. `keep` gets each
    output at once, with the model's name and the prompt's number, from 1. Raises ToolError."""
    n, out = sum(map(len, prompts)) * len(seeds), []
    for writer, asked in zip(writers, prompts, strict=True):
        mine: list[Output] = []
        out.append(mine)
        for number, prompt in enumerate(asked, 1):
            for seed in seeds:
                progress(f"{writer.name}, {prompt.where}, seed {seed}", sum(map(len, out)), n)
                mine.append(writer.write(prompt, seed))
                keep(writer.name, number, mine[-1])
    progress("", n, n)
    return out


def gathered(
    writers: Sequence[Writer],
    pairs: Sequence[Sequence[tuple[str, Output]]],
    log_probs: Sequence[F64] | None,
    asked: tuple[Sampling, tuple[int, ...], str | None],
) -> Generated:
    """Diagnose the outputs of models. `log_probs` are a reference's for each output, over all models; `asked` is the
    sampling, the seeds, and the reference's name."""
    rest = iter(log_probs) if log_probs is not None else None
    models = []
    for writer, mine in zip(writers, pairs, strict=True):
        written = []
        for prompt, output in mine:
            values = None if rest is None else next(rest)
            likely = likelihood(values) if values is not None and len(values) else None
            written.append(Written(output, diagnose(output, prompt, writer.tokenizer, likely)))
        models.append(Texts(writer.name, writer.file_bytes, tuple(written)))
    return Generated(*asked, tuple(models))


def diagnose(
    output: Output, prompt: str, tokenizer: Tokenizer | None = None, likely: Likelihood | None = None
) -> Diagnosis:
    """Find what is broken in an output."""
    found = repetition(output.text)
    period = onset = grams = n_tokens = None
    if tokenizer is not None:
        ids = tokenizer.encode(output.text, add_special=False, parse_special=True).tolist()
        n_tokens, grams = len(ids), repeated_share(ids)
        if found is not None:
            at = output.text[: found.onset]
            unit = output.text[found.onset : found.onset + found.period]
            # the difference of nine periods and one: a unit's edge may be inside a token
            many, one = (
                len(tokenizer.encode(unit * k, add_special=False, parse_special=True)) for k in (9, 1)
            )  # fmt: skip
            period = max(1, round((many - one) / 8))
            onset = len(tokenizer.encode(at, add_special=False, parse_special=True))
    thought = thinking(output.text, prompt)
    faults = faults_of(output.text, output.ended, found, thought, likely)
    return Diagnosis(len(output.text), n_tokens, found, period, onset, grams, thought, likely, faults)


# ---------------------------------------------------------------- reports


def markdown(found: Generated) -> str:
    """A table of models, and one of every output with a fault."""
    s = found.sampling
    n = sum(len(m.written) for m in found.models)
    lines = [
        f"{n:,} outputs of at most {s.n_predict:,} tokens; temp {s.temp:g}, min-p {s.min_p:g}, seeds "
        f"{', '.join(map(str, found.seeds))}"
        + ("" if found.reference is None else f"; likelihood under {found.reference}"),
        "",
    ]
    kinds = sorted({fault for m in found.models for fault in m.faults})
    head = ["model", "bytes", "outputs", "ended", "tokens", "repeated 4-grams", "log-likelihood", "faultless", *kinds]
    rows = [
        [
            m.name, f"{m.file_bytes:,}", str(len(m.written)), str(sum(w.output.ended for w in m.written)),
            _mean([w.diagnosis.n_tokens for w in m.written], ".0f"),
            _mean([w.diagnosis.repeated_4grams for w in m.written], ".1%"),
            _mean([None if w.diagnosis.likelihood is None else w.diagnosis.likelihood.mean for w in m.written], ".3f"),
            str(sum(not w.diagnosis.faults for w in m.written)), *(str(m.faults.get(kind, 0)) for kind in kinds),
        ]
        for m in found.models
    ]  # fmt: skip
    lines.append(markdown_table(rows, head, range(1, len(head))))
    broken = [(m.name, w) for m in found.models for w in m.written if w.diagnosis.faults]
    if broken:
        lines += ["", "What is broken:", ""]
        lines.append(
            markdown_table(
                [
                    [name, w.output.prompt, str(w.output.seed), ", ".join(w.diagnosis.faults), details(w.diagnosis)]
                    for name, w in broken
                ],
                ["model", "prompt", "seed", "faults", ""],
                (2,),
            )
        )
    return "\n".join(lines)


def details(d: Diagnosis) -> str:
    """The figures behind the faults of an output."""
    said = []
    if (r := d.repetition) is not None:
        tokens = "" if d.period_tokens is None else f" ({d.period_tokens:,} tokens)"
        onset = "" if d.onset_token is None else f" (token {d.onset_token:,})"
        said.append(
            f"period {r.period:,} characters{tokens}, from character {r.onset:,}{onset}, {r.share:.0%} of the output"
        )
    if (v := d.likelihood) is not None and v.onset is not None:
        said.append(f"gibberish from token {v.onset:,}, {v.share:.0%} of tokens, at worst {v.worst:.2f}")
    return "; ".join(said)


def _mean(values: Sequence[float | None], how: str) -> str:
    known = [v for v in values if v is not None]
    return format(sum(known) / len(known), how) if known else ""


def file_name(model: str, index: int, seed: int) -> str:
    """The file name for an output; `index` counts prompts from 1."""
    return f"{model.replace('/', '_')}-{index:03}-{seed}.txt"

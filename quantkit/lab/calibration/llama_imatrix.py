"""Importance matrices made by the stock llama-imatrix, in runs of some chunks each.

The tool adds to what an earlier run of it has summed (--in-file), exactly: it keeps float32 and writes float32. So what
each run has made is kept in OUT.partial, and the same command goes on after the last. (What the tool itself saves
within a run is no state to go on from: it saves when the first tensor has met a chunk, and the others have not.)
A checkpoint is made a GGUF first, by quantkit's own build, in OUT.partial too.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...base import outputs
from ...base.errors import ImatrixError, ResumeError, SourceError, ToolError
from ...base.outputs import Output
from ...base.workers import default_threads
from ...forward.stream import Progress
from ...imatrix.matrix import Imatrix, open_imatrix
from ...imatrix.write import Facts, Shape, check_name, write_gguf
from ...llama_cpp import programs
from ...model.catalogue import Catalogue
from ...text.chunking import Chunks
from ..identity import of_run, said
from .unfinished import give, unfinished

_SAID_CHUNK = re.compile(rb"\[(\d+)\]")
_LAST_WORDS = 6
#: tokens that the tool computes at a time, its -b
_BATCH = 2048
_MODEL, _TEXT, _IDENTITY, _RUN = "model.gguf", "text.txt", "identity", "run.gguf"
#: the file before it has its name
MADE = "made.gguf"

Via = Literal["BF16", "Q8_0"]


@dataclass(frozen=True)
class ToolOptions:
    """How the tool is driven."""

    binary: Path
    via: Via = "BF16"
    """the type of the GGUF that a checkpoint becomes first"""
    save_frequency: int = 64
    """chunks of a run, rounded up to what the tool computes at a time"""
    process_output: bool = False
    n_threads: int = 0
    """0: all processors"""
    replace: bool = False


def make_with_tool(
    catalogue: Catalogue, chunks: Chunks, text: str, out: Path, options: ToolOptions,
    progress: Progress = lambda what, n_done, n_total: None,
) -> int:  # fmt: skip
    """Have llama-imatrix make the importance matrix of `text`, of which `chunks` are the tokens, and write it. Progress
    is in tokens. Returns the entries.

    Raises ToolError, SourceError, OutputError, ResumeError, ImatrixError, WeightError. An exception's `kept` says where
    the unfinished work is, if it is kept."""
    source = catalogue.source
    if source is None:
        raise SourceError(
            catalogue.lacks
            or f"{catalogue.model}: there are no weights here, only a config; give the checkpoint or a GGUF"
        )
    if chunks.n_tokens < 2 * chunks.n_ctx:
        raise ToolError(
            f"llama-imatrix wants two chunks of text at least, {2 * chunks.n_ctx:,} tokens, and there are "
            f"{chunks.n_tokens:,}; give a longer text, a smaller --ctx, or --engine native"
        )
    check_name(out)
    outputs.check(source.files, [Output(out, replace=options.replace, suffix=".partial")])
    with unfinished(out, lambda folder: any(folder.glob("part-*.gguf")) or (folder / _MODEL).exists()) as folder:
        settings = (str(options.binary), options.via, options.process_output)
        _begin(folder, of_run(source, chunks.tokens, settings))
        model = _model(catalogue, folder, options, progress)
        outputs.write_bytes(folder / _TEXT, text.encode(), replace=True)
        done, part = _latest(folder)
        for stop in _stops(chunks, options.save_frequency):
            if stop <= done:
                continue
            new = folder / _RUN
            _run(model, folder / _TEXT, new, chunks, (done, stop), part, options, progress)
            _check_run(new, stop, options)
            os.replace(new, folder / f"part-{stop}.gguf")
            if part is not None:
                part.unlink()
            done, part = stop, folder / f"part-{stop}.gguf"
        assert part is not None
        made = open_imatrix(str(part))
        shapes = [Shape(name, e.n_mats, e.n_cols) for name, e in made.entries.items()]
        facts = Facts(chunks.names, chunks.n_chunks, chunks.n_ctx)
        entries = (made.sums(name)._replace(in_sum=None, stats=None) for name in made.entries)
        write_gguf(folder / MADE, facts, entries, shapes, replace=True)
        give(folder / MADE, out, options.replace)
        return len(shapes)


def _begin(folder: Path, identity: str) -> None:
    found = said(folder / _IDENTITY)
    if found is not None and found != identity:
        raise ResumeError(
            f"{folder}: is of another run (other model, text or settings); give another output, or remove {folder}"
        )
    outputs.write_text(folder / _IDENTITY, identity, replace=True)


def _latest(folder: Path) -> tuple[int, Path | None]:
    """Chunks that the last finished run has summed, and its file. Of a run that was stopped before it had a name, there
    is nothing."""
    found = sorted(folder.glob("part-*.gguf"), key=lambda p: int(p.stem.split("-")[1]))
    return (int(found[-1].stem.split("-")[1]), found[-1]) if found else (0, None)


def _stops(chunks: Chunks, frequency: int) -> Iterator[int]:
    """Where runs end: after as many chunks as the tool computes at a time, so that each sees them as one run would, and
    such that the last has what it wants, two chunks of text and some more."""
    at_once = max(1, _BATCH // chunks.n_ctx)
    step = -(-frequency // at_once) * at_once
    for stop in range(step, chunks.n_chunks, step):
        if (stop + 2) * chunks.n_ctx < chunks.n_tokens:
            yield stop
    yield chunks.n_chunks


def _model(catalogue: Catalogue, folder: Path, options: ToolOptions, progress: Progress) -> Path:
    """The GGUF to compute; a checkpoint's is made, unless an earlier run has made it."""
    source = catalogue.source
    assert source is not None
    first = source.files[0]
    if first.suffix == ".gguf":
        return first
    out = folder / _MODEL
    if out.exists():
        return out
    from ...building import run as builds
    from ...building.engines.native import NativeEngine
    from ...planning.plan import make_plan
    from ...recipe.load import load, parse

    text = f"name: {options.via}\narch: [any]\nfile_type: {options.via}\nimatrix: optional\nrules:\n"
    text += f'  - {{match: "*", type: {options.via}, why: "for llama-imatrix"}}\n'
    recipe = load("Q8_0") if options.via == "Q8_0" else parse(text, "for llama-imatrix")
    plan = make_plan(catalogue, recipe, None)
    engine, n_done = NativeEngine(), 0

    def built(_name: str, n: int) -> None:
        nonlocal n_done
        n_done += n
        progress(f"{options.via} GGUF for llama-imatrix", n_done, plan.n_elements)

    ready = builds.prepare(plan, out, engine=engine)
    builds.run(ready, engine, options.n_threads or default_threads(), built)
    return out


def _run(
    model: Path, text: Path, out: Path, chunks: Chunks, span: tuple[int, int], before: Path | None,
    options: ToolOptions, progress: Progress,
) -> None:  # fmt: skip
    """One run of the tool, over chunks span[0] to span[1]. Raises ToolError with its last words."""
    first, stop = span
    command = [
        str(options.binary), "-m", str(model), "-f", str(text), "-o", str(out), "-c", str(chunks.n_ctx),
        "-b", str(_BATCH), "-t", str(options.n_threads or default_threads()),
        "--chunk", str(first), "--chunks", str(stop - first), "--output-frequency", str(1 << 30),
        "--output-format", "gguf",
    ]  # fmt: skip
    command += ["--in-file", str(before)] if before is not None else []
    command += ["--process-output"] if options.process_output else []
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as e:
        raise programs.cannot_run(options.binary, e) from None
    assert process.stdout is not None
    words, line = deque[str](maxlen=_LAST_WORDS), b""
    try:
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            numbers = _SAID_CHUNK.findall(line + piece)
            *lines, line = (line + piece).split(b"\n")
            words += [one.decode(errors="replace").strip() for one in lines if one.strip()]
            if numbers:  # it says [n] and a perplexity after each
                progress("llama-imatrix", (first + int(numbers[-1])) * chunks.n_ctx, chunks.tokens.size)
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()
    if line.strip():
        words.append(line.decode(errors="replace").strip())
    if code != 0 or not out.exists():
        raise programs.failure(options.binary, code, [word[-300:] for word in words], out.exists())


def _check_run(made: Path, stop: int, options: ToolOptions) -> None:
    """Raise ToolError unless a run has made a sound file of so many chunks."""
    try:
        found: Imatrix = open_imatrix(str(made))
        found.check()
    except ImatrixError as e:
        raise ToolError(
            f"{options.binary} made no sound importance matrix ({e}); is the disk full, or the model damaged?"
        ) from None
    if found.n_chunks != stop:
        raise ToolError(
            f"{options.binary} says that it summed {found.n_chunks:,} chunks, and there should be {stop:,}; is it a "
            "llama-imatrix of another version?"
        )

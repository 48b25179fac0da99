"""`qk.imatrix.make`: importance matrices from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...forward.stream import Progress
    from ...model.catalogue import Catalogue
    from .make_imatrix import Made

Name = str | os.PathLike[str]


@dataclass(frozen=True)
class ImatrixOptions:
    """What few importance matrices need to say."""

    chat: bool = False
    """the texts are conversations, to which the model's chat template is applied"""
    process_output: bool = False
    """output.weight too"""
    target_coverage: tuple[float, int] | None = None
    """no more text than it takes until that share of experts (0.99) has seen so many tokens (100)"""
    covariance: Name | None = None
    """a new folder for the second moments of all inputs"""
    pooled_experts: bool = False
    """with covariance: one matrix a layer for the experts' ffn_down, also where one an expert would fit the disk"""
    fisher: bool = False
    """with covariance: tokens count by the gradients of the model's predictions"""
    device: str = "cpu"
    dtype: str = "f32"
    """of matrix products: f32, bf16"""
    memory: int | None = None
    """bytes of hidden states in memory; beyond, they are files mapped into it"""
    threads: int | None = None
    """all processors unless given"""


def make(
    model: Catalogue | Name, texts: Sequence[Name], out: Name, n_ctx: int = 512, n_chunks: int | None = None, *,
    options: ImatrixOptions = ImatrixOptions(), force: bool = False,
    progress: Progress = lambda what, n_done, n_total: None,
) -> Made:  # fmt: skip
    """Make an importance matrix over texts, and write it to `out`, a GGUF as llama-imatrix has it.

    A model is what `quantkit.open_model` takes or returns, with weights; it is computed layer by layer where it lies,
    with torch. `texts` are files, folders, .jsonl files; they are cut into chunks of `n_ctx` tokens, at most
    `n_chunks`. `force` replaces a file that is there. `progress` is called with what is done, and how many of how many
    tokens × layers are. What was stopped goes on where the same is asked for again.

    Raises TextError, SourceError, UnsupportedError, WeightError, OutputError, ResumeError, KernelError (there is no
    torch, or not that device), ImatrixError.
    """
    from ... import text
    from ...model.open import open_model
    from .. import require_torch

    require_torch()
    from ...forward.stream import Options
    from .covariance_folder import choose_own
    from .make_imatrix import MakeOptions, Target, make_imatrix

    catalogue = open_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
    folder = None if options.covariance is None else Path(options.covariance)
    own = folder is not None and not options.pooled_experts and choose_own(catalogue, folder, None)
    target = None if options.target_coverage is None else Target(*options.target_coverage)
    forward = Options(options.device, options.dtype, options.threads or 0, options.memory)
    how = MakeOptions(options.process_output, target, folder, own, options.fisher, force, forward)
    chunks = text.chunks(catalogue, texts, n_ctx, n_chunks, chat=options.chat)
    return make_imatrix(catalogue, chunks, Path(out), how, progress)

"""A model by GGUF names, computed layer by layer and expert by expert, whatever its weights come from. May import
weights and what is below, and torch; knows nothing of recipes and files: it asks for rows by name, and hands
out hidden states, the inputs of tensors, and logits.

    import quantkit as qk
    qk.forward.run("model.gguf", tokens, on_logits=lambda chunk, model, logits: print(logits.argmax(-1)))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..base.errors import KernelError

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..model.catalogue import Catalogue
    from .model import Model as Model
    from .model import Quantized as Quantized
    from .stream import HiddenStates, Logits, Progress
    from .stream import Options as Options

__all__ = ["Model", "Options", "Quantized", "run"]

#: what needs torch, and where it is
_HOMES = {"Model": "model", "Quantized": "model", "Options": "stream"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit.forward' has no attribute {name!r}")
    return getattr(_computing(_HOMES[name]), name)


def _computing(module: str) -> Any:
    """A module of this room that computes. Raises KernelError where torch is not installed."""
    try:
        return import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise KernelError("torch, which computes models, is not installed; run: pip install 'quantkit[lab]'") from None


def run(
    models: Catalogue | Model | str | os.PathLike[str] | Sequence[Catalogue | Model | str | os.PathLike[str]],
    tokens: npt.ArrayLike, *, on_logits: Logits | None = None, on_hidden: HiddenStates | None = None,
    logits_from: int = 0, options: Options | None = None, progress: Progress | None = None,
) -> int:  # fmt: skip
    """Compute a model, or several with the same vocabulary, over tokens: integers [n_chunks, n_ctx], or [n_ctx] for one
    chunk. Chunks do not see each other. Returns the stored bytes that were read.

    A model is what `quantkit.open_model` takes or returns, or a `Model`, whose `variant` gives one with other weights.
    What several of them share is read once; weights that no token needs are not read.

    - `on_logits(chunk, model, logits)` is called for each chunk and each model, by number, with a torch.Tensor float32
      [n_ctx - logits_from, n_vocab]: the logits after each token from position `logits_from` on.
    - `on_hidden(layers, model, hidden)` is called after each layer with the number of layers that are done and a
      torch.Tensor float32 [n_chunks, n_ctx, n_embd], which changes in the next layer: take a copy of what you keep.
    - `options` say where and how it is computed, and where it is kept so that it can go on.
    - `progress(what, n_done, n_total)` counts tokens × layers.

    Raises SourceError for a model that cannot be computed, models that do not belong together and tokens that are none
    of theirs, WeightError for weights that are NaN or Inf, KernelError without torch or the device, OutputError and
    ResumeError for `options.folder`."""
    import numpy as np

    from ..model.open import open_model

    stream, model_class = _computing("stream"), _computing("model").Model
    given = [models] if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence) else models
    made: list[Model] = []
    for one in given:
        if isinstance(one, str | os.PathLike):
            made.append(model_class(open_model(os.fspath(one))))
        else:
            made.append(one if isinstance(one, model_class) else model_class(one))
    more = {} if progress is None else {"progress": progress}
    stream.Pass(
        made, np.atleast_2d(np.asarray(tokens)), options or stream.Options(), on_logits=on_logits,
        logits_from=logits_from, on_hidden=on_hidden, **more,
    ).run()  # fmt: skip
    return sum(reader.bytes_read for reader in {id(m.weights): m.weights for m in made}.values())

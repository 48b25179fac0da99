"""What stands on the forward pass: importance matrices made, and what a recipe costs in quality. May import
everything but the command line and the API. Its rooms: calibration, evaluation, generation, and on evaluation studies
and allocation; scripting has what they do for scripts, identity says what results are of, fetched brings shards from
the Hub, frames makes DataFrames."""

from __future__ import annotations

from ..base.errors import KernelError


def require_torch() -> None:
    """Raise KernelError where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise KernelError("torch, which computes models, is not installed; run: pip install 'quantkit[lab]'") from None

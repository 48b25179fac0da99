"""Experiments that run models: making importance matrices, and measuring what a recipe costs in quality. May import
everything but the command line and the API. Its rooms: calibration, evaluation, generation, and, built on evaluation,
studies and allocation. `scripting` is the interface for scripts, `identity` names what a result was measured on,
`fetched` brings shards from the Hub, and `frames` makes DataFrames."""

from __future__ import annotations

from ..base.errors import KernelError


def require_torch() -> None:
    """Raise KernelError where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise KernelError("torch, which computes models, is not installed; run: pip install 'quantkit[lab]'") from None
